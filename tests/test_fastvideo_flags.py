"""FastVideo's own command lines, both entry points', run unchanged but for the module's name."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastvideo_schemas import SCHEMAS
from object_stores import NewBucket
from reference import Geometry, compare, encode_dataset, read_rows
from servers import Server

from streamprep import cli, config, fastvideo
from streamprep.config import RunConfig
from streamprep.crashpoints import VARIABLE
from streamprep.errors import UserError
from streamprep.fastvideo import translate
from streamprep.job import open_job
from streamprep.storage import open_store
from streamprep.verify import verify_job

if TYPE_CHECKING:
    RunPython = Callable[..., subprocess.CompletedProcess[str]]

pytest_plugins = ["object_stores"]

CRASHED = 137
GEOMETRY = Geometry(height=32, width=48, num_frames=5, train_fps=8)
LENGTHS = (10, 16, 60, 12, 2, 9)
"""Frames of the dataset's videos, at 16 fps."""

# FastVideo's flags, written down from its code (snapshot 2f3d4074), not from ours: `add_cli_args` of FastVideoArgs,
# PipelineConfig, PreprocessConfig, VAEConfig and DiTConfig; and the parser of v1_preprocess.

ENGINE = """
model-path mode workload-type distributed-executor-backend inference-mode trust-remote-code revision num-gpus tp-size
sp-size hsdp-replicate-dim hsdp-shard-dim dist-timeout output-type attention-backend prompt-txt ltx2-vae-tiling
ltx2-vae-spatial-tile-size-in-pixels ltx2-vae-spatial-tile-overlap-in-pixels ltx2-vae-temporal-tile-size-in-frames
ltx2-vae-temporal-tile-overlap-in-frames ltx2-initial-latent-path lora-path lora-nickname lora-target-modules enable-bsa
bsa-sparsity bsa-cdf-threshold bsa-chunk-q bsa-chunk-k enable-torch-compile torch-compile-kwargs dit-cpu-offload
dit-layerwise-offload use-fsdp-inference text-encoder-cpu-offload image-encoder-cpu-offload vae-cpu-offload
pin-cpu-memory disable-autocast VSA-sparsity VSA-tile-size master-port enable-stage-verification
override-text-encoder-safetensors override-text-encoder-quant override-transformer-cls-name override-pipeline-cls-name
init-weights-from-safetensors init-weights-from-safetensors-2 pipeline-config-path embedded-cfg-scale flow-shift
dit-precision vae-precision vae-decode-precision vae-tiling vae-sp text-encoder-precisions image-encoder-precision
dmd-denoising-steps vae-config.load-encoder vae-config.load-decoder vae-config.tile-sample-min-height
vae-config.tile-sample-min-width vae-config.tile-sample-min-num-frames vae-config.tile-sample-stride-height
vae-config.tile-sample-stride-width vae-config.tile-sample-stride-num-frames vae-config.blend-num-frames
vae-config.use-tiling vae-config.use-temporal-tiling vae-config.use-parallel-tiling dit-config.prefix
dit-config.quant-config
"""
PREPROCESS = """
model-path dataset-path dataset-type dataset-output-dir dataloader-num-workers preprocess-video-batch-size
samples-per-file flush-frequency video-loader-type max-height max-width num-frames video-length-tolerance-range
train-fps speed-factor drop-short-ratio do-temporal-sample training-cfg-rate with-audio seed
"""
LEGACY = """
model_path seed data_merge_path num_frames dataloader_num_workers preprocess_video_batch_size samples_per_file
flush_frequency num_latent_t max_height max_width video_length_tolerance_range group_frame group_resolution flow_shift
preprocess_task train_fps use_image_num text_max_length speed_factor drop_short_ratio do_temporal_sample
text_encoder_name cache_dir training_cfg_rate output_dir
"""
VALUES = {
    "mode": "preprocess",
    "workload_type": "i2v",
    "preprocess_task": "i2v",
    "dataset_type": "merged",
    "video_loader_type": "torchcodec",
    "with_audio": "false",
    "do_temporal_sample": "true",
    "text_encoder_cpu_offload": "true",
    "vae_precision": "fp32",
    "text_encoder_precisions": "('fp32',)",
}
"""Values that flags can take; all others get 1."""
REFUSED = (
    "override_text_encoder_safetensors",
    "override_text_encoder_quant",
    "pipeline_config_path",
    "revision",
)

