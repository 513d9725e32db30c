"""Make a tiny Wan text-to-video model with random weights, for tests, demos and smoke runs without a download.

The folder has the layout of ``Wan-AI/Wan2.1-T2V-1.3B-Diffusers`` and loads with ``diffusers.WanPipeline``; the shapes
that a dataset depends on are Wan's (16 latent channels, 4x8x8 compression, 512 tokens), the layers are a few kB wide.

1. ``make_tokenizer`` trains a small vocabulary that behaves like T5's and knows every character.
2. ``make_text_encoder``, ``make_vae`` and ``make_transformer`` draw seeded weights that do not ignore their input.
3. ``save_pretrained`` of the pipeline writes them all.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel
from transformers.utils import logging

TASKS = ("t2v",)
TEXT_DIM = 32
"""Features of a text embedding; 4096 in the real model."""
MAX_TOKENS = 512

CORPUS = """
A red circle moves from left to right over a blue and white checkerboard. A green square falls from the top to the
bottom over a plain black background. A yellow triangle rises from the bottom to the top over a gradient from black on
the left to blue on the right. An orange diamond grows in the middle over grey and white vertical stripes. A purple
ring shrinks in the middle over blue and white horizontal stripes. A pink star circles clockwise around the middle over
black and brown diagonal stripes. A turquoise hexagon moves diagonally from the top left to the bottom right. A red
cross bounces up and down on the same spot. It starts near the left edge and ends near the right edge. The camera stays
still, the background does not change, and nothing else is to be seen.
The video shows a man and a woman who walk along a street in the evening; it is raining, and the lights of the cars
shine on the wet road. In the foreground, a child with a small dog looks at the water. The scene is bright and warm,
with people sitting at tables in front of an old house. A close-up of two hands holding a cup of coffee. An aerial view
of the sea, with waves, clouds and mountains in the distance. The camera slowly follows the bird through the forest,
then turns to the sky. "What is that?" she asks. They were there for 10 minutes, or 25% of the time, at 30 frames per
second.
"""
"""Words of the captions made by ``make_clips.py`` and of captions in general. Other words become more tokens."""


def main() -> None:
    """Read the command line, make the model, and say what was made."""
    parser = argparse.ArgumentParser(
        description="Make a tiny Wan model with random weights, as a folder that diffusers.WanPipeline loads.",
        epilog="example: python tools/make_tiny_model.py /tmp/tiny-wan --seed 0",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder that does not exist yet, or is empty")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same files (default: 0)")
    parser.add_argument("--task", choices=TASKS, default="t2v", help="what the model is for (default: t2v)")
    args = parser.parse_args()
    logging.disable_progress_bar()
    try:
        summary = make_tiny_model(args.out, seed=args.seed, task=args.task)
    except ValueError as error:
        parser.error(str(error))
    print(summary)


def make_tiny_model(out: Path, *, seed: int = 0, task: str = "t2v") -> str:
    """Write the model folder; return one line that says what was made."""
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not an empty folder: delete it, or name another")
    tokenizer = make_tokenizer()
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=make_text_encoder(vocab_size=len(tokenizer), seed=seed),
        vae=make_vae(seed=seed),
        transformer=make_transformer(seed=seed),
        # As the real model's: flow matching, with the shift for small pictures.
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )
    pipeline.save_pretrained(out, safe_serialization=True)
    size_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return f"made a tiny Wan {task} model ({size_bytes / 1e6:.1f} MB, {len(tokenizer)} tokens, seed {seed}) in {out}"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a tokenizer with T5's special ids and word marks, and a token for each byte so that nothing is unknown.

    BPE, although T5's is a unigram model: the unigram trainer gives other scores in every process.
    """
    trained = Tokenizer(models.BPE())
    trained.normalizer, trained.pre_tokenizer = _text_rules()
    ascii_letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    trainer = trainers.BpeTrainer(vocab_size=2000, min_frequency=2, initial_alphabet=ascii_letters, show_progress=False)
    trained.train_from_iterator(CORPUS.splitlines(), trainer)
    return _with_special_tokens(trained)


def _text_rules() -> tuple[normalizers.Normalizer, pre_tokenizers.PreTokenizer]:
    """T5's: compatibility forms are folded, runs of white space are one, and a word starts with a low bar."""
    words = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")]
    return normalizers.NFKC(), pre_tokenizers.Sequence(words)


def _with_special_tokens(trained: Tokenizer) -> PreTrainedTokenizerFast:
    """Put the special tokens and the bytes before the trained ones.

    Had the trainer put them there, it would also have made each byte's token special, and skipped it when decoding.
    """
    bpe = json.loads(trained.to_str())["model"]
    trained_tokens = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    tokens = ["<pad>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *trained_tokens]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[tuple(pair) for pair in bpe["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.normalizer, tokenizer.pre_tokenizer = _text_rules()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_TOKENS,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def make_text_encoder(*, vocab_size: int, seed: int) -> UMT5EncoderModel:
    """Draw a UMT5 encoder; with ``initializer_factor`` 1 its embeddings have a root mean square of 1."""
    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        initializer_factor=1.0,
        is_encoder_decoder=False,
    )
    with _seeded(seed):
        return UMT5EncoderModel(config).eval()


def make_vae(*, seed: int) -> AutoencoderKLWan:
    """Draw a VAE whose latents depend on the picture and have a standard deviation near 1.

    Both need more than PyTorch's own initial weights, which give latents of 0.2 of which a quarter comes from the
    picture and the rest from the frame's number and the edges. He's weights keep the scale through the layers. Biases
    of 0 would be worse than small ones: at mid-grey, the middle of the range, one grey level would change everything.
    """
    with _seeded(seed):
        vae = AutoencoderKLWan(base_dim=4, num_res_blocks=1, z_dim=16, dim_mult=[1, 2, 4, 4])
        for module in vae.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                assert module.bias is not None
                nn.init.normal_(module.bias, std=0.1)
    return vae.eval()


def make_transformer(*, seed: int) -> WanTransformer3DModel:
    """Draw a denoiser; encoding does not need it, the pipeline and a trainer do."""
    with _seeded(seed):
        return WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=32,
            in_channels=16,
            out_channels=16,
            text_dim=TEXT_DIM,
            freq_dim=32,
            ffn_dim=128,
            num_layers=2,
        ).eval()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw the same numbers whatever was drawn before, and leave the caller's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


if __name__ == "__main__":
    main()
