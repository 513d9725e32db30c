"""What every way of decoding has in common: tasks in, results out in the same order. And the simplest way."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from streamprep.decode import decode_into
from streamprep.errors import BadSample, first_line
from streamprep.types import DecodeRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeTask:
    """One clip to decode."""

    key: str
    video: bytes | BadSample
    """The encoded file, or why it could not be read: then the result is that, in its place in the order."""
    request: DecodeRequest
    tag: object = None
    """Handed back untouched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """One task's result: either ``frames`` or ``bad``."""

    key: str
    tag: object
    frames: Tensor | None
    """``(T, C, H, W)`` uint8 RGB on the CPU, valid until the next result is asked for."""
    bad: BadSample | None
    seconds: float
    """Time spent decoding, all attempts together."""
    decoder: str | None = None
    """What decoded it, as `streamprep.decode.decode_into` names it; None if it is bad."""

    def __post_init__(self) -> None:
        if (self.frames is None) == (self.bad is None):
            raise ValueError(f"{self.key!r} must have either frames or a BadSample")


@dataclass(slots=True)
class DecodeStats:
    """Where the time went so far; may be read at any moment."""

    read_seconds: float = 0.0
    """Inside the iterator of tasks: reading."""
    feeder_blocked_seconds: float = 0.0
    """Reading stood still because enough was read ahead."""
    decode_seconds: float = 0.0
    """Decoding, all children together."""
    slot_wait_seconds: float = 0.0
    """A task and a child were there but no free slot: the consumer is the slow one."""
    starved_seconds: float = 0.0
    """The consumer waited for a result: decoding or reading is the slow one."""
    sequential: int = 0
    """Clips decoded in order by PyAV, because torchcodec gave other frames than those asked for."""
    restarts: int = 0
    """Children that were replaced."""


class Decoder(Protocol):
    """Turns tasks into results, in order; close it when done."""

    stats: DecodeStats

    def map(self, tasks: Iterable[DecodeTask]) -> Iterator[Decoded]:
        """Decode every task; results come in the order of the tasks."""

    def close(self) -> None:
        """Stop at once; may be called again."""

    def __enter__(self) -> Decoder: ...

    def __exit__(self, *error: object) -> None: ...


class InlineDecoder:
    """Decodes in this process, one after the other: a file that hangs or crashes the decoder stops the process."""

    def __init__(self) -> None:
        self.stats = DecodeStats()

    def map(self, tasks: Iterable[DecodeTask]) -> Generator[Decoded, None, None]:
        """Decode every task; results come in the order of the tasks."""
        for task in pull(tasks, self.stats):
            frames, bad, decoder = None, None, None
            began = time.monotonic()
            try:
                if isinstance(task.video, BadSample):
                    raise task.video
                frames = torch.empty(task.request.shape, dtype=torch.uint8)
                decoder = decode_into(frames, task.video, task.request)
            except BadSample as error:
                frames, bad = None, error
            except MemoryError as error:  # FFmpeg's, nearly always: the file claims a table of more than 2 GB
                frames, bad = None, BadSample("decoder_memory", first_line(error))
            seconds = time.monotonic() - began
            self.stats.decode_seconds += seconds
            self.stats.sequential += decoder == "sequential"
            yield Decoded(key=task.key, tag=task.tag, frames=frames, bad=bad, seconds=seconds, decoder=decoder)

    def close(self) -> None:
        """Nothing to stop."""

    def __enter__(self) -> InlineDecoder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def pull(tasks: Iterable[DecodeTask], stats: DecodeStats) -> Iterator[DecodeTask]:
    """The tasks, while counting the time that getting them takes."""
    stream = iter(tasks)
    while True:
        began = time.monotonic()
        task = next(stream, None)
        stats.read_seconds += time.monotonic() - began
        if task is None:
            return
        yield task
