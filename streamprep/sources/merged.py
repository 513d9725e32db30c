"""FastVideo's "merged" layout: ``videos/`` and ``videos2caption.json``, or a JSON file elsewhere by ``--annotations``.

The JSON is a list of objects. ``path`` (below ``videos/``, or else beside the JSON) and ``cap`` (a string or a list of
strings) are required; ``fps`` and ``num_frames`` are checked against the file where given; all else is kept.
"""

from __future__ import annotations

from typing import Any

from streamprep.errors import UserError
from streamprep.sources._files import Listing, SourceOptions, check_path, read_json, split_columns
from streamprep.sources._tree import Tree, open_tree

OPTIONS = ("annotations",)
CAPTIONS = "videos2caption.json"


def matches(tree: Tree) -> bool:
    """Whether the folder has this layout."""
    return tree.is_file(CAPTIONS)


def read_samples(tree: Tree, options: SourceOptions) -> Listing:
    """List the dataset's videos.

    Raises:
        UserError: naming file and entry, if the JSON is not as described.
    """
    manifest, rows = _read_annotations(tree, options.annotations)
    if not isinstance(rows, list):
        raise UserError(f"{manifest} must hold a list of objects with 'path' and 'cap', got a {type(rows).__name__}")
    listing = Listing(tree)
    for number, row in enumerate(rows):
        where = f"{manifest}, entry {number}"
        if not isinstance(row, dict) or not isinstance(row.get("path"), str):
            raise UserError(f"{where}: an object with 'path' and 'cap' is needed, got {row!r:.200}")
        captions, declared, extra = split_columns(row, where=where)
        if captions is None:
            raise UserError(f"{where}: {row['path']!r} has no 'cap'")
        check_path(row["path"], where=where, shown=row["path"])
        path = _path(tree, row["path"])
        listing.add(path, file_name=row["path"], captions=captions, declared=declared, extra=extra, where=where)
    return listing


def _read_annotations(tree: Tree, elsewhere: str | None) -> tuple[str, Any]:
    """(where it is, the JSON's value)."""
    name: str | None = CAPTIONS
    if elsewhere is not None:
        tree = open_tree(elsewhere)
        name = tree.file
        if name is None:
            raise UserError(f"--annotations {elsewhere}: there is no such file, a JSON list is needed")
    assert name is not None
    manifest = tree.where(name)
    if tree.status(name) is None:
        raise UserError(f"{manifest} is missing")
    return manifest, read_json(tree, name)


def _path(tree: Tree, path: str) -> str:
    in_videos = f"videos/{path}"
    return path if not tree.exists(in_videos) and tree.exists(path) else in_videos
