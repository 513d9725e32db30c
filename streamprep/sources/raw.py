"""FastVideo's raw layout: ``videos.txt`` and ``prompt.txt``, line by line, and the files that they name.

A line of ``videos.txt`` is a path relative to the dataset, or to its folder ``videos/``.
"""

from __future__ import annotations

from pathlib import Path

from streamprep.errors import UserError
from streamprep.sources._files import Listing

VIDEOS, PROMPTS = "videos.txt", "prompt.txt"


def matches(root: Path) -> bool:
    """Whether the folder has this layout."""
    return (root / VIDEOS).is_file() and (root / PROMPTS).is_file()


def read_samples(root: Path) -> Listing:
    """List the dataset's videos.

    Raises:
        UserError: if a list is missing, not UTF-8, or the two differ in length.
    """
    paths, prompts = _lines(root / VIDEOS), _lines(root / PROMPTS)
    _drop_blank_end(paths, 0)
    _drop_blank_end(prompts, len(paths))  # a prompt may be empty
    if len(paths) != len(prompts):
        raise UserError(
            f"{root}: {VIDEOS} has {len(paths)} lines and {PROMPTS} has {len(prompts)}; line n of one is for line n "
            "of the other"
        )
    listing = Listing()
    for path, prompt in zip(paths, prompts, strict=True):
        if not path:
            raise UserError(f"{root / VIDEOS} has an empty line")
        inside = path if path.startswith("videos/") or not (root / "videos" / path).exists() else f"videos/{path}"
        listing.add(root, inside, file_name=inside.removeprefix("videos/"), captions=(prompt,))
    return listing


def _lines(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{file} is missing") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8: {error}") from error
    return [line.strip() for line in text.removesuffix("\n").split("\n")]


def _drop_blank_end(lines: list[str], needed: int) -> None:
    while len(lines) > needed and not lines[-1]:
        lines.pop()
