"""One shard: its videos are opened, hashed, probed and copied into a tar; then its index is written."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import Any, BinaryIO

from streamprep import canonical
from streamprep.ahead import fetch_ahead
from streamprep.keys import extension_of
from streamprep.manifest import ShardInfo
from streamprep.probe import ProbeError, probe_video
from streamprep.shards import ShardIndex, ShardSample, TarWriter, index_name
from streamprep.sources._files import OpenVideo
from streamprep.sources._tree import AHEAD_BYTES
from streamprep.storage import Store
from streamprep.types import RawSample

_CHUNK_BYTES = 2**18
_WRITE_BUFFER_BYTES = 2**18

Video = tuple[RawSample, BinaryIO | None, dict[str, Any]]
"""A sample, its open file if it has a video, the content of its ``KEY.json``."""


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
            with closing(read_videos(open_video, samples)) as videos:
                packed = tuple(_add_sample(tar, *read) for read in videos)
            tar.finish()
        file.publish(name, step="shard")
    index = ShardIndex(name=name, size_bytes=tar.size_bytes, samples=packed)
    data = index.to_json()
    store.put(index_name(name), data, step="shard_index")
    return shard_info(index, data)


def read_videos(open_video: OpenVideo, samples: Sequence[RawSample]) -> Generator[Video, None, None]:
    """Open, hash and probe videos while the one before them is copied: of files one, from a bucket several at once."""
    at_once = getattr(open_video, "at_once", 1)
    fetched = fetch_ahead(
        samples,
        functools.partial(open_and_probe, open_video),
        size_bytes=lambda sample: sample.size_bytes,
        max_bytes=AHEAD_BYTES if at_once > 1 else sys.maxsize,
        num_threads=at_once,
        max_jobs=at_once + 1,
    )
    with closing(fetched):
        yield from (video for _, video in fetched)


def open_and_probe(open_video: OpenVideo, sample: RawSample) -> Video:
    """Open a video and find out about it."""
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
    try:
        return sample, file, metadata | {"extension": extension_of(sample.file_name)} | _video_metadata(file)
    except BaseException:
        file.close()
        raise


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
