"""`streamprep plan` says what `encode` then does, with windows, buckets and all captions; and how little it needs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest
from quick_cases import mostly_slow

from streamprep.errors import BAD_REASONS
from streamprep.plan import DROP_REASONS

if TYPE_CHECKING:
    from forks import Forks, Process
    from jobs import EncodeJob

    NewJob = Callable[..., EncodeJob]
    WriteVideo = Callable[..., Path]

pytest_plugins = ["jobs"]

FLAGS: dict[str, object] = {
    "buckets": "32x48,48x32,32x48x9,32x32",
    "window": "every",
    "window_stride": 3,
    "caption": "all",
    "max_upscale": 1.5,
    "where": "score > 0 or score is null",
}
"""Of 5 frames at 1 fps, but for one bucket's 9."""
THIRD = 330_000
CRASHED = 137


@pytest.fixture(scope="session")
def mixed_shards(
    forks: Forks,
    tmp_path_factory: pytest.TempPathFactory,
    make_video: WriteVideo,
    undecodable_video: Callable[[Path], Path],
) -> Path:
    """Three units of lying, upright and square videos of several lengths, and some of every other kind."""
    root = tmp_path_factory.mktemp("mixed")
    videos: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "a0.mp4": ({"size": (96, 64), "num_frames": 13}, {"cap": ["A wide one.", "", "A long one."], "score": 5}),
        "a1.mp4": ({"size": (64, 96), "num_frames": 8}, {"cap": ["An upright one."]}),
        "a2.mp4": ({"size": (64, 64), "num_frames": 5}, {"cap": ["A square one.", "Another caption."]}),
        "b0.mp4": ({"size": (96, 64), "num_frames": 6}, {"cap": "A wide and short one."}),
        "b1.mp4": ({"size": (96, 64), "num_frames": 4}, {"cap": "It is too short."}),
        "b2.mp4": ({"size": (24, 16), "num_frames": 9}, {"cap": "It is too small."}),
        "c0.mp4": ({"size": (64, 96), "num_frames": 12}, {"cap": ["Another upright one.", "The same."], "score": 1}),
        "c1.mp4": ({"size": (64, 96), "num_frames": 12}, {"cap": "It has no score.", "score": -1}),
        "c2.mp4": ({}, {"cap": ["It is damaged.", "Very much."]}),
        "c3.mp4": ({}, {"cap": "It is no video."}),
    }
    rows = []
    for name, (options, row) in videos.items():
        path = root / "dataset/videos" / name
        if name == "c2.mp4":
            path.write_bytes(undecodable_video(path).read_bytes())
        elif name == "c3.mp4":
            path.write_bytes(b"<html>404</html>")
        else:
            make_video(path, fps=1, seed=int.from_bytes(name.encode()), padding_bytes=THIRD, **options)
        rows.append({"path": name, **row})
    (root / "dataset/videos2caption.json").write_text(json.dumps(rows))
    packed = forks.run("pack", root / "dataset", root / "shards", "--shard-size-mb", 1, "--num-workers", 1)
    assert packed.code == 0, packed.output
    assert "10 videos, 3 shards" in packed.output
    return root / "shards"


def plan(forks: Forks, shards: Path, model: Path, *arguments: object, **flags: object) -> Process:
    """Run ``streamprep plan``."""
    size = {"max_height": 32, "max_width": 48, "num_frames": 5, "train_fps": 1}
    words = [word for name, value in {**size, **flags}.items() for word in (f"--{name.replace('_', '-')}", value)]
    return forks.run("plan", shards, "--model-path", model, *words, *arguments)


