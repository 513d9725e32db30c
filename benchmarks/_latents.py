"""Finished latents without encoding: the same rows as our two outputs and as other libraries' files.

Every row is like no other: equal ones would be stored once by a dictionary.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Processes that a benchmark starts import this file once more: so nothing heavy up here.
if TYPE_CHECKING:
    from streamprep.types import EncodedSample

LATENT_SHAPE, TEXT_SHAPE = (16, 20, 60, 104), (120, 4096)
ROW_BYTES = 4 * (16 * 20 * 60 * 104 + 120 * 4096)
ROWS_PER_FILE = 64
"""FastVideo's default, and ours."""


def make_sample(number: int) -> EncodedSample:
    """A row of 10 MB, float32: a clip of 77x480x832 and a caption of 120 tokens."""
    import torch

    from streamprep.types import EncodedClip, EncodedSample

    generator = torch.Generator().manual_seed(number)
    return EncodedSample(
        key=f"sample_{number:06d}",
        id=f"sample_{number:06d}.mp4",
        tensors={
            "vae_latent": torch.randn(LATENT_SHAPE, generator=generator),
            "text_embedding": torch.randn(TEXT_SHAPE, generator=generator),
        },
        file_name=f"sample_{number:06d}.mp4",
        caption=f"The caption of sample {number}.",
        clip=EncodedClip(width=832, height=480, num_frames=77, train_fps=16.0, source_fps=30.0),
    )


def make_arrays(number: int) -> dict[str, Any]:
    """The same, as numpy arrays."""
    return {name: tensor.numpy() for name, tensor in make_sample(number).tensors.items()}


def write_output(out: Path, num_rows: int, *, exporter: str, options: Mapping[str, str]) -> None:
    """An output as `streamprep encode` leaves it: data files by the exporter, plan and index."""
    from streamprep import exporting
    from streamprep.finalize import index_of
    from streamprep.record import Record
    from streamprep.storage import open_store

    module, store, records = exporting.open_exporter(exporter), open_store(out), []
    contract = _contract()
    for start in range(0, num_rows, ROWS_PER_FILE):
        unit = f"{start // ROWS_PER_FILE:06d}"
        with module.open_shard(
            store, unit, workload="t2v", samples_per_file=ROWS_PER_FILE, contract=contract, options=options
        ) as writer:
            for number in range(start, min(start + ROWS_PER_FILE, num_rows)):
                writer.write(make_sample(number))
            files = writer.close()
        records.append(Record(unit=unit, files=tuple(files), bad={}, dropped=(), quarantine=None, seconds={}))
    _write_plan(out, module.FOLDER)
    _write_index(out, index_of(records))


def write_holes(out: Path, num_rows: int) -> None:
    """An output of so many rows whose files are holes, which take no room and read as zeros."""
    import numpy as np
    import pyarrow as pa

    numbers = np.arange(num_rows)
    row, file = numbers % ROWS_PER_FILE, numbers // ROWS_PER_FILE
    names = [f"combined_parquet_dataset/{number:06d}-00000-00000000.parquet" for number in range(file[-1] + 1)]
    (out / names[0]).parent.mkdir(parents=True)
    for name in names:
        with open(out / name, "wb") as hole:
            hole.truncate(ROWS_PER_FILE * ROW_BYTES)
    latent_bytes = ROW_BYTES - 4 * TEXT_SHAPE[0] * TEXT_SHAPE[1]
    columns: dict[str, Any] = {
        "key": [f"videos/part_{number // 1000:04d}/clip_{number:08d}" for number in range(num_rows)],
        "file": pa.array(names).take(pa.array(file)),
        "file_size": np.full(num_rows, ROWS_PER_FILE * ROW_BYTES),
        "row_group": row,
        "bucket": pa.array(["77x480x832"]).take(pa.array(numbers * 0)),
    }
    for name, shape, offset in (("vae_latent", LATENT_SHAPE, 0), ("text_embedding", TEXT_SHAPE, latent_bytes)):
        columns |= {
            f"{name}_offset": row * ROW_BYTES + offset,
            f"{name}_size": np.full(num_rows, 4 * int(np.prod(shape))),
            f"{name}_dtype": pa.array(["float32"]).take(pa.array(numbers * 0)),
            f"{name}_shape": pa.FixedSizeListArray.from_arrays(np.tile(shape, num_rows), len(shape)).cast(
                pa.list_(pa.int64())
            ),
        }
    _write_plan(out, "combined_parquet_dataset")
    _write_index(out, pa.table(columns))


