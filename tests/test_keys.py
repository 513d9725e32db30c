from __future__ import annotations

import os
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from streamprep.keys import extension_of, key_of
from streamprep.shards import ustar_header

LONGEST_MEMBER = "#00.first_frame_latent.safetensors"

# Pieces that come close to what the escapes and the shortened names look like, and any name a file system can hold.
PIECES = st.lists(st.sampled_from(["a", "A", "b" * 41, "b" * 60, ".", "%", "%2E", "~", "0123456789abcdef", "é", " "]))
NAMES = (PIECES.map("".join) | st.binary(max_size=255).map(os.fsdecode) | st.text(max_size=63).map(str)).filter(
    lambda name: name not in ("", ".", "..") and not {"/", "\0"} & set(name) and _is_encodable(name)
)
STEMS = st.lists(NAMES, min_size=1, max_size=6).map("/".join).filter(lambda stem: not stem.endswith("/."))


def _is_encodable(name: str) -> bool:
    try:
        return len(os.fsencode(name)) <= 251
    except UnicodeEncodeError:
        return False


@given(st.lists(STEMS, max_size=8, unique=True))
@example(["v1.5", "v1.6", "v1%2E5", "v1"])
@example(["a" * 40 + "b" * 60, "a" * 40 + "c" * 60, key_of("a" * 40 + "b" * 60 + ".mp4")])
@example(["/".join(["folder"] * 30 + [name]) for name in "ab"])
def test_different_paths_have_different_keys(stems: list[str]) -> None:
    assert len({key_of(f"{stem}.mp4") for stem in stems}) == len(stems)


@given(STEMS)
def test_a_key_holds_no_dot_and_nothing_that_needs_quoting(stem: str) -> None:
    assert re.fullmatch("[A-Za-z0-9_/%~-]+", key_of(f"{stem}.mp4"))


@given(STEMS)
@example("/".join(["x" * 64] * 8))
@example("/".join(["x" * 63] * 2))
@example("/".join(["é" * 100] * 8))
def test_the_longest_member_of_any_sample_fits_a_ustar_header(stem: str) -> None:
    ustar_header(key_of(f"{stem}.mp4") + LONGEST_MEMBER, 0)


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("clip.mp4", "clip"),
        ("a/b/clip.mov", "a/b/clip"),
        ("./a//clip.mp4", "a/clip"),
        ("v1.5.mp4", "v1%2E5"),
        ("v1.6.mp4", "v1%2E6"),
        ("v1%2E5.mp4", "v1%252E5"),
        ("a b.mp4", "a%20b"),
        ("日.mp4", "%E6%97%A5"),
        (os.fsdecode(b"caf\xe9.mp4"), "caf%E9"),
        ("a~b.mp4", "a%7Eb"),
        ("folder.d/clip", "folder%2Ed/clip"),
        (".hidden.mp4", "%2Ehidden"),
        ("x" * 64 + ".mp4", "x" * 64),
        ("x" * 65 + ".mp4", "x" * 40 + "~9537c5fdf120482f"),
    ],
)
def test_the_key_of_a_path(path: str, key: str) -> None:
    assert key_of(path) == key


def test_a_long_part_is_shortened_and_a_long_path_as_a_whole() -> None:
    part, whole = key_of("a/" + "x" * 100 + "/b.mp4"), key_of("/".join(["folder"] * 30) + ".mp4")
    assert re.fullmatch("a/x{40}~[0-9a-f]{16}/b", part)
    assert re.fullmatch("(folder/){5}folde~[0-9a-f]{16}", whole)


@pytest.mark.parametrize(
    ("path", "extension"),
    [("a/b.MP4", "mp4"), ("v1.5.mov", "mov"), ("clip", ""), (".mp4", ""), ("mp4", ""), ("a.d/clip", ""), ("clip.", "")],
)
def test_the_extension_is_what_the_key_leaves_out(path: str, extension: str) -> None:
    assert extension_of(path) == extension