NEW = ("--model_path", "M", "--preprocess.dataset_path", "D")


def run_config(*words: object, base: tuple[str, ...] = NEW) -> RunConfig:
    """What a command line comes to."""
    arguments, _ = translate([*base, *map(str, words)])
    parsed = cli.parse(arguments[0], arguments[1:])
    assert isinstance(parsed, RunConfig)
    return parsed


def notes(*words: object, base: tuple[str, ...] = NEW) -> list[str]:
    return translate([*base, *map(str, words)])[1]


@pytest.fixture
def legacy(tmp_path: Path) -> tuple[str, ...]:
    """The least that v1_preprocess takes."""
    merge = tmp_path / "merge.txt"
    merge.write_text(f"{tmp_path}/videos,{tmp_path}/videos2caption.json\n")
    return ("--model_path", "M", "--data_merge_path", str(merge), "--output_dir", "O")


# Flags


def test_fastvideos_defaults_hold_where_they_decide_what_is_encoded() -> None:
    settings = run_config()
    assert (settings.max_height, settings.max_width, settings.num_frames, settings.train_fps) == (480, 848, 163, 30)
    assert (settings.video_length_tolerance_range, settings.speed_factor, settings.drop_short_ratio) == (2.0, 1.0, 1.0)
    assert (settings.samples_per_file, settings.preprocess_video_batch_size, settings.seed) == (64, 2, 42)
    assert (settings.training_cfg_rate, settings.do_temporal_sample, settings.clean_captions) == (0.0, False, False)
    assert (settings.vae_dtype, settings.text_dtype, settings.posterior) == ("float32", "float32", "mean")
    assert (settings.dataset, settings.out, settings.dataset_type) == ("D", "./output", "hf")
    assert (settings.workload_type, settings.video_loader_type, settings.caption) == ("t2v", "torchcodec", "first")


def test_its_older_entry_point_takes_one_of_several_captions_at_random(legacy: tuple[str, ...]) -> None:
    settings = run_config(base=legacy)
    assert settings.caption == "random"
    assert (settings.dataset_type, settings.workload_type, settings.num_frames) == ("merged", "t2v", 163)


@pytest.mark.parametrize("spelling", ["{}={}", "{} {}"])
@pytest.mark.parametrize(("dot", "dash"), [("preprocess.", "-"), ("preprocess.", "_"), ("", "_"), ("", "-")])
@pytest.mark.parametrize(
    ("name", "value", "setting"),
    [
        ("dataloader_num_workers", 3, 3),
        ("preprocess_video_batch_size", 8, 8),
        ("samples_per_file", 7, 7),
        ("max_height", 64, 64),
        ("max_width", 96, 96),
        ("num_frames", 81, 81),
        ("train_fps", 16, 16.0),
        ("video_length_tolerance_range", 5, 5.0),
        ("speed_factor", 1.5, 1.5),
        ("drop_short_ratio", 0.5, 0.5),
        ("training_cfg_rate", 0.1, 0.1),
        ("seed", -7, -7),
        ("video_loader_type", "torchvision", "torchcodec"),
        ("do_temporal_sample", "true", True),
        ("dataset_type", "merged", "merged"),
    ],
)
def test_a_flag_means_the_same_in_every_spelling(
    name: str, value: object, setting: object, dot: str, dash: str, spelling: str
) -> None:
    words = spelling.format(f"--{dot}{name.replace('_', dash)}", value).split()
    assert getattr(run_config(*words), name) == setting


@pytest.mark.parametrize(
    "flag", [*(f"--{name}" for name in ENGINE.split()), *(f"--preprocess.{name}" for name in PREPROCESS.split())]
)
def test_every_flag_of_the_new_workflow_is_known(flag: str) -> None:
    name = flag.removeprefix("--").removeprefix("preprocess.").replace("-", "_").lower()
    words = [flag, VALUES.get(name, "1")]
    if name in REFUSED:
        with pytest.raises(UserError, match=flag):
            translate([*NEW, *words])
        return
    told, plain = translate([*NEW, *words]), translate(NEW)
    assert told != plain or name in ("text_encoder_cpu_offload", "with_audio", "num_gpus"), (
        "it must do or say something"
    )
    cli.parse("run", told[0][1:])


