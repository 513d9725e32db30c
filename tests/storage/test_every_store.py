"""What every store promises: a folder, a bucket of every server there is for tests, and what is staged for the hub."""

from __future__ import annotations

import os
import pickle
import resource
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import obstore
import pytest
from object_stores import NewBucket, on_azurite, on_fake_gs, on_fake_hf, on_moto, on_seaweedfs

from streamprep.storage import FileReplaced, LocalStore, Store, open_store
from streamprep.storage.objects import ObjectStore
from streamprep.storage.places import connect

pytest_plugins = ["object_stores"]

OLD, NEW = b"old" * 100_000, b"new" * 90_000
LARGE = bytes(range(256)) * 2**16 + b"end"  # of several parts, and of two pieces

OPEN = "import sys; from streamprep.storage import open_store; store = open_store(sys.argv[1]); "
PUT = OPEN + "store.put('a/b', {data!r}, step='data')"
PUT_IF_ABSENT = PUT.replace(".put(", ".put_if_absent(")
PUBLISH = (
    OPEN
    + """
with store.new_file() as file:
    file.path.write_bytes({data!r})
    file.publish('a/b', step='data')
"""
)

HOLD = """
import sys
from streamprep.storage import open_store
with open_store(sys.argv[1]).new_file() as file:
    file.path.write_bytes(b"alive")
    print("holding", flush=True)
    sys.stdin.read()
    file.publish("alive", step="data")
"""

RACE = """
import os, sys
from streamprep.storage import open_store
store, me = open_store(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
sys.stdin.read(1)
print(*(n for n in range(20) if store.put_if_absent(f"prizes/{n}", me.encode(), step="record")))
"""


@pytest.fixture(params=["local", on_moto, on_seaweedfs, on_azurite, on_fake_gs, on_fake_hf])
def store(
    request: pytest.FixtureRequest, tmp_path: Path, new_bucket: NewBucket, monkeypatch: pytest.MonkeyPatch
) -> Store:
    if request.param == "local":
        return open_store(tmp_path / "store")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return open_store(f"{new_bucket(request.getfixturevalue(request.param))}/a prefix/store")


def files(store: Store) -> list[str]:
    """All that can be seen."""
    if isinstance(store, ObjectStore):
        return sorted(one["path"] for page in obstore.list(connect(store.place)) for one in page)
    root = store.local_path() or staged(store)
    paths = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    return sorted(path for path in paths if not path.startswith(".tmp/"))


def staged(store: Store) -> Path:
    """Where files lie that are for the hub."""
    folder = store.staged_in()
    assert folder is not None
    return folder / "files"


def unpublished(store: Store) -> list[Path]:
    """Files that are being built, or were when their process died."""
    root = store.spool.root if isinstance(store, ObjectStore) else store.local_path() or staged(store)
    return list((root / ".tmp").glob("*"))


def publish(store: Store, path: str, data: bytes, *, replace: bool = True) -> bool:
    with store.new_file() as file:
        file.path.write_bytes(data)
        return file.publish(path, step="data", replace=replace)


# --- writing is all or nothing


@pytest.mark.parametrize("verb", [PUT, PUT_IF_ABSENT, PUBLISH], ids=["put", "put_if_absent", "publish"])
@pytest.mark.parametrize(("crash_at", "seen"), [("data", []), ("data.after", ["a/b"])])
def test_a_killed_writer_leaves_a_whole_file_or_none(
    store: Store, run_python: Callable[..., subprocess.CompletedProcess[str]], verb: str, crash_at: str, seen: list[str]
) -> None:
    killed = run_python("-c", verb.format(data=NEW[:99]), store.url, crash_at=crash_at)
    assert killed.returncode == 137, killed.stderr
    assert files(store) == seen
    assert all(store.read(name) == NEW[:99] for name in seen)
    store.remove_unpublished()
    assert files(store) == seen
    assert unpublished(store) == []


@pytest.mark.parametrize(("crash_at", "seen"), [("data", OLD), ("data.after", NEW[:99])], ids=["old", "new"])
def test_a_writer_killed_while_replacing_leaves_the_old_file_or_the_new(
    store: Store, run_python: Callable[..., subprocess.CompletedProcess[str]], crash_at: str, seen: bytes
) -> None:
    store.put("a/b", OLD, step="data")
    assert run_python("-c", PUT.format(data=NEW[:99]), store.url, crash_at=crash_at).returncode == 137
    assert store.read("a/b") == seen


def test_a_reader_never_sees_half_a_file(store: Store) -> None:
    store.put("file", OLD, step="data")
    done = threading.Event()

    def replace() -> None:
        for number in range(30):
            store.put("file", (NEW, OLD)[number % 2], step="data")
        done.set()

    seen = set()
    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(replace)
        while not done.is_set() and not writer.done():
            seen.add(store.read("file"))
        writer.result()
    assert seen <= {OLD, NEW}


def test_leaving_without_publishing_leaves_nothing(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), store.new_file() as file:
        file.path.write_bytes(b"half")
        1 / 0  # noqa: B018
    assert files(store) == []
    assert unpublished(store) == []


