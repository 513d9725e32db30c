"""A thousand ranks and twenty thousand units in simulated time: how long the job takes, and what the store has to bear.

The very classes of a real run decide, `streamprep.claims.Claims`, `Attempts` and `Job`; simulated are the clock, the
encoding (a unit takes as long as it has clips), the board, and the store, which is kept in memory, counts the requests
and takes 20 ms for each. Every rank takes a unit ahead at once, which is the most the real loop does.

  none    nothing fails
  ranks   1 % of the ranks are killed at random moments; half of them are started again a minute later
  node    a machine with 8 ranks is lost in the middle, for good
  hang    a rank hangs for an hour and then goes on
  board   the board is lost in the middle
  all     all of that together

`makespan / ideal` is the time of the last commit / the time in which the ranks that lived could have done the work had
it been divided without rest. Requests are those of claiming and committing, without the data files'; a listing counts
once for every 1000 names, as object stores have it. Goals: makespan / ideal at most 1.02 if nothing fails; every unit
committed, whatever fails.

Example: python benchmarks/claims_simulation.py
         python benchmarks/claims_simulation.py --num-ranks 64 --num-units 2000 --failures none all
"""

from __future__ import annotations

import argparse
import functools
import heapq
import itertools
import math
import random
import statistics
import time
from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from _measure import environment, goal, markdown, parser, report, say

from streamprep.attempts import Attempts, Worker
from streamprep.board import BoardGone, LocalBoard
from streamprep.claims import Claims, Timing, Wait
from streamprep.job import FOLDER, RECORDS, Job
from streamprep.job_plan import JobPlan
from streamprep.storage import FileEntry, Store

FAILURES = ("none", "ranks", "node", "hang", "board", "all")
KINDS = ("exists", "list", "read", "put", "delete")
RANKS_PER_NODE = 8
CLIPS_AHEAD = 20
NAMES_PER_LISTING = 1000
REQUEST_SECONDS = 0.02
RESTART_SECONDS = 60.0
HANG_SECONDS = 3600.0
BIN_SECONDS = 10


def main() -> None:
    args = _arguments()
    env = environment()
    sizes = unit_sizes(args.num_units, args.mean_seconds, args.sigma)
    results = {}
    for failures in args.failures:
        began = time.perf_counter()
        results[failures] = simulate(sizes, args.num_ranks, failures)
        say(f"{failures}: {results[failures]} ({time.perf_counter() - began:.0f} s)")
    report(
        args,
        env,
        lines=[
            f"{args.num_ranks} ranks, {len(sizes)} units of {min(sizes)} to {max(sizes)} s (median "
            f"{statistics.median(sizes):g}, mean {statistics.mean(sizes):.0f}), ideal without failures "
            f"{sum(sizes) / args.num_ranks:.0f} s.",
            "",
            markdown(
                [
                    "failures",
                    "makespan / ideal",
                    "makespan s",
                    "units missing",
                    "encoded twice",
                    "requests/s, mean",
                    "peak of 10 s",
                    "at s",
                    "board/s, mean",
                    *(f"{kind} / unit" for kind in KINDS),
                ],
                [_row(name, result, len(sizes)) for name, result in results.items()],
            ),
            "",
            *(
                [goal("nothing fails: makespan / ideal", [results["none"]["over_ideal"]], at_most=1.02)]
                if "none" in results
                else []
            ),
            goal("units missing", [max(result["missing"] for result in results.values())], at_most=0),
        ],
        results=results,
    )


def _arguments() -> argparse.Namespace:
    made = parser(__doc__, num_ranks=1000, num_units=20_000, mean_seconds=300.0, sigma=0.5)
    made.add_argument("--num-ranks", type=int, help="default: 1000")
    made.add_argument("--num-units", type=int, help="default: 20000")
    made.add_argument("--mean-seconds", type=float, help="that a unit takes (default: 300)")
    made.add_argument("--sigma", type=float, help="of the units' lognormal distribution (default: 0.5)")
    made.add_argument("--failures", choices=FAILURES, nargs="+", default=FAILURES, help="default: each in turn")
    return made.parse_args()


def _row(name: str, result: dict[str, Any], num_units: int) -> list[str]:
    return [
        name,
        f"{result['over_ideal']:.3f}",
        f"{result['makespan']:.0f}",
        str(result["missing"]),
        str(result["twice"]),
        f"{result['requests_per_second']:.0f}",
        f"{result['peak_per_second']:.0f}",
        f"{result['peak_at']}",
        f"{result['board_per_second']:.1f}",
        *(f"{result['requests'].get(kind, 0) / num_units:.1f}" for kind in KINDS),
    ]


def unit_sizes(number: int, mean_seconds: float, sigma: float) -> list[int]:
    """Clips of units, of a second each, the largest first as plans have them."""
    drawn = random.Random(0)
    sizes = [
        max(1, round(drawn.lognormvariate(0, sigma) * mean_seconds / math.exp(sigma**2 / 2))) for _ in range(number)
    ]
    return sorted(sizes, reverse=True)


