"""``--validation-split``: which samples are held out of the output.

By a draw from the seed and the key: a sample whose draw is below the wanted share is held out, or those with the lowest
draws, if a number is wanted. So more samples in the dataset, or a larger share, take none back that were held out.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import TYPE_CHECKING

from streamprep.errors import UserError

if TYPE_CHECKING:
    from streamprep.shards import ShardSample


def parse_split(asked: str) -> int | float:
    """A number of samples, from 1, or a share of them, above 0 and below 1.

    Raises:
        UserError: if it is neither.
    """
    if asked.isascii() and asked.isdecimal() and int(asked) >= 1:
        return int(asked)
    try:
        share = float(asked)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise UserError(
            f"--validation-split must be a number of videos, from 1, or a share of them between 0 and 1, got {asked!r}"
        )
    return share


class HeldOut:
    """Decides who is held out.

    Args:
        asked: As `parse_split` takes it.
        seed: With the key, it decides.
    """

    def __init__(self, asked: str, *, seed: int) -> None:
        wanted = parse_split(asked)
        self.number = wanted if isinstance(wanted, int) else None
        """How many; None for a share."""
        self._share, self._seed = wanted, seed
        self._keys: frozenset[str] | None = None

    def survey(self, samples: Iterable[ShardSample]) -> None:
        """Look at all samples that could be encoded: it must, before it can choose a number of them."""
        assert self.number is not None
        draws = ((self._draw(sample.key), sample.key) for sample in samples)
        self._keys = frozenset(key for _, key in heapq.nsmallest(self.number, draws))

    def holds_out(self, key: str) -> bool:
        """Whether a sample is for validation."""
        if self.number is None:
            return self._draw(key) < self._share
        assert self._keys is not None, "survey comes first"
        return key in self._keys

    def _draw(self, key: str) -> float:
        from streamprep.sampling import uniform  # the command line must not wait for numpy

        return uniform(self._seed, key, "validation")