@contextmanager
def no_file_larger_than(num_bytes: int) -> Iterator[None]:
    """As a full disk does it, writing more fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_leaves_what_was_there(store: Store) -> None:
    store.put("file", OLD, step="data")
    with no_file_larger_than(100_000), pytest.raises(OSError, match="too large"):
        publish(store, "file", NEW)
    with no_file_larger_than(100_000), pytest.raises(OSError, match="too large"):
        publish(store, "other", NEW, replace=False)
    assert files(store) == ["file"]
    assert store.read("file") == OLD
    assert unpublished(store) == []


# --- one winner


def test_put_if_absent_keeps_the_first(store: Store) -> None:
    assert store.put_if_absent("a/record", b"first", step="record") is True
    assert store.put_if_absent("a/record", b"second", step="record") is False
    assert store.read("a/record") == b"first"
    assert files(store) == ["a/record"]


def test_of_racing_processes_exactly_one_wins(store: Store, repo_root: Path) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, store.url, str(number)],
            cwd=repo_root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(8)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("g")
        racer.stdin.flush()
    won = {str(number): racer.communicate(timeout=60)[0].split() for number, racer in enumerate(racers)}
    assert sorted(prize for prizes in won.values() for prize in prizes) == sorted(map(str, range(20)))
    for winner, prizes in won.items():
        assert all(store.read(f"prizes/{prize}") == winner.encode() for prize in prizes)
    assert unpublished(store) == []


# --- what dead processes left


def test_leftovers_of_the_dead_go_and_files_of_the_living_stay(
    store: Store, repo_root: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    assert run_python("-c", PUBLISH.format(data=b"dead"), store.url, crash_at="data").returncode == 137
    living = subprocess.Popen(
        [sys.executable, "-c", HOLD, store.url],
        cwd=repo_root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert living.stdout is not None
    assert living.stdout.readline() == "holding\n"
    assert len(unpublished(store)) == 2
    store.remove_unpublished()
    (left,) = unpublished(store)
    assert left.read_bytes() == b"alive"
    living.communicate("", timeout=60)
    assert living.returncode == 0
    assert files(store) == ["alive"]
    assert unpublished(store) == []


def test_tidying_while_others_write_loses_nothing(store: Store) -> None:
    done = threading.Event()

    def tidy() -> None:
        while not done.is_set():
            store.remove_unpublished()

    with ThreadPoolExecutor(1) as pool:
        tidying = pool.submit(tidy)
        try:
            for number in range(25):
                publish(store, f"{number}", b"%d" % number)
        finally:
            done.set()
        tidying.result()
    assert [store.read(str(number)) for number in range(25)] == [b"%d" % number for number in range(25)]


# --- reading


def test_read_range_gives_exactly_what_was_asked_for(store: Store) -> None:
    store.put("file", b"0123456789", step="data")
    assert store.read_range("file", 3, 4) == b"3456"
    assert store.read_range("file", 10, 0) == b""
    with pytest.raises(EOFError, match="file has 10 bytes, 12 were expected"):
        store.read_range("file", 8, 4)
    with pytest.raises(EOFError):
        store.read_range("file", 20, 1)


def test_what_is_not_there_is_said_so(store: Store) -> None:
    store.put("a/there", b"", step="data")
    for use in (store.read, store.open, store.size_bytes, lambda path: store.read_range(path, 0, 1)):
        for name in ("a", "a/gone", "b"):
            if not (name == "a" and isinstance(store, LocalStore)):  # a folder there, a part of names in a bucket
                with pytest.raises(FileNotFoundError):
                    use(name)
    assert store.exists("a/there")
    assert not store.exists("a/gone")


def test_large_files_come_back_as_they_went_in(store: Store) -> None:
    publish(store, "large", LARGE)
    assert publish(store, "large", b"small", replace=False) is False
    assert store.size_bytes("large") == len(LARGE)
    assert store.read("large") == LARGE
    assert store.read_range("large", 5, len(LARGE) - 6) == LARGE[5:-1]
    with pytest.raises(EOFError):
        store.read_range("large", 1, len(LARGE))
    with pytest.raises(EOFError):
        store.read_range("large", len(LARGE), 1)


def test_an_open_file_is_read_like_any_other(store: Store) -> None:
    store.put("file", LARGE[: 3 * 2**19], step="data")
    with store.open("file") as file:
        assert file.seekable() and file.readable()
        assert file.read(10) == LARGE[:10]
        assert file.seek(-3, os.SEEK_END) == 3 * 2**19 - 3
        assert file.read() == LARGE[3 * 2**19 - 3 : 3 * 2**19]
        assert file.read(1) == b""
        assert file.seek(7) == file.tell() == 7
        assert file.seek(3, os.SEEK_CUR) == 10
        assert file.read() == LARGE[10 : 3 * 2**19]
        file.seek(0)
        assert b"".join(iter(lambda: file.read(50_001), b"")) == LARGE[: 3 * 2**19]


def test_a_store_can_be_sent_to_another_process(store: Store) -> None:
    store.put("file", b"1", step="data")
    sent = pickle.loads(pickle.dumps(store))
    assert sent.read("file") == b"1"
    assert sent.same_place(store)
    assert not sent.same_place(open_store(f"{store.url}/file"))


def test_a_store_that_keeps_its_promise_is_found_out_to(store: Store) -> None:
    assert store.check_create_only() is True
    assert files(store) == []


def test_list_gives_the_files_of_one_folder_by_name(store: Store) -> None:
    for name in ("a/2", "a/1", "a/b/3", "4"):
        store.put(name, name.encode() * 2, step="data")
    assert [(entry.path, entry.size_bytes) for entry in store.list("a")] == [("a/1", 6), ("a/2", 6)]
    assert [entry.path for entry in store.list("a", prefix="2")] == ["a/2"]
    assert [entry.path for entry in store.list()] == ["4"]
    assert list(store.list("nowhere")) == []


def test_walk_gives_the_files_at_any_depth(store: Store) -> None:
    for name in ("a/2", "a/1", "a/b/c/3", "a b/4", "5"):
        store.put(name, name.encode() * 2, step="data")
    found = {entry.path: entry for entry in store.walk()}
    assert sorted(found) == ["5", "a b/4", "a/1", "a/2", "a/b/c/3"]
    assert sorted(store.walk("a"), key=lambda entry: entry.path) == [found[name] for name in ("a/1", "a/2", "a/b/c/3")]
    assert {entry.path for entry in store.list("a")} < set(found)
    assert list(store.list("a")) == [found["a/1"], found["a/2"]]
    assert list(store.walk("nowhere")) == []
    with store.new_file() as file:
        file.path.write_bytes(b"not published")
        assert {entry.path for entry in store.walk()} == set(found)


def test_a_range_is_read_of_the_version_that_was_listed_or_not_at_all(store: Store) -> None:
    store.put("a/file", b"0123456789", step="data")
    store.put("a/empty", b"", step="data")
    if isinstance(store, LocalStore):
        os.utime(store.root / "a/file", (0, 0))
        os.utime(store.root / "a/empty", (0, 0))
    empty, file = store.list("a")
    assert [entry for entry in store.walk() if entry.path == file.path] == [file]
    assert store.read_range("a/file", 3, 4, version=file.version) == b"3456"
    assert store.read_range("a/empty", 0, 0, version=empty.version) == b""
    store.put("a/file", b"9876543210", step="data")
    store.put("a/empty", b"no more", step="data")
    for entry, size in ((file, 4), (empty, 0)):
        with pytest.raises(FileReplaced, match=rf"{entry.path}: it was replaced while it was read"):
            store.read_range(entry.path, 0, size, version=entry.version)
    assert store.read_range("a/file", 3, 4) == b"6543"


def test_a_version_is_that_of_all_parts(store: Store) -> None:
    publish(store, "large", LARGE)
    (entry,) = store.walk()
    assert store.read_range("large", 5, len(LARGE) - 6, version=entry.version) == LARGE[5:-1]


def test_a_files_version_changes_with_its_bytes(store: Store) -> None:
    store.put("file", b"1", step="data")
    if not isinstance(store, ObjectStore):
        os.utime((store.local_path() or staged(store)) / "file", (0, 0))
    (before,) = store.list()
    store.put("file", b"2", step="data")
    (after,) = store.list()
    assert before.version != after.version


def test_delete_of_what_is_gone_is_no_error(store: Store) -> None:
    store.put("file", b"", step="data")
    for _ in range(2):
        store.delete("file", step="delete")
        assert not store.exists("file")


# --- names


# No backslash: SeaweedFS takes it for a slash.
@pytest.mark.parametrize("name", ["a b", "ä", "x#y", "p%20q", "a+b", "q?x", "~t", "[x]", "quo'te\"", "st*r", "=&"])
def test_any_name_is_kept(store: Store, name: str) -> None:
    store.put(f"{name}/{name}", b"1", step="data")
    (entry,) = store.list(name)
    assert entry.path == f"{name}/{name}"
    assert store.read(entry.path) == b"1"
    store.delete(entry.path, step="delete")
    assert files(store) == []


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", ""])
def test_paths_outside_the_store_are_refused(store: Store, path: str) -> None:
    for use in (store.read, store.exists, store.open):
        with pytest.raises(ValueError, match="is not a path below"):
            use(path)
    with pytest.raises(ValueError, match="is not a path below"):
        store.put(path, b"", step="data")


# --- the hook all of this is tested with


def test_the_crash_point_can_be_a_later_pass(
    store: Store, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    three = "; ".join(
        ["import sys; from streamprep.storage import open_store; store = open_store(sys.argv[1])"]
        + [f"store.put('{number}', b'', step='data')" for number in range(3)]
    )
    assert run_python("-c", three, store.url, crash_at="data.after:2").returncode == 137
    assert files(store) == ["0", "1"]


def test_an_unknown_crash_point_is_refused(
    store: Store, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    refused = run_python("-c", PUT.format(data=b""), store.url, crash_at="nonsense")
    assert refused.returncode == 1
    assert "STREAMPREP_CRASH_AT=nonsense: no such point; one of pack, pack.after" in refused.stderr
