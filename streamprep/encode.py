"""Shards -> latents: the loop of one process.

1. Plan: from the shards' indexes and the model's configs alone, or join the job that is there.
2. Load the model, and see whether it computes what it should (`streamprep.selfcheck`); only then write ``plan.json``.
3. Take the units that have no record. Read and decode ahead (child processes), collate into the planned batches,
   encode, write; each in its own thread, joined by short queues, so that the encoder never waits for the others.
4. When a unit's files are visible, create its record: the commit.
5. When all units have one, finalize.

A batch keeps its planned size when a member turns out to be bad, or is dropped for its frames (`streamprep.filters`):
the hole is filled with another member and the result thrown away. So a clip's latents do not depend on the health of
its neighbours, nor on whether it is encoded in a retry.

Where only captions are encoded nothing is read or decoded; the rest is the same.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from streamprep import canonical, job
from streamprep.claims import claim
from streamprep.columns import keep
from streamprep.commit import Committer, EncodedBatch, obey_earlier_stop
from streamprep.config import EncodeConfig, EncodeSettings
from streamprep.contract import LatentContract
from streamprep.decode_pool import DecodePool
from streamprep.decoder import Decoder, InlineDecoder
from streamprep.encoders import EncodeOptions, Encoder, open_encoder
from streamprep.errors import BadSample, UserError
from streamprep.filters import Filters
from streamprep.finalize import Totals, finalize, is_finalized, leftovers, totals
from streamprep.job import Job, JobPlan, Unit
from streamprep.manifest import load_manifest
from streamprep.pipeline import Pipeline
from streamprep.plan import ClipPlan, Excluded, RowPlan, SamplingRules, TextPlan, UnitPlan
from streamprep.prepare import fingerprint, load_exporter, open_filters, plan_job, replan, rules_of
from streamprep.progress import Progress, count, size
from streamprep.record import BadClip
from streamprep.selfcheck import check_encoder, check_first_frame
from streamprep.storage import Store, open_store
from streamprep.stream import decode_units
from streamprep.types import ClipBatch, EncodedClip, EncodedSample, ShardWriter

_SHAPES_KEPT = 2
_TEXTS_AT_ONCE = 256  # sorted by length together; with 512 tokens each, 2 GB in float32


@dataclass(frozen=True, kw_only=True)
class DecodedBatch:
    """Samples of one planned batch, ready to be encoded."""

    unit: UnitPlan
    samples: Sequence[TextPlan]
    prompts: Sequence[str]
    """Distinct ones to embed first; for clips all of the unit's, with its first batch."""
    frames: ClipBatch | None = None
    """Of the planned batch, holes filled; None if every clip is bad, or there are no clips."""
    places: Sequence[int] = ()
    """Of the samples in ``frames``."""
    bad: Mapping[str, BadSample] = dataclasses.field(default_factory=dict)
    """By the sample's key."""
    dropped: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    """By the sample's key, of those that filters leave out for their frames: (reason, message)."""
    decoders: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """How many of its clips each decoder gave."""

    @property
    def last(self) -> bool:
        """Whether it is the unit's last."""
        return self.samples[-1] is self.unit.samples[-1]


@dataclass(frozen=True, kw_only=True)
class Machinery:
    """What encoding needs, started and checked."""

    pipeline: Pipeline
    decoder: Decoder
    encoder: Encoder


def encode(config: EncodeConfig) -> Totals:
    """Encode shards, or finish what an earlier call began.

    Raises:
        UserError: before anything is written, if the settings, model or shards cannot be used.
        TooManyBadSamples: if so many samples are bad that the settings must be wrong.
        LatentMismatch: if what is encoded contradicts itself.
    """
    shards, out = open_store(config.shards), open_store(config.out)
    if shards.root == out.root:
        raise UserError(f"{config.out} is the folder of the shards: encode into another one")
    config = settle(config, out)
    load_exporter(config)
    rules_of(config, describe_model(config))  # sizes that don't fit are refused before weights are downloaded
    encoder = open_encoder(config.model_path, _options(config))
    current, num_encoded = run(config, shards, out, encoder)
    if not num_encoded and is_finalized(current) and not leftovers(current):
        return totals(current)
    return finalize(current)


