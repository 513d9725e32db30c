"""Tensors as members of WebDataset tars: encoding, decoding, and a decoder for webdataset's own pipelines.

A member ``KEY.NAME.safetensors`` holds the one tensor ``NAME``; the n-th caption's, where a clip has several, is
``KEY.text_embedding.NN.safetensors``. ``.npy`` is NumPy's format, which knows no bfloat16.

``.safetensors.zst`` is for cold storage: the first bytes of all values come first, then the second ones, and so on, as
the uint8 tensor ``(bytes of a value, number of values)`` of a safetensors file, compressed by zstandard; its metadata
say dtype and shape. Exponents then lie side by side, and that is what can be compressed.

Nothing is ever unpickled.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch
import zstandard
from torch import Tensor

from streamprep import canonical

FORMATS = ("safetensors", "npy")
COMPRESSIONS = ("none", "zstd")
RAW, BYTE_SPLIT_ZSTD = "raw", "byte-split-zstd"
CODECS = (RAW, BYTE_SPLIT_ZSTD)
"""How a tensor's bytes lie in a file: as they are, or as a whole ``.safetensors.zst`` member."""

_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
DTYPES = tuple(_CODES)
_NPY_CODES = {"float32": "<f4", "float16": "<f2"}
_MEMBER = re.compile(r"\.?(?P<name>[a-z][a-z0-9_]*)(\.\d+)?\.(?P<format>safetensors|safetensors\.zst|npy)")
_ALIGNMENT = 8
_ZSTD_LEVEL = 3
_MOST_BYTES = 2**33  # of a tensor, by a stranger's word alone
_BFLOAT16_EXPONENT = 0x7F80
_VALUES_AT_ONCE = 2**14  # torch shares no less than twice this out to its threads


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedTensor:
    """The content of a member."""

    extension: str
    """After ``KEY.NAME.``."""
    chunks: tuple[bytes | memoryview, ...]
    offset: int
    """Where in the member the bytes lie that `decode_bytes` takes."""
    size: int
    """Of those."""
    dtype: str
    shape: tuple[int, ...]
    codec: str

    @property
    def size_bytes(self) -> int:
        """Of the member."""
        return sum(len(chunk) for chunk in self.chunks)


def encode_tensor(
    name: str, tensor: Tensor, *, format: str = "safetensors", compression: str = "none"
) -> EncodedTensor:
    """A tensor as a member.

    Args:
        name: Of the tensor.
        tensor: Contiguous on the CPU, of one of `DTYPES`; its memory is looked at, not copied.
        format: One of `FORMATS`.
        compression: One of `COMPRESSIONS`; only safetensors are compressed.

    Raises:
        ValueError: if the format cannot hold it.
    """
    dtype, shape = dtype_name(tensor.dtype), tuple(tensor.shape)
    if format == "npy" and (dtype not in _NPY_CODES or compression != "none"):
        raise ValueError(f"npy cannot hold {dtype} with compression {compression}")
    values = tensor_bytes(tensor)
    if compression == "zstd":
        planes = np.ascontiguousarray(values.reshape(-1, tensor.itemsize).T)
        metadata = {"dtype": dtype, "shape": canonical.to_json(shape).decode()}
        head = _safetensors_head(name, "U8", planes.shape, planes.nbytes, metadata)
        data = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(head + planes.tobytes())
        return EncodedTensor(
            extension="safetensors.zst",
            chunks=(data,),
            offset=0,
            size=len(data),
            dtype=dtype,
            shape=shape,
            codec=BYTE_SPLIT_ZSTD,
        )
    head = _npy_head(dtype, shape) if format == "npy" else _safetensors_head(name, _CODES[dtype], shape, values.nbytes)
    return EncodedTensor(
        extension=format,
        chunks=(head, values.data) if values.nbytes else (head,),
        offset=len(head),
        size=values.nbytes,
        dtype=dtype,
        shape=shape,
        codec=RAW,
    )


def decode_bytes(data: bytes | bytearray | memoryview, *, dtype: str, shape: Sequence[int], codec: str = RAW) -> Tensor:
    """A tensor out of the bytes that an output's index points to: ``offset``, ``size`` and these arguments.

    Args:
        data: All of them. What can be written to is not copied, if it is not compressed: the tensor is that memory.
        dtype: ``float32``, ``float16``, ``bfloat16``.
        shape: Of the tensor.
        codec: One of `CODECS`.

    Raises:
        ValueError: if they are not those of such a tensor.
    """
    if dtype not in _CODES:
        raise ValueError(f"a tensor of dtype {dtype!r}: one of {', '.join(DTYPES)} is expected")
    torch_dtype: torch.dtype = getattr(torch, dtype)
    size_bytes = math.prod(shape) * torch_dtype.itemsize
    if codec == BYTE_SPLIT_ZSTD:
        return _join_planes(data, dtype=dtype, shape=shape)
    if codec != RAW:
        raise ValueError(f"a tensor of codec {codec!r}: one of {', '.join(CODECS)} is expected")
    if len(data) != size_bytes:
        raise ValueError(f"{len(data)} bytes, a {dtype} tensor of shape {tuple(shape)} has {size_bytes}")
    if not size_bytes:
        return torch.empty(tuple(shape), dtype=torch_dtype)
    values = np.frombuffer(data, np.uint8)
    if not values.flags.writeable:
        values = values.copy()
    return torch.from_numpy(values).view(torch_dtype).reshape(tuple(shape))


