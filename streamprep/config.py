"""What every verb can be told. The fields are the command line's flags and the keys of a TOML file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from tyro.conf import Positional, UseAppendAction, arg

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
        _local_folder(spool_dir=self.spool_dir)


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
        _at_least(1, shard_size_mb=self.shard_size_mb)


@dataclass(frozen=True, kw_only=True)
class PackConfig(PackSettings):
    """Pack raw videos and captions into tar shards.

    Example: streamprep pack my_dataset my_shards

    Running the same command again goes on where it was stopped. The shards depend on the dataset and the options
    alone, not on the number of workers. Every flag may stand in a TOML file given by --config.
    """

    POSITIONAL: ClassVar = ("dataset", "shards")
    dataset: Annotated[Positional[str], arg(metavar="DATASET")]
    """Folder or manifest file with the videos and captions, its URL in a bucket (s3://BUCKET/PREFIX, gs://..., az://...),
    hf://datasets/ORG/NAME, or ORG/NAME with --dataset-type hf."""
    shards: Annotated[Positional[str], arg(metavar="SHARDS")]
    """Folder to write the shards to, or s3://BUCKET/PREFIX, gs://..., az://..., hf://datasets/ORG/NAME/FOLDER."""
    captions_only: bool = False
    """Leave the videos out: the shards are for --workload-type text only."""
    num_workers: int = 0
    """Processes; 0 is one for each core."""

    def __post_init__(self) -> None:
        PackSettings.__post_init__(self)
        _at_least(0, num_workers=self.num_workers)


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Index tar shards of another program (webdataset, video2dataset, cosmos-curate), so that `encode` takes them.

    Example: streamprep index their_tars --to my_shards

    Every byte is read once, no tar is copied or changed. Running the same command again goes on where it was stopped.
    """

    POSITIONAL: ClassVar = ("shards",)
    shards: Annotated[Positional[str], arg(metavar="SHARDS")]
    """Folder with the tars, at any depth, or s3://BUCKET/PREFIX, gs://..., az://..."""
    to: str | None = None
    """Local folder for the index, with links to local tars; by default it is written beside them."""
    caption_column: str | None = None
    """Field of KEY.json with the captions; by default KEY.txt, else cap, caption, captions, text or prompt."""
    prefix_keys: bool = False
    """Put the tar's name before each key, where tars use the same keys."""
    skip_damaged: bool = False
    """Leave out tars that are damaged, naming them in skipped.jsonl, instead of refusing all."""
    num_workers: int = 0
    """Processes; 0 is one for each core."""

    def __post_init__(self) -> None:
        _at_least(0, num_workers=self.num_workers)


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
        _at_least(
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
        _at_least(0, dataloader_num_workers=self.dataloader_num_workers, encode_threads=self.encode_threads)
        _at_least(0, max_bad_fraction=self.max_bad_fraction, training_cfg_rate=self.training_cfg_rate)
        _at_most(1, max_bad_fraction=self.max_bad_fraction, training_cfg_rate=self.training_cfg_rate)
        for name in ("model_path", "where"):
            value = getattr(self, name)
            if value is not None and not value.strip():
                raise UserError(f"--{name.replace('_', '-')} is empty: an unset variable?")
        if not _is_text(self.negative_prompt):
            raise UserError("--negative-prompt is not UTF-8")
        if self.text_dtype not in TEXT_DTYPES:
            why = "UMT5 overflows in float16; " if self.text_dtype == "float16" else ""
            raise UserError(f"--text-dtype {self.text_dtype}: {why}use {', '.join(TEXT_DTYPES)}")
        _at_most(1000, train_fps=self.train_fps)
        _above_zero(train_fps=self.train_fps, speed_factor=self.speed_factor, decode_timeout=self.decode_timeout)
        _at_least(0.1, decode_timeout=self.decode_timeout)
        if self.video_length_tolerance_range is not None:
            _above_zero(video_length_tolerance_range=self.video_length_tolerance_range)
        if self.max_upscale is not None:
            _above_zero(max_upscale=self.max_upscale)
        if self.max_samples is not None:
            _at_least(1, max_samples=self.max_samples)
        if self.window_stride is not None:
            _at_least(1, window_stride=self.window_stride)
        if self.keep_columns is not None:
            parse_names(self.keep_columns)
        if self.validation_split is not None:
            parse_split(self.validation_split)
        _at_least(0, drop_short_ratio=self.drop_short_ratio)
        _at_most(1, drop_short_ratio=self.drop_short_ratio)
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
        _local_folder(cache_dir=self.cache_dir)
        _above_zero(cache_gb=self.cache_gb)


@dataclass(frozen=True, kw_only=True)
class LaunchSettings(StoreSettings, CacheSettings):
    """How many processes a job runs in, and how they go along with each other; nothing of it shows in the output."""

    nproc: str = "1"
    """Processes (ranks) to start: a number, or auto: one for each GPU of this machine (of the cluster, with Ray)."""
    launcher: Literal["local", "ray"] = "local"
    """What starts them: this machine, or Ray; torchrun and Slurm start their own."""
    ray_address: str | None = None
    """Address of the Ray cluster; by default that of the environment, or a new one on this machine."""
    gpus_per_worker: float | None = None
    """GPUs of one Ray worker; by default one, or none with --device cpu."""
    max_restarts: int = 100
    """How often processes that die are started again, in all."""
    grace_seconds: float = 20.0
    """On SIGTERM, finish the unit at hand if that takes no longer, else drop it."""
    stale_seconds: float = 300.0
    """Take a unit again whose process may have died, on another machine, when it has been away for so long, and for
    three times the slowest unit."""
    log_dir: str | None = None
    """Folder for a log of every process as JSON lines; by default OUT/_streamprep/logs, or none if OUT is a bucket."""

    def __post_init__(self) -> None:
        StoreSettings.__post_init__(self)
        CacheSettings.__post_init__(self)
        _local_folder(log_dir=self.log_dir)
        if self.nproc != "auto" and not (self.nproc.isdecimal() and int(self.nproc) >= 1):
            raise UserError(f"--nproc must be a number from 1, or auto, got {self.nproc!r}")
        _at_least(0, max_restarts=self.max_restarts, grace_seconds=self.grace_seconds)
        _above_zero(stale_seconds=self.stale_seconds)
        if self.gpus_per_worker is not None:
            _at_least(0, gpus_per_worker=self.gpus_per_worker)
        if self.launcher != "ray" and (self.ray_address is not None or self.gpus_per_worker is not None):
            raise UserError("--ray-address and --gpus-per-worker go with --launcher ray")


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(EncodeSettings, LaunchSettings):
    """Encode shards of raw videos into latents and text embeddings.

    Example: streamprep encode my_shards out --model-path Wan-AI/Wan2.1-T2V-1.3B-Diffusers --num-frames 77

    Running the same command again goes on where it was stopped; with other settings it is refused, so that one folder
    never mixes two kinds of latents. Every flag may stand in a TOML file given by --config.
    """

    POSITIONAL: ClassVar = ("shards", "out")
    shards: Annotated[Positional[str], arg(metavar="SHARDS")]
    """What `streamprep pack` wrote: a folder, s3://BUCKET/PREFIX, gs://..., az://..., hf://datasets/... or https://...,
    or some of its tars: s3://BUCKET/PREFIX/{000000..000099}.tar"""
    out: Annotated[Positional[str], arg(metavar="OUT")]
    """Folder for the latents, or s3://BUCKET/PREFIX, gs://..., az://..., hf://datasets/ORG/NAME/FOLDER."""

    def __post_init__(self) -> None:
        EncodeSettings.__post_init__(self)
        LaunchSettings.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class PlanConfig(EncodeSettings, LaunchSettings):
    """Say what `encode` would do: what is encoded, what is dropped and why, at which sizes, how large the output is.

    Example: streamprep plan my_shards --model-path Wan-AI/Wan2.1-T2V-1.3B-Diffusers --buckets 480p

    It takes seconds and no GPU: no tar is opened, no weight is loaded or downloaded. It takes all flags of `encode`.
    """

    POSITIONAL: ClassVar = ("shards",)
    shards: Annotated[Positional[str], arg(metavar="SHARDS")]
    """What `streamprep pack` wrote: a folder, s3://BUCKET/PREFIX, gs://..., az://..., hf://datasets/... or https://...,
    or some of its tars: s3://BUCKET/PREFIX/{000000..000099}.tar"""
    out: str | None = None
    """Write every decision to this Parquet file: a path, or a URL in a bucket."""

    def __post_init__(self) -> None:
        EncodeSettings.__post_init__(self)
        LaunchSettings.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class RunConfig(EncodeSettings, PackSettings, LaunchSettings):
    """Pack a dataset and encode it.

    Example: streamprep run my_dataset out --model-path Wan-AI/Wan2.1-T2V-1.3B-Diffusers --num-frames 77

    Running the same command again goes on where it was stopped. Every flag may stand in a TOML file given by --config.
    """

    POSITIONAL: ClassVar = ("dataset", "out")
    dataset: Annotated[Positional[str], arg(metavar="DATASET")]
    """Folder or manifest file with the videos and captions, its URL in a bucket (s3://BUCKET/PREFIX, gs://..., az://...),
    hf://datasets/ORG/NAME, or ORG/NAME with --dataset-type hf."""
    out: Annotated[Positional[str], arg(metavar="OUT")]
    """Folder for the latents, or s3://BUCKET/PREFIX, gs://..., az://..., hf://datasets/ORG/NAME/FOLDER."""
    shards: str | None = None
    """Folder for the shards; by default OUT/_streamprep/shards."""

    def __post_init__(self) -> None:
        PackSettings.__post_init__(self)
        EncodeSettings.__post_init__(self)
        LaunchSettings.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class RetryConfig(LaunchSettings):
    """Encode the bad samples of a job again: after a larger limit, or once a shard is repaired.

    Example: streamprep retry out --reason decoder_timeout --decode-timeout 600

    Everything that decides the latents is as the job has it. What is encoded now is a row and no longer bad; what fails
    again stays bad. Running the same command again goes on where it was stopped.
    """

    POSITIONAL: ClassVar = ("out",)
    out: Annotated[Positional[str], arg(metavar="OUT")]
    """Output of `streamprep encode`: a folder or a URL."""
    reason: Annotated[tuple[str, ...], UseAppendAction] = ()
    """Only samples that are bad for this reason; may be given several times. By default for any."""
    failed: bool = False
    """Encode again the units that were set aside because every process that tried them has died."""
    decode_timeout: float | None = None
    """Seconds one clip may take to decode; by default as for the job, and so all that follow."""
    decode_memory_mb: int | None = None
    """MiB a decoding process may take beyond what it starts with."""
    dataloader_num_workers: Annotated[int | None, arg(aliases=("--num-workers",))] = None
    """Decoding processes; 0 chooses by the number of cores."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; of the kind that the job runs on."""
    max_bad_fraction: float | None = None
    """If the job was stopped for its bad samples: the share of them with which it may go on."""
    model_path: str | None = None
    """Where the same model is now, if it was moved."""
    shards: str | None = None
    """Where the same shards are now, if they were moved."""
    serial: bool = False
    """Decode, encode and write one after the other in this process; for debugging."""

    def __post_init__(self) -> None:
        LaunchSettings.__post_init__(self)
        if self.failed and self.reason:
            raise UserError("--failed is about whole units, --reason about bad samples: one at a time")
        if self.max_bad_fraction is not None:
            _at_least(0, max_bad_fraction=self.max_bad_fraction)
            _at_most(1, max_bad_fraction=self.max_bad_fraction)
        if self.decode_timeout is not None:
            _above_zero(decode_timeout=self.decode_timeout)
        if self.decode_memory_mb is not None:
            _at_least(1, decode_memory_mb=self.decode_memory_mb)


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(LatentSettings, StoreSettings):
    """Write a finished output again by another exporter, without encoding anything again.

    Example: streamprep convert out out_webdataset --exporter webdataset

    OUT stays as it is; NEW is an output like any other. Running the same command again goes on where it was stopped;
    started under torchrun, or by hand in several places, it shares the units among all. The exporter that OUT names is
    loaded and run: convert only outputs you trust.
    """

    POSITIONAL: ClassVar = ("source", "out")
    source: Annotated[Positional[str], arg(metavar="OUT")]
    """Finished output of `streamprep encode` or `convert`, or with --contract FastVideo's own Parquet: a folder or a
    URL."""
    out: Annotated[Positional[str], arg(metavar="NEW")]
    """Where to write: a folder or a URL."""
    exporter: str
    """Output format to write."""
    contract: str | None = None
    """TOML file that says what latents are which FastVideo's own scripts wrote: model_path, train_fps, and where they
    differ workload (t2v), space (raw) and text (trimmed)."""
    samples_per_file: int | None = None
    """Most rows in a file; by default as OUT has it."""
    posterior: Literal["mean"] | None = None
    """Keep the mean only, where OUT holds mean and log variance."""
    stale_seconds: float = 300.0
    """Take a unit again whose process may have died, on another machine, when it has been away for so long, and for
    three times the slowest unit."""
    log_dir: str | None = None
    """Folder for a log of every process as JSON lines; by default NEW/_streamprep/logs, or none if NEW is a bucket."""

    def __post_init__(self) -> None:
        StoreSettings.__post_init__(self)
        _local_folder(log_dir=self.log_dir)
        _above_zero(stale_seconds=self.stale_seconds)
        if self.samples_per_file is not None:
            _at_least(1, samples_per_file=self.samples_per_file)


@dataclass(frozen=True, kw_only=True)
class StatusConfig:
    """Say how far a job is, and exit as the job would: 0 done, 3 too many bad samples, 4 resumable.

    Example: streamprep status out
    """

    POSITIONAL: ClassVar = ("out",)
    out: Annotated[Positional[str], arg(metavar="OUT")]
    """Output of `streamprep encode`: a folder or a URL."""
    contract: bool = False
    """Show the latent contract instead: what the tensors are, of which model, layer, normalisation, padding."""
    spool_dir: str | None = None
    """Where the command that writes OUT was told to keep what is not on the Hugging Face hub yet."""


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Check every file against its digest and every row against the plan; exits 1 if anything is wrong.

    Example: streamprep verify out
    """

    POSITIONAL: ClassVar = ("out",)
    out: Annotated[Positional[str], arg(metavar="OUT")]
    """Output of `streamprep encode`, or shards of `streamprep pack`."""
    spool_dir: str | None = None
    """Where a copy of one file of a bucket at a time may lie, by default where temporary files go; and where the
    command that writes OUT was told to keep what is not on the Hugging Face hub yet."""


@dataclass(frozen=True, kw_only=True)
class FinalizeConfig:
    """Finish a job whose units are all encoded: delete what no record names, write index and SUCCESS.json.

    Example: streamprep finalize out

    `encode` does this by itself at its end.
    """

    POSITIONAL: ClassVar = ("out",)
    out: Annotated[Positional[str], arg(metavar="OUT")]
    """Output of `streamprep encode`: a folder or a URL."""
    spool_dir: str | None = None
    """Where the command that writes OUT was told to keep what is not on the Hugging Face hub yet."""


def _local_folder(**fields: str | None) -> None:
    for name, value in fields.items():
        if value is not None and "://" in value:
            raise UserError(f"--{name.replace('_', '-')} must be a local folder, got {value}")


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _at_least(limit: float, **fields: float) -> None:
    for name, value in fields.items():
        if not value >= limit:  # NaN is not
            raise UserError(f"--{name.replace('_', '-')} must be at least {limit}, got {value}")


def _at_most(limit: float, **fields: float) -> None:
    for name, value in fields.items():
        if not value <= limit:
            raise UserError(f"--{name.replace('_', '-')} must be at most {limit}, got {value}")


def _above_zero(**fields: float) -> None:
    for name, value in fields.items():
        if not 0 < value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} must be above 0, got {value}")