def encode_again(config: EncodeConfig, current: Job, units: Sequence[Unit], *, title: str) -> None:
    """Encode units of a retry.

    Args:
        config: The job's, where it matters.
        current: The job.
        units: At least one.
        title: Said first.

    Raises:
        UserError: before anything is written, if model or shards are not those of the job.
    """
    shards = open_store(config.shards)
    config = settle(config, current.store)
    encoder = open_encoder(config.model_path, _options(config))
    manifest, rules = load_manifest(shards), rules_of(config, encoder.contract)
    job.check_same(current.store, current.plan.fingerprint, fingerprint(config, encoder.contract, manifest))
    filters = open_filters(shards, manifest, rules)
    num_clips = sum(unit.num_clips for unit in units)
    progress = Progress(total=num_clips, unit="clips" if encoder.contract.video else "samples", verb="encoding")
    progress.message(title)
    _warn_of_other_versions(current.plan, progress, needed=True)
    with _start_machinery(config, rules, encoder) as machinery:
        current.store.remove_unpublished()
        with Committer(current, open_writer=_writer_opener(current, config), max_bad_fraction=None) as committer:
            plans = (replan(shards, unit, rules, filters) for unit in claim(current, units))
            _encode_units(plans, units, filters, committer, progress, config, shards, machinery)


def describe_model(config: EncodeSettings) -> LatentContract:
    """The contract but for its digests, from the model's configs alone.

    Raises:
        UserError: if the model is not known, or not one for the workload.
    """
    text_dtype = "float32" if config.text_dtype == "auto" else config.text_dtype
    settled = dataclasses.replace(config, device="cpu", text_dtype=text_dtype)
    return open_encoder(config.model_path, dataclasses.replace(_options(settled), digest="none")).contract


def settle(config: EncodeConfig, out: Store) -> EncodeConfig:
    """Put what this machine decides in the place of ``auto`` and 0, and tell torch."""
    device = _device(config.device)
    is_gpu = device.type == "cuda"
    threads = _encode_threads(config, out)
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    text_dtype = {"auto": "bfloat16" if is_gpu else "float32"}.get(config.text_dtype, config.text_dtype)
    return dataclasses.replace(
        config,
        device=str(device),
        encode_threads=threads,
        text_dtype=text_dtype,
        allow_tf32=config.allow_tf32 and is_gpu,
    )


def run(config: EncodeConfig, shards: Store, out: Store, encoder: Encoder) -> tuple[Job, int]:
    """Encode the units that have no record.

    Args:
        config: Settled.
        shards: The input.
        out: The output.
        encoder: Not loaded yet; only if there is anything to encode, it will be.

    Returns:
        The job, and how many units were missing.

    Raises:
        UserError: before anything is written.
        TooManyBadSamples: if so many samples are bad that the settings must be wrong.
        LatentMismatch: if what is encoded contradicts itself.
    """
    rules = rules_of(config, encoder.contract)
    manifest = load_manifest(shards)
    begun = job.find_job(out, fingerprint(config, encoder.contract, manifest))
    filters = open_filters(shards, manifest, rules)
    plan = begun.plan if begun else plan_job(config, shards, out, encoder.contract, filters)
    units = begun.unfinished() if begun else list(plan.units)
    progress = Progress(total=plan.num_clips, unit="clips" if encoder.contract.video else "samples", verb="encoding")
    progress.message(_describe(plan, units, config, encoder.contract))
    if begun:
        obey_earlier_stop(begun, config.max_bad_fraction)
        _warn_of_other_versions(plan, progress, needed=bool(units))
    to_encode = [unit for unit in units if unit.num_clips]
    with _machinery(config, rules, encoder, needed=bool(to_encode)) as machinery:
        current = begun or job.start_or_join(out, plan)
        current.store.remove_unpublished()
        with Committer(
            current, open_writer=_writer_opener(current, config), max_bad_fraction=config.max_bad_fraction
        ) as committer:
            if machinery is not None:
                plans = (replan(shards, unit, rules, filters) for unit in claim(current, to_encode))
                _encode_units(plans, to_encode, filters, committer, progress, config, shards, machinery)
            for unit in units:
                if not unit.num_clips:
                    committer.commit(replan(shards, unit, rules, filters))
            committer.check_any_rows()
    return current, len(units)


