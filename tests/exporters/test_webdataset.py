"""WebDataset's exporter: what strangers read, clips with several captions, and what is refused."""

from __future__ import annotations

import functools
import itertools
import json
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import safetensors.torch
import torch
import webdataset
from exporting import CONTRACT, make_sample
from exporting import write as write_by

from exporters import webdataset as exporter
from streamprep import unit_tars
from streamprep.errors import UserError
from streamprep.exporting import settle_options
from streamprep.keys import key_of
from streamprep.storage import open_store
from streamprep.tensor_members import decode_latents, same_bytes
from streamprep.types import EncodedSample, WrittenFile

write = functools.partial(write_by, "webdataset")

EXTENSIONS = {
    "safetensors": {"latent_dtype": "bfloat16"},
    "safetensors.zst": {"latent_dtype": "bfloat16", "latent_compression": "zstd"},
    "npy": {"latent_dtype": "float16", "latent_format": "npy"},
}
"""Of a tensor's member, and the options that make it so."""


def with_captions(number: int, *captions: int) -> list[EncodedSample]:
    """Rows of one clip, one for each caption's number."""
    clip = make_sample(number)
    rows = []
    for caption in captions:
        suffix = f"@{caption:02d}" if caption else ""
        text = {"text_embedding": make_sample(caption + 100).tensors["text_embedding"]}
        rows.append(
            replace(
                clip,
                key=clip.key + suffix,
                id=clip.id + suffix,
                caption=f"Caption {caption} of {number}.",
                tensors={**clip.tensors, **text},
            )
        )
    return rows


def urls(root: Path, written: list[WrittenFile]) -> list[str]:
    return [str(root / file.name) for file in written]


def member_names(root: Path, file: WrittenFile) -> list[str]:
    with tarfile.open(root / file.name, "r:") as tar:
        return tar.getnames()


# What others read


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_webdataset_reads_it_with_our_decoder(extension: str, tmp_path: Path) -> None:
    options = EXTENSIONS[extension]
    samples = [make_sample(number) for number in range(5)]
    written = write(open_store(tmp_path), *samples, samples_per_file=2, **options)
    pipeline = webdataset.WebDataset(urls(tmp_path, written), shardshuffle=False).decode(decode_latents)
    read = list(pipeline)
    assert [one["__key__"] for one in read] == [sample.key for sample in samples]
    for one, sample in zip(read, samples, strict=True):
        assert set(one) - {"__key__", "__url__", "__local_path__"} == {
            "json",
            f"vae_latent.{extension}",
            f"text_embedding.{extension}",
        }
        for name, tensor in sample.tensors.items():
            stored = tensor.to(getattr(torch, options["latent_dtype"]))
            assert same_bytes(one[f"{name}.{extension}"], stored)
        assert one["json"]["captions"] == [sample.caption]


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_hugging_face_datasets_reads_it(extension: str, tmp_path: Path) -> None:
    samples = [make_sample(number) for number in range(5)]
    written = write(open_store(tmp_path), *samples, samples_per_file=2, **EXTENSIONS[extension])
    files = {"train": urls(tmp_path, written)}
    read = list(datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True))
    assert [one["__key__"] for one in read] == [sample.key for sample in samples]
    assert [one["json"]["captions"] for one in read] == [[sample.caption] for sample in samples]
    if extension == "safetensors":
        latents = [safetensors.torch.load(one["vae_latent.safetensors"])["vae_latent"] for one in read]
    elif extension == "npy":
        latents = [torch.tensor(np.array(one["vae_latent.npy"], np.float16)) for one in read]
    else:
        return  # it uncompresses the planes and leaves them as they are
    dtype = getattr(torch, EXTENSIONS[extension]["latent_dtype"])
    for latent, sample in zip(latents, samples, strict=True):
        assert torch.equal(latent, sample.tensors["vae_latent"].to(dtype))


def test_tar_itself_lists_it_without_a_complaint(tmp_path: Path) -> None:
    (file,) = write(open_store(tmp_path), make_sample(), *with_captions(1, 0, 1))
    listed = subprocess.run(["tar", "-tvf", tmp_path / file.name], capture_output=True, text=True)
    assert (listed.returncode, listed.stderr) == (0, "")
    assert len(listed.stdout.splitlines()) == 1 + 3 + 4
    assert all("1970-01-01" in line and " 0/0 " in line for line in listed.stdout.splitlines())


def test_members_of_a_sample_are_adjacent_and_sorted(tmp_path: Path) -> None:
    (file,) = write(open_store(tmp_path), *map(make_sample, range(2)))
    extensions = ("json", "text_embedding.safetensors", "vae_latent.safetensors")
    assert member_names(tmp_path, file) == [
        "__streamprep__/contract",
        *(f"dir/{number}.{extension}" for number in range(2) for extension in extensions),
    ]


