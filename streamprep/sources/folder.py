"""A folder of videos, each with its caption beside it: ``a.mp4`` with ``a.txt`` or ``a.json``, at any depth.

The ``.txt`` is the caption as a whole. The ``.json`` is an object whose ``caption`` (or cap, captions, text, prompt)
is a string or a list; ``fps`` and ``num_frames`` are checked against the file; all else
is kept. Where both have a caption, the ``.json`` counts. A video without either has no caption.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from streamprep.errors import UserError
from streamprep.keys import extension_of
from streamprep.sources._files import VIDEO_EXTENSIONS, Listing, read_json, split_columns


def matches(root: Path) -> bool:
    """Whether the folder has any video."""
    return next(_videos(root), None) is not None


def read_samples(root: Path) -> Listing:
    """List the dataset's videos.

    Raises:
        UserError: naming the file, if a caption cannot be read.
    """
    listing = Listing()
    for path in _videos(root):
        row = _read_json(path.with_suffix(".json"))
        captions, declared, extra = split_columns(row, where=str(path.with_suffix(".json")))
        if captions is None:
            captions = _read_text(path.with_suffix(".txt"))
        name = path.relative_to(root).as_posix()
        listing.add(root, name, file_name=name, captions=captions, declared=declared, extra=extra)
    return listing


def _videos(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root, onerror=_raise):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for path in (Path(folder, name) for name in subfolders):
            if path.is_symlink():
                raise UserError(f"{path} is a link to a folder, which is not followed: move the videos in")
        for name in sorted(files):
            if not name.startswith(".") and extension_of(name) in VIDEO_EXTENSIONS:
                yield Path(folder, name)


def _raise(error: OSError) -> None:
    raise error  # os.walk passes over what it cannot read


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = read_json(file)
    except FileNotFoundError:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{file} must hold an object, got a {type(value).__name__}")
    return value


def _read_text(file: Path) -> tuple[str, ...]:
    try:
        text = file.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        return ()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8: {error}") from error
    return (text,) if text else ()
