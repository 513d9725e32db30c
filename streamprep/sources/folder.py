"""A folder of videos and images, each with its caption beside it: ``a.mp4`` with ``a.txt`` or ``a.json``, at any depth.

The ``.txt`` is the caption as a whole. The ``.json`` is an object whose ``caption`` (or cap, captions, text, prompt)
is a string or a list; ``fps`` and ``num_frames`` are checked against the file; all else
is kept. Where both have a caption, the ``.json`` counts. A video without either has no caption. An image beside a video
of the same name is its thumbnail, and skipped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
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
    split_columns,
    status_inside,
)


def matches(root: Path) -> bool:
    """Whether the folder has any video or image."""
    return root.is_dir() and next(_videos(root), None) is not None


def read_samples(root: Path, options: SourceOptions) -> Listing:
    """List the dataset's videos.

    Raises:
        UserError: naming the file, if a caption cannot be read.
    """
    listing = Listing(root, links_into=options.links_into)
    for path in _videos(root):
        name = path.relative_to(root).as_posix()
        if _is_thumbnail(path):
            listing.skip(os.fsencode(name).decode("utf-8", "backslashreplace"), "thumbnail")
            continue
        row = _read_json(root, path.with_suffix(".json"), options)
        captions, declared, extra = split_columns(row, where=str(path.with_suffix(".json")))
        if captions is None:
            captions = _read_text(root, path.with_suffix(".txt"), options)
        listing.add(name, file_name=name, captions=captions, declared=declared, extra=extra)
    return listing


def _videos(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root, onerror=_raise):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for path in (Path(folder, name) for name in subfolders):
            if path.is_symlink():
                raise UserError(f"{path} is a link to a folder, which is not followed: move the videos in")
        for name in sorted(files):
            if not name.startswith(".") and extension_of(name) in VIDEO_EXTENSIONS | IMAGE_EXTENSIONS:
                yield Path(folder, name)


def _is_thumbnail(path: Path) -> bool:
    if extension_of(path.name) not in IMAGE_EXTENSIONS:
        return False
    return any(path.with_suffix(f".{extension}").exists() for extension in VIDEO_EXTENSIONS)


def _raise(error: OSError) -> None:
    raise error  # os.walk passes over what it cannot read


def _read_json(root: Path, file: Path, options: SourceOptions) -> dict[str, Any]:
    if status_inside(root, str(file.relative_to(root)), links_into=options.links_into) is None:
        return {}
    value = read_json(file)
    if not isinstance(value, dict):
        raise UserError(f"{file} must hold an object, got a {type(value).__name__}")
    return value


def _read_text(root: Path, file: Path, options: SourceOptions) -> tuple[str, ...]:
    if status_inside(root, str(file.relative_to(root)), links_into=options.links_into) is None:
        return ()
    text = read_text(file).strip()
    return (text,) if text else ()
