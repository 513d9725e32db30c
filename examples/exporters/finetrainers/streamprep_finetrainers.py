"""The items that finetrainers precomputes for Wan's text-to-video, as an exporter of streamprep.

finetrainers reads ``condition-N.pt`` and ``latent-N.pt``, with N from 0 on and none left out. While a job runs nobody
knows the N of a sample, and a file that is called so could not be told from another with other bytes. So:

1. `open_shard` gives a writer of tars, named by their content as all files of a job: for each sample
   ``KEY.condition.pt`` and ``KEY.latent.pt``, finetrainers' own items, and ``KEY.json``, which says whose they are.
2. `lay_out` takes them out of a finished job, and numbers them.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamprep import canonical
from streamprep.errors import UserError
from streamprep.finalize import open_finished
from streamprep.storage import Store, open_store
from streamprep.types import EncodedSample, TensorLocation, TextLocation, WrittenFile, WrittenRow
from streamprep.unit_tars import UnitTar, UnitTars, checked_members, read_members

FOLDER = "finetrainers_items"
WORKLOADS = ("t2v",)
POSTERIORS = ("moments",)
OPTIONS = {"latent_dtype": ("bfloat16", "float32")}
"""What can be chosen, the default first."""
DATA_FOLDER = "finetrainers-precomputed-data"
"""Where finetrainers looks, below its ``--precomputation_dir``."""


# --- what streamprep asks of an exporter


def column_problem(name: str, *, workload: str) -> str | None:
    """Why a further column cannot be kept."""
    return "has no place in finetrainers' items"


def contract_problem(contract: Mapping[str, Any]) -> str | None:
    """Why finetrainers would misread latents of a contract, None if it would not.

    It splits what is stored into mean and log variance, normalises both, and takes every token for a word.
    """
    video, text = contract["video"], contract["text"]
    if contract["family"] != "wan":
        return f"they are {contract['family']}'s, and these are items of finetrainers' Wan"
    if video["space"] != "raw":
        return f"latents are {video['space']}, finetrainers normalises them itself"
    if text["padding"] != "trimmed":
        return f"text embeddings are {text['padding']}, they are to be padded with zeros here"
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
) -> ItemsWriter:
    """A writer of one unit; files are ``finetrainers_items/NAME-NNNNN-SHA256.tar``."""
    return ItemsWriter(store, name, contract, dtype=options["latent_dtype"], samples_per_file=samples_per_file)


class ItemsWriter:
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

    def __enter__(self) -> ItemsWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._tars.__exit__(*error)

    def _write(self, sample: EncodedSample, tar: UnitTar) -> WrittenRow:
        described = canonical.to_json(
            {
                "keys": [sample.key],
                "ids": [sample.id],
                "captions": [sample.caption],
                "bucket": sample.bucket,
                "num_tokens": len(sample.tensors["text_embedding"]),
            }
        )
        condition, text_at = _save(make_condition(sample, self._contract, dtype=self._dtype))
        latent, mean_at = _save(make_latent(sample, self._contract, dtype=self._dtype))
        text_at += tar.append(f"{sample.key}.condition.pt", (condition,))
        mean_at += tar.append(f"{sample.key}.latent.pt", (latent,))
        said = TextLocation(offset=tar.append(f"{sample.key}.json", (described,)), size=len(described), form="json")
        text, mean = self._place(sample, "text_embedding", text_at), self._place(sample, "vae_latent", mean_at)
        logvar = self._place(sample, "vae_logvar", mean_at + mean.size)  # the second half of one tensor
        return WrittenRow(
            key=sample.key,
            bucket=sample.bucket,
            row_group=len(tar.rows),
            tensors={"text_embedding": text, "vae_latent": mean, "vae_logvar": logvar},
            texts={"id": said, "caption": said},
        )

    def _place(self, sample: EncodedSample, name: str, offset: int) -> TensorLocation:
        tensor = sample.tensors[name]
        size = tensor.numel() * getattr(torch, self._dtype).itemsize
        return TensorLocation(offset=offset, size=size, dtype=self._dtype, shape=tuple(tensor.shape))


def read_file(store: Store, name: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The rows of a file as torch reads it: (id, tensors by streamprep's names)."""
    for condition, latent, described in _samples(read_members(store, name)):
        row = json.loads(described)
        text = _load(condition)["encoder_hidden_states"][0, : row["num_tokens"]]
        mean, logvar = _load(latent)["latents"][0].chunk(2)
        yield row["ids"][0], {"text_embedding": text, "vae_latent": mean, "vae_logvar": logvar}


