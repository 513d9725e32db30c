"""Batches that the memory does not hold are encoded in parts, what fits is remembered, and the record says so.

There is no GPU where these tests mostly run. So the tiny model's own networks are made to say what torch says on one
that is full, for more clips or captions than a test allows; once a process really runs out of memory, a CPU's.
"""

from __future__ import annotations

import dataclasses
import json
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKLWan
from hypothesis import given, settings
from hypothesis import strategies as st
from making import make_options
from pipelines import make_noise, max_difference
from quick_cases import mostly_slow
from torch import Tensor
from transformers import UMT5EncoderModel

from streamprep.cli import main
from streamprep.encoders import encode_clips, open_encoder
from streamprep.encoders.wan import WanEncoder
from streamprep.errors import OutOfMemory
from streamprep.job import open_job
from streamprep.out_of_memory import BatchLimits, is_out_of_memory
from streamprep.storage import open_store
from streamprep.types import ClipBatch

if TYPE_CHECKING:
    from forks import Forks

pytest_plugins = ["jobs"]
pytestmark = pytest.mark.usefixtures("one_thread")

FLAGS = {"max_height": 32, "max_width": 48, "num_frames": 5, "train_fps": 1, "samples_per_file": 2, "encode_threads": 1}
BUCKET = "5x32x48"
OF_A_GPU = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.18 GiB"
LIMIT_MIB = 150
"""Beyond what encoding one clip has taken. Sixteen clips of 5 x 128 x 224 pixels were measured to take 350, one 60."""


def say_it_is_full() -> None:
    raise torch.OutOfMemoryError(OF_A_GPU)


# --- limits


class Memory:
    """Holds so many items at once; `calls` tells how many it was given."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.calls: list[int] = []

    def encode(self, part: slice) -> list[int]:
        self.calls.append(part.stop - part.start)
        if part.stop - part.start > self.capacity:
            say_it_is_full()
        return list(range(part.start, part.stop))


@settings(max_examples=10)  # with a whole library imported, collecting garbage takes a tenth of a second
@given(batches=st.lists(st.integers(0, 20), max_size=6), capacity=st.integers(1, 20))
def test_every_item_is_encoded_once_in_order_and_no_size_fails_twice(batches: list[int], capacity: int) -> None:
    memory, limits = Memory(capacity), BatchLimits()
    for num_items in batches:
        del memory.calls[:]
        known = limits.found.get("a", num_items)
        assert limits.encode("a", num_items, memory.encode) == list(range(num_items))
        assert max(memory.calls, default=0) <= known
        failed = [size for size in memory.calls if size > capacity]
        assert failed == sorted(set(failed), reverse=True) == memory.calls[: len(failed)]
        assert all(2 * size + 1 >= failed[-1] for size in memory.calls[len(failed) : -1] if failed)  # halves, no less


def test_a_size_that_failed_is_not_tried_again_nor_for_other_kinds_known() -> None:
    memory, limits = Memory(3), BatchLimits()
    for _ in range(2):
        limits.encode("a", 8, memory.encode)
    assert memory.calls == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    assert limits.found == {"a": 2}
    del memory.calls[:]
    limits.encode("b", 3, memory.encode)
    assert memory.calls == [3]
    assert limits.found == {"a": 2}


def test_what_was_halved_is_told_once_and_only_if_a_batch_was() -> None:
    memory, limits = Memory(2), BatchLimits()
    limits.encode("a", 4, memory.encode)
    assert limits.take_halved() == {"a": 2}
    limits.encode("a", 2, memory.encode)
    assert limits.take_halved() == {}
    limits.encode("a", 3, memory.encode)
    assert limits.take_halved() == {"a": 2}


def test_the_failed_batch_has_let_go_of_its_memory_when_a_part_of_it_is_tried() -> None:
    """What a traceback's frames hold lives as long as the error does."""
    held: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def encode(part: slice) -> list[int]:
        alive.append(sum(reference() is not None for reference in held))
        activations = torch.zeros(4)
        held.append(weakref.ref(activations))
        return Memory(1).encode(part)

    BatchLimits().encode("a", 4, encode)
    assert alive == [0] * 6


def test_one_that_does_not_fit_alone_is_trouble_of_the_machine() -> None:
    with pytest.raises(
        OutOfMemory, match=r"not even one clip of 77x480x832 alone fits the memory \(CUDA out of"
    ) as one:
        BatchLimits().encode("77x480x832", 5, Memory(0).encode)
    assert "--num-frames" in str(one.value)
    assert isinstance(one.value, MemoryError)
    with pytest.raises(OutOfMemory, match="not even one caption alone") as one:
        BatchLimits().encode("text", 5, Memory(0).encode)
    assert "--text-dtype bfloat16" in str(one.value)


