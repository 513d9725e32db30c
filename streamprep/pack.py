"""Raw videos and captions -> tar shards.

1. List the dataset, sort it by key (or shuffle by a seed), cut it into shards of a given size: all of that follows from
   the listing alone, so any number of processes, in any order, makes the same bytes.
2. ``pack.json`` records the listing's digest and the options; going on with others is refused.
3. Each shard is packed by one process: probe, hash, write the tar, then its index. A shard with an index is done.
4. ``manifest.json`` comes last.

Whether a video decodes is not asked here: the original bytes are kept, and what the probe could not read is noted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, BinaryIO, TypeVar

from streamprep import canonical
from streamprep.config import PackConfig
from streamprep.errors import UserError
from streamprep.keys import extension_of
from streamprep.manifest import MANIFEST, PACK, Manifest, ShardInfo
from streamprep.probe import ProbeError, probe_video
from streamprep.progress import Progress, count, size
from streamprep.shards import ShardIndex, ShardSample, TarWriter, index_name
from streamprep.sources import list_dataset
from streamprep.sources._files import Listing, OpenVideo, SourceOptions
from streamprep.storage import Store, check_writable, open_store
from streamprep.types import RawSample
from streamprep.watchdog import end_with_the_parent

T = TypeVar("T")

FORMAT = "streamprep-pack/1"
SKIPPED = "skipped.jsonl"
_OUR_FILE = re.compile(r"\d{6}\.(tar|json)|manifest\.json|skipped\.jsonl")
MAX_SAMPLES = 4096
"""Most samples in a shard."""
_CHUNK_BYTES = 2**18
_WRITE_BUFFER_BYTES = 2**18


def pack(config: PackConfig) -> Manifest:
    """Pack a dataset into shards, or finish what an earlier call began.

    Raises:
        UserError: before anything is written, if the dataset or the options cannot be used.
        OSError: if the machine fails; calling again goes on from there.
    """
    store = open_store(config.shards, spool_dir=config.spool_dir)
    if "://" not in config.dataset and store.same_place(open_store(config.dataset)):
        raise UserError(f"{config.shards} is the dataset itself: pack into another folder")
    options = SourceOptions(video_column=config.video_column, caption_column=config.caption_column, split=config.split)
    listing = list_dataset(config.dataset, config.dataset_type, options)
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
    finished = _finished_shards(store, len(shards))
    todo = [number for number in range(len(shards)) if number not in finished]
    progress = Progress(total=len(listing.samples), unit="videos", verb="packing")
    progress.message(describe(listing, num_shards=len(shards), num_done=len(finished)))
    with progress:
        progress.already_done(sum(info.num_samples for info in finished.values()))
        for number, info in _pack_shards(
            listing.open_video, store, {number: shards[number] for number in todo}, config.num_workers
        ):
            finished[number] = info
            progress.advance(info.num_samples)
    manifest = Manifest(shards=tuple(finished[number] for number in range(len(shards))))
    if not store.exists(MANIFEST) or store.read(MANIFEST) != manifest.to_json():
        store.put(MANIFEST, manifest.to_json(), step="manifest")
    store.remove_unpublished()
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
    return (
        f"{count(len(listing.samples), what)} ({size(sum(sample.size_bytes for sample in listing.samples))}) "
        f"in {count(num_shards, 'shard')}, {num_done} done"
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


def _check_nothing_of_others(store: Store) -> None:
    """Files of our names without a pack.json are somebody else's, or of a pack whose listing is lost."""
    for entry in store.list():
        if _OUR_FILE.fullmatch(entry.path):
            raise UserError(f"{store.url} has a file {entry.path} but no {PACK}: pack into a new folder")


def _check_space(store: Store, needed_bytes: int) -> None:
    free = store.free_bytes()
    if free is not None and needed_bytes > free:
        raise UserError(f"{store.url} has {size(free)} free, the shards need {size(needed_bytes)}")


def _finished_shards(store: Store, num_shards: int) -> dict[int, ShardInfo]:
    """The shards whose index is there, which is written after the tar, and whose tar was not removed since."""
    files = {file.path: file.size_bytes for file in store.list()}
    finished = {}
    for number in range(num_shards):
        name = _shard_name(number)
        if index_name(name) in files:
            data = store.read(index_name(name))
            index = ShardIndex.from_json(data)
            if files.get(name) == index.size_bytes:
                finished[number] = shard_info(index, data)
    return finished


def _pack_shards(
    open_video: OpenVideo, store: Store, shards: dict[int, list[RawSample]], num_workers: int
) -> Iterator[tuple[int, ShardInfo]]:
    """Pack the shards, several at a time, and yield each as it is done."""
    jobs = {number: (open_video, store, _shard_name(number), samples) for number, samples in shards.items()}
    yield from in_processes(pack_shard, jobs, num_workers)


