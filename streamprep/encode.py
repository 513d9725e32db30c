"""Shards -> latents: the loop of one rank.

1. Plan: from the shards' indexes and the model's configs alone, or join the job that is there.
2. Load the model, and see whether it computes what it should (`streamprep.selfcheck`); only then write ``plan.json``.
3. Claim units that have no record (`streamprep.claims`). Read and decode ahead (child processes), collate into the
   planned batches, encode (`streamprep.batches`), write; each in its own thread, joined by short queues, so that the
   encoder never waits.
4. When a unit's files are visible, create its record: the commit.
5. When all units of all ranks have one, finalize.

Where only captions are encoded nothing is read or decoded; the rest is the same.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from streamprep import job
from streamprep.batches import FrameBuffers, batches_of_texts, collate, encode_batches
from streamprep.board import Board
from streamprep.cache import describe_cache, open_cache
from streamprep.claims import Claims
from streamprep.commit import Committer, obey_earlier_stop
from streamprep.config import EncodeConfig
from streamprep.contract import LatentContract
from streamprep.decode_pool import DecodePool
from streamprep.decoder import Decoder, InlineDecoder
from streamprep.encoders import Encoder, open_encoder
from streamprep.errors import UserError
from streamprep.filters import Filters
from streamprep.finalize import Totals
from streamprep.job import Job
from streamprep.job_plan import JobPlan, Unit, installed_versions
from streamprep.manifest import Shards, open_shards
from streamprep.pipeline import Pipeline
from streamprep.plan import SamplingRules
from streamprep.prepare import exporter_options, fingerprint, load_exporter, open_filters, plan_job, replan, rules_of
from streamprep.progress import Progress, count, size, too_large
from streamprep.ranks import Rank, this_rank
from streamprep.read import READ_AHEAD_BYTES
from streamprep.sealed import seal_unconditional
from streamprep.selfcheck import check_encoder
from streamprep.session import Session, end, open_session
from streamprep.settle import describe_model, options_of, settle
from streamprep.signals import sigterm_asks
from streamprep.storage import Store, check_writable, describe_staging, describe_traffic, is_remote, open_store
from streamprep.types import ShardWriter
from streamprep.validation import write_validation

_MOST_CLIPS_READ_AHEAD = 64


@dataclass(frozen=True, kw_only=True)
class Machinery:
    """What encoding needs, started and checked."""

    pipeline: Pipeline
    decoder: Decoder
    encoder: Encoder


def encode(config: EncodeConfig, board: Board | None = None) -> Totals:
    """Encode shards, or finish what an earlier call began; one of any number of ranks.

    Args:
        config: The settings.
        board: Of all ranks; by default as the environment says.

    Raises:
        UserError: before anything is written, if the settings, model or shards cannot be used.
        TooManyBadSamples: if so many samples are bad that the settings must be wrong.
        LatentMismatch: if what is encoded contradicts itself.
        UnitsSetAside: if all is done but what kills every process that tries it.
    """
    shards, out = open_shards(config.shards), open_store(config.out, spool_dir=config.spool_dir)
    if shards.store.same_place(out):
        raise UserError(f"{config.out} is the folder of the shards: encode into another one")
    open_cache(config.cache_dir, config.cache_gb)  # one that cannot be is refused before a model is loaded
    config = settle(config, out)
    load_exporter(config)
    rules_of(config, describe_model(config))  # sizes that don't fit are refused before weights are downloaded
    encoder = open_encoder(config.model_path, options_of(config))
    return run(config, shards, out, encoder, board)


def encode_again(
    config: EncodeConfig, current: Job, units: Sequence[Unit], board: Board, *, name: str, title: str
) -> None:
    """Encode units of a retry; one of any number of ranks.

    Args:
        config: The job's, where it matters.
        current: The job.
        units: All of the retry, done or not.
        board: Of all ranks.
        name: Of the retry.
        title: Said first.

    Raises:
        UserError: before anything is written, if model or shards are not those of the job.
    """
    shards = open_shards(config.shards)
    config = settle(config, current.store)
    encoder = open_encoder(config.model_path, options_of(config))
    rules = rules_of(config, encoder.contract)
    job.check_same(current.store, current.plan.fingerprint, fingerprint(config, encoder.contract, shards.manifest))
    filters = open_filters(shards, rules)
    check_writable(current.store, only_writer=config.only_writer)
    with open_session(config, current.store, encoder.contract, board, heeds_stop=False) as session:
        session.progress.total = sum(unit.num_clips for unit in units)
        session.progress.message(title)
        session.checked()
        _warn_of_other_versions(current.plan, session.progress, needed=True)
        with _start_machinery(config, rules, encoder) as machinery:
            current.store.remove_unpublished()
            committer = _committer(current, config, session, max_bad_fraction=None)
            with committer:
                _encode_units(units, name, rules, filters, committer, session, config, shards, machinery)


def run(config: EncodeConfig, shards: Shards, out: Store, encoder: Encoder, board: Board | None = None) -> Totals:
    """Encode the units that have no record, until none is left that this or another rank could do; then finalize.

    Args:
        config: Settled.
        shards: The input.
        out: The output.
        encoder: Not loaded yet; only if there is anything to encode, it will be.
        board: Of all ranks; by default as the environment says.

    Raises:
        UserError: before anything is written.
        TooManyBadSamples: if so many samples are bad that the settings must be wrong.
        LatentMismatch: if what is encoded contradicts itself.
        UnitsSetAside: if all is done but what kills every process that tries it.
    """
    rules = rules_of(config, encoder.contract)
    wanted = fingerprint(config, encoder.contract, shards.manifest)
    begun = job.find_job(out, wanted, data_folder=load_exporter(config).FOLDER)
    filters = open_filters(shards, rules)
    plan = begun.plan if begun else plan_job(config, shards, out, encoder.contract, filters)
    was_finalized = out.exists(job.SUCCESS)  # looked at first, lest another rank's that is true be deleted
    units = begun.unfinished() if begun else list(plan.units)
    check_writable(out, only_writer=config.only_writer)
    if units and was_finalized:
        out.delete(job.SUCCESS, step="delete")
    with open_session(config, out, encoder.contract, board) as session:
        progress = session.progress
        progress.total = plan.num_clips
        progress.message(_describe(plan, units, config, encoder.contract, session.rank))
        for line in describe_staging(out) if units else ():
            progress.message(line)
        if begun:
            obey_earlier_stop(begun, config.max_bad_fraction)
            _warn_of_other_versions(plan, progress, needed=bool(units))
        session.checked()
        failed = session.attempts.failed_units()
        to_encode = [unit for unit in units if unit.num_clips and unit.id not in failed]
        with _machinery(config, rules, encoder, needed=bool(to_encode)) as machinery:
            current = begun or job.start_or_join(out, plan)
            current.store.remove_unpublished()

            def write_what_is_of_no_unit() -> None:
                if machinery is None:
                    _write_lost_unconditional(current, config, encoder, progress)
                _write_validation(current, shards, config, rules, filters, session)

            if session.rank.number == 0:
                write_what_is_of_no_unit()
            with _committer(current, config, session, max_bad_fraction=config.max_bad_fraction) as committer:
                if machinery is not None:
                    all_units = [unit for unit in plan.units if unit.num_clips]
                    _encode_units(all_units, "encode", rules, filters, committer, session, config, shards, machinery)
                for unit in units:
                    if not unit.num_clips and not current.is_done(unit.id):
                        committer.commit(replan(shards.store, unit, rules, filters))
                return end(current, session, committer, anew=not units, before=write_what_is_of_no_unit)


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
    units: Sequence[Unit],
    name: str,
    rules: SamplingRules,
    filters: Filters,
    committer: Committer,
    session: Session,
    config: EncodeConfig,
    shards: Shards,
    machinery: Machinery,
) -> None:
    """Take units until all are settled, and encode and commit them."""
    pipeline, decoder, encoder = machinery.pipeline, machinery.decoder, machinery.encoder
    current = committer.job
    _write_unconditional(current, config, encoder)
    left = set(current.not_done(unit.id for unit in units))
    claims = session.claims(name, units, current, ahead=_clips_ahead(config, shards))
    with session.working(claims, pipeline) as fleet, sigterm_asks(claims.stop, seconds=config.grace_seconds) as stop:
        fleet.begin(sum(unit.num_clips for unit in units if unit.id not in left))
        by_id = {unit.id: unit for unit in units}
        plans = (replan(shards.store, by_id[unit], rules, filters) for unit in claims)
        buffers = FrameBuffers(pin=config.device != "cpu")
        cache = open_cache(config.cache_dir, config.cache_gb)
        if encoder.contract.video is None:
            batches = batches_of_texts(plans)
        else:
            batch_size = config.preprocess_video_batch_size
            collated = collate(shards.store, plans, decoder, filters, buffers, batch_size=batch_size, cache=cache)
            batches = pipeline.stage("collate", collated, max_items=1)
        encoded = encode_batches(batches, encoder, buffers, config, current.plan.columns)
        for batch in pipeline.stage("encode", encoded, max_items=2):
            record = committer.take(batch)
            fleet.encoded(batch.num_samples)
            if record is not None:
                claims.finished(record.unit)
                fleet.committed(by_id[record.unit].num_clips, record)
                stop.obey()
                session.obey_others(current)
        stop.obey()
        of_cache = describe_cache(cache) if cache else ()
        report = "\n".join(
            (_stage_report(machinery, claims), *of_cache, *describe_traffic(shards.store, current.store))
        )
        session.log.event("idle", report=report)
        session.progress.message(report)
    stop.obey()


def _clips_ahead(config: EncodeConfig, shards: Shards) -> int:
    """What must lie ready so that neither the decoding processes nor the encoder ever wait for a unit to be claimed.

    From a bucket, what is read ahead, too: else small shards would be waited for, one after the other. But what a rank
    holds no other can take, when at the end all wait for the last.
    """
    in_work = _num_decoders(config) + 2 * config.preprocess_video_batch_size
    if shards.store.local_path() is not None or config.workload_type == "text":
        return in_work
    read_ahead = READ_AHEAD_BYTES * shards.manifest.num_samples // max(1, shards.manifest.size_bytes)
    return in_work + min(read_ahead, _MOST_CLIPS_READ_AHEAD)


def _committer(current: Job, config: EncodeConfig, session: Session, *, max_bad_fraction: float | None) -> Committer:
    opener = _writer_opener(current, config)
    return Committer(current, open_writer=opener, max_bad_fraction=max_bad_fraction, board=session.board)


def _writer_opener(current: Job, config: EncodeConfig) -> Callable[[str], ShardWriter]:
    exporter = load_exporter(config)
    return functools.partial(
        exporter.open_shard,
        current.store,
        workload=config.workload_type,
        samples_per_file=config.samples_per_file,
        contract=current.plan.contract,
        options=exporter_options(exporter, config),
        columns=current.plan.columns,
    )


def _write_validation(
    current: Job, shards: Shards, config: EncodeConfig, rules: SamplingRules, filters: Filters, session: Session
) -> None:
    """What is held out for validation, if anything is: by rank 0 at first, by whoever finalizes if that one is lost."""
    if not current.lacks_validation():
        return
    num_entries, num_bad = write_validation(
        current.store, shards, config, rules, filters, open_decoder=lambda: _open_decoder(config, rules)
    )
    left_out = f", {num_bad} left out that cannot be decoded" if num_bad else ""
    session.progress.message(f"{count(num_entries, 'sample')} held out for {job.VALIDATION}{left_out}")


def _write_unconditional(current: Job, config: EncodeConfig, encoder: Encoder) -> None:
    """The embeddings of the empty and the negative prompt, which trainers need for guidance, before the first unit."""
    path = current.plan.unconditional
    assert path is not None
    if current.store.exists(path):
        return
    prompts = {"text_embedding": ""} | ({"negative_text_embedding": p} if (p := config.negative_prompt) else {})
    tensors = dict(zip(prompts, encoder.encode_text(list(prompts.values())), strict=True))
    current.store.put_if_absent(path, seal_unconditional(tensors, current.plan), step="uncond")


def _write_lost_unconditional(current: Job, config: EncodeConfig, encoder: Encoder, progress: Progress) -> None:
    """They are there before any unit is; somebody has deleted them since, and all units may be done."""
    if not current.lacks_unconditional():
        return
    progress.message(f"{current.plan.unconditional} is missing: it is written again")
    encoder.load()
    check_encoder(encoder)
    _write_unconditional(current, config, encoder)


def _open_decoder(config: EncodeConfig, rules: SamplingRules) -> Decoder:
    if config.serial or rules.workload_type == "text":
        return InlineDecoder()
    workers = _num_decoders(config)
    return DecodePool(
        num_workers=workers,
        num_slots=workers + config.preprocess_video_batch_size,
        slot_bytes=max(3 * one.num_frames * one.height * one.width for one in rules.sizes),
        timeout_seconds=config.decode_timeout,
        memory_bytes=config.decode_memory_mb * 2**20,
    )


def _num_decoders(config: EncodeConfig) -> int:
    """Decoding processes: on a CPU the encoder needs as many cores."""
    cores = max(1, len(os.sched_getaffinity(0)) // this_rank().local_world_size)
    return config.dataloader_num_workers or max(1, cores // 2 if config.device == "cpu" else cores - 1)


def _describe(plan: JobPlan, units: Sequence[Unit], config: EncodeConfig, contract: LatentContract, rank: Rank) -> str:
    dropped, bad = sum(unit.num_dropped for unit in plan.units), sum(unit.num_bad for unit in plan.units)
    what = count(plan.num_clips, "clip" if contract.video else "sample")
    rows = f" in {count(plan.num_rows, 'row')}" if plan.num_rows != plan.num_clips else ""
    large = f"{size(plan.size_bytes)} and " if contract.video else ""
    lines = [
        f"{count(len(plan.units), 'shard')}, {len(plan.units) - len(units)} done; {what} planned{rows}, {dropped} "
        f"dropped, {bad} with a bad header; {large}the text embeddings; {contract.family} {contract.variant} model "
        f"{contract.model}" + (f"; {count(rank.world_size, 'rank')}" if rank.world_size > 1 else "")
    ]
    if is_remote(config.out) and config.log_dir is None:
        lines.append("no logs are kept: OUT is a bucket; --log-dir FOLDER keeps them")
    if config.training_cfg_rate:
        lines.append(
            f"--training-cfg-rate {config.training_cfg_rate:g}: the same captions stay empty for good; dropping them "
            "while training, other ones each epoch, is better"
        )
    return "\n".join(lines)


def _warn_of_other_versions(plan: JobPlan, progress: Progress, *, needed: bool) -> None:
    now = installed_versions()
    for name, version in plan.versions.items():
        if needed and now.get(name) != version:
            progress.message(
                f"warning: the job began with {name} {version}, this is {now.get(name)}: the last bits may differ"
            )


def _stage_report(machinery: Machinery, claims: Claims) -> str:
    pipeline, stats = machinery.pipeline, machinery.decoder.stats
    encode_times = pipeline.stages[-1]
    limits = machinery.encoder.limits.found
    memory = f"\nmemory {too_large(limits)}" if limits else ""
    encoding = f"encode {pipeline.busy_seconds(encode_times):.1f} s"
    writing = f"{encode_times.blocked_seconds:.1f} s for writing"
    if len(pipeline.stages) == 1:
        return f"busy: {encoding}; it waited {writing}{memory}"
    read_seconds = max(0.0, stats.read_seconds - claims.waited_seconds)
    return (
        f"busy: read {read_seconds:.1f} s, decode {stats.decode_seconds:.1f} s in all processes, {encoding}; "
        f"it waited {pipeline.stages[0].starved_seconds:.1f} s for decoding and {writing}"
        + (f"; {count(stats.restarts, 'decoding process')} replaced" if stats.restarts else "")
        + (f"; {count(stats.sequential, 'clip')} that torchcodec misread decoded in order" if stats.sequential else "")
        + memory
    )
