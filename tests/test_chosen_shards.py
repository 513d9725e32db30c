"""SHARDS as some tars of a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from jobs import EncodeJob
from object_stores import NewBucket
from servers import Server

from streamprep import canonical
from streamprep.errors import UserError
from streamprep.manifest import MANIFEST, Manifest, ShardInfo, load_indexes, open_shards
from streamprep.shards import ShardIndex, index_name
from streamprep.storage import open_store

pytest_plugins = ["jobs", "object_stores"]

NewJob = Callable[..., EncodeJob]


def write_shards(url: str, number: int) -> None:
    """Shards without samples, and their manifest."""
    store, infos = open_store(url), []
    for name in (f"{n:06d}.tar" for n in range(number)):
        index = ShardIndex(name=name, size_bytes=1024, samples=()).to_json()
        store.put(name, bytes(1024), step="shard")
        store.put(index_name(name), index, step="shard_index")
        digest = canonical.bytes_digest(index)
        infos.append(ShardInfo(name=name, num_samples=0, size_bytes=1024, index_sha256=digest))
    store.put(MANIFEST, Manifest(shards=tuple(infos)).to_json(), step="manifest")


@pytest.mark.parametrize(
    ("pattern", "numbers"),
    [
        ("", range(12)),
        ("/{000000..000003}.tar", range(4)),
        ("/{000007,000002}.tar", [2, 7]),
        ("/0000{00..11..5}.tar", [0, 5, 10]),
        ("/000004.tar", [4]),
    ],
)
def test_a_pattern_chooses_tars_in_the_order_of_the_manifest(pattern: str, numbers: list[int], tmp_path: Path) -> None:
    write_shards(str(tmp_path), 12)
    shards = open_shards(f"{tmp_path}{pattern}")
    assert [info.name for info in shards.manifest.shards] == [f"{number:06d}.tar" for number in numbers]
    assert shards.url == f"{tmp_path}{pattern}"
    assert shards.store.url == str(tmp_path)


def test_in_the_present_folder_a_name_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(str(tmp_path), 2)
    monkeypatch.chdir(tmp_path)
    assert [info.name for info in open_shards("{000001..000001}.tar").manifest.shards] == ["000001.tar"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("/{000010..000013}.tar", r"names no 000012.tar, and 1 more of the pattern; it has 12, from 000000.tar to"),
        ("/{000010..000013.tar", "its braces do not match: Unbalanced braces"),
        ("/{000000..000013}", "'000000' is no tar; a pattern is like {000000..000099}.tar"),
        ("/{000000}.tar", r"'\{000000\}.tar' is no tar"),
        ("/{a,b}/{000000..000003}.tar", "a pattern may have braces in the tars' names, not in the folder's"),
        ("/{0..99999999}.tar", "stands for more than 1000000 tars"),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_refused(pattern: str, message: str, tmp_path: Path) -> None:
    write_shards(str(tmp_path), 12)
    with pytest.raises(UserError, match=message):
        open_shards(f"{tmp_path}{pattern}")


def test_a_bucket_takes_patterns_too_and_gives_many_indexes_in_order(
    moto_server: Server, new_bucket: NewBucket
) -> None:
    url = f"{new_bucket(moto_server)}/shards"
    write_shards(url, 40)
    shards = open_shards(f"{url}/{{000003..000035}}.tar")
    found = [(info.name, index.name) for info, index in load_indexes(shards.store, shards.manifest.shards)]
    assert found == [(f"{number:06d}.tar",) * 2 for number in range(3, 36)]


def test_a_job_of_some_shards_is_those_and_is_retried_as_those(new_job: NewJob, shards: Path) -> None:
    some = Path(f"{shards}/{{000000,000003}}.tar")
    encoded = new_job(some)
    process = encoded.run(serial=True)
    assert process.code == 0, process.output
    assert [unit.shard for unit in encoded.job.plan.units] == ["000000.tar", "000003.tar"]
    assert encoded.job.plan.shards == str(some)
    assert encoded.problems() == []
    other = encoded.run(shards=shards, serial=True)
    assert other.code == 2
    assert "num_shards" in other.output
    retried = encoded.retry(serial=True)
    assert retried.code == 0, retried.output
    assert "still bad" in retried.output
