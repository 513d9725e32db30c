"""FastVideo's own Parquet as `streamprep convert` takes it: like a finished output, a unit for each file.

What is declared padded becomes trimmed: zeros after a caption say nothing. Rows whose values cannot be used are bad,
and come out as such beside the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamprep.errors import UserError
from streamprep.foreign import checks
from streamprep.foreign.columns import SMALL
from streamprep.foreign.declared import DeclaredContract
from streamprep.foreign.parquet import LATENT, GroupColumns, UnreadableGroup, WrongSize, read_group
from streamprep.foreign.survey import Survey, pixels_of, rate_of, survey
from streamprep.job_plan import JobPlan, Round, Unit, installed_versions, keys_digest
from streamprep.plan import Excluded
from streamprep.record import BadClip, Record
from streamprep.row_index import TEXT
from streamprep.settings import EncodeSettings
from streamprep.storage import Store
from streamprep.types import EncodedClip, EncodedSample, WrittenFile, WrittenRow

NAME = "FastVideo's own Parquet"


@dataclass(frozen=True, kw_only=True)
class ForeignOrigin:
    """Surveyed and checked."""

    store: Store
    plan: JobPlan
    records: Mapping[str, Record]
    """By unit; of the files as they are."""
    found: Survey
    lines: tuple[str, ...]
    """What is left out or odd."""
    train_fps: float

    dtypes = ("float32",)

    @property
    def digests(self) -> Mapping[str, str]:
        """Of what is converted."""
        return {"files_sha256": self.found.sha256}

    def rounds(self) -> list[Round]:
        """There are no retries."""
        return []

    def read(self, record: Record, scratch: Store) -> Iterator[EncodedSample | BadClip]:
        """A unit's rows, and those that cannot be used; the memory holds one row group.

        Args:
            record: Of the unit.
            scratch: Makes no difference.

        Raises:
            UserError: if embeddings that are declared trimmed are padded.
            DamagedFile: if a file was changed.
        """
        for file in record.files:
            number = next(n for n, one in enumerate(self.found.files) if one.path == file.name)
            mine = np.flatnonzero(self.found.file == number)
            rows = zip(mine.tolist(), file.rows, strict=True)
            for group, of_group in itertools.groupby(rows, key=lambda one: one[1].row_group):
                names = [*self.found.shapes, *SMALL]
                try:
                    columns = read_group(
                        self.store, file.name, group, names, size_bytes=file.size_bytes, footer_sha256=file.sha256
                    )
                except UnreadableGroup as error:
                    for _, written in of_group:
                        yield BadClip(key=written.key, stage="read", reason="read_error", exception=str(error))
                    continue
                for row, written in of_group:
                    yield self._read_row(columns, row, written, f"{self.store.url}/{file.name} ({written.key})")
                del columns  # before there is another

    def _read_row(self, columns: GroupColumns, row: int, written: WrittenRow, where: str) -> EncodedSample | BadClip:
        position = int(self.found.groups.position[row])
        tensors: dict[str, Tensor] = {}
        for name, shapes in self.found.shapes.items():
            shape = shapes[row].tolist()
            try:
                data = columns.blob(name, position, size=4 * int(np.prod(shape)))
            except WrongSize as error:
                return BadClip(key=written.key, stage="read", reason="read_error", exception=str(error))
            values = checks.values_of(data, shape)
            if not np.isfinite(values).all():
                message = f"{where}, column {name}_bytes: NaN or infinity"
                return BadClip(key=written.key, stage="read", reason="non_finite", exception=message)
            if name == TEXT:
                checks.check_trimmed(values, self.found.contract, where)
                if self.found.contract["text"]["padding"] == "padded":
                    values = values[: checks.padded_length(values)]
            tensors[name] = torch.from_numpy(values.copy())
        id = columns.text("id", position) or written.key
        return EncodedSample(
            key=written.key,
            id=id,
            tensors=tensors,
            file_name=columns.text("file_name", position) or id,
            caption=columns.text("caption", position),
            clip=self._clip(columns, row, position) if LATENT in tensors else None,
        )

    def _clip(self, columns: GroupColumns, row: int, position: int) -> EncodedClip:
        """As the latent's shape has it, which no column contradicts that could be believed."""
        num_frames, height, width = pixels_of(self.found.contract["video"], self.found.shapes[LATENT][row].tolist())
        return EncodedClip(
            width=width,
            height=height,
            num_frames=num_frames,
            train_fps=self.train_fps,
            source_fps=rate_of(columns.value("fps", position)) or 0.0,
            media_type=columns.text("media_type", position) or "video",
        )