def decisions_of(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


@pytest.fixture(scope="session")
def planned(
    forks: Forks, mixed_shards: Path, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, list[dict[str, Any]]]:
    """What it prints and writes of `mixed_shards`."""
    out = tmp_path_factory.mktemp("plan") / "plan.parquet"
    process = plan(forks, mixed_shards, model, "--out", out, **FLAGS)
    assert process.code == 0, process.output
    return process.output, decisions_of(out)


@pytest.fixture(scope="session")
def encoded(forks: Forks, mixed_shards: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> EncodeJob:
    """The job, in one go and one process."""
    from jobs import EncodeJob

    job = EncodeJob(forks, mixed_shards, model, tmp_path_factory.mktemp("encoded") / "out")
    process = job.run(serial=True, **FLAGS)
    assert process.code == 0, process.output
    return job


# What it says


def test_a_person_reads_sizes_drops_windows_and_bytes(planned: tuple[str, list[dict[str, Any]]]) -> None:
    output, _ = planned
    lines = output.splitlines()
    assert re.search(r"^model     wan 2\.1-t2v tiny, --workload-type t2v$", output, re.MULTILINE)
    assert "encoded   11 clips in 19 rows" in lines
    assert "  32x32x5          1 clip, 0 enlarged, 0.0% lost, 0.0% repeated" in lines
    assert "  32x48x9          2 clips, 0 enlarged, 0.0% lost, 0.0% repeated" in lines
    assert "windows   1 clip of 2 videos, 2 clips of 3 videos, 3 clips of 1 video each" in lines
    for reason, number in {"empty_caption": 1, "too_short": 1, "upscale": 1, "where": 1}.items():
        assert f"dropped   {number} {reason}: {DROP_REASONS[reason]}" in lines
    assert f"bad       1 probe_failed: {BAD_REASONS['probe_failed']}" in lines
    assert re.search(r"^size      fastvideo, float32: [\d.]+ [kM]B and about [\d.]+ [kM]B of text emb", output, re.M)


def test_every_decision_is_there_once(planned: tuple[str, list[dict[str, Any]]]) -> None:
    _, decisions = planned
    assert len({row["key"] for row in decisions}) == len(decisions)
    assert {row["decision"] for row in decisions} == {"encode", "drop", "bad"}
    for row in decisions:
        is_encoded = row["decision"] == "encode"
        assert (row["reason"] is None) == (row["message"] is None) == is_encoded
        assert (row["id"] is not None) == (row["height"] is not None) == is_encoded
        assert row["decision"] != "drop" or row["reason"] in DROP_REASONS
        assert row["decision"] != "bad" or row["reason"] in BAD_REASONS


def test_a_decision_says_what_becomes_of_the_pictures(planned: tuple[str, list[dict[str, Any]]]) -> None:
    by_key = {row["key"]: row for row in planned[1]}
    square = by_key["a2#00@01"]
    assert {name: square[name] for name in ("height", "width", "num_frames", "source_height", "source_width")} == {
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "source_height": 64,
        "source_width": 64,
    }
    assert (square["caption"], square["id"], square["source_fps"]) == ("Another caption.", "a2.mp4#00@01", 1.0)
    assert (square["begin_seconds"], square["end_seconds"]) == (0.0, 4.0)
    assert (square["cropped"], square["upscaling"], square["repeated_frames"]) == (0.0, 0.5, 0)


def test_repeated_frames_and_lost_pixels_are_counted(forks: Forks, mixed_shards: Path, model: Path) -> None:
    process = plan(forks, mixed_shards, model, train_fps=2, max_height=48, max_width=48)
    # Of 5 frames at twice the rate 2 repeat; a wide or upright picture loses a third.
    assert re.search(r"  48x48x5 +9 clips, 1 enlarged, \d\d\.\d% lost, 40\.0% repeated", process.output), process.output


# It is what encode does


def test_the_job_does_what_the_plan_says(planned: tuple[str, list[dict[str, Any]]], encoded: EncodeJob) -> None:
    decisions = planned[1]
    records = list(encoded.job.records())
    by_decision = {what: [row for row in decisions if row["decision"] == what] for what in ("encode", "drop", "bad")}

    quarantined = [clip for record in records for clip in encoded.job.read_quarantine(record)]
    rows = {row.key: row.bucket for record in records for file in record.files for row in file.rows}
    expected = {row["key"]: "{num_frames}x{height}x{width}".format_map(row) for row in by_decision["encode"]}
    damaged = {clip.key for clip in quarantined if clip.stage != "plan"}
    assert rows == {key: bucket for key, bucket in expected.items() if key not in damaged}
    assert damaged == {key for key in expected if key.startswith("c2")}
    assert len(damaged) == 4  # two windows, two captions

    def listed(items: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
        return sorted((row["key"], row["reason"], row["message"]) for row in items)

    dropped = [(item.key, item.reason, item.message) for record in records for item in record.dropped]
    assert sorted(dropped) == listed(by_decision["drop"])
    bad = [(clip.key, clip.reason, clip.exception) for clip in quarantined if clip.stage == "plan"]
    assert sorted(bad) == listed(by_decision["bad"])


def test_rows_have_the_shape_id_and_caption_of_their_decision(
    planned: tuple[str, list[dict[str, Any]]], encoded: EncodeJob
) -> None:
    table = {row["id"]: row for row in pq.read_table(encoded.out / "combined_parquet_dataset").to_pylist()}
    expected = [row for row in planned[1] if row["decision"] == "encode" and not row["key"].startswith("c2")]
    assert table.keys() == {row["id"] for row in expected}
    for row in expected:
        found = table[row["id"]]
        latent_frames = (row["num_frames"] - 1) // 4 + 1
        assert found["vae_latent_shape"] == [16, latent_frames, row["height"] // 8, row["width"] // 8]
        assert (found["height"], found["width"], found["caption"]) == (row["height"], row["width"], row["caption"])
        assert found["duration_sec"] == row["num_frames"]  # at 1 fps


def test_rows_of_one_clip_share_its_latent_and_windows_differ(encoded: EncodeJob) -> None:
    table = {row["id"]: row for row in pq.read_table(encoded.out / "combined_parquet_dataset").to_pylist()}
    latents = {name: row["vae_latent_bytes"] for name, row in table.items()}
    assert latents["a0.mp4#00"] == latents["a0.mp4#00@02"] != latents["a0.mp4#01"]
    assert len({latents[name] for name in ("c0.mp4#00", "c0.mp4#01", "c0.mp4#02")}) == 3
    assert table["a0.mp4#00"]["text_embedding_bytes"] != table["a0.mp4#00@02"]["text_embedding_bytes"]


def test_verify_finds_nothing_wrong(encoded: EncodeJob) -> None:
    assert encoded.problems() == []


# The same bytes


@pytest.mark.slow  # test_kills.py says so of a job without these
@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_bytes_do_not_depend_on_the_number_of_decoding_processes(
    new_job: NewJob, encoded: EncodeJob, mixed_shards: Path, num_workers: int
) -> None:
    job = new_job(mixed_shards)
    process = job.run(num_workers=num_workers, **FLAGS)
    assert process.code == 0, process.output
    assert job.result() == encoded.result()


@pytest.mark.parametrize(
    "point",
    mostly_slow(
        ["data:1", "data:3", "record:1", "record.after:2", "quarantine.after:1", "success:1"],
        quick=("quarantine.after:1",),
    ),
)
def test_a_killed_job_ends_with_the_same_bytes(
    new_job: NewJob, encoded: EncodeJob, mixed_shards: Path, point: str
) -> None:
    job = new_job(mixed_shards)
    assert job.run(serial=True, crash_at=point, **FLAGS).code == CRASHED
    process = job.run(serial=True, **FLAGS)
    assert process.code == 0, process.output
    assert job.result() == encoded.result()
    assert job.problems() == []


@pytest.mark.parametrize("max_samples", [1, 2, 6, 11])
def test_the_first_so_many_are_the_same_ones(
    forks: Forks, new_job: NewJob, mixed_shards: Path, model: Path, tmp_path: Path, max_samples: int
) -> None:
    out = tmp_path / "plan.parquet"
    assert plan(forks, mixed_shards, model, "--out", out, max_samples=max_samples, **FLAGS).code == 0
    decisions = [row for row in decisions_of(out) if row["decision"] == "encode"]
    assert len({row["key"].partition("@")[0] for row in decisions}) == max_samples
    job = new_job(mixed_shards)
    assert job.run(serial=True, max_samples=max_samples, **FLAGS).code == 0
    rows = {row.key for record in job.job.records() for file in record.files for row in file.rows}
    assert rows == {row["key"] for row in decisions if not row["key"].startswith("c2")}
    assert job.problems() == []


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"buckets": "32x48"}, "sampling.buckets: "),
        ({"window": "first"}, "sampling.window: every there, first now"),
        ({"max_upscale": 2.0}, "sampling.max_upscale: 1.5 there, 2.0 now"),
        ({"where": "1"}, "sampling.where: "),
        ({"drop_short_ratio": 0.5}, "sampling.drop_short_ratio: 1.0 there, 0.5 now"),
        ({"caption": "first"}, "text.caption: all there, first now"),
    ],
)
def test_another_choice_on_the_same_output_is_refused_by_name(
    encoded: EncodeJob, flags: dict[str, object], named: str
) -> None:
    changed = {**FLAGS, **flags}
    if flags.get("window") == "first":
        del changed["window_stride"]
    refused = encoded.run(serial=True, **changed)
    assert refused.code == 2
    assert named in refused.output


