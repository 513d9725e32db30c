"""From videos to what a trainer reads, against a second implementation that shares no code with ours.

The second one is FastVideo's preprocessing in diffusers', transformers' and torchcodec's own words, as found by running
it (shared/facts/fastvideo.md): which frames, which pixels, which latents, which embeddings, which columns.
"""

from __future__ import annotations

import contextlib
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
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor
from torchcodec.decoders import VideoDecoder

from streamprep import cli
from tools.make_clips import make_clips

HEIGHT, WIDTH, NUM_FRAMES, TRAIN_FPS = 64, 96, 17, 16.0
FLAGS = ["--workload-type", "t2v", "--max-height", "64", "--max-width", "96", "--num-frames", "17", "--train-fps", "16"]
TEXT_TOLERANCE = 1e-5
"""Batches padded to their longest caption instead of to 512 tokens."""

T2V_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("vae_latent_bytes", pa.binary()),
        ("vae_latent_shape", pa.list_(pa.int64())),
        ("vae_latent_dtype", pa.string()),
        ("text_embedding_bytes", pa.binary()),
        ("text_embedding_shape", pa.list_(pa.int64())),
        ("text_embedding_dtype", pa.string()),
        ("file_name", pa.string()),
        ("caption", pa.string()),
        ("media_type", pa.string()),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("num_frames", pa.int64()),
        ("duration_sec", pa.float64()),
        ("fps", pa.float64()),
    ]
)
"""FastVideo's ``pyarrow_schema_t2v``."""

