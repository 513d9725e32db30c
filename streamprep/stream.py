"""Shards -> clips, one after the other, without ever holding a shard.

`ClipStream` is for any training or encoding loop; `decode_units` is what it and the encode command are made of.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

import torch.utils.data

from streamprep.cache import Cache, open_cache
from streamprep.decode_pool import DecodePool
from streamprep.decoder import Decoded, Decoder, DecodeTask, InlineDecoder
from streamprep.errors import BadSample
from streamprep.filters import Filters
from streamprep.manifest import Shards, load_index, open_shards
from streamprep.plan import ClipPlan, SamplingRules, UnitPlan, plan_unit
from streamprep.prepare import open_filters
from streamprep.read import read_units
from streamprep.storage import Store
from streamprep.types import Clip


def decode_units(
    store: Store, units: Iterable[UnitPlan], decoder: Decoder, cache: Cache | None = None
) -> Iterator[tuple[UnitPlan, ClipPlan, Decoded]]:
    """Read and decode the clips of units, in the order of their plans.

    The frames of an item are valid until the next one is asked for.

    Args:
        store: The shards.
        units: Taken one by one, as reading gets to them.
        decoder: A pool of processes, or this one.
        cache: Where the encoded videos are kept.
    """
    tasks = (
        DecodeTask(key=clip.key, video=video, request=clip.request, tag=(unit, clip))
        for unit, clip, video in read_units(store, units, cache)
    )
    for decoded in decoder.map(tasks):
        unit, clip = cast("tuple[UnitPlan, ClipPlan]", decoded.tag)
        yield unit, clip, decoded


class ClipStream(torch.utils.data.IterableDataset[Clip]):
    """The clips of packed shards, decoded on the way.

    Iterated directly, clips are decoded by child processes that may be killed by a bad video without harm. In a
    ``DataLoader`` worker, which may not have children, they are decoded in that worker; a video that hangs FFmpeg then
    hangs the worker. Workers and ranks share the shards out: worker ``w`` of rank ``r`` takes every
    ``world_size * num_workers``-th from ``r * num_workers + w``. Bad clips are left out and counted in ``bad``.

    Args:
        shards: What `streamprep pack` wrote: a folder, a URL, or a brace pattern of tars.
        rules: Which frames, how large.
        num_workers: Child processes outside a ``DataLoader``.
        rank: Number of this process among ``world_size``.
        world_size: Processes that share the shards.
        decode_timeout_seconds: Longest a clip may take before its process is killed.
        decode_memory_bytes: Most a process may take beyond what it starts with.
        cache_dir: Local folder to keep what was read, as ``--cache-dir``.
        cache_gb: Most to keep there, in GB (10^9 bytes).

    Example:
        ``DataLoader(ClipStream("my_shards", rules), batch_size=None, num_workers=4)``
    """

    def __init__(
        self,
        shards: str,
        rules: SamplingRules,
        *,
        num_workers: int = 1,
        rank: int = 0,
        world_size: int = 1,
        decode_timeout_seconds: float = 120.0,
        decode_memory_bytes: int = 4 * 2**30,
        cache_dir: str | None = None,
        cache_gb: float = 100.0,
    ) -> None:
        super().__init__()
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}")
        self._shards, self._rules, self._num_workers = shards, rules, num_workers
        self._rank, self._world_size = rank, world_size
        self._timeout_seconds, self._memory_bytes = decode_timeout_seconds, decode_memory_bytes
        self._cache_dir, self._cache_gb = cache_dir, cache_gb
        self.bad: list[tuple[str, BadSample]] = []
        """(key, why) of the bad clips of the latest pass; in a ``DataLoader`` each worker has its own."""

    def __iter__(self) -> Iterator[Clip]:
        shards = open_shards(self._shards)
        self.bad = []
        worker = torch.utils.data.get_worker_info()
        filters = open_filters(shards, self._rules)
        units = self._units(shards, worker.id if worker else 0, worker.num_workers if worker else 1, filters)
        if worker is not None:
            yield from self._clips(shards.store, units, filters, InlineDecoder())
            return
        with DecodePool(
            num_workers=self._num_workers,
            num_slots=2 * self._num_workers,
            slot_bytes=max(3 * one.num_frames * one.height * one.width for one in self._rules.sizes),
            timeout_seconds=self._timeout_seconds,
            memory_bytes=self._memory_bytes,
        ) as pool:
            yield from self._clips(shards.store, units, filters, pool)

    def _units(
        self, shards: Shards, worker: int, num_workers: int, filters: Filters | None = None
    ) -> Iterator[UnitPlan]:
        infos = shards.manifest.shards
        for number in range(self._rank * num_workers + worker, len(infos), self._world_size * num_workers):
            unit = plan_unit(f"{number:06d}", load_index(shards.store, infos[number]), self._rules, filters)
            self.bad += [(bad.key, BadSample(bad.reason, bad.message, stage="plan")) for bad in unit.bad]
            yield unit

    def _clips(self, store: Store, units: Iterable[UnitPlan], filters: Filters, decoder: Decoder) -> Iterator[Clip]:
        cache = open_cache(self._cache_dir, self._cache_gb)
        for _, clip, decoded in decode_units(store, units, decoder, cache):
            if decoded.bad is not None:
                self.bad.append((clip.key, decoded.bad))
                continue
            assert decoded.frames is not None
            if filters.excludes_frames(decoded.frames) is None:
                yield Clip(key=clip.key, frames=decoded.frames.clone(), caption=clip.rows[0].caption)
