"""Captions -> UMT5 embeddings, as diffusers' Wan pipelines compute them, without the padding."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from streamprep.encoders._loading import load_component, load_preprocessor
from streamprep.errors import UserError
from streamprep.models import ModelFolder
from streamprep.out_of_memory import TEXT, BatchLimits, loading

MAX_LENGTH = 512  # the pipelines' max_sequence_length when called; encode_prompt's own default of 226 is not used
STATES = "last_hidden_state"


class Umt5:
    """A text encoder with its tokenizer.

    Args:
        model: A diffusers folder.
        device: Where to encode.
        dtype: float32 or bfloat16; float16 overflows.
        clean_captions: As the pipeline does (ftfy, HTML entities, white space); False as FastVideo.
        batch_size: Captions at once, at most.
        offload: Keep the weights in main memory, and on the device only while captions are encoded.
        limits: How many captions the memory holds.
    """

    def __init__(
        self,
        model: ModelFolder,
        *,
        device: torch.device,
        dtype: torch.dtype,
        clean_captions: bool,
        batch_size: int,
        offload: bool,
        limits: BatchLimits,
    ) -> None:
        self._model, self._device, self._dtype = model, device, dtype
        self._clean_captions, self._batch_size, self._offload = clean_captions, batch_size, offload
        self._limits = limits
        self._tokenizer: Any = None
        self._encoder: Any = None

    def load(self) -> None:
        """Load tokenizer and weights.

        Raises:
            UserError: if they do not belong together, or the weights are not what they should be.
        """
        from transformers import UMT5EncoderModel

        self._tokenizer = load_preprocessor(self._model, "tokenizer")
        place = torch.device("cpu") if self._offload else self._device
        self._encoder = load_component(self._model, UMT5EncoderModel, "text_encoder", device=place, dtype=self._dtype)
        self._check_tied()
        self._check_tokenizer()

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Embed captions, each distinct one once, the longest together.

        Padding a batch to its longest instead of to 512 tokens is 9 to 12 times cheaper and gives the same numbers up
        to float error: the mask keeps padding out of the attention, and T5's positions are relative.

        Returns:
            For each ``(L, D)`` float32 on the CPU; L is the number of its tokens, at most 512.
        """
        texts = [self._clean(caption) for caption in captions]
        tokens = {text: self._tokenize(text) for text in dict.fromkeys(texts)}
        by_length = sorted(tokens, key=lambda text: (len(tokens[text]), text))
        embedded: dict[str, Tensor] = {}
        with self._on_device():
            for start in range(0, len(by_length), self._batch_size):
                batch = by_length[start : start + self._batch_size]
                embedded |= zip(batch, self._embed_batch([tokens[text] for text in batch]), strict=True)
        return [embedded[text] for text in texts]

    def _clean(self, caption: str) -> str:
        if not self._clean_captions:
            return caption
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        return str(prompt_clean(caption))

    def _tokenize(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(
            text, max_length=MAX_LENGTH, truncation=True, add_special_tokens=True
        ).input_ids
        return ids

    def _embed_batch(self, tokens: Sequence[Sequence[int]]) -> list[Tensor]:
        """In parts if the memory does not hold the whole batch."""
        return self._limits.encode(TEXT, len(tokens), lambda part: self._embed(tokens[part]))

    @torch.inference_mode()
    def _embed(self, tokens: Sequence[Sequence[int]]) -> list[Tensor]:
        longest = max(map(len, tokens))
        ids = torch.full((len(tokens), longest), self._tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, row_tokens in enumerate(tokens):
            ids[row, : len(row_tokens)] = torch.tensor(row_tokens)
            mask[row, : len(row_tokens)] = 1
        states = self._encoder(ids.to(self._device), mask.to(self._device)).last_hidden_state.float().cpu()
        return [states[row, : len(row_tokens)].clone() for row, row_tokens in enumerate(tokens)]

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Copy the weights in, and drop the copies: the originals never leave main memory."""
        if not self._offload:
            yield
            return
        weights = list(itertools.chain(self._encoder.parameters(), self._encoder.buffers()))
        originals = [weight.data for weight in weights]
        try:
            with loading(f"{self._model.path / 'text_encoder'}"):
                for weight in weights:
                    weight.data = weight.data.to(self._device, copy=True)
            yield
        finally:
            for weight, original in zip(weights, originals, strict=True):
                weight.data = original
            if self._device.type == "cuda":
                torch.cuda.empty_cache()  # or the VAE could not have the memory

    def _check_tied(self) -> None:
        """UMT5 reads tokens through ``encoder.embed_tokens``, which its files store only as ``shared``.

        Some versions of transformers 5 left them untied and the first at random (transformers pull request 43880):
        the embeddings look healthy and mean nothing.
        """
        if not torch.equal(self._encoder.shared.weight, self._encoder.encoder.embed_tokens.weight):
            import transformers

            raise UserError(
                f"{self._model.path / 'text_encoder'}: as transformers {transformers.__version__} loads it, "
                "encoder.embed_tokens.weight differs from shared.weight, so that every embedding would be wrong: "
                "use another version of transformers, or get the model again"
            )

    def _check_tokenizer(self) -> None:
        tokenizer, path = self._tokenizer, self._model.path / "tokenizer"
        rows = self._encoder.shared.num_embeddings
        if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
            raise UserError(f"{path} has no padding or no end-of-sequence token: it is not UMT5's")
        ids = self._tokenize("A dog runs.")
        if max(ids) >= rows or len(tokenizer) > rows:
            raise UserError(
                f"{path} has {len(tokenizer)} tokens, the text encoder knows {rows}: they do not belong together"
            )
        if ids[-1] != tokenizer.eos_token_id or len(ids) < 3 or set(ids[:-1]) == {tokenizer.unk_token_id}:
            raise UserError(
                f"{path} turns 'A dog runs.' into {ids}; several known tokens are expected, and the end-of-sequence "
                f"token {tokenizer.eos_token_id} as the last: it is not UMT5's"
            )
