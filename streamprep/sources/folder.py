"""A folder of videos and images, each with its caption beside it: ``a.mp4`` with ``a.txt`` or ``a.json``, at any depth.

The ``.txt`` is the caption as a whole. The ``.json`` is an object whose ``caption`` (or cap, captions, text, prompt)
is a string or a list; ``fps`` and ``num_frames`` are checked against the file; all else
is kept. Where both have a caption, the ``.json`` counts. A video without either has no caption. An image beside a video
of the same name is its thumbnail, and skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from streamprep.errors import UserError
from streamprep.keys import extension_of
from streamprep.sources._files import (
    IMAGE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    Listing,
    SourceOptions,
    read_json,
    read_text,
    readable,
    split_columns,
)
from streamprep.sources._tree import Tree, in_parallel

Row = tuple[tuple[str, ...], dict[str, Any], dict[str, Any]]
"""Captions, what is declared, further columns."""


def matches(tree: Tree) -> bool:
    """Whether the folder has any video or image."""
    return next(_videos(tree), None) is not None


def read_samples(tree: Tree, _: SourceOptions) -> Listing:
    """List the dataset's videos.

    Raises:
        UserError: naming the file, if a caption cannot be read.
    """
    listing = Listing(tree)
    with closing(in_parallel(tree, partial(_describe, tree), _videos(tree))) as described:
        for name, row in described:
            if row is None:
                listing.skip(readable(name), "thumbnail")
            else:
                captions, declared, extra = row
                listing.add(name, file_name=name, captions=captions, declared=declared, extra=extra)
    return listing


def _videos(tree: Tree) -> Iterator[str]:
    for name in tree.walk(what="videos"):
        if extension_of(name) in VIDEO_EXTENSIONS | IMAGE_EXTENSIONS:
            yield name


def _describe(tree: Tree, name: str) -> tuple[str, Row | None]:
    """A video's name, and what is said of it; None of a thumbnail."""
    if _is_thumbnail(tree, name):
        return name, None
    file = _beside(name, ".json")
    captions, declared, extra = split_columns(_read_json(tree, file), where=tree.where(file))
    if captions is None:
        captions = _read_text(tree, _beside(name, ".txt"))
    return name, (captions, declared, extra)


def _is_thumbnail(tree: Tree, name: str) -> bool:
    if extension_of(name) not in IMAGE_EXTENSIONS:
        return False
    return any(tree.exists(_beside(name, f".{extension}")) for extension in VIDEO_EXTENSIONS)


def _beside(name: str, extension: str) -> str:
    return str(PurePosixPath(name).with_suffix(extension))


def _read_json(tree: Tree, name: str) -> dict[str, Any]:
    if tree.status(name) is None:
        return {}
    value = read_json(tree, name)
    if not isinstance(value, dict):
        raise UserError(f"{tree.where(name)} must hold an object, got a {type(value).__name__}")
    return value


def _read_text(tree: Tree, name: str) -> tuple[str, ...]:
    if tree.status(name) is None:
        return ()
    text = read_text(tree, name).strip()
    return (text,) if text else ()
