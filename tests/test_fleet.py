"""What rank 0 says of all ranks, and what each rank's log holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from shared_board import SharedBoard

from streamprep.attempts import Worker
from streamprep.board import Board, BoardGone
from streamprep.fleet import Fleet, _Seen, describe_ranks, find_bottleneck
from streamprep.progress import Progress
from streamprep.ranklog import RankLog
from streamprep.ranks import Rank


def seen(rate: float, *, changed: float = 100.0, units: tuple[str, ...] = ("000001",), **waits: float) -> _Seen:
    note = {"units": list(units), "clips": round(10 * rate), "host": "node7", "waits": waits}
    return _Seen(note, changed, rate)


def test_ranks_that_are_slow_or_silent_are_named_and_idle_ones_are_not() -> None:
    ranks = {0: seen(4.0), 1: seen(4.0), 2: seen(1.0), 3: seen(4.0, changed=10.0), 4: seen(0.1, units=())}
    assert describe_ranks(ranks, 100.0, 8) == ["5 of 8 ranks", "silent: 3 (node7)", "slow: 2 (node7)"]


@pytest.mark.parametrize(
    ("waits", "stage"),
    [
        ([], None),
        ([{"encode": 9.0, "decode": 0.5, "write": 0.5}], "encode"),
        ([{"encode": 5.0, "decode": 4.0, "write": 1.0}, {"encode": 9.0, "decode": 1.0, "write": 0.0}], "decode"),
        ([{"encode": 5.0, "decode": 3.0, "write": 6.0}], "write"),
    ],
)
def test_the_bottleneck_is_what_the_encoders_wait_for(waits: list[dict[str, float]], stage: str | None) -> None:
    assert find_bottleneck(waits) == stage


def make_fleet(board: Board, rank: int, tmp_path: Path) -> Fleet:
    worker = Worker.this(rank)
    progress = Progress(total=100, unit="clips", verb="encoding", quiet=rank != 0)
    return Fleet(
        board, Rank(number=rank, world_size=2), worker, RankLog(tmp_path, worker), progress, lambda: ["000001"]
    )


def test_rank_0_counts_what_all_have_done_in_this_run_and_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamprep import progress

    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", -1.0)
    board = SharedBoard()
    first, second = make_fleet(board, 0, tmp_path), make_fleet(board, 1, tmp_path)
    for fleet in (first, second):
        fleet.begin(30)
    second.encoded(5)
    second._tell_and_show()
    assert capsys.readouterr().err == ""
    first._tell_and_show()
    assert "encoding 35/100 clips" in capsys.readouterr().err


def test_without_its_board_rank_0_says_so_once_and_shows_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Gone(SharedBoard):
        def tell(self, rank: int, note: bytes) -> None:
            raise BoardGone("Connection reset by peer")

    fleet = make_fleet(Gone(), 0, tmp_path)
    for _ in range(2):
        fleet._tell_and_show()
    fleet.encoded(7)
    assert capsys.readouterr().err.count("the ranks' board is gone (Connection reset by peer)") == 1
    assert fleet.progress._done == 7


def test_a_log_is_json_lines_and_not_there_before_there_is_work(tmp_path: Path) -> None:
    with RankLog(tmp_path / "logs", Worker.this(3)) as log:
        log.event("start", host="node7")
        assert not (tmp_path / "logs").exists()
        log.begin()
        log.event("claimed", unit="000001")
    log.event("late")
    (path,) = (tmp_path / "logs").iterdir()
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(event["event"], event["rank"]) for event in events] == [("start", 3), ("claimed", 3)]
    assert path.name.startswith("rank-0003-")


def test_a_log_that_cannot_be_written_ends_and_the_job_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RankLog(tmp_path, Worker.this()) as log:
        log.begin()
        assert log._file is not None
        log._file.close()
        log._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
        for _ in range(2):
            log.event("claimed")
    assert capsys.readouterr().err.count("No space left on device") == 1
