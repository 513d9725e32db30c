"""What every exporter promises, with each of its options: adding a file to ``exporters`` adds its tests here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from exporting import make_sample, write
from forks import Forks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamprep import plugins
from streamprep.exporting import dtype_of, open_exporter
from streamprep.storage import open_store
from streamprep.tensor_members import cast, decode_bytes, same_bytes
from streamprep.testing import ExporterContract
from streamprep.types import EncodedSample

pytest_plugins = ["jobs"]

EXPORTERS = plugins.names("streamprep.exporters")


class OfOurs(ExporterContract):
    """Commands are run by `Forks`, which saves the seconds in which each imports torch."""

    @pytest.fixture(autouse=True)
    def take_forks(self, forks: Forks) -> None:
        self.forks = forks

    def streamprep(self, *arguments: object, crash_at: str | None = None) -> tuple[int, str]:
        environment = {} if crash_at is None else {"STREAMPREP_CRASH_AT": crash_at}
        done = self.forks.run(*arguments, environment=environment)
        assert done.code is not None
        return done.code, done.output


class TestMoments(OfOurs):
    """An exporter of the tests', which other tests use as a stranger's."""

    exporter = "moments_exporter:open_shard"


for name in EXPORTERS:
    globals()[f"Test{name.title()}"] = type(f"Test{name.title()}", (OfOurs,), {"exporter": name})


def kinds() -> Iterator[object]:
    """(exporter, options) of all that go together."""
    for name in EXPORTERS:
        contract = type("", (ExporterContract,), {"exporter": name})()
        for options in contract.all_options():
            yield pytest.param(name, options, id="-".join((name, *options.values())))


latents = st.tuples(*[st.integers(0, 4)] * 4)
texts = st.tuples(st.integers(0, 40), st.integers(1, 9))


@pytest.mark.parametrize(("exporter", "options"), list(kinds()))
@given(
    shapes=st.lists(st.tuples(latents, texts), max_size=4), caption=st.text(st.characters(exclude_categories=["Cs"]))
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_written_is_read_back_to_the_last_bit(
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
