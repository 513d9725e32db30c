"""What no record names says itself whether it is whole: it carries a digest of its own bytes.

``_streamprep/uncond-*.safetensors`` holds the embeddings of the empty and the negative prompt. Its metadata have the
sha256 of the text settings' digest and of all its bytes, in which 64 zeros stand in the digest's place.

``validation/validation.json`` has a sha256 of all else in it, and those of the images beside it.

Files of a time before that can be read as ever, and not compared.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import safetensors
import safetensors.torch
from torch import Tensor

from streamprep import canonical
from streamprep.job import NOT_AS_WRITTEN
from streamprep.job_plan import JobPlan

_NO_DIGEST = "0" * 64
_SEAL = re.compile(rb'"__metadata__":\{"sha256":"([0-9a-f]{64})"\}')
_OF_VALIDATION = {"data", "images", "left_out"}


class Damaged(ValueError):
    """Something else than what was written."""


def seal_unconditional(tensors: Mapping[str, Tensor], plan: JobPlan) -> bytes:
    """The file, of embeddings by name."""
    data: bytes = safetensors.torch.save(dict(tensors), metadata={"sha256": _NO_DIGEST})
    return data.replace(_NO_DIGEST.encode(), _digest(data, plan).encode(), 1)


def check_unconditional(data: bytes, plan: JobPlan) -> bool:
    """Whether the file is the one that was written; False if it is too old to know.

    Raises:
        Damaged: if it is not.
    """
    try:
        safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise Damaged(f"cannot be read: {error}") from error
    head = data[: 8 + int.from_bytes(data[:8], "little")]
    found = _SEAL.search(head)
    if found is None:
        if b'"__metadata__"' in head:
            raise Damaged("its digest is damaged")
        return False
    unsealed = data[: found.start(1)] + _NO_DIGEST.encode() + data[found.end(1) :]
    if _digest(unsealed, plan) != found[1].decode():
        raise Damaged("its bytes are not those that were written for these settings")
    return True


def seal_validation(value: Mapping[str, object]) -> bytes:
    """``validation.json``, of all that is to be in it."""
    return canonical.to_pretty_json({**value, "sha256": canonical.digest(value)})


def check_validation(data: bytes) -> tuple[dict[str, str], bool]:
    """The sha256 of each image that is named, and whether the file is the one that was written; False if it is too old.

    Raises:
        Damaged: if it is not.
    """
    try:
        value = canonical.from_json(data)
        images = {str(name): str(sha256) for name, sha256 in value["images"].items()}
    except NOT_AS_WRITTEN as error:
        raise Damaged(f"cannot be read: {error}") from error
    if value.keys() == _OF_VALIDATION:
        return images, False
    digest = value.pop("sha256", None)
    if digest != canonical.digest(value) or data != seal_validation(value):
        raise Damaged("its bytes are not those that were written")
    return images, True


def _digest(unsealed: bytes, plan: JobPlan) -> str:
    return canonical.bytes_digest(canonical.digest(plan.fingerprint["text"]).encode() + unsealed)
