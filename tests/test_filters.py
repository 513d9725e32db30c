"""Filters leave out what they are asked to and nothing else; what they leave out is accounted for as all else is."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from making import make_rules
from quick_cases import mostly_slow
from test_job import make_bad, make_batch, make_committer, make_job
from test_plan import make_index, make_sample

from streamprep import plugins
from streamprep.cli import main, parse
from streamprep.config import EncodeConfig
from streamprep.decode import decode_clip
from streamprep.errors import TooManyBadSamples, UserError
from streamprep.filters import Filters, FrameFilter, SampleFilter, SurveyFilter
from streamprep.manifest import open_shards
from streamprep.plan import Excluded, explain, is_drop, plan_unit
from streamprep.prepare import open_filters
from streamprep.shards import ShardSample
from streamprep.stream import ClipStream
from streamprep.types import DecodeRequest

if TYPE_CHECKING:
    from forks import Forks
    from jobs import EncodeJob
    from torch import Tensor

    NewJob = Callable[..., EncodeJob]
    WriteVideo = Callable[..., Path]

pytest_plugins = ["jobs"]

GROUP = "streamprep.filters"
ARGUMENTS = {"duration": "2..10", "size": "256..", "fps": "10..60", "aspect": "0.5..2"}
"""For those that need one."""
CRASHED = 137


def asked(name: str) -> str:
    """A filter as a person asks for it."""
    return name.replace("_", "-") + (f":{ARGUMENTS[name]}" if name in ARGUMENTS else "")


def why(asked: str, sample: ShardSample) -> str | None:
    """Why one filter leaves out a sample."""
    excluded = Filters([asked]).excludes(sample)
    return excluded and excluded[1]


def surveyed(asked: list[str], samples: Iterable[ShardSample]) -> dict[str, str]:
    """The keys of those that are left out, with the reason."""
    samples = list(samples)
    filters = Filters(asked)
    filters.survey(lambda earlier: [sample for sample in samples if earlier.excludes(sample) is None])
    return {sample.key: excluded[0] for sample in samples if (excluded := filters.excludes(sample))}


# The contract


@pytest.mark.parametrize("name", plugins.names(GROUP))
def test_a_filter_does_what_filters_do(name: str) -> None:
    module = plugins.load(GROUP, name)
    assert asked(name).split(":")[0] in (module.__doc__ or "")
    one = module.make_filter(ARGUMENTS.get(name, ""))
    assert isinstance(one, (SampleFilter, FrameFilter))
    samples = [make_sample(key) for key in "abc"]
    if isinstance(one, SurveyFilter):
        one.survey(samples)
    if isinstance(one, SampleFilter):
        answers = [one.excludes(sample) for sample in samples]
        assert all(answer is None or answer.strip() for answer in answers)
        if isinstance(one, SurveyFilter):
            one.survey(iter(samples))
        assert [one.excludes(sample) for sample in samples] == answers
    if isinstance(one, FrameFilter):
        for frames in (torch.zeros(5, 3, 16, 24, dtype=torch.uint8), noise(5), noise(1)):
            before = frames.clone()
            answer = one.excludes_frames(frames)
            assert answer is None or answer.strip()
            assert one.excludes_frames(frames) == answer
            assert torch.equal(frames, before)


@pytest.mark.parametrize("name", plugins.names(GROUP))
def test_an_argument_that_cannot_be_understood_is_refused_with_the_form_that_can(name: str) -> None:
    with pytest.raises(UserError, match=r"^--filters [a-z_]+:nonsense: (a range|settings|it takes no arg).*'nonsense'"):
        Filters([f"{name}:nonsense"])


@pytest.mark.parametrize("name", plugins.names(GROUP))
def test_dashes_and_underscores_both_work_and_the_reason_has_dashes(name: str) -> None:
    argument = asked(name).partition(":")[2]
    for spelling in (name, name.replace("_", "-")):
        filters = Filters([f"{spelling}:{argument}"])
        assert [shown for shown, _ in filters._filters] == [name.replace("_", "-")]


def test_without_any_nothing_is_left_out() -> None:
    assert Filters().excludes(make_sample()) is None
    assert Filters().excludes_frames(noise(3)) is None
    assert Filters().frame_filters == []
    assert EncodeConfig(shards="s", out="o", model_path="m").filters == ()


def test_a_filters_reason_is_documented() -> None:
    assert is_drop("filter:black")
    assert explain("filter:black") == "--filters leaves it out"
    assert not is_drop("decode_error")


# By the header


@pytest.mark.parametrize(
    ("asked", "sample", "message"),
    [
        ("duration:2..10", {"num_frames": 47}, "its length is 1.95833 s, 2..10 is asked for"),
        ("duration:2..10", {"num_frames": 48}, None),
        ("duration:2..10", {"num_frames": 240}, None),
        ("duration:2..10", {"num_frames": 241}, "its length is 10.0417 s, 2..10 is asked for"),
        ("duration:..10", {"num_frames": 1}, None),
        ("duration:2..", {"num_frames": 10**6}, None),
        ("size:256..", {"height": 256, "width": 300}, None),
        ("size:256..", {"height": 255, "width": 3000}, "its shorter side is 255 pixels, 256.. is asked for"),
        ("size:256..", {"height": 3000, "width": 255}, "its shorter side is 255 pixels, 256.. is asked for"),
        ("size:..256", {"height": 256, "width": 4000}, None),
        ("fps:10..60", {"fps": 8.0}, "its frame rate is 8 fps, 10..60 is asked for"),
        ("fps:10..60", {"fps": 60.0}, None),
        ("fps:24..24", {"fps": 24000 / 1001}, "its frame rate is 23.976 fps, 24..24 is asked for"),
        ("aspect:0.5..2", {"height": 100, "width": 200}, None),
        ("aspect:0.5..2", {"height": 100, "width": 49}, "its width / height is 0.49, 0.5..2 is asked for"),
        ("aspect:1..", {"height": 320, "width": 180}, "its width / height is 0.5625, 1.. is asked for"),
    ],
)
def test_ranges_hold_both_their_ends(asked: str, sample: dict[str, Any], message: str | None) -> None:
    assert why(asked, make_sample(**sample)) == message


@pytest.mark.parametrize("name", ARGUMENTS)
def test_what_is_not_known_is_not_in_the_range(name: str) -> None:
    """Where only captions are encoded, a sample may have no header; a clip without one is bad before that."""
    unread = make_sample(probe_error="no video")
    assert (why(asked(name), unread) or "").endswith("is not known")
    unit = plan_unit("000000", make_index(unread), make_rules(filters=(asked(name),)))
    assert ([item.reason for item in unit.bad], unit.dropped) == (["probe_failed"], ())
    unit = plan_unit("000000", make_index(unread), make_rules(filters=(asked(name),), workload_type="text"))
    assert [item.reason for item in unit.dropped] == [f"filter:{name}"]


@pytest.mark.parametrize(
    "argument",
    ["", "..", "2", "2...", "2..1", "-1..2", "nan..2", "2..nan", "a..b", "2..10..20", "2,10", "2-10", "2..x"],
)
def test_what_is_no_range_is_refused(argument: str) -> None:
    with pytest.raises(UserError, match=r"a range is needed, as 2\.\.10, 2\.\. or \.\.10, got "):
        Filters([f"duration:{argument}"])


@given(st.floats(0, 100), st.floats(0, 100), st.integers(1, 3000))
def test_a_range_leaves_exactly_what_lies_in_it(one: float, other: float, num_frames: int) -> None:
    low, high = sorted((one, other))
    sample = make_sample(num_frames=num_frames)
    assert (why(f"duration:{low!r}..{high!r}", sample) is None) == (low <= num_frames / 24 <= high)


# By the frames


def noise(num_frames: int, *, highest: int = 255, seed: int = 0) -> Tensor:
    """Frames of which no two are alike."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, highest + 1, (num_frames, 3, 20, 30), generator=generator, dtype=torch.uint8)


