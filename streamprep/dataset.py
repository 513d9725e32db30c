"""Finished latents -> training batches: `EncodedDataset`, the reader of what `streamprep encode` wrote.

1. `row_index.py` reads where every tensor lies, once: columns of numbers, no objects.
2. `epochs.py` makes the order of an epoch, batches of one bucket, from (seed, epoch, batch size) alone; ranks share
   them out, and within a rank the ``DataLoader``'s workers do.
3. `tensor_reads.py` brings a batch's bytes into its memory; `training_batches.py` makes the batch, with what is drawn
   anew each epoch: dropped captions, a sample of the VAE's posterior.

A position is (epoch, batches consumed by all ranks), so training goes on anywhere: on other ranks, with other workers.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
import torch.distributed
import torch.utils.data
from torch import Tensor

from streamprep import canonical, contract_check, dataset_arguments, epochs, job, row_index, sealed
from streamprep.dataset_arguments import Source
from streamprep.epochs import Epoch, Part, Pool
from streamprep.errors import UserError
from streamprep.foreign import checks, survey
from streamprep.foreign.declared import DeclaredContract, declare_contract
from streamprep.foreign.groups import RowGroupReader
from streamprep.foreign.survey import DroppedRow
from streamprep.row_index import TEXT, RowIndex
from streamprep.shared_position import SharedPosition
from streamprep.storage import Store, open_store
from streamprep.tensor_members import decode_latents
from streamprep.tensor_reads import READ_AHEAD_BYTES, Located, Reader, open_reader, read_rows
from streamprep.training_batches import LATENT, LOGVAR, Batch, BatchMaker

__all__ = ["Batch", "EncodedDataset", "EpochSummary", "Source", "declare_contract", "decode_latents"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochSummary:
    """What becomes of the rows in one epoch."""

    epoch: int
    num_rows: int
    """That are drawn for it."""
    num_batches: int
    """That all ranks together get."""
    dropped_rows: int
    """That no rank gets, because they fill no batch or their batch does not go round."""
    repeated_rows: int
    """That come twice, to fill batches and to let them go round."""

    def __str__(self) -> str:
        return (
            f"epoch {self.epoch}: {self.num_batches} batches of {self.num_rows} rows, "
            f"{self.dropped_rows} dropped, {self.repeated_rows} repeated"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Position:
    """Where a process is in a pass."""

    epoch: int
    consumed: int
    """Batches that all ranks had consumed when the pass began."""
    given: int
    """Batches that this process has given out since."""


class EncodedDataset(torch.utils.data.IterableDataset[Batch]):
    """Training batches from finished outputs of `streamprep encode`, folders or buckets.

    Each batch is a dict, made of rows of one bucket:

    - ``vae_latent`` (B, C, T, H, W), ``text_embedding`` (B, L, D) with zeros after each caption,
      ``text_attention_mask`` (B, L) bool, ``clip_feature`` (B, L, D), ``first_frame_latent`` (B, C, T, H, W): those
      that are stored;
    - ``keys``, ``sources`` (number of each row's output): lists of B; ``bucket``; with ``caption_dropout``
      ``text_dropped`` (B,) bool;
    - with ``with_captions`` ``ids`` and ``captions``, as the dataset has them: lists of B;
    - ``epoch``, ``number`` (of the batch in the epoch) and ``state``: what to save when the trainer is done with it.

    Batches come whole, so a loader is ``DataLoader(dataset, batch_size=None, num_workers=4)``. Each pass is the next
    epoch; `set_epoch` chooses another. Resuming: ``dataset.load_state_dict(state)`` with the ``state`` of the last
    batch that was trained on, on any number of ranks and workers. (`state_dict` of this object knows what it has given
    out itself, not what a loader's workers have: there it refuses.)

    All ranks get the same number of batches. With ``drop_last`` rows that fill no batch, and the last batches that do
    not go round, are left out, other ones each epoch: each key comes at most once. Without it the first ones come
    again: at least once.

    Args:
        sources: A URL or folder, or several, or `Source`s to say how much of each.
        batch_size: Rows in a batch.
        seed: Of the order, and of everything that is drawn.
        rank: Of this process among those that take different batches (a group of sequence-parallel processes is one
            rank); by default torch.distributed's, else that of torchrun's variables, else 0.
        world_size: Of these ranks; likewise.
        drop_last: See above.
        tensors: Read only these; by default all that are stored.
        dtype: Of all floating-point tensors; by default as they are stored.
        text_padding: ``max_length``, the text encoder's, or ``longest`` caption of the batch.
        caption_dropout: Share of rows whose caption is replaced by the empty one, drawn anew each epoch.
        captions: ``all``: each caption of a clip is a row; ``one``: one is drawn for each clip and epoch.
        with_captions: Whether batches hold each row's id and caption, read beside its tensors; a dropped caption's too.
        posterior: ``mean`` or ``sample``: of outputs with ``--posterior moments``, which by default are sampled anew
            each epoch, from (seed, epoch, key).
        normalise: Whether ``vae_latent`` becomes ``(latent - latents_mean) / latents_std``, if it is stored raw.
        contract: What the trainer needs of the latents; other ones are refused. Or what `declare_contract` says of
            latents that carry none because FastVideo's own scripts wrote them.
        empty_text: The embedding of the empty caption, (L, D), for ``caption_dropout`` of sources that have none.
        max_ahead_bytes: Most that is fetched ahead from a bucket, by each worker.
        pin_memory: Make batches in pinned memory, if CUDA is there and this is no worker of a loader (give the loader
            its own ``pin_memory=True`` then).

    Raises:
        UserError: if an output is not finished, or not what is asked for.
    """

    def __init__(
        self,
        sources: str | os.PathLike[str] | Source | Iterable[str | os.PathLike[str] | Source],
        *,
        batch_size: int,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        drop_last: bool = True,
        tensors: Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        text_padding: Literal["max_length", "longest"] = "max_length",
        caption_dropout: float = 0.0,
        captions: Literal["all", "one"] = "all",
        with_captions: bool = False,
        posterior: Literal["mean", "sample"] | None = None,
        normalise: bool = False,
        contract: Mapping[str, Any] | DeclaredContract | None = None,
        empty_text: Tensor | None = None,
        max_ahead_bytes: int = READ_AHEAD_BYTES,
        pin_memory: bool = False,
    ) -> None:
        super().__init__()
        self._sources = dataset_arguments.sources_of(sources)
        self.rank, self.world_size = dataset_arguments.rank_of(rank, world_size)
        self.drop_last = drop_last
        dataset_arguments.check_types(batch_size, seed, tensors, dtype, caption_dropout, contract, max_ahead_bytes)
        dataset_arguments.check_options(batch_size, dtype, text_padding, caption_dropout, captions, posterior)
        self.batch_size, self.seed = int(batch_size), int(seed)
        self._max_ahead_bytes = max_ahead_bytes
        self._stores: list[Store] | None = [open_store(source.url) for source in self._sources]
        self.dropped: list[DroppedRow] = []
        """Rows of FastVideo's own files that are left out."""
        declared = contract if isinstance(contract, DeclaredContract) else None
        # A latent is sampled anew where that can be done, whether the variance was asked for or not.
        also = [LOGVAR] if tensors is not None and LATENT in tensors and posterior != "mean" else []
        self._indexes = [self._load(store, tensors, also, with_captions, declared) for store in self._stores]
        self.contracts = _checked_contracts(self._indexes, contract)
        """Of each source."""
        self._maker = BatchMaker(
            indexes=self._indexes,
            contracts=self.contracts,
            tensors=tuple(self._indexes[0].tensors),
            dtype=dtype,
            stored_dtypes=_stored_dtypes(self._indexes, dtype),
            text_padding=text_padding,
            caption_dropout=caption_dropout,
            empty_texts=self._empty_texts(empty_text) if caption_dropout else None,
            sample=_samples(posterior, self._indexes),
            normalise=normalise,
            with_captions=with_captions,
            pin_memory=pin_memory and torch.cuda.is_available(),
        )
        self._pool = _pool(self._indexes, self._sources, captions)
        self._data_sha256 = _digest(self._indexes, self._sources, captions)
        self._latest: tuple[tuple[int, int], Epoch] | None = None
        epochs.check_at_least_one(
            self._epoch(0),
            world_size=self.world_size,
            drop_last=drop_last,
            batch_size=batch_size,
            num_buckets=len(self.buckets),
        )
        self._warn_of_small_buckets()
        self._shared = SharedPosition()
        self._position: _Position | None = None
        self._to_skip = 0

    # --- what there is

    @property
    def num_rows(self) -> int:
        """Of all sources."""
        return len(self._pool.bucket)

    @property
    def buckets(self) -> dict[str, int]:
        """How many rows there are in each."""
        names = _bucket_names(self._indexes)
        counts = np.bincount(self._pool.bucket, minlength=len(names))
        return dict(zip(names, counts.tolist(), strict=True))

    @property
    def epoch(self) -> int:
        """That the next pass is, or goes on with."""
        return self._shared.epoch

    def __len__(self) -> int:
        """Batches that a whole pass, the one at hand or else the next, gives to this rank.

        What is left of a resumed one is less: torch warns of passes that are longer than their loader's length, not of
        shorter ones.
        """
        where = self._position or self._next_position()
        return len(self._share(self._epoch(where.epoch), 0))

    def summary(self, epoch: int | None = None) -> EpochSummary:
        """What becomes of the rows in an epoch, by default the next."""
        number = self.epoch if epoch is None else epoch
        made = self._epoch(number)
        num_batches = self.world_size * len(self._share(made, 0))
        spare = (len(made.batches) - num_batches) * self.batch_size
        return EpochSummary(
            epoch=number,
            num_rows=made.num_drawn,
            num_batches=num_batches,
            dropped_rows=made.num_dropped + max(0, spare),
            repeated_rows=made.num_repeated + max(0, -spare),
        )

    # --- where it is

    def set_epoch(self, epoch: int) -> None:
        """Let the next pass be this epoch; from its start, unless it is the one that a loaded state is in."""
        if epoch != self.epoch or self._shared.begun:
            self._go_to(epoch, 0)

    def state_dict(self) -> dict[str, Any]:
        """Where the batches stand that this object has given out.

        Raises:
            UserError: if the workers of a ``DataLoader`` gave them out: save the ``state`` of the last batch.
        """
        worker = torch.utils.data.get_worker_info()
        if worker is not None:
            where = self._position or self._next_position()
            state = self._state(where.epoch, where.consumed)
            return state | {"worker": [worker.id, worker.num_workers, where.given], "world_size": self.world_size}
        if self._shared.begun_by_workers:
            raise UserError(
                "the batches come from the workers of a DataLoader, which read ahead of the trainer: save "
                "batch['state'] of the last batch that was trained on, or use torchdata's StatefulDataLoader"
            )
        if self._position is None:
            where = self._next_position()
            return self._state(where.epoch, where.consumed)
        return self._state_after(self._position)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            UserError: if the state is of other data, or of another batch size or seed in the middle of an epoch.
        """
        dataset_arguments.check_state(state)
        skip = self._skip_of(state)
        if state["consumed"] or skip:
            ours = self._state(state["epoch"], state["consumed"])
            if differing := [name for name in ours if ours[name] != state[name]]:
                changes = ", ".join(f"{name} was {state[name]} and is {ours[name]}" for name in differing)
                raise UserError(
                    f"the state is {state['consumed']} batches into epoch {state['epoch']}, whose order changed: "
                    f"{changes}. Finish the epoch as it was begun, or set_epoch({state['epoch'] + 1})"
                )
        self._go_to(state["epoch"], state["consumed"])
        self._to_skip = skip

    def _skip_of(self, state: Mapping[str, Any]) -> int:
        """How many batches a worker has given out that torchdata lets go on."""
        if "worker" not in state:
            return 0
        if state["world_size"] != self.world_size:
            raise UserError(
                f"this is the state of a StatefulDataLoader with workers on {state['world_size']} ranks, which goes on "
                f"only on as many, and there are {self.world_size}; to change their number save batch['state']"
            )
        worker, (number, num_workers, given) = torch.utils.data.get_worker_info(), state["worker"]
        if worker is None or (worker.id, worker.num_workers) != (number, num_workers):
            raise UserError(
                f"this is the state of worker {number} of {num_workers} of a StatefulDataLoader, which goes on only "
                "there; to change their number save batch['state']"
            )
        return int(given)

    def _go_to(self, epoch: int, consumed: int) -> None:
        self._shared.go_to(epoch, consumed)
        self._position, self._to_skip = None, 0

    def _next_position(self) -> _Position:
        return _Position(epoch=self._shared.epoch, consumed=self._shared.consumed, given=self._to_skip)

    def _state(self, epoch: int, consumed: int) -> dict[str, Any]:
        return {
            "format": dataset_arguments.STATE_FORMAT,
            "epoch": epoch,
            "consumed": consumed,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "drop_last": self.drop_last,
            "data_sha256": self._data_sha256,
        }

    def _state_after(self, where: _Position) -> dict[str, Any]:
        """Of a process without workers."""
        numbers = self._share(self._epoch(where.epoch), where.consumed)
        if where.given >= len(numbers):
            return self._state(where.epoch + 1, 0)
        return self._state(where.epoch, where.consumed + where.given * self.world_size)

    # --- reading

    def __iter__(self) -> Iterator[Batch]:
        # No generator: where the pass begins is settled now, not when the first batch is asked for. A loader's worker
        # is asked whenever its turn comes; it has begun by then. Without workers torchdata makes an iterator too many.
        self._position = start = self._next_position()
        if torch.utils.data.get_worker_info() is not None:
            epoch, consumed = self._shared.begin()
            self._position = start = replace(start, epoch=epoch, consumed=consumed)
        self._to_skip = 0
        return self._pass(start)

    def _pass(self, start: _Position) -> Iterator[Batch]:
        if torch.utils.data.get_worker_info() is None:
            self._shared.begin()
        epoch = self._epoch(start.epoch)
        numbers = self._share(epoch, start.consumed)
        last = numbers[-1] if numbers else None
        if (worker := torch.utils.data.get_worker_info()) is not None:
            numbers = epochs.of_worker(numbers, worker=worker.id, num_workers=worker.num_workers)
        numbers = numbers[start.given :]
        readers = [_open_reader(index, store) for index, store in zip(self._indexes, self._open_stores(), strict=True)]
        batches = (epoch.batches[number % len(epoch.batches)] for number in numbers)
        located = ([self._locate(row) for row in batch] for batch in batches)
        read = read_rows(readers, located, max_bytes=self._max_ahead_bytes)
        for given, (number, (batch, rows)) in enumerate(zip(numbers, read, strict=True), start.given + 1):
            made = self._maker.make(batch, rows, seed=self.seed, epoch=start.epoch)
            made |= {"epoch": start.epoch, "number": number}
            consumed = number - self.rank + self.world_size
            made["state"] = self._state(start.epoch + 1, 0) if number == last else self._state(start.epoch, consumed)
            self._position = replace(start, given=given)
            yield made

    def _locate(self, row: int) -> Located:
        for number, part in enumerate(self._pool.parts):
            if row < part.start + part.num_rows:
                return number, int(row) - part.start
        raise AssertionError(row)

    # --- the order

    def _epoch(self, number: int) -> Epoch:
        """Made once for each pass; a tenth of a second for a million rows."""
        key = (number, self.seed)
        if self._latest is None or self._latest[0] != key:
            made = epochs.make_epoch(
                self._pool, seed=self.seed, epoch=number, batch_size=self.batch_size, drop_last=self.drop_last
            )
            self._latest = (key, made)
        return self._latest[1]

    def _share(self, epoch: Epoch, consumed: int) -> range:
        return epochs.share(
            len(epoch.batches),
            consumed=consumed,
            rank=self.rank,
            world_size=self.world_size,
            drop_last=self.drop_last,
        )

    def _warn_of_small_buckets(self) -> None:
        small = {name: number for name, number in self.buckets.items() if number < self.batch_size}
        if small and self.drop_last:
            which = ", ".join(f"{name} ({number})" for name, number in small.items())
            warnings.warn(
                f"no batch of {self.batch_size} can be made of the rows in {which}: they are never seen; lower "
                "batch_size, or say drop_last=False",
                stacklevel=3,
            )

    def _empty_texts(self, given: Tensor | None) -> list[Tensor]:
        """The embedding of the empty caption, (L, D), of each source."""
        found = []
        for store, contract in zip(self._open_stores(), self.contracts, strict=True):
            name = job.open_job(store).plan.unconditional if store.exists(job.PLAN) else None
            if name is None and given is None:
                raise UserError(
                    f"caption_dropout needs the embedding of the empty caption, which {store.url} does not have: "
                    "FastVideo's files hold none; say empty_text="
                )
            where = "empty_text" if name is None else f"{store.url}/{name}"
            found.append(
                dataset_arguments.checked_empty_text(
                    given if name is None else _read_empty_text(store, name), where, contract
                )
            )
        return found

    def _load(
        self,
        store: Store,
        tensors: Sequence[str] | None,
        also: Sequence[str],
        with_texts: bool,
        declared: DeclaredContract | None,
    ) -> RowIndex:
        if declared is None or store.exists(job.PLAN) or store.exists(job.INDEX):
            return row_index.load_row_index(store, tensors, also=also, with_texts=with_texts)
        found = survey.survey(store, declared.contract)
        index = found.row_index(tensors, with_texts=with_texts)
        sampled = checks.check_values(found, store)
        if sampled.bad:
            raise UserError(sampled.bad[0])
        self.dropped += found.dropped
        for line in (*found.describe(), *sampled.doubts, *found.describe_cost()):
            warnings.warn(line, stacklevel=4)
        return index

    # --- processes

    def _open_stores(self) -> list[Store]:
        if self._stores is None:
            self._stores = [open_store(source.url) for source in self._sources]
        return self._stores

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_stores": None, "_latest": None}


def _open_reader(index: RowIndex, store: Store) -> Reader:
    return open_reader(index, store) if index.groups is None else RowGroupReader(index, store)


def _checked_contracts(
    indexes: Sequence[RowIndex], expected: Mapping[str, Any] | DeclaredContract | None
) -> list[Mapping[str, Any]]:
    """The contract of each source, compared with the trainer's and the others', and with what is stored."""
    for index in indexes:
        if set(index.tensors) != set(indexes[0].tensors):
            if set(index.tensors) ^ set(indexes[0].tensors) == {LOGVAR}:
                raise UserError(
                    f"of {index.url} and {indexes[0].url} only one has {LOGVAR}, to sample latents from: say "
                    "posterior='mean', which both have"
                )
            raise UserError(
                f"{index.url} has {', '.join(index.tensors)} and {indexes[0].url} has {', '.join(indexes[0].tensors)}: "
                "say tensors=(...), the ones to be read"
            )
        for problem in row_index.odd_shapes(index):
            raise UserError(problem)
    contracts = []
    for index in indexes:
        contract = index.contract
        assert contract is not None
        if expected is not None and not isinstance(expected, DeclaredContract):
            contract_check.check_expected(index.url, contract, expected)
        contracts.append(contract)
    named = [(index.url, contract) for index, contract in zip(indexes, contracts, strict=True)]
    if isinstance(expected, DeclaredContract):
        named.insert(0, ("what is declared", expected.contract))
    contract_check.check_same(named, indexes[0].tensors)
    return contracts


def _samples(posterior: str | None, indexes: Sequence[RowIndex]) -> bool:
    stored = LOGVAR in indexes[0].tensors
    if posterior == "sample" and LATENT not in indexes[0].tensors:
        raise UserError(f"posterior='sample' is about {LATENT}, which is not read: add it to tensors=")
    if posterior == "sample" and not stored:
        raise UserError(
            f"posterior='sample' needs {LOGVAR}, which {indexes[0].url} does not have: encode with --posterior moments"
        )
    return stored and posterior != "mean"


def _stored_dtypes(indexes: Sequence[RowIndex], dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """What batches are of where the user does not say."""
    found: dict[str, torch.dtype] = {}
    for name in indexes[0].tensors:
        names = sorted({one for index in indexes for one in index.tensors[name].dtypes})
        if len(names) > 1 and dtype is None:
            raise UserError(f"{name} is stored as {' and '.join(names)}: say dtype=, which one batches should have")
        found[name] = getattr(torch, names[0])
    return found


def _read_empty_text(store: Store, name: str) -> Tensor:
    try:
        data = store.read(name)
        sealed.check_unconditional(data, job.open_job(store).plan)
        loaded: dict[str, Tensor] = safetensors.torch.load(data)
        return loaded[TEXT]
    except FileNotFoundError:
        raise UserError(f"caption_dropout needs the embedding of the empty caption, {store.url}/{name}") from None
    except (sealed.Damaged, KeyError) as error:
        raise UserError(f"{store.url}/{name} is damaged: {error}; `streamprep verify` says what to do") from error


def _pool(indexes: Sequence[RowIndex], sources: Sequence[Source], captions: str) -> Pool:
    clips = [index.clips() if captions == "one" else None for index in indexes]
    sizes = [
        index.num_rows if clip is None else int(clip.max()) + 1 for index, clip in zip(indexes, clips, strict=True)
    ]
    weights = [source.weight for source in sources if source.weight is not None]
    draws = epochs.count_draws(sizes, repeats=[source.repeats for source in sources], weights=weights or None)
    if empty := [source.url for source, number in zip(sources, draws, strict=True) if not number]:
        raise UserError(f"an epoch would have no row of {', '.join(map(str, empty))}: raise its repeats or weight")
    names = {name: number for number, name in enumerate(_bucket_names(indexes))}
    buckets, parts, start = [], [], 0
    for index, clip, num_drawn in zip(indexes, clips, draws, strict=True):
        numbers = np.array([names[name] for name in index.buckets], dtype=np.int32)
        buckets.append(numbers[index.bucket])
        parts.append(Part(start=start, num_rows=index.num_rows, clip=clip, num_drawn=num_drawn))
        start += index.num_rows
    return Pool(bucket=np.concatenate(buckets), parts=tuple(parts))


def _bucket_names(indexes: Sequence[RowIndex]) -> list[str]:
    return sorted({name for index in indexes for name in index.buckets})


def _digest(indexes: Sequence[RowIndex], sources: Sequence[Source], captions: str) -> str:
    """Of what the order follows from, beside the seed, the epoch and the batch size; not of where the data lie."""
    parts = [[index.sha256, source.repeats, source.weight] for index, source in zip(indexes, sources, strict=True)]
    return canonical.digest([parts, captions])
