"""What is encoded, dropped or bad follows from a shard's index alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from making import make_contract

from streamprep import canonical, forecast
from streamprep.buckets import Bucket
from streamprep.config import PlanConfig
from streamprep.errors import BAD_REASONS
from streamprep.keys import IMAGE_EXTENSIONS
from streamprep.manifest import Manifest, ShardInfo
from streamprep.plan import DROP_REASONS, Excluded, SamplingRules, UnitPlan, plan_clips, plan_unit
from streamprep.sampling import WINDOWS, resample
from streamprep.shards import Member, ShardIndex, ShardSample
from streamprep.storage import Store
from streamprep.types import VideoInfo

RATES = st.one_of(
    st.sampled_from([24.0, 25.0, 30.0, 60.0, 24000 / 1001, 30000 / 1001, 16.0, 15.0, 12.0, 119.88]),
    st.floats(min_value=0.5, max_value=240.0),
)


PROBED = {"variable_frame_rate": False, "start_seconds": 0.0, "duration_seconds": 2.0}


def make_rules(**changes: Any) -> SamplingRules:
    defaults: dict[str, Any] = {
        "max_height": 64,
        "max_width": 96,
        "num_frames": 17,
        "train_fps": 16.0,
        "video_length_tolerance_range": None,
        "speed_factor": 1.0,
        "max_pixels": 10**8,
    }
    return SamplingRules(**defaults | changes)


def make_sample(
    key: str = "a",
    *,
    captions: tuple[str, ...] = ("A dog.",),
    declared: dict[str, Any] | None = None,
    probe_error: str | None = None,
    **info: Any,
) -> ShardSample:
    """A sample as its shard's index describes it: 2 seconds at 24 fps, but for ``info``."""
    fps, num_frames = info.pop("fps", 24.0), info.pop("num_frames", 48)
    probed = VideoInfo(
        **{
            "num_frames": num_frames,
            "fps": fps,
            "width": 320,
            "height": 180,
            "duration_seconds": num_frames / fps,
            "start_seconds": 0.0,
            "rotation": 0,
            "codec": "h264",
            "variable_frame_rate": False,
            **info,
        }
    )
    metadata: dict[str, Any] = {
        "file_name": f"{key}.mp4",
        "captions": list(captions),
        "extension": "mp4",
        "sha256": "0" * 64,
        "declared": declared or {},
        "extra": {},
    }
    metadata |= dataclasses.asdict(probed) if probe_error is None else {"probe_error": probe_error}
    member = Member(offset=512, size=1000, sha256="0" * 64)
    return ShardSample(key=key, members={"mp4": member}, metadata=metadata)


def make_index(*samples: ShardSample) -> ShardIndex:
    return ShardIndex(name="000000.tar", size_bytes=10_000, samples=samples)


def plan_one(sample: ShardSample, **rules: Any) -> UnitPlan:
    return plan_unit("000000", make_index(sample), make_rules(**rules))


def excluded(sample: ShardSample, **rules: Any) -> Excluded:
    unit = plan_one(sample, **rules)
    assert not unit.clips
    (only,) = unit.dropped + unit.bad
    assert (only.reason in DROP_REASONS) == (only in unit.dropped)
    assert (only.reason in BAD_REASONS) == (only in unit.bad)
    return only


# Which frames


@given(num_frames=st.integers(1, 3000), fps=RATES, train_fps=RATES, limit=st.integers(1, 200))
def test_frames_are_those_fastvideo_takes(num_frames: int, fps: float, train_fps: float, limit: int) -> None:
    video = resample(
        {**PROBED, "num_frames": num_frames, "fps": fps}, fps=fps, num_frames=num_frames, train_fps=train_fps
    )
    taken, _ = video.window(0, min(limit, video.length))
    assert taken == tuple(np.arange(0, num_frames, fps / train_fps).astype(int)[:limit].tolist())
    assert all(type(index) is int for index in taken)