def picture(num_frames: int) -> Tensor:
    """The same frame again and again."""
    return noise(1).repeat(num_frames, 1, 1, 1)


def frames_why(asked: str, frames: Tensor) -> str | None:
    excluded = Filters([asked]).excludes_frames(frames)
    return excluded and excluded[1]


def test_dark_pixels_make_black_frames_make_a_black_clip() -> None:
    message = "10 of 10 frames are black: 98.0% of the pixels or more are at most 32"
    assert frames_why("black", noise(10, highest=32)) == message
    assert frames_why("black", noise(10, highest=40)) is None
    blue = torch.zeros(10, 3, 20, 30, dtype=torch.uint8)
    blue[:, 2] = 33
    assert frames_why("black", blue) is None
    assert frames_why("black:level=33", blue) is not None


def test_a_title_on_black_is_not_black() -> None:
    frames = torch.zeros(10, 3, 20, 30, dtype=torch.uint8)
    frames[..., 0, :12] = 255  # 2 %
    assert frames_why("black", frames) is not None
    frames[..., 0, 12] = 255
    assert frames_why("black", frames) is None
    assert frames_why("black:pixels=0.9", frames) is not None


@pytest.mark.parametrize(("num_bright", "is_black"), [(0, True), (1, True), (2, False), (10, False)])
def test_almost_all_frames_must_be_black(num_bright: int, is_black: bool) -> None:
    frames = torch.zeros(10, 3, 20, 30, dtype=torch.uint8)
    frames[10 - num_bright :] = 200
    assert (frames_why("black", frames) is not None) == is_black
    assert (frames_why("black", frames.flip(0)) is not None) == is_black
    assert (frames_why("black:frames=1", frames) is not None) == (num_bright == 0)