def test_the_contract_is_in_every_file(tmp_path: Path) -> None:
    for file in write(open_store(tmp_path), *map(make_sample, range(3)), samples_per_file=1):
        with tarfile.open(tmp_path / file.name) as tar:
            content = tar.extractfile("__streamprep__/contract")
            assert content is not None and json.load(content) == CONTRACT


def test_what_a_sample_was_made_from_is_in_its_json(tmp_path: Path) -> None:
    kept = {"aesthetic": 5.5, "source": None}
    (file,) = write(open_store(tmp_path), make_sample(3, columns=kept))
    (sample,) = webdataset.WebDataset(urls(tmp_path, [file]), shardshuffle=False).decode()
    assert sample["json"] == {
        "keys": ["dir/3"],
        "ids": ["dir/3.mp4"],
        "captions": ["Caption 3."],
        "file_name": "dir/3.mp4",
        "bucket": "17x64x96",
        "width": 96,
        "height": 64,
        "num_frames": 17,
        "train_fps": 16.0,
        "source_fps": 30000 / 1001,
        "media_type": "video",
        "columns": kept,
    }


def test_captions_without_clips_say_nothing_of_clips(tmp_path: Path) -> None:
    text = {"text_embedding": torch.randn(3, 8)}
    sample = replace(make_sample(1), clip=None, tensors=text)
    (file,) = write(open_store(tmp_path), sample, workload="text")
    (read,) = webdataset.WebDataset(urls(tmp_path, [file]), shardshuffle=False).decode(decode_latents)
    assert set(read["json"]) == {"keys", "ids", "captions", "file_name", "bucket"}
    assert same_bytes(read["text_embedding.safetensors"], text["text_embedding"].bfloat16())


# Several captions


def test_a_clip_with_several_captions_is_one_sample_and_a_row_for_each(tmp_path: Path) -> None:
    rows = with_captions(1, 0, 2)
    (file,) = write(open_store(tmp_path), make_sample(0), *rows, make_sample(2))
    assert member_names(tmp_path, file)[4:8] == [
        "dir/1.json",
        "dir/1.text_embedding.02.safetensors",
        "dir/1.text_embedding.safetensors",
        "dir/1.vae_latent.safetensors",
    ]
    assert [(row.key, row.row_group) for row in file.rows] == [
        ("dir/0", 0),
        ("dir/1", 1),
        ("dir/1@02", 1),
        ("dir/2", 2),
    ]
    one, other = file.rows[1], file.rows[2]
    assert one.tensors["vae_latent"] == other.tensors["vae_latent"]
    assert one.tensors["text_embedding"] != other.tensors["text_embedding"]
    read = list(exporter.read_file(open_store(tmp_path), file.name))
    assert [id for id, _ in read] == ["dir/0.mp4", "dir/1.mp4", "dir/1.mp4@02", "dir/2.mp4"]
    for (_, tensors), row in zip(read[1:3], rows, strict=True):
        assert same_bytes(tensors["text_embedding"], row.tensors["text_embedding"].bfloat16())
    how: dict[str, Any] = {"workload": "t2v", "train_fps": 16.0, "columns": {}}
    again = list(exporter.read_samples(open_store(tmp_path), file, **how))[1:3]
    assert [(row.key, row.id, row.caption) for row in again] == [(row.key, row.id, row.caption) for row in rows]
    assert again[0].tensors["vae_latent"] is again[1].tensors["vae_latent"]


def test_datasets_reads_a_caption_of_every_clip(tmp_path: Path) -> None:
    """It takes its columns from the first five samples: later ones of one caption had none, without a word."""
    clips = [with_captions(number, *range(2 if number < 6 else number % 3 + 1)) for number in range(1, 10)]
    written = write(open_store(tmp_path), *itertools.chain.from_iterable(clips))
    files = {"train": urls(tmp_path, written)}
    read = list(datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True))
    assert len(read) == len(clips)
    for one, clip in zip(read, clips, strict=True):
        embedding = safetensors.torch.load(one["text_embedding.safetensors"])["text_embedding"]
        assert same_bytes(embedding, clip[0].tensors["text_embedding"].bfloat16())


def test_a_later_caption_alone_is_called_as_any_that_is_alone(tmp_path: Path) -> None:
    """As a retry may have it."""
    (file,) = write(open_store(tmp_path), *with_captions(1, 3))
    assert "dir/1.text_embedding.safetensors" in member_names(tmp_path, file)
    ((id, tensors),) = exporter.read_file(open_store(tmp_path), file.name)
    assert id == "dir/1.mp4@03" and set(tensors) == {"vae_latent", "text_embedding"}


