"""Tensors as members of tars: back to the last bit, readable by others, and nothing that is no tensor of ours."""

from __future__ import annotations

import io
import json
import pickle
import re

import numpy as np
import pytest
import safetensors.torch
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from streamprep.tensor_members import (
    DTYPES,
    cast,
    decode_bytes,
    decode_latents,
    decode_member,
    encode_tensor,
    is_finite,
    same_bytes,
)

KINDS = [("safetensors", "none"), ("safetensors", "zstd"), ("npy", "none")]
shapes = st.lists(st.integers(0, 5), max_size=5).map(tuple)


@st.composite
def tensors(draw: st.DrawFn, dtypes: tuple[str, ...] = DTYPES) -> Tensor:
    """Any bits, NaNs of every kind among them."""
    dtype, shape = getattr(torch, draw(st.sampled_from(dtypes))), draw(shapes)
    numbers = np.random.default_rng(draw(st.integers(0, 99))).bytes(int(np.prod(shape)) * dtype.itemsize)
    flat = torch.frombuffer(bytearray(numbers), dtype=dtype) if numbers else torch.empty(0, dtype=dtype)
    return flat.reshape(shape)


def content(tensor: Tensor, *, name: str = "vae_latent", **how: str) -> bytes:
    return b"".join(encode_tensor(name, tensor, **how).chunks)


@pytest.mark.parametrize(("format", "compression"), KINDS)
@given(data=st.data())
def test_a_tensor_comes_back_to_the_last_bit(format: str, compression: str, data: st.DataObject) -> None:
    tensor = data.draw(tensors(("float32", "float16") if format == "npy" else DTYPES))
    encoded = encode_tensor("vae_latent", tensor, format=format, compression=compression)
    member = b"".join(encoded.chunks)
    assert len(member) == encoded.size_bytes
    found = decode_member(f"vae_latent.{encoded.extension}", member)
    assert found is not None and same_bytes(found, tensor)
    described = {"dtype": encoded.dtype, "shape": encoded.shape, "codec": encoded.codec}
    its_bytes = member[encoded.offset : encoded.offset + encoded.size]
    for buffer in (its_bytes, bytearray(its_bytes), memoryview(its_bytes)):
        assert same_bytes(decode_bytes(buffer, **described), tensor)


@given(tensor=tensors())
def test_the_safetensors_library_reads_it(tensor: Tensor) -> None:
    loaded = safetensors.torch.load(content(tensor))
    assert set(loaded) == {"vae_latent"} and same_bytes(loaded["vae_latent"], tensor)


@given(tensor=tensors(("float32", "float16")))
def test_numpy_reads_it(tensor: Tensor) -> None:
    loaded = np.load(io.BytesIO(content(tensor, format="npy")))
    assert same_bytes(torch.from_numpy(loaded), tensor)


def test_values_are_compressed_byte_by_byte() -> None:
    """First bytes first: they are exponents, and much alike."""
    tensor = torch.randn(4, 16, 60, 104, generator=torch.Generator().manual_seed(0)).bfloat16()
    member = zstandard.ZstdDecompressor().decompress(content(tensor, compression="zstd"))
    (planes,) = safetensors.torch.load(member).values()
    assert planes.shape == (2, tensor.numel()) and planes.dtype == torch.uint8
    plain = tensor.reshape(-1).view(torch.uint8).reshape(-1, 2)
    assert torch.equal(planes[0], plain[:, 0]) and torch.equal(planes[1], plain[:, 1])
    whole = zstandard.ZstdCompressor(level=3).compress(plain.numpy().tobytes())
    assert len(content(tensor, compression="zstd")) < 0.95 * len(whole)


def test_memory_that_can_be_written_to_is_not_copied() -> None:
    memory = bytearray(16)
    tensor = decode_bytes(memory, dtype="float32", shape=(2, 2))
    memory[:4] = np.float32(3).tobytes()
    assert tensor[0, 0] == 3


