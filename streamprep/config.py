"""What every verb can be told. The fields are the command line's flags and the keys of a TOML file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from tyro.conf import Positional, UseAppendAction, arg

from streamprep import checks
from streamprep.errors import UserError
from streamprep.settings import EncodeSettings, LatentSettings, LaunchSettings, PackSettings, RankSettings


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
        checks.at_least(0, num_workers=self.num_workers)


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
        checks.at_least(0, num_workers=self.num_workers)


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
            checks.at_least(0, max_bad_fraction=self.max_bad_fraction)
            checks.at_most(1, max_bad_fraction=self.max_bad_fraction)
        if self.decode_timeout is not None:
            checks.above_zero(decode_timeout=self.decode_timeout)
        if self.decode_memory_mb is not None:
            checks.at_least(1, decode_memory_mb=self.decode_memory_mb)


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(LatentSettings, RankSettings):
    """Write a finished output again by another exporter, without encoding anything again.

    Example: streamprep convert out out_webdataset --exporter webdataset

    OUT stays as it is; NEW is an output like any other. Running the same command again goes on where it was stopped;
    with --nproc, under torchrun, or started by hand in several places, it shares the units among all. The exporter that
    OUT names is loaded and run: convert only outputs you trust.
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
    max_bad_fraction: float | None = None
    """With --contract: stop when more than this share of the rows, and more than 20, are bad; by default 0.05."""
    nproc: str = "1"
    """Processes (ranks) to start."""
    log_dir: str | None = None
    """Folder for a log of every process as JSON lines; by default NEW/_streamprep/logs, or none if NEW is a bucket."""

    def __post_init__(self) -> None:
        RankSettings.__post_init__(self)
        if self.nproc == "auto":
            raise UserError("--nproc auto is one process for each GPU, which convert has no use for: say how many")
        if self.max_bad_fraction is not None:
            if self.contract is None:
                raise UserError("--max-bad-fraction goes with --contract: the rows of a finished output are good")
            checks.at_least(0, max_bad_fraction=self.max_bad_fraction)
            checks.at_most(1, max_bad_fraction=self.max_bad_fraction)
        if self.samples_per_file is not None:
            checks.at_least(1, samples_per_file=self.samples_per_file)


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
