"""What `streamprep.dataset.EncodedDataset` is given, looked at before it is used: sources, ranks, options, states."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from streamprep.errors import UserError
from streamprep.foreign.declared import DeclaredContract

STATE_FORMAT = "streamprep-reader/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One output among several, and how much of it an epoch takes."""

    url: str | os.PathLike[str] = field(kw_only=False)
    repeats: float = 1
    """How often an epoch goes through its rows; 0.5 takes half of them, others each epoch."""
    weight: float | None = None
    """Its share of an epoch, beside the other sources' weights; the epoch then ends when the first source has been gone
    through ``repeats`` times. All sources have one, or none."""


def sources_of(given: Any) -> tuple[Source, ...]:
    """One or several, as `Source`s.

    Raises:
        UserError: if one is none, or they contradict each other.
    """
    if isinstance(given, (str, os.PathLike, Source)):
        given = [given]
    if not isinstance(given, Iterable):
        raise UserError(f"sources must be a folder or a URL, a Source, or several, got {given!r}")
    sources = tuple(one if isinstance(one, Source) else Source(url=one) for one in given)
    if not sources:
        raise UserError("no source was given")
    for source in sources:
        if not isinstance(source.url, (str, os.PathLike)):
            raise UserError(f"a source is a folder or a URL, got {source.url!r}")
        for value in (source.repeats, 1 if source.weight is None else source.weight):
            if not isinstance(value, Real) or not 0 < value < math.inf:
                raise UserError(f"repeats and weight must be above 0, and finite, got {source}")
    if len({source.weight is None for source in sources}) > 1:
        raise UserError("give all sources a weight, or none: with weights they say the shares of an epoch")
    return sources


def rank_of(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """As given, or as torch.distributed or a launcher says.

    Returns:
        (rank, number of ranks).

    Raises:
        UserError: if only one of them is known, or they cannot be.
    """
    if (rank is None) != (world_size is None):
        raise UserError("give rank and world_size both, or neither")
    if rank is None or world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        else:
            rank, world_size = _number_in("RANK", "0"), _number_in("WORLD_SIZE", "1")
    if not 0 <= rank < world_size:
        raise UserError(f"rank must be from 0 to {world_size - 1}, got {rank}")
    return rank, world_size


def _number_in(variable: str, default: str) -> int:
    value = os.environ.get(variable, default)
    if not value.isdecimal():
        raise UserError(f"the environment variable {variable} must be a whole number, got {value!r}")
    return int(value)


def check_types(
    batch_size: Any, seed: Any, tensors: Any, dtype: Any, caption_dropout: Any, contract: Any, max_ahead_bytes: Any
) -> None:
    """Refuse options of another type, which would fail later and elsewhere.

    Raises:
        UserError: with what it must be.
    """
    for name, value, able, wanted in (
        ("batch_size", batch_size, Integral, "a whole number"),
        ("seed", seed, Integral, "a whole number"),
        ("max_ahead_bytes", max_ahead_bytes, Integral, "a whole number"),
        ("caption_dropout", caption_dropout, Real, "a number"),
        ("dtype", dtype, (torch.dtype, type(None)), "one of torch, torch.bfloat16 say"),
        ("contract", contract, (Mapping, DeclaredContract, type(None)), "a dict, or what declare_contract() gives"),
    ):
        if not isinstance(value, able) or isinstance(value, bool):
            raise UserError(f"{name} must be {wanted}, got {value!r}")
    if isinstance(tensors, str):
        raise UserError(f"tensors must be several names, got {tensors!r}: say tensors=({tensors!r},)")
    if max_ahead_bytes < 1:
        raise UserError(f"max_ahead_bytes must be 1 or more, got {max_ahead_bytes}")


def check_state(state: Mapping[str, Any]) -> None:
    """Refuse what is no state, or was changed by hand.

    Raises:
        UserError: with what is wrong in it.
    """
    if not isinstance(state, Mapping) or state.get("format") != STATE_FORMAT:
        raise UserError(f"not a state of EncodedDataset ({STATE_FORMAT}): {state}")
    needed = ["epoch", "consumed", "seed", "batch_size", "drop_last", "data_sha256"]
    needed += ["world_size"] if "worker" in state else []
    if missing := [name for name in needed if name not in state]:
        raise UserError(f"the state lacks {', '.join(missing)}: {state}")
    for name in ("epoch", "consumed"):
        if type(state[name]) is not int or state[name] < 0:
            raise UserError(f"the state's {name} must be a whole number from 0, got {state[name]!r}")


def check_options(
    batch_size: int,
    dtype: torch.dtype | None,
    text_padding: str,
    caption_dropout: float,
    captions: str,
    posterior: str | None,
) -> None:
    """Refuse values that cannot be.

    Raises:
        UserError: with those that can.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be 1 or more, got {batch_size}")
    if dtype is not None and not dtype.is_floating_point:
        raise UserError(f"dtype must be one of floating point, got {dtype}")
    if not 0 <= caption_dropout <= 1:
        raise UserError(f"caption_dropout must be from 0 to 1, got {caption_dropout}")
    for name, value, able in (
        ("text_padding", text_padding, ("max_length", "longest")),
        ("captions", captions, ("all", "one")),
        ("posterior", posterior, ("mean", "sample", None)),
    ):
        if value not in able:
            raise UserError(f"{name} must be one of {', '.join(map(repr, able))}, got {value!r}")


def checked_empty_text(text: Any, where: str, contract: Mapping[str, Any]) -> Tensor:
    """The embedding of a caption, (L, D), on the CPU.

    Args:
        text: Given, or read.
        where: It is from, for messages.
        contract: Of its model.

    Raises:
        UserError: if it is none of the model's.
    """
    longest, dim = contract["text"]["max_length"], contract["text"]["dim"]
    if not isinstance(text, Tensor) or not text.is_floating_point():
        raise UserError(f"{where} must be a tensor of floating point, got {type(text).__name__}")
    if text.dim() != 2 or not 1 <= text.shape[0] <= longest or text.shape[1] != dim:
        raise UserError(f"{where} must be (L, {dim}) with L from 1 to {longest}, got {tuple(text.shape)}")
    if not text.isfinite().all():
        raise UserError(f"{where} holds NaN or infinity")
    return text.detach().cpu()
