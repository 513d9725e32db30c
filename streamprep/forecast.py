"""What a job would do: every decision of the plan, added up. Only indexes and configs are read: no tar, no weights."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamprep import plugins
from streamprep.buckets import Bucket, cropped_away, upscaling
from streamprep.columns import ColumnTypes
from streamprep.contract import LatentContract
from streamprep.errors import UserError
from streamprep.exporting import DEFAULT_DTYPE, DTYPE_BYTES, open_exporter, rows_share
from streamprep.filters import Filters
from streamprep.manifest import Shards
from streamprep.plan import ClipPlan, TextPlan, UnitPlan, explain, is_drop
from streamprep.prepare import column_problem, open_filters, plan_shards, rules_of
from streamprep.progress import count, size
from streamprep.settings import EncodeSettings
from streamprep.shards import ShardSample
from streamprep.storage import is_remote, open_store

if TYPE_CHECKING:
    import pyarrow as pa

_BYTES_PER_TOKEN = 4  # of English captions, roughly


@dataclass
class BucketForecast:
    """Clips of one size, added up."""

    num_clips: int = 0
    num_rows: int = 0
    num_images: int = 0
    """Among the clips."""
    num_enlarged: int = 0
    cropped: float = 0.0
    """Shares of pixels that the crop leaves out, of all clips together."""
    repeated: int = 0
    """Frames that are the frame before again, because the source is slower than the training rate."""
    num_frames: int = 0


@dataclass
class Forecast:
    """A job, added up."""

    buckets: dict[Bucket, BucketForecast] = field(default_factory=dict)
    num_samples: int = 0
    num_rows: int = 0
    caption_bytes: int = 0
    excluded: Counter[str] = field(default_factory=Counter)
    windows: Counter[int] = field(default_factory=Counter)
    """How many videos give how many clips."""
    columns: dict[str, str] = field(default_factory=dict)
    """The further columns that are kept, and their types."""
    decisions: list[dict[str, Any]] | None = None
    """One for each row of the output and each sample or caption that is left out, if they are asked for."""


def forecast(shards: Shards, config: EncodeSettings, contract: LatentContract, *, with_decisions: bool) -> Forecast:
    """Plan a job.

    Args:
        shards: The input.
        config: The settings.
        contract: Of the model.
        with_decisions: Whether to keep every decision, which takes 1 kB a sample.

    Raises:
        UserError: if the settings, model or shards cannot be used.
    """
    result = Forecast(decisions=[] if with_decisions else None)
    rules, columns = rules_of(config, contract), ColumnTypes(config.keep_columns)
    filters = open_filters(shards, rules)
    for shard in plan_shards(shards, rules, filters, config.max_samples):
        _add(result, shard.plan, {sample.key: sample for sample in shard.index.samples})
        columns.see(shard.index.samples)
    result.columns = columns.types(problem=column_problem(config))
    return result


def describe(result: Forecast, config: EncodeSettings, contract: LatentContract) -> Iterator[str]:
    """Lines for a person."""
    what = "clip" if contract.video else "sample"
    yield f"model     {contract.family} {contract.variant} {contract.model}, --workload-type {contract.workload}"
    yield f"encoded   {count(result.num_samples, what)} in {count(result.num_rows, 'row')}"
    if result.buckets:
        yield "sizes     height x width x frames: clips, enlarged, pixels lost by the crop, frames repeated by the rate"
    for bucket, entry in sorted(result.buckets.items()):
        yield (
            f"  {bucket!s:16} {count(entry.num_clips, 'clip')}, {entry.num_enlarged} enlarged, "
            f"{entry.cropped / entry.num_clips:.1%} lost, {entry.repeated / entry.num_frames:.1%} repeated"
            + (f"; {count(entry.num_images, 'image')} among them" if entry.num_images else "")
        )
    if set(result.windows) - {1}:
        parts = (
            f"{count(clips, 'clip')} of {count(videos, 'video')}" for clips, videos in sorted(result.windows.items())
        )
        yield f"windows   {', '.join(parts)} each"
    for reason, number in result.excluded.most_common():
        yield f"{'dropped' if is_drop(reason) else 'bad':9} {number} {reason}: {explain(reason)}"
    if result.columns:
        yield f"columns   {', '.join(f'{name} ({kind})' for name, kind in result.columns.items())}"
    if names := Filters(config.filters).frame_filters:
        yield f"filters   {', '.join(names)}: decided by the frames, while encoding, which may leave fewer rows"
    yield from _sizes(result, contract)


def table(result: Forecast) -> pa.Table:
    """Every decision: ``encode``, ``drop`` or ``bad``, with the reason, and of clips the size, frames and source."""
    import pyarrow as pa

    schema = pa.schema(
        [
            *((name, pa.string()) for name in ("key", "id", "shard", "decision", "reason", "message", "caption")),
            ("media_type", pa.string()),
            *((name, pa.int32()) for name in ("height", "width", "num_frames", "source_height", "source_width")),
            *((name, pa.float64()) for name in ("source_fps", "begin_seconds", "end_seconds", "cropped", "upscaling")),
            ("repeated_frames", pa.int32()),
        ]
    )
    return pa.Table.from_pylist(result.decisions or [], schema)


def write_table(result: Forecast, path: str) -> None:
    """Write `table` as Parquet.

    Args:
        result: With its decisions.
        path: Of a local file, or the URL of one in a bucket.

    Raises:
        UserError: if the file cannot be written.
    """
    import pyarrow.parquet as pq

    if not path.endswith(".parquet"):
        raise UserError(f"--out {path}: it is a Parquet file: call it *.parquet")
    if is_remote(path):
        sink = io.BytesIO()
        pq.write_table(table(result), sink, compression="zstd")
        folder, _, name = path.rpartition("/")
        open_store(folder).put(name, sink.getvalue(), step="data")
        return
    if not Path(path).absolute().parent.is_dir():
        raise UserError(f"--out {path}: there is no such folder")
    try:
        pq.write_table(table(result), path, compression="zstd")
    except OSError as error:
        raise UserError(f"--out {path}: {error}") from error


def _add(result: Forecast, unit: UnitPlan, samples: dict[str, ShardSample]) -> None:
    result.num_samples += len(unit.samples)
    result.excluded.update(item.reason for item in unit.dropped + unit.bad)
    result.windows.update(Counter(clip.key.partition("#")[0] for clip in unit.clips).values())
    for sample in unit.samples:
        result.num_rows += len(sample.rows)
        result.caption_bytes += sum(len(row.prompt.encode()) for row in sample.rows)
        facts: dict[str, Any] = {}
        if isinstance(sample, ClipPlan):
            facts = _add_clip(result, sample, samples[sample.key.partition("#")[0]])
        _note(result, unit, sample, facts)
    if result.decisions is not None:
        for decision, items in (("drop", unit.dropped), ("bad", unit.bad)):
            result.decisions += [
                {
                    "key": item.key,
                    "shard": unit.shard,
                    "decision": decision,
                    "reason": item.reason,
                    "message": item.message,
                }
                for item in items
            ]


def _add_clip(result: Forecast, clip: ClipPlan, sample: ShardSample) -> dict[str, Any]:
    height, width = sample.metadata["height"], sample.metadata["width"]
    bucket, request = clip.bucket, clip.request
    cropped = cropped_away(bucket, height=height, width=width)
    factor = upscaling(bucket, height=height, width=width)
    repeated = len(request.indices) - len(set(request.indices)) if request.indices is not None else 0
    entry = result.buckets.setdefault(bucket, BucketForecast())
    entry.num_clips += 1
    entry.num_rows += len(clip.rows)
    entry.num_images += clip.media_type == "image"
    entry.num_enlarged += factor > 1
    entry.cropped += cropped
    entry.repeated += repeated
    entry.num_frames += bucket.num_frames
    return {
        "media_type": clip.media_type,
        "height": bucket.height,
        "width": bucket.width,
        "num_frames": bucket.num_frames,
        "source_height": height,
        "source_width": width,
        "source_fps": clip.source_fps,
        "begin_seconds": request.timestamps[0],
        "end_seconds": request.timestamps[-1],
        "cropped": cropped,
        "upscaling": factor,
        "repeated_frames": repeated,
    }


def _note(result: Forecast, unit: UnitPlan, sample: TextPlan, facts: dict[str, Any]) -> None:
    if result.decisions is None:
        return
    for row in sample.rows:
        named = {"key": row.key, "id": row.id, "shard": unit.shard, "decision": "encode", "caption": row.caption}
        result.decisions.append(named | facts)


def _sizes(result: Forecast, contract: LatentContract) -> Iterator[str]:
    """What each exporter's output takes."""
    tokens = result.caption_bytes // _BYTES_PER_TOKEN + 2 * result.num_rows
    most = result.num_rows * contract.text.max_length
    for name in plugins.names("streamprep.exporters"):
        exporter = open_exporter(name)
        if contract.workload not in exporter.WORKLOADS:
            continue
        for dtype in exporter.OPTIONS.get("latent_dtype", (DEFAULT_DTYPE,)):
            width = DTYPE_BYTES[dtype]
            fixed = sum(
                (entry.num_clips if rows_share(exporter) else entry.num_rows)
                * contract.row_bytes(num_frames=b.num_frames, height=b.height, width=b.width, value_bytes=width)
                for b, entry in result.buckets.items()
            )
            text, limit = (n * width * contract.text.dim for n in (tokens, most))
            latents = f"{size(fixed)} and " if contract.video else ""
            yield (
                f"size      {name}, {dtype}: {latents}about {size(min(text, limit))} of text embeddings (they are as "
                f"long as their captions; at most {size(limit)})"
            )
