"""Each unit is taken by one rank and none is forgotten, whoever dies, hangs, comes late or loses the board."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from shared_board import SharedBoard

from streamprep.attempts import Attempts, Ended, LastWords, Worker, describe_end, what_happened
from streamprep.board import BoardGone, LocalBoard, LostBoard, StoreBoard, open_board
from streamprep.claims import Claims, Timing, Wait, is_to_blame
from streamprep.errors import UserError
from streamprep.ranks import this_rank
from streamprep.storage import Store, open_store

UNITS = [f"{number:06d}" for number in range(6)]
TIMING = Timing(stale_seconds=300, unmarked_seconds=60, poll_seconds=30)


@dataclass
class Done:
    """A ledger."""

    units: set[str] = field(default_factory=set)

    def is_done(self, unit: str) -> bool:
        return unit in self.units

    def not_done(self, units: Iterator[str]) -> list[str]:
        return [unit for unit in units if unit not in self.units]


@dataclass
class World:
    """Ranks that share an output, a board and a clock."""

    store: Store
    done: Done = field(default_factory=Done)
    board: LocalBoard = field(default_factory=SharedBoard)
    now: float = 0.0

    def rank(self, number: int, *, machine: str = "elsewhere", **options: object) -> Claims:
        """A rank; by default of a machine of which nobody sees the processes."""
        worker = replace(Worker.this(number), machine=machine, token=f"{number:012d}")
        options = {"name": "units", "timing": TIMING, "board": self.board} | options
        board = options.pop("board")
        attempts = Attempts(self.store, "_streamprep", worker)
        return Claims(UNITS, self.done, attempts, board, clock=lambda: self.now, **options)

    def commit(self, rank: Claims, unit: str) -> None:
        self.done.units.add(unit)
        rank.finished(unit)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(open_store(tmp_path))


def take(rank: Claims) -> str:
    unit = rank.poll()
    assert isinstance(unit, str), unit
    return unit


def finish(world: World, rank: Claims) -> list[str]:
    """Take and commit whatever can be had, waiting as told."""
    units = []
    while (answer := rank.poll()) is not None:
        if isinstance(answer, Wait):
            world.now += answer.seconds
            assert world.now < 10_000
        else:
            units.append(answer)
            world.commit(rank, answer)
    return units


def dead_process() -> Worker:
    """One of this machine that has ended: the process that has its number now began later."""
    return replace(Worker.this(7), started="1")


# --- counting


def test_ranks_take_each_unit_once_and_leave_when_all_are_done(world: World) -> None:
    first, second = world.rank(0), world.rank(1)
    taken = []
    for rank in (first, second, second, first, second, first):
        taken.append(take(rank))
        world.commit(rank, taken[-1])
    assert taken == UNITS
    assert first.poll() is None
    assert second.poll() is None
    assert world.now == 0


def test_what_is_done_or_somebody_elses_is_passed_over(world: World) -> None:
    world.done.units = set(UNITS[:2])
    other = world.rank(1, board=LocalBoard())
    assert take(other) == UNITS[2]
    assert take(world.rank(0)) == UNITS[3]


def test_a_rank_holds_one_unit_ahead_and_more_only_if_they_are_small(world: World) -> None:
    sizes = dict(zip(UNITS, (9, 2, 2, 9, 1, 1), strict=True))
    rank = world.rank(0, sizes=sizes, ahead=4)
    assert [take(rank) for _ in range(3)] == UNITS[:3]
    assert rank.poll() == Wait(30)
    world.commit(rank, UNITS[0])
    assert take(rank) == UNITS[3]
    assert rank.poll() == Wait(30)


def test_commands_without_a_board_share_the_units_too(world: World) -> None:
    first, second = world.rank(0, board=LocalBoard()), world.rank(1, board=LocalBoard())
    assert [take(first), take(second), take(first), take(second)] == UNITS[:4]
    for rank, unit in ((first, UNITS[0]), (second, UNITS[1]), (first, UNITS[2]), (second, UNITS[3])):
        world.commit(rank, unit)
    assert finish(world, first) + finish(world, second) == UNITS[4:]


# --- what others leave


def test_a_unit_of_another_machine_is_waited_for_before_it_is_taken_again(world: World) -> None:
    lost, rank = world.rank(1), world.rank(0)
    unit = take(lost)
    assert sorted(finish(world, rank)) == UNITS
    assert world.now >= TIMING.stale_seconds
    assert unit == UNITS[0]


def test_the_wait_is_three_times_the_slowest_unit_if_that_is_longer(world: World) -> None:
    lost, rank = world.rank(1), world.rank(0)
    take(lost)
    slow = take(rank)
    world.now = 1000.0
    world.commit(rank, slow)
    finish(world, rank)
    assert 3000 <= world.now < 3100


def test_a_unit_that_ends_while_it_is_waited_for_is_not_taken(world: World) -> None:
    slow, rank = world.rank(1), world.rank(0)
    unit = take(slow)
    for other in UNITS[1:]:
        assert take(rank) == other
        world.commit(rank, other)
    assert rank.poll() == Wait(30)
    world.commit(slow, unit)
    assert rank.poll() is None


def test_a_unit_that_was_counted_and_never_begun_is_taken_after_a_minute(world: World) -> None:
    world.board.add("units.claimed", 1)
    assert sorted(finish(world, world.rank(0))) == UNITS
    assert 60 <= world.now < 120


def test_a_unit_of_a_dead_process_of_this_machine_is_taken_last_and_at_once(world: World) -> None:
    dead = dead_process()
    Attempts(world.store, "_streamprep", dead).begin(UNITS[0], alone=False)
    rank = world.rank(0, machine=dead.machine)
    assert finish(world, rank) == UNITS[1:] + UNITS[:1]
    assert world.now == 0


def test_a_unit_that_was_let_go_is_taken_in_its_turn(world: World) -> None:
    with world.rank(1, board=LocalBoard()) as stopped:
        take(stopped)
    assert finish(world, world.rank(0)) == UNITS


def test_at_the_end_a_rank_takes_one_unit_at_a_time(world: World) -> None:
    dead = dead_process()
    attempts = Attempts(world.store, "_streamprep", dead)
    for unit in UNITS[:2]:
        attempts.begin(unit, alone=False)
    rank = world.rank(0, machine=dead.machine, sizes=dict.fromkeys(UNITS, 1), ahead=100)
    for _ in UNITS[2:]:
        world.commit(rank, take(rank))
    held = take(rank)
    assert isinstance(rank.poll(), Wait)
    world.commit(rank, held)
    assert take(rank) in set(UNITS[:2]) - {held}


# --- the board


class DyingBoard(SharedBoard):
    """It answers three times."""

    def add(self, name: str, amount: int) -> int:
        if name.endswith("claimed") and super().add("answers", 1) > 3:
            raise BoardGone("the node has left")
        return super().add(name, amount)


@pytest.mark.parametrize("board", [DyingBoard(), LostBoard(BoardGone("nobody listens"))], ids=["dies", "never there"])
def test_without_the_board_ranks_go_on_by_the_records(world: World, board: SharedBoard) -> None:
    world.board = board
    first, second = world.rank(0, seed=1), world.rank(1, seed=2)
    taken = []
    while not taken or None not in taken[-2:]:
        for rank in (first, second):
            unit = rank.poll()
            if isinstance(unit, str):
                world.commit(rank, unit)
            elif unit is not None:
                world.now += unit.seconds
            taken.append(unit)
    assert sorted(unit for unit in taken if isinstance(unit, str)) == UNITS
    assert isinstance(first.board_lost, BoardGone)


def test_a_store_of_torch_is_a_board_until_it_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys; from torch.distributed import TCPStore; s = TCPStore('127.0.0.1', 0, is_master=True, "
        "wait_for_workers=False); print(s.port, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        for name, value in {
            "RANK": "1",
            "WORLD_SIZE": "3",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": server.stdout.readline().decode().strip(),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }.items():
            monkeypatch.setenv(name, value)
        first, second = open_board(this_rank()), open_board(this_rank())
        assert isinstance(first, StoreBoard)
        assert [first.add("n", 2), second.add("n", 3), first.add("n", 0)] == [2, 5, 5]
        first.tell(0, b"early")
        first.tell(0, b'{"a":1}')
        second.tell(2, b"two")
        assert second.told() == {0: b'{"a":1}', 2: b"two"}
        server.kill()
        server.wait()
        for _ in range(2):
            with pytest.raises(BoardGone):
                first.add("n", 1)
    assert isinstance(open_board(this_rank(), timeout_seconds=1), LostBoard)


# --- who kills


def test_an_error_is_the_first_open_units_and_the_second_one_sets_it_aside(world: World) -> None:
    dead = []
    for number in (0, 1):
        rank = world.rank(number, board=LocalBoard())
        with pytest.raises(ZeroDivisionError), rank:
            for unit in rank:
                if unit == UNITS[1]:
                    if number == 0:
                        take(rank)  # ahead, and not at fault
                    raise ZeroDivisionError("cannot encode this")
                world.commit(rank, unit)
        dead.append(rank)
    assert world.done.units == {unit for unit in UNITS if unit != UNITS[1]}
    attempts = Attempts(world.store, "_streamprep", Worker.this())
    assert list(attempts.failed()) == [UNITS[1]]
    evidence = attempts.failed()[UNITS[1]]
    assert len(evidence) == 2
    assert all(one.ended and "ZeroDivisionError: cannot encode this" in one.ended.traceback for one in evidence)
    assert finish(world, world.rank(2)) == []

    attempts.forget([UNITS[1]])
    assert finish(world, world.rank(3, board=LocalBoard())) == [UNITS[1]]


@pytest.mark.parametrize(
    "error", [UserError("no"), OSError(28, "No space left on device"), KeyboardInterrupt(), SystemExit(1)]
)
def test_what_is_not_the_units_fault_is_not_held_against_it(error: BaseException) -> None:
    assert not is_to_blame(error)


def test_trouble_of_the_machine_counts_less_than_an_error() -> None:
    import torch

    assert what_happened(torch.OutOfMemoryError("CUDA out of memory")).how == "machine"
    assert what_happened(ValueError("x")).how == "exception"


def die_at(world: World, unit: str, *, alone: bool) -> None:
    Attempts(world.store, "_streamprep", dead_process()).begin(unit, alone=alone)


def test_a_unit_is_set_aside_when_it_was_five_times_the_only_one_of_a_process_that_vanished(world: World) -> None:
    attempts = Attempts(world.store, "_streamprep", Worker.this())
    for _ in range(5):
        die_at(world, UNITS[0], alone=False)  # killed while it had others at hand
    attempts.conclude(attempts.of(UNITS[0]))
    for number in range(5):
        assert not attempts.is_failed(UNITS[0]), number
        die_at(world, UNITS[0], alone=True)
        attempts.conclude(attempts.of(UNITS[0]))
    assert attempts.is_failed(UNITS[0])
    last = attempts.failed()[UNITS[0]][-1].ended
    assert last is not None
    assert "killed" in describe_end(last)


def test_a_crash_leaves_its_stack(world: World) -> None:
    code = (
        "import json, dataclasses, os, signal; from streamprep.attempts import *\n"
        "worker = Worker.this(); print(json.dumps(dataclasses.asdict(worker)), flush=True)\n"
        "def at_fault(): os.kill(os.getpid(), signal.SIGSEGV)\n"
        "with LastWords(worker): at_fault()"
    )
    crashed = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert crashed.returncode == -signal.SIGSEGV
    attempts = Attempts(world.store, "_streamprep", Worker.this())
    Attempts(world.store, "_streamprep", Worker(**json.loads(crashed.stdout))).begin(UNITS[0], alone=False)
    (concluded,) = attempts.conclude(attempts.of(UNITS[0]))
    assert concluded.ended is not None
    assert concluded.ended.how == "signal"
    assert concluded.ended.message == "Fatal Python error: Segmentation fault"
    assert "at_fault" in concluded.ended.traceback


def test_an_end_that_the_store_does_not_take_is_not_taken_for_a_silent_one(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five silent deaths set a unit aside; a full disk must not."""
    dead = dead_process()
    theirs, ours = (Attempts(world.store, "_streamprep", worker) for worker in (dead, Worker.this()))
    attempt = theirs.begin(UNITS[0], alone=True)
    with monkeypatch.context() as patch:
        patch.setattr(type(world.store), "put", no_room)
        with pytest.raises(OSError, match="No space left"):
            theirs.end(attempt, Ended(how="stopped"))
    (concluded,) = ours.conclude(ours.of(UNITS[0]))
    assert concluded.ended is not None
    assert concluded.ended.how == "stopped"


