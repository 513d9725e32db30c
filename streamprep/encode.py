"""Shards -> latents: the loop of one process.

1. Plan: from the shards' indexes and the model's configs alone; write ``plan.json`` or join the one that is there.
2. Take the units that have no record. Read and decode ahead (child processes), collate into the planned batches,
   encode, write; each in its own thread, joined by short queues, so that the encoder never waits for the others.
3. When a unit's files are visible, create its record: the commit.
4. When all units have one, finalize.

A batch keeps its planned size when a member turns out to be bad: the hole is filled with another member and the result
thrown away. So a clip's latents do not depend on the health of its neighbours.
"""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from streamprep import canonical, job, plugins
from streamprep.claims import claim
from streamprep.commit import Committer, EncodedBatch
from streamprep.config import EncodeConfig
from streamprep.decode_pool import DecodePool
from streamprep.decoder import Decoder, DecodeStats, InlineDecoder
from streamprep.encoders import Encoder, open_encoder
from streamprep.errors import BadSample, UserError
from streamprep.finalize import Totals, finalize, leftovers, totals
from streamprep.job import Job, Unit
from streamprep.pipeline import Pipeline
from streamprep.plan import ClipPlan, UnitPlan
from streamprep.prepare import prepare_job, replan
from streamprep.progress import Progress, count
from streamprep.record import BadClip
from streamprep.storage import Store, open_store
from streamprep.stream import decode_units
from streamprep.types import ClipBatch, EncodedSample, ShardWriter


@dataclass(frozen=True, kw_only=True)
class DecodedBatch:
    """Clips of one planned batch."""

    unit: UnitPlan
    clips: tuple[ClipPlan, ...]
    frames: ClipBatch | None
    """All of them, holes filled; None if every clip is bad."""
    bad: dict[str, BadSample]
    """By key."""
    last: bool
    """Whether it is the unit's last."""


def encode(config: EncodeConfig) -> Totals:
    """Encode shards, or finish what an earlier call began.

    Raises:
        UserError: before anything is written, if the settings, model or shards cannot be used.
        TooManyBadSamples: if so many samples are bad that the settings must be wrong.
    """
    shards, out = open_store(config.shards), open_store(config.out)
    device = _device(config.device)
    torch.set_num_threads(_encode_threads(config, out))
    encoder = open_encoder(
        config.model_path,
        workload=config.workload_type,
        device=device,
        clean_captions=config.clean_captions,
        text_batch_size=config.text_batch_size,
        full_digest=config.full_digest,
    )
    encoder.contract.check_geometry(height=config.max_height, width=config.max_width, num_frames=config.num_frames)
    current = prepare_job(config, shards, out, encoder.contract, device)
    was_done = not current.unfinished() and out.exists(job.SUCCESS) and out.exists(job.INDEX)
    run(current, config, shards, encoder, device)
    if was_done and not leftovers(current):
        return totals(current)
    return finalize(current)


def run(current: Job, config: EncodeConfig, shards: Store, encoder: Encoder, device: torch.device) -> None:
    """Encode the units that have no record.

    Raises:
        TooManyBadSamples: if so many samples are bad that the settings must be wrong.
    """
    units = current.unfinished()
    progress = Progress(total=current.plan.num_clips, unit="clips", verb="encoding")
    progress.message(_describe(current, units))
    with Committer(current, open_writer=_writer_opener(current, config), max_bad_fraction=config.max_bad_fraction) as c:
        c.obey_earlier_stop()
        current.store.remove_unpublished()
        if units:
            _warn_of_other_versions(current, progress)
            _encode_units([unit for unit in units if unit.num_clips], c, progress, config, shards, encoder, device)
            for unit in units:
                if not unit.num_clips:
                    c.commit(replan(shards, unit, config))
        c.check_any_rows()


