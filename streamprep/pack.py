"""Raw videos and captions -> tar shards.

1. List the dataset, sort it by key (or shuffle by a seed), cut it into shards of a given size: all of that follows from
   the listing alone, so any number of processes, in any order, makes the same bytes.
2. ``pack.json`` records the listing's digest and the options; going on with others is refused.
3. Each shard is packed by one process: probe, hash, write the tar, then its index. A shard with an index is done. Any
   number of ranks, or of commands started by hand, share the shards out among them (`streamprep.claims`).
4. ``manifest.json`` comes last, written by whoever sees first that all shards are done; the others wait for it.

Whether a video decodes is not asked here: the original bytes are kept, and what the probe could not read is noted.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from streamprep import canonical
from streamprep.attempts import Attempt, Attempts, Ended, LastWords, Worker, describe_set_aside, what_happened
from streamprep.board import Board, BoardGone, open_board
from streamprep.claims import Claims, Timing, Wait, is_to_blame
from streamprep.config import PackConfig
from streamprep.errors import UnitsSetAside, UserError
from streamprep.manifest import MANIFEST, PACK, Manifest, ShardInfo, load_manifest
from streamprep.pack_shard import pack_shard
from streamprep.processes import JobFailed, as_taken, num_processes
from streamprep.progress import Progress, count, size
from streamprep.ranks import Rank, this_rank
from streamprep.shards import index_name, indexed_size_bytes
from streamprep.sources import list_dataset
from streamprep.sources._files import Listing, SourceOptions
from streamprep.storage import Store, check_writable, describe_staging, describe_traffic, open_store
from streamprep.traffic import add_traffic, with_traffic
from streamprep.types import RawSample

FORMAT = "streamprep-pack/1"
SKIPPED = "skipped.jsonl"
_OUR_FILE = re.compile(r"\d{6}\.(tar|json)|manifest\.json|skipped\.jsonl")
MAX_SAMPLES = 4096
"""Most samples in a shard."""
_MARKS = "_streamprep"
"""Folder for the marks of who is at which shard; gone when the manifest is there."""
_STALE_SECONDS = 300.0


def pack(config: PackConfig, *, board: Board | None = None, stale_seconds: float = _STALE_SECONDS) -> Manifest:
    """Pack a dataset into shards, or finish what an earlier call began; one of any number of ranks.

    Args:
        config: What to pack, and where to.
        board: Of all ranks; by default as the environment says.
        stale_seconds: How long a shard is left to a process that may live, on another machine.

    Raises:
        UserError: before anything is written, if the dataset or the options cannot be used.
        UnitsSetAside: if all is packed but what kills every process that tries it.
        OSError: if the machine fails; calling again goes on from there.
    """
    store = open_store(config.shards, spool_dir=config.spool_dir)
    _check_is_not_the_dataset(store, config)
    options = SourceOptions(
        video_column=config.video_column,
        caption_column=config.caption_column,
        split=config.split,
        annotations=config.annotations,
    )
    listing = list_dataset(config.dataset, config.dataset_type, options, spool_dir=config.spool_dir)
    if listing.in_order and config.shuffle is not None:
        raise UserError(
            f"--shuffle: the videos of {config.dataset} can only be read in their order; leave it out, and shuffle in "
            "training"
        )
    if config.captions_only:
        listing.samples = [dataclasses.replace(sample, has_video=False, size_bytes=0) for sample in listing.samples]
    shards = cut_into_shards(listing.samples, shard_size_bytes=config.shard_size_mb * 2**20, shuffle=config.shuffle)
    if not store.exists(PACK):
        _check_nothing_of_others(store)
        _check_space(store, sum(sample.size_bytes for sample in listing.samples))
    check_writable(store, only_writer=config.only_writer)
    options_used = {
        "shard_size_mb": config.shard_size_mb,
        "shuffle": config.shuffle,
        "captions_only": config.captions_only,
        "num_shards": len(shards),
    }
    record_listing(store, {"format": FORMAT, **options_used}, listing)
    rank = this_rank()
    packing = _Packing(store, listing, shards, rank, board or open_board(rank), stale_seconds)
    anything_left = packing.pack_all(config.num_workers)
    packing.write_manifest(check=not anything_left)
    packing.tidy()
    manifest = load_manifest(store)
    packing.report_traffic()
    return manifest


def cut_into_shards(
    samples: Sequence[RawSample], *, shard_size_bytes: int, shuffle: int | None
) -> list[list[RawSample]]:
    """Cut a listing into runs of at most ``shard_size_bytes`` of video (one larger video is a shard of its own).

    And of at most `MAX_SAMPLES`: captions without videos would all be one shard, and small videos too many for one.
    """
    if shuffle is not None:
        samples = sorted(samples, key=lambda sample: canonical.digest([shuffle, sample.key]))
    shards: list[list[RawSample]] = []
    filled = 0
    for sample in samples:
        if not shards or filled + sample.size_bytes > shard_size_bytes or len(shards[-1]) == MAX_SAMPLES:
            shards.append([])
            filled = 0
        shards[-1].append(sample)
        filled += sample.size_bytes
    return shards


def describe(listing: Listing, *, num_shards: int, num_done: int) -> str:
    """What is to be done, in a line."""
    what = "video" if any(sample.has_video for sample in listing.samples) else "caption"
    without = sum(not any(sample.captions) for sample in listing.samples)
    return (
        f"{count(len(listing.samples), what)} ({size(sum(sample.size_bytes for sample in listing.samples))}) "
        f"in {count(num_shards, 'shard')}, {num_done} done"
        + (f"; {without} without a caption: `encode` will drop them" if without else "")
        + (f"; {count(len(listing.skipped), 'listed video')} skipped, see {SKIPPED}" if listing.skipped else "")
    )


def record_listing(store: Store, options: Mapping[str, Any], listing: Listing) -> None:
    """Record what is packed, or make sure that it is what was begun.

    Args:
        store: Of the shards.
        options: What decides the shards beside the listing.
        listing: What the dataset holds.

    Raises:
        UserError: if it is not what was begun.
    """
    rows = [dataclasses.asdict(sample) for sample in listing.samples]
    wanted = {
        **options,
        "listing_sha256": canonical.digest([rows, [dataclasses.asdict(skipped) for skipped in listing.skipped]]),
        "num_samples": len(listing.samples),
    }
    if store.put_if_absent(PACK, canonical.to_pretty_json(wanted), step="pack"):
        pass
    elif (begun := json.loads(store.read(PACK))) != wanted:
        differing = "; ".join(
            f"{name}: {begun.get(name)} then, {wanted.get(name)} now"
            for name in sorted({*begun, *wanted})
            if begun.get(name) != wanted.get(name)
        )
        raise UserError(
            f"{store.url} was packed from another listing or with other options ({differing}): pack into a new folder"
        )
    if listing.skipped and not store.exists(SKIPPED):
        lines = [canonical.to_json(dataclasses.asdict(skipped)) + b"\n" for skipped in listing.skipped]
        store.put(SKIPPED, b"".join(lines), step="skipped")


def _check_is_not_the_dataset(store: Store, config: PackConfig) -> None:
    dataset, to_the_hub = config.dataset, store.url.startswith("hf://")
    if config.dataset_type == "hf" and re.fullmatch(r"[^/:]+/[^/]+", dataset) and not Path(dataset).exists():
        dataset = f"hf://datasets/{dataset}"
    if dataset.startswith("hf://") and not to_the_hub:
        return
    source = open_store(dataset)
    if store.same_place(source):
        raise UserError(f"{config.shards} is the dataset itself: pack into another folder")
    if to_the_hub and store.url.startswith(f"{source.url}/"):
        raise UserError(
            f"{config.shards} is in the dataset {dataset}, which is downloaded whole, shards included, whenever it is "
            "packed: pack into another repository, or into a folder beside that of the videos"
        )


def _check_nothing_of_others(store: Store) -> None:
    """Files of our names without a pack.json are somebody else's, or of a pack whose listing is lost."""
    for entry in store.list():
        if _OUR_FILE.fullmatch(entry.path) and not store.exists(PACK):  # another rank may have begun just now
            raise UserError(f"{store.url} has a file {entry.path} but no {PACK}: pack into a new folder")