@pytest.mark.parametrize("name", LEGACY.split())
def test_every_flag_of_the_older_entry_point_is_known(name: str, legacy: tuple[str, ...]) -> None:
    given = dict(zip(legacy[::2], legacy[1::2], strict=True))
    base = tuple(word for flag, value in given.items() if flag != f"--{name}" for word in (flag, value))
    value = given.get(f"--{name}", VALUES.get(name, "1"))
    words = [f"--{name}"] if name.startswith("group_") or name == "do_temporal_sample" else [f"--{name}", value]
    arguments, told = translate([*base, *words])
    cli.parse("run", arguments[1:])
    assert (arguments, told) != translate(legacy) or f"--{name}" in given


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("--preprocess.flush_frequency 8", "as soon as it is encoded"),
        ("--mode preprocess", "only preprocesses"),
        ("--num-latent-t=28", "never uses it"),
        ("--use_image_num 0", "never uses it"),
        ("--group_frame", "never uses it"),
        ("--text_max_length 256", "512"),
        ("--model_type wan", "model_index.json"),
        ("--validation_dataset_file v.json", "--validation-split"),
        ("--sp_size -1", "takes shards as it goes"),
        ("--pin_cpu_memory", "pinned"),
        ("--VSA-sparsity 0.5", "transformer"),
        ("--bsa-chunk-q 1 2 3", "transformer"),
        ("--vae-config.use-tiling true", "encoded whole"),
    ],
)
def test_a_flag_that_does_nothing_is_taken_with_a_line_that_says_why(words: str, why: str) -> None:
    arguments, lines = translate([*NEW, *words.split()])
    plain, of_all = translate(NEW)
    assert arguments == plain
    (line,) = (line for line in lines if line not in of_all)
    assert line.startswith(f"{words.split()[0].partition('=')[0]} does nothing here: ")
    assert why in line


def test_torchvision_becomes_torchcodec_with_a_line() -> None:
    assert any("torchcodec decodes instead" in line for line in notes("--preprocess.video_loader_type", "torchvision"))


def test_where_both_models_are_given_the_one_without_prefix_counts() -> None:
    assert run_config("--preprocess.model_path", "other").model_path == "M"
    assert run_config(base=("--preprocess.model_path", "only", "--preprocess.dataset_path", "D")).model_path == "only"


def test_precisions_and_offload_are_ours() -> None:
    settings = run_config("--vae_precision", "bf16", "--text-encoder-precisions", "bf16", "--text_encoder_cpu_offload")
    assert (settings.vae_dtype, settings.text_dtype, settings.offload_text_encoder) == ("bfloat16", "bfloat16", True)


def test_flags_of_run_are_taken_too() -> None:
    words = (
        "--shards S --validation-split 0.1 --where fps>1 --filters black static --device cpu --serial --max_samples 3"
    )
    settings = run_config(*words.split(), "--height", 64, "--no-clean-captions")
    assert (settings.shards, settings.validation_split, settings.where) == ("S", "0.1", "fps>1")
    assert (settings.filters, settings.device, settings.serial) == (("black", "static"), "cpu", True)
    assert (settings.max_samples, settings.max_height) == (3, 64)
    assert run_config("--clean-captions").clean_captions


def test_every_flag_of_run_is_taken() -> None:
    assert {field.replace("-", "_") for field in _flags_of_run()} <= fastvideo.OWN


def _flags_of_run() -> set[str]:
    from dataclasses import fields

    return {field.name for field in fields(config.RunConfig)} - {"dataset", "out"}


def test_where_fastvideo_reads_is_said_of_its_own_format() -> None:
    assert any(
        "trainers read O/combined_parquet_dataset" in line for line in notes("--preprocess.dataset_output_dir", "O")
    )
    assert not any("trainers read" in line for line in notes("--exporter", "webdataset"))