def simulate(sizes: Sequence[int], num_ranks: int, failures: str) -> dict[str, Any]:
    """One job, from the first rank's start until every rank has left."""
    world = World(sizes, num_ranks)
    with patch("streamprep.attempts._started", world.started):
        _plan_failures(world, failures, sum(sizes) / num_ranks)
        world.run()
    makespan = max(world.committed_at.values(), default=0.0)
    bins = Counter[int]()
    for (number, _), amount in world.store.requests.items():
        bins[number] += amount
    peak_bin, peak = max(bins.items(), key=lambda item: item[1])
    by_kind = Counter[str]()
    for (_, kind), amount in world.store.requests.items():
        by_kind[kind] += amount
    return {
        "over_ideal": makespan / ideal_seconds(sum(sizes), world.absences, num_ranks),
        "makespan": makespan,
        "all_left_at": world.now,
        "missing": len(sizes) - len(world.committed_at),
        "twice": world.encoded_twice,
        "requests": dict(by_kind),
        "requests_per_second": by_kind.total() / makespan,
        "peak_per_second": peak / BIN_SECONDS,
        "peak_at": peak_bin * BIN_SECONDS,
        "peak_by_kind": {kind: world.store.requests[peak_bin, kind] / BIN_SECONDS for kind in KINDS},
        "board_per_second": world.board.num_calls / makespan,
    }


def ideal_seconds(work: float, absences: Iterable[tuple[float, float]], num_ranks: int) -> float:
    """When ranks that are away from one time to another could have done some work that can be divided at will."""
    changes = sorted([(begin, -1) for begin, _ in absences] + [(end, 1) for _, end in absences])
    now, ranks, left = 0.0, num_ranks, work
    for when, change in changes:
        if ranks * (when - now) >= left:
            break
        left -= ranks * (when - now)
        now, ranks = when, ranks + change
    return now + left / ranks