def ask_torch_for_too_much() -> None:
    torch.empty(2**60)


def ask_python_for_too_much() -> None:
    bytearray(2**60)


def cublas_has_none() -> None:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def onednn_has_none() -> None:
    raise RuntimeError("could not create a primitive")


def mismatch() -> None:
    torch.zeros(2) + torch.zeros(3)


@pytest.mark.parametrize(
    "fail",
    mostly_slow(
        [say_it_is_full, ask_torch_for_too_much, ask_python_for_too_much, cublas_has_none, onednn_has_none],
        quick=(ask_torch_for_too_much, cublas_has_none),
    ),
)
def test_every_way_to_say_it_is_understood(fail: Callable[[], None]) -> None:
    def encode(part: slice) -> list[int]:
        if part.stop - part.start > 1:
            fail()
        return [part.start]

    assert BatchLimits().encode("a", 3, encode) == [0, 1, 2]


def test_another_error_is_raised_as_it_is_at_once() -> None:
    calls: list[slice] = []

    def encode(part: slice) -> list[int]:
        calls.append(part)
        mismatch()
        return []

    with pytest.raises(RuntimeError, match="must match the size") as one:
        BatchLimits().encode("a", 4, encode)
    assert len(calls) == 1
    assert not is_out_of_memory(one.value)


# --- one encoder


def open_wan(model: Path, **options: Any) -> WanEncoder:
    encoder = open_encoder(str(model), make_options(**options))
    assert isinstance(encoder, WanEncoder)
    encoder.load()
    return encoder


def fail_above(network: torch.nn.Module, limit: int) -> list[int]:
    """Let a network fail for more than ``limit`` items; what is returned fills with the sizes it is given."""
    sizes: list[int] = []

    def look(_: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        sizes.append(len(inputs[0] if inputs else named["pixel_values"]))
        if sizes[-1] > limit:
            say_it_is_full()

    network.register_forward_pre_hook(look, with_kwargs=True)
    return sizes


@pytest.mark.parametrize("where", ["vae", "image encoder"])
def test_all_tensors_of_a_clip_are_what_it_gives_alone_wherever_the_batch_failed(
    where: str, tiny_models: Callable[[str], Path]
) -> None:
    encoder = open_wan(tiny_models("2.1-i2v"), workload="i2v")
    clips = make_noise(3)
    alone = [encoder.encode_batch(ClipBatch(keys=("one",), frames=clips.frames[row : row + 1]))[0] for row in range(3)]
    assert encoder._image is not None
    sizes = fail_above(encoder._vae.encoder if where == "vae" else encoder._image._encoder, 1)
    halved = encode_clips(encoder, clips)
    assert [size for size in sizes if size > 1] == [3, 2]
    for one, other in zip(halved, alone, strict=True):
        assert set(one) == {"vae_latent", "first_frame_latent", "clip_feature"}
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_vae_lets_go_of_what_it_kept_for_later_frames_when_it_fails(tiny_model: Path) -> None:
    encoder = open_wan(tiny_model)
    chunks = fail_above(encoder._vae.encoder.conv_out, 3)
    encoder.encode_batch(make_noise(3))
    assert len(chunks) == 3  # of 9 frames
    encoder._vae.encoder.conv_in.register_forward_pre_hook(lambda *_: say_it_is_full() if len(chunks) == 5 else None)
    with pytest.raises(torch.OutOfMemoryError):
        encoder.encode_batch(make_noise(3))
    assert len(chunks) == 5
    assert not any(torch.is_tensor(kept) for kept in encoder._vae._enc_feat_map)


# --- whole jobs


class FullGpu:
    """The networks of all models say that the GPU is full for more than so many items at once.

    Only the job's own clips count, not the self-check's. What each was given is in ``clips`` and ``captions``.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.max_clips = self.max_captions = 1000
        self.clips: list[int] = []
        self.captions: list[int] = []
        encode, forward = AutoencoderKLWan.encode, UMT5EncoderModel.forward

        def encode_clips(vae: Any, pixels: Tensor, *rest: Any, **named: Any) -> Any:
            if pixels.shape[2:] == (5, 32, 48):
                self.clips.append(len(pixels))
                if len(pixels) > self.max_clips:
                    say_it_is_full()
            return encode(vae, pixels, *rest, **named)

        def encode_captions(text_encoder: Any, ids: Tensor, *rest: Any, **named: Any) -> Any:
            self.captions.append(len(ids))
            if len(ids) > self.max_captions:
                say_it_is_full()
            return forward(text_encoder, ids, *rest, **named)

        monkeypatch.setattr(AutoencoderKLWan, "encode", encode_clips)
        monkeypatch.setattr(UMT5EncoderModel, "forward", encode_captions)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FullGpu:
    return FullGpu(monkeypatch)


def encode(shards: Path, out: Path, model: Path, **flags: object) -> int:
    settings = {"model_path": model, **FLAGS, "num_workers": 1, **flags}
    named = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    return main(["encode", str(shards), str(out), *named])


def data_files(out: Path) -> list[str]:
    """Their names have their contents' digests."""
    return sorted(path.name for path in (out / "combined_parquet_dataset").iterdir())


def halved(out: Path) -> dict[str, Mapping[str, int]]:
    return {record.unit: record.halved for record in open_job(open_store(out)).records()}


@pytest.mark.parametrize("fit", [1, 2])
def test_a_job_whose_batches_are_too_large_gives_what_one_with_smaller_batches_gives(
    fit: int, gpu: FullGpu, shards: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu.max_clips = fit
    assert encode(shards, tmp_path / "out", model, batch_size=4) == 0
    log = capsys.readouterr().err
    assert [size for size in gpu.clips if size > fit] == [4, 2][: 3 - fit]  # of three units, the first batch
    words = f"too little for whole batches, {fit} clip{'s' * (fit > 1)} of {BUCKET} at once fit"
    assert log.count(words) == log.count("\nmemory ") == 1
    cut = {BUCKET: fit}
    assert halved(tmp_path / "out") == {"000000": cut, "000001": cut, "000002": {}, "000003": cut if fit == 1 else {}}

    assert main(["status", str(tmp_path / "out")]) == 0
    assert f"memory   {words}; the output is good" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "out")]) == 0

    del gpu.clips[:]
    assert encode(shards, tmp_path / "small", model, batch_size=fit) == 0
    assert max(gpu.clips) == fit
    assert data_files(tmp_path / "out") == data_files(tmp_path / "small")
    assert set(map(len, halved(tmp_path / "small").values())) == {0}
    assert main(["status", str(tmp_path / "small")]) == 0
    assert "memory" not in capsys.readouterr().out


