"""``duplicate-caption``: of samples with the same captions, white space aside, keep the shards' first."""

from __future__ import annotations

from streamprep.filters import _arguments
from streamprep.filters._duplicates import Duplicates
from streamprep.shards import ShardSample


def make_filter(argument: str) -> Duplicates:
    """By all captions of a sample, whichever of them is encoded."""
    _arguments.refuse(argument)
    return Duplicates(_captions, what="its captions are those of")


def _captions(sample: ShardSample) -> str:
    return "\0".join(" ".join(caption.split()) for caption in sample.metadata["captions"])
