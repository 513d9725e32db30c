from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Mapping

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from streamprep.shards import ustar_header
from streamprep.tars import BadTarError, open_member, read_tar, read_tar_samples

FILES = {"a.mp4": b"video" * 300, "a.txt": b"an apple", "sub/b.mp4": b"", "sub/b.json": b"{}"}


def made_by_python(files: Mapping[str, bytes], **options: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5  # which a pax header says
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def with_type(kind: bytes, **changes: object) -> bytes:
    """A tar with one entry of some type between two plain files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in "a.mp4", "odd.mp4", "b.mp4":
            info = tarfile.TarInfo(name)
            if name == "odd.mp4":
                info.type = kind
                for field, value in changes.items():
                    setattr(info, field, value)
            tar.addfile(info)
    return buffer.getvalue()


def read(data: bytes) -> dict[str, bytes]:
    return {member.name: data[member.offset : member.offset + member.size] for member in read_tar(io.BytesIO(data))}


def patched(data: bytes, offset: int, new: bytes) -> bytes:
    """With some bytes of the first header replaced, and its checksum right."""
    header = data[:offset] + new + data[offset + len(new) : 512]
    total = sum(header[:148]) + sum(header[156:]) + 8 * 32
    return header[:148] + b"%06o\0 " % total + header[156:] + data[512:]


# --- what is read


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_python_are_read(format: int) -> None:
    assert read(made_by_python(FILES, format=format)) == FILES


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize(
    "name", ["d/" * 150 + "a.mp4", "日本/🙂.mp4", "a b%.mp4", os.fsdecode(b"caf\xe9" * 40 + b".mp4")]
)
def test_long_and_odd_names_are_read(format: int, name: str) -> None:
    assert read(made_by_python({name: b"1", "b.mp4": b"2"}, format=format)) == {name: b"1", "b.mp4": b"2"}


def test_tars_of_webdataset_are_read() -> None:
    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer) as tar:
        tar.write({"__key__": "a/b", "mp4": b"video", "json": {"x": 1}, "txt": "日本"})
    assert read(buffer.getvalue()) == {"a/b.json": b'{"x": 1}', "a/b.mp4": b"video", "a/b.txt": "日本".encode()}


def test_folders_and_the_dot_before_names_are_passed_over(tmp_path: os.PathLike[str]) -> None:
    data = with_type(tarfile.DIRTYPE)
    assert read(data) == {"a.mp4": b"", "b.mp4": b""}
    assert read(made_by_python({"./a.mp4": b"1"})) == {"a.mp4": b"1"}


@given(
    files=st.dictionaries(
        st.from_regex(r"[a-z]{1,20}(/[a-z]{1,20}){0,9}\.mp4", fullmatch=True), st.binary(max_size=1500), max_size=6
    ),
    format=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_what_python_writes_is_what_is_read(files: dict[str, bytes], format: int) -> None:
    assert read(made_by_python(files, format=format)) == files


# --- what is refused


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a wrong checksum": (lambda data: data[:2048] + b"x" + data[2049:], "byte 2048 is damaged: its checksum is wrong"),
    "noise for a header": (lambda data: data[:2048] + b"\xff" * 512 + data[2560:], "the checksum of .* is no number"),
    "no end": (lambda data: data.rstrip(b"\0") + bytes(-len(data.rstrip(b"\0")) % 512), "it ends at byte"),
    "half an end": (lambda data: data.rstrip(b"\0") + bytes(-len(data.rstrip(b"\0")) % 512 + 512), "end is missing"),
    "a cut in a member": (lambda data: data[:700], "'a.mp4' of 1500 bytes goes beyond the end of the archive, at 700"),
    "a cut in a header": (lambda data: data[:2148], "it ends at byte 2148, where a header .* should be"),
    "two tars in one": (lambda data: data + data, "something follows its end"),
    "8 GiB": (lambda data: patched(data, 124, b"\x80" + bytes(10) + b"\x01"), "a member of 8 GiB or more"),
    "a size of -1": (lambda data: patched(data, 124, b"-0000000001\0"), "size in the header at byte 0 is no number"),
    "1 TB": (lambda data: patched(data, 124, b"77777777777\0"), "goes beyond the end of the archive"),
    "a compressed one": (lambda data: b"\x1f\x8b" + data[2:], "is damaged: its checksum is wrong"),
    "text": (lambda data: b"#!/bin/sh\n" * 100, "is no number"),
    "nothing": (lambda data: b"", "it ends at byte 0"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tar_is_refused_not_read_in_part(damage: str) -> None:
    make, message = DAMAGES[damage]
    with pytest.raises(BadTarError, match=message):
        read(make(made_by_python(FILES, format=tarfile.USTAR_FORMAT)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (with_type(tarfile.SYMTYPE, linkname="/etc/passwd"), "'odd.mp4' is no plain file"),
        (with_type(tarfile.LNKTYPE, linkname="a.mp4"), "'odd.mp4' is no plain file"),
        (with_type(tarfile.FIFOTYPE), "'odd.mp4' is no plain file"),
        (with_type(tarfile.CHRTYPE), "'odd.mp4' is no plain file"),
        (with_type(tarfile.GNUTYPE_SPARSE), "'odd.mp4' is no plain file"),
        (made_by_python({"../a.mp4": b""}), "'../a.mp4' leads out of the archive"),
        (made_by_python({"a/../../b.mp4": b""}), "leads out of the archive"),
        (made_by_python({"/etc/a.mp4": b""}), "'/etc/a.mp4' leads out of the archive"),
    ],
)
def test_what_no_shard_should_hold_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(BadTarError, match=message):
        read(data)


@pytest.mark.parametrize(
    ("keyword", "value"), [("size", "1"), ("GNU.sparse.major", "1"), ("GNU.sparse.realsize", "9"), ("linkpath", "x")]
)
def test_a_pax_header_that_changes_what_a_member_is_is_refused(keyword: str, value: str) -> None:
    info = tarfile.TarInfo("a.mp4")
    info.pax_headers = {keyword: value}
    data = info.tobuf(tarfile.PAX_FORMAT) + bytes(1024)
    with pytest.raises(BadTarError, match=f"a pax header sets '{keyword}'"):
        read(data)


@pytest.mark.parametrize("record", [b"", b"9 path=", b"99999 path=x\n", b"0 path=x\n", b"11 pathxxx\n", b"-1 path=x\n"])
def test_a_damaged_pax_header_is_refused(record: bytes) -> None:
    header = ustar_header("pax", len(record))
    data = patched(header, 156, b"x") + record + bytes(-len(record) % 512) + made_by_python({"a.mp4": b""})
    if record:
        with pytest.raises(BadTarError, match="a pax header is damaged"):
            read(data)
    else:
        assert read(data) == {"a.mp4": b""}


def test_a_name_of_a_gigabyte_is_not_read() -> None:
    data = patched(ustar_header("long", 2**30), 156, b"L") + bytes(1024)
    with pytest.raises(BadTarError, match="claims 1073741824 bytes for a name"):
        read(data)


@given(position=st.integers(0, 10_239), value=st.integers(0, 255))
def test_no_flipped_byte_loses_a_member_without_an_error(position: int, value: int) -> None:
    data = made_by_python(FILES, format=tarfile.USTAR_FORMAT)
    damaged = data[:position] + bytes([value]) + data[position + 1 :]
    try:
        found = read(damaged)
    except BadTarError:
        return
    assert list(found) == list(FILES)  # a byte of content may differ, which is a digest's business


# --- samples


def test_a_key_ends_at_the_first_dot_after_its_folder() -> None:
    samples = read_tar_samples(io.BytesIO(made_by_python({"a.b/c.d.MP4": b"", "a.b/c.txt": b"", "a.b/.hidden": b""})))
    assert [(sample.key, list(sample.members)) for sample in samples] == [("a.b/c", ["d.mp4", "txt"])]


def test_members_need_not_be_adjacent() -> None:
    # webdataset makes four half samples of these.
    samples = read_tar_samples(io.BytesIO(made_by_python({"a.mp4": b"", "b.mp4": b"", "a.txt": b"", "b.txt": b""})))
    assert [(sample.key, sorted(sample.members)) for sample in samples] == [
        ("a", ["mp4", "txt"]),
        ("b", ["mp4", "txt"]),
    ]


def test_a_member_twice_is_refused() -> None:
    once = made_by_python({"a.mp4": b"1"}, format=tarfile.USTAR_FORMAT)[:1024]
    with pytest.raises(BadTarError, match=r"there are two members 'a\.mp4'"):
        read_tar_samples(io.BytesIO(once + once + bytes(1024)))


def test_a_member_is_a_file_of_its_own() -> None:
    file = open_member(io.BytesIO(b"..video.."), 2, 5)
    assert (file.read(2), file.tell(), file.read(), file.read()) == (b"vi", 2, b"deo", b"")
    assert (file.seek(-2, os.SEEK_END), file.read()) == (3, b"eo")
    assert (file.seek(99), file.read()) == (99, b"")
