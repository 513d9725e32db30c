"""A finished output -> the same rows in another format: ``streamprep convert``. Nothing is encoded again.

What FastVideo's own scripts wrote is taken too, if the user says what it is (`streamprep.foreign`).

1. The output must be finished. The new exporter must be able to hold its tensors, columns and contract; what a dtype
   loses is said, and noted in the new plan and contract.
2. The new ``plan.json`` is derived from the old one: the same units, retries among them, under another fingerprint,
   which knows the old output by the digests of its plan and of ``SUCCESS.json``, which names all its files.
3. Units are claimed, read, written and committed as they are when they are encoded: any number of ranks, killed
   anywhere. Each source file is compared with its sha256 before it is read.
4. The new output is finalized, and is one like any other.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from streamprep import exporting, job
from streamprep.board import Board, BoardGone
from streamprep.commit import Committer, obey_earlier_stop
from streamprep.config import ConvertConfig
from streamprep.errors import UserError
from streamprep.finalize import Totals
from streamprep.foreign import origin as foreign_origin
from streamprep.foreign.declared import contract_of, read_declaration
from streamprep.job import Job
from streamprep.job_plan import Fingerprint, JobPlan, Unit, installed_versions
from streamprep.origin import Origin, open_finished_output
from streamprep.progress import count, size
from streamprep.record import BadClip, QuarantineFile, Record
from streamprep.sealed import Damaged, check_unconditional, check_validation
from streamprep.session import Session, begin_session, end
from streamprep.settings import EncodeSettings, LatentSettings
from streamprep.signals import sigterm_asks
from streamprep.storage import (
    NamedFile,
    NotWhole,
    Store,
    check_writable,
    describe_staging,
    describe_traffic,
    open_store,
    whole_file,
)
from streamprep.tensor_members import cast, same_bytes
from streamprep.types import EncodedSample, WrittenFile

_VARIANCE = "vae_logvar"


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """From what to what; checked."""

    source: Origin
    exporter: Any
    options: Mapping[str, str]
    leave_out: tuple[str, ...]
    """Tensors that are not wanted any more."""
    loses: str
    """What becomes of the numbers, in words."""
    plan: JobPlan
    """Of the new output."""

    @property
    def units(self) -> list[Unit]:
        """All there are to convert, those of retries among them."""
        return [*self.source.plan.units, *(unit for one in self.source.rounds() for unit in one.units)]


def convert(config: ConvertConfig, board: Board | None = None) -> Totals:
    """Convert an output, or finish what an earlier call began; one of any number of ranks.

    Args:
        config: What, where to, how.
        board: Of all ranks; by default as the environment says.

    Raises:
        UserError: before anything is written.
        TooManyBadSamples: if so many of others' rows are bad that the contract must be wrong.
        UnitsSetAside: if all is done but what kills every process that tries it.
    """
    source, out = open_store(config.source), open_store(config.out, spool_dir=config.spool_dir)
    if source.same_place(out):
        raise UserError(f"{config.out} is the output itself: convert it into another folder")
    conversion = prepare(config, open_origin(config, source, out))
    plan, units = conversion.plan, conversion.units
    begun = job.find_job(out, plan.fingerprint, data_folder=plan.data_folder)
    left = begun.without_record(units) if begun else units
    was_finalized = out.exists(job.SUCCESS)
    if not begun:
        _check_space(out, plan)
    check_writable(out, only_writer=config.only_writer)
    if left and was_finalized:
        out.delete(job.SUCCESS, step="delete")
    with begin_session(
        out, board, verb="converting", unit="rows", log_dir=config.log_dir, stale_seconds=config.stale_seconds
    ) as session:
        session.progress.total = sum(record.num_rows for record in conversion.source.records.values())
        for line in (*_describe(conversion, left), *(describe_staging(out) if left else ())):
            session.progress.message(line)
        limit = None if config.contract is None else _max_bad_fraction(config)
        if begun and limit is not None:
            obey_earlier_stop(begun, limit)
        session.checked()
        with suppress(BoardGone):
            if left and session.board.add("convert.begun", 1) == 1:
                session.attempts.forget_the_dead()
        current = begun or job.start_or_join(out, plan)
        out.remove_unpublished()
        _copy_what_is_of_no_unit(conversion, current)
        with Committer(current, open_writer=None, max_bad_fraction=limit, board=session.board) as committer:
            if left:
                _convert_units(conversion, committer, session, grace_seconds=config.grace_seconds)
            return end(current, session, committer, anew=not left)


def open_origin(config: ConvertConfig, source: Store, out: Store) -> Origin:
    """What is to be converted.

    Raises:
        UserError: if it is not finished, cannot be read back, or is not what ``--contract`` says.
    """
    if config.contract is None:
        return open_finished_output(source)
    if source.exists(job.PLAN):
        raise UserError(f"{source.url} says itself what its latents are: leave --contract out")
    if _is_within(out, source):
        raise UserError(
            f"{config.out} is within {config.source}, whose Parquet files are all taken: use another folder"
        )
    return foreign_origin.open_origin(source, contract_of(read_declaration(config.contract)))


def _max_bad_fraction(config: ConvertConfig) -> float:
    asked = config.max_bad_fraction
    return EncodeSettings.max_bad_fraction if asked is None else asked


def _is_within(inner: Store, outer: Store) -> bool:
    """Whether a store is a folder of another, by whatever links."""
    here, there = inner.local_path(), outer.local_path()
    if here is not None and there is not None:
        return here.resolve().is_relative_to(there.resolve())
    return f"{inner.url.rstrip('/')}/".startswith(f"{outer.url.rstrip('/')}/")


def prepare(config: ConvertConfig, source: Origin) -> Conversion:
    """See whether an output can be converted so, and derive the new plan.

    Raises:
        UserError: if it cannot.
    """
    plan, exporter = source.plan, exporting.open_exporter(config.exporter)
    asked = {field.name: getattr(config, field.name) for field in fields(LatentSettings)}
    options = exporting.settle_options(exporter, config.exporter, asked)
    dtype, dtypes = exporting.dtype_of(options), source.dtypes
    contract, leave_out = _contract(config, plan.contract)
    _check_posterior(config, exporter, contract)
    exporting.check_able(exporter, config.exporter, workload=contract["workload"], posterior=_posterior(contract))
    exporting.check_contract(exporter, config.exporter, contract)
    _check_columns(config, exporter, plan)
    loses = "; ".join(exporting.describe_loss(one, dtype) for one in dtypes)
    if leave_out:
        loses += f"; {', '.join(leave_out)} left out"
    if any(one != dtype for one in dtypes):
        contract = exporting.rounded(contract, dtype)
    samples_per_file = config.samples_per_file or plan.config["samples_per_file"]
    widths = exporting.DTYPE_BYTES
    ratio = widths[dtype] / max((widths[one] for one in dtypes), default=widths[dtype])
    return Conversion(
        source=source,
        exporter=exporter,
        options=options,
        leave_out=leave_out,
        loses=loses,
        plan=dataclasses.replace(
            plan,
            fingerprint=_fingerprint(plan.fingerprint, contract)
            | {
                "export": {
                    "exporter": config.exporter,
                    "samples_per_file": samples_per_file,
                    "keep_columns": plan.config["keep_columns"],
                    **exporting.choices_made(exporter, options),
                },
                "convert": source.digests,
            },
            config={
                **plan.config,
                **dict.fromkeys(asked),
                "exporter": config.exporter,
                "samples_per_file": samples_per_file,
                "posterior": _posterior(contract),
                **options,
            },
            contract=contract,
            data_folder=exporter.FOLDER,
            units=tuple(dataclasses.replace(unit, size_bytes=int(unit.size_bytes * ratio)) for unit in plan.units),
            versions=installed_versions(),
            converted={"from": source.store.url, "loses": loses, **source.digests},
        ),
    )


def _contract(config: ConvertConfig, contract: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The new contract, and the tensors that are left out for it."""
    if config.posterior is None or _posterior(contract) == config.posterior:
        return dict(contract), ()
    video = {**contract["video"], "posterior": config.posterior}
    tensors = {name: what for name, what in contract["tensors"].items() if name != _VARIANCE}
    return {**contract, "video": video, "tensors": tensors}, (_VARIANCE,)


