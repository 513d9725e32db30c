"""What one rank brings to a run, beside the model: who it is, its board and log, its claims; and how a run ends."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from streamprep import job
from streamprep.attempts import Attempt, Attempts, LastWords, Worker, describe_set_aside
from streamprep.board import Board, BoardGone, open_board
from streamprep.claims import Claims, Timing
from streamprep.commit import Committer, obey_earlier_stop
from streamprep.config import EncodeConfig
from streamprep.contract import LatentContract
from streamprep.errors import Stopped, TooManyBadSamples, UnitsSetAside
from streamprep.finalize import Totals, finalize, has_true_success, leftovers, read_totals, totals
from streamprep.fleet import Fleet
from streamprep.job import Job
from streamprep.job_plan import Unit
from streamprep.pipeline import Pipeline
from streamprep.progress import Progress
from streamprep.ranklog import RankLog
from streamprep.ranks import Rank, this_rank
from streamprep.storage import Store, open_store

LOGS = f"{job.FOLDER}/logs"


@dataclass(frozen=True, kw_only=True)
class Session:
    """One rank in a run."""

    rank: Rank
    worker: Worker
    board: Board
    attempts: Attempts
    log: RankLog
    progress: Progress
    timing: Timing
    heeds_stop: bool = True
    """Whether ``stop.json`` ends it; a retry is what may lift it."""

    def claims(self, name: str, units: Sequence[Unit], current: Job, *, ahead: int) -> Claims:
        """Units for this rank.

        Args:
            name: Of the list.
            units: All of it.
            current: Knows which are done.
            ahead: Clips to hold beside those of the unit at hand.
        """
        return Claims(
            [unit.id for unit in units],
            current,
            self.attempts,
            self.board,
            name=name,
            sizes={unit.id: unit.num_clips for unit in units},
            ahead=ahead,
            timing=self.timing,
            log=self.log,
            check=lambda: self.obey_others(current),
        )

    @contextmanager
    def working(self, claims: Claims, pipeline: Pipeline | None = None) -> Iterator[Fleet]:
        """While units are encoded: tells the others; lets go of what is open at the end."""
        fleet = Fleet(
            board=self.board,
            rank=self.rank,
            worker=self.worker,
            log=self.log,
            progress=self.progress,
            open_units=lambda: claims.open_units,
        )
        if pipeline is not None:
            fleet.work.waits = lambda: _waits(pipeline)
        self.log.begin()
        with LastWords(self.worker), fleet, claims:
            yield fleet

    def checked(self) -> None:
        """Tell the launcher that the command can be run: other ranks would not find it wrong either."""
        with suppress(BoardGone):
            self.board.add("checked", 1)

    def obey_others(self, current: Job) -> None:
        """Stop if another rank has found that too many samples are bad.

        Raises:
            TooManyBadSamples: with what it found.
        """
        stopped = current.stop_reason() if self.heeds_stop else None
        if stopped is not None:
            raise TooManyBadSamples(stopped["message"])


@contextmanager
def open_session(
    config: EncodeConfig,
    out: Store,
    contract: LatentContract,
    board: Board | None = None,
    *,
    heeds_stop: bool = True,
) -> Iterator[Session]:
    """This process as a rank, as its launcher says."""
    with begin_session(
        out,
        board,
        verb="encoding",
        unit="clips" if contract.video else "samples",
        log_dir=config.log_dir,
        stale_seconds=config.stale_seconds,
        heeds_stop=heeds_stop,
        device=config.device,
    ) as session:
        yield session


@contextmanager
def begin_session(
    out: Store,
    board: Board | None,
    *,
    verb: str,
    unit: str,
    log_dir: str | None,
    stale_seconds: float,
    heeds_stop: bool = True,
    **about: object,
) -> Iterator[Session]:
    """The same for any kind of work on units of an output.

    Args:
        out: The output.
        board: Of all ranks; by default as the environment says.
        verb: What is done: ``encoding``.
        unit: What its progress counts, in the plural.
        log_dir: For the log; by default in the output if that is a folder.
        stale_seconds: How long a unit is left to a process that may live, on another machine.
        heeds_stop: Whether ``stop.json`` ends it.
        **about: Said at the beginning of the log.
    """
    rank = this_rank()
    worker = Worker.this(rank.number)
    with RankLog(_log_folder(log_dir, out), worker) as log:
        log.event("start", host=worker.host, process=worker.pid, world_size=rank.world_size, **about)
        try:
            yield Session(
                rank=rank,
                worker=worker,
                board=board or open_board(rank),
                attempts=Attempts(out, job.FOLDER, worker),
                log=log,
                progress=Progress(total=0, unit=unit, verb=verb, quiet=rank.number != 0),
                timing=Timing.of(stale_seconds, world_size=rank.world_size),
                heeds_stop=heeds_stop,
            )
        except BaseException as error:
            log.event("end", error=type(error).__name__, message=str(error))
            raise
        log.event("end")


def _log_folder(log_dir: str | None, out: Store) -> Path | None:
    """Where logs go: a line at a time cannot be added to an object of a bucket."""
    if log_dir:
        return Path(log_dir)
    root = out.local_path()
    return None if root is None else root / LOGS


def end(
    current: Job, session: Session, committer: Committer, *, anew: bool, before: Callable[[], None] = lambda: None
) -> Totals:
    """Finalize a job whose units are all settled; of several ranks one does, the others wait for it.

    Args:
        current: The job.
        session: This rank.
        committer: Knows the limit of bad samples.
        anew: Whether nothing was to be done: then it was finalized before, and is looked at once more.
        before: Called by the one that finalizes, before it does.

    Raises:
        UnitsSetAside: if some are not done and never will be.
        Stopped: if another command does what is left.
        TooManyBadSamples: if no sample of the whole job was good, or too few were.
    """
    failed = failed_units(current, session.attempts)
    if failed:
        tidy(current, session.attempts)
        raise UnitsSetAside(describe_failed(failed, current))
    if current.unfinished():
        raise Stopped("another command has set units free that were set aside, and encodes them")
    looks_again = anew and session.rank.number == 0 and current.store.exists(job.SUCCESS)
    if looks_again and not (has_true_success(current) and not leftovers(current)):
        current.store.delete(job.SUCCESS, step="delete")
    claims = Claims(
        [_FINALIZE],
        _Finalized(current.store),
        session.attempts,
        session.board,
        name=_FINALIZE,
        timing=replace(session.timing, unmarked_seconds=min(5.0, session.timing.unmarked_seconds)),
        log=session.log,
        blame=False,
    )
    tidies = session.rank.number == 0
    with claims:
        for turn in claims:
            tidies = True
            committer.check_all()
            before()
            result = finalize(current)
            session.log.event("finalized", num_rows=result.num_rows)
            claims.finished(turn)
    if tidies:
        tidy(current, session.attempts)
    try:
        return read_totals(current.store)
    except (FileNotFoundError, *job.NOT_AS_WRITTEN):  # rank 0, or one that has come since, finalizes anew
        return totals(current)


def tidy(current: Job, attempts: Attempts) -> None:
    """Remove the marks of units that are done."""
    units = [unit.id for unit in itertools.chain(current.plan.units, *(one.units for one in current.rounds()))]
    left = set(current.not_done(units))
    attempts.forget([*(unit for unit in units if unit not in left), _FINALIZE])


def check_worth_a_restart(config: EncodeConfig) -> None:
    """End a rank that torchrun has started again though it can do no more, before it loads anything.

    torchrun restarts whatever has failed, up to ``--max-restarts`` times, and there is no telling it not to.

    Raises:
        TooManyBadSamples: if the job has stopped for that.
        UnitsSetAside: if nothing else is left to do.
    """
    out = open_store(config.out, spool_dir=config.spool_dir)
    if not this_rank().restarts or not out.exists(job.PLAN):
        return
    current = job.open_job(out)
    obey_earlier_stop(current, config.max_bad_fraction)
    if only_failed_left(current):
        raise UnitsSetAside(describe_failed(failed_units(current, Attempts(out, job.FOLDER, Worker.this())), current))


def only_failed_left(current: Job) -> bool:
    """Whether some units were set aside, and nothing else is to be done."""
    failed = failed_units(current, Attempts(current.store, job.FOLDER, Worker.this()))
    left = itertools.chain(current.unfinished(), *(current.without_record(one.units) for one in current.rounds()))
    return bool(failed) and all(unit.id in failed for unit in left)


def failed_units(current: Job, attempts: Attempts) -> dict[str, list[Attempt]]:
    """The units that are set aside; a record that came after all counts for more."""
    failed = attempts.failed()
    left = set(current.not_done(failed)) if failed else set()
    return {unit: tries for unit, tries in failed.items() if unit in left}


def describe_failed(failed: Mapping[str, Sequence[Attempt]], current: Job) -> str:
    """Which units are set aside, and why."""
    command = "`streamprep retry OUT --failed`" if current.plan.converted is None else "the same command"
    then = f"The rest is done; {command} tries again"
    return describe_set_aside(failed, noun="unit", then=then)


_FINALIZE = "finalize"


class _Finalized:
    """Whether the job is finalized, as a ledger of the one unit that is."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def is_done(self, unit: str) -> bool:
        return self._store.exists(job.SUCCESS) and self._store.is_all_published()

    def not_done(self, units: Iterable[str]) -> list[str]:
        return [unit for unit in units if not self.is_done(unit)]


def _waits(pipeline: Pipeline) -> dict[str, float]:
    """Seconds that the encoder worked, or waited for decoding or for writing."""
    if not pipeline.stages:
        return {}
    encode = pipeline.stages[-1]
    return {
        "decode": pipeline.stages[0].starved_seconds if len(pipeline.stages) > 1 else 0.0,
        "encode": max(0.0, pipeline.busy_seconds(encode)),
        "write": encode.blocked_seconds,
    }
