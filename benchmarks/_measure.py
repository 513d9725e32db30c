"""Measuring in rounds: A B C, A B C, ... so that whatever else the machine does falls on all methods alike.

A ratio is taken within each round, then the median of the rounds: it is worth more than its two absolute numbers.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SHOWN_PACKAGES = ("torch", "torchcodec", "av", "pyarrow", "webdataset", "streamprep")


@dataclass(frozen=True, slots=True)
class Taken:
    """What one run took."""

    wall_seconds: float
    cpu_seconds: float
    """User and system time of this process, its children that ended and those that live on."""


def rounds_of(
    methods: Mapping[str, Callable[[], None]],
    *,
    num_rounds: int,
    before: Callable[[], None],
    warm_up: bool = True,
) -> dict[str, list[Taken]]:
    """Run all methods in turn, ``num_rounds`` times.

    Args:
        methods: By name; each does the whole job, `os.fsync` included.
        num_rounds: How often.
        before: Not measured, before each run: put things back, warm the page cache.
        warm_up: Whether a first round, which loads code and starts servers, is run and thrown away.
    """
    taken: dict[str, list[Taken]] = {name: [] for name in methods}
    for number in range(-1 if warm_up else 0, num_rounds):
        for name, run in methods.items():
            before()
            os.sync()  # what earlier runs left to be written must not be written now
            result = take(run)
            say(f"{f'round {number + 1}' if number >= 0 else 'warm-up'}: {name}: {result.wall_seconds:.2f} s")
            if number >= 0:
                taken[name].append(result)
    return taken


def take(run: Callable[[], None]) -> Taken:
    """Run once."""
    cpu_before, began = cpu_seconds(), time.perf_counter()
    run()
    wall = time.perf_counter() - began
    return Taken(wall, cpu_seconds() - cpu_before)


def cpu_seconds() -> float:
    """So far, of this process and everything below it: a fork server's children are not ours to wait for."""
    import psutil  # not above: processes that a benchmark starts import this file once more

    total = 0.0
    for child in psutil.Process().children(recursive=True):
        try:
            total += sum(child.cpu_times()[:4])  # its own, and what it waited for
        except psutil.NoSuchProcess:
            continue  # and so its parent has waited for it
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    return total


def ratios(taken: Mapping[str, Sequence[Taken]], reference: str, what: str) -> dict[str, list[float]]:
    """Each method's ``what`` (a field of `Taken`) over the reference's of the same round."""
    return {
        name: [getattr(a, what) / getattr(b, what) for a, b in zip(runs, taken[reference], strict=True)]
        for name, runs in taken.items()
    }


def spread(values: Sequence[float], digits: int = 2) -> str:
    """``1.52 (1.44-1.61)``: the median, and the lowest and highest round."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, the first column on the left and numbers on the right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def goal(what: str, values: Sequence[float], *, at_most: float | None = None, at_least: float | None = None) -> str:
    """Whether the median is where it should be."""
    median = statistics.median(values)
    reached = median <= at_most if at_most is not None else at_least is not None and median >= at_least
    wanted = f"at most {at_most:g}" if at_most is not None else f"at least {at_least:g}"
    return f"- {what} {spread(values, 3)}, goal {wanted}: {'reached' if reached else 'MISSED'}"


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    import psutil

    versions = {}
    for name in SHOWN_PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": _cpu_model(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "load": round(os.getloadavg()[0], 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": versions,
    }


def describe(env: Mapping[str, Any]) -> str:
    """One line about the environment."""
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    return (
        f"{env['cores']} cores ({env['cpu']}), {env['memory_gb']} GB, load {env['load']} at the start, "
        f"Linux {env['kernel']}, Python {env['python']}, {versions}"
    )


def parser(doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """A command line with what all benchmarks have in common; ``doc`` is the module's."""
    assert doc is not None
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--work", type=Path, help="a folder on the disk to measure; default: a temporary one")
    made.add_argument("--json", type=Path, metavar="FILE", help="also write every number there")
    if "rounds" in defaults:
        made.add_argument("--rounds", type=int, help=f"default: {defaults['rounds']}")
    made.set_defaults(**defaults)
    return made


@contextmanager
def work_folder(parent: Path | None) -> Iterator[Path]:
    """An empty folder, gone afterwards."""
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="streamprep-benchmark-", dir=parent) as folder:
        yield Path(folder)


def report(
    args: argparse.Namespace, env: Mapping[str, Any], *, lines: Sequence[str], results: Mapping[str, Any]
) -> None:
    """Print the Markdown; write the JSON if asked for."""
    print("\n".join([f"{describe(env)}.", *lines]))
    if args.json is not None:
        arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        value = {"environment": env, "arguments": arguments, "results": results}
        args.json.write_text(json.dumps(value, indent=1, default=asdict) + "\n", encoding="utf-8")


def say(text: str) -> None:
    """To whoever waits."""
    print(text, file=sys.stderr, flush=True)


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
