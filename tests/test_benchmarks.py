"""The benchmarks: what they emulate is what the hardware does, and what they cannot measure they say."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import interpolate

from benchmarks._models import load, relative_l2
from benchmarks._rounding import Stored, Tf32, encode_within, to_tf32
from streamprep.testing.tiny_model import draw_vae, make_vae
from streamprep.types import ClipBatch

NO_CUDA = "not measured (no CUDA device)"

Run = Callable[..., subprocess.CompletedProcess[str]]


def pixels() -> Tensor:
    coarse = torch.rand(1, 3, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    return interpolate(coarse, size=(5, 48, 64), mode="trilinear") * 2 - 1


@torch.inference_mode()
def latent(vae: Any, pixels_BCTHW: Tensor) -> Tensor:
    mean: Tensor = vae.encode(pixels_BCTHW).latent_dist.mean
    return mean.float()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_emulated_type_loses_what_the_real_one_does(dtype: torch.dtype) -> None:
    vae, video = make_vae(seed=0), pixels()
    exact = latent(vae, video)
    real = latent(make_vae(seed=0).to(dtype), video.to(dtype))
    with encode_within(vae, Stored(dtype)):
        emulated = latent(vae, video.to(dtype).float())
    assert relative_l2(emulated, exact) == pytest.approx(relative_l2(real, exact), rel=0.1)
    assert torch.equal(latent(vae, video), exact)  # and afterwards nothing is rounded


@pytest.mark.parametrize(
    ("number", "rounded"),
    [
        (1 + 2**-10, 1 + 2**-10),
        (1 + 2**-11, 1.0),  # ties go to the even one
        (1 + 3 * 2**-11, 1 + 2**-9),
        (1 + 2**-11 + 2**-20, 1 + 2**-10),
        (-1 - 2**-11, -1.0),
        (0.0, 0.0),
    ],
)
def test_tf32_has_ten_bits_after_the_point(number: float, rounded: float) -> None:
    assert to_tf32(torch.tensor(number)).item() == rounded


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1))
def test_tf32_is_at_most_half_a_step_away_and_rounding_twice_changes_nothing(numbers: list[float]) -> None:
    values = torch.tensor(numbers, dtype=torch.float32)
    rounded = to_tf32(values)
    step = torch.clamp(values.abs() * 2.0**-11, min=2.0**-136)
    assert ((rounded - values).abs() <= step).all()
    assert torch.equal(to_tf32(rounded), rounded)


@pytest.mark.usefixtures("one_thread")
def test_emulated_tf32_moves_every_tensor_a_little(tiny_models: Callable[[str], Path]) -> None:
    """None at all would mean that a model multiplies in a way that is not listed."""
    encoder = load(tiny_models("2.1-i2v"))
    frames = ((pixels() + 1) * 127.5).to(torch.uint8).permute(0, 2, 1, 3, 4)
    clip = ClipBatch(keys=("clip",), frames=frames)

    def encode() -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = encoder.encode_batch(clip)[0]
        return tensors | {"text_embedding": encoder.encode_text(["A red circle moves from left to right."])[0]}

    exact = encode()
    with Tf32():
        moved = encode()
    assert set(exact) == {"vae_latent", "first_frame_latent", "clip_feature", "text_embedding"}
    for name, truth in exact.items():
        assert 1e-5 < relative_l2(moved[name], truth) < 1e-2, name


@pytest.mark.slow
@torch.inference_mode()
def test_the_full_size_vae_does_not_ignore_its_input() -> None:
    """As PyTorch's own initial weights nearly do; errors of such latents would say nothing."""
    vae = draw_vae(0)
    assert sum(weight.numel() for weight in vae.parameters()) == 126_892_531
    picture = pixels()[:, :, :1]
    latents = torch.stack([latent(vae, picture), latent(vae, picture.flip(-1))])
    assert 0.3 < latents.std() < 3
    assert relative_l2(latents[1], latents[0]) > 0.3


def rows(printed: str) -> list[list[str]]:
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.slow
def test_precision_has_a_number_or_a_reason_in_every_row(run_python: Run, tmp_path: Path) -> None:
    flags = ("--tiny-only", "--device", "cpu", "--num-frames", "5", "--height", "32", "--width", "48", "--threads", "1")
    done = run_python(
        "benchmarks/precision.py", *flags, "--clips", tmp_path / "nowhere", "--json", tmp_path / "numbers"
    )
    assert done.returncode == 0, done.stderr
    _, _, reference, *measured = rows(done.stdout)
    assert reference == ["tiny", "float32", "all", "the reference", "", NO_CUDA]
    found = {(change, tensor): error for _, change, tensor, error, *_ in measured}
    for tensor in ("vae_latent", "first_frame_latent", "clip_feature", "text_embedding"):
        assert found.pop(("TF32", tensor)) == NO_CUDA
        assert 0 < float(found.pop(("TF32, emulated", tensor))) < 1e-2
    for change in ("bfloat16", "float16", "float16, emulated"):
        for tensor in ("vae_latent", "first_frame_latent"):
            assert 1e-5 < float(found.pop((change, tensor))) < 0.1
    assert 1e-5 < float(found.pop(("bfloat16", "text_embedding"))) < 0.1
    assert 1e-5 < float(found.pop(("resized in float", "vae_latent"))) < 0.1
    assert float(found.pop(("padded to 512", "text_embedding"))) < 1e-5
    assert not found
    assert (tmp_path / "numbers").exists()


