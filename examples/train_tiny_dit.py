#!/usr/bin/env python3
"""Train a tiny diffusion transformer on latents that `streamprep encode` wrote; stop it anywhere, and go on.

    python examples/train_tiny_dit.py OUT --run-dir run --steps 200
    python examples/train_tiny_dit.py OUT --run-dir run --steps 200 --stop-after 70   # ends early, as if killed
    python examples/train_tiny_dit.py OUT --run-dir run --steps 200 --num-workers 3   # goes on, with other workers

OUT is any finished output, a folder or a URL, in any format. The transformer is far too small to be of use; what is
shown is the loop. After each step the model, the optimizer and the batch's ``state`` are saved together, so a run that
was stopped has the same losses, to the last bit, as one that was not: ``run/losses.csv`` and ``run/losses.png``.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from streamprep.dataset import EncodedDataset

CHECKPOINT, LOSSES, PLOT = "checkpoint.pt", "losses.csv", "losses.png"


class TinyDiT(nn.Module):
    """Patches of 1x2x2 of a latent, self-attention over them, cross-attention to the caption.

    Args:
        channels: C of the latents.
        text_dim: D of the text embeddings.
        width: Features of a token.
        depth: Blocks.
    """

    def __init__(self, channels: int, text_dim: int, *, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.into = nn.Conv3d(channels, width, (1, 2, 2), (1, 2, 2))
        self.text = nn.Linear(text_dim, width)
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(
            nn.TransformerDecoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.out = nn.ConvTranspose3d(width, channels, (1, 2, 2), (1, 2, 2))

    def forward(self, latent: Tensor, noise_level: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """The velocity from clean to noise.

        Args:
            latent: (B, C, T, H, W), H and W even.
            noise_level: (B,), from 0 (clean) to 1.
            text: (B, L, D).
            text_mask: (B, L) bool, what is caption.
        """
        patches = self.into(latent)
        tokens = patches.flatten(2).transpose(1, 2) + self.time(noise_level[:, None])[:, None]
        for block in self.blocks:
            tokens = block(tokens, self.text(text), memory_key_padding_mask=~text_mask)
        return self.out(tokens.transpose(1, 2).reshape(patches.shape))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, from the beginning or from where an earlier run was stopped."""
    args = _arguments(arguments)
    run_dir = Path(args.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    dataset = EncodedDataset(
        args.out,
        batch_size=args.batch_size,
        seed=args.seed,
        rank=0,
        world_size=1,
        dtype=torch.float32,
        normalise=True,
        caption_dropout=0.1,
        text_padding="longest",
    )
    first = next(iter(EncodedDataset(args.out, batch_size=1, rank=0, world_size=1)))
    torch.manual_seed(args.seed)
    model = TinyDiT(first["vae_latent"].shape[1], first["text_embedding"].shape[-1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    losses: list[float] = []
    if (run_dir / CHECKPOINT).exists():
        saved = torch.load(run_dir / CHECKPOINT, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        dataset.load_state_dict(saved["data"])
        losses = saved["losses"]
        print(f"going on behind step {len(losses)}")
    loader = DataLoader(dataset, batch_size=None, num_workers=args.num_workers)
    while len(losses) < args.steps:
        for batch in loader:
            losses.append(_step(model, optimizer, batch, seed=args.seed + len(losses)))
            _save(run_dir, model, optimizer, batch["state"], losses)
            if len(losses) == args.stop_after:
                print(f"stopped after step {len(losses)}")
                return
            if len(losses) >= args.steps:
                break
    with open(run_dir / LOSSES, "w", newline="") as file:
        csv.writer(file).writerows([("step", "loss"), *enumerate(losses, start=1)])
    _plot(losses).save(run_dir / PLOT)
    print(f"{len(losses)} steps, loss {losses[0]:.4f} -> {sum(losses[-10:]) / len(losses[-10:]):.4f} in {run_dir}")


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Any], *, seed: int) -> float:
    """One step of flow matching; what it draws follows from the step, not from what was drawn before."""
    draw = torch.Generator().manual_seed(seed)
    latent = batch["vae_latent"]
    noise = torch.randn(latent.shape, generator=draw)
    level = torch.rand(len(latent), generator=draw)
    mixed = torch.lerp(latent, noise, level[:, None, None, None, None])
    velocity = model(mixed, level, batch["text_embedding"], batch["text_attention_mask"])
    loss = functional.mse_loss(velocity, noise - latent)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def _save(
    run_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer, data: Any, losses: Sequence[float]
) -> None:
    """All together, and whole or not at all."""
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "data": data, "losses": list(losses)}
    torch.save(saved, run_dir / f"{CHECKPOINT}.new")
    (run_dir / f"{CHECKPOINT}.new").replace(run_dir / CHECKPOINT)


def _plot(losses: Sequence[float], *, width: int = 640, height: int = 360) -> Image.Image:
    """The losses, step by step, from the least to the greatest."""
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    left, top, right, bottom = 60, 20, width - 20, height - 40
    least, most = min(losses), max(losses)
    span = (most - least) or 1.0
    draw.rectangle((left, top, right, bottom), outline="grey")
    points = [
        (
            left + (right - left) * step / max(1, len(losses) - 1),
            bottom - (bottom - top) * (loss - least) / span,
        )
        for step, loss in enumerate(losses)
    ]
    draw.line(points, fill="steelblue", width=2)
    draw.text((4, top), f"{most:.3f}", fill="black")
    draw.text((4, bottom - 10), f"{least:.3f}", fill="black")
    draw.text((left, bottom + 10), "1", fill="black")
    draw.text((right - 30, bottom + 10), str(len(losses)), fill="black")
    draw.text(((left + right) // 2 - 20, bottom + 10), "step", fill="black")
    return picture


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="output of `streamprep encode`: a folder or a URL")
    parser.add_argument("--run-dir", required=True, help="where checkpoint, losses and plot go")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--stop-after", type=int, help="end after so many steps, to try going on")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--num-workers", type=int, default=2, help="processes that read")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
