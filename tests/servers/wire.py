"""HTTP/1.1 as it is on the wire: heads, and bodies in the pieces in which they come."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from http import HTTPStatus

PIECE_BYTES = 256 * 1024
UNTIL_END = -1
"""Length of a body that ends with its connection."""


@dataclass(frozen=True, slots=True)
class Head:
    """The first line and the headers of a request or a reply."""

    raw: bytes
    first_line: str
    headers: dict[str, str]
    """By name in lower case. Of headers given twice, the last."""

    @property
    def status(self) -> int:
        """Of a reply."""
        return int(self.first_line.split(" ", 2)[1])

    @property
    def is_chunked(self) -> bool:
        return "chunked" in self.headers.get("transfer-encoding", "").lower()

    @property
    def closes(self) -> bool:
        """Whether the connection ends after this message, by what its head says."""
        said = self.headers.get("connection", "").lower()
        return "close" in said or ("HTTP/1.0" in self.first_line and "keep-alive" not in said)

    @property
    def content_length(self) -> int | None:
        length = self.headers.get("content-length")
        return None if length is None or self.is_chunked else int(length)


@dataclass(frozen=True, slots=True)
class Piece:
    """Some bytes of a body."""

    data: bytes
    is_content: bool = True
    """Otherwise the sizes and ends of chunks, which belong to nobody's data."""


async def read_head(reader: asyncio.StreamReader) -> Head | None:
    """The next message's head, or None where the connection ended between two messages."""
    try:
        raw = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return None
    first_line, *lines = raw.decode("latin-1").split("\r\n")
    headers = {}
    for line in filter(None, lines):
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    return Head(raw, first_line, headers)


def request_length(head: Head) -> int | None:
    """Bytes in a request's body; None where it comes in chunks."""
    return None if head.is_chunked else head.content_length or 0


def reply_length(head: Head, method: str) -> int | None:
    """Bytes in the body of the reply to a request by ``method``; None where it comes in chunks, or `UNTIL_END`."""
    if method == "HEAD" or head.status < 200 or head.status in (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED):
        return 0
    if head.is_chunked:
        return None
    return UNTIL_END if head.content_length is None else head.content_length


async def read_body(reader: asyncio.StreamReader, length: int | None) -> AsyncIterator[Piece]:
    """The pieces of a body of that length, as soon as they come.

    Raises:
        asyncio.IncompleteReadError: The connection ended before the body did.
    """
    if length is None:
        async for piece in _read_chunks(reader):
            yield piece
    elif length == UNTIL_END:
        while data := await reader.read(PIECE_BYTES):
            yield Piece(data)
    else:
        async for piece in _read_bytes(reader, length):
            yield piece


async def _read_bytes(reader: asyncio.StreamReader, length: int) -> AsyncIterator[Piece]:
    while length:
        data = await reader.read(min(length, PIECE_BYTES))
        if not data:
            raise asyncio.IncompleteReadError(b"", length)
        length -= len(data)
        yield Piece(data)


async def _read_chunks(reader: asyncio.StreamReader) -> AsyncIterator[Piece]:
    size = 1
    while size:
        line = await reader.readuntil(b"\r\n")
        yield Piece(line, is_content=False)
        size = int(re.split(rb"[;\r]", line)[0], 16)
        if size:
            async for piece in _read_bytes(reader, size):
                yield piece
            yield Piece(await reader.readexactly(2), is_content=False)
    while True:  # trailers, and the empty line at their end
        line = await reader.readuntil(b"\r\n")
        yield Piece(line, is_content=False)
        if line == b"\r\n":
            return