# What it needs


def test_neither_tars_nor_weights_are_needed(
    forks: Forks, mixed_shards: Path, model: Path, tmp_path: Path, planned: tuple[str, list[dict[str, Any]]]
) -> None:
    shards, weightless = tmp_path / "shards", tmp_path / "models" / "tiny"
    shutil.copytree(mixed_shards, shards)
    for tar in shards.glob("*.tar"):
        size = tar.stat().st_size
        tar.write_bytes(b"")
        with tar.open("r+b") as file:
            file.truncate(size)  # as long as it was, and empty
    shutil.copytree(model, weightless, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    assert not list(weightless.rglob("*.safetensors"))
    process = plan(forks, shards, weightless, "--out", tmp_path / "plan.parquet", **FLAGS)
    assert (process.code, process.output) == (0, planned[0])
    assert decisions_of(tmp_path / "plan.parquet") == planned[1]


def test_nothing_is_written_but_what_is_asked_for(forks: Forks, mixed_shards: Path, model: Path) -> None:
    before = sorted(path.name for path in mixed_shards.rglob("*"))
    assert plan(forks, mixed_shards, model).code == 0
    assert sorted(path.name for path in mixed_shards.rglob("*")) == before


def test_captions_alone_have_no_sizes(forks: Forks, mixed_shards: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.parquet"
    process = plan(forks, mixed_shards, model, "--out", out, workload_type="text", caption="all")
    assert process.code == 0, process.output
    assert "encoded   10 samples in 14 rows" in process.output
    assert "sizes " not in process.output
    assert re.search(r"size      fastvideo, float32: about [\d.]+ [kM]B of text embeddings", process.output)
    assert {row["height"] for row in decisions_of(out)} == {None}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"where": "beauty > 5"}, "--where 'beauty > 5': no sample has beauty; there are "),
        ({"where": "1)"}, "--where '1)': "),
        ({"buckets": "32x50"}, "--buckets 32x50x5: width 50 is no multiple of wan's 16: use 48 or 64"),
        ({"buckets": "32x48x6"}, "--buckets 32x48x6: num frames 6 breaks the 4k+1 rule of wan"),
        ({"buckets": "large"}, "--buckets large: an entry is HEIGHTxWIDTH"),
        ({"num_windows": 2}, "--num-windows goes with --window uniform"),
        ({"window_stride": 2}, "--window-stride goes with --window every"),
        ({"window": "uniform", "window_stride": 2}, "--window-stride goes with --window every"),
        ({"drop_short_ratio": 1.5}, "--drop-short-ratio must be at most 1, got 1.5"),
        ({"drop_short_ratio": "nan"}, "--drop-short-ratio must be at least 0, got nan"),
        ({"max_upscale": 0}, "--max-upscale must be above 0, got 0"),
        ({"exporter": "nothing"}, "no exporter 'nothing'; one of "),
        ({"out": "/nowhere/plan.parquet"}, "--out /nowhere/plan.parquet: there is no such folder"),
    ],
)
def test_a_users_mistake_is_wrong_usage(
    forks: Forks, mixed_shards: Path, model: Path, flags: dict[str, object], message: str
) -> None:
    process = plan(forks, mixed_shards, model, **flags)
    assert process.code == 2
    assert message in process.output
    assert "Traceback" not in process.output


