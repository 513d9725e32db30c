"""What all sources share: which files are videos, and turning paths and rows into samples safely."""

from __future__ import annotations

import datetime
import decimal
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from streamprep.errors import UserError
from streamprep.keys import extension_of, key_of
from streamprep.shards import MAX_MEMBER_BYTES
from streamprep.sources._tree import Tree
from streamprep.types import RawSample

VIDEO_EXTENSIONS = frozenset(
    "3gp avi flv gif m2ts m4v mkv mov mp4 mpeg mpg mts ogv ts webm wmv".split()  # noqa: SIM905
)
IMAGE_EXTENSIONS = frozenset(("jpg", "jpeg", "png", "webp"))
"""Of clips of one frame."""
VIDEO_COLUMNS = ("video", "path", "file_name", "video_path", "media_path", "filepath", "filename", "file", "image")
CAPTION_COLUMNS = ("cap", "caption", "captions", "text", "prompt")
DECLARED_COLUMNS = ("fps", "num_frames", "duration", "resolution")
MAX_CAPTION_CHARACTERS = 100_000
"""A whole file taken for a caption would be copied into every index and plan."""
SKIP_REASONS = {
    "missing": "the dataset lists it, and there is no such file",
    "thumbnail": "an image beside a video of the same name",
    "caption_nul": "a caption holds a NUL character",
    "caption_too_long": f"a caption has more than {MAX_CAPTION_CHARACTERS} characters",
    "no_video": "a sample of a tar, or a row, that has no video",
    "several_videos": "a sample of a tar that has more than one video",
    "unreadable_caption": "the caption or JSON of a tar's sample is not UTF-8, or not JSON",
    "damaged_tar": "a tar left out by --skip-damaged",
}
"""Why something listed is not packed: the closed list of ``skipped.jsonl``."""
_HARMLESS = ("thumbnail",)
_MEMBER_EXTENSION = re.compile("(?!json$|txt$)[a-z0-9]{1,8}")

OpenVideo = Callable[[RawSample], BinaryIO]
"""Gives a sample's bytes as a seekable file; sent to other processes, so it can be pickled.

So many threads may call it side by side as its ``at_once`` says; without that only one at a time.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceOptions:
    """What a user may tell a source; None leaves it to convention."""

    video_column: str | None = None
    caption_column: str | None = None
    split: str | None = None
    annotations: str | None = None
    """A JSON file elsewhere than the layout has it; a path or a URL."""
    skip_damaged: bool = False
    prefix_keys: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """Something the dataset lists that is not packed."""

    file_name: str
    reason: str
    """One of `SKIP_REASONS`."""


@dataclass(frozen=True, slots=True)
class OpenFile:
    """Opens samples that are files of their own."""

    tree: Tree

    def __call__(self, sample: RawSample) -> BinaryIO:
        """The file; no pipe or device that has taken its place since it was listed, which would block."""
        return self.tree.open_video(sample.path, size_bytes=sample.size_bytes, version=sample.version)

    @property
    def at_once(self) -> int:
        """As many as the files' place bears."""
        return self.tree.at_once