def in_processes(
    work: Callable[..., T], jobs: Mapping[int, tuple[Any, ...]], num_workers: int
) -> Iterator[tuple[int, T]]:
    """Call a function for each job, several at a time, and yield (job, result) as each is done.

    Args:
        work: A function of a module.
        jobs: What to call it with.
        num_workers: Processes; 0 is one for each core, 1 is this process.
    """
    workers = min(num_workers or len(os.sched_getaffinity(0)), len(jobs))
    if workers <= 1:
        for number, arguments in jobs.items():
            yield number, work(*arguments)
        return
    # Not forkserver: a process has one, and decoding children want theirs with torchcodec loaded.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_parent) as pool:
        futures = {pool.submit(work, *arguments): number for number, arguments in jobs.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise OSError("a packing process died; run the same command again to go on") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """Ctrl-C goes to every process of the terminal: the parent decides. If it dies, a worker would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_the_parent()


def pack_shard(open_video: OpenVideo, store: Store, name: str, samples: Sequence[RawSample]) -> ShardInfo:
    """Write one shard, then its index.

    Args:
        open_video: The listing's.
        store: Where to.
        name: Of the tar.
        samples: In this order.
    """
    with store.new_file() as file:
        with open(file.path, "r+b", buffering=_WRITE_BUFFER_BYTES) as target:
            tar = TarWriter(target)
            packed = tuple(_add_sample(tar, *read) for read in _read_ahead(open_video, samples))
            tar.finish()
        file.publish(name, step="shard")
    index = ShardIndex(name=name, size_bytes=tar.size_bytes, samples=packed)
    data = index.to_json()
    store.put(index_name(name), data, step="shard_index")
    return shard_info(index, data)


def _read_ahead(
    open_video: OpenVideo, samples: Sequence[RawSample]
) -> Iterator[tuple[RawSample, BinaryIO | None, dict[str, Any]]]:
    """Hash and probe one video while the one before it is copied: sample, open file, content of ``KEY.json``."""
    with ThreadPoolExecutor(1) as thread:
        reading: Future[tuple[RawSample, BinaryIO | None, dict[str, Any]]] | None = None
        for sample in samples:
            following = thread.submit(open_and_probe, open_video, sample)
            if reading is not None:
                yield reading.result()
            reading = following
        if reading is not None:
            yield reading.result()


def open_and_probe(open_video: OpenVideo, sample: RawSample) -> tuple[RawSample, BinaryIO | None, dict[str, Any]]:
    """(the sample, its open file if it has a video, the content of its ``KEY.json``)."""
    metadata = {
        "file_name": sample.file_name,
        "captions": list(sample.captions),
        "declared": dict(sample.declared),
        "extra": dict(sample.extra),
    }
    if not sample.has_video:
        return sample, None, metadata
    file = open_video(sample)  # closed when it is copied
    if file.seek(0, os.SEEK_END) != sample.size_bytes:
        file.close()
        raise OSError(f"{sample.path} changed while it was packed; let it settle and pack into a new folder")
    file.seek(0)
    return sample, file, metadata | {"extension": extension_of(sample.file_name)} | _video_metadata(file)


def _add_sample(tar: TarWriter, sample: RawSample, file: BinaryIO | None, metadata: dict[str, Any]) -> ShardSample:
    small = {"json": canonical.to_json(metadata)}
    if sample.captions:
        small["txt"] = sample.captions[0].encode("utf-8", "surrogatepass")
    members = {}
    for extension in sorted((*small, *([metadata["extension"]] if file else []))):
        name = f"{sample.key}.{extension}"
        if extension in small:
            data = small[extension]
            members[extension] = tar.add(name, (data,), size=len(data), sha256=canonical.bytes_digest(data))
        else:
            assert file is not None
            with file:
                file.seek(0)
                members[extension] = tar.add(name, _chunks(file), size=sample.size_bytes, sha256=metadata["sha256"])
    return ShardSample(key=sample.key, members=members, metadata=metadata)


def _video_metadata(video: BinaryIO) -> dict[str, Any]:
    """What is found out about a video, for ``KEY.json``."""
    digest = {"sha256": hashlib.file_digest(video, "sha256").hexdigest()}  # type: ignore[arg-type]
    video.seek(0)
    try:
        info = probe_video(video)
    except ProbeError as error:
        return digest | {"probe_error": str(error)}
    return digest | dataclasses.asdict(info)


def _chunks(file: BinaryIO) -> Iterator[memoryview]:
    """The rest of a file, in one small buffer again and again: fresh memory for every video costs more than copying."""
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    while size_bytes := file.readinto(buffer):  # type: ignore[attr-defined]
        yield buffer[:size_bytes]


def shard_info(index: ShardIndex, data: bytes) -> ShardInfo:
    """What the manifest says of a shard."""
    return ShardInfo(
        name=index.name,
        num_samples=len(index.samples),
        size_bytes=index.size_bytes,
        index_sha256=canonical.bytes_digest(data),
    )


def _shard_name(number: int) -> str:
    return f"{number:06d}.tar"
