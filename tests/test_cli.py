from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from streamprep import __version__
from streamprep.cli import VERBS, main

RunCli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def dataset(make_dataset: Callable[..., Path]) -> Path:
    return make_dataset("folder", {"a.mp4": "an apple", "b.mp4": "a ball"})


def packed_with(shards: Path) -> tuple[int, int | None]:
    """(shard_size_mb, shuffle) that shards were packed with."""
    options = json.loads((shards / "pack.json").read_text())
    return options["shard_size_mb"], options["shuffle"]


# --- help


def test_the_overview_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert all(f"\n  {verb} " in out for verb in VERBS)
    assert err == ""


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"streamprep {__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_shows_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([verb, "--help"])
    assert left.value.code == 0
    assert f"Example: streamprep {verb} " in capsys.readouterr().out


def test_help_does_not_wait_for_torch(run_python: RunCli) -> None:
    code = """
import sys
from contextlib import suppress
from streamprep.cli import VERBS, main
for verb in VERBS:
    with suppress(SystemExit):
        main([verb, "--help"])
heavy = {"torch", "av", "numpy", "diffusers", "transformers", "pyarrow"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""
    ran = run_python("-c", code)
    assert ran.returncode == 0, ran.stderr


# --- results, messages and exit codes


def test_results_go_to_stdout_and_all_else_to_stderr(dataset: Path, tmp_path: Path, run_cli: RunCli) -> None:
    ran = run_cli("pack", dataset, tmp_path / "shards")
    assert ran.returncode == 0
    assert ran.stdout == f"2 videos, 1 shard, 7.2 kB in {tmp_path}/shards\n"
    assert ran.stderr == "2 videos (10 B) in 1 shard, 0 done\n"


def test_running_again_says_that_all_is_done(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for done in 0, 1:
        assert main(["pack", str(dataset), str(tmp_path / "shards"), "--num-workers", "1"]) == 0
        assert capsys.readouterr().err == f"2 videos (10 B) in 1 shard, {done} done\n"


def test_no_verb_shows_the_overview(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: streamprep VERB" in capsys.readouterr().out


def test_an_unknown_verb_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pakc"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("streamprep: there is no verb 'pakc'\n\nusage: streamprep VERB")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shard-sise-mb", "1"], "--shard-sise-mb"),
        (["--shard-size-mb", "large"], "'large'"),
        (["--shard-size-mb", "0"], "--shard-size-mb must be at least 1, got 0"),
        (["--num-workers", "-1"], "--num-workers must be at least 0, got -1"),
    ],
)
def test_a_wrong_flag_is_wrong_usage(
    flags: list[str], message: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["pack", str(dataset), str(tmp_path / "shards"), *flags])
    assert left.value.code == 2
    out, err = capsys.readouterr()
    assert (out, message in err) == ("", True)
    assert not (tmp_path / "shards").exists()


def test_a_users_mistake_is_said_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", str(tmp_path / "nowhere"), str(tmp_path / "shards")]) == 2
    assert capsys.readouterr() == ("", f"streamprep: {tmp_path}/nowhere is not a folder or file\n")


def test_trouble_of_the_machine_is_a_failure(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["pack", str(dataset), str(tmp_path / "file" / "shards")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert f"streamprep: [Errno 20] a file stands where a folder is needed: '{tmp_path}/file'" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_is_a_stop_that_can_be_resumed(
    dataset: Path, tmp_path: Path, repo_root: Path, number: signal.Signals
) -> None:
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\n"
        "def read_samples(root, options):\n"
        "    pathlib.Path(__file__).with_name('started').touch()\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-m", "streamprep", "pack", str(dataset), str(tmp_path / "shards")]
    running = subprocess.Popen(
        [*command, "--dataset-type", "slow:read_samples"],
        cwd=repo_root,
        env=os.environ | {"PYTHONPATH": f"{repo_root}:{tmp_path}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "started").exists():
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(number)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (4, "")
    assert err == f"streamprep: stopped by {number.name}; the same command goes on from here\n"


# --- flags and files of settings


@pytest.mark.parametrize("flags", [["--shard-size-mb", "3"], ["--shard_size_mb", "3"], ["--shard-size-mb=3"]])
def test_dashes_and_underscores_both_work(flags: list[str], dataset: Path, tmp_path: Path) -> None:
    assert main(["pack", str(dataset), str(tmp_path / "shards"), *flags]) == 0
    assert packed_with(tmp_path / "shards") == (3, None)


@pytest.mark.parametrize("key", ["shard_size_mb", "shard-size-mb"])
def test_settings_come_from_a_file_and_flags_go_before_them(key: str, dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(f"{key} = 3\nshuffle = 7\n")
    command = ["pack", str(dataset), str(tmp_path / "shards"), "--config", str(tmp_path / "job.toml")]
    assert main(command) == 0
    assert packed_with(tmp_path / "shards") == (3, 7)
    command[2] = str(tmp_path / "others")
    assert main([*command, "--shuffle", "8"]) == 0
    assert packed_with(tmp_path / "others") == (3, 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("shard_sise_mb = 3", "no setting is called 'shard_sise_mb'; one of "),
        ("shuffle = [1]", "shuffle must be a whole number, got [1]"),
        ("shuffle 1", "cannot read the settings of "),
        (None, "cannot read the settings of "),
    ],
)
def test_a_wrong_file_of_settings_is_refused(
    settings: str | None, message: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if settings is not None:
        (tmp_path / "job.toml").write_text(settings)
    assert main(["pack", str(dataset), str(tmp_path / "shards"), f"--config={tmp_path}/job.toml"]) == 2
    out, err = capsys.readouterr()
    assert (out, message in err, "job.toml" in err) == ("", True, True)
    assert not (tmp_path / "shards").exists()


def test_config_needs_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", "dataset", "shards", "--config"]) == 2
    assert capsys.readouterr().err == "streamprep: --config needs a file\n"
