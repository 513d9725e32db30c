"""A second implementation, to compare with: from videos and captions to the rows that a trainer reads.

It says in torchcodec's, diffusers' and transformers' own words what FastVideo's preprocessing was found to do by
running it (shared/facts/fastvideo.md), and **imports nothing of streamprep**: a mistake would have to be made twice.
It is meant to be plain, not fast: whole clips in memory, embeddings padded to 512 tokens and cut.

``compare(read_rows(OUT), encode_dataset(DATASET, MODEL, ...))`` is a list of what differs, empty if nothing does.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import transformers
from diffusers import AutoencoderKLWan
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from PIL import Image
from torch import Tensor
from torchcodec.decoders import VideoDecoder

MAX_TOKENS = 512
TOLERANCES = {"vae_latent": 0.0, "first_frame_latent": 0.0, "clip_feature": 0.0, "text_embedding": 1e-5}
"""Most that a number may differ by. Embeddings are computed here beside padding to 512 tokens, there to the longest."""
TENSORS = {
    "t2v": ("vae_latent", "text_embedding"),
    "i2v": ("vae_latent", "text_embedding", "clip_feature", "first_frame_latent", "pil_image"),
}
"""The tensor columns of a workload."""

Row = dict[str, Any]
"""Columns by name; a tensor is one column here, None where the row has no bytes for it."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Which frames, of which size."""

    height: int = 64
    width: int = 96
    num_frames: int = 17
    train_fps: float = 16.0

    @property
    def flags(self) -> list[object]:
        """The same for ``streamprep``."""
        return [
            *("--max-height", self.height, "--max-width", self.width),
            *("--num-frames", self.num_frames, "--train-fps", self.train_fps),
        ]


def encode_dataset(
    dataset: Path, model: Path, *, workload: str, geometry: Geometry, clean_captions: bool = True, batch_size: int = 2
) -> dict[str, Row]:
    """The rows of a dataset, by id.

    Args:
        dataset: In FastVideo's merged layout.
        model: A diffusers folder.
        workload: ``t2v`` or ``i2v``.
        geometry: Frames and sizes.
        clean_captions: As the pipelines do; FastVideo does not.
        batch_size: Clips at once, from the first to the last by path; other numbers may give other last bits.
    """
    entries = read_entries(dataset)
    clips = torch.stack([read_frames(dataset, entry, geometry) for entry in entries])
    embeddings = encode_captions(model, [caption_of(entry) for entry in entries], clean=clean_captions)
    batches = [encode_clips(model, batch, workload=workload) for batch in clips.split(batch_size)]
    columns = {name: [tensor for batch in batches for tensor in batch[name]] for name in batches[0]}
    columns["text_embedding"] = embeddings
    rows = {}
    for number, entry in enumerate(entries):
        tensors = {name: columns[name][number] if name in columns else None for name in TENSORS[workload]}
        rows[entry["path"]] = describe(dataset, entry, geometry) | tensors
    return rows


def compare(rows: Mapping[str, Row], reference: Mapping[str, Row]) -> list[str]:
    """What differs, a line ``ID COLUMN: ...`` for each column of each row.

    Args:
        rows: By id, as `read_rows` gives them.
        reference: As `encode_dataset` gives them.
    """
    lines = [f"{key} id: there is no such row" for key in reference if key not in rows]
    lines += [f"{key} id: there should be no such row" for key in rows if key not in reference]
    for key in sorted(rows.keys() & reference.keys()):
        names = dict.fromkeys([*reference[key], *rows[key]])
        problems = ((name, _differs(name, rows[key], reference[key])) for name in names)
        lines += [f"{key} {name}: {problem}" for name, problem in problems if problem]
    return lines


def read_rows(out: Path) -> dict[str, Row]:
    """The rows of a finished job, by id, row group by row group as FastVideo reads them."""
    rows = [row for path in sorted((out / "combined_parquet_dataset").iterdir()) for row in _read_file(path)]
    assert len({row["id"] for row in rows}) == len(rows), "an id is there twice"
    return {row["id"]: row for row in rows}


