"""Whether the values of some rows are what was declared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamprep.errors import UserError
from streamprep.foreign.groups import RowGroupReader
from streamprep.foreign.parquet import LATENT
from streamprep.foreign.survey import Survey
from streamprep.row_index import TEXT, RowIndex
from streamprep.storage import Store
from streamprep.tensor_reads import DamagedFile

_GROUPS, _ROWS_OF_GROUP = 2, 8
_FAR, _MUCH_NEARER, _NEITHER = 0.25, 4.0, 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What some rows' values say."""

    num_rows: int
    doubts: tuple[str, ...]
    """What looks odd, and is no reason to refuse."""
    bad: tuple[str, ...]
    """Rows that nobody can train on."""


@dataclass
class _Moments:
    """Mean and standard deviation of each channel."""

    number: int = 0
    total: NDArray[np.float64] | float = 0.0
    squares: NDArray[np.float64] | float = 0.0

    def add(self, latent: NDArray[np.float32]) -> None:
        flat = latent.reshape(len(latent), -1).astype(np.float64)
        self.number += flat.shape[1]
        self.total = self.total + flat.sum(axis=1)
        self.squares = self.squares + (flat**2).sum(axis=1)

    def finish(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        mean = np.asarray(self.total) / self.number
        return mean, np.sqrt(np.maximum(np.asarray(self.squares) / self.number - mean**2, 1e-12))


@dataclass
class _Seen:
    moments: _Moments = field(default_factory=_Moments)
    num_rows: int = 0
    num_with_zero_tail: int = 0
    bad: list[str] = field(default_factory=list)


def check_values(found: Survey, store: Store) -> Sampled:
    """Read some rows of a few row groups, those in between left out, and compare them with the contract.

    Raises:
        UserError: if they clearly are something else than declared.
    """
    index = found.row_index(None)
    reader = RowGroupReader(index, store)
    seen = _Seen()
    for row in _some_rows(index):
        _look_at(index, reader, row, found.contract, seen)
    doubts = []
    if found.contract["text"]["padding"] == "padded" and seen.num_rows and not seen.num_with_zero_tail:
        raise UserError(
            f"{found.url}, column {TEXT}_bytes: none of {seen.num_rows} rows has zeros after its caption, so that "
            "nobody can tell where captions end, and they are declared padded: only padding of zeros can be read"
        )
    if LATENT in index.tensors and seen.moments.number:
        doubts += list(_compare_space(found.url, found.contract["video"], *seen.moments.finish(), seen.num_rows))
    return Sampled(num_rows=seen.num_rows, doubts=tuple(doubts), bad=tuple(seen.bad))


def padded_length(text: NDArray[np.float32]) -> int:
    """Tokens of an embedding (L, D) before its zeros."""
    return int(np.flatnonzero(text.any(axis=1))[-1:].sum()) + 1


def values_of(data: memoryview | bytes, shape: Sequence[int]) -> NDArray[np.float32]:
    """A tensor's values; nothing is copied."""
    return np.frombuffer(data, np.dtype("<f4")).reshape(tuple(shape))


def check_trimmed(text: NDArray[np.float32], contract: Mapping[str, Any], where: str) -> None:
    """Refuse zeros after a caption that is declared trimmed: a trainer would take them for words.

    Raises:
        UserError: if there are any.
    """
    if contract["text"]["padding"] == "trimmed" and not text[-1].any():
        raise UserError(
            f"{where}, column {TEXT}_bytes: its last tokens are zeros, so it is padded, and declared trimmed: declare "
            "text = 'padded'"
        )


def _some_rows(index: RowIndex) -> list[int]:
    assert index.groups is not None
    places, first = np.unique(np.stack([index.file, index.groups.group]), axis=1, return_index=True)
    groups = np.sort(first)[np.unique(np.linspace(0, places.shape[1] - 1, _GROUPS).astype(int))]
    rows = []
    for start in groups:
        same = np.flatnonzero((index.file == index.file[start]) & (index.groups.group == index.groups.group[start]))
        rows += same[np.unique(np.linspace(0, len(same) - 1, _ROWS_OF_GROUP).astype(int))].tolist()
    return rows


def _look_at(index: RowIndex, reader: RowGroupReader, row: int, contract: Mapping[str, Any], seen: _Seen) -> None:
    assert index.groups is not None
    where = f"{index.url}/{index.files[index.file[row]]}, {index.keys_of(np.array([row]))[0]}"
    try:
        stored = reader.row(row)
    except DamagedFile as error:
        seen.bad.append(str(error))
        return
    values = {name: values_of(stored.read(name), tensor.shape[row]) for name, tensor in index.tensors.items()}
    if wrong := [name for name, value in values.items() if not np.isfinite(value).all()]:
        seen.bad.append(f"{where}, column {wrong[0]}_bytes: NaN or infinity; `streamprep convert` leaves such rows out")
        return
    seen.num_rows += 1
    check_trimmed(values[TEXT], contract, where)
    seen.num_with_zero_tail += not values[TEXT][-1].any()
    if LATENT in values:
        seen.moments.add(values[LATENT])


def _compare_space(
    url: str, video: Mapping[str, Any], mean: NDArray[np.float64], std: NDArray[np.float64], num_rows: int
) -> Iterator[str]:
    """How far the channels are from raw and from normalised latents of the model, as Gaussians (Kullback-Leibler)."""
    raw = (np.array(video["latents_mean"]), np.array(video["latents_std"]))
    normalised = (np.zeros_like(mean), np.ones_like(std))
    far = {"raw": _divergence(mean, std, *raw), "normalised": _divergence(mean, std, *normalised)}
    declared = video["space"]
    (other,) = set(far) - {declared}
    distances = ", ".join(f"{name} {distance:.2g}" for name, distance in far.items())
    if far[declared] > _FAR and far[declared] > _MUCH_NEARER * far[other]:
        raise UserError(
            f"{url}, column {LATENT}_bytes: the channels of {num_rows} rows have means from {mean.min():.2g} to "
            f"{mean.max():.2g} and standard deviations from {std.min():.2g} to {std.max():.2g}: that is what {other} "
            f"latents of the declared model have (distance from {distances}), and they are declared {declared}: "
            f"declare space = '{other}', or the model that encoded them"
        )
    if min(far.values()) > _NEITHER:
        yield (
            f"{url}, column {LATENT}_bytes: the channels of {num_rows} rows look neither like raw nor like normalised "
            f"latents of the declared model (distance from {distances}): are they of this model?"
        )


def _divergence(
    mean: NDArray[np.float64], std: NDArray[np.float64], mean_of: NDArray[np.float64], std_of: NDArray[np.float64]
) -> float:
    one = np.log(std_of / std) + (std**2 + (mean - mean_of) ** 2) / (2 * std_of**2) - 0.5
    return float(one.mean())
