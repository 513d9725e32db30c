"""Our launchers' care for their ranks: when one that has died is started again, and when that is of no use."""

from __future__ import annotations

import itertools
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

from streamprep.board import LocalBoard
from streamprep.config import EncodeConfig
from streamprep.errors import Stopped
from streamprep.launch import supervise as supervising
from streamprep.launch.supervise import describe_code, supervise
from streamprep.ranks import NO_ANSWER, SETTLED

FIRST_WAIT, LONGEST_WAIT = 0.1, 0.4


class Child:
    """A process that ends with a code."""

    def __init__(self, command: str) -> None:
        self._process = subprocess.Popen(["sh", "-c", command])

    def poll(self) -> int | None:
        return self._process.poll()

    def describe_end(self) -> str:
        return describe_code(self._process.returncode)

    def stop(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class Ranks:
    """Starts them, each with what its own list of commands says next, the last one for ever."""

    def __init__(self, *commands: list[str]) -> None:
        self.board = LocalBoard()
        self.started_at: list[list[float]] = [[] for _ in commands]
        self._commands: list[Iterator[str]] = [
            itertools.chain(each[:-1], itertools.repeat(each[-1])) for each in commands
        ]
        self.settles_before: Callable[[int, int], bool] = lambda rank, life: False

    def run(self, *, max_restarts: int = 100, checked: bool = True) -> int:
        if checked:
            self.board.add("checked", 1)
        config = EncodeConfig(shards="shards", out="out", model_path="model", max_restarts=max_restarts)
        return supervise(len(self._commands), self._start, self.board, config)

    def _start(self, rank: int) -> Child:
        if self.settles_before(rank, len(self.started_at[rank])):
            self.board.add(f"settled.{rank}", 1)
        self.started_at[rank].append(time.monotonic())
        return Child(next(self._commands[rank]))

    def waits(self, rank: int = 0) -> list[float]:
        return [later - one for one, later in itertools.pairwise(self.started_at[rank])]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervising, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(supervising, "_FIRST_WAIT_SECONDS", FIRST_WAIT)
    monkeypatch.setattr(supervising, "_LONGEST_WAIT_SECONDS", LONGEST_WAIT)


def test_a_rank_that_dies_without_getting_anywhere_is_started_later_each_time_and_given_up(
    capfd: pytest.CaptureFixture[str],
) -> None:
    ranks = Ranks(["exit 1"])
    assert ranks.run() == 1
    for wait, at_least in zip(ranks.waits(), (0.1, 0.2, 0.4, 0.4), strict=True):
        assert wait >= at_least
    said = capfd.readouterr().err
    assert "rank 0 failed with exit code 1; it is started again in 0.2 s, 98 restarts left" in said
    assert "for the 5th time without having ended a unit" in said


def test_one_that_gets_somewhere_is_not_given_up() -> None:
    ranks = Ranks([*["exit 1"] * 12, "exit 0"])
    ranks.settles_before = lambda rank, life: life % 2 == 1
    assert ranks.run() == 0
    assert len(ranks.started_at[0]) == 13


def test_a_store_that_does_not_answer_is_not_held_against_a_rank(capfd: pytest.CaptureFixture[str]) -> None:
    ranks = Ranks([*[f"exit {NO_ANSWER}"] * 8, *["exit 1"] * 4, "exit 0"])
    assert ranks.run(max_restarts=4) == 0
    assert all(wait >= LONGEST_WAIT for wait in ranks.waits()[2:])
    said = capfd.readouterr().err
    assert "rank 0 has had no answer from a store; it is started again in 0.1 s, 4 restarts left" in said


def test_nor_for_ever(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(supervising, "_NO_ANSWER_SECONDS", 3.0)
    began = time.monotonic()
    ranks = Ranks([f"exit {NO_ANSWER}"], [f"exit {NO_ANSWER}"])
    assert ranks.run() == 1
    assert 3.0 <= time.monotonic() - began < 10
    assert "has had no answer from a store, and no rank has ended a unit for 0 minutes" in capfd.readouterr().err


def test_that_time_begins_anew_when_any_rank_gets_somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervising, "_NO_ANSWER_SECONDS", 1.5)
    ranks = Ranks([*[f"exit {NO_ANSWER}"] * 15, "exit 0"], ["exit 1"])
    ranks.settles_before = lambda rank, life: rank == 1
    assert ranks.run() == 0
    assert len(ranks.started_at[0]) == 16 and sum(ranks.waits()) > 3


def test_a_store_that_has_never_answered_is_a_mistake(capfd: pytest.CaptureFixture[str]) -> None:
    ranks = Ranks([f"exit {NO_ANSWER}"], ["exit 0"])
    assert ranks.run(checked=False) == 1
    assert [len(starts) for starts in ranks.started_at] == [1, 0]
    assert "before anything was begun: it is not started again" in capfd.readouterr().err


@pytest.mark.parametrize("code", [1, NO_ANSWER])
def test_none_is_started_again_where_that_is_not_wanted(code: int) -> None:
    ranks = Ranks([f"exit {code}"])
    assert ranks.run(max_restarts=0) == 1
    assert len(ranks.started_at[0]) == 1


@pytest.mark.parametrize(("code", "result"), [(0, 0), (3, 3), (2, 2), (SETTLED, 1)])
def test_a_rank_that_waits_is_not_waited_for_when_another_one_knows_the_end(
    code: int, result: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervising, "_FIRST_WAIT_SECONDS", 60.0)
    monkeypatch.setattr(supervising, "_LONGEST_WAIT_SECONDS", 60.0)
    began = time.monotonic()
    ranks = Ranks([f"exit {NO_ANSWER}"], [f"sleep 0.5; exit {code}"])
    assert ranks.run() == result
    assert time.monotonic() - began < 10
    assert [len(starts) for starts in ranks.started_at] == [1, 1]


def test_a_signal_does_not_wait_for_a_rank_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervising, "_FIRST_WAIT_SECONDS", 60.0)
    monkeypatch.setattr(supervising, "_LONGEST_WAIT_SECONDS", 60.0)

    def stop(*_: object) -> None:
        raise Stopped("by the test")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    began = time.monotonic()
    try:
        with pytest.raises(Stopped):
            Ranks(["exit 1"]).run()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - began < 10