def test_a_condition_on_a_column_of_a_later_shard_is_no_mistake(forks: Forks, mixed_shards: Path, model: Path) -> None:
    """With --max-samples the later shards were not looked at, and the column was said to be nobody's."""
    process = plan(forks, mixed_shards, model, where="score is null or score < 0", max_samples=1)
    assert process.code == 0, process.output
    assert "encoded   1 clip in 1 row" in process.output
    process = plan(forks, mixed_shards, model, where="beauty is null", max_samples=1)
    assert (process.code, "no sample has beauty" in process.output) == (2, True)


def test_fastvideos_name_for_a_random_window(forks: Forks, mixed_shards: Path, model: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one.parquet", tmp_path / "other.parquet"
    assert plan(forks, mixed_shards, model, "--do-temporal-sample", "--out", one).code == 0
    assert plan(forks, mixed_shards, model, "--window", "random", "--out", other).code == 0
    assert decisions_of(one) == decisions_of(other)
    assert any(row["begin_seconds"] for row in decisions_of(one))
    refused = plan(forks, mixed_shards, model, "--do-temporal-sample", window="middle")
    said = " ".join(re.sub("[^a-z -]", "", refused.output).split())  # without the box, and its lines
    assert "--do-temporal-sample is --window random and --window middle is given" in said
