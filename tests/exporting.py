"""Encoded samples, and writing some by an exporter; for tests of exporters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from streamprep.exporting import open_exporter, settle_options
from streamprep.storage import Store
from streamprep.types import EncodedClip, EncodedSample, ShardWriter, WrittenFile

CONTRACT = {"family": "wan", "latents_mean": [0.5, -0.25], "model": "Zo\u00eb/\u4f60\u597d"}
UNIT = "000007"


def make_sample(number: int = 0, *, tensors: Mapping[str, Tensor] | None = None, **fields: Any) -> EncodedSample:
    """A row of a clip of 17 frames, another one for every number."""
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


def open_shard(
    exporter: str,
    store: Store,
    *,
    samples_per_file: int = 64,
    workload: str = "t2v",
    columns: Mapping[str, str] | None = None,
    **options: str,
) -> ShardWriter:
    """A writer of one unit, with the exporter's defaults but for ``options``."""
    module = open_exporter(exporter)
    writer: ShardWriter = module.open_shard(
        store,
        UNIT,
        workload=workload,
        samples_per_file=samples_per_file,
        contract=CONTRACT,
        options=settle_options(module, exporter, options),
        columns=columns or {},
    )
    return writer


def write(exporter: str, store: Store, *samples: EncodedSample, **how: Any) -> list[WrittenFile]:
    """Write all of a unit."""
    with open_shard(exporter, store, **how) as writer:
        for sample in samples:
            writer.write(sample)
        return writer.close()
