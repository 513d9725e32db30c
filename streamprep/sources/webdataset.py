"""Tars of another program: plain WebDataset, video2dataset's ``mp4 + txt + json``, cosmos-curate's.

Every ``.tar`` below the folder is read, at any depth. A sample's caption is its ``.txt``; else its ``.json`` has it, in
a field ``cap``, ``caption``, ``captions``, ``text`` or ``prompt``, or ``--caption-column``; or, as cosmos-curate writes
it, in fields ``*_caption`` of its first window. That one's ``metas/PART/N.tar`` goes with ``video/PART/N.tar``, and its
pickles are left alone. Other fields are kept. What the ``.json`` says of the video is not held against it: it is often
of the video that a clip was cut from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from errno import ENOENT
from functools import partial
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from streamprep.errors import UserError
from streamprep.keys import key_of
from streamprep.sources import folder
from streamprep.sources._files import (
    CAPTION_COLUMNS,
    IMAGE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    Listing,
    Skipped,
    SourceOptions,
    captions_of,
    parse_json,
    readable,
    to_json_value,
)
from streamprep.sources._tree import Tree, in_parallel
from streamprep.tars import BadTarError, TarMember, TarSample, read_tar_samples
from streamprep.types import RawSample

OPTIONS = ("caption_column",)
_COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")
_MAX_TEXT_BYTES = 2**24
_MAX_NAMED = 10


def matches(tree: Tree) -> bool:
    """Whether the folder has tars, and no videos or images outside of them."""
    return tree.file is None and not folder.matches(tree) and next(_tars(tree), None) is not None


def read_samples(tree: Tree, options: SourceOptions) -> Listing:
    """List the samples of all tars.

    Raises:
        UserError: naming the tars and what is wrong with them, if any is damaged.
    """
    listing = Listing(tree, open_video=OpenTarMember(tree))
    damaged: dict[str, BadTarError] = {}
    names = sorted(_tars(tree))
    with closing(in_parallel(tree, partial(_read_tar, tree, options), names)) as tars:
        for name, found in zip(names, tars, strict=True):
            if isinstance(found, BadTarError):
                damaged[name] = found
            else:
                _add_tar(listing, found)
    if damaged and not options.skip_damaged:
        shown = "\n  ".join(f"{tree.where(name)}: {problem}" for name, problem in list(damaged.items())[:_MAX_NAMED])
        more = f"\n  and {len(damaged) - _MAX_NAMED} more" if len(damaged) > _MAX_NAMED else ""
        raise UserError(
            f"{len(damaged)} of the tars cannot be used; make them again, move them away, or leave them out by "
            f"`streamprep index --skip-damaged`:\n  {shown}{more}"
        )
    for name in damaged:
        listing.skip(name, "damaged_tar")
    return listing


@dataclass(frozen=True, slots=True)
class OpenTarMember:
    """Opens samples that are members of a tar."""

    tree: Tree

    def __call__(self, sample: RawSample) -> BinaryIO:
        """The member's bytes."""
        version = sample.version.partition("-")[2]
        return self.tree.open_video(sample.path, size_bytes=sample.size_bytes, version=version, offset=sample.position)

    @property
    def at_once(self) -> int:
        """As many as the tars' place bears."""
        return self.tree.at_once


def _tars(tree: Tree) -> Iterator[str]:
    """Names of all tars, without those that only go with others."""
    for name in tree.walk(what="tars"):
        if name.lower().endswith(_COMPRESSED):
            raise UserError(
                f"{tree.where(name)} is compressed, so no video in it can be found without reading all: unpack it to "
                ".tar"
            )
        if name.endswith(".tar") and not _goes_with_another(tree, PurePosixPath(name)):
            tree.status(name)  # may refuse it
            yield name


def _goes_with_another(tree: Tree, tar: PurePosixPath) -> bool:
    return any(
        tree.is_file(str(PurePosixPath(*tar.parts[:at], "video", *tar.parts[at + 1 :])))
        for at, part in enumerate(tar.parts[:-1])
        if part in ("metas", "t5_xxl")
    )


def _companion(tree: Tree, tar: PurePosixPath) -> str | None:
    """The tar with the metadata of cosmos-curate's tar of videos."""
    for at, part in enumerate(tar.parts[:-1]):
        metas = str(PurePosixPath(*tar.parts[:at], "metas", *tar.parts[at + 1 :]))
        if part == "video" and tree.is_file(metas):
            return metas
    return None


@dataclass(frozen=True, slots=True)
class _Found:
    """A sample of a tar, or why it is none."""

    sample: RawSample | Skipped
    where: str


