"""FastVideo's exporter: a row is what FastVideo's own would be, laid out so that it is read fast."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from exporting import CONTRACT, make_sample
from exporting import write as write_by

from exporters import fastvideo
from streamprep.storage import open_store
from streamprep.types import EncodedClip

write = functools.partial(write_by, "fastvideo")


def read_rows(root: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(root.glob("*/*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_a_row_is_fastvideos(tmp_path: Path) -> None:
    sample = make_sample(3)
    (file,) = write(open_store(tmp_path), sample)
    assert Path(file.name).parent == Path("combined_parquet_dataset")
    (row,) = read_rows(tmp_path)
    assert row == {
        "id": "dir/3.mp4",
        "vae_latent_bytes": sample.tensors["vae_latent"].numpy().tobytes(),
        "vae_latent_shape": [16, 5, 8, 12],
        "vae_latent_dtype": "float32",
        "text_embedding_bytes": sample.tensors["text_embedding"].numpy().tobytes(),
        "text_embedding_shape": [4, 8],
        "text_embedding_dtype": "float32",
        "file_name": "dir/3.mp4",
        "caption": "Caption 3.",
        "media_type": "video",
        "width": 96,
        "height": 64,
        "num_frames": 5,
        "duration_sec": 17 / 16,
        "fps": 30000 / 1001,
    }


def test_an_image_is_called_one(tmp_path: Path) -> None:
    clip = EncodedClip(width=96, height=64, num_frames=1, train_fps=16.0, source_fps=1.0, media_type="image")
    write(open_store(tmp_path), make_sample(clip=clip))
    assert read_rows(tmp_path)[0]["media_type"] == "image"


def test_the_contract_is_in_every_file(tmp_path: Path) -> None:
    written = write(open_store(tmp_path), *map(make_sample, range(3)), samples_per_file=1)
    for file in written:
        assert json.loads(pq.read_schema(tmp_path / file.name).metadata[b"streamprep.contract"]) == CONTRACT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_stored_as_float32_which_is_all_fastvideo_reads(dtype: torch.dtype, tmp_path: Path) -> None:
    sample = make_sample(tensors={"vae_latent": torch.randn(16, 5, 2, 3).to(dtype)})
    (file,) = write(open_store(tmp_path), sample)
    (row,) = read_rows(tmp_path)
    assert row["vae_latent_dtype"] == file.rows[0].tensors["vae_latent"].dtype == "float32"
    latent = np.frombuffer(row["vae_latent_bytes"], np.float32).reshape(row["vae_latent_shape"])
    assert np.array_equal(latent, sample.tensors["vae_latent"].float().numpy())


@pytest.mark.parametrize(
    "caption", ["", " ", "Zo\u00eb: \u4f60\u597d \U0001f3ac", "two\nlines\x00", "x" * 100_000], ids=len
)
def test_captions_are_stored_as_they_are(caption: str, tmp_path: Path) -> None:
    write(open_store(tmp_path), make_sample(caption=caption))
    assert read_rows(tmp_path)[0]["caption"] == caption


@pytest.mark.parametrize("shape", [(1, 1), (512, 4096), (0, 32)], ids=str)
def test_offsets_are_right_whatever_the_size(shape: tuple[int, int], tmp_path: Path) -> None:
    """A Parquet page ends at 1 MB, but never inside a value."""
    sample = make_sample(caption="", tensors={"text_embedding": torch.randn(shape)})
    (file,) = write(open_store(tmp_path), sample, make_sample(1))
    where = file.rows[0].tensors["text_embedding"]
    assert (where.shape, where.size) == (shape, 4 * shape[0] * shape[1])
    found = np.fromfile(tmp_path / file.name, np.float32, where.size // 4, offset=where.offset)
    assert np.array_equal(found.reshape(shape), sample.tensors["text_embedding"].numpy())
    assert read_rows(tmp_path)[0]["text_embedding_bytes"] == found.tobytes()


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Files end when they hold the tensors of two samples."""
    size = 2 * sum(tensor.nbytes for tensor in make_sample().tensors.values())
    monkeypatch.setattr(fastvideo, "MAX_FILE_BYTES", size)
    yield size


@pytest.mark.parametrize(("samples_per_file", "rows"), [(64, [2, 2, 1]), (1, [1] * 5)])
def test_a_file_ends_at_its_size_or_its_rows(
    samples_per_file: int, rows: list[int], small_files: int, tmp_path: Path
) -> None:
    samples = [make_sample(number, tensors=make_sample().tensors) for number in range(5)]
    written = write(open_store(tmp_path), *samples, samples_per_file=samples_per_file)
    assert [len(file.rows) for file in written] == rows
    assert [file.name.split("-")[1] for file in written] == [f"{number:05d}" for number in range(len(rows))]
    assert [row["id"] for row in read_rows(tmp_path)] == [sample.id for sample in samples]


def test_a_row_is_a_row_group_stored_plainly(tmp_path: Path) -> None:
    (file,) = write(open_store(tmp_path), *map(make_sample, range(3)))
    metadata = pq.read_metadata(tmp_path / file.name)
    assert metadata.num_row_groups == metadata.num_rows == 3
    for group in range(3):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            assert column.compression == "UNCOMPRESSED"
            assert not column.has_dictionary_page
            if column.path_in_schema.endswith("_bytes"):
                assert not column.is_stats_set
            elif ".list." not in column.path_in_schema:
                assert column.is_stats_set


def test_a_store_of_that_url_reads_it(tmp_path: Path) -> None:
    (file,) = write(open_store(f"file://{tmp_path}"), make_sample())
    ((name, tensors),) = fastvideo.read_file(open_store(str(tmp_path)), file.name)
    assert name == "dir/0.mp4"
    assert set(tensors) == {"vae_latent", "text_embedding"}
