"""The reader gives the same batches whatever format the latents are stored in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forks import Forks
from latents import Encoded

from streamprep.dataset import EncodedDataset

pytest_plugins = ["jobs", "latents"]

Convert = Callable[..., Path]


@pytest.fixture
def convert(forks: Forks, latents: Encoded, tmp_path: Path) -> Convert:
    """``convert(*flags)``: the latents as WebDataset."""

    def run(*flags: object) -> Path:
        done = forks.run("convert", latents.out, tmp_path / "converted", "--exporter", "webdataset", *flags)
        assert done.code == 0, done.output
        return tmp_path / "converted"

    return run


@pytest.mark.parametrize(
    "flags",
    [
        ("--latent-dtype", "float32"),
        ("--latent-dtype", "float32", "--latent-format", "npy"),
        ("--latent-dtype", "float32", "--latent-compression", "zstd"),
    ],
    ids=lambda flags: flags[-1],
)
def test_batches_are_those_of_the_parquet_files(flags: tuple[object, ...], latents: Encoded, convert: Convert) -> None:
    batches = list(EncodedDataset(convert(*flags), batch_size=2))
    expected = list(EncodedDataset(latents.out, batch_size=2))
    assert len(batches) == len(expected) > 5
    for batch, other in zip(batches, expected, strict=True):
        assert batch["keys"] == other["keys"]
        for name in ("vae_latent", "text_embedding", "text_attention_mask"):
            assert torch.equal(batch[name], other[name])


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_bfloat16_is_what_float32_rounds_to(compression: str, latents: Encoded, convert: Convert) -> None:
    converted = convert("--latent-compression", compression)
    for batch, other in zip(
        EncodedDataset(converted, batch_size=2), EncodedDataset(latents.out, batch_size=2), strict=True
    ):
        assert batch["keys"] == other["keys"]
        assert batch["vae_latent"].dtype == torch.bfloat16
        assert torch.equal(batch["vae_latent"], other["vae_latent"].bfloat16())


def test_the_formats_may_be_mixed(latents: Encoded, convert: Convert) -> None:
    mixed = EncodedDataset([latents.out, convert()], batch_size=2, dtype=torch.float32)
    rows = [(source, key) for batch in mixed for source, key in zip(batch["sources"], batch["keys"], strict=True)]
    assert {source for source, _ in rows} == {0, 1}
    assert len(rows) == len(set(rows))


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_ids_and_captions_are_those_of_the_parquet_files(compression: str, latents: Encoded, convert: Convert) -> None:
    converted = convert("--latent-compression", compression)
    for batch, other in zip(
        EncodedDataset(converted, batch_size=2, with_captions=True),
        EncodedDataset(latents.out, batch_size=2, with_captions=True),
        strict=True,
    ):
        assert (batch["ids"], batch["captions"]) == (other["ids"], other["captions"])
        assert len(batch["captions"]) == 2
