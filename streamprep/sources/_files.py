"""What all sources that list files share: which files are videos, and turning paths into samples safely."""

from __future__ import annotations

import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from streamprep.errors import UserError
from streamprep.keys import extension_of, key_of
from streamprep.shards import MAX_MEMBER_BYTES
from streamprep.types import RawSample

VIDEO_EXTENSIONS = frozenset(
    "3gp avi flv gif m2ts m4v mkv mov mp4 mpeg mpg mts ogv ts webm wmv".split()  # noqa: SIM905
)
CAPTION_COLUMNS = ("cap", "caption", "captions", "text", "prompt")
DECLARED_COLUMNS = ("fps", "num_frames", "duration", "resolution")
_MEMBER_EXTENSION = re.compile("(?!json$|txt$)[a-z0-9]{1,8}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """Something the dataset lists and does not have."""

    file_name: str
    reason: str


@dataclass(kw_only=True)
class Listing:
    """What a dataset holds, before any video is opened."""

    samples: list[RawSample] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def add(
        self,
        root: Path,
        path: str,
        *,
        file_name: str,
        captions: Iterable[str],
        declared: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """List one video file, or note that it is missing.

        Args:
            root: The dataset's folder; what lies outside is refused.
            path: Of the video, relative to ``root``.
            file_name: What the dataset calls it.
            captions: In the dataset's order.
            declared: What the dataset says of the video.
            extra: Further columns.

        Raises:
            UserError: if the path leaves the dataset, names something that is no file or too large a one, or has
                no extension that a shard could tell from its own ``.json`` and ``.txt``.
        """
        if not _is_relative(path) or not _is_relative(file_name):
            raise UserError(f"{root}: the video {file_name!r} is not a relative path inside the dataset")
        if not _MEMBER_EXTENSION.fullmatch(extension_of(path)):
            raise UserError(f"{root}: the video {file_name!r} needs a video's extension, such as .mp4: rename it")
        status = _status_inside(root, path)
        name = readable(file_name)
        if status is None:
            self.skipped.append(Skipped(file_name=name, reason="missing"))
            return
        if status.st_size > MAX_MEMBER_BYTES:
            raise UserError(
                f"{root}: the video {file_name!r} is of {status.st_size} bytes, shards hold less than 8 GiB"
            )
        self.samples.append(
            RawSample(
                key=key_of(file_name),
                file_name=name,
                path=path,
                size_bytes=status.st_size,
                version=str(status.st_mtime_ns),
                captions=tuple(captions),
                declared=declared or {},
                extra=extra or {},
            )
        )

    def checked(self, root: Path) -> Listing:
        """Itself, sorted by key.

        Raises:
            UserError: if it is empty, a key stands for two videos, or too many files are missing.
        """
        counts = Counter(sample.key for sample in self.samples)
        for key in (key for key, count in counts.items() if count > 1):
            both = " and ".join(repr(sample.file_name) for sample in self.samples if sample.key == key)
            raise UserError(f"{root}: {both} have the same key {key!r}; rename one, or list it once")
        total, missing = len(self.samples) + len(self.skipped), len(self.skipped)
        if missing > max(20, 0.05 * total) or (missing and not self.samples):
            raise UserError(
                f"{root}: {missing} of {total} listed videos are missing, the first is "
                f"{self.skipped[0].file_name!r}: is this the right folder?"
            )
        if not self.samples:
            raise UserError(f"{root} lists no videos")
        self.samples.sort(key=lambda sample: sample.key)
        self.skipped.sort(key=lambda skipped: skipped.file_name)
        return self


def readable(file_name: str) -> str:
    """A file's name as text: bytes of it that are no UTF-8 are written as ``\\xff``."""
    return os.fsencode(file_name).decode("utf-8", "backslashreplace")


def _is_relative(path: str) -> bool:
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or "\0" in path or "://" in path:
        return False
    try:
        os.fsencode(path)
    except UnicodeEncodeError:  # JSON can hold half a surrogate pair, a file system cannot
        return False
    return True


def _status_inside(root: Path, path: str) -> os.stat_result | None:
    """The file's status, None if it is missing; links must stay inside the dataset."""
    full = root / path
    try:
        status = full.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{full} is not a regular file")
    if not full.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{full} is a link to {full.resolve()}, outside the dataset: copy it in")
    return status


def read_json(file: Path) -> Any:
    """A JSON file's value, ``NaN`` (which is no JSON, but what Python writes of an empty cell) as None.

    Raises:
        UserError: if it is not JSON.
        FileNotFoundError: if it is not there.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"), parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON in UTF-8: {error}") from error


def captions_of(value: Any, *, where: str) -> tuple[str, ...]:
    """A caption column's value, a string or a list of them, as captions."""
    captions = (value,) if isinstance(value, str) else value
    if not isinstance(captions, (list, tuple)) or not all(isinstance(caption, str) for caption in captions):
        raise UserError(f"{where}: the caption must be a string or a list of strings, got {value!r:.200}")
    return tuple(captions)


def split_columns(
    row: Mapping[str, Any], *, where: str
) -> tuple[tuple[str, ...] | None, dict[str, Any], dict[str, Any]]:
    """A metadata row as (captions or None, declared, extra)."""
    column = next((name for name in CAPTION_COLUMNS if name in row), None)
    captions = None if column is None else captions_of(row[column], where=where)
    declared = {name: row[name] for name in DECLARED_COLUMNS if row.get(name) is not None}
    for name in ("fps", "num_frames", "duration"):
        value = declared.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise UserError(f"{where}: {name} must be a positive number, got {value!r:.200}")
    known = {column, *DECLARED_COLUMNS, "path"}
    return captions, declared, {name: value for name, value in row.items() if name not in known}
