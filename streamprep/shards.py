"""The shard: a plain ustar archive of samples, and beside it an index that knows every byte.

``000000.tar`` holds for each sample, one after the other, ``KEY.json`` (what is known of the video), ``KEY.mp4`` (the
original bytes with their original extension) and ``KEY.txt`` (the first caption), as any WebDataset reader expects.
``000000.json`` holds where each member lies, its sha256, and again the content of every ``KEY.json``: whoever only
decides never opens a tar.

Times and owners are zero: the same samples give the same bytes. Only plain ustar headers are written: the pax headers
of other writers cost 1 kB a member and a second parse in every reader.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from streamprep import canonical
from streamprep.errors import BadSample
from streamprep.storage import Store

_BLOCK = 512
MAX_MEMBER_BYTES = 8**11 - 1  # ustar writes sizes as 11 octal digits
_END_OF_ARCHIVE = bytes(2 * _BLOCK)
_CHUNK_BYTES = 2**20
_BEFORE_SAMPLES = b',"samples":[\n'

FORMAT = "streamprep-shard/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One file inside a tar."""

    offset: int
    """Of its first byte of content."""
    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSample:
    """A sample as a shard's index describes it."""

    key: str
    members: Mapping[str, Member]
    """By extension, without the dot."""
    metadata: Mapping[str, Any]
    """The content of its ``KEY.json``."""

    @property
    def video(self) -> Member:
        """The member with the encoded video."""
        return self.members[self.metadata["extension"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardIndex:
    """Everything in one shard but the bytes."""

    name: str
    """Of the tar."""
    size_bytes: int
    samples: tuple[ShardSample, ...]
    foreign: bool = False
    """Whether another program wrote the tar: then only the members listed are known, not its headers."""

    def to_json(self) -> bytes:
        """The file beside the tar; one sample a line."""
        head = {"format": FORMAT, "shard": self.name, "size_bytes": self.size_bytes}
        if self.foreign:
            head["foreign"] = True
        lines = [
            canonical.to_json(
                {
                    "key": sample.key,
                    "members": {ext: [m.offset, m.size, m.sha256] for ext, m in sample.members.items()},
                    "metadata": dict(sample.metadata),
                }
            )
            for sample in self.samples
        ]
        return canonical.to_json(head)[:-1] + _BEFORE_SAMPLES + b",\n".join(lines) + b"\n]}\n"

    @classmethod
    def from_json(cls, data: bytes) -> ShardIndex:
        """The reverse of `to_json`; `ValueError` if it is not one."""
        value = json.loads(data)
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise ValueError(f"not a shard index of format {FORMAT}")
        return cls(
            name=value["shard"],
            size_bytes=value["size_bytes"],
            foreign=value.get("foreign", False),
            samples=tuple(
                ShardSample(
                    key=sample["key"],
                    members={
                        ext: Member(offset=offset, size=size, sha256=sha256)
                        for ext, (offset, size, sha256) in sample["members"].items()
                    },
                    metadata=sample["metadata"],
                )
                for sample in value["samples"]
            ),
        )


@dataclass
class TarWriter:
    """Writes ustar members to a file, noting where each lies."""

    file: BinaryIO
    """Unbuffered or not; written from its present position on."""
    size_bytes: int = 0

    def add(self, name: str, chunks: Iterable[bytes | memoryview], *, size: int, sha256: str) -> Member:
        """Append one member.

        Args:
            name: Its path in the archive.
            chunks: Its content.
            size: Bytes of all chunks together.
            sha256: Of the content, in hex.
        """
        return Member(offset=self.append(name, chunks, size=size), size=size, sha256=sha256)

    def append(self, name: str, chunks: Iterable[bytes | memoryview], *, size: int) -> int:
        """The same for content whose digest nobody asks for.

        Returns:
            Where its first byte is.
        """
        self._write(ustar_header(name, size))
        offset, written = self.size_bytes, 0
        for chunk in chunks:
            self._write(chunk)
            written += len(chunk)
        if written != size:
            raise OSError(f"{name} had {written} bytes when it was packed, {size} when it was listed")
        self._write(bytes(-size % _BLOCK))
        return offset

    def finish(self) -> None:
        """Write the end marker."""
        self._write(_END_OF_ARCHIVE)
        self.file.flush()

    def _write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.size_bytes += len(data)


def ustar_header(name: str, size: int) -> bytes:
    """The 512 bytes before a regular file (POSIX.1-1988 ustar), with owner and time zero."""
    if size > MAX_MEMBER_BYTES:
        raise ValueError(f"{name} has {size} bytes; a ustar member holds at most {MAX_MEMBER_BYTES} (8 GiB)")
    prefix, base = _split_name(name.encode("ascii"))
    header = b"".join(
        (
            base.ljust(100, b"\0"),
            b"0000644\0" + b"0000000\0" + b"0000000\0",  # mode, user, group
            b"%011o\0" % size,
            b"%011o\0" % 0,  # time
            b" " * 8,  # checksum, counted as spaces
            b"0",  # a regular file
            bytes(100),  # link name
            b"ustar\0" + b"00",
            bytes(32 + 32),  # names of user and group
            b"0000000\0" + b"0000000\0",  # device
            prefix.ljust(155, b"\0"),
            bytes(12),
        )
    )
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


def fits_ustar(name: str) -> bool:
    """Whether a member can be called so."""
    try:
        _split_name(name.encode("ascii"))
    except ValueError:
        return False
    return True


def _split_name(name: bytes) -> tuple[bytes, bytes]:
    if len(name) <= 100:
        return b"", name
    cut = name.find(b"/", len(name) - 101)
    if not 0 < cut <= 155:
        raise ValueError(f"{name.decode()!r} does not fit a ustar header")
    return name[:cut], name[cut + 1 :]


def check_shard(file: BinaryIO, index: ShardIndex) -> Iterator[str]:
    """Compare every byte of a tar with its index, and say what differs.

    There is nothing in a tar of ours that its index does not determine: a header follows from name and size, content
    from its sha256, the rest is zeros. So no digest of the whole is kept: taking it made packing half as long again.
    What lies between the listed members of a foreign tar decides nothing, and is not looked at.
    """
    file.seek(0, os.SEEK_END)
    if file.tell() != index.size_bytes:
        yield f"{index.name}: {file.tell()} bytes, the index says {index.size_bytes}"
        return
    end = 0
    for sample in index.samples:
        for extension, member in sorted(sample.members.items(), key=lambda item: item[1].offset):
            name = f"{sample.key}.{extension}"
            if index.foreign:
                if _range_digest(file, member.offset, member.size) != member.sha256:
                    yield f"{index.name}: {name} is damaged"
                continue
            file.seek(end)
            if member.offset != end + _BLOCK or file.read(_BLOCK) != ustar_header(name, member.size):
                yield f"{index.name}: the header of {name} is damaged"
            if _range_digest(file, member.offset, member.size) != member.sha256:
                yield f"{index.name}: {name} is damaged"
            end = member.offset + member.size + -member.size % _BLOCK
            padding = file.read(-member.size % _BLOCK)
            if any(padding):
                yield f"{index.name}: the padding after {name} is damaged"
    if not index.foreign and file.read() != _END_OF_ARCHIVE:
        yield f"{index.name}: its end is damaged"


def _range_digest(file: BinaryIO, offset: int, size: int) -> str:
    digest = hashlib.sha256()
    file.seek(offset)
    while size and (chunk := file.read(min(size, _CHUNK_BYTES))):
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest()


def index_name(shard: str) -> str:
    """``000000.tar`` -> ``000000.json``."""
    return f"{shard.removesuffix('.tar')}.json"


def indexed_size_bytes(store: Store, shard: str) -> int | None:
    """Of a tar, as its index says in its first line; None if there is none, or something else has its name."""
    try:
        with store.open(index_name(shard)) as file:
            head = json.loads(file.readline().removesuffix(_BEFORE_SAMPLES) + b"}")
    except (FileNotFoundError, ValueError):
        return None
    return head["size_bytes"] if isinstance(head, dict) and head.get("format") == FORMAT else None


def read_member(store: Store, shard: str, member: Member) -> bytes:
    """One member's content, by one ranged read.

    Raises:
        BadSample: if the tar ends before it does. Whether the bytes are the right ones shows when they are hashed.
    """
    try:
        return store.read_range(shard, member.offset, member.size)
    except EOFError as error:
        raise BadSample("read_error", f"{shard}: {error}", stage="read") from error