def _read_tar(tree: Tree, options: SourceOptions, tar: str) -> list[_Found] | BadTarError:
    """The samples of a tar, or what is wrong with it."""
    status = tree.status(tar)
    if status is None:
        raise FileNotFoundError(ENOENT, "it was there a moment ago", tree.where(tar))
    version = f"{status.size_bytes}-{status.version}"
    try:
        companion = _companion(tree, PurePosixPath(tar))
        metadata = {} if companion is None else _read_companion(tree, companion, options)
        with tree.open(tar) as file:
            return [
                _find_video(file, tree.where(tar), tar, sample, metadata, version, options)
                for sample in read_tar_samples(file)
            ]
    except BadTarError as error:
        return error


def _read_companion(tree: Tree, tar: str, options: SourceOptions) -> dict[str, tuple[tuple[str, ...], dict[str, Any]]]:
    tree.status(tar)  # may refuse it
    with tree.open(tar) as file:
        try:
            return {
                sample.key: _describe(file, sample, options, where=f"{tree.where(tar)}, {sample.key!r}")
                for sample in read_tar_samples(file)
            }
        except BadTarError as error:
            raise BadTarError(f"its metadata, {tar}: {error}") from error


def _find_video(
    file: BinaryIO,
    shown_tar: str,
    tar: str,
    sample: TarSample,
    metadata: Mapping[str, tuple[tuple[str, ...], dict[str, Any]]],
    version: str,
    options: SourceOptions,
) -> _Found:
    prefix = f"{tar.removesuffix('.tar')}/" if options.prefix_keys else ""
    shown = readable(f"{prefix}{sample.key}")
    where = f"{shown_tar}, {sample.key!r}"
    videos = [extension for extension in sample.members if extension in VIDEO_EXTENSIONS]
    videos = videos or [extension for extension in sample.members if extension in IMAGE_EXTENSIONS]
    if len(videos) != 1:
        return _Found(Skipped(file_name=shown, reason="several_videos" if videos else "no_video"), where)
    video = sample.members[videos[0]]
    try:
        captions, extra = _describe(file, sample, options, where=where)
    except UserError:
        return _Found(Skipped(file_name=shown, reason="unreadable_caption"), where)
    if sample.key in metadata:
        captions, extra = captions or metadata[sample.key][0], {**metadata[sample.key][1], **extra}
    return _Found(
        RawSample(
            key=key_of(f"{prefix}{sample.key}.{videos[0]}"),
            file_name=f"{shown}.{videos[0]}",
            path=tar,
            position=video.offset,
            size_bytes=video.size,
            version=version,
            captions=captions,
            extra=extra,
        ),
        where,
    )


def _add_tar(listing: Listing, found: list[_Found]) -> None:
    for one in found:
        if isinstance(one.sample, Skipped):
            listing.skip(one.sample.file_name, one.sample.reason)
            continue
        try:
            listing.add_sample(one.sample, where=one.where)
        except UserError as error:
            raise UserError(f"{error}; `streamprep index --prefix-keys` puts the tar's name before each key") from error


def _describe(
    file: BinaryIO, sample: TarSample, options: SourceOptions, *, where: str
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """(captions, further fields) of a sample, from its ``.txt`` and ``.json``."""
    row: Any = {}
    if "json" in sample.members:
        row = parse_json(_text(file, sample.members["json"], where=where), where=where)
        if not isinstance(row, dict):
            raise UserError(f"{where}: its .json must hold an object, got a {type(row).__name__}")
    captions, column = _captions(row, options, where=where)
    if "txt" in sample.members and options.caption_column is None:
        text = _text(file, sample.members["txt"], where=where).strip()
        captions = (text,) if text else captions
    return captions, {name: to_json_value(value) for name, value in row.items() if name != column}


def _captions(row: dict[str, Any], options: SourceOptions, *, where: str) -> tuple[tuple[str, ...], str | None]:
    columns = (options.caption_column,) if options.caption_column is not None else CAPTION_COLUMNS
    column = next((name for name in columns if row.get(name) is not None), None)
    if column is not None:
        return captions_of(row[column], where=where), column
    windows = row.get("windows")
    if isinstance(windows, list) and windows and isinstance(windows[0], dict):
        wanted = options.caption_column
        names = [name for name in windows[0] if (name == wanted if wanted else name.endswith("_caption"))]
        return captions_of([windows[0][name] for name in names], where=where), None
    return (), None


def _text(file: BinaryIO, member: TarMember, *, where: str) -> str:
    if member.size > _MAX_TEXT_BYTES:
        raise UserError(f"{where}: {member.name!r} is of {member.size} bytes")
    file.seek(member.offset)
    try:
        return file.read(member.size).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: {member.name!r} is not UTF-8: {error}") from error
