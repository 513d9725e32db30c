"""What is encoded, dropped or bad follows from a shard's index alone."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from making import make_contract, make_rules

from streamprep import canonical, forecast
from streamprep.buckets import Bucket, parse_buckets
from streamprep.config import PlanConfig
from streamprep.errors import BAD_REASONS, UserError
from streamprep.manifest import Manifest, ShardInfo, open_shards
from streamprep.plan import DROP_REASONS, Excluded, RowPlan, UnitPlan, plan_clips, plan_unit
from streamprep.sampling import WINDOWS, resample, uniform
from streamprep.shards import Member, ShardIndex, ShardSample
from streamprep.sources._files import IMAGE_EXTENSIONS
from streamprep.types import VideoInfo

RATES = st.one_of(
    st.sampled_from([24.0, 25.0, 30.0, 60.0, 24000 / 1001, 30000 / 1001, 16.0, 15.0, 12.0, 119.88]),
    st.floats(min_value=0.5, max_value=240.0),
)


PROBED = {"variable_frame_rate": False, "start_seconds": 0.0, "duration_seconds": 2.0}


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


def test_frames_of_too_many_pixels_are_bad_before_a_byte_is_read() -> None:
    assert plan_one(make_sample(), max_pixels=320 * 180).clips
    sample = excluded(make_sample(), max_pixels=320 * 180 - 1)
    assert sample.reason == "too_large"
    assert sample.message == "frames of 320x180 pixels, more than the 57599 of --max-pixels"


def test_a_single_frame_is_never_repeated_to_a_clip() -> None:
    image = make_sample(num_frames=1, fps=1.0, codec="png")
    assert excluded(image, num_frames=5).reason == "too_short"
    (clip,) = plan_one(image, num_frames=1).clips
    assert clip.request.indices == (0,)


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


# Which captions

SEVERAL = ("One.", "Two.", " ", "Four.")


def chosen(sample: ShardSample, **rules: Any) -> str:
    ((row,),) = (clip.rows for clip in plan_one(sample, **rules).clips)
    return row.caption


def test_of_several_captions_the_first_is_taken_and_the_others_not_looked_at() -> None:
    (clip,) = plan_one(make_sample(captions=SEVERAL)).clips
    assert clip.rows == (RowPlan(key="a", id="a.mp4", caption="One.", prompt="One."),)
    assert clip.unusable == ()
    assert excluded(make_sample(captions=("", "Two."))).reason == "empty_caption"


def test_all_captions_are_rows_with_numbers_and_those_that_cannot_be_used_are_listed() -> None:
    unit = plan_one(make_sample("dir/a", captions=(*SEVERAL, "\ud83d")), caption="all")
    (clip,) = unit.clips
    assert [(row.key, row.id, row.caption, row.prompt) for row in clip.rows] == [
        ("dir/a", "dir/a.mp4", "One.", "One."),
        ("dir/a@01", "dir/a.mp4@01", "Two.", "Two."),
        ("dir/a@03", "dir/a.mp4@03", "Four.", "Four."),
    ]
    assert [(item.key, item.reason) for item in unit.dropped] == [
        ("dir/a@02", "empty_caption"),
        ("dir/a@04", "caption_encoding"),
    ]
    assert unit.dropped == clip.unusable
    assert list(unit.rows) == list(clip.rows)


def test_a_caption_keeps_its_number_when_those_before_it_cannot_be_used() -> None:
    unit = plan_one(make_sample(captions=("", "Two.")), caption="all")
    assert [row.key for row in unit.rows] == ["a@01"]
    assert [item.key for item in unit.dropped] == ["a@00"]


@pytest.mark.parametrize("caption", ["first", "random", "all"])
def test_a_sample_none_of_whose_captions_can_be_used_is_dropped_once(caption: str) -> None:
    for captions in ((), ("",), (" ", "")):
        item = excluded(make_sample(captions=captions), caption=caption)
        assert (item.key, item.reason) == ("a", "empty_caption")


def test_a_hundred_captions_have_different_keys() -> None:
    captions = tuple(f"Caption {number}." for number in range(120))
    keys = [row.key for row in plan_one(make_sample(captions=captions), caption="all").rows]
    assert keys == ["a", *(f"a@{number:02d}" for number in range(1, 120))]
    assert len(set(keys)) == 120


def test_a_random_caption_follows_from_seed_and_key_alone() -> None:
    samples = [make_sample(f"{number}", captions=SEVERAL) for number in range(40)]
    shuffled = random.Random(0).sample(samples, len(samples))
    first, second = (
        {
            row.key: row.caption
            for row in plan_unit(unit, make_index(*of), make_rules(caption="random", workload_type=workload)).rows
        }
        for unit, of, workload in (("000000", samples, "t2v"), ("000007", shuffled, "text"))
    )
    assert first == second
    assert first == {sample.key: chosen(sample, caption="random") for sample in samples}


def test_another_seed_chooses_other_captions() -> None:
    samples = [make_sample(f"{number}", captions=SEVERAL) for number in range(40)]
    choices = {tuple(chosen(sample, caption="random", seed=seed) for sample in samples) for seed in range(10)}
    assert len(choices) == 10


def test_each_caption_that_can_be_used_is_chosen_about_as_often() -> None:
    counts = Counter(chosen(make_sample(f"{n}", captions=SEVERAL), caption="random") for n in range(3000))
    assert set(counts) == {"One.", "Two.", "Four."}
    assert all(abs(count - 1000) < 100 for count in counts.values()), counts  # 4 standard deviations


def test_a_random_captions_row_has_the_samples_own_key() -> None:
    (clip,) = plan_one(make_sample(captions=("", "Two.")), caption="random").clips
    assert [(row.key, row.id, row.caption) for row in clip.rows] == [("a", "a.mp4", "Two.")]
    assert [item.key for item in clip.unusable] == ["a@00"]


@given(seed=st.integers(0, 2**32), key=st.text(max_size=10))
def test_a_uniform_number_is_below_one_and_is_its_arguments_alone(seed: int, key: str) -> None:
    assert 0 <= uniform(seed, key, "caption") < 1
    assert uniform(seed, key, "caption") == uniform(seed, key, "caption")
    assert len({uniform(seed, key, purpose) for purpose in ("caption", "guidance")}) == 2


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_that_share_of_the_rows_is_encoded_without_a_prompt_and_keeps_its_caption(rate: float) -> None:
    rules = make_rules(training_cfg_rate=rate, workload_type="text", caption="all")
    samples = [make_sample(f"{number}", captions=("One.", "Two.")) for number in range(1000)]
    rows = list(plan_unit("000000", make_index(*samples), rules).rows)
    assert [row.caption for row in rows] == ["One.", "Two."] * 1000
    assert {row.prompt for row in rows if row.prompt} <= {"One.", "Two."}
    assert all(row.prompt in ("", row.caption) for row in rows)
    share = sum(not row.prompt for row in rows) / len(rows)
    assert share == pytest.approx(rate, abs=4 * (rate * (1 - rate) / len(rows)) ** 0.5)
    without = {row.key for row in rows if not row.prompt}
    again = plan_unit("000001", make_index(*reversed(samples)), rules).rows
    assert without == {row.key for row in again if not row.prompt}
    if 0 < rate < 1:
        other = plan_unit("000000", make_index(*samples), dataclasses.replace(rules, seed=1)).rows
        assert without != {row.key for row in other if not row.prompt}


# Windows


def keys_and_first_frames(sample: ShardSample, **rules: Any) -> list[tuple[str, int]]:
    return [(clip.key, clip.request.indices[0]) for clip in plan_one(sample, **rules).clips if clip.request.indices]


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"window": "first"}, [("a", 0)]),
        ({"window": "middle"}, [("a", 7)]),
        ({"window": "uniform", "num_windows": 1}, [("a#00", 7)]),
        ({"window": "uniform", "num_windows": 3}, [("a#00", 0), ("a#01", 8), ("a#02", 15)]),
        ({"window": "every"}, [("a#00", 0)]),
        ({"window": "every", "window_stride": 5}, [("a#00", 0), ("a#01", 5), ("a#02", 10), ("a#03", 15)]),
    ],
)
def test_each_of_several_clips_has_its_number(rules: dict[str, Any], expected: list[tuple[str, int]]) -> None:
    assert keys_and_first_frames(make_sample(fps=16.0, num_frames=32), **rules) == expected


def test_windows_side_by_side_are_as_long_as_their_bucket() -> None:
    buckets = parse_buckets("64x96x9,64x96x21", height=0, width=0, num_frames=0, multiple=16)
    short, long = make_sample(fps=16.0, num_frames=20), make_sample(fps=16.0, num_frames=42)
    assert keys_and_first_frames(short, window="every", buckets=buckets) == [("a#00", 0), ("a#01", 9)]
    assert keys_and_first_frames(long, window="every", buckets=buckets) == [("a#00", 0), ("a#01", 21)]


def test_rows_of_windows_and_captions_have_both_numbers_on_key_and_id() -> None:
    sample = make_sample("dir/a", captions=("First.", "", "Third."), fps=16.0, num_frames=34)
    unit = plan_one(sample, window="every", caption="all")
    assert [(row.key, row.id, row.caption) for row in unit.rows] == [
        ("dir/a#00", "dir/a.mp4#00", "First."),
        ("dir/a#00@02", "dir/a.mp4#00@02", "Third."),
        ("dir/a#01", "dir/a.mp4#01", "First."),
        ("dir/a#01@02", "dir/a.mp4#01@02", "Third."),
    ]
    assert [(item.key, item.reason) for item in unit.dropped] == [("dir/a@01", "empty_caption")]


def test_a_random_window_follows_from_seed_and_key() -> None:
    samples = [make_sample(f"{n:03d}", fps=16.0, num_frames=20) for n in range(300)]
    rules = make_rules(window="random")
    unit = plan_unit("000000", make_index(*samples), rules)
    starts = {clip.key: clip.request.indices[0] for clip in unit.clips if clip.request.indices}
    assert set(starts.values()) == {0, 1, 2, 3}
    backwards = plan_unit("000009", make_index(*samples[::-1]), rules)
    assert {clip.key: clip.request.indices[0] for clip in backwards.clips if clip.request.indices} == starts
    other = plan_unit("000000", make_index(*samples), dataclasses.replace(rules, seed=43))
    assert {clip.key: clip.request.indices[0] for clip in other.clips if clip.request.indices} != starts


def test_windows_of_a_variable_frame_rate_are_found_by_time() -> None:
    sample = make_sample(duration_seconds=2.5, start_seconds=1.0, variable_frame_rate=True)
    clips = plan_one(sample, window="uniform", num_windows=3).clips
    assert [clip.request.indices for clip in clips] == [None] * 3
    assert [clip.request.timestamps[0] for clip in clips] == [1.0, 1.0 + 12 / 16, 1.0 + 23 / 16]
    assert all(clip.request.timestamps[-1] < 3.5 for clip in clips)


# Short videos


def test_a_share_of_the_short_videos_gives_shorter_clips() -> None:
    samples = [make_sample(f"{n:04d}", fps=16.0, num_frames=1 + n % 16) for n in range(2000)]
    previous: set[str] = set()
    for ratio in 1.0, 0.7, 0.3, 0.0:
        unit = plan_unit("000000", make_index(*samples), make_rules(drop_short_ratio=ratio))
        assert len(unit.dropped) / 2000 == pytest.approx(ratio, abs=0.04)
        assert {item.reason for item in unit.dropped} <= {"too_short"}
        kept = {clip.key for clip in unit.clips}
        assert previous <= kept  # a smaller ratio keeps the same ones and more
        previous = kept
    assert len(previous) == 2000


@pytest.mark.parametrize(
    ("there", "taken"), [(1, 1), (2, 1), (4, 1), (5, 5), (8, 5), (9, 9), (16, 13), (17, 17), (40, 17)]
)
def test_a_shorter_clip_keeps_the_models_rule(there: int, taken: int) -> None:
    (clip,) = plan_one(make_sample(fps=16.0, num_frames=there), drop_short_ratio=0.0).clips
    assert clip.request.indices == tuple(range(taken))
    assert str(clip.bucket) == f"64x96x{taken}"


def test_a_video_without_a_frame_at_that_rate_is_too_short_whatever_the_ratio() -> None:
    sample = make_sample(duration_seconds=0.0, variable_frame_rate=True)
    assert excluded(sample, drop_short_ratio=0.0).reason == "too_short"


# Buckets


BUCKETS = parse_buckets("64x96x17,96x64x17,64x64x9,64x64x17", height=0, width=0, num_frames=0, multiple=16)


def test_a_video_goes_to_its_bucket_by_displayed_size_and_length() -> None:
    for height, width, num_frames, expected in (
        (180, 320, 48, "64x96x17"),
        (320, 180, 48, "96x64x17"),
        (200, 200, 48, "64x64x17"),
        (200, 200, 24, "64x64x9"),
    ):
        (clip,) = plan_one(make_sample(height=height, width=width, num_frames=num_frames), buckets=BUCKETS).clips
        assert str(clip.bucket) == expected
    item = excluded(make_sample(height=200, width=200, num_frames=12), buckets=BUCKETS)
    assert item.message == "8 frames at 16 fps, 9 are wanted (12 frames at 24 fps)"


def test_nothing_is_enlarged_beyond_the_limit() -> None:
    sample = make_sample(height=32, width=60)
    assert len(plan_one(sample).clips) == len(plan_one(sample, max_upscale=2.0).clips) == 1
    item = excluded(sample, max_upscale=1.9)
    assert (item.reason, item.message) == ("upscale", "32x60 pixels would be enlarged 2.00 times for 64x96x17")
    small = (Bucket(32, 48, 17), Bucket(64, 96, 17))
    assert len(plan_one(sample, max_upscale=1.0, buckets=small).clips) == 1


@given(
    shapes=st.lists(st.sampled_from([(180, 320), (320, 180), (200, 200)]), max_size=20),
    num_frames=st.integers(24, 60),
    size=st.integers(1, 4),
)
def test_batches_are_of_one_bucket_and_hold_every_clip_once(
    shapes: list[tuple[int, int]], num_frames: int, size: int
) -> None:
    samples = [make_sample(f"{n:02d}", height=h, width=w, num_frames=num_frames) for n, (h, w) in enumerate(shapes)]
    unit = plan_unit("000000", make_index(*samples), make_rules(buckets=BUCKETS, window="every", window_stride=7))
    batches = list(unit.batches(size))
    assert [clip for batch in batches for clip in batch] == list(unit.clips)
    assert all(len({clip.bucket for clip in batch}) == 1 and len(batch) <= size for batch in batches)
    order = {sample.key: number for number, sample in enumerate(samples)}
    for bucket in {clip.bucket for clip in unit.clips}:
        keys = [clip.key for clip in unit.clips if clip.bucket == bucket]
        assert keys == sorted(keys, key=lambda key: (order[key.partition("#")[0]], key))
        assert sum(len(batch) < size for batch in batches if batch[0].bucket == bucket) <= 1


# Conditions


def test_samples_that_do_not_fulfil_the_condition_are_dropped_before_all_else() -> None:
    index = make_index(make_sample("a"), make_sample("b", width=100), make_sample("c", probe_error="no video"))
    unit = plan_unit("000000", index, make_rules(where="width > 200"))
    assert [clip.key for clip in unit.clips] == ["a"]
    assert [(item.key, item.reason, item.message) for item in unit.dropped] == [
        ("b", "where", "--where width > 200"),
        ("c", "where", "--where width > 200"),
    ]


def test_a_condition_that_cannot_be_evaluated_is_refused() -> None:
    with pytest.raises(UserError, match=r"--where 'width >.: near .*syntax error"):
        plan_one(make_sample(), where="width >")


# Images


def make_image(key: str = "picture", *, extension: str = "png", **info: Any) -> ShardSample:
    """A picture as its shard's index describes it."""
    codec = {"jpg": "mjpeg", "jpeg": "mjpeg"}.get(extension, extension)
    sample = make_sample(key, fps=1.0, num_frames=1, codec=codec, media_type="image", **info)
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
    result = forecast.forecast(open_shards(str(tmp_path)), config, make_contract(), with_decisions=True)
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


