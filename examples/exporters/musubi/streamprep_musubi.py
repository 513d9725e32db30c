"""musubi-tuner's caches for Wan (text-to-video and image-to-video), as an exporter of streamprep.

musubi-tuner finds its caches by their names: ``ITEM_00000-077_0832x0480_wan.safetensors`` has the latents of an item
and ``ITEM_wan_te.safetensors`` its text embedding. A file of a job is called by its content, so that what a killed
process left can be told from what counts. So:

1. `open_shard` gives a writer of tars, named so, whose members have musubi-tuner's names; ``ITEM_wan.json`` says whose
   they are.
2. `lay_out` takes them out of a finished job.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from streamprep import canonical
from streamprep.errors import UserError
from streamprep.finalize import open_finished
from streamprep.keys import short_key
from streamprep.storage import Store, open_store
from streamprep.tensor_members import cast, dtype_name, tensor_bytes
from streamprep.types import EncodedSample, TensorLocation, TextLocation, WrittenFile, WrittenRow
from streamprep.unit_tars import UnitTar, UnitTars, checked_members, read_members

FOLDER = "musubi_caches"
WORKLOADS = ("t2v", "i2v")
POSTERIORS = ("mean",)
OPTIONS = {"latent_dtype": ("bfloat16", "float32")}
"""What can be chosen, the default first."""
NORMALISED = "vae_latent_normalised"
"""What a job calls these latents: ``vae_latent`` is raw there, as its contract says."""
MASK_CHANNELS = 4
"""Of ``latents_image``, before the latent: ones where a frame is given, one for each of the frames in a latent one."""
_CODES = {"bfloat16": "BF16", "float32": "F32"}
_LONGEST_ITEM = 57  # a member's name without a folder has at most 100 bytes


# --- what streamprep asks of an exporter


def column_problem(name: str, *, workload: str) -> str | None:
    """Why a further column cannot be kept."""
    return "has no place in musubi-tuner's caches"


def contract_problem(contract: Mapping[str, Any]) -> str | None:
    """Why latents of a contract cannot be made musubi-tuner's, None if they can."""
    video, text = contract["video"], contract["text"]
    if contract["family"] != "wan" or video["latent_channels"] != 16:
        return (
            f"they are {contract['family']} {contract['variant']}'s with {video['latent_channels']} channels, and "
            "these are caches for musubi-tuner's Wan 2.1 and 2.2 A14B, whose latents have 16"
        )
    if video["space"] != "raw":
        return f"latents are {video['space']}, they are to be normalised here"
    if text["padding"] != "trimmed":
        return f"text embeddings are {text['padding']}, musubi-tuner pads them itself"
    return None


def open_shard(
    store: Store,
    name: str,
    *,
    workload: str,
    samples_per_file: int,
    contract: Mapping[str, Any],
    options: Mapping[str, str],
    columns: Mapping[str, str],
) -> CachesWriter:
    """A writer of one unit; files are ``musubi_caches/NAME-NNNNN-SHA256.tar``."""
    return CachesWriter(store, name, contract, dtype=options["latent_dtype"], samples_per_file=samples_per_file)


class CachesWriter:
    """Writes samples into tars; nothing is visible before `close`."""

    def __init__(
        self, store: Store, name: str, contract: Mapping[str, Any], *, dtype: str, samples_per_file: int
    ) -> None:
        self._tars = UnitTars(store, folder=FOLDER, unit=name, samples_per_file=samples_per_file)
        self._contract, self._dtype = contract, dtype

    def write(self, sample: EncodedSample) -> None:
        """Add one sample."""
        tar = self._tars.tar_for(1)
        self._tars.wrote([self._write(sample, tar)])

    def close(self) -> list[WrittenFile]:
        """Publish the files."""
        return self._tars.publish()

    def __enter__(self) -> CachesWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._tars.__exit__(*error)

    def _write(self, sample: EncodedSample, tar: UnitTar) -> WrittenRow:
        latents, text = make_latents(sample, self._contract, dtype=self._dtype), make_text(sample, dtype=self._dtype)
        described = canonical.to_json(
            {"keys": [sample.key], "ids": [sample.id], "captions": [sample.caption], "bucket": sample.bucket}
        )
        places = _append(tar, latents_name(sample), *_save(latents, latents_metadata(sample)))
        places |= _append(tar, text_name(sample), *_save(text, text_metadata(sample)))
        said = TextLocation(
            offset=tar.append(f"{item_of(sample.key)}_wan.json", (described,)), size=len(described), form="json"
        )
        tensors = {streamprep_name(name): place for name, place in places.items()}
        if "first_frame_latent" in tensors:
            tensors["first_frame_latent"] = _without_mask(tensors["first_frame_latent"])
        return WrittenRow(
            key=sample.key,
            bucket=sample.bucket,
            row_group=len(tar.rows),
            tensors=tensors,
            texts={"id": said, "caption": said},
        )


