"""What the user says of latents that carry no contract: `declare_contract`, or the same in a TOML file.

The contract is derived from the model, as for encoding, without loading weights. What nobody can know any more, such as
the dtype that the VAE ran in, is ``not known`` in it.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamprep import canonical
from streamprep.errors import UserError

NOT_KNOWN = "not known"
DECLARED = "declared by the user, checked by streamprep as far as shapes and values tell"
_CHOICES = {
    "workload": ("t2v", "i2v", "text"),
    "space": ("raw", "normalised"),
    "text": ("trimmed", "padded"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """What the user says; the keys of the TOML file."""

    model_path: str
    """The model that encoded them: a local diffusers folder (configs are enough) or a hub id."""
    workload: str = "t2v"
    """Which tensors are meant: ``t2v``, ``i2v`` or ``text``."""
    space: str = "raw"
    """Of ``vae_latent``: ``raw``, as the VAE gives it, which FastVideo's scripts for Wan write; or ``normalised``."""
    text: str = "trimmed"
    """``trimmed``: embeddings are as long as their captions; ``padded``: all as long as the longest may be, with zeros
    after the caption, as FastVideo's text_only task writes."""
    train_fps: float | None = None
    """Rate that frames were sampled at (FastVideo's ``--train-fps``), which no column says; only `convert` needs it."""

    def __post_init__(self) -> None:
        for name, able in _CHOICES.items():
            if getattr(self, name) not in able:
                raise UserError(f"{name} must be one of {', '.join(able)}, got {getattr(self, name)!r}")
        if not isinstance(self.model_path, str):
            raise UserError(f"model_path must be a folder or a hub id, got {self.model_path!r}")
        fps = self.train_fps
        if fps is not None and not (type(fps) in (int, float) and 0 < fps < float("inf")):
            raise UserError(f"train_fps must be above 0, got {fps!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredContract:
    """A latent contract by the user's word."""

    contract: Mapping[str, Any]
    """As a plan has it, with ``provenance``."""
    train_fps: float | None = field(default=None)
    """Rate that frames were sampled at; None if the user has not said."""


def declare_contract(
    model_path: str,
    *,
    workload: str = "t2v",
    space: str = "raw",
    text: str = "trimmed",
    train_fps: float | None = None,
) -> DeclaredContract:
    """Say what latents are that carry no contract, for `EncodedDataset`: see `Declaration`.

    Args:
        model_path: The model that encoded them: a local diffusers folder, or a hub id, of which configs are fetched.
        workload: ``t2v``, ``i2v`` or ``text``.
        space: ``raw`` or ``normalised``.
        text: ``trimmed`` or ``padded``.
        train_fps: Frames per second that were encoded.

    Raises:
        UserError: if no model is there, or not one for the workload.
    """
    return contract_of(
        Declaration(model_path=model_path, workload=workload, space=space, text=text, train_fps=train_fps)
    )


def read_declaration(path: str) -> Declaration:
    """The TOML file of `convert --contract`.

    Raises:
        UserError: if it cannot be read, or says something else than a `Declaration`.
    """
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--contract {path}: cannot be read: {error}") from error
    known = [one.name for one in dataclasses.fields(Declaration)]
    if unknown := [name for name in values if name not in known]:
        raise UserError(f"--contract {path}: nothing is called {', '.join(unknown)}; it may say {', '.join(known)}")
    if "model_path" not in values:
        raise UserError(f"--contract {path}: it must say model_path, the model that encoded the latents")
    try:
        return Declaration(**values)
    except UserError as error:
        raise UserError(f"--contract {path}: {error}") from error


def contract_of(said: Declaration) -> DeclaredContract:
    """The contract that follows from the model and what was said.

    Raises:
        UserError: if no model is there, or not one for the workload.
    """
    import torch  # not before a command line is understood

    from streamprep.encoders import EncodeOptions, open_encoder

    options = EncodeOptions(
        workload=said.workload,
        device=torch.device("cpu"),
        vae_dtype=NOT_KNOWN,
        text_dtype="float32",
        allow_tf32=False,
        posterior="mean",
        clean_captions=False,
        text_batch_size=1,
        offload_text_encoder=False,
        digest="ends" if _has_weights(said.model_path, said.workload) else "none",
    )
    contract: dict[str, Any] = json.loads(canonical.to_json(open_encoder(said.model_path, options).contract.to_json()))
    contract["text"] |= {"dtype": NOT_KNOWN, "captions_cleaned": NOT_KNOWN, "padding": said.text}
    if contract["video"] is not None:
        contract["video"] |= {"tf32": NOT_KNOWN, "resize_rule": NOT_KNOWN, "fps_rule": NOT_KNOWN, "space": said.space}
        if said.space == "normalised":
            contract["tensors"]["vae_latent"] = "posterior mean of the clip, normalised, (C, T, H, W)"
    if contract["image"] is not None:
        contract["image"] |= {"dtype": NOT_KNOWN}
    return DeclaredContract(contract=contract | {"provenance": DECLARED}, train_fps=said.train_fps)


def _has_weights(model_path: str, workload: str) -> bool:
    """Whether digests can be taken here; nothing is downloaded for them."""
    parts = ["text_encoder"] if workload == "text" else ["text_encoder", "vae"]
    return all(any(Path(model_path, part).glob("*.safetensors")) for part in parts)
