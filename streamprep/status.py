"""How far a job is, from its plan and records alone; nothing is loaded, so it may be asked at any time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from streamprep import job
from streamprep.attempts import Attempt, Attempts, Worker
from streamprep.finalize import Totals, is_finalized, totals
from streamprep.job import Job
from streamprep.job_plan import Round
from streamprep.progress import by_reason, count, size, too_large
from streamprep.session import describe_failed, failed_units, only_failed_left

_EXAMPLES = 3


def describe(current: Job) -> Iterator[str]:
    """Lines for a person."""
    plan, units = current.plan, current.unfinished()
    result = totals(current)
    c = plan.contract
    yield f"{current.store.url}: {c['workload']} data of {c['family']} {c['variant']} model {c['model']}"
    yield f"input    {plan.shards}"
    if plan.converted is not None:
        yield f"from     {plan.converted['from']} by `streamprep convert`: {plan.converted['loses']}"
    yield f"units    {len(plan.units) - len(units)} of {len(plan.units)} done"
    clips = plan.num_clips - sum(unit.num_clips for unit in units)
    yield f"samples  {clips} of {plan.num_clips} done"
    yield f"output   {count(result.num_rows, 'row')}, {count(result.num_files, 'file')}, {size(result.size_bytes)}"
    attempts = Attempts(current.store, job.FOLDER, Worker.this())
    open_ones = [one for all_of_it in attempts.all().values() for one in all_of_it if one.ended is None]
    yield from (f"at work  {describe_attempt(one, attempts.worker)}" for one in open_ones)
    failed = failed_units(current, attempts)
    if failed:
        yield f"failed   {describe_failed(failed, current)}"
    yield from (f"retry    {describe_round(current, one)}" for one in current.rounds())
    decoders = job.total(record.decoders for record in current.records())
    if decoders:
        yield f"decoded  {', '.join(f'{number} by {name}' for name, number in decoders.items())}"
    if halved := _fewest(record.halved for record in current.records()):
        yield f"memory   {too_large(halved)}"
    yield from _reasons(current, result)
    stopped = current.stop_reason()
    if stopped is not None:
        yield f"stopped  {stopped['message']}"
    if not current.store.is_all_published():
        yield f"staged   in {current.store.staged_in()}: what is new is not published yet"
    yield f"state    {state(current)}"


def describe_attempt(one: Attempt, seen_by: Worker) -> str:
    """Who is at a unit, or was when it died."""
    gone = " (gone: another one will take it)" if one.by.is_gone(seen_by=seen_by) else ""
    return f"{one.unit} by {one.by.name} since {one.began}{gone}"


def describe_round(current: Job, one: Round) -> str:
    """One retry in a line: what was tried again, and what became of it."""
    done = [record for unit in one.units if (record := current.record(unit.id)) is not None]
    tried = job.total(unit.retried for unit in one.units)
    line = f"{one.name}: {count(sum(tried.values()), 'sample')} again ({by_reason(tried)})"
    if len(done) < len(one.units):
        line += f", {len(done)} of {count(len(one.units), 'unit')} done"
    bad, dropped = job.total(record.bad for record in done), sum(len(record.dropped) for record in done)
    line += f": {sum(record.num_rows for record in done)} encoded"
    return line + (f", {dropped} dropped" if dropped else "") + (f", still bad: {by_reason(bad)}" if bad else "")


def state(current: Job) -> str:
    """One word or two: ``done``, ``too many bad samples``, ``failed``, ``unfinished``."""
    begun = [one for one in current.rounds() if current.without_record(one.units)]
    if begun:
        return f"retry {begun[0].name} unfinished: run `streamprep retry` again to go on"
    if is_finalized(current):
        return "done"
    if current.stop_reason() is not None:
        return "too many bad samples"
    if only_failed_left(current):
        return "failed: all is done but what was set aside"
    return "unfinished: run the same command again to go on"


def exit_code(current: Job) -> int:
    """What the job itself would exit with: 0 done, 1 failed, 3 too many bad samples, 4 resumable."""
    if current.stop_reason() is not None and not is_finalized(current):
        return 3
    if only_failed_left(current):
        return 1
    if any(current.without_record(one.units) for one in current.rounds()):
        return 4
    return 0 if is_finalized(current) else 4


def _fewest(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The smallest of each name's."""
    fewest: dict[str, int] = {}
    for one in counts:
        fewest |= {name: min(number, fewest.get(name, number)) for name, number in one.items()}
    return dict(sorted(fewest.items()))


def _reasons(current: Job, result: Totals) -> Iterator[str]:
    dropped = ((item.reason, item.key, item.message) for record in current.records() for item in record.dropped)
    bad = ((clip.reason, clip.key, clip.exception) for clip in current.bad_clips().values()) if result.bad else ()
    for word, counts, items in (("dropped", result.dropped, dropped), ("bad", result.bad, bad)):
        examples = _examples(items)
        for reason, number in counts.items():
            yield f"{word:8} {number} {reason}: {'; '.join(examples.get(reason, []))}"


def _examples(items: Iterable[tuple[str, str, str]]) -> dict[str, list[str]]:
    """The first few of each reason, from (reason, key, message)."""
    examples: dict[str, list[str]] = {}
    for reason, key, message in items:
        shown = examples.setdefault(reason, [])
        if len(shown) < _EXAMPLES:
            shown.append(f"{key} ({message})")
    return examples
