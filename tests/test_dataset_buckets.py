"""`EncodedDataset` over a bucket: the same batches as from a folder, fetched ahead, within a bound."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from latents import Encoded
from object_stores import Faulty, NewBucket
from servers import Server
from servers.faults import Answer
from torch.utils.data import DataLoader

from streamprep.dataset import EncodedDataset
from streamprep.row_index import load_row_index
from streamprep.storage import Store, StoreError, open_store
from streamprep.tensor_reads import DamagedFile, FetchingReader

pytest_plugins = ["jobs", "latents", "object_stores"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def in_bucket(latents: Encoded, moto_server: Server, new_bucket: NewBucket) -> str:
    """The URL of the same output in a bucket."""
    url = f"{new_bucket(moto_server)}/out"
    store = open_store(url)
    for path in sorted(latents.out.rglob("*")):
        if path.is_file():
            store.put(str(path.relative_to(latents.out)), path.read_bytes(), step="copy")
    return url


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if torch.is_tensor(value):
            assert torch.equal(value, theirs[name]), name
        else:
            assert value == theirs[name], name


@pytest.mark.parametrize("how", [{}, {"caption_dropout": 0.5, "text_padding": "longest", "with_captions": True}])
def test_batches_from_a_bucket_are_those_from_a_folder(latents: Encoded, in_bucket: str, how: dict[str, Any]) -> None:
    for ours, theirs in zip(
        EncodedDataset(in_bucket, batch_size=3, **how),
        EncodedDataset(latents.out, batch_size=3, **how),
        strict=True,
    ):
        assert_same(ours, theirs)


def test_a_run_goes_on_from_a_folder_in_a_bucket_with_workers(latents: Encoded, in_bucket: str) -> None:
    batches = list(EncodedDataset(latents.out, batch_size=3))
    dataset = EncodedDataset(in_bucket, batch_size=3)
    dataset.load_state_dict(batches[1]["state"])
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    for ours, theirs in zip(loader, batches[2:], strict=True):
        assert_same(ours, theirs)


def test_folder_and_bucket_may_be_mixed(latents: Encoded, in_bucket: str) -> None:
    mixed = list(EncodedDataset([latents.out, in_bucket], batch_size=4))
    for batch in mixed:
        for key, latent in zip(batch["keys"], batch["vae_latent"], strict=True):
            assert (latent.numpy() == latents.tensors[key]["vae_latent"]).all()
    assert {source for batch in mixed for source in batch["sources"]} == {0, 1}


@pytest.mark.parametrize("with_texts", [False, True])
def test_a_row_comes_in_one_request_and_a_file_is_looked_at_once(with_texts: bool, in_bucket: str) -> None:
    store = open_store(in_bucket)
    index = load_row_index(store, None, with_texts=with_texts)
    store.stats.requests.clear()
    reader = FetchingReader(index, store)
    for row in range(index.num_rows):
        reader.row(row)
    assert store.stats.requests == {"get": index.num_rows, "head": len(index.files)}


def test_no_more_is_fetched_ahead_than_the_bound(in_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held, most, lock = 0, 0, threading.Lock()
    row_bytes = []

    class Counting(FetchingReader):
        def row(self, row: int) -> Any:
            nonlocal held, most
            with lock:
                held += self.fetched_bytes(row)
                most = max(most, held)
                row_bytes.append(self.fetched_bytes(row))
            return super().row(row)

    def counting(index: Any, store: Store) -> FetchingReader:
        return Counting(index, store)

    monkeypatch.setattr("streamprep.dataset.open_reader", counting)
    bound = 40_000
    batches = EncodedDataset(in_bucket, batch_size=1, max_ahead_bytes=bound)
    for _ in batches:
        with lock:
            held -= row_bytes[0]
            row_bytes.pop(0)
    assert max(most, 1) <= bound + 15_000, "the row at hand, beside what waits"
    assert most > 15_000, "more than one row is fetched ahead"


def test_leaving_early_fetches_no_more(in_bucket: str) -> None:
    batches = iter(EncodedDataset(in_bucket, batch_size=1))
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert not [
        thread for thread in threading.enumerate() if thread.name.startswith("fetch-ahead") and _lives_on(thread)
    ]


def _lives_on(thread: threading.Thread) -> bool:
    thread.join(10)
    return thread.is_alive()


@pytest.fixture
def files(latents: Encoded) -> Iterator[list[str]]:
    yield sorted(str(path.relative_to(latents.out)) for path in (latents.out / "combined_parquet_dataset").iterdir())


@pytest.mark.parametrize("damage", ["missing", "cut off", "another"])
def test_a_damaged_object_is_named(in_bucket: str, files: list[str], damage: str) -> None:
    store = open_store(in_bucket)
    if damage == "missing":
        store.delete(files[1], step="damage")
    else:
        data = store.read(files[1])
        store.put(files[1], data[:1000] if damage == "cut off" else data + b"\0", step="damage")
    with pytest.raises(DamagedFile, match=Path(files[1]).name):
        list(EncodedDataset(in_bucket, batch_size=2))


def test_what_the_store_refuses_is_raised_and_not_taken_for_damage(
    in_bucket: str, moto_server: Server, faulty: Faulty
) -> None:
    _, proxy = faulty(moto_server)
    dataset = EncodedDataset(in_bucket, batch_size=2)
    proxy.inject("^GET .*parquet", Answer(403))
    with pytest.raises(StoreError, match="refused"):
        list(dataset)
