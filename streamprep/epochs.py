"""The order of an epoch: batches of one bucket each, which follow from (seed, epoch, batch size) and nothing else.

Ranks and workers only share them out: rank r of W takes those numbered consumed + r, consumed + r + W, ... So an epoch
that was left off after ``consumed`` batches goes on anywhere, on another number of ranks and workers.

Shuffling sorts by the raw numbers of PCG64, a stream that numpy promises never to change; its ``permutation`` has no
such promise, and a new numpy must not break the resuming of an old run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamprep.errors import UserError

Rows = NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The rows of one dataset, and how many of them an epoch draws."""

    start: int
    """Of its rows among those of all datasets."""
    num_rows: int
    clip: Rows | None
    """Of each row, the number of its clip, where one caption of each clip is drawn; None if each row is drawn for
    itself."""
    num_drawn: int
    """More than there are rows (or clips): each as often as the next one, but for a rest that differs by epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """What epochs are drawn from."""

    bucket: Rows
    """Of each row of all datasets."""
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """One epoch, before it is shared out."""

    batches: Rows
    """(number of batches, batch size): the rows of each."""
    num_drawn: int
    """Rows that were drawn."""
    num_dropped: int
    """Of those, in no batch because they did not fill one."""
    num_repeated: int
    """How many stand twice, to fill batches."""


def count_draws(sizes: Sequence[int], *, repeats: Sequence[float], weights: Sequence[float] | None) -> list[int]:
    """How many rows of each dataset an epoch draws.

    Args:
        sizes: Rows (or clips) of each.
        repeats: How often an epoch goes through each; a fraction draws a part, another one each epoch.
        weights: Their shares of an epoch, which ends when the first has been gone through so often; None takes all.
    """
    most = [size * repeat for size, repeat in zip(sizes, repeats, strict=True)]
    if weights is None:
        return [round(number) for number in most]
    scale = min(number / weight for number, weight in zip(most, weights, strict=True))
    return [int(weight * scale + 1e-6) for weight in weights]


def make_epoch(pool: Pool, *, seed: int, epoch: int, batch_size: int, drop_last: bool) -> Epoch:
    """Draw, shuffle, cut into batches of one bucket, shuffle those.

    Args:
        pool: What is drawn from.
        seed: Of everything.
        epoch: Each is another order.
        batch_size: Rows in a batch.
        drop_last: Whether rows that fill no batch are left out, or some others taken again to fill one.
    """
    drawn = np.concatenate([_draw(part, seed, epoch, number) for number, part in enumerate(pool.parts)])
    rows = drawn[_order(len(drawn), seed, epoch, "rows")]
    buckets = pool.bucket[rows]
    rows = rows[np.argsort(buckets, kind="stable")]
    batches, dropped, repeated = [], 0, 0
    ends = np.cumsum(np.bincount(buckets)) if len(rows) else np.zeros(0, np.int64)
    for start, end in zip(np.concatenate([[0], ends[:-1]]), ends, strict=True):
        of_bucket = rows[start:end]
        rest = len(of_bucket) % batch_size
        if rest and drop_last:
            of_bucket = of_bucket[: len(of_bucket) - rest]
            dropped += rest
        elif rest:
            of_bucket = np.resize(of_bucket, len(of_bucket) - rest + batch_size)  # from its start again
            repeated += batch_size - rest
        batches.append(of_bucket.reshape(-1, batch_size))
    whole = np.concatenate(batches) if batches else np.zeros((0, batch_size), np.int32)
    return Epoch(
        batches=whole[_order(len(whole), seed, epoch, "batches")],
        num_drawn=len(rows),
        num_dropped=dropped,
        num_repeated=repeated,
    )


def share(num_batches: int, *, consumed: int, rank: int, world_size: int, drop_last: bool) -> range:
    """The numbers of the batches that a rank takes; each rank takes as many.

    With ``drop_last`` the last ones are left out that do not go round; else they go round from the first again, so that
    numbers may be ``num_batches`` and above.
    """
    left = max(0, num_batches - consumed)
    rounds = left // world_size if drop_last else -(-left // world_size)
    return range(consumed + rank, consumed + rounds * world_size, world_size)


def of_worker(numbers: range, *, worker: int, num_workers: int) -> range:
    """Those of a rank's batches that a ``DataLoader`` worker makes: torch takes them in turn from its workers."""
    return numbers[worker::num_workers]


def chance(*words: object) -> int:
    """A number below 2**64 that follows from some words."""
    text = "\0".join(map(str, words)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def check_at_least_one(epoch: Epoch, *, world_size: int, drop_last: bool, batch_size: int, num_buckets: int) -> None:
    """Refuse an epoch without a step.

    Raises:
        UserError: with what to change.
    """
    if share(len(epoch.batches), consumed=0, rank=0, world_size=world_size, drop_last=drop_last):
        return
    raise UserError(
        f"{epoch.num_drawn} rows in {num_buckets} buckets give {len(epoch.batches)} whole batches of {batch_size}, "
        f"fewer than the {world_size} ranks: lower batch_size, or say drop_last=False"
    )


def _draw(part: Part, seed: int, epoch: int, number: int) -> Rows:
    rows = np.arange(part.num_rows, dtype=np.int32)
    if part.clip is not None:
        by_clip = np.lexsort((_numbers(part.num_rows, seed, epoch, f"captions of {number}"), part.clip))
        clips = part.clip[by_clip]
        rows = rows[by_clip[np.concatenate([[True], clips[1:] != clips[:-1]])]] if len(rows) else rows
    if not len(rows):
        return rows
    times, rest = divmod(part.num_drawn, len(rows))
    if rest:
        some = rows[_order(len(rows), seed, epoch, f"part of {number}")[:rest]]
        rows = np.concatenate([np.tile(rows, times), some])
    else:
        rows = np.tile(rows, times)
    return np.asarray(rows + part.start, dtype=np.int32)


def _order(number: int, *words: object) -> NDArray[np.intp]:
    return np.argsort(_numbers(number, *words), kind="stable")


def _numbers(number: int, *words: object) -> NDArray[Any]:
    return np.asarray(np.random.PCG64(chance(*words)).random_raw(number))