def _posterior(contract: Mapping[str, Any]) -> str:
    return contract["video"]["posterior"] if contract["video"] else "mean"


def _fingerprint(fingerprint: Fingerprint, contract: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    if not contract["video"]:
        return dict(fingerprint)
    return {**fingerprint, "video": {**fingerprint["video"], "posterior": _posterior(contract)}}


def _check_posterior(config: ConvertConfig, exporter: Any, contract: Mapping[str, Any]) -> None:
    posterior = _posterior(contract)
    if posterior not in exporter.POSTERIORS and "mean" in exporter.POSTERIORS:
        raise UserError(
            f"{config.source} keeps mean and log variance ({posterior}), the exporter {config.exporter} holds only "
            f"the mean: --posterior mean leaves {_VARIANCE} out"
        )


def _check_columns(config: ConvertConfig, exporter: Any, plan: JobPlan) -> None:
    for name in plan.columns:
        problem = exporter.column_problem(name, workload=plan.contract["workload"])
        if problem is not None:
            raise UserError(
                f"the exporter {config.exporter} cannot hold the further column {name!r}: it {problem}; encode with "
                "--keep-columns without it"
            )


def _check_space(out: Store, plan: JobPlan) -> None:
    free = out.free_bytes()
    if free is not None and plan.size_bytes > free:
        raise UserError(f"{out.url} has {size(free)} free, the output needs more than {size(plan.size_bytes)}")


def _describe(conversion: Conversion, left: Sequence[Unit]) -> Iterator[str]:
    plan, units = conversion.plan, conversion.units
    rows = sum(record.num_rows for record in conversion.source.records.values())
    yield (
        f"{count(len(units), 'unit')}, {len(units) - len(left)} done; {count(rows, 'row')} of "
        f"{conversion.source.store.url}: {conversion.source.plan.config['exporter']} -> {plan.config['exporter']}"
    )
    yield conversion.loses
    yield from conversion.source.lines


def _copy_what_is_of_no_unit(conversion: Conversion, current: Job) -> None:
    """Retries' plans, the embeddings of the empty and the negative prompt, what is for validation; before any unit."""
    for one in conversion.source.rounds():
        current.add_round(one)
    source, path = conversion.source, conversion.source.plan.unconditional
    if path is not None and source.store.exists(path) and not current.store.exists(path):
        data = source.store.read(path)
        with _naming(source.store, path):
            check_unconditional(data, source.plan)
        current.store.put_if_absent(path, data, step="uncond")
    if current.lacks_validation():
        _copy_validation(source.store, current.store)


def _copy_validation(source: Store, out: Store) -> None:
    """What is held out for validation: the images, then the JSON, which says that they are there."""
    data = source.read(job.VALIDATION)
    with _naming(source, job.VALIDATION):
        images, _ = check_validation(data)
    for image, sha256 in images.items():
        file = NamedFile(f"{job.VALIDATION_FOLDER}/{image}", sha256)
        with whole_file(source, file, scratch=out) as (store, name):
            out.put_if_absent(file.name, store.read(name), step="validation")
    out.put_if_absent(job.VALIDATION, data, step="validation")


@contextmanager
def _naming(store: Store, path: str) -> Iterator[None]:
    try:
        yield
    except Damaged as error:
        raise NotWhole(f"{store.url}/{path}", str(error)) from error


def _convert_units(conversion: Conversion, committer: Committer, session: Session, *, grace_seconds: float) -> None:
    """Take units until all are settled, and convert and commit them."""
    units, current = conversion.units, committer.job
    out = current.store
    by_id = {unit.id: unit for unit in units}
    left = set(current.not_done(by_id))
    records = conversion.source.records
    rows = {unit: record.num_rows for unit, record in records.items()}
    claims = session.claims("convert", units, current, ahead=0)
    with session.working(claims) as fleet, sigterm_asks(claims.stop, seconds=grace_seconds) as stop:
        fleet.begin(sum(rows[unit] for unit in by_id if unit not in left))
        for unit in claims:
            began = time.monotonic()
            record, bad = records[unit], list[BadClip]()
            files = _convert_files(conversion, current, record, bad, fleet.encoded)
            quarantine = _copy_quarantine(conversion.source.store, out, record.quarantine)
            if bad:
                assert quarantine is None, f"unit {unit} has bad samples already"
                quarantine = current.write_quarantine(unit, bad)
            ours = dataclasses.replace(
                record,
                files=tuple(files),
                bad={**record.bad, **Counter(clip.reason for clip in bad)},
                quarantine=quarantine,
                seconds={"unit": time.monotonic() - began},
            )
            ours = committer.commit_record(ours)
            claims.finished(unit)
            fleet.committed(rows[unit], ours)
            committer.check_bad_limit()
            stop.obey()
            session.obey_others(current)
        stop.obey()
        for line in describe_traffic(conversion.source.store, out):
            session.progress.message(line)


def _convert_files(
    conversion: Conversion, current: Job, record: Record, bad: list[BadClip], wrote: Callable[[int], None]
) -> list[WrittenFile]:
    """Write a unit's rows, and publish them; those that are bad are put into ``bad``."""
    if not record.num_rows:
        return []
    plan = conversion.plan
    with conversion.exporter.open_shard(
        current.store,
        record.unit,
        workload=plan.contract["workload"],
        samples_per_file=plan.config["samples_per_file"],
        contract=current.plan.contract,
        options=conversion.options,
        columns=plan.columns,
    ) as writer:
        for sample in _samples(conversion, record, bad, scratch=current.store):
            writer.write(sample)
            wrote(1)
        files: list[WrittenFile] = list(writer.close())
    bad_keys = {clip.key for clip in bad}
    there = [row.key for file in record.files for row in file.rows if row.key not in bad_keys]
    exporting.check_rows(plan.config["exporter"], record.unit, there, files)
    return files


def _samples(conversion: Conversion, record: Record, bad: list[BadClip], *, scratch: Store) -> Iterator[EncodedSample]:
    """A unit's rows as they were encoded: float32, and rows of one clip share what they have in common."""
    found: EncodedSample | None = None
    tensors: dict[str, Tensor] = {}
    for sample in conversion.source.read(record, scratch):
        if isinstance(sample, BadClip):
            bad.append(sample)
            continue
        before, encoded = found, tensors
        is_same_clip = before is not None and _clip_key(before) == _clip_key(sample)
        found, tensors = sample, {}
        for name, tensor in sample.tensors.items():
            if name in conversion.leave_out:
                continue
            if before is not None and is_same_clip and _is_same(before.tensors.get(name), tensor):
                tensors[name] = encoded[name]
            else:
                tensors[name] = cast(tensor, "float32")
        yield dataclasses.replace(sample, tensors=tensors)


def _clip_key(sample: EncodedSample) -> str:
    return sample.key.partition("@")[0]


def _is_same(before: Tensor | None, tensor: Tensor) -> bool:
    return before is not None and (before is tensor or same_bytes(before, tensor))


def _copy_quarantine(source: Store, out: Store, file: QuarantineFile | None) -> QuarantineFile | None:
    if file is None:
        return None
    with whole_file(source, file, scratch=out) as (store, name):
        out.put(file.name, store.read(name), step="quarantine")
    return file
