"""What several verbs can be told, by subject; `config.py` puts the verbs together from these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from streamprep import checks
from streamprep.columns import parse_names
from streamprep.errors import UserError
from streamprep.held_out import parse_split

TEXT_DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class StoreSettings:
    """How to write to a bucket; nothing of it shows in the output."""

    spool_dir: str | None = None
    """Local folder where files for a bucket are built before they are uploaded, and large videos from one are kept
    while they are packed, by default that of temporary files; or where those for the Hugging Face hub lie until all is
    done, by default ~/.cache/streamprep (XDG_CACHE_HOME)."""
    only_writer: bool = False
    """Write to a bucket that cannot create files only if they are absent: you promise that no other process does."""

    def __post_init__(self) -> None:
        checks.local_folder(spool_dir=self.spool_dir)


@dataclass(frozen=True, kw_only=True)
class PackSettings(StoreSettings):
    """How to read and pack a dataset; shared by `pack` and `run`."""

    dataset_type: str = "auto"
    """Layout: merged (videos/ + videos2caption.json), raw (videos.txt + prompt.txt), manifest (JSONL, JSON, CSV, TSV or
    Parquet), folder (each video with a .txt or .json beside it), webdataset (tars), hf (a dataset of the Hugging Face
    hub), or auto."""
    video_column: str | None = None
    """Column of a manifest or hf dataset with the videos; by default video, path, file_name, video_path, ..."""
    caption_column: str | None = None
    """Column with the captions; by default cap, caption, captions, text or prompt."""
    split: str | None = None
    """Split of an hf dataset; by default train."""
    annotations: str | None = None
    """JSON file of a merged dataset whose videos are elsewhere, in DATASET; by default DATASET/videos2caption.json."""
    shard_size_mb: int = 256
    """Most MiB of video in a shard."""
    shuffle: int | None = None
    """Seed to shuffle the videos by before they are cut into shards; by default they are sorted."""

    def __post_init__(self) -> None:
        StoreSettings.__post_init__(self)
        checks.at_least(1, shard_size_mb=self.shard_size_mb)


@dataclass(frozen=True, kw_only=True)
class LatentSettings:
    """How the exporter stores tensors; what it can do, it says itself, its default first."""

    latent_dtype: str | None = None
    """What tensors are stored as: bfloat16, float16 or float32, as the exporter can; by default as it prefers."""
    latent_format: str | None = None
    """Exporter webdataset: safetensors (default) or npy, which has no bfloat16."""
    latent_compression: str | None = None
    """Exporter webdataset: none (default) or zstd, for cold storage: smaller and much slower to write and read."""


@dataclass(frozen=True, kw_only=True)
class EncodeSettings(LatentSettings):
    """How to encode; shared by `encode` and `run`."""

    model_path: str
    """Diffusers model: a local folder or a hub id."""
    workload_type: Literal["t2v", "i2v", "text"] = "t2v"
    """What the output is to train: t2v (text to video), i2v (image to video), text (captions only)."""
    max_height: Annotated[int, arg(aliases=("--height",))] = 480
    """Height of the encoded frames in pixels, exactly."""
    max_width: Annotated[int, arg(aliases=("--width",))] = 832
    """Width of the encoded frames in pixels, exactly."""
    num_frames: int = 77
    """Frames in a clip; the model family has a rule for them (Wan: 4k+1)."""
    train_fps: Annotated[float, arg(aliases=("--fps",))] = 16.0
    """Rate to sample frames at, per second."""
    video_length_tolerance_range: float | None = None
    """Drop videos longer than this many times num_frames / train_fps x speed_factor seconds; by default none."""
    speed_factor: float = 1.0
    """See video_length_tolerance_range."""
    window: Literal["first", "middle", "random", "uniform", "every"] = "first"
    """Where in a video clips are taken: at its beginning, in its middle, at one place drawn by --seed and key, at
    --num-windows places from beginning to end, or every --window-stride frames."""
    num_windows: int = 1
    """Clips of a video with --window uniform."""
    window_stride: int | None = None
    """Frames (at the training rate) from one clip to the next with --window every; by default the length of a clip."""
    do_temporal_sample: bool = False
    """FastVideo's name for --window random."""
    drop_short_ratio: float = 1.0
    """Drop this share of the videos with too few frames, drawn by --seed and key; the others give shorter clips."""
    buckets: str | None = None
    """Sizes to choose from instead of the one: a list of HEIGHTxWIDTH, HEIGHTxWIDTHxFRAMES, 480p, 720p, or auto (common
    aspect ratios at the area of --max-height x --max-width). A video goes to the nearest in aspect ratio, then in area,
    and to the longest clip it has frames for."""
    max_upscale: float | None = None
    """Drop videos that would be enlarged more than so many times; by default none."""
    where: str | None = None
    """Encode only samples of which this SQL expression is true, such as "aesthetic > 5 and duration < 20"."""
    filters: tuple[str, ...] = ()
    """Leave out what these filters exclude, one after the other: duration:2..10, size:256.., fps:10.., aspect:0.5..2,
    black, static, duplicate-video, duplicate-caption, or MODULE:FUNCTION:ARGUMENT."""
    max_samples: int | None = None
    """Encode only the first so many."""
    caption: Literal["first", "random", "all"] = "first"
    """Which of a video's captions: the first, one at random (by --seed and key), or all, a row for each."""
    training_cfg_rate: float = 0.0
    """Encode the empty prompt instead of the caption for this share of the rows. Dropping captions while training is
    better: then it's others in every epoch."""
    clean_captions: bool = True
    """Clean captions as the model's pipeline does (ftfy, HTML entities, white space). FastVideo does not."""
    validation_split: str | None = None
    """Hold so many videos, or this share of them (0.01), out of the output, drawn by --seed and key, and write them as
    FastVideo's validation.json, with their first frames for i2v, to OUT/validation."""
    negative_prompt: str = ""
    """Also encode this prompt, beside the empty one, for guidance."""
    keep_columns: str | None = None
    """Further columns of the dataset to put into the output: names separated by commas, or all."""
    exporter: str = "fastvideo"
    """Output format."""
    samples_per_file: int = 64
    """Most rows in an output file."""
    preprocess_video_batch_size: Annotated[int, arg(aliases=("--batch-size",))] = 2
    """Clips the VAE encodes at once."""
    text_batch_size: int = 8
    """Captions the text encoder encodes at once."""
    posterior: Literal["mean", "moments"] = "mean"
    """What to keep of the VAE's posterior: mean, or moments (mean and log variance) if the exporter can hold them."""
    vae_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the VAE computes in; anything but float32 moves the latents (see benchmarks/precision.py)."""
    text_dtype: str = "auto"
    """What UMT5 computes in: float32, bfloat16, or auto: bfloat16 on a GPU and float32 on a CPU."""
    allow_tf32: bool = False
    """Let the GPU round float32 multiplications to TF32: faster, and the latents move."""
    offload_text_encoder: bool = False
    """Keep the text encoder in main memory, and on the GPU only while a shard's captions are encoded."""
    video_loader_type: Literal["torchcodec", "pyav"] = "torchcodec"
    """Video decoder: torchcodec gives FastVideo's pixels bit for bit, pyav nearly the same ones for less work."""
    dataloader_num_workers: Annotated[int, arg(aliases=("--num-workers",))] = 0
    """Decoding processes; 0 chooses by the number of cores."""
    decode_timeout: float = 120.0
    """Seconds one clip may take to decode, before its process is killed."""
    decode_memory_mb: int = 4096
    """MiB a decoding process may take beyond what it starts with."""
    max_pixels: int = 8192 * 8192
    """Larger source frames are refused."""
    max_bad_fraction: float = 0.05
    """Stop when more than this share of the samples, and more than 20, are bad: then the settings are wrong."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one."""
    encode_threads: int = 0
    """Threads of the encoder on the CPU; 0 is one for each core, or what the job began with."""
    seed: int = 42
    """Of whatever is drawn: --caption random, --window random, --training-cfg-rate, --drop-short-ratio."""
    full_digest: bool = False
    """Tell models apart by all bytes of their weights instead of the ends of every tensor."""
    serial: bool = False
    """Decode, encode and write one after the other in this process; for debugging, the output is the same."""

    def __post_init__(self) -> None:
        checks.at_least(
            1,
            max_height=self.max_height,
            max_width=self.max_width,
            num_frames=self.num_frames,
            samples_per_file=self.samples_per_file,
            preprocess_video_batch_size=self.preprocess_video_batch_size,
            text_batch_size=self.text_batch_size,
            num_windows=self.num_windows,
            max_pixels=self.max_pixels,
            decode_memory_mb=self.decode_memory_mb,
        )
        checks.at_least(0, dataloader_num_workers=self.dataloader_num_workers, encode_threads=self.encode_threads)
        checks.at_least(0, max_bad_fraction=self.max_bad_fraction, training_cfg_rate=self.training_cfg_rate)
        checks.at_most(1, max_bad_fraction=self.max_bad_fraction, training_cfg_rate=self.training_cfg_rate)
        for name in ("model_path", "where"):
            value = getattr(self, name)
            if value is not None and not value.strip():
                raise UserError(f"--{name.replace('_', '-')} is empty: an unset variable?")
        if not checks.is_text(self.negative_prompt):
            raise UserError("--negative-prompt is not UTF-8")
        if self.text_dtype not in TEXT_DTYPES:
            why = "UMT5 overflows in float16; " if self.text_dtype == "float16" else ""
            raise UserError(f"--text-dtype {self.text_dtype}: {why}use {', '.join(TEXT_DTYPES)}")
        checks.at_most(1000, train_fps=self.train_fps)
        checks.above_zero(train_fps=self.train_fps, speed_factor=self.speed_factor, decode_timeout=self.decode_timeout)
        checks.at_least(0.1, decode_timeout=self.decode_timeout)
        if self.video_length_tolerance_range is not None:
            checks.above_zero(video_length_tolerance_range=self.video_length_tolerance_range)
        if self.max_upscale is not None:
            checks.above_zero(max_upscale=self.max_upscale)
        if self.max_samples is not None:
            checks.at_least(1, max_samples=self.max_samples)
        if self.window_stride is not None:
            checks.at_least(1, window_stride=self.window_stride)
        if self.keep_columns is not None:
            parse_names(self.keep_columns)
        if self.validation_split is not None:
            parse_split(self.validation_split)
        checks.at_least(0, drop_short_ratio=self.drop_short_ratio)
        checks.at_most(1, drop_short_ratio=self.drop_short_ratio)
        self._check_windows()

    def _check_windows(self) -> None:
        if self.do_temporal_sample and self.window not in ("first", "random"):
            raise UserError(f"--do-temporal-sample is --window random, and --window {self.window} is given")
        if self.num_windows != 1 and self.window != "uniform":
            raise UserError("--num-windows goes with --window uniform")
        if self.window_stride is not None and self.window != "every":
            raise UserError("--window-stride goes with --window every")


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """Where to keep what was read; nothing of it shows in the output."""

    cache_dir: str | None = None
    """Local folder to keep the encoded videos that were read, for further jobs, ranks or passes over the same ones."""
    cache_gb: float = 100.0
    """Most to keep in --cache-dir, in GB; what was used longest ago goes first."""

    def __post_init__(self) -> None:
        checks.local_folder(cache_dir=self.cache_dir)
        checks.above_zero(cache_gb=self.cache_gb)


