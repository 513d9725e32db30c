"""Files that a stranger's reader reads right, and that nobody sees before they are whole."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from exporters import fastvideo
from streamprep import canonical, plugins
from streamprep.job import UNIT_FILE
from streamprep.storage import Store, open_store
from streamprep.types import EncodedClip, EncodedSample, ShardWriter, WrittenFile

EXPORTERS = plugins.names("streamprep.exporters")
CONTRACT = {"family": "wan", "latents_mean": [0.5, -0.25], "model": "Zo\u00eb/\u4f60\u597d"}


def make_sample(number: int = 0, *, tensors: Mapping[str, Tensor] | None = None, **fields: Any) -> EncodedSample:
    random = torch.Generator().manual_seed(number)
    defaults: dict[str, Any] = {
        "key": f"dir/{number}",
        "id": f"dir/{number}.mp4",
        "file_name": f"dir/{number}.mp4",
        "caption": f"Caption {number}.",
        "clip": EncodedClip(width=96, height=64, num_frames=17, train_fps=16.0, source_fps=30000 / 1001),
    }
    own = {
        "vae_latent": torch.randn(16, 5, 2, 3, generator=random),
        "text_embedding": torch.randn(1 + number, 8, generator=random),
    }
    return EncodedSample(tensors={**own, **(tensors or {})}, **defaults | fields)


def open_shard(name: str, store: Store, unit: str = "000007", *, samples_per_file: int = 64) -> ShardWriter:
    writer: ShardWriter = plugins.load("streamprep.exporters", name).open_shard(
        store, unit, workload="t2v", samples_per_file=samples_per_file, contract=CONTRACT
    )
    return writer


def write(exporter: str, store: Store, *samples: EncodedSample, samples_per_file: int = 64) -> list[WrittenFile]:
    with open_shard(exporter, store, samples_per_file=samples_per_file) as writer:
        for sample in samples:
            writer.write(sample)
        return writer.close()


def files_in(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# What every exporter promises


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_nothing_is_visible_before_close(exporter: str, tmp_path: Path) -> None:
    folder = plugins.load("streamprep.exporters", exporter).FOLDER
    with open_shard(exporter, open_store(tmp_path), samples_per_file=2) as writer:
        for number in range(5):
            writer.write(make_sample(number))
            assert not (tmp_path / folder).exists()
        assert all(name.startswith(".tmp/") for name in files_in(tmp_path))
        written = writer.close()
        assert {file.name for file in written} == set(files_in(tmp_path))
    assert {file.name for file in written} == set(files_in(tmp_path))


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("num_samples", [0, 1, 2, 3])
def test_nothing_is_left_after_an_error(exporter: str, num_samples: int, tmp_path: Path) -> None:
    with (
        pytest.raises(KeyError, match="boom"),
        open_shard(exporter, open_store(tmp_path), samples_per_file=2) as writer,
    ):
        for number in range(num_samples):
            writer.write(make_sample(number))
        raise KeyError("boom")
    assert not files_in(tmp_path)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_nothing_is_left_by_whoever_does_not_close(exporter: str, tmp_path: Path) -> None:
    with open_shard(exporter, open_store(tmp_path)) as writer:
        writer.write(make_sample())
    assert not files_in(tmp_path)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_no_samples_make_no_files(exporter: str, tmp_path: Path) -> None:
    assert write(exporter, open_store(tmp_path)) == []
    assert not files_in(tmp_path)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_written_files_are_described_as_they_are(exporter: str, tmp_path: Path) -> None:
    folder = plugins.load("streamprep.exporters", exporter).FOLDER
    samples = [make_sample(number) for number in range(5)]
    written = write(exporter, open_store(tmp_path), *samples, samples_per_file=2)
    assert [len(file.rows) for file in written] == [2, 2, 1]
    for file in written:
        name = Path(file.name)
        match = UNIT_FILE.fullmatch(name.name)
        assert match, f"finalize could never delete {name}"
        assert match["unit"] == "000007"
        assert name.parent == Path(folder)
        content = (tmp_path / name).read_bytes()
        assert (file.size_bytes, file.sha256) == (len(content), canonical.bytes_digest(content))
        assert file.sha256[:8] in name.name
    rows = [row for file in written for row in file.rows]
    assert [row.key for row in rows] == [sample.key for sample in samples]
    assert {row.bucket for row in rows} == {"17x64x96"}
    assert [row.row_group for row in rows] == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_the_same_samples_give_the_same_bytes(exporter: str, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write(exporter, open_store(tmp_path / folder), *map(make_sample, range(5)), samples_per_file=2)
    assert files_in(tmp_path / "a") == files_in(tmp_path / "b")
    write(exporter, open_store(tmp_path / "c"), *map(make_sample, range(6)), samples_per_file=2)
    assert not set(files_in(tmp_path / "b")) >= set(files_in(tmp_path / "c"))


@pytest.mark.parametrize("exporter", EXPORTERS)
@given(
    shapes=st.lists(
        st.tuples(st.tuples(*[st.integers(1, 4)] * 4), st.tuples(st.integers(1, 40), st.integers(1, 9))), max_size=4
    ),
    caption=st.text(st.characters(exclude_categories=["Cs"])),
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read_back(
    exporter: str, shapes: list[tuple[tuple[int, ...], tuple[int, ...]]], caption: str, tmp_path: Path
) -> None:
    samples = [
        make_sample(number, caption=caption, tensors={"vae_latent": torch.randn(*v), "text_embedding": torch.randn(*t)})
        for number, (v, t) in enumerate(shapes)
    ]
    store = open_store(tmp_path)
    written = write(exporter, store, *samples)
    rows = [row for file in written for row in file.rows]
    read = [
        item for file in written for item in plugins.load("streamprep.exporters", exporter).read_file(store, file.name)
    ]
    assert [name for name, _ in read] == [sample.id for sample in samples]
    for sample, row, (_, tensors) in zip(samples, rows, read, strict=True):
        assert set(row.tensors) == set(tensors) == set(sample.tensors)
        for name, tensor in sample.tensors.items():
            assert np.array_equal(tensors[name], tensor.numpy())
            location = row.tensors[name]
            assert location.shape == tuple(tensor.shape)
            file = next(file for file in written if row in file.rows)
            flat = np.fromfile(tmp_path / file.name, location.dtype, location.size // 4, offset=location.offset)
            assert np.array_equal(flat.reshape(location.shape), tensor.numpy())


# FastVideo's


def read_rows(root: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(root.glob("*/*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_a_row_is_fastvideos(tmp_path: Path) -> None:
    sample = make_sample(3)
    (file,) = write("fastvideo", open_store(tmp_path), sample)
    assert Path(file.name).parent == Path("combined_parquet_dataset")
    (row,) = read_rows(tmp_path)
    assert row == {
        "id": "dir/3.mp4",
        "vae_latent_bytes": sample.tensors["vae_latent"].numpy().tobytes(),
        "vae_latent_shape": [16, 5, 2, 3],
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
    write("fastvideo", open_store(tmp_path), make_sample(clip=clip))
    assert read_rows(tmp_path)[0]["media_type"] == "image"


def test_the_contract_is_in_every_file(tmp_path: Path) -> None:
    written = write("fastvideo", open_store(tmp_path), *map(make_sample, range(3)), samples_per_file=1)
    for file in written:
        assert json.loads(pq.read_schema(tmp_path / file.name).metadata[b"streamprep.contract"]) == CONTRACT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_stored_as_float32_which_is_all_fastvideo_reads(dtype: torch.dtype, tmp_path: Path) -> None:
    sample = make_sample(tensors={"vae_latent": torch.randn(16, 5, 2, 3).to(dtype)})
    (file,) = write("fastvideo", open_store(tmp_path), sample)
    (row,) = read_rows(tmp_path)
    assert row["vae_latent_dtype"] == file.rows[0].tensors["vae_latent"].dtype == "float32"
    latent = np.frombuffer(row["vae_latent_bytes"], np.float32).reshape(row["vae_latent_shape"])
    assert np.array_equal(latent, sample.tensors["vae_latent"].float().numpy())


@pytest.mark.parametrize(
    "caption", ["", " ", "Zo\u00eb: \u4f60\u597d \U0001f3ac", "two\nlines\x00", "x" * 100_000], ids=len
)
def test_captions_are_stored_as_they_are(caption: str, tmp_path: Path) -> None:
    write("fastvideo", open_store(tmp_path), make_sample(caption=caption))
    assert read_rows(tmp_path)[0]["caption"] == caption


@pytest.mark.parametrize("shape", [(1, 1), (512, 4096), (0, 32)], ids=str)
def test_offsets_are_right_whatever_the_size(shape: tuple[int, int], tmp_path: Path) -> None:
    """A Parquet page ends at 1 MB, but never inside a value."""
    sample = make_sample(caption="", tensors={"text_embedding": torch.randn(shape)})
    (file,) = write("fastvideo", open_store(tmp_path), sample, make_sample(1))
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
    written = write("fastvideo", open_store(tmp_path), *samples, samples_per_file=samples_per_file)
    assert [len(file.rows) for file in written] == rows
    assert [file.name.split("-")[1] for file in written] == [f"{number:05d}" for number in range(len(rows))]
    assert [row["id"] for row in read_rows(tmp_path)] == [sample.id for sample in samples]


def test_a_row_is_a_row_group_stored_plainly(tmp_path: Path) -> None:
    (file,) = write("fastvideo", open_store(tmp_path), *map(make_sample, range(3)))
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
    (file,) = write("fastvideo", open_store(f"file://{tmp_path}"), make_sample())
    ((name, tensors),) = fastvideo.read_file(open_store(str(tmp_path)), file.name)
    assert name == "dir/0.mp4"
    assert set(tensors) == {"vae_latent", "text_embedding"}