def decode_member(name: str, data: bytes) -> Tensor | None:
    """A tensor out of a member that `encode_tensor` made; None if it is something else.

    Args:
        name: Of the member, without its key: ``vae_latent.safetensors``.
        data: Its content.

    Raises:
        ValueError: if it is damaged.
    """
    match = _MEMBER.fullmatch(name)
    if match is None:
        return None
    if match["format"] == "npy":
        array = np.load(io.BytesIO(data), allow_pickle=False)
        return torch.from_numpy(array) if array.dtype.str in _NPY_CODES.values() else None
    if match["format"] == "safetensors.zst":
        return _join_planes(data)
    tensors = _load_safetensors(data)
    return tensors[match["name"]] if set(tensors) == {match["name"]} else None


def decode_latents(key: str, data: bytes) -> Any:
    """A handler for webdataset: ``webdataset.WebDataset(urls).decode(decode_latents)``.

    Returns:
        The tensor of a member of ours, the dictionary of a sample's ``.json``, and None for all else, which other
        handlers may know.
    """
    if key.lstrip(".") == "json":
        return json.loads(data)
    return decode_member(key, data)


def cast(tensor: Tensor, dtype: str) -> Tensor:
    """A tensor in another dtype, rounded to the nearest.

    In pieces, each in this thread: torch's own threads would wait for cores that decoding holds (see
    `streamprep.batches`).

    Raises:
        OverflowError: if a finite value would become infinite; says how large it is.
    """
    wanted: torch.dtype = getattr(torch, dtype)
    if tensor.dtype == wanted:
        return tensor
    result = torch.empty_like(tensor, dtype=wanted)
    source, target = tensor.reshape(-1), result.reshape(-1)
    for start in range(0, len(source), _VALUES_AT_ONCE):
        target[start : start + _VALUES_AT_ONCE] = source[start : start + _VALUES_AT_ONCE]
    if not is_finite(result) and is_finite(tensor):
        largest = float(tensor.detach().abs().max())
        raise OverflowError(f"it holds {largest:g}, and {dtype} ends at {torch.finfo(wanted).max:g}")
    return result


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; by NumPy, whose loops are of this thread."""
    if tensor.dtype == torch.bfloat16:  # which NumPy does not know
        bits = tensor.detach().view(torch.int16).numpy()
        return not ((bits & _BFLOAT16_EXPONENT) == _BFLOAT16_EXPONENT).any()
    return bool(np.isfinite(tensor.detach().numpy()).all())


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same to the last bit, dtype and shape included."""
    return (
        one.dtype == other.dtype and one.shape == other.shape and np.array_equal(tensor_bytes(one), tensor_bytes(other))
    )


def tensor_bytes(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A contiguous tensor's memory, little-endian in C order."""
    if not tensor.numel():  # its strides may be anything
        return np.empty(0, np.uint8)
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def dtype_name(dtype: torch.dtype) -> str:
    """``float32``, for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def _safetensors_head(
    name: str, code: str, shape: Sequence[int], size_bytes: int, metadata: dict[str, str] | None = None
) -> bytes:
    """All of a safetensors file but the values of its only tensor: the length of a JSON text, and that text."""
    described = {name: {"dtype": code, "shape": list(shape), "data_offsets": [0, size_bytes]}}
    text = canonical.to_json(({"__metadata__": metadata} if metadata else {}) | described)
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _npy_head(dtype: str, shape: Sequence[int]) -> bytes:
    head = io.BytesIO()
    described = {"descr": _NPY_CODES[dtype], "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(head, described)
    return head.getvalue()


def _load_safetensors(data: bytes) -> dict[str, Tensor]:
    try:
        loaded: dict[str, Tensor] = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"not a safetensors file: {error}") from error
    return loaded


def _join_planes(
    data: bytes | bytearray | memoryview, *, dtype: str | None = None, shape: Sequence[int] | None = None
) -> Tensor:
    """The reverse of what ``.safetensors.zst`` does; dtype and shape are those it should have, if they are known."""
    content = _decompress(data)
    found_dtype, found_shape = _described(content)
    if dtype not in (None, found_dtype) or (shape is not None and tuple(shape) != found_shape):
        raise ValueError(f"a {found_dtype} tensor of shape {found_shape}, not {dtype} of shape {tuple(shape or ())}")
    (planes,) = _load_safetensors(content).values()
    torch_dtype: torch.dtype = getattr(torch, found_dtype)
    if planes.dtype != torch.uint8 or tuple(planes.shape) != (torch_dtype.itemsize, math.prod(found_shape)):
        raise ValueError(f"byte planes of shape {tuple(planes.shape)} are no {found_dtype} tensor {found_shape}")
    values = np.ascontiguousarray(planes.numpy().T)
    return decode_bytes(values.reshape(-1).data if values.size else b"", dtype=found_dtype, shape=found_shape)


def _decompress(data: bytes | bytearray | memoryview) -> bytes:
    try:
        size = zstandard.frame_content_size(data)
        if not 0 <= size <= _MOST_BYTES:
            raise ValueError(f"a zstandard frame of {size} bytes is no tensor of ours")
        return zstandard.ZstdDecompressor().decompress(data)
    except zstandard.ZstdError as error:
        raise ValueError(f"not a zstandard frame: {error}") from error


def _described(content: bytes) -> tuple[str, tuple[int, ...]]:
    """(dtype, shape) as the metadata of a safetensors file say."""
    length = int.from_bytes(content[:8], "little")
    try:
        metadata = json.loads(content[8 : 8 + length])["__metadata__"]
        dtype, shape = metadata["dtype"], tuple(json.loads(metadata["shape"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"byte planes without dtype and shape: {error!r}") from error
    if dtype not in _CODES or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"byte planes of a {dtype!r} tensor of shape {shape!r}")
    return dtype, shape
