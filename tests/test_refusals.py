"""What lies in an output folder and is not known to be ours is never overwritten, nor taken for ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from streamprep.cli import VERBS, main
from streamprep.config import EncodeConfig
from streamprep.errors import Stopped, UserError
from streamprep.progress import count
from streamprep.sampling import window_starts
from streamprep.storage import check_spool_dir
from streamprep.where import Where


@pytest.mark.parametrize("name", ["000000.tar", "000000.json", "manifest.json", "skipped.jsonl"])
def test_pack_leaves_files_of_others_alone(
    name: str, make_video: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_video(tmp_path / "dataset" / "a.mp4")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / name).write_text("mine")
    assert main(["pack", str(tmp_path / "dataset"), str(tmp_path / "shards")]) == 2
    assert f"has a file {name} but no pack.json" in capsys.readouterr().err
    assert (tmp_path / "shards" / name).read_text() == "mine"


def test_records_without_a_plan_are_not_taken_for_this_jobs(
    make_video: Callable[..., Path], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_video(tmp_path / "dataset" / "a.mp4")
    (tmp_path / "dataset" / "a.txt").write_text("a caption")
    size = ["--max-height", "32", "--max-width", "48", "--num-frames", "1", "--serial"]
    job = ["run", str(tmp_path / "dataset"), str(tmp_path / "out"), "--model-path", str(tiny_model), *size]
    assert main(job) == 0
    (tmp_path / "out/_streamprep/index.parquet").write_bytes(b"garbage")
    (tmp_path / "out/_streamprep/records/000000.json").unlink()
    assert main(job) == 0
    assert main(["verify", str(tmp_path / "out")]) == 0
    (tmp_path / "out/_streamprep/plan.json").unlink()
    assert main(job) == 2
    assert "records of a job whose _streamprep/plan.json is lost" in capsys.readouterr().err


def test_a_stop_passes_through_libraries_that_swallow_exceptions() -> None:
    assert not issubclass(Stopped, Exception)


def test_neither_shards_nor_latents_go_into_the_folder_they_are_made_from(
    make_video: Callable[..., Path], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Packed into itself, a dataset could not be packed again; encoded into themselves, shards not be verified."""
    dataset, shards = tmp_path / "dataset", tmp_path / "shards"
    make_video(dataset / "a.mp4")
    before = sorted(dataset.iterdir())
    assert main(["pack", str(dataset), f"{dataset}/"]) == 2
    assert "is the dataset itself" in capsys.readouterr().err
    assert sorted(dataset.iterdir()) == before
    assert main(["pack", str(dataset), str(shards)]) == 0
    before = sorted(shards.iterdir())
    assert main(["encode", str(shards), str(shards), "--model-path", str(tiny_model)]) == 2
    assert "is the folder of the shards" in capsys.readouterr().err
    assert sorted(shards.iterdir()) == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_path": " "}, "--model-path is empty"),
        ({"where": ""}, "--where is empty"),
        ({"negative_prompt": "\udcff"}, "--negative-prompt is not UTF-8"),
        ({"train_fps": 1e300}, "--train-fps must be at most 1000"),
        ({"decode_timeout": 0.0001}, "--decode-timeout must be at least 0.1"),
    ],
)
def test_settings_that_no_one_means_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EncodeConfig(**{"shards": "in", "out": "out", "model_path": "model", **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ('do_temporal_sample = "yes"', "do_temporal_sample must be true or false, got 'yes'"),
        ("num_frames = 17.0", "num_frames must be a whole number, got 17.0"),
        ('max_height = "64"', "max_height must be a whole number, got '64'"),
        ("train_fps = true", "train_fps must be a number, got True"),
        ("where = 5", "where must be a string, got 5"),
    ],
)
def test_a_setting_of_another_type_is_refused_with_its_file(
    setting: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.toml").write_text(setting)
    assert main(["plan", "shards", "--model-path", "m", "--config", str(tmp_path / "job.toml")]) == 2
    assert f"job.toml: {message}" in capsys.readouterr().err


WITH_A_SPOOL = {
    "pack": ("pack", "{dataset}", "{out}"),
    "plan": ("plan", "{dataset}", "--model-path", "no-such-model"),
    "encode": ("encode", "{dataset}", "{out}", "--model-path", "no-such-model"),
    "run": ("run", "{dataset}", "{out}", "--model-path", "no-such-model"),
    "retry": ("retry", "{out}"),
    "convert": ("convert", "{dataset}", "{out}", "--exporter", "webdataset"),
    "status": ("status", "{out}"),
    "verify": ("verify", "{out}"),
    "finalize": ("finalize", "{out}"),
}


def test_all_verbs_with_a_spool_are_below() -> None:
    with_a_spool = {verb for verb, one in VERBS.items() if "spool_dir" in {field.name for field in fields(one.config)}}
    assert with_a_spool == set(WITH_A_SPOOL)


@pytest.mark.parametrize("verb", WITH_A_SPOOL)
@pytest.mark.parametrize(
    ("spool", "message"),
    [
        ("{tmp}/no/spool", "cannot be made: there is no folder {tmp}/no;"),
        ("{tmp}/file", "is no folder;"),
        ("{tmp}/file/spool", "cannot be made: there is no folder {tmp}/file;"),
        ("{tmp}/link-to-nothing", "is no folder;"),
        ("/sys", ": no file can be made in /sys: "),
        ("/sys/spool", ": no file can be made in /sys: "),
    ],
)
def test_a_spool_that_cannot_be_is_refused_before_anything_else(
    verb: str, spool: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link-to-nothing").symlink_to("nothing")
    before = sorted(tmp_path.iterdir())
    arguments = [each.format(dataset=tmp_path / "dataset", out=tmp_path / "out") for each in WITH_A_SPOOL[verb]]
    spool, message = spool.format(tmp=tmp_path), message.format(tmp=tmp_path)
    assert main([*arguments, "--spool-dir", spool]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"streamprep: --spool-dir {spool}") and message in said.err
    assert not said.out
    assert sorted(tmp_path.iterdir()) == before


def test_a_spool_that_can_be_is_not_made_by_looking(tmp_path: Path) -> None:
    for spool in (None, str(tmp_path), str(tmp_path / "new")):
        check_spool_dir(spool)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("expression", ["1=1) or (1=1", "(fps > 1", "fps > 1)", "')' = ')' and (1"])
def test_a_condition_whose_parentheses_do_not_match_is_refused(expression: str) -> None:
    with pytest.raises(UserError, match="parentheses do not match"):
        Where(expression)
    Where("caption like '%)%' and (fps > 1)")


def test_more_windows_than_places_are_all_places_at_once() -> None:
    """It made an array of as many."""
    starts = window_starts(10, 7, window="uniform", num_windows=10**15, stride=1, draw=0.0)
    assert list(starts) == [0, 1, 2, 3]


@pytest.mark.parametrize("verb", ["status", "verify", "finalize", "retry"])
def test_a_file_is_no_output_folder(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert main([verb, str(tmp_path / "file")]) == 2
    assert "is not the output of `streamprep encode`" in capsys.readouterr().err


def test_processes_have_their_plural() -> None:
    assert [count(n, noun) for n in (1, 2) for noun in ("process", "shard")] == [
        "1 process",
        "1 shard",
        "2 processes",
        "2 shards",
    ]
