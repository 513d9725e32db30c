"""The cache of encoded videos: what it gives is whole, and it keeps to its limit."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from streamprep.cache import Cache, describe_cache, open_cache
from streamprep.errors import UserError

KB = 1000


def video(number: int, size_bytes: int = 10 * KB) -> tuple[str, bytes]:
    data = random.Random(number).randbytes(size_bytes)
    return hashlib.sha256(data).hexdigest(), data


def used_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def kept(cache: Cache, numbers: range) -> list[int]:
    return [number for number in numbers if cache.get(video(number)[0]) is not None]


def test_what_was_put_is_found_again_also_by_another_process(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=1000 * KB)
    sha256, data = video(0)
    assert cache.get(sha256) is None
    cache.put(sha256, data)
    assert cache.get(sha256) == data
    assert pickle.loads(pickle.dumps(cache)).get(sha256) == data
    assert (cache.hits, cache.hit_bytes, cache.misses) == (1, len(data), 1)
    assert list(describe_cache(cache)) == ["cache: 1 video (10.0 kB) found, 1 video not"]


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: bytes(len(data)), lambda data: b""])
def test_a_damaged_file_is_not_given(tmp_path: Path, damage: object) -> None:
    cache = Cache(tmp_path, max_bytes=1000 * KB)
    sha256, data = video(0)
    cache.put(sha256, data)
    [path] = [path for path in tmp_path.rglob("*") if path.is_file()]
    path.write_bytes(damage(data))  # type: ignore[operator]
    assert cache.get(sha256) is None
    assert not path.exists()
    cache.put(sha256, data)
    assert cache.get(sha256) == data


def test_what_is_not_what_its_digest_says_is_not_kept(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=1000 * KB)
    cache.put(video(0)[0], video(1)[1])
    assert used_bytes(tmp_path) == 0


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=200 * KB)
    for number in range(18):
        cache.put(*video(number))
        path = cache._path(video(number)[0])
        os.utime(path, ns=(number, number))
    assert kept(cache, range(3)) == [0, 1, 2]  # used now
    cache.put(*video(100))
    cache.put(*video(101))
    left = kept(cache, range(18))
    assert left[:3] == [0, 1, 2]
    assert 3 not in left and 17 in left
    assert kept(cache, range(100, 102)) == [100, 101]


@pytest.mark.parametrize("size_bytes", [5 * KB, 30 * KB])
def test_there_is_never_more_than_the_limit(size_bytes: int, tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=300 * KB)
    for number in range(200):
        cache.put(*video(number, size_bytes))
        assert used_bytes(tmp_path) <= 300 * KB
    assert used_bytes(tmp_path) >= 0.8 * 300 * KB


def test_a_video_larger_than_the_cache_is_not_kept(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=100 * KB)
    cache.put(*video(0))
    cache.put(*video(1, 150 * KB))
    assert kept(cache, range(2)) == [0]


PUT_MANY = """
import sys
from streamprep.cache import Cache
sys.path.insert(0, sys.argv[3])
from test_cache import video
cache = Cache(sys.argv[1], max_bytes=int(sys.argv[2]))
for number in range(150):
    sha256, data = video(number % 60)
    found = cache.get(sha256)
    assert found in (None, data)
    if found is None:
        cache.put(sha256, data)
print(cache.hits, cache.misses)
"""


def test_several_processes_share_a_folder(tmp_path: Path) -> None:
    limit = 400 * KB
    command = [sys.executable, "-c", PUT_MANY, str(tmp_path), str(limit), str(Path(__file__).parent)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert sum(map(int, output.split())) == 150
    # Each looks after having added a fiftieth of the limit, or one video, without waiting for the others.
    assert used_bytes(tmp_path) <= limit + 3 * 10 * KB
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]


def test_threads_may_use_one(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=300 * KB)

    def use(number: int) -> bool:
        sha256, data = video(number % 40)
        cache.put(sha256, data)
        return cache.get(sha256) in (None, data)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(use, range(400)))
    assert used_bytes(tmp_path) <= 300 * KB


def test_no_cache_is_asked_for_without_a_folder() -> None:
    assert open_cache(None, 100.0) is None


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--cache-dir .*file: nothing can be written there: Not a directory"):
        open_cache(str(tmp_path / "file"), 1.0)


def test_more_than_the_disk_has_is_refused(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(UserError, match=r"--cache-dir .* has .* free, --cache-gb is .*: lower it"):
        open_cache(str(tmp_path), 2 * free / 1e9)


def test_a_cache_that_is_in_use_is_opened_on_a_disk_that_is_fuller_by_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Cache(tmp_path, max_bytes=1000 * KB).put(*video(0, 500 * KB))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=60 * KB))  # a disk that is nearly full
    assert open_cache(str(tmp_path), 0.001) is not None


def test_a_folder_that_is_removed_meanwhile_is_no_reason_to_stop(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", max_bytes=1000 * KB)
    shutil.rmtree(tmp_path / "cache")
    cache.put(*video(0))
    assert cache.get(video(0)[0]) is None