@dataclass
class Listing:
    """What a dataset holds, before any video is opened."""

    tree: Tree
    """The dataset's files; what lies outside is refused."""
    samples: list[RawSample] = field(default_factory=list, kw_only=True)
    skipped: list[Skipped] = field(default_factory=list, kw_only=True)
    open_video: OpenVideo = field(default=None, kw_only=True)  # type: ignore[assignment]
    """By default, opens the file at ``sample.path``."""
    in_order: bool = field(default=False, kw_only=True)
    """Whether the bytes can only be read one after the other, so that a shuffle would read all for each."""
    _places: dict[str, str] = field(default_factory=dict, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        if self.open_video is None:
            self.open_video = OpenFile(self.tree)

    def add(
        self,
        path: str,
        *,
        file_name: str,
        captions: Iterable[str],
        declared: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
        where: str | None = None,
    ) -> None:
        """List one video file, or note that it is missing.

        Args:
            path: Of the video, below the dataset's root.
            file_name: What the dataset calls it.
            captions: In the dataset's order.
            declared: What the dataset says of the video.
            extra: Further columns.
            where: File and line that list it, for messages.

        Raises:
            UserError: if the path leaves the dataset, names something that is no file or too large a one, or has
                no extension that a shard could tell from its own ``.json`` and ``.txt``.
        """
        where = where or self.tree.where()
        check_path(path, where=where, shown=file_name)
        check_path(file_name, where=where, shown=file_name)
        name = readable(file_name)
        if not _MEMBER_EXTENSION.fullmatch(extension_of(path)):
            raise UserError(f"{where}: the video {file_name!r} needs a video's extension, such as .mp4: rename it")
        try:
            status = self.tree.status(path)
        except UserError as error:
            raise UserError(f"{where}: {error}" if where != self.tree.where() else str(error)) from error
        if status is None:
            self.skip(name, "missing")
            return
        self.add_sample(
            RawSample(
                key=key_of(file_name),
                file_name=name,
                path=path,
                size_bytes=status.size_bytes,
                version=status.version,
                captions=tuple(captions),
                declared=declared or {},
                extra=extra or {},
            ),
            where=where,
        )

    def add_sample(self, sample: RawSample, *, where: str) -> None:
        """List one sample, wherever its bytes are.

        Raises:
            UserError: if it is too large for a tar, or another sample has its key.
        """
        if sample.size_bytes > MAX_MEMBER_BYTES:
            raise UserError(
                f"{where}: the video {sample.file_name!r} is of {sample.size_bytes} bytes, shards hold less than 8 GiB"
            )
        reason = _bad_caption(sample.captions)
        if reason:
            self.skip(sample.file_name, reason)
            return
        if sample.key in self._places:
            raise UserError(
                f"{where}: {sample.file_name!r} and {self._places[sample.key]} have the same key {sample.key!r}; "
                "rename one, or list it once (a video may have a list of captions)"
            )
        self._places[sample.key] = repr(sample.file_name) + (f" ({where})" if where != self.tree.where() else "")
        self.samples.append(sample)

    def skip(self, file_name: str, reason: str) -> None:
        """Note something that is listed and not packed."""
        assert reason in SKIP_REASONS, reason
        self.skipped.append(Skipped(file_name=file_name, reason=reason))

    def checked(self) -> Listing:
        """Itself, sorted by key.

        Raises:
            UserError: if it is empty, a key stands for two videos, or too many files are missing.
        """
        root = self.tree.where()
        counts = Counter(sample.key for sample in self.samples)
        for key in (key for key, count in counts.items() if count > 1):
            both = " and ".join(repr(sample.file_name) for sample in self.samples if sample.key == key)
            raise UserError(f"{root}: {both} have the same key {key!r}; rename one, or list it once")
        unusable = [skipped for skipped in self.skipped if skipped.reason not in _HARMLESS]
        total = len(self.samples) + len(unusable)
        if len(unusable) > max(20, 0.05 * total) or (unusable and not self.samples):
            raise UserError(f"{root}: {len(unusable)} of {total} listed entries are {_summary(unusable)}")
        if not self.samples:
            raise UserError(f"{root} lists no videos")
        self.samples.sort(key=lambda sample: sample.key)
        self.skipped.sort(key=lambda skipped: (skipped.file_name, skipped.reason))
        return self


def readable(file_name: str) -> str:
    """A file's name as text: bytes of it that are no UTF-8 are written as ``\\xff``."""
    return os.fsencode(file_name).decode("utf-8", "backslashreplace")


def _summary(unusable: list[Skipped]) -> str:
    counts = Counter(skipped.reason for skipped in unusable)
    first = f"the first is {unusable[0].file_name!r}"
    if set(counts) == {"missing"}:
        return f"missing, {first}: is this the right folder?"
    question = "are these tars?" if "damaged_tar" in counts else "are these the right columns?"
    return f"unusable ({', '.join(f'{n} {reason}' for reason, n in counts.most_common())}), {first}: {question}"


def _bad_caption(captions: tuple[str, ...]) -> str | None:
    if any("\0" in caption for caption in captions):
        return "caption_nul"
    return "caption_too_long" if any(len(caption) > MAX_CAPTION_CHARACTERS for caption in captions) else None


# --- paths


def check_path(path: str, *, where: str, shown: str) -> None:
    """Refuse what is not a relative path that stays inside the dataset, and say what to do.

    Raises:
        UserError: for URLs, absolute paths, ``..``, NUL, and names no file system can have.
    """
    if "://" in path:
        raise UserError(
            f"{where}: the video {shown!r} is not a relative path inside the dataset but a URL, which is not fetched: "
            "download the videos and list their paths"
        )
    if not _is_relative(path):
        raise UserError(
            f"{where}: the video {shown!r} is not a relative path inside the dataset: list paths below its folder, "
            "without '..'"
        )


def _is_relative(path: str) -> bool:
    parts = PurePosixPath(path)
    if not path or parts.is_absolute() or ".." in parts.parts or "\0" in path:
        return False
    try:
        os.fsencode(path)
    except UnicodeEncodeError:  # JSON can hold half a surrogate pair, a file system cannot
        return False
    return True


# --- text and JSON


def read_text(tree: Tree, name: str) -> str:
    """A text file, without its byte order mark.

    Raises:
        UserError: if it is not UTF-8, naming the line, or not a regular file.
        FileNotFoundError: if it is not there.
    """
    data = tree.read(name)
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        problem = f"line {line} holds {data[error.start : error.end]!r}"
        raise UserError(f"{tree.where(name)} is not UTF-8: {problem}") from error


def read_json(tree: Tree, name: str) -> Any:
    """A JSON file's value, ``NaN`` (which is no JSON, but what Python writes of an empty cell) as None.

    Raises:
        UserError: if it is not JSON.
        FileNotFoundError: if it is not there.
    """
    return parse_json(read_text(tree, name), where=tree.where(name))


def parse_json(text: str, *, where: str) -> Any:
    """The value of some JSON.

    Raises:
        UserError: if it is none, or an object has a name twice: which one counts would be a guess.
    """
    try:
        return json.loads(text, parse_constant=lambda _: None, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON in UTF-8: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"an object has the name {twice!r} twice")
    return value


# --- rows


def captions_of(value: Any, *, where: str) -> tuple[str, ...]:
    """A caption column's value, a string or a list of them, as captions."""
    captions = (value,) if isinstance(value, str) else value
    if not isinstance(captions, (list, tuple)) or not all(isinstance(caption, str) for caption in captions):
        raise UserError(f"{where}: the caption must be a string or a list of strings, got {value!r:.200}")
    return tuple(captions)


def choose_column(columns: Iterable[str], *, wanted: str | None, among: tuple[str, ...], flag: str, where: str) -> str:
    """The column asked for, or the first that convention knows.

    Raises:
        UserError: if there is none, with those there are.
    """
    columns = list(columns)
    shown = f"it has {', '.join(map(repr, columns))}"[:500] if columns else "it has none"
    if wanted is not None:
        if wanted not in columns:
            raise UserError(f"{where}: there is no column {wanted!r} for {flag}; {shown}")
        return wanted
    found = next((name for name in among if name in columns), None)
    if found is None:
        raise UserError(f"{where}: no column is called {', '.join(among)}; {shown}: name it by {flag}")
    return found


def split_columns(
    row: Mapping[str, Any], *, where: str, video_column: str = "path", caption_column: str | None = None
) -> tuple[tuple[str, ...] | None, dict[str, Any], dict[str, Any]]:
    """A metadata row as (captions or None, declared, extra)."""
    column = caption_column or next((name for name in CAPTION_COLUMNS if name in row), None)
    captions = None if column is None else captions_of(row[column], where=where)
    row = {name: value for name, value in row.items() if not _is_bytes(value)}
    declared = {name: row[name] for name in DECLARED_COLUMNS if not _is_empty(row.get(name))}
    for name in ("fps", "num_frames", "duration"):
        value = declared.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise UserError(f"{where}: {name} must be a positive number, got {value!r:.200}")
    declared = {name: to_json_value(value) for name, value in declared.items()}
    known = {column, *DECLARED_COLUMNS, video_column}
    return captions, declared, {name: to_json_value(value) for name, value in row.items() if name not in known}


def to_json_value(value: Any) -> Any:
    """What JSON can hold of a value from Parquet or ``datasets``: infinities become None, bytes are left out."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Mapping):
        return {str(name): to_json_value(item) for name, item in value.items() if not _is_bytes(item)}
    if isinstance(value, (list, tuple)):
        return [to_json_value(item) for item in value if not _is_bytes(item)]
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, decimal.Decimal):
        return str(value)
    raise UserError(f"a column holds a {type(value).__name__}, which cannot be kept: leave that column out")


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_bytes(value: Any) -> bool:
    return isinstance(value, (bytes, bytearray, memoryview))