@given(
    num_frames=st.integers(1, 400),
    fps=RATES,
    train_fps=RATES,
    wanted=st.integers(1, 81),
    frames_off=st.sampled_from([-1, 0, 1]),
    fps_off=st.floats(-0.0009, 0.0009),
    start=st.sampled_from([0.0, 1.4, 36000.0]),
)
def test_a_planned_clip_names_only_frames_that_exist_at_their_times(
    num_frames: int, fps: float, train_fps: float, wanted: int, frames_off: int, fps_off: float, start: float
) -> None:
    declared = {"fps": fps * (1 + fps_off), "num_frames": max(1, num_frames + frames_off)}
    sample = make_sample(fps=fps, num_frames=num_frames, declared=declared, start_seconds=start)
    unit = plan_one(sample, num_frames=wanted, train_fps=train_fps)
    for clip in unit.clips:
        indices = clip.request.indices
        assert indices is not None
        assert len(indices) == wanted
        assert list(indices) == sorted(indices)
        assert 0 <= indices[0] <= indices[-1] < num_frames
        assert clip.request.timestamps == pytest.approx([start + index / fps for index in indices])
    assert {item.reason for item in unit.dropped} <= {"too_short"}
    assert len(unit.clips) + len(unit.dropped) == 1


def test_a_frame_that_only_the_dataset_has_is_never_planned() -> None:
    sample = make_sample(fps=16.0, num_frames=17, declared={"num_frames": 18})
    (clip,) = plan_one(sample, num_frames=17).clips
    assert clip.request.indices == tuple(range(17))
    assert excluded(sample, num_frames=18).message == "17 frames at 16 fps, 18 are wanted (17 frames at 16 fps)"


@pytest.mark.parametrize(
    ("fps", "first"),
    [
        (24.0, [0, 1, 3, 4, 6, 7]),
        (30.0, [0, 1, 3, 5, 7, 9]),
        (16.0, [0, 1, 2, 3, 4, 5]),
        (8.0, [0, 0, 1, 1, 2, 2]),
        (12.0, [0, 0, 1, 2, 3, 3]),
    ],
)
def test_frames_repeat_where_the_source_is_slower(fps: float, first: list[int]) -> None:
    (clip,) = plan_one(make_sample(fps=fps)).clips
    assert list(clip.request.indices or ())[:6] == first


def test_a_variable_frame_rate_is_sampled_by_time() -> None:
    sample = make_sample(
        fps=20.0, num_frames=22, duration_seconds=1.1, start_seconds=0.5, variable_frame_rate=True, declared={"fps": 20}
    )
    (clip,) = plan_one(sample).clips
    assert clip.request.indices is None
    assert clip.request.timestamps == tuple(0.5 + k / 16 for k in range(17))


@pytest.mark.parametrize(("duration", "num_clips"), [(1.0, 0), (16 / 16 + 0.001, 1), (17 / 16, 1), (5.0, 1)])
def test_a_variable_frame_rate_is_long_enough_by_time(duration: float, num_clips: int) -> None:
    unit = plan_one(make_sample(num_frames=5, fps=5.0, duration_seconds=duration, variable_frame_rate=True))
    assert len(unit.clips) == num_clips
    assert [item.reason for item in unit.dropped] == ["too_short"] * (1 - num_clips)


def test_a_plan_knows_everything_decoding_needs() -> None:
    (clip,) = plan_one(make_sample("dir/a", captions=("First.", "Second."), declared={"fps": 24.001})).clips
    assert (clip.key, clip.file_name, clip.rows[0].caption) == ("dir/a", "dir/a.mp4", "First.")
    assert (clip.video.offset, clip.video.size) == (512, 1000)
    assert clip.source_fps == 24.001
    assert clip.request.shape == (17, 3, 64, 96)
    assert clip.request.sha256 == "0" * 64
    assert clip.request.tolerance_seconds == pytest.approx(0.5 / 24)
    assert clip.request.max_pixels == 10**8


# What the dataset declares


@pytest.mark.parametrize("declared", [{"fps": 24 * 1.0009}, {"fps": 24 * 0.9991}, {"fps": 24}])
def test_a_declared_fps_within_a_thousandth_is_used(declared: dict[str, float]) -> None:
    (clip,) = plan_one(make_sample(declared=declared)).clips
    assert clip.source_fps == declared["fps"]
    expected = np.arange(0, 48, declared["fps"] / 16.0).astype(int)[:17]
    assert list(clip.request.indices or ()) == expected.tolist()


