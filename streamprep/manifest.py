"""Which shards exist: ``manifest.json``, written when all of them do."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from streamprep import canonical
from streamprep.ahead import fetch_ahead
from streamprep.errors import UserError
from streamprep.shards import ShardIndex, index_name
from streamprep.storage import Store, open_store

FORMAT = "streamprep-shards/1"
MANIFEST = "manifest.json"
PACK = "pack.json"
_MOST_NAMES = 10**6
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)")
_INDEXES_AT_ONCE = 16
_INDEX_BYTES_AHEAD = 64 * 2**20
_SAMPLE_BYTES = 1024  # in an index, roughly


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """What SHARDS on the command line names: a folder with its manifest, or some of its tars."""

    url: str
    """Of the folder, with the pattern if there was one."""
    store: Store
    manifest: Manifest
    """Of those that are chosen."""


def open_shards(url: str) -> Shards:
    """Packed shards, all of a folder or those of a brace pattern.

    Args:
        url: A folder or its URL; or of a tar in it, with braces for several: ``s3://bucket/{000000..000099}.tar``.

    Raises:
        UserError: if there is no manifest, or it lacks a tar that the pattern names.
    """
    if not (url.endswith(".tar") or "{" in url) or Path(url).is_dir():
        store = open_store(url)
        return Shards(url=store.url, store=store, manifest=load_manifest(store))
    folder, _, pattern = url.rpartition("/")
    if "{" in folder:
        raise UserError(f"{url}: a pattern may have braces in the tars' names, not in the folder's: one SHARDS each")
    names = _expand(url, pattern)
    store = open_store(folder or ".")
    manifest = load_manifest(store)
    known = {shard.name for shard in manifest.shards}
    if unknown := sorted(names - known):
        raise UserError(
            f"{url}: {store.url}/{MANIFEST} names no {unknown[0]}"
            + (f", and {len(unknown) - 1} more of the pattern" if len(unknown) > 1 else "")
            + f"; it has {len(known)}, from {min(known)} to {max(known)}"
        )
    chosen = tuple(shard for shard in manifest.shards if shard.name in names)
    return Shards(url=f"{store.url}/{pattern}", store=store, manifest=Manifest(shards=chosen))


def _expand(url: str, pattern: str) -> set[str]:
    # braceexpand makes a list of each range
    if any(abs(int(end) - int(start)) >= _MOST_NAMES for start, end in _RANGE.findall(pattern)):
        raise UserError(f"{url} stands for more than {_MOST_NAMES} tars")
    try:
        names = list(itertools.islice(braceexpand(pattern), _MOST_NAMES + 1))
    except ValueError as error:
        raise UserError(f"{url}: its braces do not match: {error}") from error
    if len(names) > _MOST_NAMES:
        raise UserError(f"{url} stands for more than {_MOST_NAMES} tars")
    if no_tar := [name for name in names if not name.endswith(".tar") or "{" in name or "}" in name]:
        raise UserError(f"{url}: {no_tar[0]!r} is no tar; a pattern is like {{000000..000099}}.tar")
    return set(names)


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


def load_indexes(store: Store, shards: Sequence[ShardInfo]) -> Iterator[tuple[ShardInfo, ShardIndex]]:
    """The indexes of shards, in their order; from a bucket several are fetched at once.

    Raises:
        UserError: as `load_index`.
    """
    if store.local_path() is not None or len(shards) == 1:
        return ((shard, load_index(store, shard)) for shard in shards)
    return fetch_ahead(
        shards,
        lambda shard: load_index(store, shard),
        size_bytes=lambda shard: _SAMPLE_BYTES * shard.num_samples,
        max_bytes=_INDEX_BYTES_AHEAD,
        num_threads=_INDEXES_AT_ONCE,
    )


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