@pytest.mark.parametrize("workload_type", ["t2v", "text"])
def test_captions_are_halved_as_clips_are(
    workload_type: str, gpu: FullGpu, shards: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu.max_captions = 2
    assert encode(shards, tmp_path / "out", model, workload_type=workload_type) == 0
    assert len([size for size in gpu.captions if size > 2]) < 3
    assert max(gpu.captions) > 2
    assert {"text": 2} in halved(tmp_path / "out").values()
    assert "too little for whole batches, 2 captions at once fit" in capsys.readouterr().err
    assert encode(shards, tmp_path / "small", model, workload_type=workload_type, text_batch_size=2) == 0
    assert data_files(tmp_path / "out") == data_files(tmp_path / "small")


def test_a_job_that_fits_has_nothing_halved_and_says_nothing(
    gpu: FullGpu, shards: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu.max_clips = 2
    assert encode(shards, tmp_path / "out", model) == 0
    assert "memory" not in capsys.readouterr().err
    for path in (tmp_path / "out/_streamprep/records").iterdir():
        assert json.loads(path.read_bytes())["halved"] == {}


def test_if_one_clip_alone_does_not_fit_the_job_stops_and_with_more_room_goes_on(
    gpu: FullGpu, shards: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    class TakenBySomebodyElse(list[int]):
        def append(self, size: int) -> None:
            super().append(size)
            gpu.max_clips = 2 if len(self) <= 2 else 0  # in its third batch the job is past its first unit

    gpu.clips = TakenBySomebodyElse()
    assert encode(shards, out, model, batch_size=2) == 1
    log = capsys.readouterr().err
    assert f"streamprep: not even one clip of {BUCKET} alone fits the memory (CUDA out of memory" in log
    assert "the same command goes on from here" in log
    assert "Traceback" not in log
    done = {path.name: path.stat().st_mtime_ns for path in (out / "combined_parquet_dataset").iterdir()}
    assert set(halved(out)) == {"000000"}
    assert done
    assert list((out / "_streamprep").rglob("quarantine/*")) == list((out / "_streamprep/quarantine").glob("000000-*"))

    for _ in range(3):  # however often
        assert encode(shards, out, model, batch_size=2) == 1

    gpu.clips, gpu.max_clips = [], 2
    assert encode(shards, out, model, batch_size=2) == 0
    assert encode(shards, tmp_path / "undisturbed", model, batch_size=2) == 0
    assert data_files(out) == data_files(tmp_path / "undisturbed")
    assert done.items() <= {p.name: p.stat().st_mtime_ns for p in (out / "combined_parquet_dataset").iterdir()}.items()
    assert main(["verify", str(out)]) == 0


def test_if_one_caption_alone_does_not_fit_the_job_stops(
    gpu: FullGpu, shards: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu.max_captions = 0
    assert encode(shards, tmp_path / "out", model) == 1
    assert "not even one caption alone fits the memory" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # the self-check has found it out


@pytest.mark.parametrize("network", [AutoencoderKLWan, UMT5EncoderModel])
def test_a_gpu_without_room_for_the_weights_is_told_with_what_to_do(
    network: Any,
    shards: Path,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(network, "to", lambda *_: say_it_is_full())
    assert encode(shards, tmp_path / "out", model) == 1
    log = capsys.readouterr().err
    component = "vae" if network is AutoencoderKLWan else "text_encoder"
    assert f"streamprep: {model / component} does not fit the GPU's memory" in log
    assert "--offload-text-encoder" in log
    assert not (tmp_path / "out").exists()


# --- a memory that is really too small


@pytest.fixture(scope="module")
def larger_shards(make_shards: Callable[..., Path], make_video: Callable[..., Path]) -> Path:
    """Sixteen clips of 5 x 128 x 224 pixels."""
    videos = {
        f"{number}.mp4": lambda path, seed=number: make_video(path, size=(224, 128), fps=1, num_frames=5, seed=seed)
        for number in range(16)
    }
    return make_shards(videos)


@pytest.mark.slow
def test_a_process_that_really_runs_out_of_memory_goes_on_with_less_at_once(
    forks: Forks, larger_shards: Path, model: Path, tmp_path: Path, repo_root: Path
) -> None:
    flags = {**FLAGS, "max_height": 128, "max_width": 224, "model_path": model}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    script = repo_root / "tests/little_memory.py"
    little = forks.run(
        script, LIMIT_MIB, "encode", larger_shards, tmp_path / "out", *arguments, "--serial", "--batch-size", 16
    )
    assert little.code == 0, little.output
    assert "\nmemory too little for whole batches" in little.output
    (record,) = open_job(open_store(tmp_path / "out")).records()
    assert record.num_rows == 16
    assert record.halved["5x128x224"] in (1, 2, 4, 8)

    ample = forks.run("encode", larger_shards, tmp_path / "ample", *arguments, "--serial", "--batch-size", 1)
    assert ample.code == 0, ample.output
    ours, theirs = (read_latents(tmp_path / name) for name in ("out", "ample"))
    assert set(ours) == set(theirs)
    for key, latent in ours.items():
        assert max_difference(latent, theirs[key]) < 1e-4, key


def read_latents(out: Path) -> dict[str, Tensor]:
    rows = pq.read_table(out / "combined_parquet_dataset", columns=["id", "vae_latent_bytes", "vae_latent_shape"])
    return {
        row["id"]: torch.frombuffer(bytearray(row["vae_latent_bytes"]), dtype=torch.float32).view(
            row["vae_latent_shape"]
        )
        for row in rows.to_pylist()
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_that_is_really_full_goes_on_with_less_at_once(tiny_model: Path) -> None:
    encoder = open_wan(tiny_model, device=torch.device("cuda"))
    clips = make_noise(8, num_frames=17, height=256, width=448)
    one = dataclasses.replace(clips, keys=clips.keys[:1], frames=clips.frames[:1])

    def peak_bytes(batch: ClipBatch) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        encoder.encode_batch(batch)
        return torch.cuda.max_memory_reserved()

    encoder.encode_batch(one)  # whatever the libraries take once
    enough_for_some = (peak_bytes(one) + peak_bytes(clips)) // 2
    whole = encoder.encode_batch(clips)
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction(enough_for_some / torch.cuda.get_device_properties(0).total_memory)
        halved = encode_clips(encoder, clips)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert encoder.limits.found["17x256x448"] < 8
    for ours, theirs in zip(halved, whole, strict=True):
        assert max_difference(ours["vae_latent"], theirs["vae_latent"]) < 1e-3
