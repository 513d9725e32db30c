"""FastVideo's raw layout: ``videos.txt`` and ``prompt.txt``, line by line, and the files that they name.

A line of ``videos.txt`` is a path relative to the dataset, or to its folder ``videos/``.
"""

from __future__ import annotations

from streamprep.errors import UserError
from streamprep.sources._files import Listing, SourceOptions, check_path, read_text
from streamprep.sources._tree import Tree

VIDEOS, PROMPTS = "videos.txt", "prompt.txt"


def matches(tree: Tree) -> bool:
    """Whether the folder has this layout."""
    return tree.is_file(VIDEOS) and tree.is_file(PROMPTS)


def read_samples(tree: Tree, _: SourceOptions) -> Listing:
    """List the dataset's videos.

    Raises:
        UserError: if a list is missing, not UTF-8, or the two differ in length.
    """
    paths, prompts = (_lines(tree, name) for name in (VIDEOS, PROMPTS))
    _drop_blank_end(paths, 0)
    _drop_blank_end(prompts, len(paths))  # a prompt may be empty
    if len(paths) != len(prompts):
        raise UserError(
            f"{tree.where()}: {VIDEOS} has {len(paths)} lines and {PROMPTS} has {len(prompts)}; line n of one is for "
            "line n of the other"
        )
    listing = Listing(tree)
    for number, (path, prompt) in enumerate(zip(paths, prompts, strict=True), start=1):
        where = f"{tree.where(VIDEOS)}, line {number}"
        if not path:
            raise UserError(f"{where}: {VIDEOS} has an empty line")
        check_path(path, where=where, shown=path)
        inside = path if path.startswith("videos/") or not tree.exists(f"videos/{path}") else f"videos/{path}"
        listing.add(inside, file_name=inside.removeprefix("videos/"), captions=(prompt,), where=where)
    return listing


def _lines(tree: Tree, name: str) -> list[str]:
    if tree.status(name) is None:
        raise UserError(f"{tree.where(name)} is missing")
    return [line.strip() for line in read_text(tree, name).removesuffix("\n").split("\n")]


def _drop_blank_end(lines: list[str], needed: int) -> None:
    while len(lines) > needed and not lines[-1]:
        lines.pop()
