"""All reading and all durable writing goes through a `Store`: one root, files below it.

`LocalStore` (``local.py``) is a folder, `ObjectStore` (``objects.py``) a place in a bucket, `WebStore` (``web.py``) one
on a web server, which can only be read, `HubStore` (``hub.py``) a folder of a dataset's repository on the Hugging Face
hub.
Writing is all or nothing: a file that can be seen is whole and can be trusted.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from streamprep.errors import UserError
from streamprep.progress import count, size
from streamprep.storage.interface import FileEntry, FileReplaced, PendingFile, Store, StoreError, StoreStats
from streamprep.storage.local import LocalStore
from streamprep.storage.spool import NamedFile, NotWhole, SpoolError, check_spool_dir, open_spool, whole_file

__all__ = [
    "FileEntry",
    "FileReplaced",
    "LocalStore",
    "NamedFile",
    "NotWhole",
    "PendingFile",
    "SpoolError",
    "Store",
    "StoreError",
    "StoreStats",
    "check_spool_dir",
    "check_writable",
    "describe_staging",
    "describe_traffic",
    "how_to_delete",
    "is_remote",
    "open_spool",
    "open_store",
    "whole_file",
]

_SCHEMES = (
    "use a path, file:///absolute/path, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX, "
    "hf://datasets/ORG/NAME/FOLDER, or https://HOST/PATH (which can only be read)"
)


def open_store(url: str | os.PathLike[str], *, spool_dir: str | None = None) -> Store:
    """The store of a folder or of a place in a bucket, which need not exist yet. Nothing is asked of it here.

    Args:
        url: A path or a URL.
        spool_dir: Local folder where files for a bucket are built, by default that for temporary files; or where
            those for the hub lie until they are published, by default in the user's folder of caches.

    Raises:
        UserError: for a URL of another kind.
    """
    text = os.fspath(url)
    if not text:
        raise UserError("an empty path names no folder")
    if "://" not in text:
        return LocalStore(Path(text))
    if text.startswith("file://"):
        return LocalStore(_path_of(text))
    if text.startswith("hf://"):
        from streamprep.storage.hub import HubStore
        from streamprep.storage.hub_requests import parse_hub_url

        return HubStore(parse_hub_url(text), spool_dir=spool_dir)
    from streamprep.storage.objects import ObjectStore
    from streamprep.storage.places import WEB, parse_place
    from streamprep.storage.web import WebStore

    place = parse_place(text)
    if place is None:
        raise UserError(f"{text}: no store is known by such a URL; {_SCHEMES}")
    return WebStore(place) if place.scheme in WEB else ObjectStore(place, spool_dir=spool_dir)


def check_writable(store: Store, *, only_writer: bool) -> None:
    """Make sure that several processes may write: that the store creates a file only if it is absent, when told so.

    Raises:
        UserError: if it does not, unless the user promises that no other process writes; or if nothing can be written.
    """
    if not store.check_create_only() and not only_writer:
        raise UserError(
            f"{store.url}: this store overwrites an object though it is told to create it only if it is absent "
            "(If-None-Match: *), so two processes could both believe that they were first. Use another store, or say "
            "--only-writer if this process will be the only one to write there, retries and restarts included"
        )


def describe_staging(store: Store) -> Iterator[str]:
    """A line on where files lie that are published all at once."""
    folder = store.staged_in()
    if folder is not None:
        yield (
            f"staged in {folder}, which all ranks must see, until all is done; then published as one commit to "
            f"{store.url}"
        )


def describe_traffic(*stores: Store) -> Iterator[str]:
    """A line for each place in a bucket that this process has asked something of."""
    places: dict[str, StoreStats] = {}
    for store in stores:
        places.setdefault(store.url, StoreStats()).add(store.stats)
    for url, stats in places.items():
        if total := stats.requests.total():
            kinds = ", ".join(f"{number} {kind}" for kind, number in stats.requests.most_common())
            yield (
                f"{url}: {count(total, 'request')} ({kinds}), {size(stats.bytes_read)} read, "
                f"{size(stats.bytes_written)} written"
            )


def how_to_delete(store_url: str, path: str) -> str:
    """A file's full name, and for a bucket the tool by which a user deletes it."""
    scheme, _, rest = store_url.partition("://")
    url = f"{store_url}/{path}"
    where, _, folder = rest.partition("/")
    name = f"{folder}/{path}" if folder else path
    if scheme == "s3":
        return f"{url} (aws s3 rm {shlex.quote(url)})"
    if scheme == "gs":
        return f"{url} (gcloud storage rm {shlex.quote(url)})"
    if scheme == "az":
        return f"{url} (az storage blob delete --container-name {shlex.quote(where)} --name {shlex.quote(name)})"
    if scheme == "hf":
        return f"{url} (hf repos delete-files, or on the repository's page)"
    return url


def is_remote(url: str | None) -> bool:
    """Whether this is no local folder."""
    return url is not None and "://" in url and not url.startswith("file://")


def _path_of(url: str) -> Path:
    path = url.removeprefix("file://").removeprefix("localhost")
    if not path.startswith("/") or "#" in path or "?" in path:
        raise UserError(f"{url} names no local folder: it must be file:///absolute/path")
    return Path(unquote(path))
