"""Whole jobs that write WebDataset: the rows of FastVideo's exporter, killed anywhere, in a bucket, refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from captioned_jobs import CAPTIONS, FLAGS, Encode
from object_stores import NewBucket
from quick_cases import mostly_slow
from servers import Server

from exporters import fastvideo
from exporters import webdataset as exporter
from streamprep import cli
from streamprep.dataset import decode_latents
from streamprep.job import INDEX, Job, open_job
from streamprep.storage import open_store
from streamprep.tensor_members import cast, decode_bytes, same_bytes
from streamprep.verify import verify_job

if TYPE_CHECKING:
    from forks import Forks
    from jobs import EncodeJob

    NewJob = Callable[..., EncodeJob]

pytest_plugins = ["captioned_jobs", "jobs", "object_stores"]
pytestmark = pytest.mark.usefixtures("one_thread")

CRASHED = 137
KILLS = [
    f"{step}{moment}"
    for step in ("plan", "uncond", "attempt", "data", "quarantine", "record", "withdraw", "delete", "index", "success")
    for moment in ("", ".after")
]


def rows_of(current: Job, module: Any) -> dict[str, dict[str, torch.Tensor]]:
    """By id."""
    files = [file.name for record in current.records() for file in record.files]
    return {id: tensors for name in files for id, tensors in module.read_file(current.store, name)}


def urls_of(current: Job) -> list[str]:
    return sorted(map(str, Path(current.store.url).glob("latent_shards/*.tar")))


# The same rows


@pytest.mark.parametrize(
    ("variant", "flags"),
    [
        ("2.1-t2v", ("--workload-type=t2v",)),
        ("2.1-t2v", ("--workload-type=t2v", "--caption=all", "--keep-columns=score,author")),
        ("2.1-i2v", ("--workload-type=i2v",)),
        ("2.1-t2v", ("--workload-type=text", "--caption=all")),
    ],
    ids=["t2v", "t2v-all", "i2v", "text"],
)
@pytest.mark.parametrize(
    "options",
    [("bfloat16",), ("float32", "--latent-format=npy"), ("float16", "--latent-compression=zstd")],
    ids=["bfloat16", "npy", "zstd"],
)
def test_it_holds_what_fastvideos_files_hold_but_for_the_dtype(
    variant: str,
    flags: tuple[str, ...],
    options: tuple[str, ...],
    encode: Encode,
    tiny_models: Callable[[str], Path],
) -> None:
    dtype, *more = options
    wanted = rows_of(encode(tiny_models(variant), *flags), fastvideo)
    current = encode(tiny_models(variant), *flags, "--exporter=webdataset", f"--latent-dtype={dtype}", *more)
    found = rows_of(current, exporter)
    assert list(found) == list(wanted) and verify_job(current).problems == []
    for id, tensors in wanted.items():
        assert set(found[id]) == set(tensors)
        for name, tensor in tensors.items():
            assert same_bytes(found[id][name], cast(tensor, dtype)), (id, name)


def test_the_index_says_where_every_tensor_lies(encode: Encode, tiny_model: Path) -> None:
    for compression in ("none", "zstd"):
        current = encode(tiny_model, "--exporter=webdataset", f"--latent-compression={compression}", "--caption=all")
        rows = rows_of(current, exporter)
        with current.store.open(INDEX) as file:
            index = pq.read_table(file).to_pylist()
        assert len(index) == len(rows) == 6
        for entry, tensors in zip(index, rows.values(), strict=True):
            for name, tensor in tensors.items():
                offset, size, dtype, shape = (entry[f"{name}_{what}"] for what in ("offset", "size", "dtype", "shape"))
                codec = entry.get(f"{name}_codec", "raw")
                assert codec == {"none": "raw", "zstd": "byte-split-zstd"}[compression]
                data = current.store.read_range(entry["file"], offset, size)
                assert same_bytes(decode_bytes(data, dtype=dtype, shape=shape, codec=codec), tensor)


def test_a_clip_with_several_captions_is_stored_once(encode: Encode, tiny_model: Path) -> None:
    current = encode(tiny_model, "--exporter=webdataset", "--caption=all")
    read = list(webdataset.WebDataset(urls_of(current), shardshuffle=False).decode(decode_latents))
    assert {one["__key__"]: one["json"]["captions"] for one in read} == {
        key: [caption for caption in captions if caption] for key, captions in CAPTIONS.items()
    }
    for one in read:
        numbers = [number for number, caption in enumerate(CAPTIONS[one["__key__"]]) if caption]
        expected = {f"text_embedding.{n:02d}.safetensors" for n in numbers[1:]} | {"text_embedding.safetensors"}
        assert {name for name in one if name.startswith("text")} == expected


def test_mean_and_variance_are_kept(encode: Encode, tiny_model: Path) -> None:
    moments = encode(tiny_model, "--exporter=moments_exporter:open_shard", "--posterior=moments")
    current = encode(tiny_model, "--exporter=webdataset", "--posterior=moments", "--latent-dtype=float32")
    assert current.plan.contract["video"]["posterior"] == "moments"
    assert verify_job(current).problems == []
    import moments_exporter

    wanted, found = rows_of(moments, moments_exporter), rows_of(current, exporter)
    assert list(found) == list(wanted)
    for id, tensors in wanted.items():
        assert set(found[id]) == {"vae_latent", "vae_logvar", "text_embedding"}
        assert all(same_bytes(found[id][name], tensor) for name, tensor in tensors.items())


def test_the_contract_says_how_much_was_lost_by_rounding(encode: Encode, tiny_model: Path) -> None:
    said = {}
    for dtype in ("bfloat16", "float16", "float32"):
        current = encode(tiny_model, "--exporter=webdataset", f"--latent-dtype={dtype}")
        said[dtype] = current.plan.contract.get("rounded")
        assert current.plan.config["latent_dtype"] == current.plan.fingerprint["export"]["latent_dtype"] == dtype
    assert said == {
        "bfloat16": {"bfloat16": "relative error at most 2^-8"},
        "float16": {"float16": "relative error at most 2^-11, below 2^-14 an error of at most 2^-25"},
        "float32": None,
    }
    assert "rounded" not in encode(tiny_model).plan.contract


def test_fastvideos_fingerprint_says_nothing_of_what_it_leaves_no_choice_in(encode: Encode, tiny_model: Path) -> None:
    """Jobs that were begun before there was a choice go on."""
    assert set(encode(tiny_model).plan.fingerprint["export"]) == {"exporter", "samples_per_file", "keep_columns"}


# Damage


def test_verify_finds_a_tensor_that_is_not_what_the_record_says(
    encode: Encode, tiny_model: Path, tmp_path: Path
) -> None:
    current = encode(tiny_model, "--exporter=webdataset")
    copy = shutil.copytree(current.store.url, tmp_path / "out")
    record = json.loads((copy / "_streamprep/records/000000.json").read_text())
    record["files"][0]["rows"][0][3]["vae_latent"][0] += 8
    (copy / "_streamprep/records/000000.json").write_text(json.dumps(record))
    assert any("vae_latent of '0' is not at the recorded" in p for p in verify_job(open_job(open_store(copy))).problems)
    (tar, *_) = (copy / "latent_shards").iterdir()
    tar.write_bytes(tar.read_bytes()[:-2000] + bytes(2000))
    assert any(f"{tar.name}: its sha256 is" in p for p in verify_job(open_job(open_store(copy))).problems)


# Kills


@pytest.fixture(scope="module")
def finished(forks: Forks, shards: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> EncodeJob:
    from jobs import EncodeJob

    job = EncodeJob(forks, shards, model, tmp_path_factory.mktemp("undisturbed") / "out")
    process = job.run(serial=True, exporter="webdataset")
    assert process.code == 0, process.output
    return job


@pytest.mark.parametrize("point", mostly_slow(KILLS, quick=("data", "record.after")))
def test_a_job_killed_at_a_durable_step_ends_as_if_it_had_not_been(
    point: str, new_job: NewJob, finished: EncodeJob
) -> None:
    job = new_job()
    if not point.startswith("plan"):
        job.begin_with_an_orphan(exporter="webdataset")
    assert job.run(serial=True, exporter="webdataset", crash_at=point).code == CRASHED
    again = job.run(serial=True, exporter="webdataset")
    assert again.code == 0, again.output
    assert job.result() == finished.result()
    assert job.problems() == []


def test_many_processes_give_the_same_bytes_as_one(new_job: NewJob, finished: EncodeJob) -> None:
    job = new_job()
    process = job.run(exporter="webdataset")
    assert process.code == 0, process.output
    assert job.result() == finished.result()


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        ({"latent_dtype": "float32"}, "export.latent_dtype: bfloat16 there, float32 now"),
        ({"latent_compression": "zstd"}, "export.latent_compression: none there, zstd now"),
    ],
    ids=["dtype", "compression"],
)
def test_other_options_on_the_same_output_are_refused_by_name(
    flags: dict[str, str], difference: str, finished: EncodeJob
) -> None:
    refused = finished.run(serial=True, exporter="webdataset", **flags)
    assert refused.code == 2
    assert difference in refused.output


# A bucket


def test_a_bucket_holds_what_a_folder_holds(
    moto_server: Server,
    new_bucket: NewBucket,
    captioned: Path,
    encode: Encode,
    tiny_model: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = f"{new_bucket(moto_server)}/out"
    flags = ("--exporter=webdataset", "--caption=all")
    assert cli.main(["encode", str(captioned), out, "--model-path", str(tiny_model), *FLAGS, *flags]) == 0
    assert cli.main(["verify", out]) == 0
    local, store = encode(tiny_model, *flags).store, open_store(out)
    names = [entry.path for entry in store.list("latent_shards")]
    assert names and names == [entry.path for entry in local.list("latent_shards")]
    assert all(store.read(name) == local.read(name) for name in names)


# What is asked for before any work


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--exporter=webdataset", "--latent-format=npy"), "--latent-format npy: NumPy's format has no bfloat16"),
        (("--exporter=webdataset", "--latent-dtype=float8"), "takes only bfloat16, float16, float32"),
        (("--latent-dtype=bfloat16",), "--latent-dtype bfloat16: the exporter fastvideo takes only float32"),
        (("--latent-format=npy",), "--latent-format npy: the exporter fastvideo leaves no such choice"),
    ],
)
@pytest.mark.parametrize("verb", ["encode", "plan"])
def test_options_that_an_exporter_does_not_have_are_refused_before_any_work(
    verb: str, flags: tuple[str, ...], message: str, captioned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [str(tmp_path / "out")] if verb == "encode" else []
    assert cli.main([verb, str(captioned), *out, "--model-path=nowhere/at/all", *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_forecast_knows_every_dtype_and_that_captions_share_a_latent(
    captioned: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", str(captioned), "--model-path", str(tiny_model), *FLAGS, "--caption=all"]) == 0
    lines = {line.split(":")[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("size ")}
    latent = 16 * 2 * 4 * 8  # numbers, of 5 frames of 32 x 64
    for name, dtype, latents, width in (
        ("fastvideo", "float32", 6, 4),
        ("webdataset", "bfloat16", 4, 2),
        ("webdataset", "float16", 4, 2),
        ("webdataset", "float32", 4, 4),
    ):
        assert f": {latents * latent * width / 1000:.1f} kB and about" in lines[f"size      {name}, {dtype}"]


def test_a_number_too_large_for_float16_ends_the_job_with_what_to_do(
    captioned: Path,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from streamprep.encoders.wan import WanEncoder

    encode_text = WanEncoder.encode_text
    monkeypatch.setattr(WanEncoder, "encode_text", lambda self, texts: [1e6 * one for one in encode_text(self, texts)])
    out = tmp_path / "out"
    flags = ("--exporter=webdataset", "--latent-dtype=float16")
    assert cli.main(["encode", str(captioned), str(out), "--model-path", str(tiny_model), *FLAGS, *flags]) == 2
    said = capsys.readouterr().err
    assert "text_embedding of '0' cannot be stored as float16: it holds " in said
    assert "use --latent-dtype bfloat16 or float32, and a new output folder" in said
    assert not list((out / "_streamprep").glob("records/*"))
