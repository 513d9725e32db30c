"""What --buckets asks for, and which of them a video goes to."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamprep.buckets import PRESETS, Bucket, choose_bucket, cropped_away, parse_buckets, upscaling
from streamprep.errors import UserError

buckets = st.builds(
    Bucket,
    height=st.integers(1, 80).map(lambda n: 16 * n),
    width=st.integers(1, 80).map(lambda n: 16 * n),
    num_frames=st.integers(0, 20).map(lambda k: 4 * k + 1),
)
pixels = st.integers(16, 4000)


def parse(text: str | None, multiple: int = 16, **given: int) -> tuple[Bucket, ...]:
    defaults = {"height": 480, "width": 832, "num_frames": 77}
    return parse_buckets(text, multiple=multiple, **defaults | given)


# What is asked for


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, ["480x832x77"]),
        ("480x832", ["480x832x77"]),
        ("480x832x49", ["480x832x49"]),
        ("832X480", ["832x480x77"]),
        (" 480x832 , 832x480x49,480x832x77", ["480x832x77", "832x480x49"]),
        ("480p", ["480x832x77", "544x704x77", "624x624x77", "704x544x77", "832x480x77"]),
        ("720p,480x832x5", ["480x832x5", *(f"{h}x{w}x77" for h, w in sorted(PRESETS["720p"]))]),
    ],
)
def test_buckets_are_read_in_any_order_each_once(text: str | None, expected: list[str]) -> None:
    assert [str(bucket) for bucket in parse(text)] == expected


@given(st.lists(buckets, min_size=1, max_size=5))
def test_what_a_bucket_is_called_names_it(given: list[Bucket]) -> None:
    assert parse(",".join(map(str, given))) == tuple(sorted(set(given)))


@pytest.mark.parametrize(
    "text",
    ["", ",", "480", "480x", "480x832x", "480x832x5x6", "0x832", "-480x832", "480.5x832", "480x832;", "480P", "auto2"],
)
def test_what_is_no_bucket_is_refused_with_what_is_one(text: str) -> None:
    message = r"--buckets .*: an entry is HEIGHTxWIDTH, HEIGHTxWIDTHxFRAMES, auto, or one of 480p, 720p"
    with pytest.raises(UserError, match=message):
        parse(text)


@given(height=st.integers(64, 2000), width=st.integers(64, 2000), multiple=st.sampled_from([8, 16, 32]))
def test_auto_keeps_to_the_models_multiple_and_near_the_area(height: int, width: int, multiple: int) -> None:
    area = height * width
    found = parse("auto", multiple, height=height, width=width, num_frames=49)
    assert all(bucket.num_frames == 49 for bucket in found)
    for bucket in found:
        assert bucket.height % multiple == bucket.width % multiple == 0
        shorter = min(math.sqrt(area * 9 / 16), bucket.height, bucket.width)
        assert abs(bucket.height * bucket.width - area) / area < 2 * multiple / shorter


def test_auto_has_the_common_shapes_upright_and_lying() -> None:
    found = {(bucket.height, bucket.width) for bucket in parse("auto")}
    assert found == {(w, h) for h, w in found}
    ratios = sorted(round(h / w, 2) for h, w in found)
    assert ratios == pytest.approx([9 / 16, 2 / 3, 3 / 4, 1, 4 / 3, 3 / 2, 16 / 9], abs=0.04)


def test_auto_never_has_a_side_of_nothing() -> None:
    assert all(bucket.height and bucket.width for bucket in parse("auto", 32, height=16, width=16))


# Which one


@given(st.lists(buckets, min_size=1, max_size=6), pixels, pixels, st.integers(1, 200))
def test_no_bucket_is_nearer_than_the_chosen_one(given: list[Bucket], height: int, width: int, num_frames: int) -> None:
    chosen = choose_bucket(given, height=height, width=width, num_frames=num_frames)
    assert chosen in given
    assert choose_bucket(given[::-1], height=height, width=width, num_frames=num_frames) in given

    def shape_error(bucket: Bucket) -> float:
        return abs(math.log(bucket.height * width / (bucket.width * height)))

    assert shape_error(chosen) <= min(map(shape_error, given)) + 1e-8
    same_size = [b.num_frames for b in given if (b.height, b.width) == (chosen.height, chosen.width)]
    fitting = [length for length in same_size if length <= num_frames]
    assert chosen.num_frames == (max(fitting) if fitting else min(same_size))


@pytest.mark.parametrize(
    ("height", "width", "num_frames", "expected"),
    [
        (720, 1280, 100, "480x832x77"),  # the only one of its shape, though others are nearer in area
        (1280, 720, 100, "832x480x49"),
        (500, 500, 100, "512x512x49"),
        (300, 300, 100, "256x256x77"),  # of two squares the nearer in area
        (300, 300, 76, "256x256x17"),  # the longest that fits
        (300, 300, 3, "256x256x17"),  # none fits: the shortest
        (500, 500, 17, "512x512x49"),  # the size goes before the length
    ],
)
def test_the_nearest_shape_then_area_then_the_longest(height: int, width: int, num_frames: int, expected: str) -> None:
    given = parse("480x832,832x480x49,512x512x49,256x256x77,256x256x17")
    assert str(choose_bucket(given, height=height, width=width, num_frames=num_frames)) == expected


@given(st.lists(buckets, min_size=2, max_size=6, unique=True), pixels, pixels)
def test_the_order_of_the_buckets_does_not_matter_once_parsed(given: list[Bucket], height: int, width: int) -> None:
    one, other = parse(",".join(map(str, given))), parse(",".join(map(str, given[::-1])))
    size = {"height": height, "width": width, "num_frames": 50}
    assert choose_bucket(one, **size) == choose_bucket(other, **size)


# What it costs


def test_enlarging_is_what_the_resize_does_after_the_crop() -> None:
    bucket = Bucket(480, 832, 77)
    assert upscaling(bucket, height=480, width=832) == 1
    assert upscaling(bucket, height=240, width=416) == 2
    assert upscaling(bucket, height=240, width=1000) == 2  # the width is cropped to 416
    assert upscaling(bucket, height=1920, width=832) == 1
    assert upscaling(bucket, height=960, width=1664) == 0.5


@given(buckets, pixels, pixels)
def test_the_crop_keeps_the_largest_part_of_the_buckets_shape(bucket: Bucket, height: int, width: int) -> None:
    kept_height = min(height, width * bucket.height / bucket.width)
    kept_width = min(width, height * bucket.width / bucket.height)
    cropped = cropped_away(bucket, height=height, width=width)
    assert cropped == pytest.approx(1 - kept_height * kept_width / (height * width))
    assert upscaling(bucket, height=height, width=width) == pytest.approx(bucket.height / kept_height)
