"""Whether latents are what a trainer needs, and whether those of two outputs may be mixed."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from streamprep.errors import UserError

NEEDED_FOR = {
    "video": ("vae_latent", "vae_logvar", "first_frame_latent"),
    "text": ("text_embedding",),
    "image": ("clip_feature",),
}
"""Which tensors a part of the contract is about."""
MAY_DIFFER = {
    "variant",  # 2.1 and 2.2 A14B have the same VAE and text encoder: their digests decide
    "model",
    "revision",
    "provenance",  # what only the user's word stands for has been checked, as far as that can be
    "rounded.bfloat16",
    "rounded.float16",
    "workload",
    "tensors",
    "video.dtype",
    "video.tf32",
    "video.posterior",  # what is stored is seen by its tensors
    "video.resize_rule",
    "video.fps_rule",
    "text.dtype",
    "text.captions_cleaned",
    "image.dtype",
}
"""What two outputs may differ in and be mixed: names, how exactly the same was computed, how clips were chosen."""


_UNKNOWN = ("not taken", "not known")
"""What a contract says of what nobody knows."""


def check_same(contracts: Sequence[tuple[str, Mapping[str, Any]]], tensors: Collection[str]) -> None:
    """Refuse to mix outputs whose numbers mean different things.

    Args:
        contracts: Of each output, its URL first.
        tensors: Which are read.

    Raises:
        UserError: naming the fields.
    """
    (first_url, first), *others = [(url, _mattering(contract, tensors)) for url, contract in contracts]
    for url, other in others:
        differing = [
            f"{name}: {_short(first.get(name))} there, {_short(other.get(name))} here"
            for name in sorted({*first, *other})
            if first.get(name) != other.get(name)
            and not any(value in _UNKNOWN for value in (first.get(name), other.get(name)))
        ]
        if differing:
            raise UserError(
                f"{url} cannot be mixed with {first_url}, their latent contracts differ:\n  " + "\n  ".join(differing)
            )


def check_expected(url: str, contract: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse latents that a trainer does not expect.

    Args:
        url: The output.
        contract: Its contract.
        expected: As much of one as matters: ``{"family": "wan", "video": {"space": "raw"}}``.

    Raises:
        UserError: naming the fields.
    """
    have, wanted = _flat(contract), _flat(expected)
    tensors = contract.get("tensors", {})
    if missing := [name for name in expected.get("tensors", ()) if name not in tensors]:
        raise UserError(f"{url} has no {', '.join(missing)}: its tensors are {', '.join(tensors)}")
    if unknown := [name for name in wanted if name not in have and name != "tensors"]:
        raise UserError(f"{url}: a latent contract has no field {', '.join(unknown)}; it has {', '.join(sorted(have))}")
    differing = [
        f"{name}: {_short(have[name])}, expected {_short(value)}"
        for name, value in wanted.items()
        if name != "tensors" and have[name] != value
    ]
    if differing:
        raise UserError(f"{url} holds other latents than the trainer expects:\n  " + "\n  ".join(differing))


def _mattering(contract: Mapping[str, Any], tensors: Collection[str]) -> dict[str, Any]:
    left_out = {part for part, needed_for in NEEDED_FOR.items() if not set(needed_for) & set(tensors)}
    ignored = MAY_DIFFER if "first_frame_latent" in tensors else MAY_DIFFER | {"video.conditioning_space"}
    return {
        name: value
        for name, value in _flat(contract).items()
        if name not in ignored and name.partition(".")[0] not in left_out
    }


def _flat(contract: Mapping[str, Any]) -> dict[str, Any]:
    return dict(_fields(json.loads(json.dumps(contract))))  # tuples are lists in a plan


def _fields(contract: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in contract.items():
        if isinstance(value, Mapping) and name != "tensors":
            yield from ((f"{name}.{inner}", inner_value) for inner, inner_value in value.items())
        else:
            yield name, value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