@pytest.mark.parametrize(("declared", "num_clips"), [(26, 1), (25, 1), (24, 0)])
def test_a_declared_num_frames_within_one_is_used(declared: int, num_clips: int) -> None:
    sample = make_sample(num_frames=25, declared={"num_frames": declared})
    assert len(plan_one(sample, num_frames=17).clips) == num_clips


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"fps": 24.1}, "the dataset says 48 frames at 24.1 fps, the file 48 at 24"),
        ({"fps": 30.0, "num_frames": 60}, "the dataset says 60 frames at 30 fps, the file 48 at 24"),
        ({"num_frames": 50}, "the dataset says 50 frames at 24 fps, the file 48 at 24"),
        ({"num_frames": 46}, "the dataset says 46 frames at 24 fps, the file 48 at 24"),
    ],
)
def test_a_dataset_that_contradicts_the_file_makes_the_sample_bad(declared: dict[str, Any], message: str) -> None:
    assert excluded(make_sample(declared=declared)) == Excluded(key="a", reason="metadata_mismatch", message=message)


def test_a_header_that_could_not_be_read_makes_the_sample_bad() -> None:
    item = excluded(make_sample(probe_error="not a video: it begins with b'hello'"))
    assert item == Excluded(key="a", reason="probe_failed", message="not a video: it begins with b'hello'")


# What the rules drop


def test_too_few_frames_are_dropped() -> None:
    item = excluded(make_sample(num_frames=24))
    assert item.reason == "too_short"
    assert item.message == "16 frames at 16 fps, 17 are wanted (24 frames at 24 fps)"
    assert len(plan_one(make_sample(num_frames=25)).clips) == 1


def test_videos_longer_than_the_tolerance_are_dropped() -> None:
    long = make_sample(num_frames=52)  # 2.17 s; 17 frames at 16 fps are 1.0625 s
    assert len(plan_one(long).clips) == 1
    item = excluded(long, video_length_tolerance_range=2.0)
    assert (item.reason, item.message) == ("too_long", "2.17 s, at most 2.12 s are allowed")
    assert len(plan_one(long, video_length_tolerance_range=2.0, speed_factor=1.1).clips) == 1
    assert len(plan_one(make_sample(num_frames=51), video_length_tolerance_range=2.0).clips) == 1


@pytest.mark.parametrize(
    ("captions", "message"), [((), "no caption"), (("",), "the caption is ''"), ((" \n",), "the caption is ' \\n'")]
)
def test_samples_without_a_caption_are_dropped(captions: tuple[str, ...], message: str) -> None:
    assert excluded(make_sample(captions=captions)) == Excluded(key="a", reason="empty_caption", message=message)


def test_a_caption_that_is_no_text_is_dropped() -> None:
    item = excluded(make_sample(captions=("a dog \ud83d",)))
    assert item.reason == "caption_encoding"
    assert "surrogates not allowed" in item.message
    item.message.encode()  # so that it can be written down


def test_a_caption_is_kept_as_it_is() -> None:
    caption = "  Caf\u00e9 &amp; \U0001f3ac\n  "
    (clip,) = plan_clips(make_sample(captions=(caption,)), make_rules())
    assert clip.rows[0].caption == caption


# Images


def make_image(key: str = "picture", *, extension: str = "png", **info: Any) -> ShardSample:
    """A picture as its shard's index describes it."""
    codec = {"jpg": "mjpeg", "jpeg": "mjpeg"}.get(extension, extension)
    sample = make_sample(key, fps=1.0, num_frames=1, codec=codec, **info)
    metadata = {**sample.metadata, "extension": extension, "file_name": f"{key}.{extension}"}
    return dataclasses.replace(sample, members={extension: sample.members["mp4"]}, metadata=metadata)


STILL, CLIP = Bucket(64, 96, 1), Bucket(64, 96, 17)


