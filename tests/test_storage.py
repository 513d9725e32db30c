from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from streamprep.errors import UserError
from streamprep.storage import Store, _publish_if_absent, _rename_if_absent, open_store

OLD, NEW = b"old" * 100_000, b"new" * 90_000

PUT = "import sys; from streamprep.storage import open_store; open_store(sys.argv[1]).put('a/b', {data!r}, step='data')"
PUT_IF_ABSENT = PUT.replace(".put(", ".put_if_absent(")

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


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


def files(store: Store) -> list[str]:
    return sorted(path.relative_to(store.root).as_posix() for path in store.root.rglob("*") if path.is_file())


# --- writing is all or nothing


@pytest.mark.parametrize("verb", [PUT, PUT_IF_ABSENT], ids=["put", "put_if_absent"])
@pytest.mark.parametrize(("crash_at", "seen"), [("data", []), ("data.after", ["a/b"])])
def test_a_killed_writer_leaves_a_whole_file_or_none(
    store: Store, run_python: Callable[..., subprocess.CompletedProcess[str]], verb: str, crash_at: str, seen: list[str]
) -> None:
    killed = run_python("-c", verb.format(data=NEW[:99]), store.root, crash_at=crash_at)
    assert killed.returncode == 137, killed.stderr
    assert [name for name in files(store) if not name.startswith(".tmp/")] == seen
    assert all(store.read(name) == NEW[:99] for name in seen)
    store.remove_unpublished()
    assert files(store) == seen
    assert not list((store.root / ".tmp").glob("*"))


@pytest.mark.parametrize(("crash_at", "seen"), [("data", OLD), ("data.after", NEW[:99])], ids=["old", "new"])
def test_a_writer_killed_while_replacing_leaves_the_old_file_or_the_new(
    store: Store, run_python: Callable[..., subprocess.CompletedProcess[str]], crash_at: str, seen: bytes
) -> None:
    store.put("a/b", OLD, step="data")
    assert run_python("-c", PUT.format(data=NEW[:99]), store.root, crash_at=crash_at).returncode == 137
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
    assert not list((store.root / ".tmp").glob("*"))


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
        store.put("file", NEW, step="data")
    with no_file_larger_than(100_000), pytest.raises(OSError, match="too large"):
        store.put_if_absent("other", NEW, step="record")
    assert files(store) == ["file"]
    assert store.read("file") == OLD


def test_a_file_in_the_place_of_a_folder_is_named(store: Store) -> None:
    store.put("a", b"", step="data")
    with pytest.raises(NotADirectoryError, match=r"a file stands where a folder is needed.*/a"):
        store.put("a/b", b"", step="data")
    assert files(store) == ["a"]


# --- one winner


def test_put_if_absent_keeps_the_first(store: Store) -> None:
    assert store.put_if_absent("a/record", b"first", step="record") is True
    assert store.put_if_absent("a/record", b"second", step="record") is False
    assert store.read("a/record") == b"first"
    assert files(store) == ["a/record"]


def test_of_racing_processes_exactly_one_wins(store: Store, repo_root: Path) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, store.root, str(number)],
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
    assert not list((store.root / ".tmp").glob("*"))


@pytest.mark.parametrize("publish", [_publish_if_absent, _rename_if_absent])
def test_of_racing_threads_exactly_one_publishes(tmp_path: Path, publish: Callable[[Path, Path], bool]) -> None:
    start = threading.Barrier(8)

    def race(number: int, prize: int) -> bool:
        source = tmp_path / f"{prize}.{number}"
        source.write_text(str(number))
        start.wait()
        return publish(source, tmp_path / str(prize))

    with ThreadPoolExecutor(8) as pool:
        for prize in range(20):
            won = list(pool.map(race, range(8), [prize] * 8))
            assert won.count(True) == 1
            assert (tmp_path / str(prize)).read_text() == str(won.index(True))


def test_a_file_system_that_cannot_create_only_if_absent_is_named(tmp_path: Path) -> None:
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system")
    (tmp_path / "source").touch()
    with pytest.raises(OSError, match=r"cannot create a file only if it is absent.*streamprep-test-target"):
        _publish_if_absent(tmp_path / "source", elsewhere / "streamprep-test-target")


