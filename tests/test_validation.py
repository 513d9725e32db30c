"""``--validation-split``: held out of the output, and read by FastVideo's trainers as its own validation.json is."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from making import make_rules
from PIL import Image
from reference import Geometry, read_frames, read_rows
from test_plan import make_index, make_sample

from streamprep import cli
from streamprep.config import EncodeConfig
from streamprep.crashpoints import VALIDATION_STEPS
from streamprep.errors import UserError
from streamprep.filters import Filters
from streamprep.finalize import finalize
from streamprep.held_out import HeldOut, parse_split
from streamprep.job import SUCCESS, VALIDATION, open_job
from streamprep.plan import held_out_by, plan_unit
from streamprep.storage import open_store
from streamprep.verify import verify_job

pytest_plugins = ["jobs"]

CRASHED = 137
GEOMETRY = Geometry(height=32, width=48, num_frames=5, train_fps=16)
FLAGS = (*map(str, GEOMETRY.flags), "--device", "cpu", "--encode-threads", "1", "--shard-size-mb", "1")
NUM_VIDEOS = 8


# Who is held out


@given(
    keys=st.sets(st.text("abc/", min_size=1, max_size=6), max_size=40), number=st.integers(1, 50), seed=st.integers()
)
def test_a_number_holds_out_exactly_so_many_whoever_comes_first(keys: set[str], number: int, seed: int) -> None:
    held: list[set[str]] = []
    for order in (sorted(keys), sorted(keys, reverse=True)):
        one = HeldOut(str(number), seed=seed)
        one.survey(make_sample(key) for key in order)
        held.append({key for key in keys if one.holds_out(key)})
    assert held[0] == held[1]
    assert len(held[0]) == min(number, len(keys))


@given(seed=st.integers(), first=st.floats(0.001, 0.998), more=st.floats(0.001, 0.5))
def test_a_larger_share_takes_none_back(seed: int, first: float, more: float) -> None:
    keys = [f"{number}" for number in range(200)]
    small = HeldOut(str(first), seed=seed)
    large = HeldOut(str(min(0.999, first + more)), seed=seed)
    assert {key for key in keys if small.holds_out(key)} <= {key for key in keys if large.holds_out(key)}


def test_a_share_is_about_that_share_and_another_with_another_seed() -> None:
    keys = [f"clip-{number}" for number in range(5000)]
    held = [{key for key in keys if HeldOut("0.1", seed=seed).holds_out(key)} for seed in (1, 2)]
    assert all(400 < len(one) < 600 for one in held)
    assert len(held[0] & held[1]) < 100


@pytest.mark.parametrize("asked", ["0", "1.0", "1.5", "-1", "nan", "", "half", "0.0", "\u0663"])
def test_a_split_that_is_neither_a_number_nor_a_share_is_refused(asked: str) -> None:
    with pytest.raises(UserError, match="a number of videos, from 1, or a share"):
        EncodeConfig(shards="S", out="O", model_path="M", validation_split=asked)


def test_a_split_is_a_number_or_a_share() -> None:
    assert parse_split("1") == 1
    assert isinstance(parse_split("1"), int)
    assert parse_split("0.25") == 0.25


def test_the_number_is_of_those_that_all_rules_leave() -> None:
    samples = [make_sample(f"{number}", num_frames=48 if number % 2 else 3) for number in range(12)]
    rules = make_rules(validation_split="2", filters=("fps:20..",))
    filters = Filters(rules.filters, held_out_by(rules))
    left = plan_unit("0", make_index(*samples), dataclasses.replace(rules, validation_split=None))
    usable = {clip.key for clip in left.clips}
    assert len(usable) == 6
    filters.survey(lambda _: [sample for sample in samples if sample.key in usable])
    unit = plan_unit("0", make_index(*samples), rules, filters)
    held = {plan.key for plan in unit.held_out}
    assert len(held) == 2
    assert {clip.key for clip in unit.clips} == usable - held
    assert {item.key for item in unit.dropped if item.reason == "validation"} == held


def test_all_windows_and_captions_of_a_video_are_held_out_together() -> None:
    sample = make_sample("a", captions=("One.", "Two."), num_frames=480)
    rules = make_rules(validation_split="0.999999", window="every", caption="all")
    unit = plan_unit("0", make_index(sample), rules)
    assert not unit.clips
    assert [plan.key for plan in unit.held_out] == ["a#00"]
    assert [(item.key, item.reason) for item in unit.dropped] == [("a", "validation")]


# Whole jobs


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, make_video: Callable[..., Path]) -> Path:
    """In the merged layout; three videos fit in a shard."""
    root = tmp_path_factory.mktemp("dataset")
    rows = []
    for number in range(NUM_VIDEOS):
        make_video(root / "videos" / f"{number}.mp4", seed=number, size=(96, 48), padding_bytes=330_000)
        rows.append({"path": f"{number}.mp4", "cap": f"Video  {number}."})
    (root / "videos2caption.json").write_text(json.dumps(rows))
    return root


@pytest.fixture(scope="module")
def i2v_job(
    dataset: Path, tiny_models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory, one_thread: None
) -> Path:
    """Two held out, by one process."""
    out = tmp_path_factory.mktemp("i2v") / "out"
    assert encode(dataset, out, tiny_models("2.1-i2v"), "i2v", "--validation-split", "2") == 0
    return out


def encode(dataset: Path, out: Path, model: Path, workload: str, *flags: str) -> int:
    where = ("run", str(dataset), str(out), "--model-path", str(model), "--workload-type", workload)
    return cli.main([*where, *FLAGS, "--serial", *flags])


def read_as_fastvideo(path: Path) -> list[dict[str, Any]]:
    """What its ValidationDataset yields: fastvideo/dataset/validation_dataset.py and models/vision_utils.py."""
    entries = []
    for sample in datasets.load_dataset("json", data_files=str(path), split="train", field="data"):
        sample["prompt"] = sample["caption"]
        if sample.get("image_path") is not None:
            sample["image_path"] = os.path.join(os.path.abspath(path.parent), sample["image_path"])  # noqa: PTH100, PTH118
            assert Path(sample["image_path"]).is_file()
            sample["image"] = Image.open(sample["image_path"]).convert("RGB")
        entries.append({name: value for name, value in sample.items() if value is not None})
    return entries


def frame_of(dataset: Path, name: str) -> torch.Tensor:
    """The first one, cropped and resized by the second implementation: (H, W, C)."""
    return read_frames(dataset, {"path": name}, GEOMETRY)[0].permute(1, 2, 0)


def test_what_is_held_out_is_in_validation_json_and_not_among_the_rows(i2v_job: Path, dataset: Path) -> None:
    entries = read_as_fastvideo(i2v_job / VALIDATION)
    rows = read_rows(i2v_job)
    captions = {entry["caption"] for entry in entries}
    assert len(entries) == 2
    assert len(rows) == NUM_VIDEOS - 2
    assert captions | {row["caption"] for row in rows.values()} == {f"Video  {n}." for n in range(NUM_VIDEOS)}
    assert not captions & {row["caption"] for row in rows.values()}
    for entry in entries:
        assert (entry["height"], entry["width"], entry["num_frames"]) == (32, 48, 5)
        assert entry["num_inference_steps"] == 40
        assert entry["video_path"] == str(Path(entry["image_path"]).relative_to(i2v_job / "validation"))
        name = f"{entry['caption'].removeprefix('Video  ').rstrip('.')}.mp4"
        assert np.array_equal(np.asarray(entry["image"]), frame_of(dataset, name).numpy())


def test_it_is_counted_as_dropped_and_verified(i2v_job: Path, tmp_path: Path) -> None:
    job = open_job(open_store(i2v_job))
    assert [item.reason for record in job.records() for item in record.dropped] == ["validation"] * 2
    assert json.loads((i2v_job / SUCCESS).read_text())["dropped"] == {"validation": 2}
    assert verify_job(job).problems == []


def test_verify_finds_what_is_missing_or_damaged(i2v_job: Path) -> None:
    image = sorted((i2v_job / "validation/images").iterdir())[0]
    data, text = image.read_bytes(), (i2v_job / VALIDATION).read_bytes()
    try:
        image.write_bytes(data + b"\0")
        assert verify_job(open_job(open_store(i2v_job))).problems == [
            f"validation/images/{image.name}: its bytes differ from those that were written"
        ]
        image.unlink()
        assert verify_job(open_job(open_store(i2v_job))).problems == [f"validation/images/{image.name}: missing"]
        (i2v_job / VALIDATION).unlink()
        assert verify_job(open_job(open_store(i2v_job))).problems == [f"{VALIDATION}: missing"]
        image.write_bytes(data)
        (i2v_job / VALIDATION).write_bytes(text.replace(b"Video  ", b"Movie  ", 1))  # it was taken for what was written
        assert verify_job(open_job(open_store(i2v_job))).problems == [
            f"{VALIDATION}: its bytes are not those that were written"
        ]
    finally:
        image.write_bytes(data)
        (i2v_job / VALIDATION).write_bytes(text)


def test_without_it_a_job_is_not_finished_by_hand_and_encode_writes_it_again(
    i2v_job: Path, dataset: Path, tiny_models: Callable[[str], Path], one_thread: None
) -> None:
    before = (i2v_job / VALIDATION).read_bytes()
    (i2v_job / VALIDATION).unlink()
    with pytest.raises(UserError, match=r"lacks validation/validation\.json: run the same `streamprep encode` again"):
        finalize(open_job(open_store(i2v_job)))
    assert encode(dataset, i2v_job, tiny_models("2.1-i2v"), "i2v", "--validation-split", "2") == 0
    assert (i2v_job / VALIDATION).read_bytes() == before
    assert verify_job(open_job(open_store(i2v_job))).problems == []


def test_another_split_on_the_same_output_is_refused(
    i2v_job: Path, dataset: Path, tiny_models: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert encode(dataset, i2v_job, tiny_models("2.1-i2v"), "i2v", "--validation-split", "3") == 2
    assert "sampling.validation_split: 2 there, 3 now" in capsys.readouterr().err


def test_convert_takes_it_along(i2v_job: Path, tmp_path: Path) -> None:
    assert cli.main(["convert", str(i2v_job), str(tmp_path / "new"), "--exporter", "webdataset"]) == 0
    assert verify_job(open_job(open_store(tmp_path / "new"))).problems == []
    for path in (i2v_job / "validation").rglob("*"):
        if path.is_file():
            assert (tmp_path / "new" / path.relative_to(i2v_job)).read_bytes() == path.read_bytes()


def test_convert_takes_no_damage_along(i2v_job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It copied whatever was there."""
    for path in (sorted((i2v_job / "validation/images").iterdir())[0], i2v_job / VALIDATION):
        data = path.read_bytes()
        try:
            path.write_bytes(data[:-10] + bytes(byte ^ 1 for byte in data[-10:-9]) + data[-9:])
            assert cli.main(["convert", str(i2v_job), str(tmp_path / path.name), "--exporter", "webdataset"]) == 1
        finally:
            path.write_bytes(data)
        assert f"{path} is damaged: " in capsys.readouterr().err
        assert not (tmp_path / path.name / VALIDATION).exists()


