"""Our embeddings against those of the pipelines in diffusers, with every tiny Wan."""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from making import make_options
from pipelines import JOBS, encode_prompt, max_difference, open_pipeline, relative_difference
from torch import Tensor

from streamprep.encoders import open_encoder
from streamprep.encoders.wan import WanEncoder

FLOAT_ERROR = 1e-5
"""Of values of about 1, with another padding or batch size."""
BFLOAT16_ERROR = 0.02
"""Relative L2 of embeddings computed in bfloat16, whose 8 bits round by up to 0.004; measured 0.005 to 0.009."""
CAPTIONS = {
    "plain": "A red circle moves from left to right.",
    "long": "A red circle moves from left to right over a blue and white checkerboard. " * 60,
    "empty": "",
    "unicode": "Zo\u00eb dreht ein Video \U0001f3ac: \u4f60\u597d, \u043f\u0440\u0438\u0432\u0435\u0442 \uff21\ufb01",
    "entities": "Tom &amp;amp; Jerry &lt;run&gt; &quot;fast&quot;",
    "white space": "  A\tdog \n\n runs\u00a0 home.  ",
    "nothing but white space": " \t\n ",
    "mojibake": "The Mona Lisa doesn\u00c3\u00a2\u00e2\u201a\u00ac\u00e2\u201e\u00a2t have eyebrows.",
}

pytestmark = pytest.mark.usefixtures("one_thread")


def open_wan(model: Path, **options: Any) -> WanEncoder:
    encoder = open_encoder(str(model), make_options(**options))
    assert isinstance(encoder, WanEncoder)
    encoder.load()
    return encoder


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Path:
    return tiny_model


@pytest.fixture(scope="module")
def encoder(model: Path) -> WanEncoder:
    return open_wan(model, workload="text")


@pytest.fixture(scope="module")
def raw_encoder(model: Path) -> WanEncoder:
    return open_wan(model, workload="text", clean_captions=False, text_batch_size=1)


@pytest.fixture(scope="module")
def pipeline(model: Path) -> Any:
    return open_pipeline(model, "t2v")


@torch.no_grad()
def raw_embedding(pipeline: Any, caption: str) -> Tensor:
    """(L, D): the tokenizer and the encoder, nothing else."""
    tokens = pipeline.tokenizer(caption, max_length=512, truncation=True, return_tensors="pt")
    return pipeline.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state[0]


def pad(embedding_LD: Tensor) -> Tensor:
    return torch.nn.functional.pad(embedding_LD, (0, 0, 0, 512 - len(embedding_LD)))


@pytest.mark.parametrize(("variant", "workload"), [*JOBS, ("2.1-t2v", "text"), ("2.2-i2v-a14b", "text")])
def test_cleaned_captions_give_what_the_models_own_pipeline_gives(
    variant: str, workload: str, tiny_models: Callable[[str], Path]
) -> None:
    model = tiny_models(variant)
    pipeline = open_pipeline(model, "i2v" if "-i2v" in variant else workload.replace("text", "t2v"))
    embeddings = open_wan(model, workload=workload).encode_text(list(CAPTIONS.values()))
    for name, ours_LD in zip(CAPTIONS, embeddings, strict=True):
        theirs_LD = encode_prompt(pipeline, CAPTIONS[name])
        assert max_difference(pad(ours_LD), theirs_LD) < FLOAT_ERROR, name
        assert len(ours_LD) == int((theirs_LD != 0).any(1).sum()), name


@pytest.mark.parametrize("name", CAPTIONS)
def test_captions_that_are_not_cleaned_give_what_the_encoder_makes_of_the_raw_string(
    name: str, raw_encoder: WanEncoder, pipeline: Any
) -> None:
    (ours_LD,) = raw_encoder.encode_text([CAPTIONS[name]])
    assert max_difference(ours_LD, raw_embedding(pipeline, CAPTIONS[name])) < FLOAT_ERROR