def _machinery(
    config: EncodeConfig, rules: SamplingRules, encoder: Encoder, *, needed: bool
) -> AbstractContextManager[Machinery | None]:
    return _start_machinery(config, rules, encoder) if needed else nullcontext()


@contextmanager
def _start_machinery(config: EncodeConfig, rules: SamplingRules, encoder: Encoder) -> Iterator[Machinery]:
    """Decoding processes start while the model loads.

    The decoder is closed first: a clip that hangs must not hold up the stage that waits for it.
    """
    with Pipeline(serial=config.serial) as pipeline, _open_decoder(config, rules) as decoder:
        encoder.load()
        check_encoder(encoder)
        yield Machinery(pipeline=pipeline, decoder=decoder, encoder=encoder)


def _encode_units(
    plans: Iterator[UnitPlan],
    units: Sequence[Unit],
    filters: Filters,
    committer: Committer,
    progress: Progress,
    config: EncodeConfig,
    shards: Store,
    machinery: Machinery,
) -> None:
    pipeline, decoder, encoder = machinery.pipeline, machinery.decoder, machinery.encoder
    _write_unconditional(committer.job, config, encoder)
    with progress:
        progress.already_done(progress.total - sum(unit.num_clips for unit in units))
        buffers = FrameBuffers(pin=config.device != "cpu")
        if encoder.contract.video is None:
            batches = _batches_of_texts(plans)
        else:
            batch_size = config.preprocess_video_batch_size
            collated = _collate(shards, plans, decoder, filters, buffers, batch_size=batch_size)
            batches = pipeline.stage("collate", collated, max_items=1)
        encoded = _encode(batches, encoder, buffers, config, committer.job.plan.columns)
        for batch in pipeline.stage("encode", encoded, max_items=2):
            committer.take(batch)
            progress.advance(batch.num_samples)
        progress.message(_stage_report(machinery))


def _writer_opener(current: Job, config: EncodeConfig) -> Callable[[str], ShardWriter]:
    return functools.partial(
        load_exporter(config).open_shard,
        current.store,
        workload=config.workload_type,
        samples_per_file=config.samples_per_file,
        contract=current.plan.contract,
        columns=current.plan.columns,
    )


class FrameBuffers:
    """Memory for batches of frames, used again: fresh memory costs its page faults, pinned memory far more.

    Buffers of the latest few shapes are kept, so that buckets do not add up.
    """

    def __init__(self, *, pin: bool) -> None:
        self._pin = pin
        self._free: dict[tuple[int, ...], deque[Tensor]] = {}

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """A uint8 tensor with whatever is in it."""
        free = self._free.get(shape)
        if free:
            return free.pop()
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin)

    def give_back(self, buffer: Tensor) -> None:
        """Nobody looks at it any more."""
        free = self._free.pop(buffer.shape, deque())
        self._free[buffer.shape] = free  # the latest comes last
        free.append(buffer)
        while len(self._free) > _SHAPES_KEPT:
            del self._free[next(iter(self._free))]


def _batches_of_texts(units: Iterator[UnitPlan]) -> Iterator[DecodedBatch]:
    for unit in units:
        for start in range(0, len(unit.texts), _TEXTS_AT_ONCE):
            texts = unit.texts[start : start + _TEXTS_AT_ONCE]
            yield DecodedBatch(unit=unit, samples=texts, prompts=_distinct_prompts(texts))


def _collate(
    shards: Store,
    units: Iterator[UnitPlan],
    decoder: Decoder,
    filters: Filters,
    buffers: FrameBuffers,
    *,
    batch_size: int,
) -> Iterator[DecodedBatch]:
    """Decode the units' clips, look at their frames, and put them together in their planned batches."""
    results = decode_units(shards, units, decoder)
    for unit, first, decoded in results:
        for batch in unit.batches(batch_size):
            clips = {place: clip for place, clip in enumerate(batch) if clip is not None}
            samples = list(clips.values())
            frames = buffers.take((len(batch), *samples[0].request.shape))
            bad: dict[str, BadSample] = {}
            dropped: dict[str, tuple[str, str]] = {}
            decoders: Counter[str] = Counter()
            for row, clip in clips.items():
                if clip is not first:
                    _, _, decoded = next(results)
                if decoded.bad is not None:
                    bad[clip.key] = decoded.bad
                    continue
                assert decoded.frames is not None
                frames[row] = decoded.frames
                decoders[decoded.decoder or "unknown"] += 1
                if (excluded := filters.excludes_frames(decoded.frames)) is not None:
                    dropped[clip.key] = excluded
            yield DecodedBatch(
                unit=unit,
                samples=samples,
                prompts=_distinct_prompts(unit.clips) if samples[0] is first else (),
                frames=_fill_holes({row: c.key for row, c in clips.items() if c.key not in {*bad, *dropped}}, frames),
                places=list(clips),
                bad=bad,
                dropped=dropped,
                decoders=decoders,
            )


