"""Run by ``pytest`` where this package is installed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from streamprep.testing import ExporterContract, Kind
from streamprep.types import EncodedSample


class TestMusubi(ExporterContract):
    exporter = "musubi"

    def stored_tensors(self, sample: EncodedSample, kind: Kind) -> Mapping[str, Tensor]:
        """Latents are normalised, and called so."""
        stored, video = dict(sample.tensors), self.contract(kind)["video"]
        mean, std = (torch.tensor(video[name]).reshape(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
        stored["vae_latent_normalised"] = (stored.pop("vae_latent").float() - mean) / std
        return stored