def _encode_units(
    units: Sequence[Unit],
    committer: Committer,
    progress: Progress,
    config: EncodeConfig,
    shards: Store,
    encoder: Encoder,
    device: torch.device,
) -> None:
    if not units:
        return
    # The decoder is closed first: a clip that hangs must not hold up the stage that waits for it.
    with Pipeline(serial=config.serial) as pipeline, _open_decoder(config, device) as decoder:
        encoder.load()
        _write_unconditional(committer.job, config, encoder)
        with progress:
            progress.already_done(progress.total - sum(unit.num_clips for unit in units))
            plans = (replan(shards, unit, config) for unit in claim(committer.job, units))
            buffers = FrameBuffers(pin=device.type == "cuda")
            decoded = _collate(shards, plans, decoder, buffers, batch_size=config.preprocess_video_batch_size)
            batches = pipeline.stage("collate", decoded, max_items=1)
            for batch in pipeline.stage("encode", _encode(batches, encoder, buffers, config), max_items=2):
                committer.take(batch)
                progress.advance(len(batch.samples) + len(batch.bad))
            progress.message(_stage_report(pipeline, decoder.stats))


def _writer_opener(current: Job, config: EncodeConfig) -> Callable[[str], ShardWriter]:
    exporter = plugins.load("streamprep.exporters", config.exporter)
    return functools.partial(
        exporter.open_shard,
        current.store,
        workload=config.workload_type,
        samples_per_file=config.samples_per_file,
        contract=current.plan.contract,
    )


class FrameBuffers:
    """Memory for batches of frames, used again: fresh memory costs its page faults, pinned memory far more."""

    def __init__(self, *, pin: bool) -> None:
        self._pin = pin
        self._free: deque[Tensor] = deque()

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """A uint8 tensor with whatever is in it."""
        while self._free:
            buffer = self._free.pop()
            if buffer.shape == shape:
                return buffer
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin)

    def give_back(self, buffer: Tensor) -> None:
        """Nobody looks at it any more."""
        self._free.append(buffer)


def _collate(
    shards: Store, units: Iterator[UnitPlan], decoder: Decoder, buffers: FrameBuffers, *, batch_size: int
) -> Iterator[DecodedBatch]:
    """Decode the units' clips and put them together in their planned batches."""
    results = decode_units(shards, units, decoder)
    for unit, first, decoded in results:
        for clips in unit.batches(batch_size):
            frames = buffers.take((len(clips), *clips[0].request.shape))
            bad: dict[str, BadSample] = {}
            for row, clip in enumerate(clips):
                if clip is not first:
                    _, _, decoded = next(results)
                if decoded.bad is not None:
                    bad[clip.key] = decoded.bad
                else:
                    assert decoded.frames is not None
                    frames[row] = decoded.frames
            yield DecodedBatch(
                unit=unit,
                clips=tuple(clips),
                frames=_fill_holes(clips, frames, bad),
                bad=bad,
                last=clips[-1] is unit.clips[-1],
            )


def _fill_holes(clips: Sequence[ClipPlan], frames: Tensor, bad: dict[str, BadSample]) -> ClipBatch | None:
    good = [row for row, clip in enumerate(clips) if clip.key not in bad]
    if not good:
        return None
    for row, clip in enumerate(clips):
        if clip.key in bad:
            frames[row] = frames[good[0]]
    return ClipBatch(keys=tuple(clip.key for clip in clips), frames=frames)


def _encode(
    batches: Iterator[DecodedBatch], encoder: Encoder, buffers: FrameBuffers, config: EncodeConfig
) -> Iterator[EncodedBatch]:
    """Captions once per unit, then its clips batch by batch."""
    unit, texts = None, {}
    for batch in batches:
        if batch.unit is not unit:
            unit = batch.unit
            captions = list(dict.fromkeys(clip.caption for clip in unit.clips))
            texts = dict(zip(captions, encoder.encode_text(captions), strict=True))
        videos: Sequence[dict[str, Tensor]] = [{}] * len(batch.clips)
        if batch.frames is not None:
            videos = encoder.encode_batch(batch.frames)
            buffers.give_back(batch.frames.frames)
        samples, bad = [], []
        for clip, video in zip(batch.clips, videos, strict=True):
            try:
                if clip.key in batch.bad:
                    raise batch.bad[clip.key]
                samples.append(_sample(clip, {**video, "text_embedding": texts[clip.caption]}, config))
            except BadSample as error:
                bad.append(BadClip(key=clip.key, stage=error.stage, reason=error.reason, exception=error.message))
        yield EncodedBatch(unit=batch.unit, samples=tuple(samples), bad=tuple(bad), last=batch.last)


