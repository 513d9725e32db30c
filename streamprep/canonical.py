"""JSON with one spelling for one value, so that equal things have equal bytes and digests."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def to_json(value: Any) -> bytes:
    """Sorted keys, no spaces, ASCII only (bytes that are no text stay escaped), no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def to_pretty_json(value: Any) -> bytes:
    """The same for files people look at."""
    return json.dumps(value, sort_keys=True, indent=1, allow_nan=False).encode("ascii") + b"\n"


def from_json(data: bytes) -> dict[str, Any]:
    """An object; `ValueError` if it is none."""
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object")
    return value


def digest(value: Any) -> str:
    """Sha256 of the canonical JSON, in hex."""
    return hashlib.sha256(to_json(value)).hexdigest()


def file_digest(path: Path) -> str:
    """Sha256 of a file, in hex, without holding it in memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def bytes_digest(data: bytes) -> str:
    """Sha256 of some bytes, in hex."""
    return hashlib.sha256(data).hexdigest()