def _append(tar: UnitTar, name: str, data: bytes, places: Mapping[str, TensorLocation]) -> dict[str, TensorLocation]:
    """Add a member; its tensors' places in the file, of those in the member."""
    begin = tar.append(name, (data,))
    return {
        tensor: TensorLocation(offset=begin + one.offset, size=one.size, dtype=one.dtype, shape=one.shape)
        for tensor, one in places.items()
    }


def read_file(store: Store, name: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The rows of a file as safetensors reads it: (id, tensors by the names in a job)."""
    tensors: dict[str, Tensor] = {}
    for member, data in read_members(store, name):
        if member.endswith(".json"):
            yield json.loads(data)["ids"][0], tensors
            tensors = {}
        else:
            tensors |= {streamprep_name(key): tensor for key, tensor in safetensors.torch.load(data).items()}
            if "first_frame_latent" in tensors:
                tensors["first_frame_latent"] = tensors["first_frame_latent"][-16:]


# --- musubi-tuner's caches: their names, and what is in them


def item_of(key: str) -> str:
    """A sample's name in a folder without folders: one for each key, shortened where a tar's header needs it."""
    flat = key.replace("/", "%2F")  # a key has no other %2F: its own percent signs are %25
    return flat if len(flat) <= _LONGEST_ITEM else short_key(flat)


def latents_name(sample: EncodedSample) -> str:
    """``ITEM_FIRST-COUNT_WIDTHxHEIGHT_wan.safetensors``: musubi-tuner makes its buckets of these numbers."""
    assert sample.clip is not None
    size = f"{sample.clip.width:04d}x{sample.clip.height:04d}"
    return f"{item_of(sample.key)}_00000-{sample.clip.num_frames:03d}_{size}_wan.safetensors"


def text_name(sample: EncodedSample) -> str:
    """``ITEM_wan_te.safetensors``."""
    return f"{item_of(sample.key)}_wan_te.safetensors"


def make_latents(sample: EncodedSample, contract: Mapping[str, Any], *, dtype: str) -> dict[str, Tensor]:
    """What ``save_latent_cache_wan`` writes, by its names: ``latents_FxHxW_DTYPE`` (C, F, H, W), normalised.

    For image-to-video also ``latents_image_...`` (4 + C, F, H, W), a mask and the first frame's latent, and, where the
    model takes them, the image's features ``clip_DTYPE`` (L, D).
    """
    video = contract["video"]
    mean, std = (torch.tensor(video[name])[:, None, None, None] for name in ("latents_mean", "latents_std"))
    latents_CFHW = (sample.tensors["vae_latent"].float() - mean) / std
    size = "x".join(map(str, latents_CFHW.shape[1:]))
    tensors = {f"latents_{size}_{dtype}": latents_CFHW}
    if "first_frame_latent" in sample.tensors:
        mask_MFHW = torch.zeros(MASK_CHANNELS, *latents_CFHW.shape[1:])
        mask_MFHW[:, 0] = 1
        image_CFHW = torch.cat((mask_MFHW, sample.tensors["first_frame_latent"].float()))
        tensors[f"latents_image_{size}_{dtype}"] = image_CFHW
    if "clip_feature" in sample.tensors:
        tensors[f"clip_{dtype}"] = sample.tensors["clip_feature"]
    return {name: cast(tensor, dtype) for name, tensor in tensors.items()}


def make_text(sample: EncodedSample, *, dtype: str) -> dict[str, Tensor]:
    """What ``save_text_encoder_output_cache_wan`` writes: ``varlen_t5_DTYPE`` (L, D), the caption's tokens alone."""
    return {f"varlen_t5_{dtype}": cast(sample.tensors["text_embedding"], dtype)}


def latents_metadata(sample: EncodedSample) -> dict[str, str]:
    """Of the file with latents."""
    assert sample.clip is not None
    return {
        "architecture": "wan",
        "format_version": "1.0.1",
        "width": str(sample.clip.width),
        "height": str(sample.clip.height),
        "frame_count": str(sample.clip.num_frames),
    }


def text_metadata(sample: EncodedSample) -> dict[str, str]:
    """Of the file with the text embedding."""
    return {"architecture": "wan", "format_version": "1.0.1", "caption1": sample.caption}


def streamprep_name(name: str) -> str:
    """What a tensor of a cache is called in a job."""
    content, _, _ = name.removeprefix("varlen_").rpartition("_")  # without its dtype
    if content.startswith("latents_"):
        content, _, _ = content.rpartition("_")  # without its size
    return {
        "latents": NORMALISED,
        "latents_image": "first_frame_latent",
        "clip": "clip_feature",
        "t5": "text_embedding",
    }[content]


def _without_mask(place: TensorLocation) -> TensorLocation:
    """Where the latent lies that follows the mask."""
    channels, *rest = place.shape
    mask_bytes = place.size // channels * MASK_CHANNELS
    return TensorLocation(
        offset=place.offset + mask_bytes,
        size=place.size - mask_bytes,
        dtype=place.dtype,
        shape=(channels - MASK_CHANNELS, *rest),
    )


def _save(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, TensorLocation]]:
    """A safetensors file, and where in it the tensors lie; the library's own may order metadata anew in each run."""
    head: dict[str, Any] = {"__metadata__": dict(metadata)}
    values, end = [], 0
    for name, tensor in tensors.items():
        values.append(tensor_bytes(tensor).tobytes())
        begin, end = end, end + len(values[-1])
        head[name] = {
            "dtype": _CODES[dtype_name(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = canonical.to_json(head)
    text += b" " * (-len(text) % 8)
    places = {
        name: TensorLocation(
            offset=8 + len(text) + head[name]["data_offsets"][0],
            size=tensor.nbytes,
            dtype=dtype_name(tensor.dtype),
            shape=tuple(tensor.shape),
        )
        for name, tensor in tensors.items()
    }
    return len(text).to_bytes(8, "little") + text + b"".join(values), places


# --- out of a finished job


def lay_out(out: str, cache_dir: Path) -> int:
    """Write the caches of a finished job into a folder, which appears when all of them are in it.

    Args:
        out: The job's output, a folder or a URL.
        cache_dir: ``cache_directory`` in musubi-tuner's dataset config.

    Returns:
        How many items there are.

    Raises:
        UserError: if the job is not finished, not of this exporter, or the folder is there already.
        OSError: if a file is damaged, or this machine has no room.
    """
    store = open_store(out)
    current = open_finished(store)
    if current.plan.data_folder != FOLDER:
        raise UserError(f"{out} was written by the exporter {current.plan.config['exporter']}, not by this one")
    if cache_dir.exists():
        raise UserError(f"{cache_dir} is there already: remove it, or name another folder")
    partial = cache_dir.with_name(f".{cache_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    number = 0
    for record in current.records():
        number += record.num_rows
        for file in record.files:
            for member, data in checked_members(store, file):
                (partial / member).write_bytes(data)
    partial.rename(cache_dir)
    return number


def main() -> int:
    """The command ``streamprep-musubi``."""
    parser = argparse.ArgumentParser(
        description="Lay out a finished job of the exporter musubi as musubi-tuner's cache_directory.",
        epilog="example: streamprep-musubi s3://bucket/out cache",
    )
    parser.add_argument("out", metavar="OUT", help="the output of `streamprep encode --exporter musubi`")
    parser.add_argument("cache_dir", type=Path, metavar="CACHE_DIR", help="musubi-tuner's cache_directory")
    args = parser.parse_args()
    try:
        number = lay_out(args.out, args.cache_dir)
    except (UserError, OSError) as error:
        print(f"streamprep-musubi: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    print(f"{number} items in {args.cache_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