def write_tars(out: Path, num_rows: int) -> None:
    """The tars of webdataset's writer, numpy members, a tar for each 64 rows."""
    import webdataset

    out.mkdir()
    for start in range(0, num_rows, ROWS_PER_FILE):
        with webdataset.TarWriter(str(out / f"{start // ROWS_PER_FILE:06d}.tar")) as tar:
            for number in range(start, min(start + ROWS_PER_FILE, num_rows)):
                arrays = {f"{name}.npy": array for name, array in make_arrays(number).items()}
                tar.write({"__key__": f"sample_{number:06d}", **arrays})


def write_litdata(out: Path, num_rows: int) -> None:
    """The chunks of litdata's writer, of 64 MB as it advises."""
    from litdata.streaming.writer import BinaryWriter

    out.mkdir()
    writer = BinaryWriter(str(out), chunk_bytes="64MB")
    for number, tensors in _numbered(num_rows, lambda number: dict(make_sample(number).tensors)):
        writer[number] = {"key": f"sample_{number:06d}", **tensors}
    writer.done()
    writer.merge()


def write_mosaic(out: Path, num_rows: int) -> None:
    """MosaicML's own writer, shards of 64 MB as it does by itself."""
    stand_in_for_torchvision()
    from streaming import MDSWriter

    columns = {"key": "str", "vae_latent": "ndarray", "text_embedding": "ndarray"}
    with MDSWriter(out=str(out), columns=columns) as writer:
        for number, arrays in _numbered(num_rows, make_arrays):
            writer.write({"key": f"sample_{number:06d}", **arrays})


def write_as_fastvideo(path: Path, num_rows: int) -> None:
    """What ``fastvideo/dataset/dataloader/parquet_io.py`` makes of a file's records: zstd, one row group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from exporters.fastvideo import schema

    table = pa.Table.from_pylist([fastvideo_record(make_sample(n)) for n in range(num_rows)], schema=schema("t2v"))
    pq.write_table(table, path, compression="zstd")


def fastvideo_record(sample: EncodedSample) -> dict[str, Any]:
    """A row of it, tensors as Python's bytes."""
    clip = sample.clip
    assert clip is not None
    record: dict[str, Any] = {
        "id": sample.id,
        "file_name": sample.file_name,
        "caption": sample.caption,
        "media_type": "video",
        "width": clip.width,
        "height": clip.height,
        "num_frames": LATENT_SHAPE[1],
        "duration_sec": clip.num_frames / clip.train_fps,
        "fps": clip.source_fps,
    }
    for name, tensor in sample.tensors.items():
        array = tensor.numpy()
        record[f"{name}_bytes"] = array.tobytes()
        record[f"{name}_shape"] = list(array.shape)
        record[f"{name}_dtype"] = str(array.dtype)
    return record


def stand_in_for_torchvision() -> None:
    """MosaicML's package imports torchvision for datasets of pictures, and has no build for torch on the CPU."""
    import sys
    import types

    import transformers.utils  # looks for the real one, before there is another

    transformers.utils.is_torchvision_available()
    for name, attribute in (("datasets", "VisionDataset"), ("transforms.functional", "to_tensor")):
        module = types.ModuleType(f"torchvision.{name}")
        setattr(module, attribute, object)
        sys.modules.setdefault(module.__name__, module)
    for name in ("torchvision", "torchvision.transforms"):
        sys.modules.setdefault(name, types.ModuleType(name))


def _numbered(num_rows: int, make: Callable[[int], Any]) -> Iterator[tuple[int, Any]]:
    return ((number, make(number)) for number in range(num_rows))


def _write_plan(out: Path, data_folder: str) -> None:
    from streamprep import job
    from streamprep.job_plan import JobPlan

    plan = JobPlan(
        shards="none",
        fingerprint={},
        config={},
        contract=_contract(),
        data_folder=data_folder,
        units=(),
        versions={},
    )
    path = out / job.PLAN
    path.parent.mkdir(parents=True)
    path.write_bytes(plan.to_json())


def _write_index(out: Path, table: Any) -> None:
    import pyarrow.parquet as pq

    from streamprep import job

    pq.write_table(table, out / job.INDEX, compression="zstd")


def _contract() -> Mapping[str, Any]:
    tests = runpy.run_path(str(Path(__file__).parents[1] / "tests" / "making.py"))
    made: Mapping[str, Any] = tests["make_contract"](dim=TEXT_SHAPE[1]).to_json()
    return made
