"""``duration:A..B``: keep videos whose length in seconds, as the file's header says, lies in the range."""

from __future__ import annotations

from streamprep.filters._arguments import RangeFilter


def make_filter(argument: str) -> RangeFilter:
    """A filter for one range."""
    return RangeFilter(argument, lambda metadata: metadata["duration_seconds"], what="length", unit=" s")
