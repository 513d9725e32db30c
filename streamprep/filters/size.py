"""``size:A..B``: keep videos whose shorter side has so many pixels, as displayed, before any crop."""

from __future__ import annotations

from streamprep.filters._arguments import RangeFilter


def make_filter(argument: str) -> RangeFilter:
    """A filter for one range."""
    return RangeFilter(
        argument, lambda metadata: min(metadata["height"], metadata["width"]), what="shorter side", unit=" pixels"
    )
