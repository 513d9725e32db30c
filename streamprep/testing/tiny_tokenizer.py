"""A tiny tokenizer that behaves like T5's: trained on a few captions, and knowing every character."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

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
