"""FastVideo's "merged" layout: ``videos/`` and ``videos2caption.json``.

The JSON is a list of objects. ``path`` (below ``videos/``) and ``cap`` (a string or a list of strings) are required;
``fps`` and ``num_frames`` are checked against the file where given; all else is kept.
"""

from __future__ import annotations

from pathlib import Path

from streamprep.errors import UserError
from streamprep.sources._files import Listing, read_json, split_columns

CAPTIONS = "videos2caption.json"


def matches(root: Path) -> bool:
    """Whether the folder has this layout."""
    return (root / CAPTIONS).is_file()


def read_samples(root: Path) -> Listing:
    """List the dataset's videos.

    Raises:
        UserError: naming file and entry, if the JSON is not as described.
    """
    manifest = root / CAPTIONS
    try:
        rows = read_json(manifest)
    except FileNotFoundError:
        raise UserError(f"{manifest} is missing") from None
    if not isinstance(rows, list):
        raise UserError(f"{manifest} must hold a list of objects with 'path' and 'cap', got a {type(rows).__name__}")
    listing = Listing()
    for number, row in enumerate(rows):
        where = f"{manifest}, entry {number}"
        if not isinstance(row, dict) or not isinstance(row.get("path"), str):
            raise UserError(f"{where}: an object with 'path' and 'cap' is needed, got {row!r:.200}")
        captions, declared, extra = split_columns(row, where=where)
        if captions is None:
            raise UserError(f"{where}: {row['path']!r} has no 'cap'")
        listing.add(
            root,
            f"videos/{row['path']}",
            file_name=row["path"],
            captions=captions,
            declared=declared,
            extra=extra,
        )
    return listing
