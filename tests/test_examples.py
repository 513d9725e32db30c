"""The examples are what people copy: each is run here as it is, on a tiny model."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from object_stores import NewBucket
from quick_cases import mostly_slow
from servers import Server
from servers.processes import answers
from test_example_exporters import PACKAGES

from streamprep import cli
from streamprep.config import EncodeConfig
from tools.make_clips import make_clips

pytest_plugins = ["object_stores"]

EXAMPLES = {"wan_t2v.sh": "2.1-t2v", "wan_i2v.sh": "2.1-i2v", "ray.sh": "2.1-t2v"}
"""Of each example, the tiny model that stands for its own."""
NO_GPU = {"ray.sh": ("--nproc", "2", "--device", "cpu")}
"""Flags of those that count GPUs, for machines without."""
BUCKETS = "bucket_to_bucket.sh"
"""The example that needs no dataset, but a store."""
TRAINING = "train_tiny_dit.py"
"""The one that `test_training_example.py` runs."""
EXPORTERS = "exporters"
"""The folder of those that `test_example_exporters.py` installs."""
SMALL = ("--max-height", "64", "--max-width", "96", "--num-frames", "17", "--encode-threads", "1")

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips, long enough for 77 frames at 16 fps."""
    out = tmp_path_factory.mktemp("examples") / "my dataset"  # a path with a space in it
    make_clips(out, num_clips=2, seconds=5)
    return out


@pytest.fixture
def run_example(repo_root: Path, tmp_path: Path) -> Run:
    """``run_example(name, *flags, DATASET=...)`` in an empty folder, with only these variables."""

    def run(name: str, *flags: str, **variables: object) -> subprocess.CompletedProcess[str]:
        bin_folder = str(Path(sys.executable).parent)
        kept = {
            key: value
            for key, value in os.environ.items()
            if key not in ("DATASET", "MODEL_PATH", "SHARDS", "OUT", "BUCKET")
        }
        return subprocess.run(
            [str(repo_root / "examples" / name), *flags],
            cwd=tmp_path,
            env=kept
            | {"PATH": f"{bin_folder}:{os.environ['PATH']}", "PYTHONPATH": str(repo_root)}
            | {key: str(value) for key, value in variables.items()},
            capture_output=True,
            text=True,
            timeout=540,
        )

    return run


def test_every_example_can_be_executed_is_in_the_readme_and_is_run_here(repo_root: Path) -> None:
    readme = (repo_root / "README.md").read_text()
    paths = sorted((repo_root / "examples").iterdir())
    assert {path.name for path in paths} == {*EXAMPLES, BUCKETS, TRAINING, EXPORTERS}
    packages = sorted((repo_root / "examples" / EXPORTERS).iterdir())
    assert [path.name for path in packages] == list(PACKAGES)
    for path in packages:
        assert f"`examples/exporters/{path.name}`" in readme, path
    for path in (path for path in paths if path.name != EXPORTERS):
        assert os.access(path, os.X_OK), path
        assert f"`examples/{path.name}`" in readme, path


