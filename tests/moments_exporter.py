"""An exporter that can hold a posterior's variance: every tensor as float32 in one file a unit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamprep.storage import Store
from streamprep.types import EncodedSample, TensorLocation, WrittenFile, WrittenRow

FOLDER = "moments"
WORKLOADS = ("t2v", "i2v")
POSTERIORS = ("mean", "moments")
OPTIONS = {"latent_dtype": ("float32",)}


def column_problem(name: str, *, workload: str) -> str | None:
    """It keeps no further columns."""
    return "cannot be kept"


def open_shard(
    store: Store,
    name: str,
    *,
    workload: str,
    samples_per_file: int,
    contract: Mapping[str, Any],
    options: Mapping[str, str],
    columns: Mapping[str, str],
) -> MomentsWriter:
    """A writer of one unit."""
    return MomentsWriter(store, name)


class MomentsWriter:
    """A line of JSON (ids, names, shapes), then the tensors one after the other."""

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name = store, name
        self._samples: list[EncodedSample] = []

    def write(self, sample: EncodedSample) -> None:
        self._samples.append(sample)

    def close(self) -> list[WrittenFile]:
        head = [[s.id, {n: list(t.shape) for n, t in s.tensors.items()}] for s in self._samples]
        data = bytearray(json.dumps(head).encode() + b"\n")
        rows = []
        for number, sample in enumerate(self._samples):
            locations = {}
            for name, tensor in sample.tensors.items():
                locations[name] = TensorLocation(
                    offset=len(data), size=tensor.nbytes, dtype="float32", shape=tuple(tensor.shape)
                )
                data += tensor.numpy().tobytes()
            rows.append(WrittenRow(key=sample.key, bucket=sample.bucket, row_group=number, tensors=locations))
        sha256 = hashlib.sha256(data).hexdigest()
        name = f"{FOLDER}/{self._name}-00000-{sha256[:8]}.bin"
        with ExitStack() as stack:
            file = stack.enter_context(self._store.new_file())
            file.path.write_bytes(data)
            file.publish(name, step="data")
        return [WrittenFile(name=name, size_bytes=len(data), sha256=sha256, rows=tuple(rows))]

    def __enter__(self) -> MomentsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing was opened."""


def read_file(store: Store, name: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The samples of a file: (id, tensors by name)."""
    head, _, data = store.read(name).partition(b"\n")
    offset = 0
    for id, shapes in json.loads(head):
        tensors = {}
        for tensor, shape in shapes.items():
            count = int(np.prod(shape))
            values = np.frombuffer(data, np.float32, count, offset).reshape(shape)
            tensors[tensor] = torch.from_numpy(values.copy())
            offset += 4 * count
        yield id, tensors
