"""Every image-to-video sample is checked: its conditioning latent must begin as its video latent does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from making import make_options
from torch import Tensor

from streamprep import cli
from streamprep.contract import VideoContract
from streamprep.encoders import Encoder, open_encoder
from streamprep.errors import LatentMismatch
from streamprep.job import open_job
from streamprep.selfcheck import check_first_frame
from streamprep.storage import open_store
from streamprep.types import ClipBatch

TinyModels = Callable[[str], Path]

pytestmark = pytest.mark.usefixtures("one_thread")


def load(model: Path, **options: Any) -> tuple[Encoder, VideoContract]:
    encoder = open_encoder(str(model), make_options(workload="i2v", **options))
    encoder.load()
    assert encoder.contract.video is not None
    return encoder, encoder.contract.video


def noise(*, batch_size: int, num_frames: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, num_frames, 3, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def encode(encoder: Encoder, frames: Tensor) -> list[dict[str, Tensor]]:
    return encoder.encode_batch(ClipBatch(keys=tuple(f"{row}" for row in range(len(frames))), frames=frames))


def difference(video: VideoContract, tensors: dict[str, Tensor]) -> float:
    """Of the first frames, normalised: the greatest."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (video.latents_mean, video.latents_std))
    expected = (tensors["vae_latent"][:, 0] - mean) / std
    return float((tensors["first_frame_latent"][:, 0] - expected).abs().max())


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def loaded(request: pytest.FixtureRequest, tiny_models: TinyModels) -> tuple[Encoder, VideoContract]:
    return load(tiny_models("2.2-i2v-a14b"), vae_dtype=request.param)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize(("num_frames", "height", "width"), [(1, 32, 48), (5, 32, 48), (9, 64, 96), (5, 112, 16)])
def test_on_a_cpu_healthy_clips_agree_but_for_the_rounding_of_the_normalisation(
    num_frames: int, height: int, width: int, batch_size: int, loaded: tuple[Encoder, VideoContract]
) -> None:
    """In bfloat16 too: the first frame is a chunk of its own for the VAE, so both are the same computation."""
    encoder, video = loaded
    frames = noise(batch_size=batch_size, num_frames=num_frames, height=height, width=width)
    frames[-1] = frames[0]  # as a hole is filled
    for tensors in encode(encoder, frames):
        check_first_frame(video, tensors, "key")
        assert difference(video, tensors) < 1e-6


@pytest.mark.parametrize(
    "mistake",
    [
        lambda frames: frames[:, [1, *range(1, frames.shape[1])]],  # a frame late
        lambda frames: frames.flip(2),  # BGR
        lambda frames: frames.flip(0),  # another clip of the batch
        lambda frames: frames.flip(4),  # mirrored
    ],
)
def test_a_conditioning_latent_of_other_pixels_is_found(
    mistake: Callable[[Tensor], Tensor], loaded: tuple[Encoder, VideoContract]
) -> None:
    encoder, video = loaded
    frames = noise(batch_size=2, num_frames=5, height=64, width=96)
    for tensors, others in zip(encode(encoder, frames), encode(encoder, mistake(frames)), strict=True):
        with pytest.raises(LatentMismatch, match="the conditioning latent of 'a/b' begins with another frame"):
            check_first_frame(video, {**tensors, "first_frame_latent": others["first_frame_latent"]}, "a/b")


def test_a_conditioning_latent_that_is_not_normalised_is_found(loaded: tuple[Encoder, VideoContract]) -> None:
    encoder, video = loaded
    (tensors,) = encode(encoder, noise(batch_size=1, num_frames=5, height=64, width=96))
    with pytest.raises(LatentMismatch):
        check_first_frame(video, {**tensors, "first_frame_latent": tensors["vae_latent"]}, "key")