# What is no tensor of ours


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"dtype": "float32", "shape": (3,)}, "8 bytes, a float32 tensor of shape .3,. has 12"),
        ({"dtype": "float64", "shape": (1,)}, "dtype 'float64': one of float32, float16, bfloat16"),
        ({"dtype": "float32", "shape": (2,), "codec": "lzma"}, "codec 'lzma': one of raw, byte-split-zstd"),
        ({"dtype": "float32", "shape": (2,), "codec": "byte-split-zstd"}, "zstandard frame"),
    ],
)
def test_bytes_of_something_else_are_refused(how: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_bytes(bytes(8), **how)  # type: ignore[arg-type]


def test_a_compressed_tensor_must_be_the_one_that_was_asked_for() -> None:
    data = content(torch.zeros(2, 3), compression="zstd")
    for dtype, shape in (("bfloat16", (2, 3)), ("float32", (3, 2))):
        with pytest.raises(ValueError, match=r"a float32 tensor of shape \(2, 3\), not"):
            decode_bytes(data, dtype=dtype, shape=shape, codec="byte-split-zstd")


def planes(metadata: object, *, size: int = 8) -> bytes:
    """A frame with ``size`` bytes of planes, and whatever they are said to be."""
    head = json.dumps(
        {"__metadata__": metadata, "x": {"dtype": "U8", "shape": [2, size // 2], "data_offsets": [0, size]}}
    ).encode()
    return zstandard.ZstdCompressor().compress(len(head).to_bytes(8, "little") + head + bytes(size))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x28\xb5\x2f\xfd",
        zstandard.ZstdCompressor().compress(b"no safetensors"),
        planes({}),
        planes({"dtype": "bfloat16"}),
        planes({"dtype": "object", "shape": "[4]"}),
        planes({"dtype": "bfloat16", "shape": "[5]"}),
        planes({"dtype": "bfloat16", "shape": "[-4]"}),
        planes({"dtype": "float32", "shape": "[2]"}),
    ],
)
def test_damaged_planes_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        decode_member("vae_latent.safetensors.zst", data)


def test_a_frame_that_would_fill_the_memory_is_refused_unseen() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(2**20))
    head = bytes.fromhex("28b52ffd") + b"\xe0" + (2**60).to_bytes(8, "little")
    with pytest.raises(ValueError, match="no tensor of ours"):
        decode_member("vae_latent.safetensors.zst", head + bomb[9:])


@pytest.mark.parametrize("damaged", [b"", b"\xff" * 64, content(torch.zeros(4))[:-1]], ids=["empty", "noise", "cut"])
def test_a_damaged_member_is_refused(damaged: bytes) -> None:
    for name in ("vae_latent.safetensors", "vae_latent.npy"):
        with pytest.raises((ValueError, EOFError)):
            decode_member(name, damaged)


def test_nothing_is_unpickled() -> None:
    """An ``.npy`` of objects is a pickle."""
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        decode_latents(".vae_latent.npy", file.getvalue())
    for name in (".vae_latent.pth", ".pkl", ".pyd", ".vae_latent.pickle"):
        assert decode_latents(name, pickle.dumps({"a": 1})) is None


@pytest.mark.parametrize("name", ["safetensors", "npy", "mp4", "model.SAFETENSORS", "a-b.safetensors", "txt", "x.json"])
def test_members_of_others_are_left_to_others(name: str) -> None:
    assert decode_latents(f".{name}", content(torch.zeros(2))) is None


def test_an_array_of_something_else_is_left_to_others() -> None:
    for array in (np.array(["a"]), np.arange(3), np.zeros(3, ">f4")):
        file = io.BytesIO()
        np.save(file, array)
        assert decode_latents(".vae_latent.npy", file.getvalue()) is None


def test_a_file_of_several_tensors_or_of_another_name_is_not_ours() -> None:
    several = safetensors.torch.save({"vae_latent": torch.zeros(2), "more": torch.zeros(2)})
    assert decode_member("vae_latent.safetensors", several) is None
    assert decode_member("other.safetensors", content(torch.zeros(2))) is None


def test_the_json_of_a_sample_is_its_dictionary() -> None:
    assert decode_latents(".json", b'{"captions": ["A dog."]}') == {"captions": ["A dog."]}


# Casting


@pytest.mark.parametrize("dtype", DTYPES)
@given(numbers=st.lists(st.floats(-6e4, 6e4, width=32), max_size=40), repeats=st.sampled_from([1, 2000]))
def test_casting_rounds_as_torch_does(dtype: str, numbers: list[float], repeats: int) -> None:
    tensor = torch.tensor(numbers * repeats)
    assert same_bytes(cast(tensor, dtype), tensor.to(getattr(torch, dtype)))


@pytest.mark.parametrize(
    ("value", "dtype"), [(65520.0, "float16"), (-1e5, "float16"), (3.4e38, "bfloat16"), (-3.4e38, "bfloat16")]
)
def test_a_number_that_would_become_infinite_is_an_error(value: float, dtype: str) -> None:
    with pytest.raises(OverflowError, match=re.escape(f"it holds {abs(value):g}, and {dtype} ends at ")):
        cast(torch.tensor([1.0, value]), dtype)


@given(tensor=tensors())
def test_finite_is_what_torch_calls_so(tensor: Tensor) -> None:
    assert is_finite(tensor) == bool(torch.isfinite(tensor).all())