def _distinct_prompts(samples: Sequence[TextPlan]) -> list[str]:
    return list(dict.fromkeys(row.prompt for sample in samples for row in sample.rows))


def _fill_holes(good: Mapping[int, str], frames: Tensor) -> ClipBatch | None:
    """A batch of which only these rows hold what they should: {row: key}."""
    if not good:
        return None
    filler = next(iter(good))
    for row in range(len(frames)):
        if row not in good:
            frames[row] = frames[filler]
    return ClipBatch(keys=tuple(good.get(row, "") for row in range(len(frames))), frames=frames)


def _encode(
    batches: Iterator[DecodedBatch],
    encoder: Encoder,
    buffers: FrameBuffers,
    config: EncodeConfig,
    columns: Mapping[str, str],
) -> Iterator[EncodedBatch]:
    """Prompts first, then clips."""
    texts: dict[str, Tensor] = {}
    for batch in batches:
        if batch.prompts:
            texts = dict(zip(batch.prompts, encoder.encode_text(batch.prompts), strict=True))
        videos: Sequence[dict[str, Tensor]] = [{}] * len(batch.samples)
        if batch.frames is not None:
            encoded = encoder.encode_batch(batch.frames)
            videos = [encoded[place] for place in batch.places]
            buffers.give_back(batch.frames.frames)
        samples, bad, dropped = [], [], []
        for sample, video in zip(batch.samples, videos, strict=True):
            if sample.key in batch.dropped:
                reason, message = batch.dropped[sample.key]
                dropped += [
                    Excluded(key=row.key, reason=reason, message=message, stage="decode") for row in sample.rows
                ]
                continue
            if encoder.contract.video is not None and video and sample.key not in batch.bad:
                check_first_frame(encoder.contract.video, video, sample.key)
            for row in sample.rows:
                try:
                    if sample.key in batch.bad:
                        raise batch.bad[sample.key]
                    tensors = {**video, "text_embedding": texts[row.prompt]}
                    samples.append(_encoded(sample, row, tensors, config, columns))
                except BadSample as error:
                    bad.append(BadClip(key=row.key, stage=error.stage, reason=error.reason, exception=error.message))
        yield EncodedBatch(
            unit=batch.unit,
            samples=tuple(samples),
            bad=tuple(bad),
            dropped=tuple(dropped),
            num_samples=len(batch.samples),
            last=batch.last,
            decoders=batch.decoders,
        )


def _encoded(
    sample: TextPlan, row: RowPlan, tensors: dict[str, Tensor], config: EncodeConfig, columns: Mapping[str, str]
) -> EncodedSample:
    for name, tensor in tensors.items():
        if not np.isfinite(tensor.numpy()).all():  # torch's threads would wait for cores that decoding holds: 20x
            raise BadSample("non_finite", f"{name} holds NaN or infinity", stage="encode")
    clip = None
    if isinstance(sample, ClipPlan):
        clip = EncodedClip(
            width=sample.request.width,
            height=sample.request.height,
            num_frames=len(sample.request.timestamps),
            train_fps=config.train_fps,
            source_fps=sample.source_fps,
            media_type=sample.media_type,
        )
    return EncodedSample(
        key=row.key,
        id=row.id,
        tensors=tensors,
        file_name=sample.file_name,
        caption=row.caption,
        clip=clip,
        columns=keep(sample.extra, columns),
    )


