"""Trying bad samples again: ``streamprep retry``.

A round is a derived plan, ``_streamprep/retry/r1.json``: units ``000012.r1`` with just the rows that are bad of unit
``000012``. It is created once, and its units are encoded and committed as all others are; no record is ever changed.
So a round may be killed anywhere, and the same command goes on with it. A sample that is encoded now is a row and no
longer bad; one that fails again is bad once, for its latest reason.

What the plan knew to be bad, from a shard's index alone, would be so again: those are left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace

from streamprep import job
from streamprep.attempts import Attempts, Worker
from streamprep.board import Board, BoardGone, open_board
from streamprep.commit import Committer
from streamprep.config import EncodeConfig, RetryConfig
from streamprep.errors import BAD_REASONS, TooManyBadSamples, UnitsSetAside, UserError
from streamprep.finalize import Totals, finalize, is_finalized, totals
from streamprep.job import Job, open_job
from streamprep.job_plan import JobPlan, Round, Unit, keys_digest
from streamprep.progress import count
from streamprep.ranks import this_rank
from streamprep.record import BadClip
from streamprep.session import describe_failed, failed_units, tidy
from streamprep.settings import LaunchSettings
from streamprep.storage import open_store

_ANEW = (
    "model_path",
    "decode_timeout",
    "decode_memory_mb",
    "dataloader_num_workers",
    "device",
    "max_bad_fraction",
    "shards",
)
"""Settings that do not decide what is encoded, or whose content is compared (model and shards)."""


@dataclass(frozen=True, kw_only=True)
class Retried:
    """What became of the call."""

    job: Job
    round: Round | None
    """None if there was nothing to try again."""
    hopeless: Mapping[str, int]
    """Bad for what their shard's index says, by reason."""
    totals: Totals
    stopped: TooManyBadSamples | None
    """If the job was stopped for its bad samples, and too many still are."""
    unfinished: int
    """Units of the job that `encode` has yet to do."""


def retry(config: RetryConfig) -> Retried:
    """Encode the bad samples of a job again, or finish what an earlier call began.

    Raises:
        UserError: before anything is written.
        UnitsSetAside: if all is done but what kills every process that tries it.
    """
    for reason in config.reason:
        if reason not in BAD_REASONS:
            raise UserError(f"--reason {reason}: there is no such reason; one of {', '.join(BAD_REASONS)}")
    current = open_job(open_store(config.out, spool_dir=config.spool_dir))
    if current.plan.converted is not None:
        raise UserError(
            f"{config.out} was made by `streamprep convert`: retry {current.plan.converted['from']}, and convert that "
            "into a new folder"
        )
    attempts = Attempts(current.store, job.FOLDER, Worker.this())
    board = open_board(this_rank())
    if config.failed:
        if _is_first(board):  # a rank that is started again must not forget what it has died of
            attempts.forget(failed_units(current, attempts))
        _encode_units_of_the_plan(config, current, board)
    bad = current.bad_clips()
    chosen = _of_this_run(current, board) or _begun(current, config.reason, bad)
    if chosen is None and not config.failed:
        chosen = _plan_round(current, config.reason, bad)
    if chosen is not None:
        _tell_round(chosen, board)
        _encode(config, current, chosen, board)
    if failed := failed_units(current, attempts):
        raise UnitsSetAside(describe_failed(failed, current))
    stopped = _settle_stop(current, config.max_bad_fraction)
    unfinished = len(current.unfinished())
    if not (stopped or unfinished or is_finalized(current)):
        finalize(current)
        tidy(current, attempts)
    return Retried(
        job=current,
        round=chosen,
        hopeless=Counter(clip.reason for clip in bad.values() if clip.stage == "plan"),
        totals=totals(current),
        stopped=stopped,
        unfinished=unfinished,
    )


def settings(plan: JobPlan, config: RetryConfig) -> EncodeConfig:
    """The job's own, but for what does not decide what is encoded."""
    kept = {field.name: plan.config[field.name] for field in fields(EncodeConfig) if field.name in plan.config}
    kept = {name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()}
    launch = {field.name: getattr(config, field.name) for field in fields(LaunchSettings)}
    anew = {name: value for name in _ANEW if (value := getattr(config, name)) is not None}
    given = {"shards": plan.shards, "out": config.out, "serial": config.serial}
    return EncodeConfig(**kept | launch | given | anew)


