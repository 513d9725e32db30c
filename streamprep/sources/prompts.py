"""A text file with a prompt on each line, without videos: FastVideo's input for text-only preprocessing.

The name of a prompt is the file's and the number of its line. A line that is empty has no caption, and is dropped as
such when it is encoded; blank lines at the end are none.
"""

from __future__ import annotations

from pathlib import Path

from streamprep.errors import UserError
from streamprep.keys import key_of
from streamprep.sources._files import Listing, SourceOptions, readable
from streamprep.types import RawSample

TAKES_FILES = True


def matches(root: Path) -> bool:
    """Whether it is a text file."""
    return root.suffix == ".txt" and root.is_file()


def read_samples(root: Path, _: SourceOptions) -> Listing:
    """List the file's prompts.

    Raises:
        UserError: if it cannot be read as UTF-8, or holds no prompt.
    """
    try:
        text = root.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{root} is not UTF-8: {error}") from error
    except OSError as error:
        raise UserError(f"{root} is not a text file with a prompt on each line: {error}") from error
    if not text.strip():
        raise UserError(f"{root} holds no prompts: it is empty")
    return Listing(
        root,
        samples=[
            _sample(f"{root.stem}-{number:06d}", line.strip())
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
