"""Rows -> one training batch: their tensors read into its memory, and what is drawn anew each epoch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamprep import epochs
from streamprep.errors import first_line
from streamprep.row_index import RAW, TEXT, RowIndex
from streamprep.tensor_members import decode_bytes
from streamprep.tensor_reads import DamagedFile, Located, Row

LATENT, LOGVAR = "vae_latent", "vae_logvar"
_LOGVAR_RANGE = (-30.0, 20.0)  # diffusers' DiagonalGaussianDistribution

Batch = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchMaker:
    """What all batches have in common: see `streamprep.dataset.EncodedDataset`."""

    indexes: Sequence[RowIndex]
    """Of each source."""
    contracts: Sequence[Mapping[str, Any]]
    """Of each source."""
    tensors: tuple[str, ...]
    """That are read."""
    dtype: torch.dtype | None
    """None: as they are stored."""
    stored_dtypes: Mapping[str, torch.dtype]
    text_padding: str
    """``max_length`` or ``longest``."""
    caption_dropout: float
    empty_texts: Sequence[Tensor] | None
    """The embedding of the empty caption of each source, (L, D); None where no caption is dropped."""
    sample: bool
    """Whether latents are drawn from mean and log variance."""
    normalise: bool
    with_captions: bool
    """Whether batches have ids and captions."""
    pin_memory: bool

    def make(self, located: Sequence[Located], rows: Iterator[Row], *, seed: int, epoch: int) -> Batch:
        """One batch, of rows of one bucket.

        Args:
            located: Which rows.
            rows: Their bytes.
            seed: Of all that is drawn.
            epoch: Likewise.
        """
        keys = [self.indexes[source].keys_of(np.array([row]))[0] for source, row in located]
        dropped = [self._is_dropped(key, seed, epoch) for key in keys]
        tensors, texts = self._allocate(located, dropped), []
        for number, ((source, row), stored) in enumerate(zip(located, rows, strict=True)):
            mine = {name: tensor[number] for name, tensor in tensors.items()}
            if TEXT in mine and dropped[number]:
                assert self.empty_texts is not None
                _put_text(self.empty_texts[source], mine.pop(TEXT))
            index = self.indexes[source]
            try:
                for name, target in mine.items():
                    _read_tensor(index, row, stored, name, target)
                if self.with_captions:
                    texts.append(_read_texts(index, row, stored, keys[number]))
            except (ValueError, KeyError) as error:  # of bytes that are no text, JSON or zstandard
                file = index.files[index.file[row]]
                raise DamagedFile(
                    f"{index.url}/{file} is damaged: {keys[number]} cannot be read: {first_line(error)}; `streamprep "
                    "verify` says what to do"
                ) from error
        made: Batch = dict(tensors)
        if LATENT in made:
            made[LATENT] = self._finish_latent(made, located, keys, seed, epoch)
        if TEXT in made:
            made |= self._finish_text(made[TEXT], located, dropped)
        if self.caption_dropout:
            made["text_dropped"] = torch.tensor(dropped, device="cpu")
        source, row = located[0]
        index = self.indexes[source]
        made |= {"keys": keys, "sources": [source for source, _ in located]}
        if self.with_captions:
            made |= {"ids": [id for id, _ in texts], "captions": [caption for _, caption in texts]}
        made["bucket"] = index.buckets[index.bucket[row]]
        return made

    def _allocate(self, located: Sequence[Located], dropped: Sequence[bool]) -> dict[str, Tensor]:
        """A batch's memory, not filled yet."""
        tensors = {}
        source, row = located[0]
        for name in self.tensors:
            shape = [int(size) for size in self.indexes[source].tensors[name].shape[row]]
            if name == TEXT:
                shape[0] = self._text_length(located, dropped)
            dtype = self.dtype or self.stored_dtypes[name]
            if name in (LATENT, LOGVAR) and (self.sample or self.normalise):
                dtype = torch.float32
            if name != LOGVAR or self.sample:
                tensors[name] = _empty((len(located), *shape), dtype, pinned=self.pin_memory)
        return tensors

    def _finish_latent(
        self, made: Batch, located: Sequence[Located], keys: Sequence[str], seed: int, epoch: int
    ) -> Tensor:
        latent: Tensor = made[LATENT]
        if not self.sample and not self.normalise:
            return latent
        if self.sample:
            deviation = made.pop(LOGVAR).clamp_(*_LOGVAR_RANGE).mul_(0.5).exp_()
            for one, scale, key in zip(latent, deviation, keys, strict=True):
                generator = torch.Generator("cpu").manual_seed(epochs.chance(seed, epoch, "posterior", key) % 2**63)
                noise = torch.randn(one.shape, generator=generator, dtype=torch.float32, device="cpu")
                one.addcmul_(scale, noise)
        if self.normalise:
            for one, (source, _) in zip(latent, located, strict=True):
                _normalise(one, self.contracts[source]["video"])
        dtype = self.dtype or self.stored_dtypes[LATENT]
        if dtype == latent.dtype:
            return latent
        return _empty(tuple(latent.shape), dtype, pinned=self.pin_memory).copy_(latent)

    def _text_length(self, located: Sequence[Located], dropped: Sequence[bool]) -> int:
        if self.text_padding == "max_length":
            return self._max_text_length
        return min(self._max_text_length, max(self._lengths(located, dropped)))

    def _lengths(self, located: Sequence[Located], dropped: Sequence[bool]) -> list[int]:
        lengths = []
        for (source, row), without in zip(located, dropped, strict=True):
            if without:
                assert self.empty_texts is not None
                lengths.append(len(self.empty_texts[source]))
            else:
                lengths.append(int(self.indexes[source].tensors[TEXT].shape[row, 0]))
        return lengths

    def _finish_text(self, text: Tensor, located: Sequence[Located], dropped: Sequence[bool]) -> dict[str, Tensor]:
        """Text and its mask; where it is stored with zeros after the captions, those tell how long they are."""
        is_padded = self.contracts[0]["text"]["padding"] == "padded"
        lengths = _padded_lengths(text) if is_padded else torch.tensor(self._lengths(located, dropped), device="cpu")
        if is_padded and self.text_padding == "longest":
            text = text[:, : int(lengths.max())].clone()
        numbers = torch.arange(text.shape[1], device="cpu")
        return {TEXT: text, "text_attention_mask": numbers[None, :] < lengths[:, None]}

    @property
    def _max_text_length(self) -> int:
        return int(self.contracts[0]["text"]["max_length"])

    def _is_dropped(self, key: str, seed: int, epoch: int) -> bool:
        rate = self.caption_dropout
        return rate > 0 and epochs.chance(seed, epoch, "caption", key) < rate * 2**64