def _begun(current: Job, reasons: Sequence[str], bad: Mapping[tuple[str, str], BadClip]) -> Round | None:
    """The round that an earlier call began and did not finish, be it that only the job's end was not written."""
    rounds = current.rounds()
    for begun in rounds:
        units = current.without_record(begun.units)
        if not units:
            continue
        if reasons and set(reasons) != set(begun.reasons):
            flags = "".join(f" --reason {reason}" for reason in begun.reasons)
            raise UserError(
                f"{begun.name} is not finished: run `streamprep retry {current.store.url}{flags}` before one for other "
                "reasons"
            )
        for unit in units:
            good = [key for key in unit.keys or () if (unit.original, key) not in bad]
            if good:
                raise UserError(
                    f"{unit.id} would encode {good[0]!r} again, which is not bad any more: unit {unit.original} was "
                    "made again after its retry was planned; use a new output folder"
                )
        return begun
    ended = is_finalized(current) or current.unfinished() or current.stop_reason()
    return rounds[-1] if rounds and not ended else None


def _plan_round(current: Job, reasons: Sequence[str], bad: Mapping[tuple[str, str], BadClip]) -> Round | None:
    """Create the next round, or join one that another process creates at this moment; None if nothing is to be done."""
    chosen: dict[str, list[BadClip]] = {}
    for (unit_id, _), clip in bad.items():
        if clip.stage != "plan" and (not reasons or clip.reason in reasons):
            chosen.setdefault(unit_id, []).append(clip)
    if not chosen:
        return None
    number = max((earlier.number for earlier in current.rounds()), default=0) + 1
    units = [_retry_of(unit, number, chosen[unit.id]) for unit in current.plan.units if unit.id in chosen]
    return current.add_round(Round(number=number, reasons=tuple(reasons), units=tuple(units)))


def _retry_of(unit: Unit, number: int, clips: Sequence[BadClip]) -> Unit:
    keys = tuple(clip.key for clip in clips)
    return replace(
        unit,
        id=f"{unit.id}.r{number}",
        num_clips=len({key.partition("@")[0] for key in keys}),
        num_dropped=0,
        num_bad=0,
        size_bytes=unit.size_bytes * len(keys) // max(1, unit.num_rows),
        num_rows=len(keys),
        rows_sha256=keys_digest(keys),
        keys=keys,
        retried=dict(Counter(clip.reason for clip in clips)),
    )


def _is_first(board: Board) -> bool:
    try:
        return board.add("retry.begun", 1) == 1
    except BoardGone:
        return False


def _of_this_run(current: Job, board: Board) -> Round | None:
    """The round that another rank has begun; one that comes late must not plan the next for what is still bad."""
    try:
        number = board.add("retry.round", 0)
    except BoardGone:
        return None
    return next((one for one in current.rounds() if one.number == number), None)


def _tell_round(chosen: Round, board: Board) -> None:
    with suppress(BoardGone):
        if board.add("retry.told", 1) == 1:
            board.add("retry.round", chosen.number)


def _encode(config: RetryConfig, current: Job, chosen: Round, board: Board) -> None:
    from streamprep.encode import encode_again

    left = current.without_record(chosen.units)
    if left:
        title = _title(chosen, left)
        encode_again(settings(current.plan, config), current, chosen.units, board, name=chosen.name, title=title)


def _encode_units_of_the_plan(config: RetryConfig, current: Job, board: Board) -> None:
    from streamprep.encode import encode

    if current.unfinished():
        encode(settings(current.plan, config), board)


def _title(chosen: Round, units: Sequence[Unit]) -> str:
    samples = sum((Counter(unit.retried) for unit in chosen.units), Counter())
    reasons = ", ".join(f"{number} {reason}" for reason, number in samples.most_common())
    return (
        f"retry {chosen.name}: {count(samples.total(), 'bad sample')} ({reasons}) of "
        f"{count(len(chosen.units), 'shard')}, {len(chosen.units) - len(units)} done"
    )


def _settle_stop(current: Job, max_bad_fraction: float | None) -> TooManyBadSamples | None:
    """If the job was stopped for its bad samples: stop it again if too many still are, else let it go on."""
    stopped = current.stop_reason()
    if stopped is None:
        return None
    allowed = stopped["max_bad_fraction"] if max_bad_fraction is None else max_bad_fraction
    limits = Committer(current, open_writer=None, max_bad_fraction=allowed)
    try:
        limits.check_bad_limit()
        if not current.unfinished():
            limits.check_all()
    except TooManyBadSamples as error:
        return error
    current.store.delete(job.STOP, step="delete")
    return None
