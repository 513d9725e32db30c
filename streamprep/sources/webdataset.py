"""Tars of another program: plain WebDataset, video2dataset's ``mp4 + txt + json``, cosmos-curate's.

Every ``.tar`` below the folder is read, at any depth. A sample's caption is its ``.txt``; else its ``.json`` has it, in
a field ``cap``, ``caption``, ``captions``, ``text`` or ``prompt``, or ``--caption-column``; or, as cosmos-curate writes
it, in fields ``*_caption`` of its first window. That one's ``metas/PART/N.tar`` goes with ``video/PART/N.tar``, and its
pickles are left alone. Other fields are kept. What the ``.json`` says of the video is not held against it: it is often
of the video that a clip was cut from.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from streamprep.errors import UserError
from streamprep.keys import key_of
from streamprep.sources import folder
from streamprep.sources._files import (
    CAPTION_COLUMNS,
    IMAGE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    Listing,
    SourceOptions,
    captions_of,
    open_regular,
    parse_json,
    status_inside,
    to_json_value,
)
from streamprep.tars import BadTarError, TarMember, TarSample, open_member, read_tar_samples
from streamprep.types import RawSample

OPTIONS = ("caption_column",)
_COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")
_MAX_TEXT_BYTES = 2**24
_MAX_NAMED = 10


def matches(root: Path) -> bool:
    """Whether the folder has tars, and no videos or images outside of them."""
    return root.is_dir() and not folder.matches(root) and next(_tars(root, SourceOptions()), None) is not None


def read_samples(root: Path, options: SourceOptions) -> Listing:
    """List the samples of all tars.

    Raises:
        UserError: naming the tars and what is wrong with them, if any is damaged.
    """
    listing = Listing(root, open_video=OpenTarMember(root), links_into=options.links_into)
    damaged: dict[str, str] = {}
    for name in sorted(_tars(root, options)):
        try:
            _add_tar(listing, name, options)
        except BadTarError as error:
            damaged[name] = str(error)
    if damaged and not options.skip_damaged:
        shown = "\n  ".join(f"{root / name}: {problem}" for name, problem in list(damaged.items())[:_MAX_NAMED])
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

    root: Path

    def __call__(self, sample: RawSample) -> BinaryIO:
        """The member's bytes."""
        assert sample.position is not None
        return open_member(open_regular(self.root / sample.path), sample.position, sample.size_bytes)


def _tars(root: Path, options: SourceOptions) -> Iterator[str]:
    """Names relative to the root, without those that only go with others."""
    for inside, subfolders, files in os.walk(root, onerror=_raise):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in (name for name in subfolders if Path(inside, name).is_symlink()):
            raise UserError(f"{Path(inside, name)} is a link to a folder, which is not followed: move the tars in")
        for name in sorted(name for name in files if not name.startswith(".")):
            path = Path(inside, name)
            if name.lower().endswith(_COMPRESSED):
                raise UserError(
                    f"{path} is compressed, so no video in it can be found without reading all: unpack it to .tar"
                )
            relative = path.relative_to(root)
            if name.endswith(".tar") and not _goes_with_another(root, relative):
                status_inside(root, str(relative), links_into=options.links_into)
                yield str(relative)


def _raise(error: OSError) -> None:
    raise error


def _goes_with_another(root: Path, tar: Path) -> bool:
    return any(
        (root / Path(*tar.parts[:at], "video", *tar.parts[at + 1 :])).is_file()
        for at, part in enumerate(tar.parts[:-1])
        if part in ("metas", "t5_xxl")
    )


def _companion(root: Path, tar: Path) -> Path | None:
    """The tar with the metadata of cosmos-curate's tar of videos."""
    for at, part in enumerate(tar.parts[:-1]):
        metas = Path(*tar.parts[:at], "metas", *tar.parts[at + 1 :])
        if part == "video" and (root / metas).is_file():
            return metas
    return None


def _add_tar(listing: Listing, tar: str, options: SourceOptions) -> None:
    root = listing.root
    status = (root / tar).stat()
    version = f"{status.st_size}-{listing.version_of(tar, status)}"
    companion = _companion(root, Path(tar))
    metadata = {} if companion is None else _read_companion(listing, companion, options)
    with open_regular(root / tar) as file:
        for sample in read_tar_samples(file):
            _add_sample(listing, file, tar, sample, metadata, version, options)


def _read_companion(
    listing: Listing, tar: Path, options: SourceOptions
) -> dict[str, tuple[tuple[str, ...], dict[str, Any]]]:
    status_inside(listing.root, str(tar), links_into=listing.links_into)
    with open_regular(listing.root / tar) as file:
        try:
            return {
                sample.key: _describe(file, sample, options, where=f"{listing.root / tar}, {sample.key!r}")
                for sample in read_tar_samples(file)
            }
        except BadTarError as error:
            raise BadTarError(f"its metadata, {tar}: {error}") from error


def _add_sample(
    listing: Listing,
    file: BinaryIO,
    tar: str,
    sample: TarSample,
    metadata: Mapping[str, tuple[tuple[str, ...], dict[str, Any]]],
    version: str,
    options: SourceOptions,
) -> None:
    prefix = f"{tar.removesuffix('.tar')}/" if options.prefix_keys else ""
    shown = os.fsencode(f"{prefix}{sample.key}").decode("utf-8", "backslashreplace")
    videos = [extension for extension in sample.members if extension in VIDEO_EXTENSIONS]
    videos = videos or [extension for extension in sample.members if extension in IMAGE_EXTENSIONS]
    if len(videos) != 1:
        listing.skip(shown, "several_videos" if videos else "no_video")
        return
    video = sample.members[videos[0]]
    where = f"{listing.root / tar}, {sample.key!r}"
    try:
        captions, extra = _describe(file, sample, options, where=where)
    except UserError:
        listing.skip(shown, "unreadable_caption")
        return
    if sample.key in metadata:
        captions, extra = captions or metadata[sample.key][0], {**metadata[sample.key][1], **extra}
    name = f"{prefix}{sample.key}.{videos[0]}"
    try:
        listing.add_sample(
            RawSample(
                key=key_of(name),
                file_name=f"{shown}.{videos[0]}",
                path=tar,
                position=video.offset,
                size_bytes=video.size,
                version=version,
                captions=captions,
                extra=extra,
            ),
            where=where,
        )
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
