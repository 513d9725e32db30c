"""Keeping the first of those that are alike."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

from streamprep.shards import ShardSample


class Duplicates:
    """Leaves out every sample that is like an earlier one, in the order of the shards.

    Args:
        identity: What two samples that are alike have in common; None for one that can't be compared.
        what: It is, for the message.
    """

    def __init__(self, identity: Callable[[ShardSample], str | None], *, what: str) -> None:
        self._identity, self._what = identity, what
        self._first_of: dict[str, str] | None = None

    def survey(self, samples: Iterable[ShardSample]) -> None:
        first_of: dict[bytes, str] = {}
        self._first_of = {}
        for sample in samples:
            if (identity := self._identity(sample)) is not None:
                digest = hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=16).digest()
                first = first_of.setdefault(digest, sample.key)
                if first != sample.key:
                    self._first_of[sample.key] = first

    def excludes(self, sample: ShardSample) -> str | None:
        assert self._first_of is not None, "survey comes first"
        first = self._first_of.get(sample.key)
        return f"{self._what} {first}" if first is not None else None
