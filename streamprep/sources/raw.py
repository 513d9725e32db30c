"""FastVideo's raw layout: ``videos.txt`` and ``prompt.txt``, line by line, and the files that they name.

A line of ``videos.txt`` is a path relative to the dataset, or to its folder ``videos/``.
"""

from __future__ import annotations

from pathlib import Path

from streamprep.errors import UserError
from streamprep.sources._files import Listing, SourceOptions, check_path, read_text, status_inside

VIDEOS, PROMPTS = "videos.txt", "prompt.txt"


def matches(root: Path) -> bool:
    """Whether the folder has this layout."""
    return (root / VIDEOS).is_file() and (root / PROMPTS).is_file()


def read_samples(root: Path, options: SourceOptions) -> Listing:
    """List the dataset's videos.

    Raises:
        UserError: if a list is missing, not UTF-8, or the two differ in length.
    """
    paths, prompts = (_lines(root, name, options) for name in (VIDEOS, PROMPTS))
    _drop_blank_end(paths, 0)
    _drop_blank_end(prompts, len(paths))  # a prompt may be empty
    if len(paths) != len(prompts):
        raise UserError(
            f"{root}: {VIDEOS} has {len(paths)} lines and {PROMPTS} has {len(prompts)}; line n of one is for line n "
            "of the other"
        )
    listing = Listing(root, links_into=options.links_into)
    for number, (path, prompt) in enumerate(zip(paths, prompts, strict=True), start=1):
        where = f"{root / VIDEOS}, line {number}"
        if not path:
            raise UserError(f"{where}: {VIDEOS} has an empty line")
        check_path(path, where=where, shown=path)
        inside = path if path.startswith("videos/") or not (root / "videos" / path).exists() else f"videos/{path}"
        listing.add(inside, file_name=inside.removeprefix("videos/"), captions=(prompt,), where=where)
    return listing


def _lines(root: Path, name: str, options: SourceOptions) -> list[str]:
    if status_inside(root, name, links_into=options.links_into) is None:
        raise UserError(f"{root / name} is missing")
    return [line.strip() for line in read_text(root / name).removesuffix("\n").split("\n")]


def _drop_blank_end(lines: list[str], needed: int) -> None:
    while len(lines) > needed and not lines[-1]:
        lines.pop()
