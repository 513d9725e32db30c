"""An encoder that takes its time and computes nothing, to measure all that is around it."""

from __future__ import annotations

import functools
import runpy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

# Benchmarks import this file, and decoding processes import theirs once more: so nothing heavy up here.
if TYPE_CHECKING:
    from torch import Tensor

    from streamprep.contract import LatentContract
    from streamprep.types import ClipBatch


class StandIn:
    """A `streamprep.encoders.Encoder` that sleeps.

    Args:
        seconds_per_clip: How long.
        num_frames: Of the job's clips; the self-check's, which have another number, cost nothing and are not counted.
        text_shape: Of an embedding.
        begin: Called before the first batch, whose time is not counted either.
    """

    def __init__(
        self,
        seconds_per_clip: float,
        *,
        num_frames: int,
        text_shape: tuple[int, int] = (120, 4096),
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        from streamprep.out_of_memory import BatchLimits

        self.contract = _contract(text_dim=text_shape[1])
        self.limits = BatchLimits()
        self.busy_seconds = 0.0
        self.num_clips = 0
        self.first_batch: float | None = None
        """When encoding began, of `time.perf_counter`."""
        self._seconds_per_clip, self._num_frames = seconds_per_clip, num_frames
        self._text_shape, self._begin = text_shape, begin

    def load(self) -> None:
        """There is nothing to load."""

    def encode_text(self, captions: Sequence[str]) -> list[Tensor]:
        """For each caption something of its own, at once."""
        return [_noise(self._text_shape, seed=len(caption)) for caption in captions]

    def encode_batch(self, batch: ClipBatch) -> list[dict[str, Tensor]]:
        """For each clip something of its own, after a while."""
        _, frames, _, height, width = batch.frames.shape
        if frames == self._num_frames:
            if self.first_batch is None:
                self._begin()
                self.first_batch = time.perf_counter()
            began = time.perf_counter()
            time.sleep(self._seconds_per_clip * len(batch.keys))
            self.busy_seconds += time.perf_counter() - began
            self.num_clips += len(batch.keys)
        shape = (16, 1 + (frames - 1) // 4, height // 8, width // 8)
        return [{"vae_latent": _noise(shape, seed=row)} for row in range(len(batch.keys))]


@functools.cache
def _noise(shape: tuple[int, ...], *, seed: int) -> Tensor:
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _contract(*, text_dim: int) -> LatentContract:
    tests = runpy.run_path(str(Path(__file__).parents[1] / "tests" / "making.py"))
    contract: LatentContract = tests["make_contract"](model="stand-in", dim=text_dim)
    return contract
