"""What the contract says about sizes; that it says the truth about a model is `encoders/test_wan`'s."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from making import make_contract

from streamprep import canonical
from streamprep.contract import LatentContract, describe
from streamprep.errors import UserError


@pytest.mark.parametrize("parts", [{}, {"with_image": True}, {"with_video": False}])
def test_every_field_survives_json(parts: dict[str, bool]) -> None:
    contract = make_contract(**parts)
    value = json.loads(canonical.to_json(contract.to_json()))
    assert value == _plain(contract)
    assert set(value) == {field.name for field in dataclasses.fields(LatentContract)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("parts", [{}, {"with_image": True}, {"with_video": False}])
def test_a_person_is_shown_every_field_and_value(parts: dict[str, bool]) -> None:
    contract = make_contract(**parts, latents_mean=tuple(n / 8 for n in range(16)))
    shown = "\n".join(describe(json.loads(canonical.to_json(contract.to_json()))))
    for part in (contract, contract.text, contract.video, contract.image):
        for field in dataclasses.fields(part) if part is not None else ():
            assert re.search(rf"^ *{field.name}\b", shown, re.MULTILINE), field.name
    for value in ("last_hidden_state", "trimmed", *contract.tensors, "what it holds"):
        assert value in shown
    if contract.video is not None:
        words = " ".join(shown.split())
        assert "latents_mean 0 0.125 0.25 0.375" in words and "1.75 1.875" in words
        assert "captions_cleaned yes" in words
        assert "revision none" in words
    assert max(map(len, shown.splitlines())) <= 110


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
def test_sizes_and_shapes_are_those_of_the_float32_tensors(
    num_frames: int, height: int, width: int, shape: tuple[int, int, int, int]
) -> None:
    size = {"num_frames": num_frames, "height": height, "width": width}
    latent_bytes = 4 * math.prod(shape)
    assert make_contract().tensor_shapes(**size) == {"vae_latent": shape}
    assert make_contract().row_bytes(**size) == latent_bytes
    with_image = make_contract(with_image=True)
    assert with_image.tensor_shapes(**size) == {
        "vae_latent": shape,
        "clip_feature": (257, 64),
        "first_frame_latent": shape,
    }
    assert with_image.row_bytes(**size) == 2 * latent_bytes + 4 * 257 * 64
    assert make_contract(with_video=False).row_bytes(**size) == 0


def test_captions_have_no_size_to_break() -> None:
    make_contract(with_video=False).check_geometry(height=1, width=7, num_frames=2)