def _sample(clip: ClipPlan, tensors: dict[str, Tensor], config: EncodeConfig) -> EncodedSample:
    for name, tensor in tensors.items():
        if not np.isfinite(tensor.numpy()).all():  # torch's threads would wait for cores that decoding holds: 20x
            raise BadSample("non_finite", f"{name} holds NaN or infinity", stage="encode")
    return EncodedSample(
        key=clip.key,
        id=clip.file_name,
        tensors=tensors,
        file_name=clip.file_name,
        caption=clip.caption,
        width=clip.request.width,
        height=clip.request.height,
        num_frames=len(clip.request.timestamps),
        train_fps=config.train_fps,
        source_fps=clip.source_fps,
    )


def _write_unconditional(current: Job, config: EncodeConfig, encoder: Encoder) -> None:
    """The embeddings of the empty and the negative prompt, which trainers need for guidance, before the first unit."""
    name = f"{job.FOLDER}/uncond-{canonical.digest(current.plan.fingerprint['text'])[:8]}.safetensors"
    if current.store.exists(name):
        return
    prompts = {"text_embedding": ""} | ({"negative_text_embedding": p} if (p := config.negative_prompt) else {})
    tensors = dict(zip(prompts, encoder.encode_text(list(prompts.values())), strict=True))
    current.store.put_if_absent(name, safetensors.torch.save(tensors), step="uncond")


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
        began = job.open_job(out).plan.fingerprint["video"].get("encode_threads")
        if began:
            return int(began)
    return len(os.sched_getaffinity(0))


def _open_decoder(config: EncodeConfig, device: torch.device) -> Decoder:
    if config.serial:
        return InlineDecoder()
    cores = len(os.sched_getaffinity(0))
    workers = config.dataloader_num_workers or max(1, cores - 1 if device.type == "cuda" else cores // 2)
    return DecodePool(
        num_workers=workers,
        num_slots=workers + config.preprocess_video_batch_size,
        slot_bytes=config.num_frames * 3 * config.max_height * config.max_width,
        timeout_seconds=config.decode_timeout,
        memory_bytes=config.decode_memory_mb * 2**20,
    )


def _describe(current: Job, units: Sequence[Unit]) -> str:
    plan = current.plan
    dropped, bad = sum(unit.num_dropped for unit in plan.units), sum(unit.num_bad for unit in plan.units)
    return (
        f"{count(len(plan.units), 'shard')}, {len(plan.units) - len(units)} done; {count(plan.num_clips, 'clip')} "
        f"planned, {dropped} dropped, {bad} with a bad header; {plan.contract['family']} model {plan.contract['model']}"
    )


def _warn_of_other_versions(current: Job, progress: Progress) -> None:
    now = job.installed_versions()
    for name, version in current.plan.versions.items():
        if now.get(name) != version:
            progress.message(
                f"warning: the job began with {name} {version}, this is {now.get(name)}: the last bits may differ"
            )


def _stage_report(pipeline: Pipeline, stats: DecodeStats) -> str:
    collate, encode_times = pipeline.stages
    return (
        f"busy: read {stats.read_seconds:.1f} s, decode {stats.decode_seconds:.1f} s in all processes, "
        f"encode {pipeline.busy_seconds(encode_times):.1f} s; "
        f"it waited {collate.starved_seconds:.1f} s for decoding and {encode_times.blocked_seconds:.1f} s for writing"
        + (f"; {count(stats.restarts, 'decoding process')} replaced" if stats.restarts else "")
    )