def open_origin(store: Store, declared: DeclaredContract) -> ForeignOrigin:
    """Look at all rows, and the values of some.

    Raises:
        UserError: if they are not what is declared, or too little is.
    """
    contract: dict[str, Any] = dict(declared.contract)
    if contract["video"] is not None and declared.train_fps is None:
        raise UserError(
            "--contract: it must say train_fps, the rate that frames were sampled at (FastVideo's --train-fps): no "
            "column of its files does"
        )
    found = survey(store, contract)
    sampled = checks.check_values(found, store)
    units, records = [], {}
    for number in range(len(found.files)):
        unit, record = _unit(found, number)
        units.append(unit)
        records[unit.id] = record
    lines = [*found.describe(), *sampled.doubts]
    if found.unused:
        lines.append(f"columns that are not converted: {', '.join(found.unused)}")
    if contract["text"]["padding"] == "padded":
        contract = {**contract, "text": {**contract["text"], "padding": "trimmed"}}
        lines.append("text embeddings: the zeros after captions are left out")
    return ForeignOrigin(
        store=store,
        plan=_plan(found, contract, units, declared.train_fps),
        records=records,
        found=found,
        lines=tuple(lines),
        train_fps=declared.train_fps or 0.0,
    )


def _unit(found: Survey, number: int) -> tuple[Unit, Record]:
    file, id = found.files[number], f"{number:06d}"
    mine = np.flatnonzero(found.file == number)
    keys, buckets = found.keys_of(mine), found.buckets_of(mine)
    groups = found.groups.group[mine].tolist()
    rows = tuple(
        WrittenRow(key=key, bucket=bucket, row_group=group, tensors={})
        for key, bucket, group in zip(keys, buckets, groups, strict=True)
    )
    dropped = tuple(
        Excluded(key=row.key, reason=row.reason, message=f"row {row.row} of {row.file}: {row.message}")
        for row in found.dropped
        if row.file == file.path
    )
    written = WrittenFile(name=file.path, size_bytes=file.size_bytes, sha256=file.footer_sha256, rows=rows)
    unit = Unit(
        id=id,
        shard=file.path,
        index_sha256=file.footer_sha256,
        num_clips=len(rows),
        num_dropped=len(dropped),
        num_bad=0,
        size_bytes=sum(4 * int(shape[mine].prod(axis=1).sum()) for name, shape in found.shapes.items() if name != TEXT),
        limit=None,
        num_rows=len(rows),
        rows_sha256=keys_digest(keys),
    )
    record = Record(unit=id, files=(written,), bad={}, dropped=dropped, quarantine=None, seconds={})
    return unit, record


def _plan(found: Survey, contract: Mapping[str, Any], units: list[Unit], train_fps: float | None) -> JobPlan:
    """Without an embedding of the empty caption, which its files do not hold."""
    workload = contract["workload"]
    return JobPlan(
        shards=found.url,
        fingerprint={
            "model": {"family": contract["family"], "variant": contract["variant"]},
            "video": contract["video"] or {},
            "declared": {"workload": workload, "text": contract["text"], "image": contract["image"], "fps": train_fps},
            "inputs": {"num_files": len(found.files), "files_sha256": found.sha256},
        },
        config={
            "workload_type": workload,
            "exporter": NAME,
            "samples_per_file": EncodeSettings.samples_per_file,
            "keep_columns": None,
            "posterior": "mean",
            "train_fps": train_fps,
        },
        contract=contract,
        data_folder="",
        units=tuple(sorted(units, key=lambda unit: (-unit.num_clips, unit.id))),
        versions=installed_versions(),
    )
