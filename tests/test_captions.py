"""Several captions of a video, and rows without a prompt, through whole jobs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from streamprep import cli
from streamprep.encoders.wan import WanEncoder
from streamprep.plan import uniform
from streamprep.types import ClipBatch

if TYPE_CHECKING:
    from forks import Forks
    from jobs import EncodeJob

    NewJob = Callable[..., EncodeJob]

pytest_plugins = ["jobs"]

CAPTIONS = {
    "a.mp4": ["A one.", "", "A three."],
    "b.mp4": ["B."],
    "c.mp4": ["C one.", "C two."],  # cannot be decoded
    "d.mp4": ["", " "],
    "e.mp4": ["E one.", "E two."],
}
ROWS = {
    "a": ("a.mp4", "A one."),
    "a@02": ("a.mp4@02", "A three."),
    "b": ("b.mp4", "B."),
    "e": ("e.mp4", "E one."),
    "e@01": ("e.mp4@01", "E two."),
}
"""What ``--caption all`` makes of them: id and caption by key."""


@pytest.fixture(scope="module")
def captioned(
    forks: Forks,
    good_video: Callable[..., Path],
    undecodable_video: Callable[[Path], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Two units: a, b, c, d; and e."""
    root = tmp_path_factory.mktemp("captioned")
    for name in CAPTIONS:
        if name == "c.mp4":
            undecodable_video(root / "videos" / name)
        else:
            good_video(root / "videos" / name, padding_bytes=900_000 if name == "e.mp4" else 1000)
    rows = [{"path": name, "cap": captions} for name, captions in CAPTIONS.items()]
    (root / "videos2caption.json").write_text(json.dumps(rows))
    packed = forks.run("pack", root, root / "shards", "--shard-size-mb", 1, "--num-workers", 1)
    assert packed.code == 0, packed.output
    return root / "shards"


