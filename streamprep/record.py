"""A record: what became of one unit. Creating it is the commit; what no record names does not exist."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from streamprep import canonical
from streamprep.plan import Excluded
from streamprep.types import TensorLocation, TextLocation, WrittenFile, WrittenRow

FORMAT = "streamprep-record/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class BadClip:
    """One line of a quarantine file."""

    key: str
    stage: str
    reason: str
    exception: str


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarantineFile:
    """The bad samples of a unit, as zstandard-compressed JSON lines."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What became of one unit: the commit."""

    unit: str
    files: tuple[WrittenFile, ...]
    bad: Mapping[str, int]
    """How many for each reason."""
    dropped: tuple[Excluded, ...]
    """By the plan, and after decoding."""
    quarantine: QuarantineFile | None
    seconds: Mapping[str, float]
    """Time per stage."""
    retried: Mapping[str, int] = field(default_factory=dict)
    """In a retry: how many of its samples were bad for each reason, and no longer count for it."""
    decoders: Mapping[str, int] = field(default_factory=dict)
    """How many clips each decoder gave; ``sequential`` where torchcodec misread a video."""
    halved: Mapping[str, int] = field(default_factory=dict)
    """How many were encoded at once where the memory did not hold a whole batch, by bucket: ``TxHxW``, or ``text`` for
    captions."""

    @property
    def num_rows(self) -> int:
        """In all files."""
        return sum(len(file.rows) for file in self.files)

    @property
    def dropped_rows(self) -> list[Excluded]:
        """Rows that were planned and then dropped for their frames."""
        return [item for item in self.dropped if item.stage != "plan"]

    @property
    def num_bad(self) -> int:
        """For any reason."""
        return sum(self.bad.values())

    def to_json(self) -> bytes:
        """The content of ``records/UNIT.json``.

        A row is written ``[key, bucket, row group, {tensor: location}]``, and ``{text: location}`` after that where its
        exporter says it.
        """
        value = {
            "format": FORMAT,
            "unit": self.unit,
            "num_rows": self.num_rows,
            "files": [
                {
                    "name": file.name,
                    "size_bytes": file.size_bytes,
                    "sha256": file.sha256,
                    "rows": [_row_to_json(row) for row in file.rows],
                }
                for file in self.files
            ],
            "bad": dict(self.bad),
            "retried": dict(self.retried),
            "decoders": dict(self.decoders),
            "halved": dict(self.halved),
            "dropped": [[item.key, item.reason, item.message, item.stage] for item in self.dropped],
            "quarantine": dataclasses.asdict(self.quarantine) if self.quarantine else None,
            "seconds": {name: round(seconds, 3) for name, seconds in self.seconds.items()},
        }
        return canonical.to_json(value) + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> Record:
        """The reverse of `to_json`; `ValueError`, `KeyError`, `TypeError` or `AttributeError` if it is not one."""
        value = canonical.from_json(data)
        if value.get("format") != FORMAT:
            raise ValueError(f"not a record of format {FORMAT}")
        return cls(
            unit=_text(value["unit"]),
            files=tuple(
                WrittenFile(
                    name=_text(file["name"]),
                    size_bytes=_count(file["size_bytes"]),
                    sha256=_text(file["sha256"]),
                    rows=tuple(_row_from_json(row) for row in file["rows"]),
                )
                for file in value["files"]
            ),
            bad=_counts(value["bad"]),
            dropped=tuple(
                Excluded(key=_text(key), reason=_text(reason), message=_text(message), stage=_text(stage))
                for key, reason, message, stage in value["dropped"]
            ),
            quarantine=QuarantineFile(**value["quarantine"]) if value["quarantine"] else None,
            seconds=dict(value["seconds"]),
            retried=_counts(value["retried"]),
            decoders=_counts(value["decoders"]),
            halved=_counts(value["halved"]),
        )


def named_files(record: Record) -> set[str]:
    """Everything a record vouches for."""
    quarantine = {record.quarantine.name} if record.quarantine else set()
    return {file.name for file in record.files} | quarantine


def _row_to_json(row: WrittenRow) -> list[Any]:
    tensors = {name: _location_to_json(location) for name, location in row.tensors.items()}
    texts = {name: [location.offset, location.size, location.form] for name, location in row.texts.items()}
    return [row.key, row.bucket, row.row_group, tensors, *([texts] if texts else [])]


def _location_to_json(location: TensorLocation) -> list[Any]:
    """``[offset, size, dtype, shape]``, and the codec where it is not raw."""
    codec = [location.codec] if location.codec != "raw" else []
    return [location.offset, location.size, location.dtype, list(location.shape), *codec]


def _row_from_json(value: Sequence[Any]) -> WrittenRow:
    key, bucket, row_group, tensors, *more = value
    return WrittenRow(
        key=_text(key),
        bucket=_text(bucket),
        row_group=_count(row_group),
        tensors={name: _location_from_json(*location) for name, location in tensors.items()},
        texts={
            _text(name): TextLocation(offset=_count(offset), size=_count(size), form=_text(form))
            for texts in more
            for name, (offset, size, form) in texts.items()
        },
    )


def _location_from_json(offset: int, size: int, dtype: str, shape: Sequence[int], codec: str = "raw") -> TensorLocation:
    return TensorLocation(
        offset=_count(offset),
        size=_count(size),
        dtype=_text(dtype),
        shape=tuple(map(_count, shape)),
        codec=_text(codec),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.100} stands where a text should")
    return value


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise TypeError(f"{value!r:.100} stands where a number should")
    return value


def _counts(value: Mapping[str, Any]) -> dict[str, int]:
    return {name: _count(number) for name, number in value.items()}
