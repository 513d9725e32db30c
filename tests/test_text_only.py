"""Captions alone: lists of prompts, shards without videos, and jobs that never look at one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
import pytest
from fastvideo_schemas import SCHEMAS

from streamprep import cli
from streamprep.batches import TEXTS_AT_ONCE
from streamprep.errors import UserError
from streamprep.manifest import load_index, load_manifest
from streamprep.sources import list_dataset
from streamprep.storage import open_store

if TYPE_CHECKING:
    from forks import Forks
    from jobs import EncodeJob

    NewJob = Callable[..., EncodeJob]

pytest_plugins = ["jobs"]


def write_prompts(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def listed(path: Path) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(sample.key, sample.file_name, sample.captions) for sample in list_dataset(path, "auto").samples]


# Lists of prompts


@pytest.mark.parametrize(
    "content",
    [
        "A dog.\n\nA cat.\n",
        "A dog.\n\nA cat.",
        "A dog.\r\n\r\nA cat.\r\n",
        "\ufeffA dog.\n\nA cat.\n\n \t\n",
        "  A dog.\t\n   \n A cat. \n\n",
    ],
)
def test_each_line_is_a_prompt_known_by_its_number(content: str, tmp_path: Path) -> None:
    """An empty one too, which encoding drops: so its neighbours keep their names when it is filled in."""
    assert listed(write_prompts(tmp_path / "prompts.txt", content)) == [
        ("prompts-000001", "prompts-000001", ("A dog.",)),
        ("prompts-000002", "prompts-000002", ()),
        ("prompts-000003", "prompts-000003", ("A cat.",)),
    ]


def test_prompts_may_be_in_any_script_and_hold_other_line_separators(tmp_path: Path) -> None:
    prompts = ("Zo\u00eb \U0001f3ac", "\u4f60\u597d\u3002", "one\u2028line", "tab\tin it", "null\0byte", "form\x0cfeed")
    assert [c for _, _, (c,) in listed(write_prompts(tmp_path / "p.txt", "\n".join(prompts)))] == list(prompts)


def test_a_file_with_dots_in_its_name_gives_keys_without_and_ids_with_them(tmp_path: Path) -> None:
    """WebDataset would cut the key at the first dot."""
    samples = listed(write_prompts(tmp_path / "v1.5.prompts.txt", "one\ntwo\n"))
    assert [(key, name) for key, name, _ in samples] == [
        ("v1%2E5%2Eprompts-000001", "v1.5.prompts-000001"),
        ("v1%2E5%2Eprompts-000002", "v1.5.prompts-000002"),
    ]


def test_a_file_with_a_long_name_or_no_unicode_in_it_can_be_used(tmp_path: Path) -> None:
    long = listed(write_prompts(tmp_path / f"{'long' * 50}.txt", "one\ntwo\n"))
    assert len({key for key, _, _ in long}) == 2
    assert max(len(key) for key, _, _ in long) <= 64
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/pr\xff.txt"))
    (sample,) = listed(write_prompts(path, "one\n"))
    assert sample == ("pr%FF-000001", "pr\\xff-000001", ("one",))


def test_three_thousand_prompts_stay_in_order(tmp_path: Path) -> None:
    samples = listed(write_prompts(tmp_path / "p.txt", "".join(f"prompt {n}\n" for n in range(3000))))
    assert [captions for _, _, captions in samples] == [(f"prompt {n}",) for n in range(3000)]
    assert len({key for key, _, _ in samples}) == 3000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"\xff\xfe\n", "p.txt is not UTF-8"),
        ("p.md", b"A dog.", r"is neither a folder, nor a manifest \(.*\), nor a .txt file with a prompt on each line"),
    ],
)
def test_a_file_that_is_no_list_of_prompts_is_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        list_dataset(write_prompts(tmp_path / name, content), "auto")


@pytest.mark.parametrize("content", ["", "\n\n \n", "\ufeff"])
def test_a_file_without_prompts_is_refused_before_anything_is_written(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_prompts(tmp_path / "p.txt", content)
    assert cli.main(["pack", str(prompts), str(tmp_path / "shards")]) == 2
    assert f"{prompts} holds no prompts" in capsys.readouterr().err
    assert not (tmp_path / "shards/pack.json").exists()


# Shards


@pytest.mark.parametrize("layout", ["merged", "raw", "folder"])
def test_packing_captions_only_leaves_the_videos_out(
    layout: str, make_dataset: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = {f"{number}.mp4": f"Caption {number}." for number in range(3)}
    dataset = make_dataset(layout, captions, video=lambda path: path.write_bytes(b"VIDEO" * 1000))
    shards = tmp_path / "shards"
    assert cli.main(["pack", str(dataset), str(shards), "--captions-only", "--num-workers=1"]) == 0
    assert cli.main(["verify", str(shards)]) == 0
    assert b"VIDEO" not in (shards / "000000.tar").read_bytes()
    (info,) = load_manifest(open_store(shards)).shards
    samples = load_index(open_store(shards), info).samples
    assert [(sample.metadata["file_name"], sample.metadata["captions"]) for sample in samples] == [
        (name, [caption]) for name, caption in captions.items()
    ]
    assert all(set(sample.members) == {"json", "txt"} for sample in samples)
    capsys.readouterr()
    assert cli.main(["pack", str(dataset), str(shards), "--num-workers=1"]) == 2
    assert "captions_only: True then, False now" in capsys.readouterr().err


def test_run_packs_no_video_for_text(
    make_dataset: Callable[..., Path], tiny_model: Path, tmp_path: Path, one_thread: None
) -> None:
    captions = {f"{number}.mp4": f"Caption {number}." for number in range(3)}
    dataset = make_dataset("merged", captions, video=lambda path: path.write_bytes(b"VIDEO" * 100_000))
    out = tmp_path / "out"
    text = ["--workload-type", "text", "--encode-threads", "1"]
    assert cli.main(["run", str(dataset), str(out), "--model-path", str(tiny_model), *text]) == 0
    assert sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) < 100_000
    (file,) = (out / "combined_parquet_dataset").iterdir()
    assert [(row["id"], row["caption"]) for row in pq.read_table(file).to_pylist()] == list(captions.items())


def test_shards_without_videos_are_refused_for_text_to_video_with_the_reason(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_prompts(tmp_path / "p.txt", "one\ntwo\n")
    assert cli.main(["pack", str(prompts), str(tmp_path / "shards")]) == 0
    assert cli.main(["encode", str(tmp_path / "shards"), str(tmp_path / "out"), "--model-path", str(tiny_model)]) == 2
    assert (
        "none of 2 samples would be encoded: 2 no_video (its shard holds only its caption, packed by --captions-only)"
    ) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Jobs

PROMPTS = [f"Prompt {number}: " + "a dog runs " * (number % 13) for number in range(700)]
PROMPTS[7] = ""
TEXT = {"workload_type": "text", "samples_per_file": 250}


@pytest.fixture(scope="module")
def prompt_shards(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One unit of more prompts than are embedded at once."""
    assert len(PROMPTS) > 2 * TEXTS_AT_ONCE
    root = tmp_path_factory.mktemp("prompts")
    write_prompts(root / "prompts.txt", "\n".join(PROMPTS))
    packed = forks.run("pack", root / "prompts.txt", root / "shards", "--num-workers", 1)
    assert packed.code == 0, packed.output
    return root / "shards"


