"""Writing samples by an exporter; for tests of exporters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamprep.exporting import open_exporter, settle_options
from streamprep.storage import Store
from streamprep.testing.samples import make_sample
from streamprep.types import EncodedSample, ShardWriter, WrittenFile

__all__ = ["CONTRACT", "UNIT", "make_sample", "open_shard", "write"]

CONTRACT = {"family": "wan", "latents_mean": [0.5, -0.25], "model": "Zo\u00eb/\u4f60\u597d"}
UNIT = "000007"


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