def test_without_a_gpu_the_gpu_benchmark_says_so_and_fails(run_python: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    refused = run_python("benchmarks/gpu.py")
    assert (refused.returncode, refused.stdout) == (1, "no CUDA device: not run\n"), refused.stderr


def test_the_gpu_benchmark_runs_without_any_video_library(run_python: Run) -> None:
    """Where GPUs are, FFmpeg often is not; nothing but the whole job needs it."""
    flags = ["--device", "cpu", "--num-frames", "5", "--height", "32", "--width", "48", "--tiny-only", "--rounds", "1"]
    program = f"""
import runpy, sys
sys.modules |= dict.fromkeys(["av", "torchcodec", "pyarrow", "zstandard", "tyro", "rich"])  # None: cannot be imported
sys.argv[1:] = {flags}
sys.path.insert(0, "benchmarks")
runpy.run_path("benchmarks/gpu.py", run_name="__main__")
"""
    done = run_python("-c", program)
    assert done.returncode == 0, done.stderr
    table = rows(done.stdout)
    assert ["tiny", "float32", "text_embedding", "0.0e+00", "0.0e+00"] in table
    assert ["tiny", "TF32", "all", NO_CUDA, ""] in table
    assert ["tiny", "float32", NO_CUDA, "", ""] in table
    assert "Whole job: not run (" in done.stdout


@pytest.mark.slow
def test_scaling_runs_ranks_that_share_and_ranks_that_do_not(repo_root: Path, tmp_path: Path) -> None:
    flags = ["--ranks", "2", "--num-shards", "8", "--smallest", "1", "--largest", "4", "--seconds-per-clip", "0.05"]
    command = [sys.executable, "benchmarks/scaling.py", *flags, "--rounds", "1", "--json", str(tmp_path / "numbers")]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True)  # a busy machine takes minutes
    assert done.returncode == 0, done.stderr
    assert [row[:2] for row in rows(done.stdout)[2:]] == [["2", "shared"], ["2", "static"]]
    jobs = json.loads((tmp_path / "numbers").read_text())["results"]
    for (job,), split in ((jobs["2 shared"], "shared"), (jobs["2 static"], "static")):
        assert job["commits"] == 8, split
        assert sum(job["num_clips"]) == 17
        assert 0.05 < job["efficiency"] <= 1
    assert jobs["2 static"][0]["num_clips"] == [10, 7]  # of the shards 0, 2, 4, 6 and 1, 3, 5, 7


def test_the_simulated_ranks_commit_every_unit_whatever_fails(run_python: Run, tmp_path: Path) -> None:
    flags = ["--num-ranks", "16", "--num-units", "300", "--failures", "none", "all", "--json", tmp_path / "numbers"]
    done = run_python("benchmarks/claims_simulation.py", *flags)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "numbers").read_text())["results"]
    assert list(results) == ["none", "all"]
    assert all(result["missing"] == 0 for result in results.values())
    assert results["none"]["over_ideal"] <= 1.02
    assert results["none"]["twice"] == 0


@pytest.mark.parametrize(
    ("parts", "goals"),
    [
        pytest.param(["latency"], ["latency: streamprep, reading, MB/s / raw"], marks=pytest.mark.slow),
        pytest.param(
            ["pack", "first-clip"],
            ["pack: MB/s / raw"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["read", "memory"],
            [
                "read: streamprep, reading, MB/s / raw",
                "slow store above two videos, MB",
                "fast store above two videos, MB",
            ],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_buckets_are_measured_against_the_raw_client(
    parts: list[str], goals: list[str], repo_root: Path, tmp_path: Path
) -> None:
    flags = ["--smoke", "--parts", *parts, "--work", str(tmp_path), "--json", str(tmp_path / "numbers")]
    done = subprocess.run(
        [sys.executable, "benchmarks/stores.py", *flags], cwd=repo_root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if ", goal " in line]
    assert len(told) == len(goals) and all(
        line.startswith(f"- {goal} ") for line, goal in zip(told, goals, strict=True)
    )
    results = json.loads((tmp_path / "numbers").read_text())["results"]
    assert list(results) == parts
    for part, methods in results.items():
        for name, (numbers,) in methods.items():
            if "encode" in name or part == "memory":
                assert numbers["num_clips"] == (2 if name == "two videos" else 8), name
            elif part == "first-clip":
                assert 0 < numbers["opening_seconds"] < numbers["seconds"], name
                assert bool(numbers["requests"]) == (name != "folder"), name
            else:
                assert numbers["mb_per_second"] > 0 and numbers["cpu_seconds"] > 0, name
    if "latency" in parts:  # of 8 requests one after the other; the raw client's are side by side
        one, many = (results["latency"][f"raw client, {n}"][0]["seconds"] for n in ("1 connection", "12 connections"))
        assert one > 8 * 0.05 and many < one


@pytest.mark.slow
def test_readers_are_measured_that_are_installed(repo_root: Path, tmp_path: Path) -> None:
    """litdata and MosaicML's package are no dependencies of ours."""
    done = subprocess.run(
        [
            sys.executable,
            "benchmarks/train_read.py",
            "--smoke",
            "--work",
            str(tmp_path),
            "--json",
            tmp_path / "numbers",
        ],
        cwd=repo_root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "numbers").read_text())["results"]
    for name in ("litdata", "MosaicML"):
        assert (f"Not measured: {name} is not installed." in done.stdout) != (name in results["epochs"])
    for name in ("raw", "streamprep, Parquet", "streamprep, WebDataset", "webdataset"):
        (epoch,) = results["epochs"][name]
        assert epoch["num_rows"] == 4 and 0 < epoch["first_batch_seconds"] <= epoch["seconds"], name
        assert epoch["peak_mb"] > 4 * 10, name
    assert set(results["row_groups"]) == {"ours", "FastVideo"}
    assert all(seconds > 0 for (seconds,) in (*results["row_groups"].values(), *results["starts"].values()))