def _empty(shape: tuple[int, ...], dtype: torch.dtype, *, pinned: bool) -> Tensor:
    """Memory for a tensor; in a worker of a loader the kind that it hands over without a copy."""
    if torch.utils.data.get_worker_info() is None:
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=pinned)
    size = dtype.itemsize * int(np.prod(shape))
    storage = torch.UntypedStorage._new_shared(size)  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape)  # type: ignore[call-overload, no-any-return]


def _read_texts(index: RowIndex, row: int, stored: Row, key: str) -> tuple[str, str]:
    """A row's id and caption."""
    columns = index.texts["id"]
    form = columns.forms[columns.form[row]]
    id, caption = (decode_text(stored.read(name), name=name, form=form, key=key) for name in ("id", "caption"))
    return id, caption


def decode_text(data: bytes | bytearray | memoryview, *, name: str, form: str, key: str) -> str:
    """The id or caption of a row, out of the bytes at its `streamprep.types.TextLocation`.

    Args:
        data: Those bytes.
        name: ``id`` or ``caption``.
        form: As the location has it.
        key: Of the row.
    """
    if form == "utf8":
        return bytes(data).decode()
    described = json.loads(bytes(data))  # of all rows of its clip
    text: str = described[f"{name}s"][described["keys"].index(key)]
    return text


def _read_tensor(index: RowIndex, row: int, stored: Row, name: str, target: Tensor) -> None:
    """Read one row's tensor; of a text what fits, and zeros after it."""
    columns = index.tensors[name]
    shape = tuple(int(size) for size in columns.shape[row])
    dtype: torch.dtype = getattr(torch, columns.dtypes[columns.dtype[row]])
    codec = columns.codecs[columns.codec[row]]
    if codec != RAW:
        _put_text(_decoded(stored.read(name), dtype, shape, codec), target)
        return
    length = min(shape[0], target.shape[0])
    if dtype == target.dtype:
        stored.read_into(name, _bytes_of(target[:length]))
    else:
        whole = torch.empty((length, *shape[1:]), dtype=dtype, device="cpu")
        stored.read_into(name, _bytes_of(whole))
        target[:length] = whole
    target[length:] = 0


def _padded_lengths(text: Tensor) -> Tensor:
    """Tokens before the zeros of each row."""
    number = torch.arange(1, text.shape[1] + 1, device="cpu")
    return ((text != 0).any(dim=2) * number).amax(dim=1)


def _put_text(text: Tensor, target: Tensor) -> None:
    length = min(text.shape[0], target.shape[0])
    target[:length] = text[:length]
    target[length:] = 0


def _decoded(data: bytearray | memoryview, dtype: torch.dtype, shape: tuple[int, ...], codec: str) -> Tensor:
    return decode_bytes(data, dtype=str(dtype).removeprefix("torch."), shape=shape, codec=codec)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def _normalise(latent: Tensor, video: Mapping[str, Any]) -> None:
    if video["space"] != "raw":
        return
    mean, std = (
        torch.tensor(video[name], dtype=torch.float32, device="cpu")[:, None, None, None]
        for name in ("latents_mean", "latents_std")
    )
    latent.sub_(mean).div_(std)
