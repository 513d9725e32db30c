"""What ranks ask of the store they share, and what they know before they need it: of many, each must ask for little."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from shared_board import SharedBoard

from streamprep.attempts import Attempts, Worker
from streamprep.board import BoardGone, LocalBoard, LostBoard
from streamprep.claims import Claims, Timing, Wait
from streamprep.storage import FileEntry, LocalStore

UNITS = [f"{number:06d}" for number in range(200)]


class CountingStore(LocalStore):
    """Counts what it is asked for."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.requests: Counter[str] = Counter()

    def read(self, path: str) -> bytes:
        self.requests["read"] += 1
        return super().read(path)

    def exists(self, path: str) -> bool:
        self.requests["exists"] += 1
        return super().exists(path)

    def list(self, folder: str = "", *, prefix: str = "") -> Iterator[FileEntry]:
        self.requests["list"] += 1
        return super().list(folder, prefix=prefix)


@dataclass
class World:
    """Ranks that share an output, a board and a clock, and count what they ask of the records."""

    store: CountingStore
    board: LocalBoard = field(default_factory=SharedBoard)
    done: set[str] = field(default_factory=set)
    now: float = 0.0

    def is_done(self, unit: str) -> bool:
        self.store.requests["is_done"] += 1
        return unit in self.done

    def not_done(self, units: Iterator[str]) -> list[str]:
        self.store.requests["not_done"] += 1
        return [unit for unit in units if unit not in self.done]

    def rank(self, number: int, *, board: LocalBoard | LostBoard | None = None) -> Claims:
        worker = replace(Worker.this(number), machine=f"machine {number}", token=f"{number:012d}")
        attempts = Attempts(self.store, "_streamprep", worker)
        timing = Timing(stale_seconds=300, unmarked_seconds=60, poll_seconds=30)
        board = board or self.board
        return Claims(UNITS, self, attempts, board, name="units", timing=timing, clock=lambda: self.now, seed=number)

    def commit(self, rank: Claims, unit: str) -> None:
        self.done.add(unit)
        rank.finished(unit)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(CountingStore(tmp_path))


def take(rank: Claims) -> str:
    unit = rank.poll()
    assert isinstance(unit, str), unit
    return unit


def test_who_was_away_long_before_the_count_is_through_is_not_waited_for_again(world: World) -> None:
    lost, rank = world.rank(1), world.rank(0)
    left = take(lost)
    while isinstance(unit := rank.poll(), str) and unit != left:
        world.now += 5
        world.commit(rank, unit)
    assert unit == left
    assert world.now == 5 * (len(UNITS) - 1)


def test_who_began_late_is_waited_for(world: World) -> None:
    slow, rank = world.rank(1), world.rank(0)
    for unit in UNITS[:-1]:
        assert take(rank) == unit
        world.now += 5
        world.commit(rank, unit)
    assert take(slow) == UNITS[-1]
    began = world.now
    while isinstance(answer := rank.poll(), Wait):
        world.now += answer.seconds
    assert answer == UNITS[-1]
    assert world.now - began >= 300


def test_at_the_end_a_rank_reads_few_of_many_marks_and_asks_for_few_records(world: World) -> None:
    others = [world.rank(number) for number in range(1, 101)]
    for other in others:
        take(other)
        take(other)
    rank = world.rank(0)
    assert isinstance(rank.poll(), Wait)  # lists all
    world.store.requests.clear()
    world.now += 30
    assert isinstance(rank.poll(), Wait)
    assert world.store.requests["read"] <= 20
    assert world.store.requests["is_done"] <= 5
    assert world.store.requests["list"] + world.store.requests["not_done"] <= 3
    for other in others:
        for unit in other.open_units:
            world.commit(other, unit)
    assert rank.poll() is None


def test_a_mark_that_outlives_its_units_record_holds_nobody_up(world: World) -> None:
    """Its process died between the two; on which machine that was nobody sees."""
    died, rank = world.rank(1), world.rank(0)
    lost = take(died)
    for unit in UNITS[1:]:
        assert take(rank) == unit
        world.commit(rank, unit)
    assert isinstance(rank.poll(), Wait)
    world.done.add(lost)
    assert rank.poll() is None


def test_without_a_board_what_others_have_done_is_not_asked_for_one_by_one(world: World) -> None:
    first, second = (world.rank(number, board=LostBoard(BoardGone("lost"))) for number in (1, 2))
    held = take(second)
    for _ in range(len(UNITS) - 1):
        world.commit(first, take(first))
    world.commit(second, held)
    world.store.requests.clear()
    assert second.poll() is None
    assert world.store.requests["is_done"] <= 20
    assert world.store.requests["not_done"] <= 2
