"""Whether rows that have all small columns in common are one row, there twice, or clips that only look alike.

FastVideo's scripts leave rows twice when they are run twice, or with several loader workers, encoded anew and so not
always bit for bit the same. And its ids are names cut at the first dot: ``a.1.mp4`` and ``a.2.mp4`` are both ``a``,
under one caption if that is a trigger word. What tells them apart are the latents.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamprep.foreign.parquet import LATENT, ForeignFile, UnreadableGroup, read_group
from streamprep.storage import Store

Place = tuple[int, int, int]
"""File, row group, and position in it."""

_SKETCH = 1024
"""Numbers that are kept of a latent: 4 kB a row."""
_NEAR = 0.03
"""Root mean square of the difference, in standard deviations of the model's latents. Encoding in bfloat16 instead of
float32 comes to 0.011 (`benchmarks/precision.py`); latents that have nothing in common to 1.4."""


class Repetitions:
    """Finds out which rows are there again.

    Args:
        store: Has the files.
        files: By number.
        contract: As declared.
    """

    def __init__(self, store: Store, files: Sequence[ForeignFile], contract: Mapping[str, Any]) -> None:
        self._store, self._files, self._contract = store, files, contract
        self._signatures: dict[Place, NDArray[np.float32]] = {}
        self._kept: dict[object, list[NDArray[np.float32]]] = {}

    def read(self, places: Iterable[Place], shapes: Mapping[Place, Sequence[int]]) -> None:
        """Read rows that may be there twice, a row group at a time.

        Args:
            places: Of those rows.
            shapes: Of their latents (C, T, H, W), if they have any.
        """
        tensors = [LATENT] if LATENT in self._contract["tensors"] else list(self._contract["tensors"])
        for (number, group), of_group in itertools.groupby(sorted(places), key=lambda place: place[:2]):
            file = self._files[number]
            try:
                columns = read_group(
                    self._store,
                    file.path,
                    group,
                    tensors,
                    size_bytes=file.size_bytes,
                    footer_sha256=file.footer_sha256,
                )
            except UnreadableGroup:
                continue  # its rows will be bad
            for place in of_group:
                stored = [columns.stored(name, place[2]) for name in tensors]
                signature = self._of_latent(stored[0], shapes[place]) if tensors == [LATENT] else _of_bytes(stored)
                if signature is not None:
                    self._signatures[place] = signature

    def is_one(self, place: Place, name: object) -> bool:
        """Whether a row is one again; to be asked in their order.

        Args:
            place: Of the row.
            name: What a row and its repetition have in common.
        """
        signature = self._signatures.get(place)
        if signature is None:
            return False
        kept = self._kept.setdefault(name, [])
        if kept and float(np.square(np.stack(kept) - signature).mean(axis=1).min()) < _NEAR**2:
            return True
        kept.append(signature)
        return False

    def _of_latent(self, data: memoryview, shape: Sequence[int]) -> NDArray[np.float32] | None:
        """A count sketch of it, normalised: the mean square of the difference of two is that of the latents', to 4 %.

        Source: Charikar, Chen and Farach-Colton, Finding Frequent Items in Data Streams, 2002. None if it is none.
        """
        if len(data) != 4 * int(np.prod(shape)):
            return None
        latent = np.frombuffer(data, "<f4").reshape(tuple(shape))
        video = self._contract["video"]
        if video["space"] == "raw":
            mean, std = (
                np.array(video[name], np.float32)[:, None, None, None] for name in ("latents_mean", "latents_std")
            )
            latent = (latent - mean) / std
        if not np.isfinite(latent).all():
            return None
        slots, signs = _hashes(latent.size)
        sums = np.bincount(slots, weights=latent.reshape(-1) * signs, minlength=_SKETCH)
        sketch: NDArray[np.float32] = (sums * (_SKETCH / latent.size) ** 0.5).astype(np.float32)
        return sketch


@lru_cache(maxsize=4)
def _hashes(num_values: int) -> tuple[NDArray[np.int16], NDArray[np.int8]]:
    """Where each value goes, and its sign."""
    random = np.random.default_rng(num_values)
    signs = random.integers(0, 2, num_values, np.int8) * np.int8(2) - np.int8(1)
    return random.integers(0, _SKETCH, num_values, np.int16), signs


def _of_bytes(stored: Iterable[memoryview]) -> NDArray[np.float32]:
    digest = hashlib.sha256()
    for data in stored:
        digest.update(data)
    return np.frombuffer(digest.digest(), np.uint8).astype(np.float32)
