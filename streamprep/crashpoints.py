"""A test hook: die at a named durable step, to prove that a run can be killed anywhere.

``STREAMPREP_CRASH_AT=record:2`` makes the process leave by ``os._exit(137)``, as a SIGKILL would, at its second pass of
the point ``record``. Unset, a point costs one dictionary look-up.

Every durable step has two points: ``<step>``, when all bytes are on disk but nothing is visible yet, and
``<step>.after``, when it is visible but the process has not gone on.
"""

from __future__ import annotations

import os

VARIABLE = "STREAMPREP_CRASH_AT"

PACK_STEPS = ("pack", "skipped", "attempt", "shard", "shard_index", "withdraw", "manifest")
"""pack.json, skipped.jsonl, the mark that somebody is at a shard, NNNNNN.tar, NNNNNN.json, the mark's removal,
manifest.json."""
JOB_STEPS = (
    "plan",
    "uncond",
    "attempt",
    "data",
    "quarantine",
    "record",
    "withdraw",
    "delete",
    "index",
    "success",
    "stop",
    "failed",
)
"""plan.json, the unconditional embedding, the mark that somebody is at a unit, one data file, one quarantine file, one
record, the mark's removal, one leftover deleted by finalize, index.parquet, SUCCESS.json, stop.json, a unit set
aside."""
RETRY_STEPS = ("retry",)
"""retry/r1.json; then those of a job."""
VALIDATION_STEPS = ("validation",)
"""One first frame, or validation.json; only with --validation-split."""
HUB_STEPS = ("base", "commit", "unstage")
"""The mark that something is staged, the commit of all of it, the removal of the local copy; on the hub only."""
_STEPS = dict.fromkeys(PACK_STEPS + JOB_STEPS + RETRY_STEPS + VALIDATION_STEPS + HUB_STEPS)
POINTS = tuple(point for step in _STEPS for point in (step, f"{step}.after"))

_passes: dict[str, int] = {}


def crash_point(name: str) -> None:
    """Leave the process here if the environment says so."""
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        return
    assert name in POINTS, name
    point, _, count = wanted.partition(":")
    if point not in POINTS:
        raise ValueError(f"{VARIABLE}={wanted}: no such point; one of {', '.join(POINTS)}")
    if point == name:
        _passes[name] = _passes.get(name, 0) + 1
        if _passes[name] == int(count or 1):
            os._exit(137)