def _check_space(store: Store, needed_bytes: int) -> None:
    free = store.free_bytes()
    if free is not None and needed_bytes > free and not store.exists(PACK):
        raise UserError(f"{store.url} has {size(free)} free, the shards need {size(needed_bytes)}")


class _Packing:
    """One rank's part in packing.

    Args:
        store: Where to.
        listing: What is packed.
        shards: Its samples, shard by shard.
        rank: This one.
        board: Of all ranks.
        stale_seconds: How long to wait for others that may live.
    """

    def __init__(
        self,
        store: Store,
        listing: Listing,
        shards: Sequence[Sequence[RawSample]],
        rank: Rank,
        board: Board,
        stale_seconds: float,
    ) -> None:
        self._store, self._listing, self._rank, self._board = store, listing, rank, board
        self._stores = [each for each in (listing.tree.store, store) if each is not None]
        self._shards = {f"{number:06d}": samples for number, samples in enumerate(shards)}
        self._packed = _Packed(store)
        self._worker = Worker.this(rank.number)
        self._attempts = Attempts(store, _MARKS, self._worker)
        self._timing = Timing.of(stale_seconds, world_size=rank.world_size)
        self._progress = Progress(total=len(listing.samples), unit="videos", verb="packing", quiet=rank.number != 0)

    def pack_all(self, num_workers: int) -> bool:
        """Take shards until all are there, and pack them.

        Args:
            num_workers: Processes; 0 is one for each core.

        Returns:
            Whether any was left.
        """
        left = self._begin()
        claims = Claims(
            list(self._shards),
            self._packed,
            self._attempts,
            self._board,
            name="pack",
            ahead=len(left),
            timing=self._timing,
        )
        workers = min(num_processes(num_workers, local_world_size=self._rank.local_world_size), len(left))
        with LastWords(self._worker), self._progress, claims:
            try:
                with closing(as_taken(with_traffic, lambda: self._take(claims), self._arguments, workers)) as packed:
                    for unit, (info, traffic) in packed:
                        add_traffic(self._stores, traffic)
                        self._packed.add(unit, info)
                        claims.finished(unit)
                        self._show(info.num_samples)
            except JobFailed as failed:
                if failed.job is not None and failed.died:
                    claims.gave_up(failed.job, Ended(how="vanished", message=str(failed)))
                elif is_to_blame(failed.error):
                    claims.gave_up(failed.job, what_happened(failed.error))
                raise failed.error from failed.error.__cause__
        if set_aside := self._attempts.failed():
            raise UnitsSetAside(_describe_set_aside(set_aside))
        return bool(left)

    def _begin(self) -> list[str]:
        """Say what is to be done; the shards that are left."""
        had_manifest = self._store.exists(MANIFEST)  # asked first: it may be there a moment later, rightly
        left = self._packed.not_done(self._shards)
        if had_manifest and left:
            self._store.delete(MANIFEST, step="delete")  # it is not so any more
        ranks = f"; {count(self._rank.world_size, 'rank')}" if self._rank.world_size > 1 else ""
        done = len(self._shards) - len(left)
        self._progress.message(describe(self._listing, num_shards=len(self._shards), num_done=done) + ranks)
        for line in describe_staging(self._store) if left else ():
            self._progress.message(line)
        videos_done = len(self._listing.samples) - sum(len(self._shards[unit]) for unit in left)
        self._progress.already_done(videos_done)
        with suppress(BoardGone):
            self._board.add("checked", 1)  # the launcher starts the other ranks
            if self._board.add("pack.begun", 1) == 1:
                self._board.add("pack.videos", videos_done)
                self._attempts.forget_the_dead()
        return left

    def _take(self, claims: Claims) -> str | Wait | None:
        self._show(0)
        return claims.poll()

    def _arguments(self, unit: str) -> tuple[Any, ...]:
        of_pack_shard = self._listing.open_video, self._store, _shard_name(unit), self._shards[unit]
        return pack_shard, self._stores, os.getpid(), *of_pack_shard

    def report_traffic(self) -> None:
        """Say what this rank, its packing processes included, has asked of buckets."""
        for line in describe_traffic(*self._stores):
            self._progress.message(line)

    def _show(self, num_videos: int) -> None:
        """Count so many more; show what all ranks have done, or this one if there is no board any more."""
        try:
            done = self._board.add("pack.videos", num_videos)
        except BoardGone:
            self._progress.advance(num_videos)
        else:
            self._progress.reached(done, "")

    def write_manifest(self, *, check: bool) -> None:
        """Once all shards are there: of several ranks one does, the others wait for it.

        Args:
            check: Look whether one that is there is right: no shard was left to pack.
        """
        if check and self._rank.number == 0 and self._store.exists(MANIFEST):
            if self._store.read(MANIFEST) != self._manifest():
                self._store.put(MANIFEST, self._manifest(), step="manifest")
            self._store.publish_all(summary=MANIFEST, leave_out=[_MARKS])
            return
        claims = Claims(
            [MANIFEST],
            _Files(self._store),
            self._attempts,
            self._board,
            name="manifest",
            timing=self._timing,
            blame=False,
        )
        with claims:
            for turn in claims:
                self._store.put(MANIFEST, self._manifest(), step="manifest")
                self._store.publish_all(summary=MANIFEST, leave_out=[_MARKS])
                claims.finished(turn)

    def _manifest(self) -> bytes:
        infos = (self._packed.info(unit, num_samples=len(samples)) for unit, samples in self._shards.items())
        return Manifest(shards=tuple(infos)).to_json()

    def tidy(self) -> None:
        """Leave nothing of who was at what, now that it is done; what a rank that still works adds, it removes."""
        self._attempts.forget({*self._attempts.all(), *self._attempts.failed()})
        for folder in (f"{_MARKS}/attempts", f"{_MARKS}/failed", _MARKS):
            self._store.remove_if_empty(folder)
        self._store.remove_unpublished()


