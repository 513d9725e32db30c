"""A text file with a prompt on each line, without videos: FastVideo's input for text-only preprocessing.

The name of a prompt is the file's and the number of its line. A line that is empty has no caption, and is dropped as
such when it is encoded; blank lines at the end are none.
"""

from __future__ import annotations

from pathlib import PurePosixPath

from streamprep.errors import UserError
from streamprep.keys import key_of
from streamprep.sources._files import Listing, SourceOptions, read_text, readable
from streamprep.sources._tree import Tree
from streamprep.types import RawSample

TAKES_FILES = True


def matches(tree: Tree) -> bool:
    """Whether it is a text file."""
    return tree.file is not None and PurePosixPath(tree.file).suffix == ".txt" and tree.is_file(tree.file)


def read_samples(tree: Tree, _: SourceOptions) -> Listing:
    """List the file's prompts.

    Raises:
        UserError: if it cannot be read as UTF-8, or holds no prompt.
    """
    if tree.file is None:
        raise UserError(f"{tree.where()} is not a text file with a prompt on each line: it is a folder")
    text, stem = read_text(tree, tree.file), PurePosixPath(tree.file).stem
    if not text.strip():
        raise UserError(f"{tree.where(tree.file)} holds no prompts: it is empty")
    return Listing(
        tree,
        samples=[
            _sample(f"{stem}-{number:06d}", line.strip())
            for number, line in enumerate(text.rstrip("\n \t\r").split("\n"), start=1)
        ],
    )


def _sample(name: str, prompt: str) -> RawSample:
    return RawSample(
        key=key_of(f"{name}.txt"),
        file_name=readable(name),
        path="",
        size_bytes=0,
        version="",
        captions=(prompt,) if prompt else (),
        has_video=False,
    )
