"""Batches that are too large for the memory: cut in halves, down to one; what fits is remembered.

How much memory a batch takes, only trying it tells: it depends on the model, the kernels, and what else uses the GPU.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from streamprep.errors import OutOfMemory, first_line, says_out_of_memory

T = TypeVar("T")

TEXT = "text"
"""The kind of batches of captions; clips are of the kind of their bucket, ``TxHxW``."""

_IN_DISGUISE = ("out of memory", "STATUS_ALLOC_FAILED")  # of the CUDA runtime, of cuBLAS and cuDNN
_OF_ONEDNN = ("could not create a primitive", "could not execute a primitive")
"""All that it says on a CPU whose memory is full; seldom of anything else, which fails again in a smaller batch."""


class BatchLimits:
    """How many of each kind the memory holds at once, as far as it failed to hold more; one for each encoder."""

    def __init__(self) -> None:
        self._limits: dict[str, int] = {}
        self._halved: dict[str, int] = {}

    def encode(self, kind: str, num_items: int, encode: Callable[[slice], list[T]]) -> list[T]:
        """Encode a batch, in parts if it's too large for the memory.

        Args:
            kind: Batches of one kind take about the same memory for each item.
            num_items: In the batch.
            encode: Gives the results of these items; it may be asked for the same ones again.

        Returns:
            A result for each item.

        Raises:
            OutOfMemory: if one item alone is too large.
        """
        results: list[T] = []
        start = 0
        while start < num_items:
            size = min(self._limits.get(kind, num_items), num_items - start)
            try:
                results += encode(slice(start, start + size))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1:
                    raise OutOfMemory(_nothing_fits(kind, error)) from error
                self._limits[kind] = (size + 1) // 2
                fits = False
            else:
                start += size
                fits = True
            if not fits:  # only here, where the error is gone: the frames of its traceback hold the batch's tensors
                _free_memory()
        if (limit := self._limits.get(kind, num_items)) < num_items:
            self._halved[kind] = limit
        return results

    def take_halved(self) -> dict[str, int]:
        """What was encoded in parts since this was last asked: of each kind, how many at once."""
        halved, self._halved = self._halved, {}
        return halved

    @property
    def found(self) -> dict[str, int]:
        """Of each kind that was too large, how many at once are not."""
        return dict(self._limits)


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Moving weights to a device, which may have no room for them.

    Raises:
        OutOfMemory: saying what to do.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # others may have filled the GPU: then CUDA itself says it
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"{what} does not fit the GPU's memory beside what is there ({first_line(error)}): end what else uses it, "
            "take --offload-text-encoder, or encode into another folder with --vae-dtype bfloat16"
        ) from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether an encoder's error says that there was not enough memory, of whatever device."""
    return (
        isinstance(error, torch.OutOfMemoryError)
        or says_out_of_memory(error)
        or any(text in str(error) for text in _IN_DISGUISE)
        or str(error) in _OF_ONEDNN
    )


def _free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where there is no GPU


def _nothing_fits(kind: str, error: Exception) -> str:
    what, smaller = f"one clip of {kind}", "--max-height and --max-width, --num-frames, --vae-dtype bfloat16"
    if kind == TEXT:
        what, smaller = "one caption", "--text-dtype bfloat16"
    return (
        f"not even {what} alone fits the memory ({first_line(error)}). What is done is kept: with more room (end what "
        "else uses the memory; --offload-text-encoder, on a GPU) the same command goes on from here. Else encode into "
        f"another folder with {smaller}"
    )
