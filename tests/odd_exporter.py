"""FastVideo's exporter, in which units do odd things if the environment says so: ``ODD_UNITS="000001=raise"``.

At their first row they ``raise``, die by ``segv`` or ``kill``, run ``out_of_memory``, or ``sleep:SECONDS``.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch

from exporters.fastvideo import (  # noqa: F401
    FOLDER,
    OPTIONS,
    POSTERIORS,
    WORKLOADS,
    FastVideoWriter,
    column_problem,
    read_file,
)
from exporters.fastvideo import open_shard as open_fastvideo_shard
from streamprep.storage import Store
from streamprep.types import EncodedSample, WrittenFile

VARIABLE = "ODD_UNITS"


def open_shard(store: Store, name: str, **options: Any) -> OddWriter:
    units = dict(unit.split("=") for unit in os.environ.get(VARIABLE, "").split(",") if unit)
    return OddWriter(open_fastvideo_shard(store, name, **options), units.get(name, ""))


class OddWriter:
    def __init__(self, writer: FastVideoWriter, deed: str) -> None:
        self._writer, self._deed = writer, deed

    def write(self, sample: EncodedSample) -> None:
        deed, self._deed = self._deed, ""
        if deed == "raise":
            raise ArithmeticError(f"{sample.key} cannot be written")
        if deed == "out_of_memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if deed in ("segv", "kill"):
            os.kill(os.getpid(), {"segv": signal.SIGSEGV, "kill": signal.SIGKILL}[deed])
        if deed.startswith("sleep:"):
            print("it sleeps", file=sys.stderr, flush=True)
            time.sleep(float(deed.removeprefix("sleep:")))
        self._writer.write(sample)

    def close(self) -> list[WrittenFile]:
        return self._writer.close()

    def __enter__(self) -> OddWriter:
        self._writer.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._writer.__exit__(*error)
