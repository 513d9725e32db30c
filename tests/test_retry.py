"""What was bad and is not any more becomes a row, once; whatever is killed, whenever, and however often it is tried."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import pytest
from quick_cases import mostly_slow

from exporters import fastvideo
from streamprep import job
from streamprep.cli import main
from streamprep.crashpoints import RETRY_STEPS
from streamprep.finalize import totals
from streamprep.job_plan import Round, Unit
from streamprep.manifest import load_index, load_manifest
from streamprep.storage import open_store

if TYPE_CHECKING:
    from forks import Forks
    from jobs import EncodeJob

    Undisturbed = Callable[[Path], EncodeJob]

pytest_plugins = ["jobs"]

CRASHED = 137
SMALL_PADDING = 66_000
"""Sixteen videos fill a shard."""


def job_on(*where: Any) -> EncodeJob:
    from jobs import EncodeJob

    return EncodeJob(*where)


def rows_of(encoded: EncodeJob) -> dict[str, dict[str, Any]]:
    """The tensors of every row, by id; each is there once."""
    read = [
        row
        for record in encoded.job.records()
        for file in record.files
        for row in fastvideo.read_file(encoded.job.store, file.name)
    ]
    assert len(dict(read)) == len(read)
    return dict(read)


def assert_same_rows(encoded: EncodeJob, expected: EncodeJob) -> None:
    """Latents bit for bit; embeddings but for what they are padded to."""
    found, wanted = rows_of(encoded), rows_of(expected)
    assert found.keys() == wanted.keys()
    for name, tensors in wanted.items():
        assert np.array_equal(found[name]["vae_latent"], tensors["vae_latent"])
        np.testing.assert_allclose(found[name]["text_embedding"], tensors["text_embedding"], atol=1e-5)


def status_of(encoded: EncodeJob, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    capsys.readouterr()
    code = main(["status", str(encoded.out)])
    return code, capsys.readouterr().out.splitlines()


# --- larger limits


@pytest.fixture(scope="session")
def demanding(make_shards: Callable[..., Path], make_video: Callable[..., Path], good_video: Any) -> Path:
    """Two units: one that is small, one of 4K, one that is no video; one that is slow."""
    from jobs import write_no_video, write_slow_video

    return make_shards(
        {
            "a.mp4": good_video,
            "large.mp4": lambda path: make_video(path, size=(3840, 2160), fps=1, num_frames=5),
            "no.mp4": write_no_video,
            "slow.mp4": write_slow_video,
        }
    )


@pytest.mark.parametrize(
    ("reason", "key", "tight", "ample"),
    [
        pytest.param(
            "decoder_memory", "large", {"decode_memory_mb": 48}, {"decode_memory_mb": 4096}, marks=pytest.mark.slow
        ),
        ("decoder_timeout", "slow", {"decode_timeout": 0.3}, {"decode_timeout": 100}),
    ],
)
def test_a_clip_that_met_a_limit_is_encoded_under_a_larger_one(
    new_job: Callable[..., EncodeJob],
    undisturbed: Undisturbed,
    demanding: Path,
    reason: str,
    key: str,
    tight: dict[str, Any],
    ample: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    encoded = new_job(demanding)
    assert encoded.run(num_workers=2, **tight).code == 0
    before = totals(encoded.job)
    assert before.bad[reason] >= 1  # under a tight time limit a busy machine may fail another
    assert key in {clip.key for clip in encoded.job.bad_clips().values() if clip.reason == reason}

    retried = encoded.retry(reason=reason, **ample)
    assert retried.code == 0, retried.output
    number = before.bad[reason]
    assert f"r1: {number} sample{'s' * (number > 1)} again ({number} {reason}): {number} encoded\n" in retried.output
    after = totals(encoded.job)
    assert after.num_rows == before.num_rows + number
    assert after.bad == {name: count for name, count in before.bad.items() if name != reason}
    assert encoded.problems() == []
    assert_same_rows(encoded, undisturbed(demanding))

    files = encoded.files()
    again = encoded.retry(reason=reason)
    assert again.code == 0
    assert "nothing to retry for that\n" in again.output
    assert encoded.files() == files
    code, lines = status_of(encoded, capsys)
    assert code == 0
    assert any(line.startswith("retry    r1: ") for line in lines)
    assert lines[-1] == "state    done"


# --- a damaged shard that is repaired


class Damaged:
    """Shards of which the bytes of some videos were changed, and how to change them back."""

    def __init__(self, shards: Path, keys: set[str]) -> None:
        self.shards = shards
        store = open_store(shards)
        self._before: list[tuple[Path, int, bytes]] = []
        for info in load_manifest(store).shards:
            for sample in load_index(store, info).samples:
                if sample.key in keys:
                    path, offset = shards / info.name, sample.video.offset + sample.video.size // 2
                    self._before.append((path, offset, self._flip(path, offset)))
        assert len(self._before) == len(keys)

    def repair(self) -> None:
        for path, offset, before in self._before:
            with open(path, "r+b") as file:
                file.seek(offset)
                file.write(before)

    def _flip(self, path: Path, offset: int) -> bytes:
        with open(path, "r+b") as file:
            file.seek(offset)
            before = file.read(16)
            file.seek(offset)
            file.write(bytes(255 - byte for byte in before))
        return before


@pytest.fixture
def damaged(shards: Path, tmp_path: Path) -> Damaged:
    """Of `jobs.shards`, three videos in two units are damaged; a1 can never be decoded, a4 and c0 are no videos."""
    return Damaged(shutil.copytree(shards, tmp_path / "shards"), {"a0", "a3", "b1"})


@pytest.fixture
def repaired(damaged: Damaged, new_job: Callable[..., EncodeJob]) -> EncodeJob:
    """A job that met damaged videos, which are whole now."""
    encoded = new_job(damaged.shards)
    ended = encoded.run(serial=True)
    assert ended.code == 0, ended.output
    assert totals(encoded.job).bad == {"digest_mismatch": 3, "probe_failed": 2, "decode_error": 1}
    damaged.repair()
    return encoded


def test_what_a_repaired_shard_holds_is_encoded_and_what_is_broken_stays_bad(
    repaired: EncodeJob, undisturbed: Undisturbed, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    retried = repaired.retry(serial=True)
    assert retried.code == 0, retried.output
    assert "retry r1: 4 bad samples (3 digest_mismatch, 1 decode_error) of 2 shards, 0 done\n" in retried.output
    assert (
        "r1: 4 samples again (3 digest_mismatch, 1 decode_error): 3 encoded, still bad: 1 decode_error\n"
        "bad from their headers, for good unless they are packed again: 2 probe_failed\n"
        "8 rows, "
    ) in retried.output
    assert_same_rows(repaired, undisturbed(shards))
    assert totals(repaired.job).bad == totals(undisturbed(shards).job).bad
    assert repaired.problems() == []
    success = json.loads((repaired.out / job.SUCCESS).read_bytes())
    assert (success["num_rows"], success["bad"]) == (8, {"probe_failed": 2, "decode_error": 1})
    code, lines = status_of(repaired, capsys)
    assert code == 0
    assert any(line.startswith("bad      1 decode_error: a1 (") for line in lines)
    assert not any("digest_mismatch" in line for line in lines if line.startswith("bad"))
    assert repaired.run(serial=True).code == 0, "what is done is done"


def test_what_stays_bad_may_be_tried_again_and_is_bad_once(repaired: EncodeJob) -> None:
    for number in (1, 2, 3):
        retried = repaired.retry(serial=True)
        assert retried.code == 0
        assert f"r{number}: " in retried.output
        assert totals(repaired.job).bad == {"probe_failed": 2, "decode_error": 1}
        assert repaired.problems() == []
    assert [len(one.units) for one in repaired.job.rounds()] == [2, 1, 1]


def test_only_those_of_a_reason_are_tried(repaired: EncodeJob) -> None:
    retried = repaired.retry(serial=True, reason="decode_error")
    assert retried.code == 0
    assert totals(repaired.job).bad == {"digest_mismatch": 3, "probe_failed": 2, "decode_error": 1}
    assert repaired.problems() == []
    for_good = repaired.retry(reason="probe_failed")
    assert for_good.code == 0
    assert "nothing to retry for that\nbad from their headers, for good unless" in for_good.output


def test_a_clip_with_several_captions_is_encoded_once_for_all_its_rows(
    make_video: Callable[..., Path], model: Path, forks: Forks, tmp_path: Path
) -> None:
    rows = [{"path": f"{name}.mp4", "cap": [f"{name} one", "", f"{name} three"]} for name in "ab"]
    for number, row in enumerate(rows):
        make_video(tmp_path / "data/videos" / str(row["path"]), fps=1, seed=number)
    (tmp_path / "data/videos2caption.json").write_text(json.dumps(rows))
    assert main(["pack", str(tmp_path / "data"), str(tmp_path / "shards"), "--num-workers", "1"]) == 0
    shards = Damaged(tmp_path / "shards", {"b"})
    encoded = job_on(forks, shards.shards, model, tmp_path / "out")
    assert encoded.run(serial=True, caption="all").code == 0
    assert totals(encoded.job).bad == {"digest_mismatch": 2}
    shards.repair()
    assert encoded.retry(serial=True).code == 0
    assert set(rows_of(encoded)) == {"a.mp4", "a.mp4@02", "b.mp4", "b.mp4@02"}
    assert totals(encoded.job).bad == {}
    assert encoded.problems() == []


def write_black_video(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(5):
            frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_a_filter_may_leave_out_what_was_bad(
    make_shards: Callable[..., Path], good_video: Any, new_job: Callable[..., EncodeJob]
) -> None:
    shards = Damaged(make_shards({"a.mp4": good_video, "b.mp4": write_black_video, "c.mp4": good_video}), {"a", "b"})
    encoded = new_job(shards.shards)
    assert encoded.run(serial=True, filters="black").code == 0
    shards.repair()
    retried = encoded.retry(serial=True)
    assert retried.code == 0, retried.output
    assert "r1: 2 samples again (2 digest_mismatch): 1 encoded, 1 dropped\n" in retried.output
    after = totals(encoded.job)
    assert (after.num_rows, after.bad, after.dropped) == (2, {}, {"filter:black": 1})
    assert encoded.problems() == []


# --- killed


PASSES = {"data": (1, 2), "record": (1, 2)}
KILLS = [
    f"{step}{moment}:{number}"
    for step in (*RETRY_STEPS, "data", "quarantine", "record", "delete", "index", "success")
    for moment in ("", ".after")
    for number in PASSES.get(step, (1,))
    if step + moment != "success.after"  # it has ended, and what is bad would be tried once more
]
QUICK_KILLS = [kill for kill in KILLS if kill.startswith((*RETRY_STEPS, "record.after"))]
"""What a retry does that no other command does."""


@pytest.fixture(scope="module")
def unkilled(forks: Forks, shards: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> EncodeJob:
    """A job that was retried in one go."""
    root = tmp_path_factory.mktemp("unkilled")
    damaged = Damaged(shutil.copytree(shards, root / "shards"), {"a0", "a3", "b1"})
    encoded = job_on(forks, damaged.shards, model, root / "out")
    assert encoded.run(serial=True).code == 0
    shutil.copytree(root / "out", root / "before")
    damaged.repair()
    assert encoded.retry(serial=True).code == 0
    return encoded


@pytest.fixture
def before_retry(unkilled: EncodeJob, forks: Forks, model: Path, tmp_path: Path) -> EncodeJob:
    """The same job as it was before."""
    out = shutil.copytree(unkilled.out.parent / "before", tmp_path / "out")
    return job_on(forks, unkilled.out.parent / "shards", model, out)


def assert_ends_like(expected: EncodeJob, encoded: EncodeJob, **flags: object) -> None:
    ended = encoded.retry(**flags)
    assert ended.code == 0, ended.output
    assert encoded.result() == expected.result()
    assert encoded.problems() == []


@pytest.mark.parametrize("point", mostly_slow(KILLS, quick=QUICK_KILLS))
def test_a_retry_killed_at_a_durable_step_ends_as_if_it_had_not_been(
    before_retry: EncodeJob, unkilled: EncodeJob, point: str
) -> None:
    (before_retry.out / fastvideo.FOLDER / "000000.r1-00000-0123abcd.parquet").write_bytes(b"of one that was killed")
    assert before_retry.retry(serial=True, crash_at=point).code == CRASHED
    assert_ends_like(unkilled, before_retry, serial=True)


@pytest.mark.slow
def test_a_retry_killed_while_it_decodes_goes_on(before_retry: EncodeJob, unkilled: EncodeJob) -> None:
    process = before_retry.start_retry(num_workers=2)
    process.wait_for(lambda: process.decode_children())
    process.kill(group=True)
    process.wait()
    process.wait_until_all_gone(seconds=60)
    assert_ends_like(unkilled, before_retry, num_workers=2)


def test_two_retries_at_once_encode_each_sample_once(before_retry: EncodeJob, unkilled: EncodeJob) -> None:
    first, second = before_retry.start_retry(serial=True), before_retry.start_retry(serial=True)
    assert (first.wait(), second.wait()) == (0, 0), first.output + second.output
    if len(before_retry.job.rounds()) == 1:  # else the second began when the first had ended
        assert before_retry.result() == unkilled.result()
    assert before_retry.problems() == []
    assert totals(before_retry.job).bad == {"probe_failed": 2, "decode_error": 1}


def test_a_retry_that_is_not_finished_is_seen_and_comes_before_another(
    before_retry: EncodeJob, capsys: pytest.CaptureFixture[str]
) -> None:
    assert before_retry.retry(serial=True, reason="digest_mismatch", crash_at="record.after:1").code == CRASHED
    code, lines = status_of(before_retry, capsys)
    assert code == 4
    assert "retry    r1: 3 samples again (3 digest_mismatch), 1 of 2 units done: " in "\n".join(lines)
    assert lines[-1] == "state    retry r1 unfinished: run `streamprep retry` again to go on"
    assert "1 of 2 units of retry r1 are not encoded yet: run `streamprep retry` again" in before_retry.problems()
    refused = before_retry.retry(serial=True, reason="decode_error")
    assert refused.code == 2
    assert f"r1 is not finished: run `streamprep retry {before_retry.out} --reason digest_mismatch`" in refused.output
    assert before_retry.retry(serial=True, reason="digest_mismatch").code == 0
    assert before_retry.problems() == []


# --- a job that was stopped


def test_a_job_all_of_whose_samples_were_bad_ends_when_they_are_repaired(
    make_shards: Callable[..., Path], good_video: Any, new_job: Callable[..., EncodeJob]
) -> None:
    shards = Damaged(make_shards({"a.mp4": good_video}), {"a"})
    encoded = new_job(shards.shards)
    stopped = encoded.run(serial=True)
    assert stopped.code == 3
    assert "`streamprep retry OUT` tries them again" in stopped.output
    still = encoded.retry(serial=True)
    assert still.code == 3
    assert "r1: 1 sample again (1 digest_mismatch): 0 encoded, still bad: 1 digest_mismatch\n" in still.output
    assert "all 1 samples are bad: nothing was encoded (digest_mismatch 1)" in still.output
    shards.repair()
    assert encoded.retry(serial=True).code == 0
    assert (totals(encoded.job).num_rows, totals(encoded.job).bad) == (1, {})
    assert encoded.job.stop_reason() is None
    assert encoded.problems() == []
    assert main(["status", str(encoded.out)]) == 0


@pytest.fixture
def mostly_damaged(make_shards: Callable[..., Path], good_video: Any) -> Damaged:
    """Two units of 15 videos, of which one is whole."""
    write = functools.partial(good_video, padding_bytes=SMALL_PADDING)
    shards = make_shards({f"{unit}{number:02d}.mp4": write for unit in "ab" for number in range(15)})
    assert len(load_manifest(open_store(shards)).shards) == 2
    return Damaged(shards, {f"{unit}{number:02d}" for unit in "ab" for number in range(1, 15)})


def test_a_job_stopped_in_its_middle_goes_on_after_a_retry(
    mostly_damaged: Damaged, new_job: Callable[..., EncodeJob], capsys: pytest.CaptureFixture[str]
) -> None:
    encoded = new_job(mostly_damaged.shards)
    assert encoded.run(serial=True).code == 3
    assert encoded.num_records() == 1
    mostly_damaged.repair()
    assert encoded.run(serial=True).code == 3, "it was stopped"
    retried = encoded.retry(serial=True)
    assert retried.code == 4
    assert "r1: 14 samples again (14 digest_mismatch): 14 encoded\n" in retried.output
    assert "1 unit not encoded yet: run the same `streamprep encode` again to go on\n" in retried.output
    assert status_of(encoded, capsys)[0] == 4
    assert encoded.run(serial=True).code == 0
    assert (totals(encoded.job).num_rows, totals(encoded.job).bad) == (30, {})
    assert encoded.problems() == []


def test_a_job_stopped_for_many_bad_samples_ends_when_more_are_allowed(
    mostly_damaged: Damaged, new_job: Callable[..., EncodeJob]
) -> None:
    encoded = new_job(mostly_damaged.shards)
    assert encoded.run(serial=True, max_bad_fraction=1).code == 0
    assert encoded.retry(serial=True).code == 0, "it was not stopped"
    assert totals(encoded.job).bad == {"digest_mismatch": 28}
    assert encoded.problems() == []


# --- what is refused, and what verify finds


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"reason": "bad_luck"}, "--reason bad_luck: there is no such reason; one of read_error, "),
        ({"decode_timeout": 0}, "--decode-timeout must be above 0, got 0"),
        ({"max_bad_fraction": 2}, "--max-bad-fraction must be at most 1, got 2"),
        ({"model_path": "nowhere"}, "nowhere"),
        ({"shards": "nowhere"}, "nowhere holds no shards"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_refused_before_anything_is_encoded(
    before_retry: EncodeJob, flags: dict[str, Any], message: str
) -> None:
    refused = before_retry.retry(serial=True, **flags)
    assert refused.code == 2
    assert message in refused.output
    assert before_retry.num_records() == 4


def test_another_model_is_refused_by_what_differs(before_retry: EncodeJob, make_model: Callable[[int], Path]) -> None:
    refused = before_retry.retry(serial=True, model_path=make_model(1))
    assert refused.code == 2
    assert "text.sha256: " in refused.output
    assert before_retry.num_records() == 4


def test_shards_that_were_moved_are_named_anew(before_retry: EncodeJob, tmp_path: Path) -> None:
    plan = json.loads((before_retry.out / job.PLAN).read_bytes())
    moved = shutil.copytree(plan["shards"], tmp_path / "moved")
    (before_retry.out / job.PLAN).write_text(json.dumps(plan | {"shards": str(tmp_path / "gone")}))
    assert before_retry.retry(serial=True).code == 2
    assert before_retry.retry(serial=True, shards=moved).code == 0
    assert totals(before_retry.job).num_rows == 8


def change_a_reason(encoded: EncodeJob) -> None:
    path = encoded.out / job.RECORDS / "000000.r1.json"
    path.write_text(path.read_text().replace('"retried":{"decode_error":1', '"retried":{"truncated":1'))


def make_the_original_again_without_its_bad(encoded: EncodeJob) -> None:
    record = encoded.job.record("000001")
    assert record is not None
    (encoded.out / job.RECORDS / "000001.json").write_bytes(
        dataclasses.replace(record, bad={}, quarantine=None).to_json()
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            change_a_reason,
            "unit 000000.r1: retries samples as {'truncated': 1, 'digest_mismatch': 2}, before they were",
        ),
        (make_the_original_again_without_its_bad, "unit 000001.r1: retries samples as {'digest_mismatch': 1}, before"),
    ],
)
def test_verify_finds_a_retry_of_what_was_not_bad(
    unkilled: EncodeJob, tmp_path: Path, damage: Callable[[EncodeJob], None], message: str
) -> None:
    copied = job_on(None, tmp_path, tmp_path, shutil.copytree(unkilled.out, tmp_path / "out"))
    assert copied.problems() == []
    damage(copied)
    assert any(problem.startswith(message) for problem in copied.problems()), copied.problems()


def test_a_round_is_read_back_as_it_was_written(unkilled: EncodeJob) -> None:
    (one,) = unkilled.job.rounds()
    assert Round.from_json(one.to_json()) == one
    assert all(isinstance(unit, Unit) and unit.original == unit.id[:6] for unit in one.units)
    with pytest.raises(ValueError, match="not a retry of format streamprep-retry/1"):
        Round.from_json(b"{}")
