"""A strict reader of tar archives that other programs wrote, and the samples in them.

Readers that forgive lose data without a word: Python's and webdataset's end quietly at a damaged header, and what
followed is gone. Here a header must have its checksum, an archive its end, and a name must be one that stays inside.
Nothing is extracted or unpickled. Read are ustar, GNU (long names) and pax headers, as far as they name plain files:
webdataset and video2dataset write pax headers for their fractional times.

A sample is what has one name up to the first dot after its folder, as WebDataset has it.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import BinaryIO

from streamprep.shards import MAX_MEMBER_BYTES

_BLOCK = 512
_MAX_HEADER_BYTES = 2**20
_HARMLESS_PAX = re.compile(
    r"(mtime|atime|ctime|uid|gid|uname|gname|comment|charset|hdrcharset|LIBARCHIVE\..*|SCHILY\..*)"
)
_SAMPLE_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)


class BadTarError(ValueError):
    """The archive is damaged, or holds what no shard should; the message says what and where."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TarMember:
    """A file in an archive."""

    name: str
    """Bytes that are no UTF-8 as surrogates, as `os.fsdecode` gives them."""
    offset: int
    """Of its first byte of content."""
    size: int


@dataclass(slots=True, kw_only=True)
class TarSample:
    """The members that share a key."""

    key: str
    members: dict[str, TarMember] = field(default_factory=dict)
    """By extension: what follows the first dot, in lower case."""


def read_tar_samples(file: BinaryIO) -> list[TarSample]:
    """The samples of an archive, in its order; members need not be adjacent.

    Raises:
        BadTarError: if the archive is damaged, or a sample has two members of one extension.
    """
    samples: dict[str, TarSample] = {}
    for member in read_tar(file):
        found = _SAMPLE_NAME.fullmatch(member.name)
        if found is None:  # a README, a hidden file
            continue
        sample = samples.setdefault(found[1], TarSample(key=found[1]))
        extension = found[2].lower()
        if extension in sample.members:
            raise BadTarError(f"there are two members {member.name!r}")
        sample.members[extension] = member
    return list(samples.values())


def read_tar(file: BinaryIO) -> Iterator[TarMember]:
    """The plain files of an archive, from its headers alone.

    Raises:
        BadTarError: for a wrong checksum, a missing end, a link, device or sparse file, a name that leads out, ...
    """
    size_bytes = file.seek(0, os.SEEK_END)
    position, long_name = 0, None
    while True:
        header = _read(file, position, _BLOCK, size_bytes, what="a header or the end of the archive")
        if not any(header):
            _check_end(file, position, size_bytes)
            if long_name is not None:
                raise BadTarError("the last header names a file that is not there")
            return
        kind, size = _check_header(header, position)
        content = position + _BLOCK
        if kind in b"xgL":
            data = _read_small(file, content, size, size_bytes)
            long_name = _long_name(kind, data, long_name)
        elif kind in b"0\0":
            name = _checked_name(long_name if long_name is not None else _short_name(header))
            if content + size > size_bytes:
                raise BadTarError(f"{name!r} of {size} bytes goes beyond the end of the archive, at {size_bytes}")
            if not name.endswith("/"):  # so some old programs mark a folder
                yield TarMember(name=name, offset=content, size=size)
            long_name = None
        elif kind == b"5":
            size, long_name = 0, None
        else:
            raise BadTarError(f"{_short_name(header)!r} is no plain file (type {kind!r}: a link, a device, or sparse)")
        position = content + size + -size % _BLOCK


def open_member(file: BinaryIO, member_offset: int, size: int) -> BinaryIO:
    """A part of an open file as a file; closing it closes both."""
    return io.BufferedReader(_Part(file, member_offset, size))


class _Part(io.RawIOBase):
    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._position = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        view = memoryview(buffer)[: max(0, self._size - self._position)]
        self._file.seek(self._offset + self._position)
        count: int = self._file.readinto(view)  # type: ignore[attr-defined]
        self._position += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


# --- headers


def _check_header(header: bytes, position: int) -> tuple[bytes, int]:
    """The type of an entry and its size."""
    where = f"the header at byte {position}"
    checksum = _octal(header[148:156], what=f"the checksum of {where}")
    if checksum != sum(header[:148]) + sum(header[156:]) + 8 * 0x20:
        raise BadTarError(f"{where} is damaged: its checksum is wrong")
    if header[124] & 0x80:
        raise BadTarError(f"{where} is of a member of 8 GiB or more: no shard should have one")
    size = _octal(header[124:136], what=f"the size in {where}")
    assert size <= MAX_MEMBER_BYTES  # 11 octal digits
    return header[156:157], size


def _octal(digits: bytes, *, what: str) -> int:
    text = digits.rstrip(b"\0 ").lstrip(b" ")
    if not re.fullmatch(rb"[0-7]{1,11}", text):
        raise BadTarError(f"{what} is no number: {digits!r}")
    return int(text, 8)


def _short_name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return os.fsdecode(prefix + b"/" + name if prefix else name)


def _long_name(kind: bytes, data: bytes, name: str | None) -> str | None:
    """The name of the entry that follows, where an extra header gives it."""
    if kind == b"L":
        return os.fsdecode(data.partition(b"\0")[0])
    for keyword, value in _pax_records(data).items():
        if keyword == "path" and kind == b"x":
            name = os.fsdecode(value)
        elif not _HARMLESS_PAX.fullmatch(keyword):
            raise BadTarError(f"a pax header sets {keyword!r}, which changes where or what a member is")
    return name


def _pax_records(data: bytes) -> Mapping[str, bytes]:
    records = {}
    while data:
        length, space, _ = data.partition(b" ")
        if not space or not re.fullmatch(rb"[1-9][0-9]{0,6}", length) or int(length) > len(data):
            raise BadTarError(f"a pax header is damaged: {data[:40]!r}")
        record, data = data[len(length) + 1 : int(length)], data[int(length) :]
        keyword, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise BadTarError(f"a pax header is damaged: {record[:40]!r}")
        records[os.fsdecode(keyword)] = value[:-1]
    return records


def _checked_name(name: str) -> str:
    parts = PurePosixPath(name)
    if not name or parts.is_absolute() or ".." in parts.parts or "\0" in name:
        raise BadTarError(f"the member {name!r} leads out of the archive, or has no name")
    return name.removeprefix("./")


# --- bytes


def _read(file: BinaryIO, position: int, size: int, size_bytes: int, *, what: str) -> bytes:
    file.seek(position)
    data = file.read(size)
    if len(data) < size:
        raise BadTarError(f"it ends at byte {size_bytes}, where {what} should be: it was cut off, or never finished")
    return data


def _read_small(file: BinaryIO, position: int, size: int, size_bytes: int) -> bytes:
    if size > _MAX_HEADER_BYTES:
        raise BadTarError(f"the header at byte {position - _BLOCK} claims {size} bytes for a name")
    return _read(file, position, size, size_bytes, what="a long name")


def _check_end(file: BinaryIO, position: int, size_bytes: int) -> None:
    rest = size_bytes - position
    if rest < 2 * _BLOCK:
        raise BadTarError("its end is missing (two blocks of zeros): it was cut off, or never finished")
    file.seek(position)
    while chunk := file.read(2**20):
        if any(chunk):
            raise BadTarError(f"something follows its end at byte {position}: two archives in one?")
