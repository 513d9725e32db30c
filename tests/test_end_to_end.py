"""From videos to what a trainer reads, against a second implementation that shares no code with ours: `reference`.

Five real clips, where the checkout lies beside them, and six made ones; with each model whose tensors are others.
"""

from __future__ import annotations

import contextlib
import functools
import html
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from diffusers import DiffusionPipeline, WanPipeline
from fastvideo_schemas import SCHEMAS
from reference import Geometry, Row, compare, encode_captions, encode_dataset, read_entries, read_rows
from torch import Tensor

from streamprep import cli
from tools.make_clips import make_clips

pytestmark = pytest.mark.usefixtures("one_thread")

GEOMETRY = Geometry(height=64, width=96, num_frames=17, train_fps=16)
TEXT_TOLERANCE = 1e-5
"""Batches padded to their longest caption instead of to 512 tokens."""
SHAPES: dict[str, dict[str, tuple[int, ...] | None]] = {
    "2.1-t2v": {"vae_latent": (16, 5, 8, 12)},
    "2.1-i2v": {
        "vae_latent": (16, 5, 8, 12),
        "clip_feature": (257, 64),
        "first_frame_latent": (16, 5, 8, 12),
        "pil_image": None,
    },
    "2.2-i2v-a14b": {
        "vae_latent": (16, 5, 8, 12),
        "clip_feature": None,
        "first_frame_latent": (16, 5, 8, 12),
        "pil_image": None,
    },
    "2.2-ti2v-5b": {
        "vae_latent": (48, 5, 4, 6),
        "clip_feature": None,
        "first_frame_latent": None,
        "pil_image": None,
    },
}
"""Of each model's tensors but ``text_embedding``; None: the columns are there, with no bytes."""


SPECIAL_CAPTIONS = {
    "plain.mp4": "A red circle moves from left to right.",
    "long.mp4": "A red circle moves from left to right over a blue and white checkerboard. " * 60,
    "unicode.mp4": "Zo\u00eb dreht ein Video \U0001f3ac: \u4f60\u597d, \u043f\u0440\u0438\u0432\u0435\u0442",
    "entities.mp4": "Tom &amp;amp; Jerry &lt;run&gt;, they say &quot;fast&quot;",
    "spaces.mp4": "  A\tdog \n\n runs\u00a0 home.  ",
    "empty.mp4": "",
}


def streamprep(*arguments: object) -> str:
    """Run one command in this process; its standard output."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = cli.main([str(argument) for argument in arguments])
    assert code == 0, output.getvalue()
    return output.getvalue()


@dataclass
class Finished:
    """A dataset and what ``streamprep run`` made of it."""

    dataset: Path
    model: Path
    variant: str
    out: Path
    output: str

    @property
    def workload(self) -> str:
        return "t2v" if self.variant == "2.1-t2v" else "i2v"

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The dataset's list, in the order that shards have."""
        return read_entries(self.dataset)

    @property
    def files(self) -> list[Path]:
        return sorted((self.out / "combined_parquet_dataset").iterdir())

    @functools.cached_property
    def rows(self) -> dict[str, Row]:
        """By id."""
        return read_rows(self.out)

    @functools.cached_property
    def pipeline(self) -> Any:
        """The one that the model belongs to."""
        return DiffusionPipeline.from_pretrained(self.model)


