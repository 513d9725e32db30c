"""Readers of dataset layouts, one module for each, found by ``--dataset-type NAME``.

A source has ``matches(root) -> bool``, for ``auto``, ``read_samples(root, options) -> Listing``, and ``OPTIONS``, the
names of the options that mean something to it; with ``TAKES_FILES`` a dataset may be a file. It may list samples whose
bytes are no files of a folder: then it gives the listing an ``open_video``.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from streamprep import plugins
from streamprep.errors import UserError
from streamprep.sources import _hub
from streamprep.sources._files import Listing, SourceOptions

_GROUP = "streamprep.sources"
# From the most particular layout to the one nearly everything fits.
_AUTO_ORDER = ("prompts", "merged", "raw", "hf", "manifest", "webdataset", "folder")
_DATASET_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def list_dataset(dataset: str | Path, dataset_type: str, options: SourceOptions | None = None) -> Listing:
    """What a dataset holds, sorted by key and checked.

    Args:
        dataset: A folder, a manifest file, ``hf://datasets/ORG/NAME``, or ``ORG/NAME`` for the source ``hf``.
        dataset_type: A source's name, or ``auto``.
        options: What the user says of it.

    Raises:
        UserError: if the dataset is missing, or not of that layout, or lists nothing usable.
    """
    options = options or SourceOptions()
    if str(dataset).startswith("hf://"):
        root, links_into = _hub.fetch_folder(str(dataset))
        options = replace(options, links_into=links_into)
    elif "://" in str(dataset):
        raise UserError(f"{dataset}: a dataset is a local folder or file, or hf://datasets/ORG/NAME")
    else:
        root = Path(dataset)
    if dataset_type != "hf" and not root.exists():
        hint = ""
        if _DATASET_ID.fullmatch(str(dataset)):
            hint = f"; for the dataset {dataset} of the Hugging Face hub, say --dataset-type hf"
        raise UserError(f"{root} is not a folder or file{hint}")
    name = _recognise(root) if dataset_type == "auto" else dataset_type
    source = plugins.load(_GROUP, name)
    if root.exists() and not root.is_dir() and not getattr(source, "TAKES_FILES", False):
        raise UserError(f"{root} is a file; a dataset of the layout {name} is a folder")
    _check_options(name, options, getattr(source, "OPTIONS", ()))
    listing: Listing = source.read_samples(root, options)
    return listing.checked()


def _recognise(root: Path) -> str:
    for name in _AUTO_ORDER:
        source = plugins.load(_GROUP, name)
        if (root.is_dir() or getattr(source, "TAKES_FILES", False)) and source.matches(root):
            return name
    if not root.is_dir():
        raise UserError(
            f"{root} is neither a folder, nor a manifest (.jsonl, .json, .csv, .tsv, .parquet), nor a .txt file with a "
            "prompt on each line"
        )
    raise UserError(
        f"{root} has none of the layouts {', '.join(_AUTO_ORDER)}: no videos2caption.json, no videos.txt with "
        "prompt.txt, no manifest, no tars, no video files"
    )


def _check_options(source: str, options: SourceOptions, known: tuple[str, ...]) -> None:
    for name in ("video_column", "caption_column", "split"):
        if getattr(options, name) is not None and name not in known:
            raise UserError(
                f"--{name.replace('_', '-')} says nothing about a dataset of the layout {source}: leave it out"
            )
