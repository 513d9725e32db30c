"""Shards -> latents: the loop of one process.

1. Plan: from the shards' indexes and the model's configs alone, or join the job that is there.
2. Load the model, and see whether it computes what it should (`streamprep.selfcheck`); only then write ``plan.json``.
3. Take the units that have no record. Read and decode ahead (child processes), collate into the planned batches, encode
   (`streamprep.batches`), write; each in its own thread, joined by short queues, so that the encoder never waits.
4. When a unit's files are visible, create its record: the commit.
5. When all units have one, finalize.

Where only captions are encoded nothing is read or decoded; the rest is the same.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import safetensors.torch

from streamprep import canonical, job
from streamprep.batches import FrameBuffers, batches_of_texts, collate, encode_batches
from streamprep.claims import claim
from streamprep.commit import Committer, obey_earlier_stop
from streamprep.config import EncodeConfig
from streamprep.contract import LatentContract
from streamprep.decode_pool import DecodePool
from streamprep.decoder import Decoder, InlineDecoder
from streamprep.encoders import Encoder, open_encoder
from streamprep.errors import UserError
from streamprep.filters import Filters
from streamprep.finalize import Totals, finalize, is_finalized, leftovers, totals
from streamprep.job import Job, JobPlan, Unit
from streamprep.manifest import load_manifest
from streamprep.pipeline import Pipeline
from streamprep.plan import SamplingRules, UnitPlan
from streamprep.prepare import fingerprint, load_exporter, open_filters, plan_job, replan, rules_of
from streamprep.progress import Progress, count, size
from streamprep.selfcheck import check_encoder
from streamprep.settle import describe_model, options_of, settle
from streamprep.storage import Store, open_store
from streamprep.types import ShardWriter


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
    encoder = open_encoder(config.model_path, options_of(config))
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
    encoder = open_encoder(config.model_path, options_of(config))
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
            batches = batches_of_texts(plans)
        else:
            batch_size = config.preprocess_video_batch_size
            collated = collate(shards, plans, decoder, filters, buffers, batch_size=batch_size)
            batches = pipeline.stage("collate", collated, max_items=1)
        encoded = encode_batches(batches, encoder, buffers, config, committer.job.plan.columns)
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


def _write_unconditional(current: Job, config: EncodeConfig, encoder: Encoder) -> None:
    """The embeddings of the empty and the negative prompt, which trainers need for guidance, before the first unit."""
    name = f"{job.FOLDER}/uncond-{canonical.digest(current.plan.fingerprint['text'])[:8]}.safetensors"
    if current.store.exists(name):
        return
    prompts = {"text_embedding": ""} | ({"negative_text_embedding": p} if (p := config.negative_prompt) else {})
    tensors = dict(zip(prompts, encoder.encode_text(list(prompts.values())), strict=True))
    current.store.put_if_absent(name, safetensors.torch.save(tensors), step="uncond")


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