def test_a_still_picture_is_static_and_one_frame_is_no_clip_to_tell() -> None:
    assert (
        frames_why("static", picture(5)) == "at most 0.00% of the pixels differ by more than 12 from the first frame's"
    )
    assert frames_why("static", picture(1)) is None
    assert frames_why("static", noise(5)) is None


def test_grain_is_not_motion_and_a_small_moving_thing_is() -> None:
    grain = noise(5, highest=12) + 100
    assert frames_why("static", grain) is not None
    assert frames_why("static:level=5", grain) is None
    moving = grain.clone()
    moving[3, :, 0, :3] = 255  # 3 of 600 pixels, in one frame
    assert frames_why("static", moving) is not None
    moving[3, :, 0, :4] = 255
    assert frames_why("static", moving) is None
    assert frames_why("static:pixels=0.1", moving) is not None


def test_slow_motion_is_motion() -> None:
    """From frame to frame hardly anything changes."""
    fading = torch.arange(100, 150, 2, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 3, 20, 30).contiguous()
    assert frames_why("static", fading) is None


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("black:light=3", "any of level=32,pixels=0.98,frames=0.9"),
        ("black:level", "any of level=32"),
        ("black:level=", "any of level=32"),
        ("black:level=x", "got 'level=x'"),
        ("black:level=300", "level must be a whole number in 0..255, got 300"),
        ("black:level=1.5", "level must be a whole number in 0..255, got 1.5"),
        ("black:level=nan", "level must be a whole number"),
        ("black:pixels=2", "pixels must be in 0..1, got 2"),
        ("black:pixels=0.5,frames=nan", "frames must be in 0..1, got nan"),
        ("static:frames=1", "any of level=12,pixels=0.005"),
        ("static:pixels=-1", "pixels must be in 0..1, got -1"),
        ("duplicate-video:all", "it takes no argument, got 'all'"),
    ],
)
def test_a_setting_that_is_none_is_refused(asked: str, message: str) -> None:
    with pytest.raises(UserError, match=r"^--filters ") as refused:
        Filters([asked])
    assert message in str(refused.value)


def coded(path: Path, num_frames: int = 5) -> Tensor:
    """The first frames of a video of a frame a second, as they are encoded."""
    video = path.read_bytes()
    request = DecodeRequest(
        sha256=hashlib.sha256(video).hexdigest(),
        timestamps=tuple(float(number) for number in range(num_frames)),
        indices=tuple(range(num_frames)),
        tolerance_seconds=0.5,
        height=48,
        width=64,
        max_pixels=10**6,
    )
    return decode_clip(video, request)


def write_kind(path: Path, kind: str, *, padding_bytes: int = 0) -> Path:
    """A video of 8 frames at 1 fps with film grain: ``black``, ``static``, ``moving``, or black with a ``title``."""
    random = np.random.default_rng(int.from_bytes(path.stem.encode()))
    coarse = np.kron(random.integers(40, 220, (6, 8, 3)), np.ones((8, 8, 1)))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1, options={"crf": "28"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(8):
            frame = {
                "black": np.zeros_like(coarse),
                "static": coarse,
                "moving": np.roll(coarse, 3 * number, axis=1),
                "title": np.where(np.arange(48)[:, None, None] < 5, 230.0, 0.0) * np.ones_like(coarse),
            }[kind]
            grainy = (frame + random.normal(0, 2, frame.shape)).clip(0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grainy, format="rgb24")))
        container.mux(stream.encode())
    if padding_bytes:
        with open(path, "ab") as file:
            file.write(padding_bytes.to_bytes(4, "big") + b"free" + bytes(padding_bytes - 8))
    return path