def test_cleaning_matters_and_only_where_there_is_something_to_clean(
    encoder: WanEncoder, raw_encoder: WanEncoder
) -> None:
    for name, caption in CAPTIONS.items():
        (cleaned,), (raw,) = encoder.encode_text([caption]), raw_encoder.encode_text([caption])
        same = cleaned.shape == raw.shape and max_difference(cleaned, raw) < FLOAT_ERROR
        assert same == (name not in ("entities", "mojibake")), name  # T5 folds white space


def test_an_embedding_is_as_long_as_the_caption_and_at_most_512(encoder: WanEncoder, pipeline: Any) -> None:
    lengths = {name: len(encoder.encode_text([caption])[0]) for name, caption in CAPTIONS.items()}
    assert lengths["empty"] == lengths["nothing but white space"] == 1
    assert lengths["plain"] == len(pipeline.tokenizer(CAPTIONS["plain"]).input_ids)
    assert lengths["long"] == 512 < len(pipeline.tokenizer(CAPTIONS["long"], truncation=False).input_ids)


@pytest.mark.parametrize("text_batch_size", [1, 2, 3, 8])
def test_captions_in_batches_give_what_they_give_one_by_one(
    model: Path, encoder: WanEncoder, text_batch_size: int
) -> None:
    captions = list(CAPTIONS.values())
    batched = open_wan(model, workload="text", text_batch_size=text_batch_size)
    for caption, ours in zip(captions, batched.encode_text(captions), strict=True):
        assert max_difference(ours, encoder.encode_text([caption])[0]) < FLOAT_ERROR


def test_each_distinct_caption_is_encoded_once_and_the_longest_together(model: Path) -> None:
    encoder = open_wan(model, workload="text", text_batch_size=2)
    seen: list[tuple[int, ...]] = []
    encoder._text._encoder.register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape)))
    words = ["a dog", "dog " * 30, "a dog", "cat", " a  dog ", html.escape("a & b"), "dog " * 31, "a dog"]
    embeddings = encoder.encode_text(words)
    assert sum(rows for rows, _ in seen) == 5  # cleaned, "a dog" and " a  dog " are one
    assert [rows for rows, _ in seen] == [2, 2, 1]
    assert sorted(length for _, length in seen) == [length for _, length in seen]
    assert seen[-1][1] > 2 * seen[0][1]
    assert torch.equal(embeddings[0], embeddings[2])
    assert torch.equal(embeddings[0], embeddings[4])


def test_no_captions_give_no_embeddings(encoder: WanEncoder) -> None:
    assert encoder.encode_text([]) == []


def test_embeddings_own_their_memory(encoder: WanEncoder) -> None:
    """A view would keep the whole batch alive until its last row is written."""
    for embedding in encoder.encode_text(["a", "a b c", "a b c d e"]):
        assert embedding.is_contiguous()
        assert embedding.untyped_storage().nbytes() == embedding.nbytes


def test_bfloat16_moves_the_embeddings_but_not_far(model: Path, encoder: WanEncoder) -> None:
    captions = list(CAPTIONS.values())
    rounded = open_wan(model, workload="text", text_dtype="bfloat16").encode_text(captions)
    for name, ours, exact in zip(CAPTIONS, rounded, encoder.encode_text(captions), strict=True):
        assert ours.dtype == torch.float32  # what is stored
        assert 0 < relative_difference(ours, exact) < BFLOAT16_ERROR, name


@torch.no_grad()
def test_bfloat16_gives_what_the_pipeline_gives_in_bfloat16(model: Path) -> None:
    """Batch and padding change what is rounded, so they are the same here."""
    pipeline = open_pipeline(model, "t2v")
    encoder = open_wan(model, workload="text", text_dtype="bfloat16")
    encoder_bf16 = type(pipeline.text_encoder).from_pretrained(model / "text_encoder", dtype=torch.bfloat16)
    tokens = pipeline.tokenizer(CAPTIONS["plain"], return_tensors="pt")
    theirs_LD = encoder_bf16(tokens.input_ids, tokens.attention_mask).last_hidden_state[0].float()
    assert max_difference(encoder.encode_text([CAPTIONS["plain"]])[0], theirs_LD) == 0
