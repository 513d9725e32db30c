"""An exporter that can hold a posterior's variance: every tensor as float32, in files of bytes one after the other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamprep.storage import Store
from streamprep.types import EncodedSample, TensorLocation, WrittenFile, WrittenRow
from streamprep.unit_files import UnitFiles

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
    return MomentsWriter(store, name, samples_per_file)


class MomentsWriter:
    """A line of JSON (ids, names, shapes), then the tensors one after the other."""

    def __init__(self, store: Store, name: str, samples_per_file: int) -> None:
        self._files = UnitFiles(store, folder=FOLDER, unit=name, extension="bin")
        self._samples_per_file = samples_per_file
        self._samples: list[EncodedSample] = []

    def write(self, sample: EncodedSample) -> None:
        self._samples.append(sample)
        if len(self._samples) == self._samples_per_file:
            self._finish_file()

    def close(self) -> list[WrittenFile]:
        if self._samples:
            self._finish_file()
        return self._files.publish()

    def __enter__(self) -> MomentsWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.__exit__(*error)

    def _finish_file(self) -> None:
        samples, self._samples = self._samples, []
        head = [[s.id, {n: list(t.shape) for n, t in s.tensors.items()}] for s in samples]
        data = bytearray(json.dumps(head).encode() + b"\n")
        rows = []
        for number, sample in enumerate(samples):
            locations = {}
            for name, tensor in sample.tensors.items():
                values = tensor.float().numpy().tobytes()
                locations[name] = TensorLocation(
                    offset=len(data), size=len(values), dtype="float32", shape=tuple(tensor.shape)
                )
                data += values
            rows.append(WrittenRow(key=sample.key, bucket=sample.bucket, row_group=number, tensors=locations))
        file = self._files.new()
        file.path.write_bytes(data)
        self._files.finish(file, rows)


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