@pytest.fixture(scope="module")
def finished(
    forks: Forks, captioned: Path, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[EncodeJob, str]:
    from jobs import EncodeJob

    job = EncodeJob(forks, captioned, model, tmp_path_factory.mktemp("all") / "out")
    process = job.run(serial=True, caption="all")
    assert process.code == 0, process.output
    return job, process.output


def rows_of(job: EncodeJob) -> dict[str, dict[str, Any]]:
    """By id."""
    files = sorted((job.out / "combined_parquet_dataset").iterdir())
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def embedding_of(row: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(row["text_embedding_bytes"], np.float32).reshape(row["text_embedding_shape"])


def test_every_usable_caption_is_a_row(finished: tuple[EncodeJob, str]) -> None:
    job, _ = finished
    assert {id: row["caption"] for id, row in rows_of(job).items()} == dict(ROWS.values())
    assert {row["file_name"] for row in rows_of(job).values()} == {"a.mp4", "b.mp4", "e.mp4"}
    assert {row.key for record in job.job.records() for file in record.files for row in file.rows} == set(ROWS)
    assert job.problems() == []


def test_rows_of_one_clip_share_its_latent_and_differ_in_their_text(finished: tuple[EncodeJob, str]) -> None:
    rows = rows_of(finished[0])
    for one, other in (("a.mp4", "a.mp4@02"), ("e.mp4", "e.mp4@01")):
        assert rows[one]["vae_latent_bytes"] == rows[other]["vae_latent_bytes"]
        assert rows[one]["text_embedding_bytes"] != rows[other]["text_embedding_bytes"]
    assert rows["a.mp4"]["vae_latent_bytes"] != rows["b.mp4"]["vae_latent_bytes"]


def test_captions_that_cannot_be_used_are_listed_as_dropped(finished: tuple[EncodeJob, str]) -> None:
    job, output = finished
    dropped = {item.key: item.reason for record in job.job.records() for item in record.dropped}
    assert dropped == dict.fromkeys(("a@01", "d"), "empty_caption")
    assert "dropped 2: 2 empty_caption" in output


def test_all_captions_of_a_bad_video_are_bad(finished: tuple[EncodeJob, str]) -> None:
    job, output = finished
    bad = [clip for record in job.job.records() for clip in job.job.read_quarantine(record)]
    assert [(clip.key, clip.reason) for clip in bad] == [("c", "decode_error"), ("c@01", "decode_error")]
    assert "bad 2: 2 decode_error" in output


def test_the_plan_says_how_many_rows_and_how_large(finished: tuple[EncodeJob, str]) -> None:
    job, output = finished
    row_bytes = 4 * 16 * 2 * 4 * 6  # of a latent of 5 frames of 32 x 48
    assert f"4 clips planned in 7 rows, 2 dropped, 0 with a bad header; {7 * row_bytes / 1000:.1f} kB and" in output
    assert (job.job.plan.num_clips, job.job.plan.num_rows) == (4, 7)


def test_one_caption_for_each_clip_is_not_spoken_of_as_rows(new_job: NewJob, captioned: Path) -> None:
    process = new_job(captioned).run(serial=True)
    assert process.code == 0
    assert "4 clips planned, 1 dropped" in process.output


@pytest.mark.parametrize("point", ["data.after:1", "quarantine.after:1", "record.after:1"])
def test_a_killed_job_ends_with_the_same_bytes(
    point: str, new_job: NewJob, captioned: Path, finished: tuple[EncodeJob, str]
) -> None:
    job = new_job(captioned)
    assert job.run(serial=True, caption="all", crash_at=point).code == 137
    again = job.run(serial=True, caption="all")
    assert again.code == 0, again.output
    assert job.result() == finished[0].result()


def test_many_processes_give_the_same_bytes_as_one(
    new_job: NewJob, captioned: Path, finished: tuple[EncodeJob, str]
) -> None:
    job = new_job(captioned)
    process = job.run(caption="all")
    assert process.code == 0, process.output
    assert job.result() == finished[0].result()


def test_a_clip_is_encoded_once_however_many_captions_it_has(
    captioned: Path, tiny_model: Path, tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: Counter[str] = Counter()
    encode_batch = WanEncoder.encode_batch

    def count(self: WanEncoder, batch: ClipBatch) -> list[dict[str, torch.Tensor]]:
        encoded.update(batch.keys)
        return encode_batch(self, batch)

    monkeypatch.setattr(WanEncoder, "encode_batch", count)
    size = ["--max-height=32", "--max-width=48", "--num-frames=5", "--train-fps=1", "--encode-threads=1"]
    command = ["encode", str(captioned), str(tmp_path), "--model-path", str(tiny_model), *size, "--serial"]
    assert cli.main([*command, "--caption=all"]) == 0
    # The place of "c", whose video is bad, is filled; the two others are the self-check's.
    assert {key: number for key, number in encoded.items() if len(key) == 1} == {"a": 1, "b": 1, "e": 1}
    assert cli.main([*command, "--caption=first"]) == 2


# Rows without a prompt


def test_rows_without_a_prompt_hold_the_embedding_of_none_and_keep_their_caption(
    new_job: NewJob, captioned: Path, finished: tuple[EncodeJob, str]
) -> None:
    job = new_job(captioned)
    process = job.run(serial=True, caption="all", training_cfg_rate=0.5)
    assert process.code == 0, process.output
    assert (
        "--training-cfg-rate 0.5: the same captions stay empty for good; dropping them while training, other ones "
        "each epoch, is better"
    ) in process.output
    (uncond,) = (job.out / "_streamprep").glob("uncond-*.safetensors")
    empty = safetensors.torch.load_file(uncond)["text_embedding"].numpy()
    rows, with_prompts = rows_of(job), rows_of(finished[0])
    assert {id: row["caption"] for id, row in rows.items()} == dict(ROWS.values())
    without = {ROWS[key][0] for key in ROWS if uniform(42, key, "guidance") < 0.5}
    assert 0 < len(without) < len(rows)
    for id, row in rows.items():
        expected = empty if id in without else embedding_of(with_prompts[id])
        assert embedding_of(row).shape == expected.shape
        assert np.abs(embedding_of(row) - expected).max() < 1e-5  # it stood in another batch
        assert row["vae_latent_bytes"] == with_prompts[id]["vae_latent_bytes"]
    assert job.problems() == []


def test_no_advice_is_given_where_no_prompt_is_left_out(finished: tuple[EncodeJob, str]) -> None:
    assert "training-cfg-rate" not in finished[1]


@pytest.mark.parametrize(
    ("rate", "message"),
    [("-0.1", "at least 0, got -0.1"), ("1.5", "at most 1, got 1.5"), ("nan", "at least 0, got nan")],
)
def test_a_share_that_is_none_is_refused(
    rate: str, message: str, captioned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["encode", str(captioned), str(tmp_path / "out"), "--model-path", "unused"]
    with pytest.raises(SystemExit) as exit:
        cli.main([*command, f"--training-cfg-rate={rate}"])
    assert exit.value.code == 2
    assert f"--training-cfg-rate must be {message}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