@pytest.mark.parametrize("extension", sorted(IMAGE_EXTENSIONS))
@pytest.mark.parametrize("rules", [{"num_frames": 1}, {"buckets": (STILL, CLIP)}], ids=["num_frames", "buckets"])
def test_an_image_is_a_clip_of_its_only_frame(extension: str, rules: dict[str, Any]) -> None:
    """At 16 frames a second one that is shown for a second would be 16 times the same frame."""
    (clip,) = plan_one(make_image(extension=extension), **rules).clips
    assert (clip.media_type, clip.bucket, clip.source_fps) == ("image", STILL, 1.0)
    assert (clip.request.indices, clip.request.timestamps) == ((0,), (0.0,))


@pytest.mark.parametrize("rules", [{}, {"buckets": (CLIP, Bucket(96, 64, 5))}, {"drop_short_ratio": 0.0}])
def test_an_image_takes_no_place_of_videos(rules: dict[str, Any]) -> None:
    item = excluded(make_image(), **rules)
    assert item.reason == "too_short"
    assert item.message == (
        "an image is one frame, 17 are wanted: for images use --num-frames 1, or a bucket of one frame beside the "
        "others: --buckets 64x96x17,64x96x1"
    )


def test_a_video_takes_a_bucket_of_one_frame_only_where_there_are_no_longer_ones() -> None:
    assert [clip.bucket for clip in plan_one(make_sample(), buckets=(STILL, CLIP)).clips] == [CLIP]
    assert excluded(make_sample(num_frames=10), buckets=(STILL, CLIP)).reason == "too_short"
    portrait = Bucket(96, 64, 1)
    assert [clip.bucket for clip in plan_one(make_sample(width=180, height=320), buckets=(portrait, CLIP)).clips] == [
        CLIP
    ]
    (clip,) = plan_one(make_sample(), num_frames=1).clips
    assert (clip.media_type, clip.bucket) == ("video", STILL)


def test_an_image_goes_to_the_bucket_of_its_shape() -> None:
    buckets = (CLIP, STILL, Bucket(96, 64, 1), Bucket(80, 80, 17))
    (clip,) = plan_one(make_image(width=180, height=320), buckets=buckets).clips
    assert clip.bucket == Bucket(96, 64, 1)


@pytest.mark.parametrize("window", WINDOWS)
def test_an_image_is_one_clip_wherever_windows_are(window: str) -> None:
    (clip,) = plan_one(make_image(), num_frames=1, window=window, num_windows=3 if window == "uniform" else 1).clips
    assert clip.request.indices == (0,)


def test_the_length_and_rate_of_an_image_mean_nothing() -> None:
    declared = make_image(declared={"fps": 24.0, "num_frames": 1, "duration": 3.0})
    assert len(plan_one(declared, num_frames=1, video_length_tolerance_range=2.0).clips) == 1


def test_images_and_videos_are_not_batched_together() -> None:
    index = make_index(make_image("a"), make_sample("b"), make_image("c"), make_sample("d"))
    unit = plan_unit("000000", index, make_rules(buckets=(STILL, CLIP)))
    assert [[clip.key for clip in batch if clip] for batch in unit.batches(4)] == [["a", "c"], ["b", "d"]]


def test_plan_counts_images(tmp_path: Path) -> None:
    index = make_index(make_image("a"), make_image("b", extension="jpg"), make_sample("c"), make_sample("d"))
    (tmp_path / "000000.json").write_bytes(index.to_json())
    (tmp_path / "000000.tar").write_bytes(bytes(index.size_bytes))
    info = ShardInfo(
        name="000000.tar",
        num_samples=4,
        size_bytes=index.size_bytes,
        index_sha256=canonical.bytes_digest(index.to_json()),
    )
    (tmp_path / "manifest.json").write_bytes(Manifest(shards=(info,)).to_json())
    config = PlanConfig(shards=str(tmp_path), model_path="tiny", buckets="64x96x17,64x96x1")
    result = forecast.forecast(Store(tmp_path), config, make_contract(), with_decisions=True)
    lines = list(forecast.describe(result, config, make_contract()))
    assert "  64x96x1          2 clips, 0 enlarged, 15.6% lost, 0.0% repeated; 2 images among them" in lines
    assert "  64x96x17         2 clips, 0 enlarged, 15.6% lost, 0.0% repeated" in lines
    assert forecast.table(result)["media_type"].to_pylist() == ["image", "image", "video", "video"]