def test_what_verify_says_to_delete_mends_it(
    i2v_job: Path,
    dataset: Path,
    tiny_models: Callable[[str], Path],
    one_thread: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    image = sorted((i2v_job / "validation/images").iterdir())[0]
    data, text = image.read_bytes(), (i2v_job / VALIDATION).read_bytes()
    image.write_bytes(data + b"\0")
    assert cli.main(["verify", str(i2v_job)]) == 1
    *_, advice, first, second = capsys.readouterr().out.splitlines()
    assert advice.startswith("to mend what is wrong, delete what follows, then run the same `streamprep encode` again")
    for line in first, second:
        Path(line.strip()).unlink()
    assert encode(dataset, i2v_job, tiny_models("2.1-i2v"), "i2v", "--validation-split", "2") == 0
    assert (image.read_bytes(), (i2v_job / VALIDATION).read_bytes()) == (data, text)


@pytest.mark.parametrize(
    "point",
    [
        *VALIDATION_STEPS,
        *(
            pytest.param(f"{step}{when}", marks=pytest.mark.slow)
            for step in VALIDATION_STEPS
            for when in (".after", ":3")
        ),
    ],
)
def test_killed_at_any_of_its_steps_it_ends_as_if_it_had_not_been(
    dataset: Path,
    i2v_job: Path,
    tiny_models: Callable[[str], Path],
    tmp_path: Path,
    point: str,
    run_cli: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    command = ("run", dataset, tmp_path / "out", "--model-path", tiny_models("2.1-i2v"), "--workload-type", "i2v")
    command = (*command, *FLAGS, "--serial", "--validation-split", "2")  # type: ignore[assignment]
    assert run_cli(*command, crash_at=point).returncode == CRASHED
    assert not (tmp_path / "out" / VALIDATION).exists()
    assert run_cli(*command).returncode == 0
    for path in (i2v_job / "validation").rglob("*"):
        if path.is_file():
            assert (tmp_path / "out" / path.relative_to(i2v_job)).read_bytes() == path.read_bytes()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("workload", ["t2v", "text"])
def test_without_image_conditioning_there_are_no_images(
    dataset: Path, tiny_model: Path, tmp_path: Path, workload: str
) -> None:
    """A trainer of a model that can do both would start from one."""
    assert encode(dataset, tmp_path / "out", tiny_model, workload, "--validation-split", "0.4") == 0
    entries = read_as_fastvideo(tmp_path / "out" / VALIDATION)
    assert 0 < len(entries) < NUM_VIDEOS
    assert all("image" not in entry and "video_path" not in entry for entry in entries)
    assert not (tmp_path / "out/validation/images").exists()
    assert {(entry["height"], entry["width"], entry["num_frames"]) for entry in entries} == {(32, 48, 5)}


@pytest.mark.usefixtures("one_thread")
def test_max_samples_is_of_the_rows_and_holds_out_no_fewer(dataset: Path, tiny_model: Path, tmp_path: Path) -> None:
    flags = ("--validation-split", "3", "--max-samples", "2")
    assert encode(dataset, tmp_path / "out", tiny_model, "t2v", *flags) == 0
    assert len(read_rows(tmp_path / "out")) == 2
    assert len(read_as_fastvideo(tmp_path / "out" / VALIDATION)) == 3


@pytest.mark.usefixtures("one_thread")
def test_one_that_cannot_be_decoded_is_left_out_with_its_reason(
    dataset: Path, tiny_models: Callable[[str], Path], tmp_path: Path, undecodable_video: Callable[[Path], Path]
) -> None:
    undecodable_video(tmp_path / "data/videos/bad.mp4")
    rows = [{"path": "bad.mp4", "cap": "A bad one."}]
    for number in range(3):
        (tmp_path / f"data/videos/{number}.mp4").write_bytes((dataset / f"videos/{number}.mp4").read_bytes())
        rows.append({"path": f"{number}.mp4", "cap": f"Video  {number}."})
    (tmp_path / "data/videos2caption.json").write_text(json.dumps(rows))
    model = tiny_models("2.1-i2v")
    seed = next(seed for seed in range(1000) if _holds_out_bad(seed))
    flags = ("--validation-split", "2", "--seed", str(seed), "--train-fps", "1")
    assert encode(tmp_path / "data", tmp_path / "out", model, "i2v", *flags, "--num-frames", "1") == 0
    value = json.loads((tmp_path / "out" / VALIDATION).read_text())
    assert list(value["left_out"]) == ["bad"]
    assert value["left_out"]["bad"]["reason"] in ("decode_error", "truncated")
    assert len(value["data"]) == 1
    assert Image.open(io.BytesIO((tmp_path / "out/validation" / value["data"][0]["image_path"]).read_bytes()))
    assert verify_job(open_job(open_store(tmp_path / "out"))).problems == []


def _holds_out_bad(seed: int) -> bool:
    one = HeldOut("2", seed=seed)
    one.survey(make_sample(key) for key in ("bad", "0", "1", "2"))
    return one.holds_out("bad")
