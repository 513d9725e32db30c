from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from streamprep.errors import BadSample
from streamprep.keys import key_of
from streamprep.shards import Member, ShardIndex, ShardSample, TarWriter, index_name, read_member, ustar_header
from streamprep.storage import open_store

CONTENTS = {
    "a.json": b"{}",
    "a.mp4": bytes(range(256)) * 5,
    "empty.mp4": b"",
    "block.mp4": b"x" * 512,
    f"{'p' * 60}/{'q' * 60}/long.txt": b"split at a slash",
    f"{'n' * 100}": b"a name of 100 bytes",
}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_tar(path: Path, contents: dict[str, bytes]) -> tuple[dict[str, Member], TarWriter]:
    with open(path, "wb") as file:
        tar = TarWriter(file)
        members = {
            name: tar.add(name, (data[:7], data[7:]), size=len(data), sha256=sha256(data))
            for name, data in contents.items()
        }
        tar.finish()
    return members, tar


def test_python_reads_what_we_write(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", CONTENTS)
    with tarfile.open(tmp_path / "0.tar", "r:", errorlevel=2) as tar:
        read = {info.name: (info, tar.extractfile(info)) for info in tar}
        assert {name: file.read() for name, (_, file) in read.items() if file} == CONTENTS
    for info, _ in read.values():
        assert (info.type, info.mode, info.mtime, info.uid, info.gid) == (tarfile.REGTYPE, 0o644, 0, 0, 0)
        assert (info.uname, info.gname, info.pax_headers) == ("", "", {})


@given(name=st.from_regex("[a-z%/]{1,60}/[a-z]{1,60}", fullmatch=True), size=st.integers(0, 8**11 - 1))
def test_python_reads_every_header_as_we_mean_it(name: str, size: int) -> None:
    info = tarfile.TarInfo.frombuf(ustar_header(name, size), "utf-8", "strict")
    assert (info.name, info.size, info.type) == (name, size, tarfile.REGTYPE)


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar")
def test_gnu_tar_lists_it_without_complaint(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", CONTENTS)
    listed = subprocess.run(["tar", "tvf", tmp_path / "0.tar"], capture_output=True, text=True, check=True)
    assert listed.stderr == ""
    assert [line.split()[-1] for line in listed.stdout.splitlines()] == list(CONTENTS)


def test_members_lie_where_the_writer_says(tmp_path: Path) -> None:
    members, tar = write_tar(tmp_path / "0.tar", CONTENTS)
    store = open_store(tmp_path)
    assert {name: read_member(store, "0.tar", member) for name, member in members.items()} == CONTENTS
    data = (tmp_path / "0.tar").read_bytes()
    assert tar.size_bytes == len(data)


def test_webdataset_reads_the_same_keys_and_bytes(tmp_path: Path) -> None:
    paths = ["a.mp4", "b/v1.5.mp4", "b/v1.6.mp4", "日 本.mp4", "x" * 200 + ".mp4", "/".join(["folder"] * 40) + ".mp4"]
    samples = {
        key_of(path): {"json": b'{"fps":1}', "mp4": path.encode(), "txt": b"\x80no pickle, no text"} for path in paths
    }
    members = {f"{key}.{extension}": data for key, sample in samples.items() for extension, data in sample.items()}
    write_tar(tmp_path / "0.tar", members)
    reader = webdataset.WebDataset(str(tmp_path / "0.tar"), shardshuffle=False)  # not decoded: bytes as they are
    read = {sample["__key__"]: {name: sample[name] for name in ("json", "mp4", "txt")} for sample in reader}
    assert read == samples
    assert list(read) == list(samples)


def test_a_member_that_changed_size_is_an_error() -> None:
    for chunks in [b"12"], [b"12", b"34"]:
        with pytest.raises(OSError, match=rf"a\.mp4 had {sum(map(len, chunks))} bytes when it was packed, 3 when"):
            TarWriter(io.BytesIO()).add("a.mp4", chunks, size=3, sha256="")


def test_a_member_over_8_gib_is_refused() -> None:
    ustar_header("a.mp4", 2**33 - 1)
    with pytest.raises(ValueError, match=r"a\.mp4 has 8589934592 bytes; a ustar member holds at most 8589934591"):
        ustar_header("a.mp4", 2**33)


@pytest.mark.parametrize("name", ["n" * 101, "p" * 156 + "/n", "p" * 30 + "/" + "n" * 101])
def test_a_name_that_does_not_fit_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="does not fit a ustar header"):
        ustar_header(name, 0)


def test_a_truncated_tar_makes_the_sample_bad(tmp_path: Path) -> None:
    members, _ = write_tar(tmp_path / "0.tar", CONTENTS)
    member = members["a.mp4"]
    with open(tmp_path / "0.tar", "r+b") as file:
        file.truncate(member.offset + member.size - 1)
    with pytest.raises(BadSample, match=r"read_error: 0\.tar: 0\.tar has") as caught:
        read_member(open_store(tmp_path), "0.tar", member)
    assert (caught.value.reason, caught.value.stage) == ("read_error", "read")
    assert read_member(open_store(tmp_path), "0.tar", members["a.json"]) == b"{}"


# --- the index

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
MEMBERS = st.builds(Member, offset=st.integers(0), size=st.integers(0), sha256=st.text("0123456789abcdef"))
SAMPLES = st.builds(
    ShardSample,
    key=st.text(),
    members=st.dictionaries(st.text(), MEMBERS, max_size=3),
    metadata=st.dictionaries(st.text(), JSON, max_size=3),
)
INDEXES = st.builds(
    ShardIndex,
    name=st.text(),
    size_bytes=st.integers(0),
    samples=st.lists(SAMPLES, max_size=3).map(tuple),
)


@given(INDEXES)
def test_an_index_comes_back_as_it_was(index: ShardIndex) -> None:
    data = index.to_json()
    assert ShardIndex.from_json(data) == index
    assert ShardIndex.from_json(data).to_json() == data


def test_an_index_has_a_line_for_each_sample() -> None:
    sample = ShardSample(key="a", members={}, metadata={"captions": ["two\nlines"]})
    lines = ShardIndex(name="0.tar", size_bytes=0, samples=(sample, sample)).to_json().splitlines()
    assert len(lines) == 4
    assert json.loads(lines[2])["metadata"] == {"captions": ["two\nlines"]}


@pytest.mark.parametrize("data", [b"[]", b"{}", b'{"format":"streamprep-shard/2"}'])
def test_another_json_is_no_index(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a shard index of format streamprep-shard/1"):
        ShardIndex.from_json(data)


def test_the_index_lies_beside_the_tar() -> None:
    assert index_name("000012.tar") == "000012.json"
