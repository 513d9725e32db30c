"""Readers of dataset layouts, one module for each, found by ``--dataset-type NAME``.

A source has ``matches(root) -> bool``, for ``auto``, and ``read_samples(root) -> Listing``.
"""

from __future__ import annotations

from pathlib import Path

from streamprep import plugins
from streamprep.errors import UserError
from streamprep.sources._files import Listing

_GROUP = "streamprep.sources"
_AUTO_ORDER = (
    "prompts",
    "merged",
    "raw",
    "folder",
)  # from the most particular layout to the one nearly everything fits


def list_dataset(root: Path, dataset_type: str) -> Listing:
    """What a dataset holds, sorted by key and checked.

    Args:
        root: The dataset's folder, or file.
        dataset_type: A source's name, or ``auto``.

    Raises:
        UserError: if the folder is missing, or not of that layout, or lists nothing usable.
    """
    if not root.exists():
        raise UserError(f"{root} is not there")
    name = _recognise(root) if dataset_type == "auto" else dataset_type
    listing: Listing = plugins.load(_GROUP, name).read_samples(root)
    return listing.checked(root)


def _recognise(root: Path) -> str:
    if not root.is_dir() and not plugins.load(_GROUP, "prompts").matches(root):
        raise UserError(f"{root} is neither a folder nor a .txt file with a prompt on each line")
    for name in _AUTO_ORDER:
        if plugins.load(_GROUP, name).matches(root):
            return name
    raise UserError(
        f"{root} has none of the layouts {', '.join(_AUTO_ORDER)}: no videos2caption.json, no videos.txt with "
        "prompt.txt, no video files"
    )