# --- what dead processes left


def test_leftovers_of_the_dead_go_and_files_of_the_living_stay(
    store: Store, repo_root: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    assert run_python("-c", PUT.format(data=b"dead"), store.root, crash_at="data").returncode == 137
    living = subprocess.Popen(
        [sys.executable, "-c", HOLD, store.root],
        cwd=repo_root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert living.stdout is not None
    assert living.stdout.readline() == "holding\n"
    assert len(files(store)) == 2
    store.remove_unpublished()
    (left,) = files(store)
    assert store.read(left) == b"alive"
    living.communicate("", timeout=60)
    assert living.returncode == 0
    assert files(store) == ["alive"]
    assert not list((store.root / ".tmp").glob("*"))


def test_tidying_while_others_write_loses_nothing(store: Store) -> None:
    done = threading.Event()

    def tidy() -> None:
        while not done.is_set():
            store.remove_unpublished()

    with ThreadPoolExecutor(1) as pool:
        tidying = pool.submit(tidy)
        try:
            for number in range(25):
                store.put(f"{number}", b"%d" % number, step="data")
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


def test_list_gives_the_files_of_one_folder_by_name(store: Store) -> None:
    for name in ("a/2", "a/1", "a/b/3", "4"):
        store.put(name, name.encode() * 2, step="data")
    assert [(entry.path, entry.size_bytes) for entry in store.list("a")] == [("a/1", 6), ("a/2", 6)]
    assert [entry.path for entry in store.list()] == ["4"]
    assert list(store.list("nowhere")) == []


def test_a_files_version_changes_with_its_bytes(store: Store) -> None:
    store.put("file", b"1", step="data")
    os.utime(store.root / "file", (0, 0))
    (before,) = store.list()
    store.put("file", b"2", step="data")
    (after,) = store.list()
    assert before.version != after.version


def test_delete_of_what_is_gone_is_no_error(store: Store) -> None:
    store.put("file", b"", step="data")
    for _ in range(2):
        store.delete("file", step="delete")
        assert not store.exists("file")


def test_free_space_is_known_before_the_folder_exists(store: Store) -> None:
    assert not store.root.exists()
    assert abs(store.free_bytes() - shutil.disk_usage(store.root.parent).free) < 2**30


# --- names


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", ""])
def test_paths_outside_the_store_are_refused(store: Store, path: str) -> None:
    for use in (store.read, store.exists, store.open):
        with pytest.raises(ValueError, match="is not a path below"):
            use(path)
    with pytest.raises(ValueError, match="is not a path below"):
        store.put(path, b"", step="data")


@pytest.mark.parametrize(
    "url",
    ["s3://bucket/x", "hf://a/b", "memory://", "http://[x", "file://host/x", "file://", "file://x", "file:///a#b"],
)
def test_urls_of_anything_but_a_local_folder_are_refused(url: str) -> None:
    with pytest.raises(UserError, match="only local folders can be read and written"):
        open_store(url)


def test_an_empty_path_is_refused() -> None:
    with pytest.raises(UserError, match="an empty path names no folder"):
        open_store("")


def test_file_urls_and_relative_paths_name_local_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_store(f"file://{tmp_path}/a%20b").root == tmp_path / "a b"
    assert open_store(f"file://localhost{tmp_path}/a").root == tmp_path / "a"
    assert open_store("x/../a").url == str(tmp_path / "a")


# --- the hook all of this is tested with


def test_the_crash_point_can_be_a_later_pass(
    store: Store, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    three = "; ".join(
        ["import sys; from streamprep.storage import open_store; store = open_store(sys.argv[1])"]
        + [f"store.put('{number}', b'', step='data')" for number in range(3)]
    )
    assert run_python("-c", three, store.root, crash_at="data.after:2").returncode == 137
    assert files(store) == ["0", "1"]


def test_an_unknown_crash_point_is_refused(
    store: Store, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    refused = run_python("-c", PUT.format(data=b""), store.root, crash_at="nonsense")
    assert refused.returncode == 1
    assert "STREAMPREP_CRASH_AT=nonsense: no such point; one of pack, pack.after" in refused.stderr