@pytest.mark.parametrize("limit", range(8))
def test_a_limit_counts_the_clips_of_all_windows(limit: int) -> None:
    index = make_index(*(make_sample(key, fps=16.0, num_frames=51) for key in "ab"))  # 3 windows each
    rules = make_rules(window="every")
    unit = plan_unit("000000", index, rules, limit=limit)
    every = ["a#00", "a#01", "a#02", "b#00", "b#01", "b#02"]
    assert [clip.key for clip in unit.clips] == every[:limit]


def test_a_limit_takes_the_first_in_the_order_of_the_shard_not_of_the_buckets() -> None:
    index = make_index(make_sample("a", height=320, width=180), make_sample("b"), make_sample("c"))
    unit = plan_unit("000000", index, make_rules(buckets=BUCKETS), limit=2)
    assert [clip.key for clip in unit.clips] == ["b", "a"]


@given(num_clips=st.integers(0, 20), size=st.integers(1, 7))
def test_batches_hold_every_clip_once_in_order(num_clips: int, size: int) -> None:
    index = make_index(*(make_sample(f"{number:02d}") for number in range(num_clips)))
    unit = plan_unit("000000", index, make_rules())
    batches = list(unit.batches(size))
    assert [clip for batch in batches for clip in batch] == list(unit.clips)
    assert all(len(batch) == size for batch in batches[:-1])
    assert all(1 <= len(batch) <= size for batch in batches[-1:])
