"""FastVideo's columns: their names and types."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from streamprep.errors import UserError

OLDER_NAMES = {"vae_latent": "latent", "caption": "prompt"}
"""What columns were called in files of earlier versions, which FastVideo's readers still take."""
SMALL = ("id", "file_name", "caption", "media_type", "width", "height", "num_frames", "duration_sec", "fps")

_TEXTS = ("id", "file_name", "caption", "media_type")


def column_of(tensor_or_text: str, names: Iterable[str]) -> str | None:
    """What a tensor's bytes' or a text's column is called in a file, without ``_bytes``; None if it has none."""
    names = set(names)
    for name in (tensor_or_text, OLDER_NAMES.get(tensor_or_text, "")):
        if name in names or f"{name}_bytes" in names:
            return name
    return None


def columns_to_read(schema: Any, tensors: Iterable[str], where: str) -> dict[str, str]:
    """What the file calls the columns that a survey reads: `SMALL`, of those there are, and shapes and dtypes.

    Args:
        schema: Of the file, as Arrow has it.
        tensors: Of the contract.
        where: The file, for messages.

    Raises:
        UserError: if a column of a tensor is missing, one is there twice, or one's type is not FastVideo's.
    """
    found = {name: column for name in SMALL if (column := column_of(name, schema.names)) is not None}
    types: dict[str, str] = {column: "text" if name in _TEXTS else "a number" for name, column in found.items()}
    for tensor in tensors:
        more = _tensor_columns(tensor, schema.names, where)
        found |= more
        shape, dtype = more.values()
        types |= {shape: "a list of whole numbers", dtype: "text", f"{shape.removesuffix('_shape')}_bytes": "bytes"}
    _check_types(schema, types, where)
    return found


def _check_types(schema: Any, types: dict[str, str], where: str) -> None:
    """Values that are merely turned into what they should be would be wrong without a word: a list of captions."""
    if twice := [name for name, number in Counter(schema.names).items() if number > 1 and name in types]:
        raise UserError(f"{where} has several columns {twice[0]}")
    for name, wanted in types.items():
        found = schema.field(name).type
        if not pa.types.is_null(found) and not _IS[wanted](found):
            raise UserError(f"{where}, column {name}: of type {found}, it must be {wanted}: write the file anew")


def _tensor_columns(tensor: str, names: Sequence[str], where: str) -> dict[str, str]:
    column = column_of(tensor, names)
    found = {f"{tensor}_{what}": f"{column}_{what}" for what in ("shape", "dtype")}
    if lacking := [name for name in (f"{column or tensor}_bytes", *found.values()) if name not in names]:
        raise UserError(
            f"{where} has no column {lacking[0].replace('None', tensor)}, which the declared contract needs; it has "
            f"{', '.join(names)}: declare another workload or model"
        )
    return found


def unused_columns(names: Sequence[str], used: Iterable[str]) -> Iterator[str]:
    """Columns, or names of tensors."""
    used = {name.removesuffix("_shape") for name in used}
    for name in names:
        tensor = next((name.removesuffix(end) for end in ("_bytes", "_shape", "_dtype") if name.endswith(end)), name)
        if tensor not in used and (tensor == name or name.endswith("_bytes")):
            yield tensor


def _is_text(type: Any) -> bool:
    if pa.types.is_dictionary(type):
        return _is_text(type.value_type)
    return bool(pa.types.is_string(type) or pa.types.is_large_string(type) or pa.types.is_string_view(type))


def _is_bytes(type: Any) -> bool:
    return bool(
        pa.types.is_binary(type)
        or pa.types.is_large_binary(type)
        or pa.types.is_fixed_size_binary(type)
        or pa.types.is_binary_view(type)
    )


def _is_shape(type: Any) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(is_list(type) for is_list in lists):
        return False
    return bool(pa.types.is_integer(type.value_type) or pa.types.is_null(type.value_type))


_IS = {
    "text": _is_text,
    "bytes": _is_bytes,
    "a number": lambda type: pa.types.is_integer(type) or pa.types.is_floating(type),
    "a list of whole numbers": _is_shape,
}