@pytest.mark.parametrize(
    ("kind", "excluding"),
    [("black", ["black", "static"]), ("static", ["static"]), ("title", ["static"]), ("moving", [])],
)
def test_coded_clips_are_told_apart(tmp_path: Path, kind: str, excluding: list[str]) -> None:
    frames = coded(write_kind(tmp_path / f"{kind}.mp4", kind))
    assert [name for name in ("black", "static") if frames_why(name, frames)] == excluding


def test_real_clips_are_neither_black_nor_static(shared_clips: Path, tmp_path: Path) -> None:
    assert main(["pack", str(shared_clips), str(tmp_path / "shards"), "--num-workers", "1"]) == 0
    rules = make_rules(max_height=240, max_width=416)
    shards, filtered = str(tmp_path / "shards"), dataclasses.replace(rules, filters=("black", "static"))
    keys = [clip.key for clip in ClipStream(shards, rules)]
    assert len(keys) == 5
    assert [clip.key for clip in ClipStream(shards, filtered)] == keys
    reversed_thresholds = dataclasses.replace(rules, filters=("static:pixels=1",))
    assert [clip.key for clip in ClipStream(shards, reversed_thresholds)] == []


# By all samples


def test_the_first_of_each_video_stays() -> None:
    digests = {"a": "11", "b": "22", "c": "11", "d": "33", "e": "22", "f": "11"}
    samples = [
        dataclasses.replace(one, metadata={**one.metadata, "sha256": digest * 32})
        for key, digest in digests.items()
        for one in [make_sample(key)]
    ]
    assert surveyed(["duplicate-video"], samples) == dict.fromkeys("cef", "filter:duplicate-video")
    filters = Filters(["duplicate-video"])
    filters.survey(lambda _: samples)
    assert filters.excludes(samples[4]) == ("filter:duplicate-video", "its video is that of b")
    filters.survey(lambda _: samples[2:])  # what was seen before is forgotten
    assert [sample.key for sample in samples[2:] if filters.excludes(sample)] == ["f"]


def test_the_first_of_each_caption_stays() -> None:
    captions = {
        "a": ("A dog.",),
        "b": (" A  dog.\n",),
        "c": ("a dog.",),
        "d": ("A dog.", "A cat."),
        "e": ("A dog.", "A cat."),
        "f": ("A dog. A cat.",),
        "g": ("\ud800",),
        "h": ("\ud800",),
    }
    samples = [make_sample(key, captions=value) for key, value in captions.items()]
    assert surveyed(["duplicate-caption"], samples) == dict.fromkeys("beh", "filter:duplicate-caption")


def test_duplicates_are_sought_among_what_earlier_filters_leave() -> None:
    samples = [make_sample("a", num_frames=24), make_sample("b"), make_sample("c")]
    assert surveyed(["duration:2..", "duplicate-video"], samples) == {
        "a": "filter:duration",
        "c": "filter:duplicate-video",
    }
    assert surveyed(["duplicate-video", "duration:2.."], samples) == {
        "a": "filter:duration",
        "b": "filter:duplicate-video",
        "c": "filter:duplicate-video",
    }


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), max_size=30))
def test_one_of_each_stays_whatever_there_is(pairs: list[tuple[int, int]]) -> None:
    samples = []
    for number, (video, caption) in enumerate(pairs):
        one = make_sample(f"{number:02d}", captions=(f"caption {caption}",))
        samples.append(dataclasses.replace(one, metadata={**one.metadata, "sha256": f"{video:064d}"}))
    left_out = surveyed(["duplicate-video", "duplicate-caption"], samples)
    stay = [pair for number, pair in enumerate(pairs) if f"{number:02d}" not in left_out]
    assert len({video for video, _ in stay}) == len({caption for _, caption in stay}) == len(stay)
    assert {pair[0] for pair in pairs} == {
        pair[0] for n, pair in enumerate(pairs) if left_out.get(f"{n:02d}") != "filter:duplicate-video"
    }


