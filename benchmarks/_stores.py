"""An object store to measure with, and the raw client: obstore by itself, which is the least that anyone can do.

Buckets hold what a run leaves for as long as the run; SeaweedFS gives the disk back when a bucket goes.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Processes that a benchmark starts import this file once more: so nothing heavy up here.
if TYPE_CHECKING:
    from servers import Server

    from streamprep.storage import StoreStats

PART_BYTES = 8 * 2**20
"""Of an upload, as `streamprep.storage.objects` cuts it."""
PARTS_AT_ONCE = 4
SECONDS_BETWEEN_LOOKS = 0.01

Member = tuple[str, int, int]
"""Shard, offset, size."""


def object_server(folder: Path, *, quick: bool) -> AbstractContextManager[Server]:
    """SeaweedFS on free ports, or moto, which is there in a second but is no store to measure."""
    _know_servers()
    if quick:
        from servers.moto import moto

        return moto(folder)
    from servers.seaweedfs import seaweedfs

    return seaweedfs(folder)


@contextmanager
def delayed(server: Server, *, seconds: float = 0.0, bytes_per_second: float | None = None) -> Iterator[Server]:
    """The same server behind a proxy: every request comes late, or every connection is slow."""
    from servers.fault_proxy import fault_proxy
    from servers.faults import Delay, Slow

    with fault_proxy(server.url) as proxy:
        proxy.inject("", Slow(bytes_per_second) if bytes_per_second else Delay(seconds))
        yield server.behind(proxy.url)


@contextmanager
def bucket(server: Server) -> Iterator[str]:
    """An empty one, gone afterwards with all that is in it."""
    from servers.s3_buckets import s3_client

    url = server.new_bucket()
    try:
        yield url
    finally:
        name, client = url.removeprefix("s3://"), s3_client(server.env)
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=name):
            for one in page.get("Contents", []):
                client.delete_object(Bucket=name, Key=one["Key"])
        client.delete_bucket(Bucket=name)


def environment_of(server: Server) -> dict[str, str]:
    """For a process that is to find this server and no other."""
    others = ("AWS_", "GOOGLE_", "AZURE_")
    return {name: value for name, value in os.environ.items() if not name.startswith(others)} | dict(server.env)


# --- the raw client; in processes that have the server's environment


def upload_folder(folder: Path, url: str) -> None:
    """Every file of a folder and below it."""
    client = connect(url)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        upload(client, path, str(path.relative_to(folder)))


def upload_in_processes(
    tars: Sequence[tuple[Path, Sequence[str]]], url: str, dataset: str | None, num_processes: int
) -> None:
    """Upload finished tars, each by one of several processes.

    Args:
        tars: Each with the names of its videos.
        url: Where to.
        dataset: Where to download the videos from before; None for not at all.
        num_processes: As many as streamprep has.
    """
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_download_and_upload, *zip(*tars, strict=True), repeat(dataset), repeat(url)))


def read_members(url: str, members: Sequence[Member], connections: int) -> int:
    """Read parts of objects, so many at a time; the bytes that came."""
    import obstore

    client = connect(url)

    def read(member: Member) -> int:
        shard, offset, size = member
        return len(obstore.get_range(client, shard, start=offset, length=size))

    with ThreadPoolExecutor(connections) as threads:
        return sum(threads.map(read, members))


def upload(client: Any, path: Path, key: str) -> None:
    """One file."""
    import obstore

    large = path.stat().st_size > 2 * PART_BYTES
    obstore.put(client, key, path, use_multipart=large, chunk_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE)


def connect(url: str) -> Any:
    """An S3 client as obstore makes it, with the environment's settings."""
    from obstore.store import from_url

    return from_url(url, client_options={"allow_http": True})


def _download_and_upload(tar: Path, videos: Sequence[str], dataset: str | None, url: str) -> None:
    if dataset is not None:
        import obstore

        source = connect(dataset)
        with ThreadPoolExecutor(PARTS_AT_ONCE) as threads:
            list(threads.map(lambda name: len(obstore.get(source, name).bytes()), videos))
    upload(connect(url), tar, tar.name)


# --- looking on


class Watch:
    """How many bytes a store has read, looked at a hundred times a second while the block runs."""

    def __init__(self, stats: StoreStats) -> None:
        self._stats, self._over = stats, threading.Event()
        self.seen: list[tuple[float, int]] = []
        """(of `time.perf_counter`, bytes)"""
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(SECONDS_BETWEEN_LOOKS):
            self.seen.append((time.perf_counter(), self._stats.bytes_read))

    def rate_from(self, began: float) -> float | None:
        """Bytes a second from a moment on until the last byte came; None if all had come by then."""
        total = self.seen[-1][1]
        before = max((read for seconds, read in self.seen if seconds <= began), default=0)
        ended = next(seconds for seconds, read in self.seen if read == total)
        return (total - before) / (ended - began) if ended > began else None


def tree_pss_bytes(pid: int) -> int:
    """Memory of a process and all below it, shared pages divided among those who share them."""
    import psutil

    try:
        process = psutil.Process(pid)
        return sum(map(_pss_bytes, [process, *process.children(recursive=True)]))
    except psutil.NoSuchProcess:
        return 0


def _pss_bytes(process: Any) -> int:
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    fields: Mapping[str, str] = dict(line.split(":", 1) for line in lines[1:])
    return int(fields["Pss"].split()[0]) * 1024 if "Pss" in fields else 0


def _know_servers() -> None:
    tests = str(Path(__file__).parents[1] / "tests")
    if tests not in sys.path:
        sys.path.insert(0, tests)
