"""What the contract says about sizes; that it says the truth about a model is `test_wan`'s."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamprep import canonical
from streamprep.contract import LatentContract
from streamprep.errors import UserError


def make_contract(**changes: Any) -> LatentContract:
    """Wan 2.1's, but for ``changes``."""
    fields: dict[str, Any] = {
        "family": "wan",
        "model": "tiny",
        "revision": None,
        "vae_class": "AutoencoderKLWan",
        "vae_dtype": "float32",
        "vae_sha256": "0" * 64,
        "posterior": "mean",
        "space": "raw",
        "latents_mean": (0.0,) * 16,
        "latents_std": (1.0,) * 16,
        "latent_channels": 16,
        "temporal_factor": 4,
        "spatial_factor": 8,
        "spatial_multiple": 16,
        "frame_rule": "4k+1",
        "pixel_range": (-1.0, 1.0),
        "resize_rule": "centre crop",
        "fps_rule": "from the first",
        "text_encoder_class": "UMT5EncoderModel",
        "text_dtype": "float32",
        "text_sha256": "0" * 64,
        "text_max_length": 512,
        "text_states": "last_hidden_state",
        "text_padding": "trimmed",
        "captions_cleaned": True,
        "tensors": {"vae_latent": "posterior mean"},
    }
    return LatentContract(**fields | changes)


def test_every_field_survives_json() -> None:
    contract = make_contract()
    value = json.loads(canonical.to_json(contract.to_json()))
    assert set(value) == {field.name for field in dataclasses.fields(LatentContract)}
    assert value == {name: list(field) if isinstance(field, tuple) else field for name, field in _fields(contract)}


def _fields(contract: LatentContract) -> list[tuple[str, Any]]:
    return [(field.name, getattr(contract, field.name)) for field in dataclasses.fields(contract)]


@pytest.mark.parametrize(
    ("num_frames", "nearest", "ignored"),
    [(16, "13 or 17", 3), (18, "17 or 21", 1), (77 + 3, "77 or 81", 3), (163, "161 or 165", 2), (2, "1 or 5", 1)],
)
def test_frames_that_the_vae_would_ignore_are_refused_with_the_nearest_that_work(
    num_frames: int, nearest: str, ignored: int
) -> None:
    message = (
        rf"--num-frames {num_frames} breaks the 4k\+1 rule of wan, whose VAE would ignore the last {ignored}: "
        f"use {nearest}$"
    )
    with pytest.raises(UserError, match=message):
        make_contract().check_geometry(height=480, width=832, num_frames=num_frames)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"height": 540}, "--max-height 540 is no multiple of wan's 16: use 528 or 544$"),
        ({"width": 854}, "--max-width 854 is no multiple of wan's 16: use 848 or 864$"),
        ({"height": 488}, "--max-height 488 is no multiple of wan's 16: use 480 or 496$"),
        ({"width": 9}, "--max-width 9 is no multiple of wan's 16: use 16$"),
    ],
)
def test_sizes_that_do_not_fit_the_model_are_refused_with_the_nearest_that_do(
    size: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_contract().check_geometry(**{"height": 480, "width": 832, "num_frames": 77} | size)


@given(
    height=st.integers(1, 2000),
    width=st.integers(1, 2000),
    num_frames=st.integers(1, 200),
    temporal=st.sampled_from([4, 8]),
    multiple=st.sampled_from([16, 32]),
)
def test_exactly_the_sizes_that_lose_nothing_are_allowed(
    height: int, width: int, num_frames: int, temporal: int, multiple: int
) -> None:
    contract = make_contract(temporal_factor=temporal, frame_rule=f"{temporal}k+1", spatial_multiple=multiple)
    fits = num_frames % temporal == 1 and height % multiple == 0 and width % multiple == 0
    try:
        contract.check_geometry(height=height, width=width, num_frames=num_frames)
    except UserError:
        assert not fits
    else:
        assert fits


@pytest.mark.parametrize(
    ("num_frames", "height", "width", "shape"),
    [(81, 480, 832, (16, 21, 60, 104)), (17, 64, 96, (16, 5, 8, 12)), (1, 16, 16, (16, 1, 2, 2))],
)
def test_latent_bytes_are_those_of_the_float32_latent(
    num_frames: int, height: int, width: int, shape: tuple[int, int, int, int]
) -> None:
    channels, frames, rows, columns = shape
    size = make_contract().latent_bytes(num_frames=num_frames, height=height, width=width)
    assert size == 4 * channels * frames * rows * columns