def test_nothing_is_compared_without_a_conditioning_latent_or_with_nan(loaded: tuple[Encoder, VideoContract]) -> None:
    """NaN makes the sample bad, not the job."""
    encoder, video = loaded
    (tensors,) = encode(encoder, noise(batch_size=1, num_frames=5, height=32, width=32))
    check_first_frame(video, {"vae_latent": tensors["vae_latent"]}, "key")
    for name in ("vae_latent", "first_frame_latent"):
        check_first_frame(video, {**tensors, name: tensors[name] * float("nan")}, "key")


# Whole jobs


def write_flash(path: Path) -> None:
    """A dark frame, then white ones."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(8):
            frame = np.full((48, 64, 3), 255 if number else 40, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    with open(path, "ab") as file:
        file.write((330_000).to_bytes(4, "big") + b"free" + bytes(330_000 - 8))


@pytest.fixture(scope="module")
def shards(make_video: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two units of three and of two clips; the last clip of the second is a flash."""
    root = tmp_path_factory.mktemp("dataset")
    for number, name in enumerate(("a0", "a1", "a2", "b0", "b1 flash")):
        if "flash" in name:
            write_flash(root / f"{name}.mp4")
        else:
            make_video(root / f"{name}.mp4", fps=1, seed=number, padding_bytes=330_000)
        (root / f"{name}.txt").write_text(f"Clip {name}.")
    assert cli.main(["pack", str(root), str(root / "shards"), "--num-workers=1", "--shard-size-mb=1"]) == 0
    return root / "shards"


def leak_white_into_the_first_latent_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """A VAE that is not causal: frames that are nearly white change the latent frame before them."""
    encode = AutoencoderKLWan._encode

    def leaking(self: AutoencoderKLWan, x: Tensor) -> Tensor:
        moments: Tensor = encode(self, x)
        if x.shape[2] > 1:
            moments[:, :, 0] += 0.5 * (x[:, :, 1:].mean(dim=(1, 2, 3, 4)) > 0.8).view(-1, 1, 1, 1)
        return moments

    monkeypatch.setattr(AutoencoderKLWan, "_encode", leaking)


@pytest.mark.parametrize("how", ["--serial", "--no-serial"])
@pytest.mark.parametrize("variant", ["2.1-i2v", "2.2-i2v-a14b"])
def test_a_job_whose_samples_disagree_stops_and_keeps_what_was_committed(
    variant: str,
    how: str,
    shards: Path,
    tiny_models: TinyModels,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    size = ["--max-height=32", "--max-width=48", "--num-frames=5", "--train-fps=1", "--encode-threads=1"]
    command = ["encode", str(shards), str(out), "--model-path", str(tiny_models(variant)), "--workload-type=i2v", *size]
    command += [how, "--dataloader-num-workers=1"]
    with monkeypatch.context() as patch:
        leak_white_into_the_first_latent_frame(patch)
        assert cli.main(command) == 1
    message = capsys.readouterr().err
    assert (
        "the conditioning latent of 'b1%20flash' begins with another frame than its video latent: they differ by"
        in (message)
    )
    current = open_job(open_store(out))
    assert [record.unit for record in current.records()] == ["000000"]
    assert [path.name[:6] for path in (out / "combined_parquet_dataset").iterdir()] == ["000000"]
    assert cli.main(["status", str(out)]) == 4
    passing = ("attempts", "logs")
    committed = {
        path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.parent.name not in passing
    }

    assert cli.main(command) == 0
    assert all(path.read_bytes() == content for path, content in committed.items())
    assert cli.main(["verify", str(out)]) == 0
    assert "5 rows in 2 files" in capsys.readouterr().out


def test_a_model_without_conditioning_latents_has_nothing_to_disagree_about(
    shards: Path, tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leak_white_into_the_first_latent_frame(monkeypatch)
    size = ["--max-height=32", "--max-width=64", "--num-frames=5", "--train-fps=1", "--encode-threads=1", "--serial"]
    model = ["--model-path", str(tiny_models("2.2-ti2v-5b")), "--workload-type=i2v"]
    assert cli.main(["encode", str(shards), str(tmp_path / "out"), *model, *size]) == 0
