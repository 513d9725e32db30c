"""FastVideo's "merged" layout: ``videos/`` and ``videos2caption.json``.

The JSON is a list of objects. ``path`` (below ``videos/``, or else beside the JSON) and ``cap`` (a string or a list of
strings) are required; ``fps`` and ``num_frames`` are checked against the file where given; all else is kept.
"""

from __future__ import annotations

from pathlib import Path

from streamprep.errors import UserError
from streamprep.sources._files import Listing, SourceOptions, check_path, read_json, split_columns, status_inside

CAPTIONS = "videos2caption.json"


def matches(root: Path) -> bool:
    """Whether the folder has this layout."""
    return (root / CAPTIONS).is_file()


def read_samples(root: Path, options: SourceOptions) -> Listing:
    """List the dataset's videos.

    Raises:
        UserError: naming file and entry, if the JSON is not as described.
    """
    manifest = root / CAPTIONS
    if status_inside(root, CAPTIONS, links_into=options.links_into) is None:
        raise UserError(f"{manifest} is missing")
    rows = read_json(manifest)
    if not isinstance(rows, list):
        raise UserError(f"{manifest} must hold a list of objects with 'path' and 'cap', got a {type(rows).__name__}")
    listing = Listing(root, links_into=options.links_into)
    for number, row in enumerate(rows):
        where = f"{manifest}, entry {number}"
        if not isinstance(row, dict) or not isinstance(row.get("path"), str):
            raise UserError(f"{where}: an object with 'path' and 'cap' is needed, got {row!r:.200}")
        captions, declared, extra = split_columns(row, where=where)
        if captions is None:
            raise UserError(f"{where}: {row['path']!r} has no 'cap'")
        check_path(row["path"], where=where, shown=row["path"])
        path = _path(root, row["path"])
        listing.add(path, file_name=row["path"], captions=captions, declared=declared, extra=extra, where=where)
    return listing


def _path(root: Path, path: str) -> str:
    in_videos = f"videos/{path}"
    return path if not (root / in_videos).exists() and (root / path).exists() else in_videos