@dataclass(frozen=True, kw_only=True)
class RankSettings(StoreSettings):
    """The processes of a command, and how they go along with each other; nothing of it shows in the output."""

    nproc: str = "1"
    """Processes (ranks) to start: a number, or auto: one for each GPU of this machine (of the cluster, with Ray)."""
    max_restarts: int = 100
    """How often processes that die are started again, in all, but for those whose bucket does not answer."""
    grace_seconds: float = 20.0
    """On SIGTERM, finish the unit at hand if that takes no longer, else drop it."""
    stale_seconds: float = 300.0
    """Take a unit again whose process may have died, on another machine, when it has been away for so long, and for
    three times the slowest unit."""
    log_dir: str | None = None
    """Folder for a log of every process as JSON lines; by default OUT/_streamprep/logs, or none if OUT is a bucket."""

    def __post_init__(self) -> None:
        StoreSettings.__post_init__(self)
        checks.local_folder(log_dir=self.log_dir)
        if self.nproc != "auto" and not (self.nproc.isdecimal() and int(self.nproc) >= 1):
            raise UserError(f"--nproc must be a number from 1, or auto, got {self.nproc!r}")
        checks.at_least(0, max_restarts=self.max_restarts, grace_seconds=self.grace_seconds)
        checks.above_zero(stale_seconds=self.stale_seconds)


@dataclass(frozen=True, kw_only=True)
class LaunchSettings(RankSettings, CacheSettings):
    """Where the processes of a job run; nothing of it shows in the output."""

    launcher: Literal["local", "ray"] = "local"
    """What starts them: this machine, or Ray; torchrun and Slurm start their own."""
    ray_address: str | None = None
    """Address of the Ray cluster; by default that of the environment, or a new one on this machine."""
    gpus_per_worker: float | None = None
    """GPUs of one Ray worker; by default one, or none with --device cpu."""

    def __post_init__(self) -> None:
        RankSettings.__post_init__(self)
        CacheSettings.__post_init__(self)
        if self.gpus_per_worker is not None:
            checks.at_least(0, gpus_per_worker=self.gpus_per_worker)
        if self.launcher != "ray" and (self.ray_address is not None or self.gpus_per_worker is not None):
            raise UserError("--ray-address and --gpus-per-worker go with --launcher ray")
