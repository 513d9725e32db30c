"""Parquet of a bucket is read in the thread that asks for it.

pyarrow's own threads may still hold Python's bytes when the process ends, which then aborts ("terminate called without
an active exception"), whatever it has done.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from object_stores import NewBucket
from servers import Server

from streamprep.sources import list_dataset
from streamprep.sources._files import SourceOptions
from streamprep.storage import open_store
from streamprep.storage.ranged import RangedFile

pytest_plugins = ["object_stores"]


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[threading.Thread]]:
    """Those that have read from a file of a bucket."""
    seen: set[threading.Thread] = set()

    def watched(method: Any) -> Any:
        def call(file: RangedFile, *arguments: Any) -> Any:
            seen.add(threading.current_thread())
            return method(file, *arguments)

        return call

    for name in ("read", "readinto"):
        monkeypatch.setattr(RangedFile, name, watched(getattr(RangedFile, name)))
    yield seen


@pytest.mark.parametrize("holds_bytes", [False, True])
def test_a_manifest_lets_no_other_thread_hold_a_file(
    holds_bytes: bool, moto_server: Server, new_bucket: NewBucket, threads: set[threading.Thread]
) -> None:
    store = open_store(new_bucket(moto_server))
    rows = [{"video": bytes(1000 + n) if holds_bytes else f"{n}.mp4", "caption": f"caption {n}"} for n in range(40)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=8)
    store.put("metadata.parquet", sink.getvalue().to_pybytes(), step="data")
    for n in range(0 if holds_bytes else 40):
        store.put(f"{n}.mp4", b"video", step="data")
    listing = list_dataset(store.url, "manifest", SourceOptions())
    assert len(listing.samples) == 40
    if holds_bytes:
        assert [len(listing.open_video(sample).read()) for sample in listing.samples] == [1000 + n for n in range(40)]
    assert threads == {threading.main_thread()}
