"""What is computed in which precision and where, what of the posterior is kept, and that the contract says so."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKLWan
from making import make_options

from streamprep import cli
from streamprep.config import EncodeConfig
from streamprep.contract import describe
from streamprep.encoders import open_encoder
from streamprep.encoders.wan import WanEncoder
from streamprep.errors import UserError
from streamprep.job import check_same, open_job
from streamprep.manifest import Manifest
from streamprep.prepare import fingerprint
from streamprep.settle import settle
from streamprep.storage import open_store
from streamprep.types import ClipBatch

TinyModels = Callable[[str], Path]

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = ["--max-height=32", "--max-width=64", "--num-frames=5", "--train-fps=1", "--encode-threads=1", "--serial"]
MOMENTS = ["--posterior=moments", "--exporter=moments_exporter:open_shard"]


@pytest.fixture(scope="module")
def shards(make_video: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dataset")
    for number in range(3):
        make_video(root / f"{number}.mp4", fps=1, seed=number)
        (root / f"{number}.txt").write_text(f"Caption {number}.")
    assert cli.main(["pack", str(root), str(root / "shards"), "--num-workers=1"]) == 0
    return root / "shards"


@pytest.fixture(autouse=True)
def restored_tf32() -> Iterator[None]:
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    yield
    for backend, value in zip(backends, before, strict=True):
        backend.allow_tf32 = value


def encode(shards: Path, out: Path, model: Path, *flags: str) -> int:
    return cli.main(["encode", str(shards), str(out), "--model-path", str(model), *SIZE, *flags])


def make_config(**changes: Any) -> EncodeConfig:
    return EncodeConfig(
        **{"shards": "s", "out": "o", "model_path": "m", "device": "cpu", "encode_threads": 1} | changes
    )


def files_of(out: Path) -> dict[str, bytes]:
    """Data and embeddings, without plan and records, which say when and where."""
    folder = out / "combined_parquet_dataset"
    paths = [*folder.iterdir(), *(out / "_streamprep").glob("uncond-*")]
    return {path.name: path.read_bytes() for path in paths}


# Precision


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("float16", "--text-dtype float16: UMT5 overflows in float16; use auto, float32, bfloat16"),
        ("half", "--text-dtype half: use auto, float32, bfloat16"),
    ],
)
def test_a_text_dtype_that_overflows_is_refused_with_the_reason(
    dtype: str, message: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        encode(shards, tmp_path / "out", Path("unused"), f"--text-dtype={dtype}")
    assert exit.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("variant", "workload"), [("2.1-i2v", "i2v"), ("2.2-ti2v-5b", "t2v")])
def test_a_job_in_bfloat16_is_near_one_in_float32_and_says_what_it_is(
    variant: str, workload: str, shards: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    rows = {}
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        flags = [f"--workload-type={workload}", f"--vae-dtype={dtype}", f"--text-dtype={dtype}"]
        assert encode(shards, out, tiny_models(variant), *flags) == 0
        (file,) = (out / "combined_parquet_dataset").iterdir()
        rows[dtype] = pq.read_table(file).to_pylist()
        contract = open_job(open_store(out)).plan.contract
        assert (contract["video"]["dtype"], contract["text"]["dtype"]) == (dtype, dtype)
    for exact, rounded in zip(rows["float32"], rows["bfloat16"], strict=True):
        for name in ("vae_latent", "text_embedding", "first_frame_latent"):
            if exact.get(f"{name}_bytes"):
                one, other = (np.frombuffer(row[f"{name}_bytes"], np.float32) for row in (exact, rounded))
                distance = np.linalg.norm(one - other) / np.linalg.norm(one)
                assert 1e-4 < distance < 0.03, name  # bfloat16 keeps 8 bits: 0.4 % each time
                assert rounded[f"{name}_dtype"] == "float32"


@pytest.mark.parametrize(("asked", "settled"), [("auto", "float32"), ("bfloat16", "bfloat16"), ("float32", "float32")])
def test_text_is_encoded_in_float32_on_a_cpu_unless_asked_for(asked: str, settled: str, tmp_path: Path) -> None:
    assert settle(make_config(text_dtype=asked), open_store(tmp_path)).text_dtype == settled


@pytest.mark.parametrize("allow", [False, True])
def test_tf32_is_allowed_by_the_flag_alone(allow: bool, tmp_path: Path) -> None:
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    for backend in backends:
        backend.allow_tf32 = not allow
    config = settle(make_config(allow_tf32=allow), open_store(tmp_path))
    assert [backend.allow_tf32 for backend in backends] == [allow, allow]
    assert config.allow_tf32 is False, "no CPU rounds to TF32"


def test_the_contract_of_a_cpu_says_that_nothing_was_rounded_to_tf32(
    shards: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert encode(shards, tmp_path / "out", tiny_model, "--allow-tf32") == 0
    assert open_job(open_store(tmp_path / "out")).plan.contract["video"]["tf32"] is False
    capsys.readouterr()
    cli.main(["status", str(tmp_path / "out"), "--contract"])
    assert any(line.split() == ["tf32", "no"] for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", r"--device cuda: torch .* finds no GPU"),
        ("cuda:3", r"--device cuda:3: torch .* finds no GPU"),
        ("meta", "--device meta: cpu or cuda is needed"),
        ("gpu", "--device gpu: "),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused(device: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        settle(make_config(device=device), open_store(tmp_path))


# Offloading


def test_a_text_encoder_that_is_offloaded_gives_the_same_bytes(shards: Path, tiny_model: Path, tmp_path: Path) -> None:
    assert encode(shards, tmp_path / "stays", tiny_model, "--negative-prompt=bad") == 0
    assert encode(shards, tmp_path / "goes", tiny_model, "--negative-prompt=bad", "--offload-text-encoder") == 0
    assert files_of(tmp_path / "goes") == files_of(tmp_path / "stays")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_offloading_leaves_the_weights_where_they_were(dtype: str, tiny_model: Path) -> None:
    encoder = open_encoder(str(tiny_model), make_options(offload_text_encoder=True, text_dtype=dtype))
    encoder.load()
    assert isinstance(encoder, WanEncoder)
    module = encoder._text._encoder

    def places() -> dict[str, int]:
        return {name: tensor.data_ptr() for name, tensor in module.state_dict(keep_vars=True).items()}

    seen: list[dict[str, int]] = []
    module.register_forward_pre_hook(lambda *_: seen.append(places()))
    before = places()
    (first,) = encoder.encode_text(["A dog."])
    assert places() == before
    assert all(seen[0][name] != before[name] for name in before), "copies were used"
    assert torch.equal(encoder.encode_text(["A dog."])[0], first)

    failing = module.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encoder.encode_text(["A dog."])
    failing.remove()
    assert places() == before
    assert torch.equal(encoder.encode_text(["A dog."])[0], first)


# The posterior


@pytest.mark.parametrize("workload", ["t2v", "i2v"])
def test_variances_are_refused_before_any_work_by_an_exporter_that_cannot_hold_them(
    workload: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--posterior=moments", f"--workload-type={workload}"]
    assert encode(shards, tmp_path / "out", Path("nowhere/at/all"), *flags) == 2
    assert "--posterior moments: the exporter fastvideo holds only mean" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("variant", "workload"), [("2.1-t2v", "t2v"), ("2.1-i2v", "i2v"), ("2.2-ti2v-5b", "i2v")])
def test_mean_and_variance_are_the_vaes_own(
    variant: str, workload: str, shards: Path, tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[ClipBatch] = []
    encode_batch = WanEncoder.encode_batch

    def remember(self: WanEncoder, batch: ClipBatch) -> list[dict[str, torch.Tensor]]:
        batches.append(ClipBatch(keys=batch.keys, frames=batch.frames.clone()))
        return encode_batch(self, batch)

    monkeypatch.setattr(WanEncoder, "encode_batch", remember)
    model, out = tiny_models(variant), tmp_path / "out"
    assert encode(shards, out, model, f"--workload-type={workload}", *MOMENTS) == 0
    assert cli.main(["verify", str(out)]) == 0

    (name,) = (f"moments/{path.name}" for path in (out / "moments").iterdir())
    import moments_exporter

    written = dict(moments_exporter.read_file(open_store(out), name))
    assert list(written) == ["0.mp4", "1.mp4", "2.mp4"]
    vae = AutoencoderKLWan.from_pretrained(model, subfolder="vae", torch_dtype=torch.float32)
    for batch in batches:
        if set(batch.keys) == {"gradient", "noise"}:  # the self-check's
            continue
        with torch.no_grad():
            posterior = vae.encode(batch.frames.permute(0, 2, 1, 3, 4).contiguous() / 255 * 2 - 1).latent_dist
        for row, key in enumerate(batch.keys):
            assert np.array_equal(written[f"{key}.mp4"]["vae_latent"], posterior.mean[row].numpy())
            assert np.array_equal(written[f"{key}.mp4"]["vae_logvar"], posterior.logvar[row].numpy())
    plan = open_job(open_store(out)).plan
    assert plan.contract["video"]["posterior"] == "moments"
    assert set(plan.contract["tensors"]) >= {"vae_latent", "vae_logvar", "text_embedding"}
    assert encode(shards, out, model, f"--workload-type={workload}", MOMENTS[1]) == 2, "of another posterior"


def test_text_alone_has_no_posterior_to_keep(
    shards: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert encode(shards, tmp_path / "out", tiny_model, "--workload-type=text", *MOMENTS) == 2
    assert "--workload-type text: the exporter moments_exporter:open_shard holds only t2v, i2v" in (
        capsys.readouterr().err
    )


# The contract, wherever it is


@pytest.mark.parametrize(
    ("variant", "workload"),
    [("2.1-t2v", "t2v"), ("2.1-i2v", "i2v"), ("2.2-i2v-a14b", "i2v"), ("2.2-ti2v-5b", "i2v"), ("2.1-t2v", "text")],
)
def test_plan_files_and_status_say_one_contract(
    variant: str, workload: str, shards: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    out, model = tmp_path / "out", tiny_models(variant)
    assert encode(shards, out, model, f"--workload-type={workload}", "--samples-per-file=1") == 0
    contract = json.loads(json.dumps(open_encoder(str(model), make_options(workload=workload)).contract.to_json()))
    assert json.loads((out / "_streamprep/plan.json").read_bytes())["contract"] == contract
    files = list((out / "combined_parquet_dataset").iterdir())
    assert len(files) == 3
    for file in files:
        assert json.loads(pq.read_schema(file).metadata[b"streamprep.contract"]) == contract
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert cli.main(["status", str(out), "--contract"]) == 0
    assert output.getvalue().splitlines() == list(describe(contract_as_in_plan(out)))
    words = output.getvalue().split()
    assert {variant, workload, "tiny-wan", "last_hidden_state", "trimmed", "512"} <= set(words)
    assert set(contract["tensors"]) <= set(words)
    for part, fact in (("video", "centre"), ("image", "hidden_states[-2]")):
        assert (fact in words) == (contract[part] is not None)
    (uncond,) = (out / "_streamprep").glob("uncond-*")
    assert list(safetensors.torch.load_file(uncond)) == ["text_embedding"]


def contract_as_in_plan(out: Path) -> dict[str, Any]:
    return dict(open_job(open_store(out)).plan.contract)


CHANGES = {
    "--vae-dtype=bfloat16": "video.dtype: float32 there, bfloat16 now",
    "--text-dtype=bfloat16": "text.dtype: float32 there, bfloat16 now",
    "--no-clean-captions": "text.captions_cleaned: True there, False now",
    "--caption=all": "text.caption: first there, all now",
    "--training-cfg-rate=0.1": "text.training_cfg_rate: 0.0 there, 0.1 now",
    "--negative-prompt=bad": "text.negative_prompt:  there, bad now",
    "--text-batch-size=3": "text.text_batch_size: 8 there, 3 now",
    "--batch-size=1": "video.preprocess_video_batch_size: 2 there, 1 now",
    "--seed=1": "sampling.seed: 42 there, 1 now",
    "--workload-type=text": "sampling.workload_type: t2v there, text now",
}


@pytest.fixture(scope="module")
def finished(shards: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    assert encode(shards, out, tiny_model) == 0
    return out


@pytest.mark.parametrize("flag", CHANGES)
def test_other_latents_in_the_same_output_are_refused_with_what_differs(
    flag: str, finished: Path, shards: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert encode(shards, finished, tiny_model, flag) == 2
    error = capsys.readouterr().err
    assert "belongs to a job with other settings; use a new output folder, or these:" in error
    assert f"\n  {CHANGES[flag]}\n" in error + "\n"
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_another_model_in_the_same_output_is_refused(
    finished: Path, shards: Path, tiny_models: TinyModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert encode(shards, finished, tiny_models("2.2-t2v-a14b")) == 2
    assert "\n  model.variant: 2.1-t2v there, 2.2-t2v-a14b now" in capsys.readouterr().err
    model = shutil.copytree(tiny_models("2.1-t2v"), tmp_path / "model")
    config = json.loads((model / "vae/config.json").read_text())
    config["latents_mean"][0] += 0.5
    (model / "vae/config.json").write_text(json.dumps(config))
    assert encode(shards, finished, model) == 2
    error = capsys.readouterr().err
    assert "video.latents_mean: [" in error
    assert "video.sha256: " in error


@pytest.mark.parametrize(
    ("option", "value", "difference"),
    [
        ("allow_tf32", True, "video.tf32: False there, True now"),
        ("posterior", "moments", "video.posterior: mean there, moments now"),
    ],
)
def test_what_only_a_gpu_or_another_exporter_can_do_is_part_of_what_is_compared(
    option: str, value: Any, difference: str, tiny_model: Path, tmp_path: Path
) -> None:
    there, now = (
        fingerprint(
            make_config(),
            open_encoder(str(tiny_model), make_options(**options)).contract,
            Manifest(shards=()),
        )
        for options in ({}, {option: value})
    )
    there = json.loads(json.dumps(there))
    check_same(open_store(tmp_path), there, there)
    with pytest.raises(UserError) as refused:
        check_same(open_store(tmp_path), there, now)
    assert str(refused.value).splitlines()[1:] == [f"  {difference}"]