def test_a_file_of_flags_cannot_name_another(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(f"config: {path}\nnum_gpus: 2\n")
    with pytest.raises(UserError, match=r"job.yaml: it names a further file"):
        translate([*NEW, "--config", str(path)])


def test_num_gpus_starts_ranks_unless_a_launcher_has(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_config("--num_gpus", 4).nproc == "4"
    assert run_config("--num_gpus", 1).nproc == "1"
    assert run_config("--num_gpus", 4, "--nproc", 2).nproc == "2"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_config("--num_gpus", 4).nproc == "1"
    assert any("the launcher says" in line for line in notes("--num_gpus", 4))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--wokload_type t2v", r"--wokload_type: neither .* did you mean --workload_type\?"),
        ("--preprocess.dataset_pth D", r"did you mean --preprocess.dataset_path\?"),
        ("--preprocess.filters black", r"--preprocess.filters: neither .* did you mean --filters\?"),
        ("--workload_type t2i", "--workload_type t2i: FastVideo preprocesses t2v and i2v"),
        ("--preprocess_task ode_trajectory", "ode_trajectory: only t2v, i2v, text_only"),
        ("--preprocess_task matrixgame2", "use FastVideo's own"),
        ("--preprocess.with_audio true", "audio is not encoded"),
        ("--preprocess.with_audio maybe", "is true or false, got 'maybe'"),
        ("--revision main", "hf download"),
        ("--override-text-encoder-quant fp8", "other embeddings"),
        ("--num_gpus none", "a number from 1, got 'none'"),
        ("--vae_precision fp8", "one of fp32, bf16, fp16"),
        ("--preprocess.num_frames", "--preprocess.num_frames takes one value, got none"),
        ("--preprocess.num_frames 77 81", "takes one value, got 77 81"),
        ("--data_merge_path M", "name two datasets"),
        ("--output_dir O --preprocess.dataset_output_dir P", "name two outputs"),
        ("--preprocess_task i2v --workload_type t2v --output_dir O", "contradict each other"),
        ("--preprocess_task i2v", "--output_dir is missing"),
        ("--config x.ini", ".yaml, .yml or .json"),
        ("--config missing.yaml", "missing.yaml cannot be read"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_what_to_do(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        translate([*NEW, *words.split()])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model_path", "M"], "--preprocess.dataset_path is missing"),
        (["--model_path", "M", "--output_dir", "O"], "--data_merge_path is missing"),
        (["M", "--model_path", "M"], "'M': FastVideo's preprocessing takes flags only"),
        (["--model_path", "M", "--preprocess.dataset_path="], "--preprocess.dataset_path is empty: an unset variable"),
    ],
)
def test_what_is_missing_is_named(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        translate(words)


# Files of settings


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_file_of_fastvideos_settings_is_heard_and_the_command_line_overrules_it(tmp_path: Path, suffix: str) -> None:
    values = {"model_path": "M", "pin_cpu_memory": True, "preprocess": {"num_frames": 81, "dataset_path": "D"}}
    file = tmp_path / f"job.{suffix}"
    file.write_text(json.dumps(values))  # which is YAML, too
    settings = run_config("--config", file, base=())
    assert (settings.model_path, settings.dataset, settings.num_frames) == ("M", "D", 81)
    assert run_config("--preprocess.num_frames", 77, "--config", file, base=()).num_frames == 77


def test_our_own_file_overrules_fastvideos_defaults_and_not_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text('num_frames = 17\ntrain_fps = 8.0\nfilters = ["black"]\ncache_dir = "C"\n')
    settings = run_config("--config", file, "--preprocess.num_frames", 81)
    assert (settings.num_frames, settings.train_fps, settings.filters) == (81, 8.0, ("black",))
    assert settings.cache_dir == "C"


# Datasets


def test_a_merge_file_names_the_videos_and_the_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data/crush/videos").mkdir(parents=True)
    (tmp_path / "data/crush/captions.json").write_text("[]")
    merge = tmp_path / "data/crush/merge.txt"
    merge.write_text("\n data/crush/videos , data/crush/captions.json\n\n")
    monkeypatch.chdir(tmp_path)
    assert fastvideo.read_merge_file("data/crush/merge.txt") == ("data/crush/videos", "data/crush/captions.json")
    merge.write_text("videos,captions.json")
    assert fastvideo.read_merge_file("data/crush/merge.txt") == ("data/crush/videos", "data/crush/captions.json")
    merge.write_text("/a/videos,s3://bucket/captions.json")
    assert fastvideo.read_merge_file(str(merge)) == ("/a/videos", "s3://bucket/captions.json")


@pytest.mark.parametrize("content", ["", "A dog.\n", "a,b\nc,d\n", "a,b,c\n"])
def test_another_file_for_a_merge_file_is_refused(tmp_path: Path, content: str, legacy: tuple[str, ...]) -> None:
    (tmp_path / "merge.txt").write_text(content)
    with pytest.raises(UserError, match=r"must hold one line, FOLDER_OF_VIDEOS,ANNOTATIONS\.json"):
        translate(legacy)


def test_a_missing_merge_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file"):
        fastvideo.read_merge_file(str(tmp_path / "merge.txt"))


def test_text_only_takes_a_file_with_a_prompt_on_each_line(legacy: tuple[str, ...]) -> None:
    settings = run_config("--preprocess_task", "text_only", "--preprocess_video_batch_size", 3, base=legacy)
    assert (settings.workload_type, settings.dataset_type, settings.dataset) == ("text", "prompts", legacy[3])
    assert (settings.text_batch_size, settings.caption) == (3, "first")


# FastVideo's shipped scripts, with their variables filled in, by the words after the module's name


SCRIPTS = {
    "scripts/preprocess/v1_preprocess_wan_data_t2v.sh": (
        "--model_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers --data_merge_path {merge} --preprocess_video_batch_size 1 "
        "--max_height 480 --max_width 832 --num_frames 81 --dataloader_num_workers 0 --output_dir=O --model_type wan "
        "--train_fps 16 --validation_dataset_file V --samples_per_file 1 --flush_frequency 1 "
        '--video_length_tolerance_range 5 --preprocess_task "t2v"',
        {"num_frames": 81, "max_width": 832, "video_length_tolerance_range": 5.0, "workload_type": "t2v"},
    ),
    "scripts/preprocess/v1_preprocess_wan_data_i2v.sh": (
        "--model_path Wan-AI/Wan2.1-I2V-14B-480P-Diffusers --data_merge_path {merge} --preprocess_video_batch_size 8 "
        "--max_height 480 --max_width 832 --num_frames 77 --dataloader_num_workers 0 --output_dir=O --model_type wan "
        '--train_fps 16 --validation_dataset_file V --samples_per_file 8 --flush_frequency 8 --preprocess_task "i2v" ',
        {"workload_type": "i2v", "preprocess_video_batch_size": 8, "video_length_tolerance_range": 2.0},
    ),
    "scripts/preprocess/preprocess_train_text_only_dmd.sh": (
        "--model_path M --data_merge_path {merge} --preprocess_video_batch_size 1 --seed 42 --max_height 448 "
        "--max_width 832 --num_frames 77 --dataloader_num_workers 0 --output_dir O --train_fps 16 "
        "--samples_per_file 8 --flush_frequency 8 --text_max_length 512 --video_length_tolerance_range 5 "
        "--preprocess_task text_only",
        {"workload_type": "text", "dataset_type": "prompts", "text_batch_size": 1},
    ),
    "examples/.../crush_smol/preprocess_wan_data_t2v_new.sh": (
        "--model_path M --mode preprocess --workload_type t2v --preprocess.video_loader_type torchvision "
        "--preprocess.dataset_type merged --preprocess.dataset_path data/crush-smol/ "
        "--preprocess.dataset_output_dir O --preprocess.preprocess_video_batch_size 2 "
        "--preprocess.dataloader_num_workers 0 --preprocess.max_height 480 --preprocess.max_width 832 "
        "--preprocess.num_frames 77 --preprocess.train_fps 16 --preprocess.samples_per_file 8 "
        "--preprocess.flush_frequency 8 --preprocess.video_length_tolerance_range 5",
        {"dataset": "data/crush-smol/", "dataset_type": "merged", "num_frames": 77, "samples_per_file": 8},
    ),
    "examples/.../mixkit/preprocess_mixkit_data.sh": (
        '--model-path "M" --mode preprocess --workload-type t2v --preprocess.video-loader-type torchvision '
        "--preprocess.dataset-type merged --preprocess.preprocess-video-batch-size 1 --preprocess.dataset-path D "
        "--preprocess.dataset-output-dir O --preprocess.max-height 480 --preprocess.max-width 832 "
        "--preprocess.num-frames 77 --preprocess.train-fps 16 --preprocess.samples-per-file 8",
        {"dataset": "D", "preprocess_video_batch_size": 1, "video_length_tolerance_range": 2.0},
    ),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_shipped_script_means_what_it_says(script: str, legacy: tuple[str, ...]) -> None:
    words, expected = SCRIPTS[script]
    settings = run_config(*shlex.split(words.format(merge=legacy[3])), base=())
    assert {name: getattr(settings, name) for name in expected} == expected
    assert settings.out == "O"
    assert not settings.clean_captions


# Whole jobs


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, make_video: Callable[..., Path]) -> Path:
    """Six videos in FastVideo's merged layout, one of them too long and one too short for it, and its merge.txt."""
    root = tmp_path_factory.mktemp("dataset")
    rows = []
    for number, num_frames in enumerate(LENGTHS):
        make_video(root / "videos" / f"{number}.mp4", seed=number, num_frames=num_frames, size=(64 + 16 * number, 48))
        rows.append({"path": f"{number}.mp4", "cap": [f"Video  {number} &amp; \u201cmore\u201d."]})
    # As FastVideo's own script writes it.
    for row, num_frames in zip(rows, LENGTHS, strict=True):
        row |= {"fps": 16.0, "num_frames": num_frames, "duration": num_frames / 16}  # type: ignore[operator]
    (root / "videos2caption.json").write_text(json.dumps(rows))
    (root / "merge.txt").write_text(f"{root}/videos,{root}/videos2caption.json\n")
    return root


@pytest.fixture(scope="module")
def usable(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without those that FastVideo drops: longer than 2 x 5/8 s, or shorter than a clip."""
    root = tmp_path_factory.mktemp("usable") / "dataset"
    shutil.copytree(dataset, root)
    rows = json.loads((root / "videos2caption.json").read_text())
    (root / "videos2caption.json").write_text(json.dumps([rows[number] for number in (0, 1, 3, 5)]))
    return root


SIZES = "--{dot}max_height 32 --{dot}max_width 48 --{dot}num_frames 5 --{dot}train_fps 8"
OURS = ("--device", "cpu", "--encode-threads", "1")


def of_new_workflow(dataset: object, out: object, model: Path, *, workload: str) -> list[str]:
    return [
        *("--model_path", str(model), "--mode", "preprocess", "--workload_type", workload),
        *("--preprocess.dataset_type", "merged", "--preprocess.dataset_path", str(dataset)),
        *("--preprocess.dataset_output_dir", str(out), "--preprocess.flush_frequency", "8"),
        *SIZES.format(dot="preprocess.").split(),
        *OURS,
    ]


def of_older(merge: object, out: object, model: Path, *, task: str) -> list[str]:
    return [
        *("--model_path", str(model), "--preprocess_task", task, "--data_merge_path", str(merge)),
        *(f"--output_dir={out}", "--samples_per_file", "2", "--flush_frequency", "2"),
        *SIZES.format(dot="").split(),
        *OURS,
    ]


def dropped(out: object) -> dict[str, str]:
    job = open_job(open_store(str(out)))
    assert verify_job(job).problems == []
    return {item.key: item.reason for record in job.records() for item in record.dropped}


@pytest.mark.parametrize("variant", ["2.1-t2v", "2.1-i2v"])
@pytest.mark.usefixtures("one_thread")
def test_the_new_workflows_rows_are_those_that_fastvideo_would_make(
    variant: str, dataset: Path, usable: Path, tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    """By the second implementation, which does as FastVideo was found to do: captions not cleaned, ..."""
    workload, model = variant.rpartition("-")[2], tiny_models(variant)
    assert fastvideo.main([*of_new_workflow(dataset, tmp_path / "out", model, workload=workload), "--serial"]) == 0
    assert dropped(tmp_path / "out") == {"2": "too_long", "4": "too_short"}
    reference = encode_dataset(usable, model, workload=workload, geometry=GEOMETRY, clean_captions=False)
    assert compare(read_rows(tmp_path / "out"), reference) == []
    for path in (tmp_path / "out/combined_parquet_dataset").iterdir():
        assert pq.read_schema(path).remove_metadata().equals(SCHEMAS[workload])


@pytest.mark.usefixtures("one_thread")
def test_both_entry_points_make_the_same_rows(
    dataset: Path, usable: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = of_older(dataset / "merge.txt", tmp_path / "out", tiny_model, task="t2v")
    assert fastvideo.main([*command, "--serial"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("4 rows, 2 files")
    assert "--flush_frequency does nothing here" in said.err
    assert f"this is: streamprep run {dataset}/videos {tmp_path}/out" in said.err
    reference = encode_dataset(usable, tiny_model, workload="t2v", geometry=GEOMETRY, clean_captions=False)
    assert compare(read_rows(tmp_path / "out"), reference) == []


@pytest.mark.usefixtures("one_thread")
def test_a_dataset_of_the_hubs_library_goes_in_as_fastvideo_has_it(
    dataset: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """``dataset_type hf``, its default, with the columns that FastVideo asks for; ids are the rows' numbers."""
    rows = json.loads((dataset / "videos2caption.json").read_text())
    table = pa.Table.from_pylist(
        [
            {
                "video": {"bytes": (dataset / "videos" / row["path"]).read_bytes(), "path": row["path"]},
                "caption": row["cap"][0],
                "name": row["path"],
                "fps": row["fps"],
                "num_frames": row["num_frames"],
                "resolution": {"width": 64 + 16 * number, "height": 48},
            }
            for number, row in enumerate(rows)
        ]
    )
    (tmp_path / "hub").mkdir()
    pq.write_table(table, tmp_path / "hub/train-00000-of-00001.parquet")
    words = of_new_workflow(tmp_path / "hub", tmp_path / "hf", tiny_model, workload="t2v")
    words[words.index("merged")] = "hf"
    assert fastvideo.main([*words, "--serial"]) == 0
    assert fastvideo.main([*of_new_workflow(dataset, tmp_path / "out", tiny_model, workload="t2v"), "--serial"]) == 0
    assert sorted(dropped(tmp_path / "hf").values()) == sorted(dropped(tmp_path / "out").values()) != []
    ours, theirs = read_rows(tmp_path / "hf"), read_rows(tmp_path / "out")
    assert len(ours) == len(theirs) == 4
    ids = {row["caption"]: row["id"] for row in theirs.values()}
    renamed = [row | dict.fromkeys(("id", "file_name"), ids[row["caption"]]) for row in ours.values()]
    assert compare({row["id"]: row for row in renamed}, theirs) == []


@pytest.mark.usefixtures("one_thread")
def test_text_only_makes_an_embedding_of_each_prompt(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("A dog.\n\nA  cat &amp; a dog.\n")
    assert fastvideo.main(of_older(tmp_path / "prompts.txt", tmp_path / "out", tiny_model, task="text_only")) == 0
    (path,) = (tmp_path / "out/combined_parquet_dataset").iterdir()
    table = pq.read_table(path)
    assert table.schema.remove_metadata().equals(SCHEMAS["text"])
    assert table["caption"].to_pylist() == ["A dog.", "A  cat &amp; a dog."]


def test_num_frames_that_fastvideos_vae_would_cut_are_refused_before_anything_is_packed(
    dataset: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """FastVideo's own default is one of them."""
    words = ["--model_path", str(tiny_model), "--preprocess.dataset_path", str(dataset)]
    out = ["--preprocess.dataset_type", "merged", "--preprocess.dataset_output_dir", str(tmp_path / "out")]
    assert fastvideo.main([*words, *out]) == 2
    assert "--num-frames 163 breaks the 4k+1 rule of wan" in (said := capsys.readouterr().err)
    assert "use 161 or 165" in said
    assert not (tmp_path / "out").exists()


def test_wrong_usage_exits_as_the_command_line_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert fastvideo.main([]) == 2
    assert fastvideo.main(["--help"]) == 0
    assert "--flush_frequency" in capsys.readouterr().out
    assert fastvideo.main(["--model_path", "M"]) == 2
    assert "--preprocess.dataset_path is missing" in capsys.readouterr().err


def test_a_link_to_the_videos_is_followed_as_its_mixkit_script_makes_one(
    dataset: Path, tiny_model: Path, tmp_path: Path
) -> None:
    stage = tmp_path / "stage"
    stage.mkdir()
    (stage / "videos").symlink_to(dataset / "videos")
    shutil.copy(dataset / "videos2caption.json", stage)
    assert fastvideo.main([*of_new_workflow(stage, tmp_path / "out", tiny_model, workload="t2v"), "--serial"]) == 0
    assert sorted(read_rows(tmp_path / "out")) == ["0.mp4", "1.mp4", "3.mp4", "5.mp4"]


def environment(repo_root: Path, **more: str) -> Mapping[str, str]:
    return {**os.environ, "PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1", **more}


@pytest.mark.slow
def test_a_shipped_script_runs_on_two_ranks_by_changing_its_modules_name_is_killed_and_goes_on(
    dataset: Path, tiny_model: Path, tmp_path: Path, repo_root: Path
) -> None:
    """``v1_preprocess_wan_data_t2v.sh``, with other paths and sizes, and torchrun of this environment."""
    script = tmp_path / "v1_preprocess_wan_data_t2v.sh"
    script.write_text(f"""
GPU_NUM=2
MODEL_PATH="{tiny_model}"
MODEL_TYPE="wan"
DATA_MERGE_PATH="{dataset}/merge.txt"
OUTPUT_DIR="{tmp_path}/out"
VALIDATION_PATH="examples/validation.json"

"{sys.executable}" -m torch.distributed.run --standalone --nproc_per_node=$GPU_NUM \\
    -m streamprep.fastvideo \\
    --model_path $MODEL_PATH \\
    --data_merge_path $DATA_MERGE_PATH \\
    --preprocess_video_batch_size 1 \\
    --max_height 32 \\
    --max_width 48 \\
    --num_frames 5 \\
    --dataloader_num_workers 0 \\
    --output_dir=$OUTPUT_DIR \\
    --model_type $MODEL_TYPE \\
    --train_fps 8 \\
    --validation_dataset_file $VALIDATION_PATH \\
    --samples_per_file 1 \\
    --flush_frequency 1 \\
    --video_length_tolerance_range 5 \\
    --preprocess_task "t2v"
""")

    def run(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", script],
            env=environment(repo_root, CUDA_VISIBLE_DEVICES="", **more),
            capture_output=True,
            text=True,
            timeout=300,
        )

    killed = run(**{VARIABLE: "data.after"})
    assert killed.returncode != 0
    assert not (tmp_path / "out/_streamprep/SUCCESS.json").exists()
    done = run()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4 rows, 4 files"), done.stdout
    assert done.stderr.count("--model_type does nothing here") == 1, "every rank says it"
    assert sorted(read_rows(tmp_path / "out")) == ["0.mp4", "1.mp4", "3.mp4", "5.mp4"]
    assert dropped(tmp_path / "out") == {"2": "too_long", "4": "too_short"}


@pytest.mark.slow
def test_num_gpus_without_torchrun_starts_ranks(
    dataset: Path, tiny_model: Path, tmp_path: Path, repo_root: Path
) -> None:
    command = [*of_new_workflow(dataset, tmp_path / "out", tiny_model, workload="t2v"), "--num_gpus", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "streamprep.fastvideo", *command],
        env=environment(repo_root),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "2 ranks" in done.stderr
    assert done.stdout.startswith("4 rows")


@pytest.mark.usefixtures("one_thread")
def test_from_bucket_to_bucket(
    dataset: Path, tiny_models: Callable[[str], Path], new_bucket: NewBucket, moto_server: Server
) -> None:
    bucket = new_bucket(moto_server)
    store = open_store(bucket)
    for path in dataset.rglob("*"):
        if path.is_file() and path.name != "merge.txt":
            store.put(f"data/{path.relative_to(dataset)}", path.read_bytes(), step="data")
    store.put("data/merge.txt", b"videos,videos2caption.json\n", step="data")
    out = f"{bucket}/out"
    command = of_older(f"{bucket}/data/merge.txt", out, tiny_models("2.1-i2v"), task="i2v")
    assert fastvideo.main([*command, "--serial", "--validation-split", "1"]) == 0
    assert Counter(dropped(out).values()) == {"too_long": 1, "too_short": 1, "validation": 1}
    value: dict[str, Any] = json.loads(open_store(out).read("validation/validation.json"))
    (entry,) = value["data"]
    assert open_store(out).read(f"validation/{entry['image_path']}").startswith(b"\x89PNG")