@pytest.mark.parametrize("name", mostly_slow(EXAMPLES, quick=("wan_i2v.sh",)))
def test_the_example_goes_from_videos_to_rows(
    name: str, run_example: Run, tiny_models: Callable[[str], Path], dataset: Path, tmp_path: Path
) -> None:
    model = tiny_models(EXAMPLES[name])
    done = run_example(
        name, *SMALL, *NO_GPU.get(name, ()), DATASET=dataset, MODEL_PATH=model, SHARDS="my shards", OUT="my latents"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith(": my latents/combined_parquet_dataset")
    assert (tmp_path / "my shards" / "manifest.json").exists()
    table = pq.read_table(tmp_path / "my latents" / "combined_parquet_dataset")
    assert table.num_rows == 2
    assert table["vae_latent_shape"].to_pylist() == [[16, 5, 8, 12]] * 2
    if name == "wan_i2v.sh":
        assert table["first_frame_latent_shape"].to_pylist() == [[16, 5, 8, 12]] * 2
        assert table["clip_feature_shape"].to_pylist() == [[257, 64]] * 2


@pytest.mark.slow
def test_the_same_command_again_finds_everything_done(
    run_example: Run, tiny_model: Path, dataset: Path, tmp_path: Path
) -> None:
    first, second = (run_example("wan_t2v.sh", *SMALL, DATASET=dataset, MODEL_PATH=tiny_model) for _ in range(2))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "1 shard, 1 done" in second.stdout + second.stderr
    assert (tmp_path / "data/wan_t2v/latents/combined_parquet_dataset").is_dir()  # the defaults of SHARDS and OUT


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_runs_at_its_own_geometry(
    name: str, run_example: Run, tiny_models: Callable[[str], Path], dataset: Path, tmp_path: Path
) -> None:
    one = shutil.copytree(dataset, tmp_path / "one")
    done = run_example(
        name, "--max-samples", "1", *NO_GPU.get(name, ()), DATASET=one, MODEL_PATH=tiny_models(EXAMPLES[name])
    )
    assert done.returncode == 0, done.stderr
    (out,) = tmp_path.glob("data/*/latents/combined_parquet_dataset")
    assert pq.read_table(out)["vae_latent_shape"].to_pylist() == [[16, 20, 60, 104]]


@pytest.mark.parametrize(
    ("name", "model", "workload"),
    [
        ("wan_t2v.sh", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "t2v"),
        ("wan_i2v.sh", "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "i2v"),
        ("ray.sh", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "t2v"),
    ],
)
def test_without_anything_else_said_it_is_the_real_model_at_fastvideos_geometry(
    name: str, model: str, workload: str, repo_root: Path
) -> None:
    script = (repo_root / "examples" / name).read_text()
    assert re.findall(r'^: "\$\{MODEL_PATH:=(.*)\}"$', script, flags=re.MULTILINE) == [model]
    (command,) = re.findall(r"^streamprep encode (.*)$", script.replace("\\\n", " "), flags=re.MULTILINE)
    config = cli.parse("encode", [word for word in shlex.split(command) if word != "$@"])
    assert isinstance(config, EncodeConfig)
    assert (config.workload_type, config.model_path) == (workload, "$MODEL_PATH")
    assert (config.num_frames, config.max_height, config.max_width, config.train_fps) == (77, 480, 832, 16)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("variables", [{}, {"DATASET": "nowhere"}])
def test_without_a_dataset_it_says_so_before_any_work(
    name: str, variables: dict[str, str], run_example: Run, tmp_path: Path
) -> None:
    refused = run_example(name, **variables)
    assert refused.returncode == 2
    assert f"DATASET must be a folder with videos and captions, got '{variables.get('DATASET', '')}'" in refused.stderr
    assert not list(tmp_path.iterdir())


def test_a_job_that_fails_is_not_called_good(run_example: Run, tiny_model: Path, dataset: Path) -> None:
    failed = run_example("wan_t2v.sh", "--num-frames", "16", DATASET=dataset, MODEL_PATH=tiny_model)
    assert failed.returncode == 2
    assert "breaks the 4k+1 rule" in failed.stderr
    assert "FastVideo's trainers" not in failed.stdout


# --- from bucket to bucket


def assert_went_from_bucket_to_bucket(done: subprocess.CompletedProcess[str], latents: str, *, num_rows: int) -> None:
    assert done.returncode == 0, done.stderr
    assert f" uploaded to {latents.replace('latents', 'raw')}" in done.stdout or "s3://raw/clips" in done.stdout
    assert "state    done" in done.stdout and ": 0 problems" in done.stdout
    assert "'vae_latent_shape': [16, 5, 8, 12]" in done.stdout
    assert done.stdout.splitlines()[-1] == f"{num_rows} rows in {latents}/combined_parquet_dataset"


def test_the_trip_through_a_bucket_of_the_users(
    moto_server: Server, new_bucket: NewBucket, run_example: Run, tiny_model: Path, dataset: Path, tmp_path: Path
) -> None:
    place = f"{new_bucket(moto_server)}/a trial"
    how = {"DATASET": dataset, "MODEL_PATH": tiny_model, "BUCKET": f"{place}/", "TMPDIR": tmp_path}
    done = run_example(BUCKETS, *SMALL, "--nproc", "1", "--device", "cpu", **how)
    assert_went_from_bucket_to_bucket(done, f"{place}/latents", num_rows=2)
    assert not list(tmp_path.glob("tmp.*"))  # its working folder


@pytest.mark.s3
@pytest.mark.slow
def test_the_trip_with_nothing_given_starts_a_store_and_leaves_nothing(run_example: Run, tmp_path: Path) -> None:
    done = run_example(BUCKETS, "--encode-threads", "1", TMPDIR=tmp_path)
    assert_went_from_bucket_to_bucket(done, "s3://latents/job1", num_rows=6)
    (url,) = re.findall(r"^a store at http://127.0.0.1:(\d+)$", done.stdout, flags=re.MULTILINE)
    assert not answers(int(url))
    assert not list(tmp_path.glob("tmp.*"))


def test_what_is_no_bucket_is_said_before_any_work(run_example: Run, tmp_path: Path) -> None:
    refused = run_example(BUCKETS, BUCKET="my-bucket")
    assert refused.returncode == 2
    assert "BUCKET must be a URL like s3://my-bucket/trial, got 'my-bucket'" in refused.stderr
    assert run_example(BUCKETS, DATASET="nowhere").returncode == 2
    assert not list(tmp_path.iterdir())
