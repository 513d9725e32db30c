"""One epoch of batches from finished latents, by different libraries; each is run in a process of its own."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Processes that a benchmark starts import this file once more: so nothing heavy up here.
if TYPE_CHECKING:
    from torch import Tensor

    Batches = Iterator[tuple[Tensor, Tensor]]

SHUFFLE_BUFFER = 16


@dataclass(frozen=True, slots=True)
class Epoch:
    """What an epoch took, imports left out."""

    seconds: float
    first_batch_seconds: float
    cpu_seconds: float
    """Of the process and its loader's workers."""
    num_rows: int
    peak_mb: float
    """Resident, of the process itself."""
    read_bytes: int
    """From the disk, by the process itself."""


def measure(reader: str, folder: Path, batch_size: int, num_workers: int) -> Epoch:
    """Read all rows once, in any order the reader likes, and touch each batch."""
    import torch
    from _measure import cpu_seconds

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # MosaicML's; nobody writes
    open_batches = READERS[reader]
    IMPORTS[reader]()
    cpu_before, disk_before, began = cpu_seconds(), _read_bytes(), time.perf_counter()
    num_rows, first = 0, 0.0
    for latent, text in open_batches(folder, batch_size, num_workers):
        first = first or time.perf_counter() - began
        num_rows += len(latent)
        assert latent.shape[0] == text.shape[0]
    seconds = time.perf_counter() - began
    return Epoch(
        seconds=seconds,
        first_batch_seconds=first,
        cpu_seconds=cpu_seconds() - cpu_before,
        num_rows=num_rows,
        peak_mb=_peak_mb(),
        read_bytes=_read_bytes() - disk_before,
    )


def read_raw(folder: Path, batch_size: int, num_workers: int) -> Batches:
    """The files' bytes from first to last, into a batch's memory: the least anyone can do."""
    import numpy as np
    import torch
    from _latents import LATENT_SHAPE, ROW_BYTES, TEXT_SHAPE

    batch = torch.empty(batch_size, ROW_BYTES, dtype=torch.uint8)
    latent_bytes = 4 * int(np.prod(LATENT_SHAPE))
    target, filled = memoryview(batch.numpy()).cast("B"), 0
    for path in data_files(folder):
        with open(path, "rb", buffering=0) as file:
            while number := file.readinto(target[filled:]):
                filled += number
                if filled == len(target):
                    latents, texts = batch[:, :latent_bytes], batch[:, latent_bytes:]
                    yield (
                        latents.view(torch.float32).view(-1, *LATENT_SHAPE),
                        texts.view(torch.float32).view(-1, *TEXT_SHAPE),
                    )
                    filled = 0


def read_with_streamprep(folder: Path, batch_size: int, num_workers: int) -> Batches:
    """`EncodedDataset`, in random order, in a `DataLoader`."""
    from torch.utils.data import DataLoader

    from streamprep.dataset import EncodedDataset

    dataset = EncodedDataset(folder, batch_size=batch_size, text_padding="longest")
    for batch in DataLoader(dataset, batch_size=None, num_workers=num_workers):
        yield batch["vae_latent"], batch["text_embedding"]


def read_with_litdata(folder: Path, batch_size: int, num_workers: int) -> Batches:
    """Its dataset, shuffled, and its loader."""
    from litdata import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(str(folder), shuffle=True)
    loader = StreamingDataLoader(dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=_collate)
    yield from loader


def read_with_mosaic(folder: Path, batch_size: int, num_workers: int) -> Batches:
    """Its dataset, shuffled, and torch's loader."""
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    dataset = StreamingDataset(local=str(folder), shuffle=True, batch_size=batch_size)
    yield from DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=_collate)


def read_with_webdataset(folder: Path, batch_size: int, num_workers: int) -> Batches:
    """Tars in random order, with a small shuffle buffer: rows are large."""
    import webdataset
    from torch.utils.data import DataLoader

    urls = [str(path) for path in data_files(folder)]
    dataset = (
        webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False)
        .shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER)
        .decode()
    )
    yield from DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=_collate)


def read_row_groups(paths: Sequence[Path], rows: Sequence[tuple[int, int]]) -> float:
    """Seconds to read rows, each by loading the row group that it is in: as FastVideo's map-style dataset does.

    Args:
        paths: Of the Parquet files.
        rows: Each (file, row in it).
    """
    import pyarrow.parquet as pq

    began = time.perf_counter()
    for number, row in rows:
        file = pq.ParquetFile(paths[number])
        for group in range(file.num_row_groups):
            if row < (size := file.metadata.row_group(group).num_rows):
                record = file.read_row_group(group).slice(row, 1).to_pylist()[0]
                assert len(record["vae_latent_bytes"])
                break
            row -= size
    return time.perf_counter() - began


def first_batch(folder: Path, consumed: int, batch_size: int) -> float:
    """Seconds until the first batch, the dataset's opening included, from the start or in the middle of an epoch."""
    from streamprep.dataset import EncodedDataset

    began = time.perf_counter()
    dataset = EncodedDataset(folder, batch_size=batch_size, text_padding="longest")
    if consumed:
        dataset.load_state_dict(dataset.state_dict() | {"consumed": consumed})
    batch = next(iter(dataset))
    seconds = time.perf_counter() - began
    assert len(batch["vae_latent"]) == batch_size
    assert batch["number"] == consumed
    return seconds


def drop_from_cache(folder: Path) -> None:
    """Let the next read come from the disk."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def data_files(folder: Path) -> list[Path]:
    """The large ones, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 2**20)


def _collate(rows: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    import torch

    latents, texts = (
        [torch.as_tensor(row.get(name, row.get(f"{name}.npy"))) for row in rows]
        for name in ("vae_latent", "text_embedding")
    )
    return torch.stack(latents), torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)


def _peak_mb() -> float:
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) / 1000 for line in status if line.startswith("VmHWM"))


def _read_bytes() -> int:
    with open("/proc/self/io", encoding="utf-8") as counters:
        return next(int(line.split()[1]) for line in counters if line.startswith("read_bytes"))


def _import_streamprep() -> None:
    import streamprep.dataset  # noqa: F401


def _import_litdata() -> None:
    import litdata  # noqa: F401


def _import_mosaic() -> None:
    from _latents import stand_in_for_torchvision

    stand_in_for_torchvision()
    import streaming  # noqa: F401


def _import_webdataset() -> None:
    import webdataset  # noqa: F401


READERS: dict[str, Callable[[Path, int, int], Batches]] = {
    "raw": read_raw,
    "streamprep, Parquet": read_with_streamprep,
    "streamprep, WebDataset": read_with_streamprep,
    "litdata": read_with_litdata,
    "MosaicML": read_with_mosaic,
    "webdataset": read_with_webdataset,
}
IMPORTS: dict[str, Callable[[], None]] = {
    "raw": lambda: None,
    "streamprep, Parquet": _import_streamprep,
    "streamprep, WebDataset": _import_streamprep,
    "litdata": _import_litdata,
    "MosaicML": _import_mosaic,
    "webdataset": _import_webdataset,
}
