"""Damage to what a job keeps beside its rows: named by every verb, found by `verify`, and mended as it says."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch
from test_job import flip_a_byte, make_plan

from streamprep import job
from streamprep.cli import main
from streamprep.finalize import has_true_success, index_of
from streamprep.job import DamagedFile, Job, open_job
from streamprep.job_plan import JobPlan, Round
from streamprep.record import Record
from streamprep.sealed import Damaged, check_unconditional, check_validation, seal_unconditional, seal_validation
from streamprep.storage import how_to_delete, open_store
from streamprep.types import TensorLocation, WrittenFile, WrittenRow
from streamprep.verify import verify_job

if TYPE_CHECKING:
    from jobs import EncodeJob

    NewJob = Callable[..., EncodeJob]
    Undisturbed = Callable[[Path], EncodeJob]

pytest_plugins = ["jobs"]

RECORD = f"{job.RECORDS}/000001.json"
OF_ANOTHER_KIND: dict[str, Callable[[bytes], bytes]] = {
    "junk": lambda data: b"\x00\xffjunk",
    "nothing": lambda data: b"",
    "another format": lambda data: b'{"format": "streamprep-plan/1"}',
    "half of it": lambda data: data[: len(data) // 2],
    "a list": lambda data: b"[]",
    "null": lambda data: b"null",
    "another unit's": lambda data: data.replace(b'"unit":"000001"', b'"unit":"000002"'),
    "a part left out": lambda data: data.replace(b'"files":', b'"filse":'),
    "a text for a number": lambda data: re.sub(rb'"size_bytes":\d+', b'"size_bytes":"x"', data, count=1),
}


@pytest.fixture
def copied(undisturbed: Undisturbed, shards: Path, tmp_path: Path) -> Job:
    """A finished job, for damaging."""
    shutil.copytree(undisturbed(shards).out, tmp_path / "out")
    return open_job(open_store(tmp_path / "out"))


def path_of(current: Job, name: str) -> Path:
    root = current.store.local_path()
    assert root is not None
    return root / name


def change(current: Job, name: str, how: Callable[[bytes], bytes]) -> None:
    path = path_of(current, name)
    before = path.read_bytes()
    path.write_bytes(how(before))
    assert path.read_bytes() != before


def verified(current: Job, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What `verify` prints of a job that is damaged."""
    capsys.readouterr()
    assert main(["verify", current.store.url]) == 1
    return capsys.readouterr().out.splitlines()


def unconditional(current: Job) -> str:
    assert current.plan.unconditional is not None
    return current.plan.unconditional


# Records and what else says how far a job is