def _write_unconditional(current: Job, config: EncodeConfig, encoder: Encoder) -> None:
    """The embeddings of the empty and the negative prompt, which trainers need for guidance, before the first unit."""
    name = f"{job.FOLDER}/uncond-{canonical.digest(current.plan.fingerprint['text'])[:8]}.safetensors"
    if current.store.exists(name):
        return
    prompts = {"text_embedding": ""} | ({"negative_text_embedding": p} if (p := config.negative_prompt) else {})
    tensors = dict(zip(prompts, encoder.encode_text(list(prompts.values())), strict=True))
    current.store.put_if_absent(name, safetensors.torch.save(tensors), step="uncond")


def _options(config: EncodeSettings) -> EncodeOptions:
    return EncodeOptions(
        workload=config.workload_type,
        device=torch.device(config.device),
        vae_dtype=config.vae_dtype,
        text_dtype=config.text_dtype,
        allow_tf32=config.allow_tf32,
        posterior=config.posterior,
        clean_captions=config.clean_captions,
        text_batch_size=config.text_batch_size,
        offload_text_encoder=config.offload_text_encoder,
        digest="full" if config.full_digest else "ends",
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: cpu or cuda is needed")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch {torch.__version__} finds no GPU")
    return device


def _encode_threads(config: EncodeConfig, out: Store) -> int:
    """As asked for; else as the job began, since the number of threads may change the last bits; else all cores."""
    if config.encode_threads:
        return config.encode_threads
    if out.exists(job.PLAN):
        began = job.open_job(out).plan.fingerprint.get("model", {}).get("encode_threads")
        if began:
            return int(began)
    return len(os.sched_getaffinity(0))


def _open_decoder(config: EncodeConfig, rules: SamplingRules) -> Decoder:
    if config.serial or rules.workload_type == "text":
        return InlineDecoder()
    cores = len(os.sched_getaffinity(0))
    workers = config.dataloader_num_workers or max(1, cores // 2 if config.device == "cpu" else cores - 1)
    return DecodePool(
        num_workers=workers,
        num_slots=workers + config.preprocess_video_batch_size,
        slot_bytes=max(3 * one.num_frames * one.height * one.width for one in rules.sizes),
        timeout_seconds=config.decode_timeout,
        memory_bytes=config.decode_memory_mb * 2**20,
    )


def _describe(plan: JobPlan, units: Sequence[Unit], config: EncodeConfig, contract: LatentContract) -> str:
    dropped, bad = sum(unit.num_dropped for unit in plan.units), sum(unit.num_bad for unit in plan.units)
    what = count(plan.num_clips, "clip" if contract.video else "sample")
    rows = f" in {count(plan.num_rows, 'row')}" if plan.num_rows != plan.num_clips else ""
    large = f"{size(plan.size_bytes)} and " if contract.video else ""
    lines = [
        f"{count(len(plan.units), 'shard')}, {len(plan.units) - len(units)} done; {what} planned{rows}, {dropped} "
        f"dropped, {bad} with a bad header; {large}the text embeddings; {contract.family} {contract.variant} model "
        f"{contract.model}"
    ]
    if config.training_cfg_rate:
        lines.append(
            f"--training-cfg-rate {config.training_cfg_rate:g}: the same captions stay empty for good; dropping them "
            "while training, other ones each epoch, is better"
        )
    return "\n".join(lines)


def _warn_of_other_versions(plan: JobPlan, progress: Progress, *, needed: bool) -> None:
    now = job.installed_versions()
    for name, version in plan.versions.items():
        if needed and now.get(name) != version:
            progress.message(
                f"warning: the job began with {name} {version}, this is {now.get(name)}: the last bits may differ"
            )


def _stage_report(machinery: Machinery) -> str:
    pipeline, stats = machinery.pipeline, machinery.decoder.stats
    encode_times = pipeline.stages[-1]
    encoding = f"encode {pipeline.busy_seconds(encode_times):.1f} s"
    writing = f"{encode_times.blocked_seconds:.1f} s for writing"
    if len(pipeline.stages) == 1:
        return f"busy: {encoding}; it waited {writing}"
    return (
        f"busy: read {stats.read_seconds:.1f} s, decode {stats.decode_seconds:.1f} s in all processes, {encoding}; "
        f"it waited {pipeline.stages[0].starved_seconds:.1f} s for decoding and {writing}"
        + (f"; {count(stats.restarts, 'decoding process')} replaced" if stats.restarts else "")
        + (f"; {count(stats.sequential, 'clip')} that torchcodec misread decoded in order" if stats.sequential else "")
    )