@pytest.mark.parametrize(
    ("samples_per_file", "rows"),
    [(1, [1, 3, 2, 1]), (2, [1, 3, 2, 1]), (3, [1, 3, 3]), (4, [4, 3]), (5, [4, 3]), (6, [6, 1]), (64, [7])],
)
def test_a_clip_is_never_split_across_files(samples_per_file: int, rows: list[int], tmp_path: Path) -> None:
    samples = [make_sample(0), *with_captions(1, 0, 1, 2), *with_captions(2, 0, 1), make_sample(3)]
    written = write(open_store(tmp_path), *samples, samples_per_file=samples_per_file)
    assert [len(file.rows) for file in written] == rows
    assert [row.key for file in written for row in file.rows] == [sample.key for sample in samples]


def test_a_file_ends_at_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_tars, "MAX_FILE_BYTES", 30_000)
    written = write(open_store(tmp_path), *map(make_sample, range(6)))
    assert len(written) > 1
    assert all(30_000 <= file.size_bytes < 60_000 for file in written[:-1])


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": {"vae_latent": torch.zeros(16, 5, 2, 3)}},
        {"file_name": "other.mp4"},
        {"columns": {"source": "another"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_rows_that_differ_in_more_than_their_text_are_kept_apart(change: Mapping[str, Any], tmp_path: Path) -> None:
    """The same key would be the same sample to every reader, which must not lose one of them."""
    one, other = with_captions(1, 0, 1)
    if "tensors" in change:
        change = {"tensors": {**other.tensors, **change["tensors"]}}
    (file,) = write(open_store(tmp_path), one, replace(other, **change), latent_dtype="float32")
    assert [row.row_group for row in file.rows] == [0, 1]
    read = [tensors for _, tensors in exporter.read_file(open_store(tmp_path), file.name)]
    assert same_bytes(read[1]["vae_latent"], {**other.tensors, **change.get("tensors", {})}["vae_latent"])


def test_no_two_samples_of_a_file_have_one_name(tmp_path: Path) -> None:
    """As others' ids may be called, of videos that have nothing in common."""
    samples = [make_sample(number, key=key) for number, key in enumerate(("b@12", "z", "b@34", "b"))]
    (file,) = write(open_store(tmp_path), *samples, latent_dtype="float32")
    with tarfile.open(tmp_path / file.name) as tar:
        names = tar.getnames()
    assert len(names) == len(set(names))
    assert len(list(webdataset.WebDataset(urls(tmp_path, [file]), shardshuffle=False))) == len(samples)
    read = [tensors for _, tensors in exporter.read_file(open_store(tmp_path), file.name)]
    for sample, tensors in zip(samples, read, strict=True):
        assert same_bytes(tensors["vae_latent"], sample.tensors["vae_latent"])


# Names


@pytest.mark.parametrize("path", ["x" * 300, "/".join(["y" * 90] * 6), f"{'z' * 63}/{'w' * 63}/{'v' * 63}", "a.b/c.d"])
@pytest.mark.parametrize("extension", EXTENSIONS)
def test_the_longest_keys_fit_and_are_read_back(path: str, extension: str, tmp_path: Path) -> None:
    key = key_of(f"{path}.mp4") + "#123"
    tensors = {"first_frame_latent": torch.randn(16, 5, 2, 3)}
    samples = [make_sample(number, key=f"{key}{number}", tensors=tensors) for number in range(2)]
    written = write(open_store(tmp_path), *samples, **EXTENSIONS[extension])
    read = list(webdataset.WebDataset(urls(tmp_path, written), shardshuffle=False).decode(decode_latents))
    assert [one["json"]["keys"] for one in read] == [[sample.key] for sample in samples]
    assert all(f"first_frame_latent.{extension}" in one for one in read)
    assert [row.key for row in written[0].rows] == [sample.key for sample in samples]


# Refusals


def test_a_number_too_large_for_float16_is_an_error_that_names_key_and_tensor(tmp_path: Path) -> None:
    large = make_sample(1, tensors={"vae_latent": torch.full((16, 5, 2, 3), 7e4)})
    with pytest.raises(UserError, match="vae_latent of 'dir/1' cannot be stored as float16: it holds 70000"):
        write(open_store(tmp_path), make_sample(0), large, make_sample(2), latent_dtype="float16")
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"latent_format": "npy"},
            "--latent-format npy: NumPy's format has no bfloat16; add --latent-dtype float16 or",
        ),
        ({"latent_format": "npy", "latent_dtype": "float32", "latent_compression": "zstd"}, "only safetensors are"),
        ({"latent_dtype": "float64"}, "float64: the exporter webdataset takes only bfloat16, float16, float32"),
        ({"latent_format": "pth"}, "pth: the exporter webdataset takes only safetensors, npy"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settle_options(exporter, "webdataset", options)
