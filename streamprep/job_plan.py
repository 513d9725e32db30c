"""What a job is, and never changes: ``plan.json``, its units, and the retries that are planned later."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from streamprep import canonical

FOLDER = "_streamprep"
"""In an output: all that is not data."""
PLAN_FORMAT = "streamprep-plan/1"
RETRY_FORMAT = "streamprep-retry/1"

Fingerprint = Mapping[str, Mapping[str, Any]]
"""Everything that decides the output's bytes, by part: model, video, text, image, sampling, export, inputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One shard to encode."""

    id: str
    shard: str
    index_sha256: str
    num_clips: int
    """Or captions' samples, where only captions are encoded."""
    num_dropped: int
    num_bad: int
    """Known to be bad from their headers."""
    size_bytes: int
    """Of its rows without the text embeddings, whose lengths nobody knows yet."""
    limit: int | None
    """Take only so many clips of it; None takes all."""
    num_rows: int
    """A clip gives a row for each caption that was chosen for it."""
    rows_sha256: str
    """Of the keys of its rows: `keys_digest`."""
    keys: tuple[str, ...] | None = None
    """In a retry: of the rows that were bad, which are all of it."""
    retried: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """In a retry: what they were bad for."""

    @property
    def original(self) -> str:
        """The unit of the plan that this one is a retry of: ``000012`` of ``000012.r1``."""
        return self.id.partition(".")[0]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Unit:
        """The reverse of `dataclasses.asdict`, out of JSON."""
        keys = value.pop("keys", None)
        return cls(keys=None if keys is None else tuple(keys), **value)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPlan:
    """What a job is; never changes."""

    shards: str
    """Where the input is."""
    fingerprint: Fingerprint
    config: Mapping[str, Any]
    """The effective settings."""
    contract: Mapping[str, Any]
    """What the latents are."""
    data_folder: str
    """Where the exporter's files go."""
    units: tuple[Unit, ...]
    """Largest first: so the last one to finish is a small one."""
    versions: Mapping[str, str]
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Of the dataset's further columns, those that are kept, and their types: see `streamprep.columns`."""
    converted: Mapping[str, Any] | None = None
    """If `streamprep convert` made it: from where, and what that lost."""

    @property
    def command(self) -> str:
        """What goes on with it."""
        return "streamprep encode" if self.converted is None else "streamprep convert"

    @property
    def unconditional(self) -> str | None:
        """The file with the embeddings of the empty and the negative prompt, by all that decides them."""
        text = self.fingerprint.get("text")
        return None if text is None else f"{FOLDER}/uncond-{canonical.digest(text)[:8]}.safetensors"

    @property
    def num_clips(self) -> int:
        """Of all units."""
        return sum(unit.num_clips for unit in self.units)

    @property
    def num_rows(self) -> int:
        """Of all units, if no sample is bad."""
        return sum(unit.num_rows for unit in self.units)

    @property
    def size_bytes(self) -> int:
        """Of all units, without text embeddings."""
        return sum(unit.size_bytes for unit in self.units)

    def to_json(self) -> bytes:
        """The content of ``plan.json``."""
        value = {"format": PLAN_FORMAT, **dataclasses.asdict(self)}
        value["columns"] = list(self.columns.items())  # their order is that of the output's columns
        if self.converted is None:
            del value["converted"]
        return canonical.to_pretty_json(value)

    @classmethod
    def from_json(cls, data: bytes) -> JobPlan:
        """The reverse of `to_json`; an error of `NOT_AS_WRITTEN` if it is not one."""
        value = canonical.from_json(data)
        if value.pop("format", None) != PLAN_FORMAT:
            raise ValueError(f"not a plan of format {PLAN_FORMAT}")
        units = tuple(Unit.from_json(unit) for unit in value.pop("units"))
        return cls(units=units, columns=dict(value.pop("columns", ())), **value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One retry: bad samples that are tried again, by a plan derived from the job's; never changes."""

    number: int
    reasons: tuple[str, ...]
    """That were asked for; none for all."""
    units: tuple[Unit, ...]

    @property
    def name(self) -> str:
        """``r1``, as in the names of its units."""
        return f"r{self.number}"

    def to_json(self) -> bytes:
        """The content of ``retry/r1.json``."""
        return canonical.to_pretty_json({"format": RETRY_FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def from_json(cls, data: bytes) -> Round:
        """The reverse of `to_json`; an error of `NOT_AS_WRITTEN` if it is not one."""
        value = canonical.from_json(data)
        if value.get("format") != RETRY_FORMAT:
            raise ValueError(f"not a retry of format {RETRY_FORMAT}")
        units = tuple(Unit.from_json(unit) for unit in value["units"])
        return cls(number=int(value["number"]), reasons=tuple(value["reasons"]), units=units)


def keys_digest(keys: Iterable[str]) -> str:
    """Stands for a set of keys, in whatever order they come."""
    return canonical.digest(sorted(keys))


def installed_versions() -> dict[str, str]:
    """Of what decides the output's bytes beside the settings."""
    packages = ("streamprep", "torch", "torchcodec", "diffusers", "transformers", "pyarrow", "zstandard")
    versions = {"python": platform.python_version(), "machine": platform.machine()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
