"""Shards -> clips: each planned clip exactly once, however ranks and workers share them."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from making import make_rules
from torch import Tensor
from torch.utils.data import DataLoader

from streamprep.config import PackConfig
from streamprep.decode import decode_clip
from streamprep.decoder import InlineDecoder
from streamprep.errors import BadSample
from streamprep.manifest import load_index, load_manifest, open_shards
from streamprep.pack import pack
from streamprep.plan import UnitPlan, plan_unit
from streamprep.storage import open_store
from streamprep.stream import ClipStream, decode_units
from streamprep.types import Clip

RULES = make_rules(max_height=32, max_width=48, num_frames=5)
GOOD = [f"good{number}" for number in range(7)]
HALF_A_SHARD = 400_000


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, make_video: Callable[..., Path]) -> Path:
    """Five shards of 1 MiB, two videos in each: seven good ones and one of every other kind."""
    root = tmp_path_factory.mktemp("stream")
    videos = root / "dataset"
    for number, key in enumerate([*GOOD, "captionless", "undecodable", "short"]):
        make_video(
            videos / f"{key}.mp4", seed=number, padding_bytes=HALF_A_SHARD, num_frames=3 if key == "short" else 8
        )
        if key != "captionless":
            (videos / f"{key}.txt").write_text(f"Caption of {key}.")
    undecodable = bytearray((videos / "undecodable.mp4").read_bytes())
    start, end = undecodable.index(b"mdat") + 4, undecodable.index(b"moov")
    undecodable[start:end] = bytes(end - start)
    (videos / "undecodable.mp4").write_bytes(undecodable)
    (videos / "no_video.mp4").write_bytes(b"<html>404</html>")
    (videos / "no_video.txt").write_text("No video.")
    pack(PackConfig(dataset=str(videos), shards=str(root / "shards"), shard_size_mb=1, num_workers=1))
    assert len(load_manifest(open_store(root / "shards")).shards) == 5
    return root / "shards"


def plan_units(shards: Path) -> list[UnitPlan]:
    store = open_store(shards)
    return [
        plan_unit(f"{number:06d}", load_index(store, shard), RULES)
        for number, shard in enumerate(load_manifest(store).shards)
    ]


@pytest.fixture(scope="module")
def expected(shards: Path) -> dict[str, Tensor]:
    """The frames of every good clip, from the files themselves."""
    clips = {clip.key: clip for unit in plan_units(shards) for clip in unit.clips}
    files = {key: (shards.parent / "dataset" / f"{key}.mp4").read_bytes() for key in GOOD}
    return {key: decode_clip(files[key], clips[key].request) for key in GOOD}


def assert_all_once(clips: Iterable[Clip], expected: dict[str, Tensor]) -> None:
    seen: Counter[str] = Counter()
    for clip in clips:
        seen[clip.key] += 1
        assert torch.equal(clip.frames, expected[clip.key])
        assert clip.caption == f"Caption of {clip.key}."
    assert seen == Counter(expected.keys())


def bad_reasons(stream: ClipStream) -> dict[str, str]:
    assert all(isinstance(error, BadSample) for _, error in stream.bad)
    return {key: error.reason for key, error in stream.bad}


def test_a_stream_by_itself_yields_each_clip_once_and_may_be_iterated_again(
    shards: Path, expected: dict[str, Tensor]
) -> None:
    stream = ClipStream(str(shards), RULES)
    for _ in range(2):
        clips = list(stream)  # all of them, to see that later clips do not overwrite earlier ones
        assert [clip.key for clip in clips] == GOOD
        assert_all_once(clips, expected)
        assert bad_reasons(stream) == {"undecodable": "decode_error", "no_video": "probe_failed"}
        assert len(stream.bad) == 2


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_a_data_loader_yields_each_clip_once_whatever_its_workers(
    num_workers: int, shards: Path, expected: dict[str, Tensor]
) -> None:
    loader = DataLoader(ClipStream(str(shards), RULES), batch_size=None, num_workers=num_workers)
    assert_all_once(loader, expected)
    if num_workers:
        assert_all_once(loader, expected)


def test_ranks_with_workers_share_the_clips_out(shards: Path, expected: dict[str, Tensor]) -> None:
    loaders = [
        DataLoader(ClipStream(str(shards), RULES, rank=rank, world_size=2), batch_size=None, num_workers=2)
        for rank in range(2)
    ]
    of_rank = [list(loader) for loader in loaders]
    assert all(of_rank)
    assert_all_once(of_rank[0] + of_rank[1], expected)


@given(world_size=st.integers(1, 5), num_workers=st.integers(1, 5))
def test_ranks_and_workers_take_each_shard_exactly_once(shards: Path, world_size: int, num_workers: int) -> None:
    taken = [
        [
            unit.shard
            for unit in ClipStream(str(shards), RULES, rank=r, world_size=world_size)._units(store, w, num_workers)
        ]
        for store in [open_shards(str(shards))]
        for r in range(world_size)
        for w in range(num_workers)
    ]
    assert sorted(shard for share in taken for shard in share) == [unit.shard for unit in plan_units(shards)]
    assert max(map(len, taken)) - min(map(len, taken)) <= 1


@pytest.mark.parametrize(("rank", "world_size"), [(-1, 2), (2, 2), (0, 0)])
def test_a_rank_outside_its_world_is_refused(rank: int, world_size: int, shards: Path) -> None:
    with pytest.raises(ValueError, match=f"rank must be in 0..{world_size - 1}, got {rank}"):
        ClipStream(str(shards), RULES, rank=rank, world_size=world_size)


def test_a_stream_can_be_sent_to_a_spawned_worker(shards: Path) -> None:
    stream = pickle.loads(pickle.dumps(ClipStream(str(shards), RULES, rank=1, world_size=3)))
    assert [unit.id for unit in stream._units(open_shards(str(shards)), 0, 1)] == ["000001", "000004"]


def test_units_are_decoded_in_the_order_of_their_plans(shards: Path, expected: dict[str, Tensor]) -> None:
    units = plan_units(shards)
    with InlineDecoder() as decoder:
        results = [
            (unit.id, clip.key, decoded) for unit, clip, decoded in decode_units(open_store(shards), units, decoder)
        ]
    assert [(unit, key) for unit, key, _ in results] == [(unit.id, clip.key) for unit in units for clip in unit.clips]
    for _, key, decoded in results:
        assert decoded.key == key
        if decoded.bad is None:
            assert decoded.frames is not None
            assert torch.equal(decoded.frames, expected[key])
        else:
            assert (key, decoded.bad.reason) == ("undecodable", "decode_error")


def test_a_shard_that_was_cut_off_costs_the_clips_it_lacks(
    shards: Path, expected: dict[str, Tensor], tmp_path: Path
) -> None:
    first, second = plan_units(shards)[:2]
    store = open_store(tmp_path)
    for unit in (first, second):
        (tmp_path / unit.shard).write_bytes((shards / unit.shard).read_bytes())
    with open(tmp_path / first.shard, "r+b") as file:
        file.truncate(first.clips[-1].video.offset + 1000)
    with InlineDecoder() as decoder:
        bad = {clip.key: d.bad for _, clip, d in decode_units(store, (first, second), decoder)}
    assert [key for key, error in bad.items() if error] == [first.clips[-1].key]
    error = bad[first.clips[-1].key]
    assert error is not None
    assert (error.reason, error.stage) == ("read_error", "read")
    assert f"{first.shard} has" in error.message
