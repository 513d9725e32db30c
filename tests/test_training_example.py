"""The example of a training loop: stopped and gone on with other workers, it is as if it had not been stopped."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

from latents import Encoded
from PIL import Image

pytest_plugins = ["jobs", "latents"]


def test_a_run_that_was_stopped_has_the_losses_of_one_that_was_not(
    latents: Encoded, repo_root: Path, tmp_path: Path
) -> None:
    def train(run_dir: str, *flags: object) -> str:
        example = repo_root / "examples/train_tiny_dit.py"
        command = [sys.executable, example, latents.out, "--run-dir", tmp_path / run_dir, "--steps", 30, *flags]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, cwd=repo_root)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "30 steps, loss " in train("whole", "--num-workers", 1)
    assert "stopped after step 11" in train("stopped", "--num-workers", 2, "--stop-after", 11)
    assert "going on behind step 11" in train("stopped", "--num-workers", 0, "--stop-after", 20)
    assert "going on behind step 20" in train("stopped", "--num-workers", 3)
    whole, stopped = ((tmp_path / run_dir / "losses.csv").read_text() for run_dir in ("whole", "stopped"))
    assert whole == stopped
    losses = [float(row["loss"]) for row in csv.DictReader(whole.splitlines())]
    assert len(losses) == 30
    assert sum(losses[-5:]) < sum(losses[:5])
    with Image.open(tmp_path / "stopped/losses.png") as picture:
        assert len(picture.getcolors(10_000)) > 2
