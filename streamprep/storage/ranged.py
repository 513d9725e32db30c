"""A file that is read in ranges, each a request: small ones here and there, large ones where it is read in order."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_FIRST_BYTES = 64 * 2**10
_MOST_BYTES = 8 * 2**20


class RangedFile(io.RawIOBase):
    """Seekable; keeps what was last fetched, and fetches twice as much each time that reading goes on where that ended.

    Args:
        size_bytes: Of the file.
        fetch: (offset, size) -> that many bytes; it is asked for none behind the end.
        name: For messages.
    """

    def __init__(self, size_bytes: int, fetch: Callable[[int, int], bytes], *, name: str) -> None:
        super().__init__()
        self._size, self._fetch, self.name = size_bytes, fetch, name
        self._position = 0
        self._held, self._held_from = memoryview(b""), 0
        self._window = _FIRST_BYTES

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Where reading goes on."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Read from elsewhere; nothing is fetched yet."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"{self.name}: there is nothing before the beginning")
        self._position = base + offset
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        """All that is asked for, unless the file ends before."""
        left = max(0, self._size - self._position)
        wanted = left if size is None or size < 0 else min(size, left)
        data = bytearray(wanted)
        done = 0
        while done < wanted:
            done += self.readinto(memoryview(data)[done:])
        return bytes(data)

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """As much as is held or comes in one request."""
        target = memoryview(buffer).cast("B")
        wanted = min(len(target), self._size - self._position)
        if wanted <= 0:
            return 0
        if not self._held_from <= self._position < self._held_from + len(self._held):
            self._fill(wanted)
        start = self._position - self._held_from
        data = self._held[start : start + wanted]
        target[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _fill(self, wanted: int) -> None:
        goes_on = bool(self._held) and self._position == self._held_from + len(self._held)
        self._window = min(2 * self._window, _MOST_BYTES) if goes_on else _FIRST_BYTES
        size = min(max(self._window, min(wanted, _MOST_BYTES)), self._size - self._position)
        self._held, self._held_from = memoryview(b""), self._position
        data = self._fetch(self._position, size)
        if len(data) < size:
            raise EOFError(f"{self.name} ends at {self._position + len(data)}, it has {self._size} bytes")
        self._held = memoryview(data)
