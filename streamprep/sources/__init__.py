"""Readers of dataset layouts, one module for each, found by ``--dataset-type NAME``.

A source has ``matches(tree) -> bool``, for ``auto``, ``read_samples(tree, options) -> Listing``, and ``OPTIONS``, the
names of the options that mean something to it; with ``TAKES_FILES`` a dataset may be a file. The `Tree` has the
dataset's files, wherever they are. It may list samples whose bytes are no files of their own: then it gives the listing
an ``open_video``.
"""

from __future__ import annotations

import re
from pathlib import Path

from streamprep import plugins
from streamprep.errors import UserError
from streamprep.sources._files import Listing, SourceOptions
from streamprep.sources._tree import Tree, open_tree

_GROUP = "streamprep.sources"
# From the most particular layout to the one nearly everything fits.
_AUTO_ORDER = ("prompts", "merged", "raw", "hf", "manifest", "webdataset", "folder")
_DATASET_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def list_dataset(
    dataset: str | Path, dataset_type: str, options: SourceOptions | None = None, *, spool_dir: str | None = None
) -> Listing:
    """What a dataset holds, sorted by key and checked.

    Args:
        dataset: A folder or a manifest file, or its URL in a bucket; ``hf://datasets/ORG/NAME``, or ``ORG/NAME`` for
            the source ``hf``.
        dataset_type: A source's name, or ``auto``.
        options: What the user says of it.
        spool_dir: Local folder for large videos from a bucket; by default that for temporary files.

    Raises:
        UserError: if the dataset is missing, or not of that layout, or lists nothing usable.
    """
    options = options or SourceOptions()
    tree = open_tree(dataset, spool_dir=spool_dir)
    if dataset_type != "hf" and not tree.is_there():
        hint = ""
        if _DATASET_ID.fullmatch(str(dataset)):
            hint = f"; for the dataset {dataset} of the Hugging Face hub, say --dataset-type hf"
        raise UserError(f"{tree.where()} is not a folder or file{hint}")
    if dataset_type == "auto" and options.annotations is not None:
        dataset_type = "merged"
    name = _recognise(tree) if dataset_type == "auto" else dataset_type
    source = plugins.load(_GROUP, name)
    if tree.file is not None and not getattr(source, "TAKES_FILES", False):
        raise UserError(f"{tree.where(tree.file)} is a file; a dataset of the layout {name} is a folder")
    _check_options(name, options, getattr(source, "OPTIONS", ()))
    listing: Listing = source.read_samples(tree, options)
    return listing.checked()


def _recognise(tree: Tree) -> str:
    for name in _AUTO_ORDER:
        source = plugins.load(_GROUP, name)
        if (tree.file is None or getattr(source, "TAKES_FILES", False)) and source.matches(tree):
            return name
    if tree.file is not None:
        raise UserError(
            f"{tree.where(tree.file)} is neither a folder, nor a manifest (.jsonl, .json, .csv, .tsv, .parquet), nor a "
            ".txt file with a prompt on each line"
        )
    raise UserError(
        f"{tree.where()} has none of the layouts {', '.join(_AUTO_ORDER)}: no videos2caption.json, no videos.txt with "
        "prompt.txt, no manifest, no tars, no video files"
    )


def _check_options(source: str, options: SourceOptions, known: tuple[str, ...]) -> None:
    for name in ("video_column", "caption_column", "split", "annotations"):
        if getattr(options, name) is not None and name not in known:
            raise UserError(
                f"--{name.replace('_', '-')} says nothing about a dataset of the layout {source}: leave it out"
            )