# Frames


def read_entries(dataset: Path) -> list[dict[str, Any]]:
    """The dataset's list by path, without those that have no caption, which are dropped."""
    entries = json.loads((dataset / "videos2caption.json").read_text())
    return sorted((entry for entry in entries if caption_of(entry)), key=lambda entry: str(entry["path"]))


def caption_of(entry: Mapping[str, Any]) -> str:
    """The first, if there are several."""
    captions = entry["cap"]
    return captions if isinstance(captions, str) else captions[0]


def read_frames(dataset: Path, entry: Mapping[str, Any], geometry: Geometry) -> Tensor:
    """The chosen frames, cropped and resized: (T, C, H, W) uint8."""
    return _read_frames(
        dataset / "videos" / entry["path"], source_fps(dataset, entry), entry.get("num_frames"), geometry
    )


@functools.cache  # the same for every model
def _read_frames(video: Path, fps: float, num_frames: int | None, geometry: Geometry) -> Tensor:
    decoder = VideoDecoder(video)
    indices = np.arange(0, num_frames or len(decoder), fps / geometry.train_fps).astype(int)[: geometry.num_frames]
    assert len(indices) == geometry.num_frames, f"{video} is too short"
    return crop_and_resize(decoder.get_frames_at(indices.tolist()).data.contiguous(), geometry)


def source_fps(dataset: Path, entry: Mapping[str, Any]) -> float:
    """As declared, else as the file says."""
    return float(entry.get("fps") or VideoDecoder(dataset / "videos" / entry["path"]).metadata.average_fps)


def crop_and_resize(frames_TCHW: Tensor, geometry: Geometry) -> Tensor:
    """``CenterCropResizeVideo``, on uint8."""
    h, w = frames_TCHW.shape[-2:]
    tr = geometry.height / geometry.width
    new_h, new_w = (int(w * tr), w) if h / w > tr else (h, int(h / tr))
    i, j = int(round((h - new_h) / 2.0)), int(round((w - new_w) / 2.0))  # noqa: RUF046 - theirs
    cropped = frames_TCHW[:, :, i : i + new_h, j : j + new_w]
    size = (geometry.height, geometry.width)
    return torch.nn.functional.interpolate(cropped, size=size, mode="bilinear", align_corners=True, antialias=True)


def describe(dataset: Path, entry: Mapping[str, Any], geometry: Geometry) -> Row:
    """The columns that are no tensors."""
    return {
        "id": entry["path"],
        "file_name": entry["path"],
        "caption": caption_of(entry),
        "media_type": "video",
        "width": geometry.width,
        "height": geometry.height,
        "num_frames": 1 + (geometry.num_frames - 1) // 4,  # of latents
        "duration_sec": geometry.num_frames / geometry.train_fps,
        "fps": source_fps(dataset, entry),
    }


# Tensors