# A retry


@given(num_clips=st.integers(1, 12), size=st.integers(1, 5), data=st.data())
def test_clips_of_a_retry_keep_their_places_in_the_batches(num_clips: int, size: int, data: st.DataObject) -> None:
    """Beside others, or elsewhere in a batch, the last bits of a latent differ."""
    index = make_index(*(make_sample(f"{number:02d}") for number in range(num_clips)))
    unit = plan_unit("000000", index, make_rules())
    keys = data.draw(st.sets(st.sampled_from([clip.key for clip in unit.clips]), min_size=1))
    retry = unit.only(keys, {"truncated": len(keys)})
    assert {clip.key for clip in retry.clips} == keys
    expected = [[clip.key if clip and clip.key in keys else None for clip in batch] for batch in unit.batches(size)]
    found = [[clip.key if clip else None for clip in batch] for batch in retry.batches(size)]
    assert found == [batch for batch in expected if any(batch)]


@pytest.mark.parametrize("workload", ["t2v", "text"])
def test_a_retry_has_only_the_rows_that_were_bad(workload: str) -> None:
    index = make_index(make_sample("a", captions=("One.", "Two.", "")), make_sample("b"), make_sample("c", captions=()))
    unit = plan_unit("000000", index, make_rules(caption="all", workload_type=workload))
    retry = unit.only({"a@01"}, {"non_finite": 1})
    assert [row.key for row in retry.rows] == ["a@01"]
    assert (retry.dropped, retry.bad, retry.retried) == ((), (), {"non_finite": 1})


# Units


def mixed_index() -> ShardIndex:
    return make_index(
        make_sample("a"),
        make_sample("b", captions=()),
        make_sample("c", probe_error="no frames"),
        make_sample("d", num_frames=30),
        make_sample("e", declared={"fps": 50}),
        make_sample("f", num_frames=3),
        make_sample("g"),
    )


def test_every_sample_is_planned_dropped_or_bad_in_the_order_of_the_shard() -> None:
    unit = plan_unit("000007", mixed_index(), make_rules())
    assert (unit.id, unit.shard) == ("000007", "000000.tar")
    assert [clip.key for clip in unit.clips] == ["a", "d", "g"]
    assert [(item.key, item.reason) for item in unit.dropped] == [("b", "empty_caption"), ("f", "too_short")]
    assert [(item.key, item.reason) for item in unit.bad] == [("c", "probe_failed"), ("e", "metadata_mismatch")]


def test_the_same_index_gives_the_same_plan_also_after_a_round_trip() -> None:
    index = mixed_index()
    unit = plan_unit("000000", index, make_rules())
    assert plan_unit("000000", index, make_rules()) == unit
    assert plan_unit("000000", ShardIndex.from_json(index.to_json()), make_rules()) == unit


@pytest.mark.parametrize(
    ("limit", "clips", "others"), [(0, "", ""), (1, "a", ""), (2, "ad", "bc"), (3, "adg", "bcef"), (9, "adg", "bcef")]
)
def test_a_limit_stops_at_that_many_clips(limit: int, clips: str, others: str) -> None:
    unit = plan_unit("000000", mixed_index(), make_rules(), limit=limit)
    assert "".join(clip.key for clip in unit.clips) == clips
    assert "".join(sorted(item.key for item in unit.dropped + unit.bad)) == others


@given(num_clips=st.integers(0, 20), size=st.integers(1, 7))
def test_batches_hold_every_clip_once_in_order(num_clips: int, size: int) -> None:
    index = make_index(*(make_sample(f"{number:02d}") for number in range(num_clips)))
    unit = plan_unit("000000", index, make_rules())
    batches = list(unit.batches(size))
    assert [clip for batch in batches for clip in batch] == list(unit.clips)
    assert all(len(batch) == size for batch in batches[:-1])
    assert all(1 <= len(batch) <= size for batch in batches[-1:])
