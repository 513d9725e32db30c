"""Reading videos from shards: many at once from a bucket, in few requests, each clip once."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from making import make_rules
from object_stores import Faulty, NewBucket
from servers import Server
from servers.fault_proxy import FaultProxy
from servers.faults import Answer

from streamprep import read
from streamprep.cache import Cache
from streamprep.config import PackConfig
from streamprep.errors import BadSample
from streamprep.manifest import load_index, open_shards
from streamprep.pack import pack
from streamprep.plan import ClipPlan, SamplingRules, UnitPlan, plan_unit
from streamprep.read import Stretch, cut_into_stretches, read_units
from streamprep.shards import Member
from streamprep.storage import Store, open_store
from streamprep.types import DecodeRequest

pytest_plugins = ["object_stores"]

RULES = make_rules(max_height=32, max_width=48, num_frames=5)
NUM_VIDEOS = 24


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, make_video: Callable[..., Path]) -> Path:
    root = tmp_path_factory.mktemp("dataset")
    for number in range(NUM_VIDEOS):
        make_video(root / f"{number:02d}.mp4", seed=number, padding_bytes=100_000, num_frames=8)
        (root / f"{number:02d}.txt").write_text(f"Video {number}.")
    return root


@pytest.fixture(scope="module")
def shards(dataset: Path) -> Path:
    to = dataset.parent / f"{dataset.name}-shards"
    pack(PackConfig(dataset=str(dataset), shards=str(to), shard_size_mb=1, num_workers=1))
    return to


@pytest.fixture
def bucket(shards: Path, faulty: Faulty, moto_server: Server, new_bucket: NewBucket) -> tuple[Store, FaultProxy]:
    """The shards in a bucket behind a proxy."""
    url = new_bucket(moto_server)
    _, proxy = faulty(moto_server)
    store = open_store(url)
    for path in sorted(shards.iterdir()):
        if path.is_file():
            store.put(path.name, path.read_bytes(), step="data")
    return store, proxy


def units_of(store: Store | Path, rules: SamplingRules = RULES) -> list[UnitPlan]:
    opened = open_shards(store.url if not isinstance(store, Path) else str(store))
    return [
        plan_unit(f"{number:06d}", load_index(opened.store, info), rules)
        for number, info in enumerate(opened.manifest.shards)
    ]


def videos_of(dataset: Path, units: Sequence[UnitPlan]) -> list[tuple[str, str, bytes]]:
    return [
        (unit.id, clip.key, (dataset / clip.file_name.partition("#")[0]).read_bytes())
        for unit in units
        for clip in unit.clips
    ]


def read_all(store: Store, units: Sequence[UnitPlan], cache: Cache | None = None) -> list[tuple[str, str, object]]:
    return [(unit.id, clip.key, video) for unit, clip, video in read_units(store, units, cache)]


def test_a_bucket_gives_what_the_folder_does_in_few_requests(
    dataset: Path, shards: Path, bucket: tuple[Store, FaultProxy]
) -> None:
    store, _ = bucket
    units = units_of(shards)
    assert len(units) == 3
    expected = videos_of(dataset, units)
    assert read_all(open_store(shards), units) == expected
    assert read_all(store, units) == expected
    assert store.stats.requests["get"] == len(units)  # all videos of a shard lie close together


def test_the_windows_of_a_video_are_read_once(dataset: Path, shards: Path, bucket: tuple[Store, FaultProxy]) -> None:
    store, _ = bucket
    rules = dataclasses.replace(RULES, window="every", window_stride=1)
    units = units_of(shards, rules)
    expected = videos_of(dataset, units)
    assert len(expected) > 2 * NUM_VIDEOS
    assert read_all(store, units) == expected
    assert store.stats.bytes_read < 1.1 * sum(path.stat().st_size for path in shards.glob("*.tar"))


def test_what_is_in_the_cache_is_not_asked_for(
    dataset: Path, shards: Path, bucket: tuple[Store, FaultProxy], tmp_path: Path
) -> None:
    store, _ = bucket
    units = units_of(shards)
    cache = Cache(tmp_path / "cache", max_bytes=10**8)
    assert read_all(store, units, cache) == videos_of(dataset, units)
    assert (cache.hits, cache.misses) == (0, NUM_VIDEOS)
    asked = store.stats.requests.total()
    again = Cache(tmp_path / "cache", max_bytes=10**8)
    assert read_all(store, units, again) == videos_of(dataset, units)
    assert (again.hits, again.misses) == (NUM_VIDEOS, 0)
    assert store.stats.requests.total() == asked


def test_only_what_the_cache_has_lost_is_asked_for(
    dataset: Path, shards: Path, bucket: tuple[Store, FaultProxy], tmp_path: Path
) -> None:
    store, _ = bucket
    units = units_of(shards)
    cache = Cache(tmp_path / "cache", max_bytes=10**8)
    read_all(store, units, cache)
    lost = units[0].clips[2].video
    cache._path(lost.sha256).unlink()
    asked = store.stats.requests["get"]
    assert read_all(store, units, cache) == videos_of(dataset, units)
    assert store.stats.requests["get"] == asked + 1
    assert cache.get(lost.sha256) is not None


def test_a_shard_that_ends_too_soon_costs_the_clips_it_lacks(
    dataset: Path, shards: Path, bucket: tuple[Store, FaultProxy]
) -> None:
    store, _ = bucket
    units = units_of(shards)
    first = units[0]
    cut = first.clips[-2].video.offset + 1000
    store.put(first.shard, (shards / first.shard).read_bytes()[:cut], step="data")
    found = read_all(store, units)
    bad = [(key, video.reason) for _, key, video in found if isinstance(video, BadSample)]
    assert bad == [(clip.key, "read_error") for clip in first.clips[-2:]]
    good = [one for one in found if not isinstance(one[2], BadSample)]
    assert good == [one for one in videos_of(dataset, units) if one[1] not in dict(bad)]


def test_a_store_that_fails_is_no_bad_sample(shards: Path, bucket: tuple[Store, FaultProxy]) -> None:
    store, proxy = bucket
    units = units_of(shards)
    proxy.inject(rf"^GET .*/{units[1].shard}", Answer(403))
    with pytest.raises(OSError, match="refused"):
        read_all(store, units)


def test_an_item_is_there_while_the_next_unit_is_long_in_coming(shards: Path, bucket: tuple[Store, FaultProxy]) -> None:
    store, _ = bucket
    units, arrived = units_of(shards), threading.Event()

    def claimed() -> Iterator[UnitPlan]:
        yield units[0]
        assert arrived.wait(30)
        yield units[1]

    found = read_units(store, claimed())
    first = [next(found)[1].key for _ in units[0].clips]
    arrived.set()
    assert first + [clip.key for _, clip, _ in found] == [clip.key for unit in units[:2] for clip in unit.clips]


# --- stretches


def make_clip(key: str, offset: int, size: int) -> ClipPlan:
    return ClipPlan(
        key=key,
        file_name=f"{key}.mp4",
        rows=(),
        unusable=(),
        extra={},
        video=Member(offset=offset, size=size, sha256=f"{offset:064x}"),
        source_fps=1.0,
        media_type="video",
        request=DecodeRequest(
            sha256="", indices=(0,), timestamps=(0.0,), tolerance_seconds=0.1, height=8, width=8, max_pixels=10**6
        ),
    )  # fmt: skip


@given(
    videos=st.lists(
        st.tuples(st.integers(0, 20 * 2**20), st.integers(1, 9 * 2**20), st.integers(1, 3)), min_size=1, max_size=20
    )
)
def test_every_clip_lies_in_its_stretch_in_order_and_stretches_stay_small(videos: list[tuple[int, int, int]]) -> None:
    clips = [
        make_clip(f"{number}-{again}", offset, size)
        for number, (offset, size, times) in enumerate(videos)
        for again in range(times)
    ]
    unit = UnitPlan(id="000000", shard="000000.tar", clips=tuple(clips), dropped=(), bad=())
    stretches = list(cut_into_stretches(unit))
    assert [clip for stretch in stretches for clip in stretch.clips] == clips
    for stretch in stretches:
        assert_holds_its_clips(stretch)
        largest = max(clip.video.size for clip in stretch.clips)
        assert stretch.size_bytes <= max(read._TOGETHER_BYTES, largest)


def assert_holds_its_clips(stretch: Stretch) -> None:
    assert stretch.offset == min(clip.video.offset for clip in stretch.clips)
    assert stretch.end == max(clip.video.offset + clip.video.size for clip in stretch.clips)
