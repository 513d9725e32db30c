"""``aspect:A..B``: keep videos whose width / height, as displayed, lies in the range: upright ones are below 1."""

from __future__ import annotations

from streamprep.filters._arguments import RangeFilter


def make_filter(argument: str) -> RangeFilter:
    """A filter for one range."""
    return RangeFilter(argument, lambda metadata: metadata["width"] / metadata["height"], what="width / height")