# Asking for them


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("nothing", "no filter 'nothing'; one of aspect, black, duplicate-caption, "),
        ("duraton:2..10", "no filter 'duraton'; one of aspect, .*, or MODULE:FUNCTION"),
        ("", "no filter ''; one of "),
        ("no_such_module:make", "cannot load 'no_such_module:make': No module named"),
        ("json:nothing", "cannot load 'json:nothing': module 'json' has no attribute"),
        ("builtins:str", "it has neither `excludes` nor `excludes_frames`"),
        ("_arguments:2..3", "no filter '_arguments'; one of"),
    ],
)
def test_what_is_no_filter_is_refused(asked: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^--filters {asked}: {message}"):
        Filters([asked])


PLUGIN = """
from streamprep.errors import UserError

class Contains:
    def __init__(self, word):
        self.word = word

    def excludes(self, sample):
        return f"it says {self.word}" if self.word in sample.metadata["captions"][0] else None

    def excludes_frames(self, frames):
        return "it is bright" if frames.float().mean() > 200 else None

def make(argument):
    if not argument:
        raise UserError("a word is needed")
    return Contains(argument)

make_filter = make
"""


@pytest.fixture
def installed_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A distribution with the filter ``contains``, as pip would install it."""
    site, module = tmp_path / "site", "streamprep_test_filter"
    metadata = site / "streamprep_test_filter-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / f"{module}.py").write_text(PLUGIN)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: streamprep-test-filter\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{GROUP}]\ncontains = {module}\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, module, raising=False)
    return module


def test_a_module_and_function_or_an_installed_one_are_filters_too(installed_plugin: str) -> None:
    sample = make_sample(captions=("A dog: it barks.",))
    for asked, name in (("contains", "contains"), (f"{installed_plugin}:make", f"{installed_plugin}:make")):
        filters = Filters([f"{asked}:dog: it"])
        assert filters.excludes(sample) == (f"filter:{name}", "it says dog: it")
        assert filters.excludes_frames(torch.full((2, 3, 4, 4), 255, dtype=torch.uint8)) == (
            f"filter:{name}",
            "it is bright",
        )
        assert filters.frame_filters == [name]
        with pytest.raises(UserError, match=f"^--filters {asked}: a word is needed"):
            Filters([asked])


def test_a_command_line_has_a_list_of_them() -> None:
    config = parse("encode", ["s", "o", "--model-path", "m", "--filters", "duration:2..10", "black", "--seed", "1"])
    assert isinstance(config, EncodeConfig)
    assert (config.filters, config.seed) == (("duration:2..10", "black"), 1)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], ("black", "size:256..")),
        (["--filters", "static"], ("static",)),
        (["--filters"], ()),
        (["--filters=static"], ("static",)),
    ],
)
def test_a_file_of_settings_has_a_list_of_them_and_the_command_line_the_last_word(
    flags: list[str], expected: tuple[str, ...], tmp_path: Path
) -> None:
    """A list of flags takes in all that follows it: the folders too."""
    (tmp_path / "job.toml").write_text('filters = ["black", "size:256.."]\nmodel_path = "m"\nseed = 7\n')
    config = parse("encode", ["s", "o", "--config", str(tmp_path / "job.toml"), *flags])
    assert isinstance(config, EncodeConfig)
    assert (config.shards, config.out, config.filters, config.seed) == ("s", "o", expected, 7)


@pytest.mark.parametrize("value", ['"black"', "[1]", "[true]", "[[]]", "{a = 1}"])
def test_a_file_of_settings_must_have_a_list_of_strings(
    value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.toml").write_text(f"filters = {value}\n")
    assert main(["encode", "s", "o", "--config", str(tmp_path / "job.toml")]) == 2
    assert "job.toml: filters must be a list of strings, got " in capsys.readouterr().err


# In a plan


def test_filters_come_after_all_other_rules() -> None:
    rules = make_rules(filters=("size:256..",), where="fps > 1")
    samples = [
        make_sample("a", captions=(), height=100),
        make_sample("b", num_frames=1, height=100),
        make_sample("c", height=100),
        make_sample("d", height=300),
    ]
    unit = plan_unit("000000", make_index(*samples), rules)
    assert [clip.key for clip in unit.clips] == ["d"]
    assert [(item.key, item.reason) for item in unit.dropped] == [
        ("a", "empty_caption"),
        ("b", "too_short"),
        ("c", "filter:size"),
    ]
    assert unit.dropped[2] == Excluded(
        key="c", reason="filter:size", message="its shorter side is 100 pixels, 256.. is asked for", stage="plan"
    )


# In a job


ALL = (
    "duration:4..",
    "size:32..",
    "fps:..1.5",
    "aspect:0.6..",
    "black",
    "static",
    "duplicate-video",
    "duplicate-caption",
)
EXPECTED = {
    "filter:duration": ["a1"],
    "filter:size": ["a2"],
    "filter:fps": ["a3"],
    "filter:aspect": ["a4"],
    "filter:duplicate-video": ["b2"],
    "filter:duplicate-caption": ["b3"],
    "filter:black": ["b4", "b4@01", "c0"],
    "filter:static": ["b5", "c1"],
}
FILTER_FLAGS = ["--filters", *ALL]


@pytest.fixture(scope="session")
def filtered_shards(
    forks: Forks,
    tmp_path_factory: pytest.TempPathFactory,
    make_video: WriteVideo,
    undecodable_video: Callable[[Path], Path],
) -> Path:
    """Three units: of the first nothing but the first sample stays; of the last, nothing."""
    root = tmp_path_factory.mktemp("filtered")

    def write(name: str, **options: Any) -> None:
        padding = {"padding_bytes": 200_000 if name[0] == "a" else 150_000}
        make_video(
            root / "dataset/videos" / name, seed=int.from_bytes(name.encode()), **{"fps": 1, **padding, **options}
        )

    write("a0.mp4")
    write("a1.mp4", num_frames=3)
    write("a2.mp4", size=(48, 24))
    write("a3.mp4", fps=2, num_frames=16)
    write("a4.mp4", size=(48, 96))
    write("b0.mp4")
    write("b1.mp4")
    (root / "dataset/videos/b2.mp4").write_bytes((root / "dataset/videos/a0.mp4").read_bytes())
    write("b3.mp4")
    videos = root / "dataset/videos"
    write_kind(videos / "b4.mp4", "black", padding_bytes=150_000)
    write_kind(videos / "b5.mp4", "static", padding_bytes=150_000)
    (videos / "b6.mp4").write_bytes(undecodable_video(videos / "b6.mp4").read_bytes())
    write_kind(videos / "c0.mp4", "black", padding_bytes=990_000)
    write_kind(videos / "c1.mp4", "static", padding_bytes=100)
    captions: dict[str, Any] = {path.name: f"It is called {path.name}." for path in sorted(videos.iterdir())}
    captions |= {"b3.mp4": captions["b1.mp4"], "b4.mp4": ["Nothing.", "Really nothing."]}
    rows = [{"path": name, "cap": caption} for name, caption in captions.items()]
    (root / "dataset/videos2caption.json").write_text(json.dumps(rows))
    packed = forks.run("pack", root / "dataset", root / "shards", "--shard-size-mb", 1, "--num-workers", 1)
    assert packed.code == 0, packed.output
    assert "14 videos" in packed.output
    return root / "shards"


class FilterJob:
    """A job with filters."""

    def __init__(self, job: EncodeJob) -> None:
        self._job = job

    def run(self, *, filters: tuple[str, ...] = ALL, crash_at: str | None = None, **flags: object) -> Any:
        out = self._job.out.parent / f"{self._job.out.name}.toml"
        out.write_text(f"filters = {json.dumps(list(filters))}\n")
        defaults = {"config": out, "caption": "all", "drop_short_ratio": 0.0, "preprocess_video_batch_size": 3}
        return self._job.run(crash_at=crash_at, **{**defaults, **flags})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._job, name)

    @property
    def dropped(self) -> dict[str, list[str]]:
        by_reason: dict[str, list[str]] = {}
        for record in self._job.job.records():
            for item in record.dropped:
                by_reason.setdefault(item.reason, []).append(item.key)
        return {reason: sorted(keys) for reason, keys in by_reason.items()}

    @property
    def rows(self) -> set[str]:
        return {row.key for record in self._job.job.records() for file in record.files for row in file.rows}


@pytest.fixture
def filter_job(new_job: NewJob, filtered_shards: Path) -> FilterJob:
    return FilterJob(new_job(filtered_shards))


@pytest.fixture(scope="session")
def finished(forks: Forks, filtered_shards: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> FilterJob:
    """The job with all filters, in one go and one process."""
    from jobs import EncodeJob

    job = FilterJob(EncodeJob(forks, filtered_shards, model, tmp_path_factory.mktemp("filtered-job") / "out"))
    process = job.run(serial=True)
    assert process.code == 0, process.output
    assert "dropped 11: 3 filter:black, 2 filter:static" in process.output
    return job


def test_every_filter_drops_what_it_should_and_all_is_accounted_for(finished: FilterJob) -> None:
    assert finished.dropped == EXPECTED
    assert finished.rows == {"a0", "b0", "b1"}
    assert finished.problems() == []
    stages = {item.reason: item.stage for record in finished.job.records() for item in record.dropped}
    assert stages == {
        reason: "decode" if reason in ("filter:black", "filter:static") else "plan" for reason in EXPECTED
    }
    records = list(finished.job.records())
    assert [dict(record.bad) for record in records] == [{}, {"decode_error": 1}, {}]
    assert [record.num_rows for record in records] == [1, 2, 0]


def test_status_counts_them(finished: FilterJob, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(finished.out)]) == 0
    output = capsys.readouterr().out
    assert "samples  8 of 8 done" in output
    assert "dropped  3 filter:black" in output
    assert "bad      1 decode_error" in output
    success = json.loads((finished.out / "_streamprep/SUCCESS.json").read_text())
    assert success["dropped"] == {reason: len(keys) for reason, keys in EXPECTED.items()}


def test_a_clip_that_is_dropped_for_its_frames_changes_none_of_its_neighbours(
    finished: FilterJob, filter_job: FilterJob
) -> None:
    others = tuple(one for one in ALL if one not in ("black", "static"))
    assert filter_job.run(serial=True, filters=others).code == 0
    rows, more = latents(finished), latents(filter_job)
    assert rows.items() < more.items()
    assert more.keys() - rows.keys() == {"b4.mp4", "b4.mp4@01", "b5.mp4", "c0.mp4", "c1.mp4"}


def latents(job: FilterJob) -> dict[str, bytes]:
    columns = ["id", "vae_latent_bytes"]
    table = pq.read_table(job.out / "combined_parquet_dataset", columns=columns).to_pylist()
    return {row["id"]: row["vae_latent_bytes"] for row in table}


@pytest.mark.slow  # test_kills.py says so of a job without these
@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_bytes_do_not_depend_on_the_number_of_decoding_processes(
    finished: FilterJob, filter_job: FilterJob, num_workers: int
) -> None:
    process = filter_job.run(num_workers=num_workers)
    assert process.code == 0, process.output
    assert filter_job.result() == finished.result()


@pytest.mark.parametrize(
    "point",
    mostly_slow(["plan.after:1", "data:1", "record:1", "record.after:1", "record:2", "record:3"], quick=("record:2",)),
)
def test_a_killed_job_ends_with_the_same_bytes(finished: FilterJob, filter_job: FilterJob, point: str) -> None:
    assert filter_job.run(serial=True, crash_at=point).code == CRASHED
    process = filter_job.run(serial=True)
    assert process.code == 0, process.output
    assert filter_job.result() == finished.result()
    assert filter_job.problems() == []


def test_a_unit_made_again_is_the_same(finished: FilterJob, filter_job: FilterJob) -> None:
    """Its duplicates' firsts are in another shard."""
    assert filter_job.run(serial=True).code == 0
    for name in ("records/000001.json", "SUCCESS.json"):
        (filter_job.out / "_streamprep" / name).unlink()
    assert filter_job.run(serial=True).code == 0
    assert filter_job.result() == finished.result()


def test_verify_misses_a_row_whose_drop_is_lost(filter_job: FilterJob) -> None:
    assert filter_job.run(serial=True).code == 0
    path = filter_job.out / "_streamprep/records/000001.json"
    record = json.loads(path.read_text())
    record["dropped"] = [item for item in record["dropped"] if item[0] != "b4@01"]
    path.write_text(json.dumps(record))
    assert any(
        "unit 000001: its 5 rows are not the 6 that were planned" in problem for problem in filter_job.problems()
    )


def test_a_plan_shows_what_it_knows_and_says_what_it_cannot(
    forks: Forks, filtered_shards: Path, model: Path, finished: FilterJob, tmp_path: Path
) -> None:
    size = ["--max-height", 32, "--max-width", 48, "--num-frames", 5, "--train-fps", 1, "--drop-short-ratio", 0]
    out = tmp_path / "plan.parquet"
    process = forks.run(
        *("plan", filtered_shards, "--model-path", model, *size, "--caption", "all", "--out", out, *FILTER_FLAGS)
    )
    assert process.code == 0, process.output
    assert "encoded   8 clips in 9 rows" in process.output
    assert "dropped   1 filter:duplicate-video: --filters leaves it out" in process.output
    line = "filters   black, static: decided by the frames, while encoding, which may leave fewer rows"
    assert line in process.output.splitlines()
    dropped = {
        (row["key"], row["reason"], row["message"])
        for row in pq.read_table(out).to_pylist()
        if row["decision"] == "drop"
    }
    assert dropped == {
        (item.key, item.reason, item.message)
        for record in finished.job.records()
        for item in record.dropped
        if item.stage == "plan"
    }


@pytest.mark.parametrize("filters", [ALL[:-1], ALL[::-1], ("duration:4.0..", *ALL[1:]), ()])
def test_other_filters_on_the_same_output_are_refused_by_name(finished: FilterJob, filters: tuple[str, ...]) -> None:
    refused = finished.run(serial=True, filters=filters)
    assert refused.code == 2
    assert "  sampling.filters: ['duration:4..', " in refused.output


def test_what_is_dropped_for_its_frames_was_attempted_and_is_not_bad(tmp_path: Path) -> None:
    """21 bad samples of 25 stop a job, of 500 they do not; whoever resumes it counts the same."""
    current = make_job(tmp_path, num_units=2)
    first, second = current.plan.units
    black = [Excluded(key=f"0/{n}", reason="filter:black", message="dark", stage="decode") for n in range(480)]
    with make_committer(current) as committer:
        committer.take(dataclasses.replace(make_batch(first, [], [make_bad("0/bad")]), dropped=black))
        committer.check_all()
    with make_committer(current) as committer:
        committer.take(make_batch(second, [], [make_bad(f"1/{n}") for n in range(20)]))
        committer.check_all()
    with make_committer(make_job(tmp_path / "other")) as committer, pytest.raises(TooManyBadSamples, match="21 of 25"):
        bad = [make_bad(f"0/{n}") for n in range(21)]
        committer.take(dataclasses.replace(make_batch(first, [], bad), dropped=black[:4]))


def test_a_job_of_which_every_clip_is_dropped_for_its_frames_ends_with_nothing(
    new_job: NewJob, forks: Forks, make_shards: Callable[..., Path]
) -> None:
    """None of them is bad, so nothing is wrong with the settings but what was asked for."""
    shards = make_shards({f"{n}.mp4": lambda path: write_kind(path, "black") for n in range(3)})
    job = FilterJob(new_job(shards))
    process = job.run(serial=True, filters=("black",))
    assert process.code == 0, process.output
    assert "0 rows, 0 files" in process.output
    assert "dropped 3: 3 filter:black" in process.output
    assert job.problems() == []
    assert main(["status", str(job.out)]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"filters": ("black:level=x",)}, "--filters black:level=x: settings are needed, any of level=32"),
        ({"filters": ("dark",)}, "--filters dark: no filter 'dark'; one of aspect, black"),
        ({"filters": ("static",), "workload_type": "text"}, "--filters static looks at frames, --workload-type text"),
        ({"filters": ("duration:9..",)}, "none of 14 samples would be encoded: 14 filter:duration (--filters leaves"),
    ],
)
def test_a_users_mistake_is_refused_before_any_work(
    filter_job: FilterJob, flags: Mapping[str, Any], message: str
) -> None:
    refused = filter_job.run(serial=True, **flags)
    assert refused.code == 2, refused.output
    assert message in refused.output
    assert not filter_job.out.exists() or not list(filter_job.out.rglob("*"))


def test_captions_alone_can_be_filtered(filter_job: FilterJob) -> None:
    process = filter_job.run(serial=True, workload_type="text", filters=("duplicate-caption", "size:32.."))
    assert process.code == 0, process.output
    assert filter_job.dropped == {"filter:duplicate-caption": ["b3"], "filter:size": ["a2"]}
    assert filter_job.problems() == []


def test_a_stream_of_clips_is_filtered_too(filtered_shards: Path) -> None:
    rules = make_rules(max_height=32, max_width=48, num_frames=5, train_fps=1.0, drop_short_ratio=0.0, filters=ALL)
    assert open_filters(open_shards(str(filtered_shards)), rules).frame_filters == ["black", "static"]
    stream = ClipStream(str(filtered_shards), rules)
    assert [clip.key for clip in stream] == ["a0", "b0", "b1"]
    assert [key for key, _ in stream.bad] == ["b6"]
