"""Keys: a sample's name in shards, plans, records and outputs.

A key is the video's relative path without extension. Bytes outside ``[A-Za-z0-9_/-]`` are percent-encoded: WebDataset
cuts a member's name at its first dot, so ``v1.5.mp4`` and ``v1.6.mp4`` would share the key ``v1``. Parts that would not
fit a ustar header are shortened with a digest. Different paths give different keys; the original path is
``file_name``.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from pathlib import PurePosixPath

_MAX_COMPONENT_BYTES = 64
_MAX_KEY_BYTES = 150
# ustar holds a name of 100 bytes and a folder prefix of 155, cut at a slash. With these limits a member name of
# key + 34 bytes ("#00.first_frame_latent.safetensors") always splits: a component and its extension fit the
# name, and what is before them fits the prefix.
_UNSAFE = re.compile(rb"[^A-Za-z0-9_/-]")


def key_of(path: str) -> str:
    """The key of a video at a relative path.

    Args:
        path: Relative, with ``/``; bytes that are no UTF-8 as surrogates, as `os.fsdecode` gives them.
    """
    stem, _ = _split_extension(path)
    quoted = _UNSAFE.sub(lambda match: b"%%%02X" % match[0][0], os.fsencode(stem)).decode("ascii")
    key = "/".join(_shorten(part, _MAX_COMPONENT_BYTES) for part in quoted.split("/"))
    return _shorten(key, _MAX_KEY_BYTES)


def extension_of(path: str) -> str:
    """What `key_of` takes away: the extension in lower case, without the dot; empty if there is none."""
    _, extension = _split_extension(path)
    return extension[1:].lower()


def _split_extension(path: str) -> tuple[str, str]:
    # What pathlib takes for a suffix depends on the version of Python.
    return posixpath.splitext(str(PurePosixPath(path)))


def short_key(key: str) -> str:
    """A key of at most 57 characters that stands for one, wherever that does not fit."""
    return f"{key[:40]}~{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def _shorten(name: str, limit: int) -> str:
    return name if len(name) <= limit else short_key(name)
