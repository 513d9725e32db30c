"""Which shards exist: ``manifest.json``, written when all of them do."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from streamprep import canonical
from streamprep.errors import UserError
from streamprep.shards import ShardIndex, index_name
from streamprep.storage import Store

FORMAT = "streamprep-shards/1"
MANIFEST = "manifest.json"
PACK = "pack.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """One shard in the manifest."""

    name: str
    """Of the tar, relative to the manifest."""
    num_samples: int
    size_bytes: int
    index_sha256: str
    """Of the index beside it, in hex: stands for every byte of the tar, and every decision that is made from it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All shards of a dataset, sorted by name."""

    shards: tuple[ShardInfo, ...]

    @property
    def num_samples(self) -> int:
        """Of all shards."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def size_bytes(self) -> int:
        """Of all tars."""
        return sum(shard.size_bytes for shard in self.shards)

    def to_json(self) -> bytes:
        """The content of ``manifest.json``."""
        value: dict[str, Any] = {
            "format": FORMAT,
            "num_samples": self.num_samples,
            "size_bytes": self.size_bytes,
            "shards": [asdict(shard) for shard in self.shards],
        }
        return canonical.to_pretty_json(value)


def load_manifest(store: Store) -> Manifest:
    """The shards of a packed dataset.

    Raises:
        UserError: if there is no manifest, or it is none of ours.
    """
    try:
        data = store.read(MANIFEST)
    except FileNotFoundError:
        if store.exists(PACK):
            raise UserError(
                f"{store.url}: packing is not finished; run the same `streamprep pack` again (or `streamprep index`)"
            ) from None
        if any(entry.path.endswith(".tar") for entry in store.list()):
            raise UserError(
                f"{store.url} holds tars without an index (no {MANIFEST}): make it by `streamprep index {store.url}`, "
                "which reads them once and copies nothing"
            ) from None
        raise UserError(
            f"{store.url} holds no shards (no {MANIFEST}): make them by `streamprep pack DATASET SHARDS`"
        ) from None
    try:
        value = json.loads(data)
    except ValueError as error:
        raise UserError(f"{store.url}/{MANIFEST} is not JSON: {error}") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise UserError(f"{store.url}/{MANIFEST} is not a manifest of format {FORMAT}")
    try:
        return Manifest(shards=tuple(ShardInfo(**shard) for shard in value["shards"]))
    except (KeyError, TypeError) as error:
        raise UserError(f"{store.url}/{MANIFEST} is damaged ({error}): pack again") from error


def load_index(store: Store, shard: ShardInfo) -> ShardIndex:
    """The index of a shard, as it was when the manifest was written.

    Raises:
        UserError: if it has changed since, or the tar has.
    """
    return read_index(store, shard.name, sha256=shard.index_sha256)


def read_index(store: Store, shard: str, *, sha256: str) -> ShardIndex:
    """The index of a shard whose index is known by its digest.

    Raises:
        UserError: if it is missing or another one by now, or the tar beside it is missing or of another size.
    """
    try:
        data = store.read(index_name(shard))
    except FileNotFoundError:
        raise UserError(f"{store.url}/{index_name(shard)} is missing: pack again") from None
    if canonical.bytes_digest(data) != sha256:
        raise UserError(f"{store.url}/{index_name(shard)} is not the index it was, which {MANIFEST} names: pack again")
    index = ShardIndex.from_json(data)
    try:
        found = store.size_bytes(shard)
    except FileNotFoundError:
        raise UserError(f"{store.url}/{shard} is missing: pack again") from None
    if found != index.size_bytes:
        raise UserError(f"{store.url}/{shard} has {found} bytes, its index says {index.size_bytes}: pack again")
    return index
