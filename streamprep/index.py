"""Tars of another program -> the index and manifest that `encode` reads; no tar is copied or changed.

1. List the samples of all tars by the source ``webdataset``: strict headers, captions, keys.
2. ``pack.json`` records that listing's digest and the options; going on with others is refused.
3. Each tar is indexed by one process: every video is hashed and probed. With ``--to`` a link to the tar comes first; in
   a bucket, which has no links, the index is written beside the tars.
4. ``manifest.json`` comes last.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import closing

from streamprep.config import IndexConfig
from streamprep.errors import UserError
from streamprep.manifest import MANIFEST, PACK, Manifest, ShardInfo
from streamprep.pack import SKIPPED, describe, record_listing
from streamprep.pack_shard import read_videos, shard_info
from streamprep.processes import in_processes
from streamprep.progress import Progress
from streamprep.ranks import this_rank
from streamprep.shards import Member, ShardIndex, ShardSample, index_name
from streamprep.sources import list_dataset
from streamprep.sources._files import Listing, OpenVideo, SourceOptions
from streamprep.storage import Store, describe_traffic, open_store
from streamprep.traffic import add_traffic, with_traffic
from streamprep.types import RawSample

FORMAT = "streamprep-index/1"


def index(config: IndexConfig) -> Manifest:
    """Index a folder of tars, or finish what an earlier call began.

    Raises:
        UserError: before anything is written, if a tar is damaged or the folder holds something else.
        OSError: if the machine fails; calling again goes on from there.
    """
    ranks = this_rank().world_size
    if ranks > 1:
        raise UserError(f"`streamprep index` is one process with --num-workers, not {ranks} ranks: start it by itself")
    tars, store = open_store(config.shards), open_store(config.to or config.shards)
    _check_apart(tars, store)
    options = SourceOptions(
        caption_column=config.caption_column, prefix_keys=config.prefix_keys, skip_damaged=config.skip_damaged
    )
    listing = list_dataset(config.shards, "webdataset", options)
    shards = _by_tar(listing)
    there = {entry.path: entry.size_bytes for entry in store.walk()}
    _check_nothing_of_others(store, tars, shards, there)
    record_listing(
        store, {"format": FORMAT, "caption_column": config.caption_column, "prefix_keys": config.prefix_keys}, listing
    )
    finished = {name: info for name in shards if (info := _finished(store, name, there)) is not None}
    progress = Progress(total=len(listing.samples), unit="videos", verb="indexing")
    progress.message(describe(listing, num_shards=len(shards), num_done=len(finished)))
    stores = [each for each in (listing.tree.store, store) if each is not None]
    jobs = {
        number: (index_tar, stores, os.getpid(), listing.open_video, tars, store, name, samples)
        for number, (name, samples) in enumerate(shards.items())
        if name not in finished
    }
    with progress:
        progress.already_done(sum(info.num_samples for info in finished.values()))
        for _, (info, traffic) in in_processes(with_traffic, jobs, config.num_workers):
            add_traffic(stores, traffic)
            finished[info.name] = info
            progress.advance(info.num_samples)
    manifest = Manifest(shards=tuple(finished[name] for name in sorted(finished)))
    if not store.exists(MANIFEST) or store.read(MANIFEST) != manifest.to_json():
        store.put(MANIFEST, manifest.to_json(), step="manifest")
    store.remove_unpublished()
    for line in describe_traffic(*stores):
        progress.message(line)
    return manifest


def index_tar(open_video: OpenVideo, tars: Store, store: Store, name: str, samples: Sequence[RawSample]) -> ShardInfo:
    """Write the index of one tar.

    Args:
        open_video: The listing's.
        tars: Where the tar is.
        store: Where its index goes.
        name: Of the tar.
        samples: In the tar's order.
    """
    if not store.same_place(tars):
        root = tars.local_path()
        assert root is not None
        store.link(name, root / name, step="shard")
    indexed = []
    with closing(read_videos(open_video, samples)) as videos:
        for sample, video, metadata in videos:
            assert video is not None and sample.position is not None
            video.close()
            member = Member(offset=sample.position, size=sample.size_bytes, sha256=metadata["sha256"])
            indexed.append(ShardSample(key=sample.key, members={metadata["extension"]: member}, metadata=metadata))
    made = ShardIndex(name=name, size_bytes=store.size_bytes(name), samples=tuple(indexed), foreign=True)
    data = made.to_json()
    store.put(index_name(name), data, step="shard_index")
    return shard_info(made, data)


def _check_apart(tars: Store, store: Store) -> None:
    """The index lies beside the tars, or in a folder apart, with links to them."""
    if store.same_place(tars):
        return
    root, to = tars.local_path(), store.local_path()
    if root is None or to is None:
        raise UserError(
            f"--to {store.url}: an index elsewhere has links to the tars, so both must be local folders. Without --to "
            "it is written beside the tars; or pack them into shards of our own by `streamprep pack`"
        )
    if to.is_relative_to(root) or root.is_relative_to(to):
        raise UserError(
            f"--to {store.url}: one of the folders is inside the other; choose a folder apart from the tars"
        )


def _by_tar(listing: Listing) -> dict[str, list[RawSample]]:
    shards: dict[str, list[RawSample]] = {}
    for sample in sorted(listing.samples, key=lambda sample: (sample.path, sample.position or 0)):
        shards.setdefault(sample.path, []).append(sample)
    return shards


def _finished(store: Store, name: str, there: Mapping[str, int]) -> ShardInfo | None:
    """The index is written last, so a tar that has one is done, unless the tar changed its size."""
    if name not in there or index_name(name) not in there:
        return None
    data = store.read(index_name(name))
    found = ShardIndex.from_json(data)
    return shard_info(found, data) if there[name] == found.size_bytes else None


def _check_nothing_of_others(
    store: Store, tars: Store, shards: dict[str, list[RawSample]], there: Mapping[str, int]
) -> None:
    """An index is never written over a file of the same name that is not ours, such as another program's JSON."""
    if PACK in there:
        return
    theirs = [] if store.same_place(tars) else list(shards)
    for name in (MANIFEST, SKIPPED, *map(index_name, shards), *theirs):
        if name in there:
            raise UserError(
                f"{store.url} has a file {name} but no {PACK}, so it is not of `streamprep index`: choose a new folder "
                "by --to"
            )