def no_room(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_a_process_said_before_it_ended_is_not_overwritten(world: World) -> None:
    """Another one has seen its mark, and then that it is gone."""
    dead = dead_process()
    theirs, ours = (Attempts(world.store, "_streamprep", worker) for worker in (dead, Worker.this()))
    told, done = theirs.begin(UNITS[0], alone=True), theirs.begin(UNITS[1], alone=True)
    seen = [*ours.of(UNITS[0]), *ours.of(UNITS[1])]
    theirs.end(told, Ended(how="exception", message="ValueError: x"))
    theirs.withdraw(done)
    (concluded,) = ours.conclude(seen)
    assert concluded.ended == Ended(how="exception", message="ValueError: x")
    assert ours.of(UNITS[1]) == []


def test_last_words_leave_nothing_behind_if_all_goes_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import faulthandler
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    was_enabled = faulthandler.is_enabled()
    faulthandler.disable()
    try:
        with LastWords(Worker.this()):
            assert len(list(tmp_path.iterdir())) == 1
        assert list(tmp_path.iterdir()) == []
    finally:
        if was_enabled:
            faulthandler.enable()


def test_a_living_process_is_not_taken_for_a_dead_one_nor_a_later_one_of_its_number() -> None:
    me = Worker.this()
    assert not me.is_gone(seen_by=me)
    assert replace(me, started="1").is_gone(seen_by=me)
    assert not replace(me, started="1", machine="elsewhere").is_gone(seen_by=me)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert replace(me, pid=child).is_gone(seen_by=me)  # a zombie does nothing more
    os.waitpid(child, 0)


def test_a_file_that_is_no_attempt_of_ours_is_passed_over(world: World, tmp_path: Path) -> None:
    (tmp_path / "_streamprep/attempts").mkdir(parents=True)
    (tmp_path / "_streamprep/attempts/.nfs0001").write_text("x")
    assert finish(world, world.rank(0)) == UNITS


def test_many_ranks_that_die_anywhere_finish_all_units(world: World) -> None:
    """Each of 40 ranks does a unit or two, then is gone without a word; the last one does what they left."""
    from random import Random

    random = Random(0)
    make: Callable[[int], Claims] = lambda number: world.rank(number, seed=number)  # noqa: E731
    for number in range(40):
        rank = make(number)
        for _ in range(random.randint(0, 2)):
            unit = rank.poll()
            if isinstance(unit, str) and random.random() < 0.5:
                world.commit(rank, unit)
    finish(world, make(99))
    assert world.done.units == set(UNITS)


def test_ends_are_told_in_words() -> None:
    assert describe_end(Ended(how="exception", message="ValueError: x")) == "failed: ValueError: x"
