"""How far a job is, from its plan and records alone; nothing is loaded, so it may be asked at any time."""

from __future__ import annotations

from collections.abc import Iterator

from streamprep import job
from streamprep.finalize import Totals, totals
from streamprep.job import Job
from streamprep.progress import count, size

_EXAMPLES = 3


def describe(current: Job) -> Iterator[str]:
    """Lines for a person."""
    plan, units = current.plan, current.unfinished()
    result = totals(current)
    c = plan.contract
    yield f"{current.store.url}: {c['workload']} data of {c['family']} {c['variant']} model {c['model']}"
    yield f"input    {plan.shards}"
    yield f"units    {len(plan.units) - len(units)} of {len(plan.units)} done"
    clips = plan.num_clips - sum(unit.num_clips for unit in units)
    yield f"samples  {clips} of {plan.num_clips} done"
    yield f"output   {count(result.num_rows, 'row')}, {count(result.num_files, 'file')}, {size(result.size_bytes)}"
    yield from _reasons(current, result)
    stopped = current.stop_reason()
    if stopped is not None:
        yield f"stopped  {stopped['message']}"
    yield f"state    {state(current)}"


def state(current: Job) -> str:
    """One word or two: ``done``, ``too many bad samples``, ``unfinished``."""
    if current.store.exists(job.SUCCESS):
        return "done"
    if current.stop_reason() is not None:
        return "too many bad samples"
    return "unfinished: run the same command again to go on"


def exit_code(current: Job) -> int:
    """What the job itself would exit with: 0 done, 3 too many bad samples, 4 resumable."""
    if current.store.exists(job.SUCCESS):
        return 0
    return 3 if current.stop_reason() is not None else 4


def _reasons(current: Job, result: Totals) -> Iterator[str]:
    for reason, number in result.dropped.items():
        yield f"dropped  {number} {reason}"
    examples: dict[str, list[str]] = {}
    if result.bad:
        for record in current.records():
            for clip in current.read_quarantine(record):
                shown = examples.setdefault(clip.reason, [])
                if len(shown) < _EXAMPLES:
                    shown.append(f"{clip.key} ({clip.exception})")
    for reason, number in result.bad.items():
        yield f"bad      {number} {reason}: {'; '.join(examples.get(reason, []))}"