@pytest.fixture(scope="module")
def made_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dataset = tmp_path_factory.mktemp("made") / "dataset"
    make_clips(dataset, num_clips=6)
    return dataset


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((clips, variant), id=f"{clips}-{variant}", marks=[pytest.mark.slow] if on_both else [])
        for variant in SHAPES
        for clips, on_both in (("shared", variant.startswith("2.2")), ("made", False))
    ],
)
def finished(
    request: pytest.FixtureRequest, tiny_models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    clips, variant = request.param
    dataset: Path = request.getfixturevalue(f"{clips}_clips")
    how = [] if clips == "shared" else ["--serial", "--samples-per-file", "4"]
    job = Finished(dataset, tiny_models(variant), variant, tmp_path_factory.mktemp("job") / "out", "")
    job.output = streamprep(
        *("run", dataset, job.out, "--model-path", job.model, "--workload-type", job.workload),
        *(*GEOMETRY.flags, "--encode-threads", 1, *how),
    )
    return job


def collate_as_fastvideo(
    rows: list[dict[str, Any]], schema: pa.Schema, *, text_padding_length: int = 512
) -> dict[str, Any]:
    """What its reader makes of rows: all bytes are float32, no bytes are ``zeros(0)``, only text is padded."""
    names = [column.removesuffix("_bytes") for column in schema.names if column.endswith("_bytes")]
    assert all(f"{name}_shape" in schema.names and f"{name}_dtype" in schema.names for name in names)
    batch: dict[str, Any] = {"prompts": [row["caption"] for row in rows]}
    for name in names:
        tensors = [
            torch.from_numpy(np.frombuffer(row[f"{name}_bytes"], dtype=np.float32).reshape(row[f"{name}_shape"]).copy())
            if row[f"{name}_bytes"]
            else torch.zeros(0, dtype=torch.bfloat16)
            for row in rows
        ]
        if name == "text_embedding":
            lengths = [len(tensor) for tensor in tensors]
            tensors = [torch.nn.functional.pad(t, (0, 0, 0, text_padding_length - len(t))) for t in tensors]
            batch["text_attention_mask"] = torch.stack(
                [torch.cat([torch.ones(n), torch.zeros(text_padding_length - n)]) for n in lengths]
            )
        batch[name] = torch.stack(tensors)
    return batch


def read_batch(finished: Finished) -> dict[str, Any]:
    """All rows, row group by row group, collated."""
    files = [pq.ParquetFile(path) for path in finished.files]
    rows = [file.read_row_group(group).to_pylist() for file in files for group in range(file.num_row_groups)]
    return collate_as_fastvideo([row for (row,) in rows], SCHEMAS[finished.workload])


def max_difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype == torch.float32
    return (ours - theirs).abs().max().item()


# Numbers


def test_every_row_is_the_second_implementations_bit_for_bit_but_for_the_text(finished: Finished) -> None:
    reference = encode_dataset(finished.dataset, finished.model, workload=finished.workload, geometry=GEOMETRY)
    assert compare(finished.rows, reference) == []
    assert list(reference) == [entry["path"] for entry in finished.entries]
    assert len(reference) >= 5


def test_a_row_holds_what_its_model_takes_and_no_more(finished: Finished) -> None:
    for row in finished.rows.values():
        tensors = {name: row[name] for name in row if name in SHAPES["2.1-i2v"] or name == "text_embedding"}
        embedding = tensors.pop("text_embedding")
        assert {name: value if value is None else tuple(value.shape) for name, value in tensors.items()} == (
            SHAPES[finished.variant]
        )
        assert 1 < len(embedding) <= 512
        assert embedding.shape[1] == 32


@torch.no_grad()
def test_fastvideos_reader_gets_what_the_pipeline_would_give_its_transformer(finished: Finished) -> None:
    batch = read_batch(finished)
    assert batch["prompts"] == [row["caption"] for row in finished.rows.values()]
    embeds, _ = finished.pipeline.encode_prompt(
        batch["prompts"], do_classifier_free_guidance=False, max_sequence_length=512
    )
    assert max_difference(batch["text_embedding"], embeds) < TEXT_TOLERANCE
    assert torch.equal(batch["text_attention_mask"].bool(), (embeds != 0).any(-1))
    for name, shape in SHAPES[finished.variant].items():
        assert batch[name].shape == (len(finished.rows), *(shape or (0,)))


@torch.no_grad()
def test_the_transformer_itself_takes_the_tensors(finished: Finished) -> None:
    """As FastVideo's trainers put them together: noisy latents, the mask they make, the conditioning latent."""
    batch = {name: value[:2] for name, value in read_batch(finished).items()}
    latents, transformer = batch["vae_latent"], finished.pipeline.transformer
    condition = batch.get("first_frame_latent", torch.zeros(0))
    if condition.numel():
        mask = torch.zeros(2, 4, *latents.shape[2:])
        mask[:, :, 0] = 1
        latents = torch.cat([latents, mask, condition], dim=1)
    image = batch.get("clip_feature", torch.zeros(0))
    (prediction,) = transformer(
        latents,
        timestep=torch.tensor([500, 500]),
        encoder_hidden_states=batch["text_embedding"],
        encoder_hidden_states_image=image if image.numel() else None,
        return_dict=False,
    )
    assert prediction.shape == batch["vae_latent"].shape
    assert prediction.isfinite().all()
    assert (transformer.config.image_dim is None) == (image.numel() == 0)


def test_the_embedding_of_no_prompt_is_there_for_guidance(finished: Finished) -> None:
    (path,) = (finished.out / "_streamprep").glob("uncond-*.safetensors")
    tensors = safetensors.torch.load_file(path)
    assert list(tensors) == ["text_embedding"]
    assert max_difference(tensors["text_embedding"], encode_captions(finished.model, [""])[0]) < TEXT_TOLERANCE


# Rows and files


def test_the_command_says_how_many_rows_and_files_there_are(finished: Finished) -> None:
    assert finished.output.startswith(f"{len(finished.rows)} rows, {len(finished.files)} file")


def test_files_have_fastvideos_schema_and_are_laid_out_to_be_read_fast(finished: Finished) -> None:
    for path in finished.files:
        file = pq.ParquetFile(path)
        assert file.schema_arrow.remove_metadata().equals(SCHEMAS[finished.workload])
        assert file.metadata.num_row_groups == file.metadata.num_rows
        for group in range(file.metadata.num_row_groups):
            for number in range(file.metadata.num_columns):
                column = file.metadata.row_group(group).column(number)
                assert column.compression == "UNCOMPRESSED"
                assert not column.has_dictionary_page
                if column.path_in_schema.endswith("_bytes"):
                    assert not column.is_stats_set
                elif ".list." not in column.path_in_schema:
                    assert column.is_stats_set


def test_every_file_says_what_its_latents_are(finished: Finished) -> None:
    for path in finished.files:
        contract = json.loads(pq.read_schema(path).metadata[b"streamprep.contract"])
        assert (contract["family"], contract["variant"], contract["model"]) == ("wan", finished.variant, "tiny-wan")
        assert contract["workload"] == finished.workload
        assert set(contract["tensors"]) == {
            "text_embedding",
            *(name for name, shape in SHAPES[finished.variant].items() if shape),
        }
        video = contract["video"]
        assert (video["posterior"], video["space"]) == ("mean", "raw")
        assert video["latents_mean"] == finished.pipeline.vae.config.latents_mean
        assert video["latents_std"] == finished.pipeline.vae.config.latents_std


def test_the_index_says_where_every_tensor_lies(finished: Finished) -> None:
    index = pq.read_table(finished.out / "_streamprep" / "index.parquet").to_pylist()
    assert sorted(entry["key"] for entry in index) == [entry["path"].removesuffix(".mp4") for entry in finished.entries]
    names = ["text_embedding", *(name for name, shape in SHAPES[finished.variant].items() if shape)]
    for entry in index:
        assert sorted(name.removesuffix("_offset") for name in entry if name.endswith("_offset")) == sorted(names)
        for name in names:
            dtype, shape = np.dtype(entry[f"{name}_dtype"]), entry[f"{name}_shape"]
            count = entry[f"{name}_size"] // dtype.itemsize
            flat = np.fromfile(finished.out / entry["file"], dtype, count, offset=entry[f"{name}_offset"])
            assert np.array_equal(flat.reshape(shape), finished.rows[entry["key"] + ".mp4"][name].numpy())
        row = pq.ParquetFile(finished.out / entry["file"]).read_row_group(entry["row_group"]).to_pylist()
        assert [item["id"] for item in row] == [entry["key"] + ".mp4"]
        assert entry["bucket"] == "17x64x96"


def test_verify_finds_nothing_wrong(finished: Finished) -> None:
    assert ": 0 problems" in streamprep("verify", finished.out)
    status = streamprep("status", finished.out)
    assert "done" in status
    assert f"decoded  {len(finished.entries)} by torchcodec" in status


# Captions

SMALL = Geometry(height=32, width=48, num_frames=5, train_fps=16)


@pytest.fixture(scope="module", params=[True, False], ids=["cleaned", "as they are"])
def captioned(
    request: pytest.FixtureRequest,
    make_video: Callable[..., Path],
    tiny_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Finished, bool]:
    folder = tmp_path_factory.mktemp("captions")
    for name in SPECIAL_CAPTIONS:
        make_video(folder / "dataset" / "videos" / name, fps=16, num_frames=5)
    entries = [{"path": name, "cap": caption} for name, caption in SPECIAL_CAPTIONS.items()]
    (folder / "dataset" / "videos2caption.json").write_text(json.dumps(entries))
    clean = "--clean-captions" if request.param else "--no-clean-captions"
    job = Finished(folder / "dataset", tiny_model, "2.1-t2v", folder / "out", "")
    job.output = streamprep(
        *("run", job.dataset, job.out, "--model-path", tiny_model),
        *(*SMALL.flags, clean, "--serial", "--encode-threads", 1),
    )
    return job, request.param


def test_captions_are_cleaned_as_the_pipeline_does_or_not_at_all(captioned: tuple[Finished, bool]) -> None:
    job, cleaned = captioned
    reference = encode_dataset(job.dataset, job.model, workload="t2v", geometry=SMALL, clean_captions=cleaned)
    assert compare(job.rows, reference) == []
    assert set(job.rows) == set(SPECIAL_CAPTIONS) - {"empty.mp4"}
    assert {name: row["caption"] for name, row in job.rows.items()}.items() <= SPECIAL_CAPTIONS.items()
    assert job.rows["long.mp4"]["text_embedding"].shape == (512, 32)
    tokenizer = WanPipeline.from_pretrained(job.model).tokenizer
    cleaned_text = html.unescape(html.unescape(SPECIAL_CAPTIONS["entities.mp4"]))
    num_tokens = len(tokenizer(cleaned_text if cleaned else SPECIAL_CAPTIONS["entities.mp4"]).input_ids)
    assert len(job.rows["entities.mp4"]["text_embedding"]) == num_tokens


def test_a_video_without_a_caption_is_dropped_and_said_to_be(captioned: tuple[Finished, bool]) -> None:
    finished, _ = captioned
    assert "dropped 1: 1 empty_caption" in finished.output
    assert ": 0 problems" in streamprep("verify", finished.out)