def _plan_failures(world: World, failures: str, ideal: float) -> None:
    drawn = random.Random(1)
    ranks = list(world.ranks)
    nodes = len(ranks) // RANKS_PER_NODE
    victims = drawn.sample(ranks[RANKS_PER_NODE * (nodes // 2) :], 1 + max(2, len(ranks) // 100))
    if failures in ("ranks", "all"):
        for number, rank in enumerate(victims[1:]):
            world.at(drawn.uniform(0.02, 0.98) * ideal, functools.partial(world.kill, rank, number % 2 == 1))
    if failures in ("node", "all"):
        for rank in ranks[:RANKS_PER_NODE]:
            world.at(ideal / 2, functools.partial(world.kill, rank, False))
    if failures in ("hang", "all"):
        world.at(ideal / 2, lambda: world.hang(victims[0], HANG_SECONDS))
    if failures in ("board", "all"):
        world.at(ideal / 2, world.board.lose)


class CountingStore(Store):
    """Files in memory, whose requests are counted by time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(Path("/nowhere"))
        self.requests: Counter[tuple[int, str]] = Counter()
        self.spent = 0.0
        """Seconds, since somebody put it to 0."""
        self._clock = clock
        self._files: dict[str, tuple[bytes, str]] = {}
        self._names: dict[str, list[str]] = {}
        self._versions = itertools.count()

    def read(self, path: str) -> bytes:
        """The whole file; `FileNotFoundError` if there is none."""
        self._count("read")
        try:
            return self._files[path][0]
        except KeyError:
            raise FileNotFoundError(path) from None

    def exists(self, path: str) -> bool:
        """Whether the file is there."""
        self._count("exists")
        return path in self._files

    def list(self, folder: str = "", *, prefix: str = "") -> Iterator[FileEntry]:
        """The files directly in a folder whose names begin so, sorted."""
        names = self._names.get(folder, [])
        first = bisect_left(names, prefix)
        found = names[first : bisect_left(names, prefix + "\U0010ffff", first)]
        self._count("list", max(1, -(-len(found) // NAMES_PER_LISTING)))
        for name in found:
            path = f"{folder}/{name}"
            if path in self._files:
                yield FileEntry(path, len(self._files[path][0]), self._files[path][1])

    def put(self, path: str, data: bytes, *, step: str) -> None:
        """Write a whole file, replacing what was there."""
        self._count("put")
        if path not in self._files:
            folder, _, name = path.rpartition("/")
            insort(self._names.setdefault(folder, []), name)
        self._files[path] = data, str(next(self._versions))

    def put_if_absent(self, path: str, data: bytes, *, step: str) -> bool:
        """Write a whole file unless one is there: a question and an answer here, as on a local disk."""
        if self.exists(path):
            return False
        self.put(path, data, step=step)
        return True

    def delete(self, path: str, *, step: str) -> None:
        """Remove a file; it is no error if it is gone."""
        self._count("delete")
        if self._files.pop(path, None) is not None:
            folder, _, name = path.rpartition("/")
            del self._names[folder][bisect_left(self._names[folder], name)]

    def _count(self, kind: str, number: int = 1) -> None:
        self.requests[int((self._clock() + self.spent) // BIN_SECONDS), kind] += number
        self.spent += number * REQUEST_SECONDS


class LosableBoard(LocalBoard):
    """Of all ranks, until it is lost."""

    shared = True

    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0
        self._lost = False

    def lose(self) -> None:
        """From now on nobody reaches it."""
        self._lost = True

    def add(self, name: str, amount: int) -> int:
        """Add to a counter, which begins at 0, and say what it is then."""
        self.num_calls += 1
        if self._lost:
            raise BoardGone("lost")
        return super().add(name, amount)


@dataclass
class World:
    """Ranks, what they share, and simulated time."""

    sizes: Sequence[int]
    num_ranks: int
    now: float = 0.0
    committed_at: dict[str, float] = field(default_factory=dict)
    encoded_twice: int = 0
    absences: list[tuple[float, float]] = field(default_factory=list)
    """From when to when a rank was dead or hung."""

    def __post_init__(self) -> None:
        self.store = CountingStore(lambda: self.now)
        self.board = LosableBoard()
        self.seconds = {f"{number:06d}": size for number, size in enumerate(self.sizes)}
        self.units = list(self.seconds)
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._serial = itertools.count()
        self._living: set[int] = set()
        self.ranks = [self._start(number) for number in range(self.num_ranks)]

    def at(self, when: float, do: Callable[[], object]) -> None:
        """Let something happen."""
        heapq.heappush(self._events, (when, next(self._serial), do))

    def run(self) -> None:
        """Until nothing is left to happen."""
        while self._events:
            self.now, _, do = heapq.heappop(self._events)
            do()

    def kill(self, rank: Rank, again: bool) -> None:
        """End a rank; perhaps another one takes its place a minute later."""
        rank.dead = True
        self._living.discard(rank.worker.pid)
        self.absences.append((self.now, self.now + RESTART_SECONDS if again else math.inf))
        if again:
            self.at(self.now + RESTART_SECONDS, functools.partial(self._start, rank.worker.rank))

    def hang(self, rank: Rank, seconds: float) -> None:
        """Stop a rank, without ending it."""
        rank.hangs_until = self.now + seconds
        self.absences.append((self.now, rank.hangs_until))

    def started(self, pid: int) -> str | None:
        """In the place of what ``/proc`` says."""
        return "then" if pid in self._living else None

    def _start(self, number: int) -> Rank:
        pid = next(self._serial)
        node = f"node-{number // RANKS_PER_NODE}"
        worker = Worker(token=f"{pid:012d}", host=node, machine=node, pid=pid, started="then", rank=number)
        self._living.add(pid)
        rank = Rank(self, worker)
        self.at(self.now, rank.ask)
        return rank


class Rank:
    """As `streamprep.encode` does it: one thread asks for units, one works them off."""

    def __init__(self, world: World, worker: Worker) -> None:
        self.world, self.worker = world, worker
        self.dead = False
        self.hangs_until = 0.0
        self._queue: deque[str] = deque()
        self._asked = 0
        self._job = Job(world.store, _NO_PLAN)
        self._claims = Claims(
            world.units,
            self._job,
            Attempts(world.store, FOLDER, worker),
            world.board,
            name="encode",
            sizes=world.seconds,
            ahead=CLIPS_AHEAD,
            timing=Timing.of(300.0, world_size=world.num_ranks),
            check=self._obey_others,
            clock=lambda: world.now,
            seed=worker.pid,
        )

    def ask(self, turn: int | None = None) -> None:
        """Take what can be taken, and come back when told."""
        if turn not in (None, self._asked) or self._is_away(functools.partial(self.ask, turn)):
            return
        self._asked += 1
        store = self.world.store
        store.spent = 0.0
        while (answer := self._claims.poll()) is not None:
            if isinstance(answer, Wait):
                again = functools.partial(self.ask, self._asked)
                self.world.at(self.world.now + store.spent + answer.seconds, again)
                return
            self._queue.append(answer)
            if len(self._queue) == 1:
                self._encode(after=store.spent)

    def _encode(self, *, after: float = 0.0) -> None:
        self.world.at(self.world.now + after + self.world.seconds[self._queue[0]], self._commit)

    def _commit(self) -> None:
        if self._is_away(self._commit):
            return
        store, unit = self.world.store, self._queue.popleft()
        store.spent = 0.0
        if store.put_if_absent(f"{RECORDS}/{unit}.json", b"{}", step="record"):
            self.world.committed_at[unit] = self.world.now
        else:
            self.world.encoded_twice += 1
        self._claims.finished(unit)
        self._obey_others()
        if self._queue:
            self._encode()
        self.ask()

    def _obey_others(self) -> None:
        assert self._job.stop_reason() is None

    def _is_away(self, later: Callable[[], None]) -> bool:
        if self.world.now < self.hangs_until:
            self.world.at(self.hangs_until, later)
            return True
        return self.dead


_NO_PLAN = JobPlan(shards="", fingerprint={}, config={}, contract={}, data_folder="", units=(), versions={})


if __name__ == "__main__":
    main()