class _Packed:
    """The shards whose index is there, which is written after the tar, and whose tar was not removed or cut since."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._sizes: dict[str, int] = {}
        self._infos: dict[str, ShardInfo] = {}

    def is_done(self, unit: str) -> bool:
        """Whether a shard is."""
        name = _shard_name(unit)
        if not self._store.exists(name) or not self._store.exists(index_name(name)):
            return False
        return self._is_whole(unit, self._store.size_bytes(name))

    def not_done(self, units: Iterable[str]) -> list[str]:
        """Those of some that are not, in their order."""
        files = {file.path: file.size_bytes for file in self._store.list()}
        left = []
        for unit in units:
            name = _shard_name(unit)
            if name not in files or index_name(name) not in files or not self._is_whole(unit, files[name]):
                left.append(unit)
        return left

    def add(self, unit: str, info: ShardInfo) -> None:
        """This process has packed one."""
        self._infos[unit], self._sizes[unit] = info, info.size_bytes

    def info(self, unit: str, *, num_samples: int) -> ShardInfo:
        """What the manifest says of one."""
        if unit not in self._infos:
            name = _shard_name(unit)
            self._infos[unit] = ShardInfo(
                name=name,
                num_samples=num_samples,
                size_bytes=self._store.size_bytes(name),
                index_sha256=canonical.bytes_digest(self._store.read(index_name(name))),
            )
        return self._infos[unit]

    def _is_whole(self, unit: str, size_bytes: int) -> bool:
        if unit not in self._sizes:
            indexed = indexed_size_bytes(self._store, _shard_name(unit))
            if indexed is None:
                return False
            self._sizes[unit] = indexed
        return self._sizes[unit] == size_bytes


class _Files:
    """Units that are done when a file of their name is there."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def is_done(self, unit: str) -> bool:
        return self._store.exists(unit) and self._store.is_all_published()

    def not_done(self, units: Iterable[str]) -> list[str]:
        return [unit for unit in units if not self.is_done(unit)]


def _describe_set_aside(failed: Mapping[str, Sequence[Attempt]]) -> str:
    then = "The others are packed; the same command tries again"
    return describe_set_aside(failed, noun="shard", then=then, name=_shard_name)


def _shard_name(unit: str) -> str:
    return f"{unit}.tar"