@pytest.mark.parametrize("damage", OF_ANOTHER_KIND)
def test_every_verb_names_a_damaged_record_and_what_to_do(
    damage: str, copied: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of them ended with a JSONDecodeError that named no file."""
    change(copied, RECORD, OF_ANOTHER_KIND[damage])
    out = copied.store.url
    for command in (
        ["status", out],
        ["finalize", out],
        ["retry", out],
        ["convert", out, str(tmp_path / "new"), "--exporter", "webdataset"],
    ):
        assert main(command) == 2, command
        said = capsys.readouterr().err
        assert said.startswith(f"streamprep: {out}/{RECORD}: cannot be read: "), said
        assert said.endswith(f"; delete {out}/{RECORD}, then run the same `streamprep encode` again\n"), said
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("damage", OF_ANOTHER_KIND)
def test_verify_says_once_that_a_record_is_damaged_and_goes_on(
    damage: str, copied: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    change(copied, RECORD, OF_ANOTHER_KIND[damage])
    record = copied.record("000003")
    assert record is not None
    flip_a_byte(path_of(copied, record.files[0].name))
    first, second, total, *advice = verified(copied, capsys)
    assert fnmatchcase(first, f"WRONG {RECORD}: cannot be read: *: the 3 rows of its unit are missing"), first
    assert second.startswith(f"WRONG {record.files[0].name}: its sha256 is ")
    assert total.startswith("5 rows in 3 files, ") and total.endswith(": 2 problems")
    out = copied.store.url
    assert advice == [
        "to mend what is wrong, delete what follows, then run the same `streamprep encode` again:",
        f"  {out}/{RECORD}",
        f"  {out}/{job.RECORDS}/000003.json",
    ]


def test_what_is_said_to_be_done_mends_it(copied: Job, shards: Path, new_job: NewJob, undisturbed: Undisturbed) -> None:
    encoded = new_job(shards)
    change(copied, RECORD, lambda data: data[:50])
    refused = encoded.run(serial=True)
    assert refused.code == 2 and f"{encoded.out}/{RECORD}: cannot be read: " in refused.output
    assert "Traceback" not in refused.output
    path_of(copied, RECORD).unlink()
    assert encoded.run(serial=True).code == 0
    assert encoded.result() == undisturbed(shards).result()
    assert encoded.problems() == []


def test_no_changed_byte_of_a_record_makes_verify_fail(copied: Job) -> None:
    path, dice = path_of(copied, RECORD), random.Random(0)
    data = path.read_bytes()
    for position in range(0, len(data), 11):
        damaged = bytearray(data)
        damaged[position] = dice.choice([byte for byte in b'\x00"-/[]{},.09az\xff' if byte != data[position]])
        path.write_bytes(damaged)
        assert isinstance(verify_job(copied).problems, list), position


def test_a_changed_number_of_a_record_is_found(copied: Job) -> None:
    """Whatever it is of: the end of the job follows from all records, and knows it as it was."""
    path, data = path_of(copied, RECORD), path_of(copied, RECORD).read_bytes()
    known = data[data.index(b'"files"') : data.index(b'"halved"')]
    for found in re.finditer(rb"\d", known):
        position = data.index(known) + found.start()
        digit = (int(found[0]) + 1) % 10
        path.write_bytes(data[:position] + b"%d" % digit + data[position + 1 :])
        assert verify_job(copied).problems, data[position - 20 : position + 20]


def test_a_damaged_quarantine_file_is_named_with_the_record_to_delete(
    copied: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = path_of(copied, job.QUARANTINE).glob("000000-*")
    out = copied.store.url
    for damage in (flip_a_byte, Path.unlink):
        damage(path)
        for verb in "status", "retry":
            assert main([verb, out]) == 2
            said = capsys.readouterr().err
            assert said.startswith(f"streamprep: {out}/{job.QUARANTINE}/{path.name}: "), said
            assert said.endswith(
                f"; delete {out}/{job.RECORDS}/000000.json, then run the same `streamprep encode` again\n"
            )
        lines = verified(copied, capsys)
        assert [line for line in lines if line.startswith("WRONG ")] == lines[:1]
        assert lines[0].startswith(f"WRONG {job.QUARANTINE}/{path.name}: ")
        assert lines[2:] == [
            "to mend what is wrong, delete what follows, then run the same `streamprep encode` again:",
            f"  {out}/{job.RECORDS}/000000.json",
        ]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"message": "m"}', b'{"max_bad_fraction": 0.1}'])
def test_a_damaged_stop_is_named(content: bytes, copied: Job, capsys: pytest.CaptureFixture[str]) -> None:
    copied.store.put(job.STOP, content, step="stop")
    out = copied.store.url
    for verb in "status", "finalize", "retry":
        assert main([verb, out]) == 2
        assert f"{out}/{job.STOP}: cannot be read: " in capsys.readouterr().err
    assert verified(copied, capsys)[0].startswith(f"WRONG {job.STOP}: cannot be read: ")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": "streamprep-retry/1"}'])
def test_a_damaged_retry_is_named(content: bytes, copied: Job, capsys: pytest.CaptureFixture[str]) -> None:
    copied.store.put(job.round_path("r1"), content, step="retry")
    copied.store.put(job.round_path("r2"), Round(number=2, reasons=(), units=()).to_json(), step="retry")
    out = copied.store.url
    for verb in "status", "retry":
        assert main([verb, out]) == 2
        said = capsys.readouterr().err
        assert f"{out}/{job.RETRIES}/r1.json: cannot be read: " in said
        assert "then run the same `streamprep retry` again" in said
    first, _, *advice = verified(copied, capsys)
    assert first.startswith(f"WRONG {job.RETRIES}/r1.json: cannot be read: ")
    assert advice == [
        "to mend what is wrong, delete what follows, then run the same `streamprep retry` again:",
        f"  {out}/{job.RETRIES}/r1.json",
    ]


def test_a_retry_under_another_number_is_damaged(copied: Job) -> None:
    copied.store.put(job.round_path("r1"), Round(number=2, reasons=(), units=()).to_json(), step="retry")
    with pytest.raises(DamagedFile, match=r"r1\.json: cannot be read: it is another retry, r2"):
        copied.rounds()


@pytest.mark.parametrize("content", [b"", b"{", b"[[]]", b"{}", b"null"])
@pytest.mark.parametrize("path", ["attempts/000001-0123456789ab.json", "failed/000001.json"])
def test_a_damaged_mark_is_named(path: str, content: bytes, copied: Job, capsys: pytest.CaptureFixture[str]) -> None:
    path = f"{job.FOLDER}/{path}"
    copied.store.put(path, content, step="failed")
    assert main(["status", copied.store.url]) == 2
    said = capsys.readouterr().err
    assert f"{copied.store.url}/{path}: cannot be read: " in said
    assert said.endswith(f"; delete {copied.store.url}/{path}, then run the same command again\n")


# The end of the job


@pytest.mark.parametrize(
    "content",
    [
        lambda data: b"junk",
        lambda data: b"",
        lambda data: data.replace(b'"num_rows": 8', b'"num_rows": 9'),
        lambda data: b'{"format": "streamprep-success/1"}',
    ],
)
def test_a_success_that_says_something_else_is_found_and_finalize_mends_it(
    content: Callable[[bytes], bytes], copied: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    before = copied.store.read(job.SUCCESS)
    change(copied, job.SUCCESS, content)
    assert main(["status", copied.store.url]) == 4
    wrong, total = verified(copied, capsys)
    assert wrong == f"WRONG {job.SUCCESS}: does not say what the records do: run `streamprep finalize`"
    assert total.endswith(": 1 problem")
    assert main(["finalize", copied.store.url]) == 0
    assert copied.store.read(job.SUCCESS) == before


def test_an_index_with_another_offset_is_found(copied: Job, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = path_of(copied, job.INDEX)
    rows = pq.read_table(path).to_pylist()
    rows[3]["vae_latent_offset"] += 4
    pq.write_table(pa.Table.from_pylist(rows), path)
    wrong = verified(copied, capsys)[0]
    assert wrong == f"WRONG {job.INDEX}: does not say what the records do: run `streamprep finalize`"
    assert main(["finalize", copied.store.url]) == 0
    assert verify_job(copied).problems == []


def test_the_index_has_the_tensors_of_every_row() -> None:
    """Its columns were those of the first row."""
    latent = TensorLocation(offset=4, size=8, dtype="float32", shape=(2,), codec="raw")
    text = TensorLocation(offset=12, size=4, dtype="bfloat16", shape=(1, 2), codec="raw")
    contents: Sequence[dict[str, TensorLocation]] = ({"text": text}, {"latent": latent, "text": text}, {})
    rows = [WrittenRow(key=f"{n}", bucket="1x2x3", row_group=n, tensors=tensors) for n, tensors in enumerate(contents)]
    file = WrittenFile(name="f", size_bytes=99, sha256="0" * 64, rows=tuple(rows))
    record = Record(unit="000000", files=(file,), bad={}, dropped=(), quarantine=None, seconds={})
    table = index_of([record])
    assert table.num_rows == 3
    assert table["latent_offset"].to_pylist() == [None, 4, None]
    assert table["latent_shape"].to_pylist() == [None, [2], None]
    assert table["text_dtype"].to_pylist() == ["bfloat16", "bfloat16", None]
    assert index_of([]).num_rows == 0


# The embeddings of the empty and the negative prompt


def make_tensors() -> dict[str, torch.Tensor]:
    return {"text_embedding": torch.arange(8.0).reshape(1, 8), "negative_text_embedding": torch.ones(3, 8)}


def plan_with(text: dict[str, Any]) -> JobPlan:
    return make_plan(fingerprint={"text": text})


def test_no_byte_of_the_unconditional_embeddings_can_change_unseen() -> None:
    plan = plan_with({"sha256": "0a"})
    data = seal_unconditional(make_tensors(), plan)
    assert check_unconditional(data, plan)
    assert all(torch.equal(found, make_tensors()[name]) for name, found in safetensors.torch.load(data).items())
    for position in range(len(data)):
        for bit in 1, 0x20, 0x80:
            damaged = bytearray(data)
            damaged[position] ^= bit
            with pytest.raises(Damaged):
                check_unconditional(bytes(damaged), plan)
    for length in range(len(data)):
        with pytest.raises(Damaged):
            check_unconditional(data[:length], plan)
    with pytest.raises(Damaged, match="for these settings"):
        check_unconditional(data, plan_with({"sha256": "0b"}))


def test_verify_finds_damaged_embeddings_and_says_what_to_delete(
    copied: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    """It found nothing: nobody knew their digest."""
    name, out = unconditional(copied), copied.store.url
    flip_a_byte(path_of(copied, name))
    wrong, total, *advice = verified(copied, capsys)
    assert wrong.startswith(f"WRONG {name}: ") and total.endswith(": 1 problem")
    assert advice == [
        "to mend what is wrong, delete what follows, then run the same `streamprep encode` again:",
        f"  {out}/{name}",
    ]


def test_the_same_encode_writes_lost_embeddings_again_though_no_unit_is_left(
    copied: Job, shards: Path, new_job: NewJob, undisturbed: Undisturbed, capsys: pytest.CaptureFixture[str]
) -> None:
    name, out = unconditional(copied), copied.store.url
    path_of(copied, name).unlink()
    wrong, _, *advice = verified(copied, capsys)
    assert wrong == f"WRONG {name}: missing"
    assert advice == ["run the same `streamprep encode` again: it writes what is missing"]
    assert main(["status", out]) == 4
    assert main(["finalize", out]) == 2
    assert f"lacks {name}: run the same `streamprep encode` again" in capsys.readouterr().err
    encoded = new_job(shards)
    done = encoded.run(serial=True)
    assert done.code == 0 and f"{name} is missing: it is written again" in done.output
    assert encoded.result() == undisturbed(shards).result()
    assert main(["verify", out]) == 0


def test_two_ranks_write_lost_embeddings_again(
    copied: Job, shards: Path, new_job: NewJob, undisturbed: Undisturbed
) -> None:
    path_of(copied, unconditional(copied)).unlink()
    encoded = new_job(shards)
    assert encoded.run(nproc=2).code == 0
    assert encoded.result() == undisturbed(shards).result()


def test_embeddings_of_an_earlier_version_are_read_and_not_compared(
    copied: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = unconditional(copied)
    tensors = safetensors.torch.load(copied.store.read(name))
    copied.store.put(name, safetensors.torch.save(tensors), step="uncond")
    assert main(["verify", copied.store.url]) == 0
    note, total = capsys.readouterr().out.splitlines()
    assert note.startswith(f"NOTE {name}: ") and "not compared" in note
    assert total.endswith(": 0 problems")
    assert main(["convert", copied.store.url, str(tmp_path / "new"), "--exporter", "webdataset"]) == 0
    copied.store.put(name, b"junk", step="uncond")
    assert verified(copied, capsys)[0].startswith(f"WRONG {name}: cannot be read: ")


def test_convert_takes_no_damaged_embeddings_along(
    copied: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = unconditional(copied)
    command = ["convert", copied.store.url, str(tmp_path / "new"), "--exporter", "webdataset"]
    whole = copied.store.read(name)
    flip_a_byte(path_of(copied, name))
    assert main(command) == 1
    assert f"{copied.store.url}/{name} is damaged: " in capsys.readouterr().err
    path_of(copied, name).unlink()
    assert main(command) == 2
    assert "is not finished" in capsys.readouterr().err
    copied.store.put(name, whole, step="uncond")
    assert main(command) == 0
    new = open_job(open_store(tmp_path / "new"))
    assert new.store.read(name) == whole
    path_of(new, name).unlink()
    assert main(command) == 0
    assert new.store.read(name) == whole
    assert verify_job(new).problems == []


# What is held out for validation


def test_no_byte_of_what_is_held_out_can_change_unseen() -> None:
    value = {"data": [{"caption": "A cat.", "height": 480}], "images": {"images/0.png": "0a"}, "left_out": {}}
    data = seal_validation(value)
    assert check_validation(data) == ({"images/0.png": "0a"}, True)
    for position in range(len(data)):
        for bit in 1, 0x20, 0x80:
            damaged = bytearray(data)
            damaged[position] ^= bit
            with pytest.raises(Damaged):
                check_validation(bytes(damaged))
    for length in range(len(data)):
        with pytest.raises(Damaged):
            check_validation(data[:length])
    assert check_validation(json.dumps(value).encode()) == ({"images/0.png": "0a"}, False)  # of an earlier version


# What to do


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("/out", "/out/_streamprep/records/000001.json"),
        ("s3://b/my out", "s3://b/my out/{path} (aws s3 rm 's3://b/my out/{path}')"),
        ("gs://b", "gs://b/{path} (gcloud storage rm gs://b/{path})"),
        ("az://c/out", "az://c/out/{path} (az storage blob delete --container-name c --name out/{path})"),
        ("hf://datasets/o/n/out", "hf://datasets/o/n/out/{path} (hf repos delete-files, or on the repository's page)"),
    ],
)
def test_a_file_to_delete_is_named_in_full_with_the_tool(url: str, said: str) -> None:
    assert how_to_delete(url, RECORD) == said.format(path=RECORD)


def test_each_kind_of_problem_gets_its_own_advice_once(copied: Job, capsys: pytest.CaptureFixture[str]) -> None:
    out = copied.store.url
    record = copied.record("000001")
    assert record is not None
    for file in record.files:
        flip_a_byte(path_of(copied, file.name))
    assert copied.commit(dataclasses.replace(record, unit="000009", files=()))
    path_of(copied, unconditional(copied)).unlink()
    path_of(copied, job.INDEX).write_bytes(b"junk")
    lines = verified(copied, capsys)
    after = lines[next(number for number, line in enumerate(lines) if " problems" in line) + 1 :]
    assert Counter(after) == Counter(
        [
            "to mend what is wrong, delete what follows, then run the same `streamprep encode` again:",
            f"  {out}/{RECORD}",
            "to mend what is wrong, delete what follows, then run `streamprep finalize`:",
            f"  {out}/{job.RECORDS}/000009.json",
        ]
    )
    assert any(line.startswith(f"WRONG {job.INDEX}: ") and line.endswith("`streamprep finalize`") for line in lines)


def test_unfinished_units_get_no_advice_to_delete_records(copied: Job, capsys: pytest.CaptureFixture[str]) -> None:
    """It was given whatever was wrong."""
    path_of(copied, RECORD).unlink()
    lines = verified(copied, capsys)
    assert lines[0] == "WRONG 1 of 4 units are not encoded yet: run `streamprep encode` again"
    assert not any("delete" in line for line in lines)
    assert not has_true_success(copied)