SPECIAL_CAPTIONS = {
    "plain.mp4": "A red circle moves from left to right.",
    "long.mp4": "A red circle moves from left to right over a blue and white checkerboard. " * 60,
    "unicode.mp4": "Zo\u00eb dreht ein Video \U0001f3ac: \u4f60\u597d, \u043f\u0440\u0438\u0432\u0435\u0442",
    "entities.mp4": "Tom &amp;amp; Jerry &lt;run&gt;, they say &quot;fast&quot;",
    "spaces.mp4": "  A\tdog \n\n runs\u00a0 home.  ",
    "empty.mp4": "",
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pipeline(tiny_model: Path) -> WanPipeline:
    return WanPipeline.from_pretrained(tiny_model)


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
    out: Path
    output: str

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The dataset's list, in the order that shards have."""
        entries = json.loads((self.dataset / "videos2caption.json").read_text())
        return sorted(entries, key=lambda entry: entry["path"])

    @property
    def files(self) -> list[Path]:
        return sorted((self.out / "combined_parquet_dataset").iterdir())

    def rows(self) -> dict[str, dict[str, Any]]:
        """By id, row group by row group as FastVideo reads them."""
        groups = [
            (pq.ParquetFile(path), number)
            for path in self.files
            for number in range(pq.read_metadata(path).num_row_groups)
        ]
        rows = [row for file, number in groups for row in file.read_row_group(number).to_pylist()]
        by_id = {row["id"]: row for row in rows}
        assert len(by_id) == len(rows)
        return by_id


@pytest.fixture(scope="module", params=["real clips", "made clips"])
def finished(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("job")
    if request.param == "real clips":
        dataset, how = request.getfixturevalue("shared_clips"), []
    else:
        dataset, how = folder / "dataset", ["--serial", "--samples-per-file", "4"]
        make_clips(dataset, num_clips=6)
    output = streamprep("run", dataset, folder / "out", "--model-path", tiny_model, *FLAGS, "--encode-threads", 1, *how)
    return Finished(dataset, folder / "out", output)


# The second implementation


def sampled_indices(num_frames: int, fps: float) -> list[int]:
    return np.arange(0, num_frames, fps / TRAIN_FPS).astype(int)[:NUM_FRAMES].tolist()


def crop_and_resize(frames_TCHW: Tensor) -> Tensor:
    h, w = frames_TCHW.shape[-2:]
    tr = HEIGHT / WIDTH
    new_h, new_w = (int(w * tr), w) if h / w > tr else (h, int(h / tr))
    i, j = int(round((h - new_h) / 2.0)), int(round((w - new_w) / 2.0))  # noqa: RUF046 - theirs
    cropped = frames_TCHW[:, :, i : i + new_h, j : j + new_w]
    return torch.nn.functional.interpolate(
        cropped, size=(HEIGHT, WIDTH), mode="bilinear", align_corners=True, antialias=True
    )


def source_fps(dataset: Path, entry: dict[str, Any]) -> float:
    return entry.get("fps") or VideoDecoder(dataset / "videos" / entry["path"]).metadata.average_fps


def read_pixels(dataset: Path, entry: dict[str, Any]) -> Tensor:
    """(C, T, H, W) in -1..1."""
    decoder = VideoDecoder(dataset / "videos" / entry["path"])
    indices = sampled_indices(entry.get("num_frames") or len(decoder), source_fps(dataset, entry))
    assert len(indices) == NUM_FRAMES
    frames_TCHW = crop_and_resize(decoder.get_frames_at(indices).data.contiguous())
    return (frames_TCHW / 255 * 2 - 1).clamp(-1, 1).transpose(0, 1)


@torch.no_grad()
def encode_videos(vae: AutoencoderKLWan, pixels: list[Tensor], batch_size: int) -> list[Tensor]:
    batches = [torch.stack(pixels[start : start + batch_size]) for start in range(0, len(pixels), batch_size)]
    return [latent for batch in batches for latent in vae.encode(batch).latent_dist.mean]


@torch.no_grad()
def encode_caption(pipeline: WanPipeline, caption: str) -> Tensor:
    """The pipeline's own embedding, as long as its mask: (L, D)."""
    embeds, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=512)
    tokens = pipeline.tokenizer(
        prompt_clean(caption), padding="max_length", max_length=512, truncation=True, return_tensors="pt"
    )
    return embeds[0, : int(tokens.attention_mask.sum())]


@torch.no_grad()
def encode_raw_caption(pipeline: WanPipeline, caption: str) -> Tensor:
    """FastVideo's: the tokenizer and the encoder on the caption as it is: (L, D)."""
    tokens = pipeline.tokenizer(caption, max_length=512, truncation=True, return_tensors="pt")
    return pipeline.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state[0]


def read_tensor(row: dict[str, Any], name: str) -> Tensor:
    """As FastVideo's collate: float32, whatever the dtype column says."""
    return torch.from_numpy(np.frombuffer(row[f"{name}_bytes"], dtype=np.float32).reshape(row[f"{name}_shape"]).copy())


def collate_as_fastvideo(rows: list[dict[str, Any]], *, text_padding_length: int = 512) -> dict[str, Any]:
    names = [column.removesuffix("_bytes") for column in rows[0] if column.endswith("_bytes")]
    assert all(f"{name}_shape" in rows[0] and f"{name}_dtype" in rows[0] for name in names)
    batch: dict[str, Any] = {"prompts": [row["caption"] for row in rows]}
    for name in names:
        tensors = [read_tensor(row, name) for row in rows]
        if name == "text_embedding":
            lengths = [len(tensor) for tensor in tensors]
            tensors = [torch.nn.functional.pad(t, (0, 0, 0, text_padding_length - len(t))) for t in tensors]
            batch["text_attention_mask"] = torch.stack(
                [torch.cat([torch.ones(n), torch.zeros(text_padding_length - n)]) for n in lengths]
            )
        batch[name] = torch.stack(tensors)
    return batch


def max_difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype == torch.float32
    return (ours - theirs).abs().max().item()


# Numbers


def test_latents_are_those_of_the_second_implementation_bit_for_bit(finished: Finished, tiny_model: Path) -> None:
    vae = AutoencoderKLWan.from_pretrained(tiny_model, subfolder="vae", torch_dtype=torch.float32)
    pixels = [read_pixels(finished.dataset, entry) for entry in finished.entries]
    rows = finished.rows()
    for entry, theirs in zip(finished.entries, encode_videos(vae, pixels, batch_size=2), strict=True):
        ours = read_tensor(rows[entry["path"]], "vae_latent")
        assert ours.shape == (16, 5, 8, 12)
        assert max_difference(ours, theirs) == 0, entry["path"]


def test_embeddings_are_those_of_the_pipeline(finished: Finished, pipeline: WanPipeline) -> None:
    rows = finished.rows()
    for entry in finished.entries:
        ours = read_tensor(rows[entry["path"]], "text_embedding")
        assert max_difference(ours, encode_caption(pipeline, entry["cap"][0])) < TEXT_TOLERANCE, entry["path"]


def test_fastvideos_reader_gets_what_the_pipeline_would_give_its_transformer(
    finished: Finished, pipeline: WanPipeline
) -> None:
    rows = list(finished.rows().values())
    batch = collate_as_fastvideo(rows)
    assert batch["prompts"] == [row["caption"] for row in rows]
    assert batch["vae_latent"].shape == (len(rows), 16, 5, 8, 12)
    assert batch["vae_latent"].isfinite().all()
    with torch.no_grad():
        embeds, _ = pipeline.encode_prompt(batch["prompts"], do_classifier_free_guidance=False, max_sequence_length=512)
    assert max_difference(batch["text_embedding"], embeds) < TEXT_TOLERANCE
    assert torch.equal(batch["text_attention_mask"].bool(), (embeds != 0).any(-1))


def test_the_embedding_of_no_prompt_is_there_for_guidance(finished: Finished, pipeline: WanPipeline) -> None:
    (path,) = (finished.out / "_streamprep").glob("uncond-*.safetensors")
    tensors = safetensors.torch.load_file(path)
    assert list(tensors) == ["text_embedding"]
    assert max_difference(tensors["text_embedding"], encode_caption(pipeline, "")) < TEXT_TOLERANCE


# Rows and files


def test_every_video_is_a_row_of_fastvideos_columns(finished: Finished) -> None:
    rows = finished.rows()
    assert sorted(rows) == [entry["path"] for entry in finished.entries]
    assert finished.output.startswith(f"{len(rows)} rows, {len(finished.files)} file")
    for entry in finished.entries:
        row = rows[entry["path"]]
        tensors = {name: row.pop(name) for name in list(row) if name.startswith(("vae_latent_", "text_embedding_"))}
        assert row == {
            "id": entry["path"],
            "file_name": entry["path"],
            "caption": entry["cap"][0],
            "media_type": "video",
            "width": 96,
            "height": 64,
            "num_frames": 5,
            "duration_sec": 17 / 16,
            "fps": pytest.approx(source_fps(finished.dataset, entry), rel=1e-12),
        }
        assert tensors["vae_latent_shape"] == [16, 5, 8, 12]
        assert tensors["text_embedding_shape"][1] == 32
        assert (tensors["vae_latent_dtype"], tensors["text_embedding_dtype"]) == ("float32", "float32")


def test_files_have_fastvideos_schema_and_are_laid_out_to_be_read_fast(finished: Finished) -> None:
    for path in finished.files:
        file = pq.ParquetFile(path)
        assert file.schema_arrow.remove_metadata().equals(T2V_SCHEMA)
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


def test_every_file_says_what_its_latents_are(finished: Finished, pipeline: WanPipeline) -> None:
    for path in finished.files:
        contract = json.loads(pq.read_schema(path).metadata[b"streamprep.contract"])
        assert (contract["family"], contract["model"]) == ("wan", "tiny-wan")
        video = contract["video"]
        assert (video["posterior"], video["space"]) == ("mean", "raw")
        assert video["latents_mean"] == pipeline.vae.config.latents_mean
        assert video["latents_std"] == pipeline.vae.config.latents_std


def test_the_index_says_where_every_tensor_lies(finished: Finished) -> None:
    rows = finished.rows()
    index = pq.read_table(finished.out / "_streamprep" / "index.parquet").to_pylist()
    assert sorted(entry["key"] for entry in index) == [entry["path"].removesuffix(".mp4") for entry in finished.entries]
    for entry in index:
        for name in ("vae_latent", "text_embedding"):
            dtype, shape = np.dtype(entry[f"{name}_dtype"]), entry[f"{name}_shape"]
            count = entry[f"{name}_size"] // dtype.itemsize
            flat = np.fromfile(finished.out / entry["file"], dtype, count, offset=entry[f"{name}_offset"])
            assert np.array_equal(flat.reshape(shape), read_tensor(rows[entry["key"] + ".mp4"], name).numpy())
        row = pq.ParquetFile(finished.out / entry["file"]).read_row_group(entry["row_group"]).to_pylist()
        assert [item["id"] for item in row] == [entry["key"] + ".mp4"]
        assert entry["bucket"] == "17x64x96"


def test_verify_finds_nothing_wrong(finished: Finished) -> None:
    assert ": 0 problems" in streamprep("verify", finished.out)
    assert "done" in streamprep("status", finished.out)


# Captions


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
    size = ["--max-height", "32", "--max-width", "48", "--num-frames", "5"]
    clean = "--clean-captions" if request.param else "--no-clean-captions"
    output = streamprep(
        "run",
        folder / "dataset",
        folder / "out",
        "--model-path",
        tiny_model,
        *size,
        clean,
        "--serial",
        "--encode-threads",
        1,
    )
    return Finished(folder / "dataset", folder / "out", output), request.param


def test_captions_are_cleaned_as_the_pipeline_does_or_not_at_all(
    captioned: tuple[Finished, bool], pipeline: WanPipeline
) -> None:
    finished, cleaned = captioned
    rows = finished.rows()
    assert set(rows) == set(SPECIAL_CAPTIONS) - {"empty.mp4"}
    for name, row in rows.items():
        caption = SPECIAL_CAPTIONS[name]
        assert row["caption"] == caption
        theirs = encode_caption(pipeline, caption) if cleaned else encode_raw_caption(pipeline, caption)
        assert max_difference(read_tensor(row, "text_embedding"), theirs) < TEXT_TOLERANCE, name
    assert rows["long.mp4"]["text_embedding_shape"] == [512, 32]
    cleaned_text = html.unescape(html.unescape(SPECIAL_CAPTIONS["entities.mp4"]))
    num_tokens = len(pipeline.tokenizer(cleaned_text if cleaned else SPECIAL_CAPTIONS["entities.mp4"]).input_ids)
    assert rows["entities.mp4"]["text_embedding_shape"] == [num_tokens, 32]


def test_a_video_without_a_caption_is_dropped_and_said_to_be(captioned: tuple[Finished, bool]) -> None:
    finished, _ = captioned
    assert "dropped 1: 1 empty_caption" in finished.output
    assert ": 0 problems" in streamprep("verify", finished.out)
