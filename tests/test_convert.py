"""Outputs written again in another format: as encoding would have, killed anywhere, refused where they must be."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest
import torch
from captioned_jobs import FLAGS, Encode
from jobs import leave_an_orphan
from object_stores import NewBucket
from quick_cases import mostly_slow
from runs import Run
from servers import Server

from streamprep import cli, job
from streamprep.config import ConvertConfig
from streamprep.crashpoints import VARIABLE
from streamprep.errors import UserError
from streamprep.exporting import describe_loss
from streamprep.job import INDEX, SUCCESS, Job, open_job
from streamprep.storage import open_store
from streamprep.verify import verify_job

if TYPE_CHECKING:
    from forks import Forks, Process

pytest_plugins = ["captioned_jobs", "jobs", "object_stores"]
pytestmark = pytest.mark.usefixtures("one_thread")

CRASHED = 137
STEPS = ("plan", "retry", "uncond", "attempt", "data", "quarantine", "record", "withdraw", "delete", "index", "success")
KILLS = [f"{step}{moment}" for step in STEPS for moment in ("", ".after")]
SOURCES = {
    "t2v": ("2.1-t2v", "--workload-type=t2v"),
    "t2v-all": ("2.1-t2v", "--workload-type=t2v", "--caption=all", "--keep-columns=score,author"),
    "windows": (
        "2.1-t2v",
        "--workload-type=t2v",
        "--caption=all",
        "--num-frames=1",
        "--window=uniform",
        "--num-windows=2",
    ),
    "i2v": ("2.1-i2v", "--workload-type=i2v"),
    "i2v-5b": ("2.2-ti2v-5b", "--workload-type=i2v"),
    "text": ("2.1-t2v", "--workload-type=text", "--caption=all", "--keep-columns=author"),
}
FLOAT32 = ("--exporter=webdataset", "--latent-dtype=float32")


def convert(source: object, out: object, *flags: str) -> int:
    return cli.main(["convert", str(source), str(out), *flags])


def converted(source: Job, out: Path | str, *flags: str) -> Job:
    assert convert(source.store.url, out, *flags) == 0
    current = open_job(open_store(str(out)))
    assert verify_job(current).problems == []
    return current


def result(current: Job) -> dict[str, Any]:
    """All that an output holds, but for what may differ: its plan and the seconds of its records."""
    store = current.store
    folders = (current.plan.data_folder, job.QUARANTINE, job.RETRIES)
    names = [entry.path for folder in folders for entry in store.list(folder)]
    names += [entry.path for entry in store.list(job.FOLDER, prefix="uncond-")]
    found: dict[str, Any] = {name: store.read(name) for name in (*names, INDEX, SUCCESS)}
    for record in current.records():
        value = json.loads(record.to_json())
        del value["seconds"]
        found[f"records/{record.unit}"] = value
    return found


# The bytes that encoding would have written


@pytest.mark.parametrize("source", SOURCES)
def test_there_and_back_in_float32_is_the_same_to_the_last_byte(
    source: str, encode: Encode, tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    variant, *flags = SOURCES[source]
    original = encode(tiny_models(variant), *flags)
    for number, more in enumerate(((), ("--latent-format=npy",), ("--latent-compression=zstd",))):
        there = converted(original, tmp_path / f"there{number}", *FLOAT32, *more)
        back = converted(there, tmp_path / f"back{number}", "--exporter=fastvideo")
        assert result(back) == result(original)
        assert back.plan.contract == original.plan.contract
        assert back.plan.columns == original.plan.columns and list(back.plan.columns) == list(original.plan.columns)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_is_what_encoding_would_have_written(
    source: str, dtype: str, encode: Encode, tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    variant, *flags = SOURCES[source]
    options = ("--exporter=webdataset", f"--latent-dtype={dtype}")
    current = converted(encode(tiny_models(variant), *flags), tmp_path / "out", *options)
    direct = encode(tiny_models(variant), *flags, *options)
    assert result(current) == result(direct)
    assert current.plan.contract == direct.plan.contract
    assert [unit.id for unit in current.plan.units] == [unit.id for unit in direct.plan.units]
    assert current.plan.config == direct.plan.config


def test_other_sizes_of_files_can_be_had(encode: Encode, tiny_model: Path, tmp_path: Path) -> None:
    original = encode(tiny_model)
    current = converted(original, tmp_path / "out", "--exporter=fastvideo", "--samples-per-file=1")
    assert [len(file.rows) for record in current.records() for file in record.files] == [1] * 4
    assert result(converted(current, tmp_path / "back", "--exporter=fastvideo", "--samples-per-file=2")) == result(
        original
    )


# What is lost


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("float32", "float32", "exact"),
        ("bfloat16", "float32", "exact"),
        ("bfloat16", "bfloat16", "exact"),
        ("float32", "bfloat16", "relative error at most 2^-8"),
        ("float16", "bfloat16", "relative error at most 2^-8"),
        ("float32", "float16", "relative error at most 2^-11, below 2^-14 an error of at most 2^-25; a number beyond"),
        ("bfloat16", "float16", "exact from 2^-14 on, below an error of at most 2^-25; a number beyond 65504"),
    ],
)
def test_what_a_dtype_loses_is_said(source: str, target: str, words: str) -> None:
    assert describe_loss(source, target).startswith(f"{source} -> {target}: {words}")


@pytest.mark.parametrize(
    ("source", "target"), [(a, b) for a in ("float32", "bfloat16", "float16") for b in ("bfloat16", "float16")]
)
def test_the_bounds_of_what_a_dtype_loses_hold(source: str, target: str) -> None:
    numbers = 2.0 ** torch.linspace(-30, 15.99, 400_001, dtype=torch.float64)
    before = numbers.to(getattr(torch, source)).double()
    error = (before.to(getattr(torch, target)).double() - before).abs()
    said, is_normal = describe_loss(source, target), before >= 2.0**-14
    bound = 0 if "exact" in said else 2.0 ** -(8 if target == "bfloat16" else 11)
    assert (error[is_normal] <= bound * before[is_normal]).all()
    if target == "float16":
        assert (error[~is_normal] <= 2.0**-25).all()
    else:
        assert (error <= bound * before).all()


def test_a_loss_is_said_before_and_kept_in_plan_contract_and_status(
    encode: Encode, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = converted(encode(tiny_model), tmp_path / "there", "--exporter=webdataset")
    assert "2 units, 0 done; 4 rows of " in (said := capsys.readouterr().err)
    assert ": fastvideo -> webdataset\nfloat32 -> bfloat16: relative error at most 2^-8\n" in said
    back = converted(there, tmp_path / "back", "--exporter=fastvideo")
    assert "bfloat16 -> float32: exact\n" in capsys.readouterr().err
    for current in (there, back):
        assert current.plan.contract["rounded"] == {"bfloat16": "relative error at most 2^-8"}
    assert back.plan.converted is not None and back.plan.converted["from"] == str(tmp_path / "there")
    assert cli.main(["status", str(tmp_path / "back")]) == 0
    assert (
        f"from     {tmp_path / 'there'} by `streamprep convert`: bfloat16 -> float32: exact" in capsys.readouterr().out
    )
    for file in (tmp_path / "back").glob("combined_parquet_dataset/*"):
        assert "rounded" in json.loads(pq.read_schema(file).metadata[b"streamprep.contract"])


def test_variances_can_be_left_out_and_not_be_lost_unawares(
    encode: Encode, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moments = encode(tiny_model, *FLOAT32, "--posterior=moments")
    assert convert(moments.store.url, tmp_path / "out", "--exporter=fastvideo") == 2
    assert (
        "keeps mean and log variance (moments), the exporter fastvideo holds only the mean: --posterior mean leaves"
        in (capsys.readouterr().err)
    )
    assert not (tmp_path / "out").exists()
    current = converted(moments, tmp_path / "out", "--exporter=fastvideo", "--posterior=mean")
    assert "float32 -> float32: exact; vae_logvar left out" in capsys.readouterr().err
    assert result(current) == result(encode(tiny_model))
    assert current.plan.contract == encode(tiny_model).plan.contract


def test_a_number_too_large_for_float16_is_refused_by_name(
    encode: Encode,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from exporters import fastvideo

    large = torch.full((16, 2, 4, 8), 1e6)
    monkeypatch.setattr(fastvideo, "_tensors", lambda row: {"vae_latent": large, "text_embedding": torch.zeros(2, 3)})
    flags = ("--exporter=webdataset", "--latent-dtype=float16")
    assert convert(encode(tiny_model).store.url, tmp_path / "out", *flags) == 2
    assert "vae_latent of '0' cannot be stored as float16: it holds 1e+06" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("latent_shards/*"))


# Refusals


def test_an_output_that_is_not_finished_is_refused(
    encode: Encode, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(encode(tiny_model).store.url, tmp_path / "source")
    (source / SUCCESS).unlink()
    assert convert(source, tmp_path / "out", "--exporter=webdataset") == 2
    assert f"{source} is not finished: `streamprep status` says how far it is" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--exporter=nowhere",), "no exporter 'nowhere'; one of fastvideo, webdataset"),
        (("--exporter=webdataset", "--latent-format=npy"), "NumPy's format has no bfloat16"),
        (("--exporter=fastvideo", "--latent-dtype=bfloat16"), "the exporter fastvideo takes only float32"),
        (("--exporter=moments_exporter:open_shard",), "cannot hold the further column 'score': it cannot be kept"),
    ],
)
def test_what_an_exporter_cannot_do_is_refused_before_any_work(
    flags: tuple[str, ...],
    message: str,
    encode: Encode,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = encode(tiny_model, "--caption=all", "--keep-columns=score,author")
    assert convert(source.store.url, tmp_path / "out", *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_column_that_only_the_other_format_can_have_is_refused(
    encode: Encode, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = encode(tiny_model, "--exporter=webdataset", "--keep-columns=odd_bytes")
    assert convert(source.store.url, tmp_path / "out", "--exporter=fastvideo") == 2
    assert "cannot hold the further column 'odd_bytes': it ends as the columns of tensors do" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("text", {"padding": "padded"}, "text embeddings are padded, its trainers would take padding for words"),
        ("video", {"space": "normalised"}, "latents are normalised, its trainers take them raw"),
    ],
)
def test_latents_that_fastvideos_trainers_would_misread_are_refused(
    part: str,
    change: Mapping[str, str],
    message: str,
    encode: Encode,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = shutil.copytree(encode(tiny_model, *FLOAT32).store.url, tmp_path / "source")
    plan = json.loads((source / job.PLAN).read_text())
    plan["contract"][part] |= change
    (source / job.PLAN).write_text(json.dumps(plan))
    assert convert(source, tmp_path / "out", "--exporter=fastvideo") == 2
    assert f"the exporter fastvideo cannot hold these: {message}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_read_back_is_refused(
    encode: Encode, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = encode(tiny_model, "--exporter=moments_exporter:open_shard", "--posterior=moments")
    assert convert(source.store.url, tmp_path / "out", "--exporter=webdataset") == 2
    assert "which cannot read its rows back: it has no read_samples" in capsys.readouterr().err


def test_an_output_is_not_converted_into_itself(
    encode: Encode, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = encode(tiny_model).store.url
    assert convert(url, f"{url}/", "--exporter=webdataset") == 2
    assert "is the output itself: convert it into another folder" in capsys.readouterr().err


def test_another_conversion_on_the_same_output_is_refused_by_name(
    encode: Encode, captioned: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    current = converted(encode(tiny_model), tmp_path / "out", *FLOAT32)
    before = result(current)
    for source, flags, difference in (
        (encode(tiny_model), ("--exporter=webdataset",), "export.latent_dtype: float32 there, bfloat16 now"),
        (encode(tiny_model), (*FLOAT32, "--samples-per-file=9"), "export.samples_per_file: 2 there, 9 now"),
        (encode(tiny_model, "--caption=all"), FLOAT32, "convert.success_sha256: "),
    ):
        assert convert(source.store.url, tmp_path / "out", *flags) == 2
        assert difference in capsys.readouterr().err
    flags = (str(captioned), str(tmp_path / "out"), "--model-path", str(tiny_model), *FLAGS, *FLOAT32)
    assert cli.main(["encode", *flags]) == 2
    assert "convert.plan_sha256: " in capsys.readouterr().err
    assert cli.main(["retry", str(tmp_path / "out")]) == 2
    assert f"was made by `streamprep convert`: retry {encode(tiny_model).store.url}, and convert" in (
        capsys.readouterr().err
    )
    assert result(current) == before


def test_a_finished_conversion_run_again_changes_nothing(
    encode: Encode, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    converted(encode(tiny_model), tmp_path / "out", *FLOAT32)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert convert(encode(tiny_model).store.url, tmp_path / "out", *FLOAT32) == 0
    assert "2 units, 2 done" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_damaged_file_is_never_converted(
    encode: Encode, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(encode(tiny_model).store.url, tmp_path / "source")
    (first, *_) = sorted(source.glob("combined_parquet_dataset/*"))
    good = first.read_bytes()
    first.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    assert convert(source, tmp_path / "out", *FLOAT32) == 1
    assert f"{first} is damaged: its sha256 is" in capsys.readouterr().err
    first.write_bytes(good)
    current = converted(open_job(open_store(source)), tmp_path / "out", *FLOAT32)
    assert result(current) == result(encode(tiny_model, *FLOAT32))


# Samples that were bad, and retries


@pytest.fixture(scope="module")
def retried(captioned: Path, tiny_model: Path, encode: Encode, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """An output with a sample that was bad at first, and one that still is."""
    root = tmp_path_factory.mktemp("retried")
    shards = shutil.copytree(captioned, root / "shards")
    good = {tar: tar.read_bytes() for tar in sorted(shards.glob("*.tar"))}
    index = json.loads((shards / "000000.json").read_text())
    damaged = bytearray((shards / "000000.tar").read_bytes())
    for sample in index["samples"][:2]:
        damaged[sample["members"]["mp4"][0] + 100] ^= 1
    (shards / "000000.tar").write_bytes(damaged)
    flags = ["--model-path", str(tiny_model), *FLAGS, "--caption=all"]
    assert cli.main(["encode", str(shards), str(root / "out"), *flags]) == 0
    again = bytearray(good[shards / "000000.tar"])
    again[index["samples"][0]["members"]["mp4"][0] + 100] ^= 1
    (shards / "000000.tar").write_bytes(again)
    assert cli.main(["retry", str(root / "out"), "--serial"]) == 0
    return open_job(open_store(root / "out"))


def test_rows_of_retries_and_what_is_still_bad_are_in_it(
    retried: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [record.unit for record in retried.records()] == ["000000", "000000.r1", "000001"]
    there = converted(retried, tmp_path / "there", *FLOAT32)
    back = converted(there, tmp_path / "back", "--exporter=fastvideo")
    assert result(back) == result(retried)
    said = []
    for current in (retried, there):
        capsys.readouterr()
        assert cli.main(["status", current.store.url]) == 0
        lines = capsys.readouterr().out.splitlines()
        said.append([line for line in lines if line.startswith(("retry", "bad", "dropped", "samples"))])
    assert said[0] == said[1] and any("digest_mismatch" in line for line in said[0])


def test_a_retry_that_is_not_finished_must_be_finished_first(
    retried: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(retried.store.url, tmp_path / "source")
    (source / "_streamprep/records/000000.r1.json").unlink()
    assert convert(source, tmp_path / "out", *FLOAT32) == 2
    assert "retry r1 is not finished: run `streamprep retry` again first" in capsys.readouterr().err


# Kills, and several processes


def start(forks: Forks, source: Job, out: Path, *, crash_at: str | None = None, **environment: str) -> Process:
    environment |= {VARIABLE: crash_at} if crash_at else {}
    return forks.start("convert", source.store.url, out, *FLOAT32, "--stale-seconds", 1, environment=environment)


@pytest.fixture(scope="module")
def undisturbed(retried: Job, tmp_path_factory: pytest.TempPathFactory) -> Job:
    return converted(retried, tmp_path_factory.mktemp("undisturbed") / "out", *FLOAT32)


ALL_KILLS = [*KILLS, "data:2", "record:3", "record.after:2"]


@pytest.mark.parametrize(
    "point", mostly_slow(ALL_KILLS, quick=[kill for kill in ALL_KILLS if ".after" not in kill or "record" in kill])
)
def test_a_conversion_killed_at_a_durable_step_ends_as_if_it_had_not_been(
    point: str, forks: Forks, retried: Job, undisturbed: Job, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if not point.startswith("plan"):
        assert start(forks, retried, out, crash_at="plan.after").wait() == CRASHED
        leave_an_orphan(out, "latent_shards")
    assert start(forks, retried, out, crash_at=point).wait() == CRASHED
    again = start(forks, retried, out)
    assert again.wait() == 0, again.output
    current = open_job(open_store(out))
    assert result(current) == result(undisturbed)
    assert verify_job(current).problems == []
    assert not list(out.glob(".tmp/*"))
    assert not list(out.glob("_streamprep/attempts/*"))


def test_several_processes_write_each_row_once(forks: Forks, retried: Job, undisturbed: Job, tmp_path: Path) -> None:
    processes = [start(forks, retried, tmp_path / "out") for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0], [process.output for process in processes]
    current = open_job(open_store(tmp_path / "out"))
    assert result(current) == result(undisturbed)
    assert verify_job(current).problems == []


def test_ranks_of_a_launcher_share_it(forks: Forks, retried: Job, undisturbed: Job, tmp_path: Path) -> None:
    run = Run(forks, 2)
    try:
        ranks = [start(forks, retried, tmp_path / "out", **run.environment(number)) for number in range(2)]
        assert [rank.wait() for rank in ranks] == [0, 0], [rank.output for rank in ranks]
    finally:
        run.lose_board()
    assert [rank.output.count(" rows, ") for rank in ranks] == [1, 0]
    assert result(open_job(open_store(tmp_path / "out"))) == result(undisturbed)


def test_nproc_auto_is_for_gpus() -> None:
    with pytest.raises(UserError, match="--nproc auto is one process for each GPU"):
        ConvertConfig(source="out", out="new", exporter="webdataset", nproc="auto")


@pytest.mark.slow  # as it does for encode: test_ranks.py
def test_nproc_starts_ranks_and_starts_one_that_dies_again(forks: Forks, retried: Job, tmp_path: Path) -> None:
    odd = ("--exporter=odd_exporter:open_shard", "--stale-seconds=1")
    command = ("convert", retried.store.url, tmp_path / "out", *odd, "--nproc", 2)
    done = forks.run(*command, environment={"ODD_UNITS": "000001=kill"})
    assert done.code == 1, done.output  # that unit is set aside
    assert "was killed by SIGKILL; it is started again" in done.output
    assert {log.name[:9] for log in (tmp_path / "out/_streamprep/logs").iterdir()} == {"rank-0000", "rank-0001"}
    again = forks.run(*command)
    assert again.code == 0, again.output
    current = open_job(open_store(tmp_path / "out"))
    assert result(current) == result(retried)
    assert verify_job(current).problems == []


@pytest.mark.parametrize(("grace_seconds", "num_done"), [(30, 1), (0, 0)])
def test_sigterm_finishes_the_unit_at_hand_and_takes_no_other(
    grace_seconds: int, num_done: int, forks: Forks, retried: Job, tmp_path: Path
) -> None:
    units = ",".join(f"{unit}=sleep:5" for unit in [record.unit for record in retried.records()])
    odd = ("--exporter=odd_exporter:open_shard", "--grace-seconds", grace_seconds)
    process = forks.start("convert", retried.store.url, tmp_path / "out", *odd, environment={"ODD_UNITS": units})
    process.wait_for(lambda: "it sleeps" in process.output)  # a unit is at hand
    records = tmp_path / "out/_streamprep/records"
    before = len(list(records.glob("*.json")))  # units without rows do not sleep
    process.kill(signal.SIGTERM)
    assert process.wait() == 4, process.output
    assert len(list(records.glob("*.json"))) == before + num_done < len(list(retried.records()))
    assert forks.run("convert", retried.store.url, tmp_path / "out", *odd).code == 0
    assert result(open_job(open_store(tmp_path / "out"))) == result(retried)


def test_a_unit_that_kills_every_rank_is_set_aside_and_tried_by_the_next_run(
    forks: Forks, retried: Job, tmp_path: Path
) -> None:
    odd = ("--exporter=odd_exporter:open_shard", "--stale-seconds=1")
    command = ("convert", retried.store.url, tmp_path / "out", *odd)
    run = Run(forks, 2)
    try:
        poison = [run.environment(number) | {"ODD_UNITS": "000001=raise"} for number in range(2)]
        ranks = [forks.start(*command, environment=one) for one in poison]
        assert [rank.wait() for rank in ranks] == [1, 1], [rank.output for rank in ranks]
    finally:
        run.lose_board()
    assert (tmp_path / "out/_streamprep/failed/000001.json").exists()
    again = forks.run(*command)
    assert again.code == 0, again.output
    assert verify_job(open_job(open_store(tmp_path / "out"))).problems == []


# Buckets


def test_from_a_bucket_to_a_bucket_and_back_to_a_folder(
    moto_server: Server,
    new_bucket: NewBucket,
    retried: Job,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()
    bucket = new_bucket(moto_server)
    first = converted(retried, f"{bucket}/there", *FLOAT32)
    second = converted(first, f"{bucket}/again/x", "--exporter=fastvideo", f"--spool-dir={spool}")
    assert result(second) == result(retried)
    third = converted(second, tmp_path / "out", *FLOAT32)
    assert result(third) == result(first)
    assert not [path for path in spool.rglob("*") if path.is_file()]
    assert not list((tmp_path / "out").glob(".tmp/*"))


@pytest.mark.parametrize("point", ["plan.after", "data.after", "record", "record.after:2", "success"])
def test_a_killed_conversion_goes_on_in_a_bucket(
    point: str,
    moto_server: Server,
    new_bucket: NewBucket,
    forks: Forks,
    retried: Job,
    undisturbed: Job,
) -> None:
    out = f"{new_bucket(moto_server)}/out"
    environment = dict(moto_server.env)
    assert start(forks, retried, out, crash_at=point, **environment).wait() == CRASHED  # type: ignore[arg-type]
    again = start(forks, retried, out, **environment)  # type: ignore[arg-type]
    assert again.wait() == 0, again.output
    assert result(open_job(open_store(out))) == result(undisturbed)


def test_to_the_hub_and_back(
    fake_hf_server: Server,
    new_bucket: NewBucket,
    forks: Forks,
    retried: Job,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    out = f"{new_bucket(fake_hf_server)}/there"
    environment = {"XDG_CACHE_HOME": str(tmp_path / "caches"), **fake_hf_server.env}
    killed = forks.run("convert", retried.store.url, out, *FLOAT32, environment={**environment, VARIABLE: "record:2"})
    assert killed.code == CRASHED
    there = forks.run("convert", retried.store.url, out, *FLOAT32, environment=environment)
    assert there.code == 0, there.output
    back = forks.run("convert", out, tmp_path / "back", "--exporter=fastvideo", environment=environment)
    assert back.code == 0, back.output
    assert result(open_job(open_store(tmp_path / "back"))) == result(retried)
    assert not list((tmp_path / "back").glob(".tmp/*"))
