from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from streamprep.storage.local import LocalStore, _publish_if_absent, _rename_if_absent


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def test_a_file_in_the_place_of_a_folder_is_named(store: LocalStore) -> None:
    store.put("a", b"", step="data")
    with pytest.raises(NotADirectoryError, match=r"a file stands where a folder is needed.*/a"):
        store.put("a/b", b"", step="data")
    assert [entry.path for entry in store.list()] == ["a"]


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


def test_free_space_is_known_before_the_folder_exists(store: LocalStore) -> None:
    assert not store.root.exists()
    assert abs(store.free_bytes() - shutil.disk_usage(store.root.parent).free) < 2**30
