"""What every exporter promises, with each of its options: adding a file to ``exporters`` adds its tests here."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from exporting import UNIT, make_sample, open_shard, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamprep import canonical, plugins
from streamprep.errors import UserError
from streamprep.exporting import dtype_of, open_exporter, settle_options
from streamprep.job import UNIT_FILE
from streamprep.storage import open_store
from streamprep.tensor_members import cast, decode_bytes, same_bytes
from streamprep.types import EncodedSample


def kinds() -> Iterator[object]:
    """(exporter, options) of all that go together."""
    for name in plugins.names("streamprep.exporters"):
        able = open_exporter(name).OPTIONS
        for values in itertools.product(*able.values()):
            options = dict(zip(able, values, strict=True))
            try:
                settle_options(open_exporter(name), name, options)
            except UserError:
                continue
            yield pytest.param(name, options, id="-".join((name, *values)))


every_kind = pytest.mark.parametrize(("exporter", "options"), list(kinds()))
latents = st.tuples(*[st.integers(0, 4)] * 4)
texts = st.tuples(st.integers(0, 40), st.integers(1, 9))


def files_in(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@every_kind
def test_nothing_is_visible_before_close(exporter: str, options: dict[str, str], tmp_path: Path) -> None:
    folder = open_exporter(exporter).FOLDER
    with open_shard(exporter, open_store(tmp_path), samples_per_file=2, **options) as writer:
        for number in range(5):
            writer.write(make_sample(number))
            assert not (tmp_path / folder).exists()
        assert all(name.startswith(".tmp/") for name in files_in(tmp_path))
        written = writer.close()
        assert {file.name for file in written} == set(files_in(tmp_path))
    assert {file.name for file in written} == set(files_in(tmp_path))


@every_kind
@pytest.mark.parametrize("num_samples", [0, 1, 2, 3])
def test_nothing_is_left_after_an_error(
    exporter: str, options: dict[str, str], num_samples: int, tmp_path: Path
) -> None:
    with (
        pytest.raises(KeyError, match="boom"),
        open_shard(exporter, open_store(tmp_path), samples_per_file=2, **options) as writer,
    ):
        for number in range(num_samples):
            writer.write(make_sample(number))
        raise KeyError("boom")
    assert not files_in(tmp_path)


@every_kind
def test_nothing_is_left_by_whoever_does_not_close(exporter: str, options: dict[str, str], tmp_path: Path) -> None:
    with open_shard(exporter, open_store(tmp_path), **options) as writer:
        writer.write(make_sample())
    assert not files_in(tmp_path)


@every_kind
def test_no_samples_make_no_files(exporter: str, options: dict[str, str], tmp_path: Path) -> None:
    assert write(exporter, open_store(tmp_path), **options) == []
    assert not files_in(tmp_path)


@every_kind
def test_written_files_are_described_as_they_are(exporter: str, options: dict[str, str], tmp_path: Path) -> None:
    folder = open_exporter(exporter).FOLDER
    samples = [make_sample(number) for number in range(5)]
    written = write(exporter, open_store(tmp_path), *samples, samples_per_file=2, **options)
    assert [len(file.rows) for file in written] == [2, 2, 1]
    for file in written:
        name = Path(file.name)
        match = UNIT_FILE.fullmatch(name.name)
        assert match, f"finalize could never delete {name}"
        assert match["unit"] == UNIT
        assert name.parent == Path(folder)
        content = (tmp_path / name).read_bytes()
        assert (file.size_bytes, file.sha256) == (len(content), canonical.bytes_digest(content))
        assert file.sha256[:8] in name.name
    rows = [row for file in written for row in file.rows]
    assert [row.key for row in rows] == [sample.key for sample in samples]
    assert {row.bucket for row in rows} == {"17x64x96"}
    assert [row.row_group for row in rows] == [0, 1, 0, 1, 0]


@every_kind
def test_the_same_samples_give_the_same_bytes(exporter: str, options: dict[str, str], tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write(exporter, open_store(tmp_path / folder), *map(make_sample, range(5)), samples_per_file=2, **options)
    assert files_in(tmp_path / "a") == files_in(tmp_path / "b")
    write(exporter, open_store(tmp_path / "c"), *map(make_sample, range(6)), samples_per_file=2, **options)
    assert not set(files_in(tmp_path / "b")) >= set(files_in(tmp_path / "c"))


@every_kind
@given(
    shapes=st.lists(st.tuples(latents, texts), max_size=4), caption=st.text(st.characters(exclude_categories=["Cs"]))
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read_back(
    exporter: str,
    options: dict[str, str],
    shapes: list[tuple[tuple[int, ...], tuple[int, ...]]],
    caption: str,
    tmp_path: Path,
) -> None:
    """By the format's own reader, by the recorded bytes, and as samples again."""
    samples = [
        make_sample(number, caption=caption, tensors={"vae_latent": torch.randn(v), "text_embedding": torch.randn(t)})
        for number, (v, t) in enumerate(shapes)
    ]
    store, module = open_store(tmp_path), open_exporter(exporter)
    written = write(exporter, store, *samples, samples_per_file=3, **options)
    rows = [(file, row) for file in written for row in file.rows]
    read = [item for file in written for item in module.read_file(store, file.name)]
    how = {"workload": "t2v", "train_fps": 16.0, "columns": {}}
    again: list[EncodedSample] = [one for file in written for one in module.read_samples(store, file, **how)]
    assert [name for name, _ in read] == [sample.id for sample in samples]
    for sample, (file, row), (_, tensors), other in zip(samples, rows, read, again, strict=True):
        assert set(row.tensors) == set(tensors) == set(sample.tensors)
        for name, tensor in sample.tensors.items():
            stored = cast(tensor, dtype_of(options))
            where = row.tensors[name]
            data = store.read_range(file.name, where.offset, where.size)
            found = decode_bytes(data, dtype=where.dtype, shape=where.shape, codec=where.codec)
            assert same_bytes(tensors[name], stored) and same_bytes(found, stored)
            assert same_bytes(other.tensors[name], stored)
        for field in ("key", "id", "file_name", "caption", "clip", "columns"):
            assert getattr(other, field) == getattr(sample, field)
