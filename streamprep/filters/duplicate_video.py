"""``duplicate-video``: of samples with the same video, byte for byte, keep the first in the shards' order."""

from __future__ import annotations

from streamprep.filters import _arguments
from streamprep.filters._duplicates import Duplicates


def make_filter(argument: str) -> Duplicates:
    """By the sha256 that packing took."""
    _arguments.refuse(argument)
    return Duplicates(lambda sample: sample.metadata.get("sha256"), what="its video is that of")