# --- finetrainers' items


def make_condition(sample: EncodedSample, contract: Mapping[str, Any], *, dtype: str) -> dict[str, Tensor]:
    """What ``WanModelSpecification.prepare_conditions`` gives: (1, L, D), of one length for all samples.

    Zeros follow the caption's tokens, as in diffusers' pipeline. finetrainers itself encodes the padding.
    """
    text_LD = sample.tensors["text_embedding"]
    padded_1LD = torch.zeros(1, contract["text"]["max_length"], text_LD.shape[1], dtype=getattr(torch, dtype))
    padded_1LD[0, : len(text_LD)] = text_LD
    return {"encoder_hidden_states": padded_1LD}


def make_latent(sample: EncodedSample, contract: Mapping[str, Any], *, dtype: str) -> dict[str, Tensor]:
    """What ``WanModelSpecification.prepare_latents`` gives: mean and log variance (1, 2C, T, H, W), not normalised.

    ``latents_std`` is one by the standard deviation: finetrainers multiplies by it.
    """
    video = contract["video"]
    moments = torch.cat((sample.tensors["vae_latent"], sample.tensors["vae_logvar"]))
    return {
        "latents": moments.to(getattr(torch, dtype))[None],
        "latents_mean": torch.tensor(video["latents_mean"]),
        "latents_std": 1 / torch.tensor(video["latents_std"]),
    }


def _save(item: Mapping[str, Tensor]) -> tuple[bytes, int]:
    """An item as `torch.save` writes it, and where the values of its first tensor begin."""
    file = io.BytesIO()
    torch.save(dict(item), file)
    with zipfile.ZipFile(file) as archive:
        (entry,) = (info for info in archive.infolist() if info.filename.endswith("/data/0"))
    head = file.getbuffer()[entry.header_offset : entry.header_offset + 30]
    name_size, extra_size = (int.from_bytes(head[at : at + 2], "little") for at in (26, 28))
    return file.getvalue(), entry.header_offset + 30 + name_size + extra_size


def _load(item: bytes) -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = torch.load(io.BytesIO(item), weights_only=True)
    return loaded


def _samples(members: Iterable[tuple[str, bytes]]) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Condition, latent and description of each sample."""
    contents = (content for _, content in members)
    return zip(contents, contents, contents, strict=True)


# --- out of a finished job


def lay_out(out: str, precomputation_dir: Path) -> int:
    """Write the items of a finished job where finetrainers looks for them; all of them appear at once.

    Args:
        out: The job's output, a folder or a URL.
        precomputation_dir: As in finetrainers' command line.

    Returns:
        How many samples there are.

    Raises:
        UserError: if the job is not finished, not of this exporter, or there are such items already.
        OSError: if a file is damaged, or this machine has no room.
    """
    store, target = open_store(out), precomputation_dir / DATA_FOLDER
    current = open_finished(store)
    if current.plan.data_folder != FOLDER:
        raise UserError(f"{out} was written by the exporter {current.plan.config['exporter']}, not by this one")
    if target.exists():
        raise UserError(f"{target} is there already: remove it, or name another folder")
    partial = precomputation_dir / f".{DATA_FOLDER}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    number = 0
    for record in current.records():
        for file in record.files:
            for condition, latent, _ in _samples(checked_members(store, file)):
                (partial / f"condition-{number}.pt").write_bytes(condition)
                (partial / f"latent-{number}.pt").write_bytes(latent)
                number += 1
    partial.rename(target)
    return number


def main() -> int:
    """The command ``streamprep-finetrainers``."""
    parser = argparse.ArgumentParser(
        description="Lay out a finished job of the exporter finetrainers as finetrainers' precomputed data.",
        epilog="example: streamprep-finetrainers s3://bucket/out precomputed",
    )
    parser.add_argument("out", metavar="OUT", help="the output of `streamprep encode --exporter finetrainers`")
    parser.add_argument("precomputation_dir", type=Path, metavar="DIR", help="finetrainers' --precomputation_dir")
    args = parser.parse_args()
    try:
        number = lay_out(args.out, args.precomputation_dir)
    except (UserError, OSError) as error:
        print(f"streamprep-finetrainers: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    print(f"{number} samples in {args.precomputation_dir / DATA_FOLDER}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