@torch.no_grad()
def encode_captions(model: Path, captions: Sequence[str], *, clean: bool = True) -> list[Tensor]:
    """UMT5 on 512 tokens, cut to those of the caption: (L, D) each."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model / "tokenizer")
    encoder = transformers.UMT5EncoderModel.from_pretrained(model / "text_encoder", dtype=torch.float32)
    embeddings = []
    for caption in captions:
        text = prompt_clean(caption) if clean else caption
        tokens = tokenizer(
            text, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_attention_mask=True
        )
        ids, mask = torch.tensor([tokens.input_ids]), torch.tensor([tokens.attention_mask])
        embeddings.append(encoder(ids, mask).last_hidden_state[0, : int(mask.sum())])
    return embeddings


@torch.no_grad()
def encode_clips(model: Path, frames_BTCHW: Tensor, *, workload: str) -> dict[str, Tensor]:
    """What a workload and a model ask for, of (B, T, C, H, W) uint8; each with a leading B."""
    vae = AutoencoderKLWan.from_pretrained(model, subfolder="vae", torch_dtype=torch.float32)
    pixels_BCTHW = (frames_BTCHW / 255 * 2 - 1).clamp(-1, 1).transpose(1, 2)
    tensors = {"vae_latent": vae.encode(pixels_BCTHW).latent_dist.mean}
    index = json.loads((model / "model_index.json").read_text())
    if workload == "i2v" and not index["expand_timesteps"]:
        tensors["first_frame_latent"] = encode_condition(vae, pixels_BCTHW)
    if workload == "i2v" and index.get("image_encoder", [None])[0] is not None:
        tensors["clip_feature"] = encode_pictures(model, frames_BTCHW[:, 0])
    return tensors


@torch.no_grad()
def encode_condition(vae: AutoencoderKLWan, pixels_BCTHW: Tensor) -> Tensor:
    """The first frame, then nothing, through the VAE, and normalised."""
    first, rest = pixels_BCTHW[:, :, :1], torch.zeros_like(pixels_BCTHW[:, :, 1:])
    latents = vae.encode(torch.cat([first, rest], dim=2)).latent_dist.mode()
    mean = torch.tensor(vae.config.latents_mean).view(1, vae.config.z_dim, 1, 1, 1)
    std = 1.0 / torch.tensor(vae.config.latents_std).view(1, vae.config.z_dim, 1, 1, 1)
    return (latents - mean) * std  # as the pipeline has it; a division gives other last bits


@torch.no_grad()
def encode_pictures(model: Path, frames_BCHW: Tensor) -> Tensor:
    """The layer before CLIP's last, all tokens: (B, L, D)."""
    processor = transformers.CLIPImageProcessor.from_pretrained(model / "image_processor")
    encoder = transformers.CLIPVisionModel.from_pretrained(model / "image_encoder", dtype=torch.float32)
    pictures = [Image.fromarray(np.ascontiguousarray(frame.numpy().transpose(1, 2, 0))) for frame in frames_BCHW]
    pixels = processor(images=pictures, return_tensors="pt").pixel_values
    return encoder(pixels, output_hidden_states=True).hidden_states[-2]


# Rows


def _read_file(path: Path) -> Iterator[Row]:
    file = pq.ParquetFile(path)
    for number in range(file.num_row_groups):
        for columns in file.read_row_group(number).to_pylist():
            row = {name: value for name, value in columns.items() if not name.endswith(("_bytes", "_shape", "_dtype"))}
            for name in (column.removesuffix("_bytes") for column in columns if column.endswith("_bytes")):
                row[name] = read_tensor(columns, name)
            yield row


def read_tensor(columns: Mapping[str, Any], name: str) -> object:
    """A float32 tensor of a row of a Parquet file; None if it has none, and what it has if that is neither."""
    data, shape, dtype = (columns[f"{name}_{part}"] for part in ("bytes", "shape", "dtype"))
    if (data, shape, dtype) == (b"", [], ""):
        return None
    if dtype != "float32" or not data or len(data) != 4 * math.prod(shape):
        return f"{len(data)} bytes said to be {shape} {dtype!r}"
    return torch.from_numpy(np.frombuffer(data, dtype=np.float32).reshape(shape).copy())


def _differs(name: str, row: Row, reference: Row) -> str:
    """How one column does; empty if it does not."""
    if name not in row or name not in reference:
        return "it is missing" if name in reference else "it should not be there"
    ours, theirs = row[name], reference[name]
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor) and _kind(ours) == _kind(theirs):
        difference = (ours - theirs).abs().max().item()
        close = difference <= TOLERANCES[name]  # NaN is not
        return "" if close else f"numbers differ by up to {difference:.3g}, {TOLERANCES[name]:g} is allowed"
    if isinstance(ours, float) and isinstance(theirs, float) and math.isclose(ours, theirs, rel_tol=1e-12):
        return ""
    ours, theirs = _kind(ours), _kind(theirs)
    return "" if ours == theirs else f"it is {ours!r} instead of {theirs!r}"


def _kind(value: object) -> object:
    """A tensor's shape and dtype; anything else is itself."""
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else value