@pytest.fixture(scope="module")
def finished(forks: Forks, prompt_shards: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> EncodeJob:
    from jobs import EncodeJob

    job = EncodeJob(forks, prompt_shards, model, tmp_path_factory.mktemp("text") / "out")
    process = job.run(serial=True, **TEXT)
    assert process.code == 0, process.output
    assert "1 shard, 0 done; 699 samples planned, 1 dropped" in process.output
    return job


def test_every_prompt_is_a_row_of_fastvideos_columns(finished: EncodeJob) -> None:
    rows = []
    for path in sorted((finished.out / "combined_parquet_dataset").iterdir()):
        assert pq.read_schema(path).remove_metadata().equals(SCHEMAS["text"])
        rows += pq.read_table(path).to_pylist()
    expected = [(f"prompts-{number:06d}", prompt.strip()) for number, prompt in enumerate(PROMPTS, start=1) if prompt]
    assert [(row["id"], row["caption"]) for row in rows] == expected
    for row in rows:
        assert row["text_embedding_dtype"] == "float32"
        array = np.frombuffer(row["text_embedding_bytes"], np.float32).reshape(row["text_embedding_shape"])
        assert array.shape[1] == 32 and np.isfinite(array).all() and array.any()


def test_verify_and_status_know_a_job_of_captions(finished: EncodeJob, capsys: pytest.CaptureFixture[str]) -> None:
    assert finished.problems() == []
    assert cli.main(["status", str(finished.out)]) == 0
    output = capsys.readouterr().out
    assert "text data of wan 2.1-t2v model" in output
    assert "samples  699 of 699 done" in output
    index = pq.read_table(finished.out / "_streamprep/index.parquet")
    assert set(index["bucket"].to_pylist()) == {"text"}


@pytest.mark.parametrize(
    ("point", "serial"),
    [
        pytest.param("uncond:1", True, marks=pytest.mark.slow),
        ("data.after:3", False),
        pytest.param("record.after:1", True, marks=pytest.mark.slow),
    ],
)
def test_a_killed_job_of_prompts_ends_with_the_same_bytes(
    point: str, serial: bool, new_job: NewJob, prompt_shards: Path, finished: EncodeJob
) -> None:
    job = new_job(prompt_shards)
    assert job.run(serial=serial, crash_at=point, **TEXT).code == 137
    again = job.run(serial=serial, **TEXT)
    assert again.code == 0, again.output
    assert job.result() == finished.result()


@pytest.fixture(scope="module")
def captions_of_videos(forks: Forks, shards: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> EncodeJob:
    from jobs import EncodeJob

    job = EncodeJob(forks, shards, model, tmp_path_factory.mktemp("captions") / "out")
    process = job.run(workload_type="text")
    assert process.code == 0, process.output
    assert "12 samples planned, 0 dropped, 0 with a bad header" in process.output  # whatever their videos are
    return job


@pytest.mark.parametrize("point", ["data.after:4", "record.after:2", "record:4"])
def test_a_killed_job_of_several_units_of_captions_ends_with_the_same_bytes(
    point: str, new_job: NewJob, shards: Path, captions_of_videos: EncodeJob
) -> None:
    job = new_job(shards)
    assert job.run(serial=True, crash_at=point, workload_type="text").code == 137
    assert job.num_records() == {"data.after:4": 1, "record.after:2": 2, "record:4": 3}[point]
    again = job.run(serial=True, workload_type="text")
    assert again.code == 0, again.output
    assert job.result() == captions_of_videos.result()


def test_what_concerns_videos_changes_nothing(new_job: NewJob, prompt_shards: Path, finished: EncodeJob) -> None:
    job = new_job(prompt_shards)
    videos = {"dataloader_num_workers": 2, "preprocess_video_batch_size": 5, "max_height": 30, "num_frames": 6}
    process = job.run(**TEXT, **videos, vae_dtype="bfloat16")
    assert process.code == 0, process.output
    assert job.result() == finished.result()
    assert job.run(**TEXT, serial=True).code == 0


def test_a_limit_counts_captions(new_job: NewJob, prompt_shards: Path) -> None:
    job = new_job(prompt_shards)
    process = job.run(serial=True, max_samples=10, **TEXT)
    assert process.code == 0, process.output
    assert "10 rows, 1 file" in process.output
    assert job.problems() == []


def test_the_tars_of_videos_are_not_read(
    new_job: NewJob, shards: Path, captions_of_videos: EncodeJob, tmp_path: Path
) -> None:
    """Instead of each there is a hole of its size."""
    copy = tmp_path / "shards"
    copy.mkdir()
    for path in shards.iterdir():
        if path.suffix == ".tar":
            with open(copy / path.name, "wb") as file:
                file.truncate(path.stat().st_size)
        else:
            (copy / path.name).write_bytes(path.read_bytes())
    job = new_job(copy)
    process = job.run(serial=True, workload_type="text")
    assert process.code == 0, process.output
    assert job.result() == captions_of_videos.result()
    assert job.problems() == []


@pytest.mark.parametrize("gone", ["000001.tar", "000001.json"])
@pytest.mark.parametrize("workload", ["t2v", "text"])
def test_a_shard_that_is_gone_is_the_users_to_bring_back(
    workload: str, gone: str, shards: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ended as the machine's trouble, with exit code 1."""
    copy = shutil.copytree(shards, tmp_path / "shards")
    (copy / gone).unlink()
    flags = ["--model-path", str(tiny_model), "--workload-type", workload]
    assert cli.main(["encode", str(copy), str(tmp_path / "out"), *flags]) == 2
    assert f"{copy}/{gone} is missing: pack again" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_captions_are_the_same_with_their_videos_and_without(
    shards: Path, captions_of_videos: EncodeJob, undisturbed: Callable[[Path], EncodeJob]
) -> None:
    """Up to float error: they stood in other batches."""
    alone, with_videos = (embeddings(of) for of in (captions_of_videos, undisturbed(shards)))
    assert len(with_videos) == 8
    for name, embedding in with_videos.items():
        assert np.abs(embedding - alone[name]).max() < 1e-5


def embeddings(job: EncodeJob) -> dict[str, np.ndarray]:
    rows = [row for path in (job.out / "combined_parquet_dataset").iterdir() for row in pq.read_table(path).to_pylist()]
    return {
        row["id"]: np.frombuffer(row["text_embedding_bytes"], np.float32).reshape(row["text_embedding_shape"])
        for row in rows
    }


def test_the_contract_of_captions_has_no_video(finished: EncodeJob) -> None:
    contract = finished.job.plan.contract
    assert (contract["video"], contract["image"], contract["workload"]) == (None, None, "text")
    assert list(contract["tensors"]) == ["text_embedding"]
    assert json.loads((finished.out / "_streamprep/plan.json").read_bytes())["fingerprint"]["video"] == {}
