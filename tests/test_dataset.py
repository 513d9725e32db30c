"""`EncodedDataset`: what batches hold, in which order they come, and how training goes on after a stop."""

from __future__ import annotations

import copy
import itertools
import json
import os
import pickle
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import moments_exporter
import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from latents import LANDSCAPE, NUM_ROWS, PORTRAIT, TWO_CAPTIONS, Encoded, change_index, change_plan, write_table_of
from torch.utils.data import DataLoader

from streamprep import job
from streamprep.dataset import EncodedDataset, Source
from streamprep.errors import UserError
from streamprep.storage import open_store
from streamprep.tensor_reads import DamagedFile

pytest_plugins = ["jobs", "latents"]
pytestmark = pytest.mark.usefixtures("one_thread")

Batches = list[dict[str, Any]]


def keys_of(batches: Sequence[dict[str, Any]]) -> list[list[str]]:
    return [batch["keys"] for batch in batches]


def loader_of(dataset: EncodedDataset, num_workers: int, **how: Any) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size=None, num_workers=num_workers, **how)


@pytest.fixture(scope="module")
def ranks_of(latents: Encoded) -> Callable[..., list[EncodedDataset]]:
    """``ranks_of(3, batch_size=...)``: the datasets of so many ranks."""

    def make(world_size: int, **how: Any) -> list[EncodedDataset]:
        how = {"batch_size": 2, "seed": 5} | how
        return [EncodedDataset(latents.out, rank=rank, world_size=world_size, **how) for rank in range(world_size)]

    return make


# --- what is in a batch


def test_batches_hold_the_stored_tensors_and_text_is_padded_with_zeros(latents: Encoded) -> None:
    dataset = EncodedDataset(latents.out, batch_size=2)
    assert dataset.buckets == {"5x32x48": LANDSCAPE + TWO_CAPTIONS, "5x48x32": PORTRAIT}
    seen: list[str] = []
    for batch in dataset:
        shape = (16, 2, 4, 6) if batch["bucket"] == "5x32x48" else (16, 2, 6, 4)
        assert batch["vae_latent"].shape == (2, *shape)
        assert batch["text_embedding"].shape == (2, 512, 32)
        assert batch["text_attention_mask"].shape == (2, 512)
        for number, key in enumerate(batch["keys"]):
            stored = latents.tensors[key]
            length = len(stored["text_embedding"])
            np.testing.assert_array_equal(batch["vae_latent"][number], stored["vae_latent"])
            np.testing.assert_array_equal(batch["text_embedding"][number, :length], stored["text_embedding"])
            assert not batch["text_embedding"][number, length:].any()
            assert batch["text_attention_mask"][number].tolist() == [True] * length + [False] * (512 - length)
        seen += batch["keys"]
    assert sorted(seen) == sorted(latents.keys)


def test_image_to_video_has_its_further_tensors(i2v_latents: Encoded) -> None:
    (batch,) = EncodedDataset(i2v_latents.out, batch_size=3)
    assert {name for name, value in batch.items() if torch.is_tensor(value)} == {
        *("vae_latent", "text_embedding", "text_attention_mask", "clip_feature", "first_frame_latent")
    }
    for name in ("clip_feature", "first_frame_latent"):
        for number, key in enumerate(batch["keys"]):
            np.testing.assert_array_equal(batch[name][number], i2v_latents.tensors[key][name])


def test_text_may_be_padded_to_the_longest_of_the_batch(latents: Encoded) -> None:
    for batch in EncodedDataset(latents.out, batch_size=3, text_padding="longest"):
        lengths = [len(latents.tensors[key]["text_embedding"]) for key in batch["keys"]]
        assert batch["text_embedding"].shape == (3, max(lengths), 32)
        assert batch["text_attention_mask"].sum(1).tolist() == lengths


def test_text_longer_than_the_encoders_length_is_cut(latents: Encoded, copy_of: Callable[[Encoded], Path]) -> None:
    out = copy_of(latents)
    change_plan(out, lambda contract: contract["text"].update(max_length=3))
    for batch in EncodedDataset(out, batch_size=2):
        for number, key in enumerate(batch["keys"]):
            np.testing.assert_array_equal(batch["text_embedding"][number], latents.tensors[key]["text_embedding"][:3])
        assert batch["text_attention_mask"].all()


def test_only_the_tensors_asked_for_are_read(latents: Encoded) -> None:
    batch = next(iter(EncodedDataset(latents.out, batch_size=2, tensors=("vae_latent",))))
    assert [name for name, value in batch.items() if torch.is_tensor(value)] == ["vae_latent"]
    batch = next(iter(EncodedDataset(latents.out, batch_size=2, tensors=("text_embedding",))))
    assert "vae_latent" not in batch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_is_the_stored_values_rounded(latents: Encoded, dtype: torch.dtype) -> None:
    stored = {key: batch for batch in EncodedDataset(latents.out, batch_size=1) for key in batch["keys"]}
    for batch in EncodedDataset(latents.out, batch_size=1, dtype=dtype):
        for name in ("vae_latent", "text_embedding"):
            assert batch[name].dtype == dtype
            assert torch.equal(batch[name], stored[batch["keys"][0]][name].to(dtype))


def test_normalised_latents_are_the_contracts_formula(latents: Encoded) -> None:
    video = latents.contract["video"]
    mean, std = (torch.tensor(video[name]).reshape(1, 16, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    raw = {batch["number"]: batch for batch in EncodedDataset(latents.out, batch_size=2)}
    for batch in EncodedDataset(latents.out, batch_size=2, normalise=True):
        torch.testing.assert_close(batch["vae_latent"], (raw[batch["number"]]["vae_latent"] - mean) / std)
        assert not torch.equal(batch["vae_latent"], raw[batch["number"]]["vae_latent"])


def test_latents_that_are_stored_normalised_are_not_normalised_again(
    latents: Encoded, copy_of: Callable[[Encoded], Path]
) -> None:
    out = copy_of(latents)
    change_plan(out, lambda contract: contract["video"].update(space="normalised"))
    for batch in EncodedDataset(out, batch_size=1, normalise=True):
        np.testing.assert_array_equal(batch["vae_latent"][0], latents.tensors[batch["keys"][0]]["vae_latent"])


# --- what is drawn anew each epoch


def test_dropped_captions_become_the_encoded_empty_one(latents: Encoded) -> None:
    (path,) = (latents.out / "_streamprep").glob("uncond-*.safetensors")
    empty = safetensors.torch.load_file(path)["text_embedding"]
    dataset = EncodedDataset(latents.out, batch_size=2, caption_dropout=0.5)
    kinds = set()
    for batch in dataset:
        for number, (key, dropped) in enumerate(zip(batch["keys"], batch["text_dropped"].tolist(), strict=True)):
            expected = empty if dropped else torch.from_numpy(latents.tensors[key]["text_embedding"])
            length = int(batch["text_attention_mask"][number].sum())
            assert length == len(expected)
            assert torch.equal(batch["text_embedding"][number, :length], expected)
            assert not batch["text_embedding"][number, length:].any()
            kinds.add(dropped)
    assert kinds == {True, False}


def test_captions_are_dropped_at_the_rate_and_others_each_epoch(latents: Encoded) -> None:
    dataset = EncodedDataset(latents.out, batch_size=1, caption_dropout=0.25, tensors=("text_embedding",))
    dropped: Counter[str] = Counter()
    num_epochs = 60
    for _ in range(num_epochs):
        for batch in dataset:
            dropped[batch["keys"][0]] += int(batch["text_dropped"])
    share = dropped.total() / (num_epochs * NUM_ROWS)
    assert abs(share - 0.25) < 0.05  # sigma is 0.0125
    assert all(3 <= dropped[key] <= 30 for key in latents.keys), dropped  # 15, sigma 3.4


@pytest.mark.parametrize(("rate", "expected"), [(0.0, False), (1.0, True)])
def test_a_rate_of_none_or_all_is_none_or_all(latents: Encoded, rate: float, expected: bool) -> None:
    for batch in EncodedDataset(latents.out, batch_size=2, caption_dropout=rate):
        assert ("text_dropped" in batch and bool(batch["text_dropped"].all())) == expected


def moments_of(out: Path) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    store = open_store(out)
    return {
        row.key: tensors
        for record in job.open_job(store).records()
        for file in record.files
        for row, (_, tensors) in zip(file.rows, moments_exporter.read_file(store, file.name), strict=True)
    }


def test_a_posterior_is_sampled_anew_each_epoch_and_the_same_again(moments: Path) -> None:
    stored = moments_of(moments)
    drawn: dict[str, list[torch.Tensor]] = {key: [] for key in stored}
    dataset = EncodedDataset(moments, batch_size=2)
    for _ in range(200):
        for batch in dataset:
            assert "vae_logvar" not in batch
            for key, latent in zip(batch["keys"], batch["vae_latent"], strict=True):
                drawn[key].append(latent)
    for key, samples in drawn.items():
        samples_N = torch.stack(samples)
        mean, deviation = (stored[key][name] for name in ("vae_latent", "vae_logvar"))
        deviation = (deviation / 2).exp()
        assert not torch.equal(samples[0], samples[1])
        score = (samples_N.mean(0) - mean) / deviation * len(samples) ** 0.5
        assert score.abs().max() < 5.5
        assert abs(float(score.std()) - 1) < 0.2
        assert (samples_N.std(0) / deviation - 1).abs().mean() < 0.1
    again = EncodedDataset(moments, batch_size=1)
    again.set_epoch(3)
    for batch in again:
        assert torch.equal(batch["vae_latent"][0], drawn[batch["keys"][0]][3])


def test_the_variance_need_not_be_asked_for(moments: Path) -> None:
    sampled, asked, mean = (
        [batch["vae_latent"] for batch in EncodedDataset(moments, batch_size=2, **how)]
        for how in ({}, {"tensors": ("vae_latent",)}, {"tensors": ("vae_latent",), "posterior": "mean"})
    )
    assert all(torch.equal(one, other) for one, other in zip(sampled, asked, strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(sampled, mean, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torchs_defaults_make_no_difference(moments: Path, dtype: torch.dtype) -> None:
    how: dict[str, Any] = {"batch_size": 2, "normalise": True, "caption_dropout": 0.5}
    expected = list(EncodedDataset(moments, **how))
    torch.set_default_dtype(dtype)
    torch.set_default_device("meta")
    try:
        found = list(EncodedDataset(moments, **how))
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for one, other in zip(found, expected, strict=True):
        for name in ("vae_latent", "text_embedding", "text_attention_mask", "text_dropped"):
            assert one[name].device.type == "cpu" and torch.equal(one[name], other[name]), name


def test_means_may_be_mixed_with_what_could_be_sampled(moments: Path, latents: Encoded) -> None:
    how: dict[str, Any] = {"batch_size": 2, "tensors": ("vae_latent",)}
    with pytest.raises(UserError, match="only one has vae_logvar, to sample latents from: say posterior='mean'"):
        EncodedDataset([moments, latents.out], **how)
    mixed = EncodedDataset([moments, latents.out], posterior="mean", **how)
    assert {source for batch in mixed for source in batch["sources"]} == {0, 1}


def test_numbers_may_be_numpys(latents: Encoded) -> None:
    found = EncodedDataset(latents.out, batch_size=np.int64(2), seed=np.int64(3), caption_dropout=np.float32(0))
    assert keys_of(list(found)) == keys_of(list(EncodedDataset(latents.out, batch_size=2, seed=3)))
    json.dumps(found.state_dict())


def test_samples_of_other_seeds_differ_and_the_mean_can_be_had(moments: Path) -> None:
    stored = moments_of(moments)
    one, other = (
        {batch["keys"][0]: batch["vae_latent"][0] for batch in EncodedDataset(moments, batch_size=1, seed=seed)}
        for seed in (1, 2)
    )
    for batch in EncodedDataset(moments, batch_size=1, posterior="mean"):
        (key,) = batch["keys"]
        assert not torch.equal(one[key], other[key])
        np.testing.assert_array_equal(batch["vae_latent"][0], stored[key]["vae_latent"])


def test_sampled_then_normalised(moments: Path) -> None:
    contract = job.open_job(open_store(moments)).plan.contract["video"]
    mean, std = (torch.tensor(contract[name]).reshape(16, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    sampled = {batch["keys"][0]: batch["vae_latent"][0] for batch in EncodedDataset(moments, batch_size=1)}
    for batch in EncodedDataset(moments, batch_size=2, normalise=True, dtype=torch.bfloat16):
        for key, latent in zip(batch["keys"], batch["vae_latent"], strict=True):
            assert torch.equal(latent, ((sampled[key] - mean) / std).bfloat16())


def test_one_caption_of_each_clip_is_drawn_each_epoch(latents: Encoded) -> None:
    dataset = EncodedDataset(latents.out, batch_size=1, captions="one", tensors=("text_embedding",))
    assert len(dataset) == LANDSCAPE + PORTRAIT
    drawn: Counter[str] = Counter()
    for _ in range(40):
        keys = [batch["keys"][0] for batch in dataset]
        assert len({key.partition("@")[0] for key in keys}) == len(keys) == LANDSCAPE + PORTRAIT
        drawn.update(keys)
    for number in range(TWO_CAPTIONS):
        assert drawn[f"wide_{number}"] + drawn[f"wide_{number}@01"] == 40
        assert 6 <= drawn[f"wide_{number}"] <= 34  # 20, sigma 3.2


# --- the order


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_the_order_is_the_same_with_any_number_of_workers(latents: Encoded, num_workers: int, persistent: bool) -> None:
    expected = [keys_of(list(pass_)) for pass_ in itertools.repeat(EncodedDataset(latents.out, batch_size=3), 2)]
    assert expected[0] != expected[1], "each pass is the next epoch"
    loader = loader_of(EncodedDataset(latents.out, batch_size=3), num_workers, persistent_workers=persistent)
    assert [keys_of(list(loader)) for _ in range(2)] == expected


@pytest.mark.parametrize("persistent", [False, True])
def test_set_epoch_reaches_workers(latents: Encoded, persistent: bool) -> None:
    dataset = EncodedDataset(latents.out, batch_size=3)
    expected = [keys_of(list(dataset)) for _ in range(4)]
    dataset = EncodedDataset(latents.out, batch_size=3)
    loader = loader_of(dataset, 2, persistent_workers=persistent)
    for epoch in (2, 0, 3, 3):
        dataset.set_epoch(epoch)
        batches = list(loader)
        assert keys_of(batches) == expected[epoch]
        assert {batch["epoch"] for batch in batches} == {epoch}
        assert dataset.epoch == epoch + 1


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_look_at_one_batch_is_a_pass_for_all_workers(latents: Encoded, method: str) -> None:
    """Those that had not begun it took the next pass for the first: rows of two epochs in one, some lost."""
    expected = [keys_of(list(pass_)) for pass_ in itertools.repeat(EncodedDataset(latents.out, batch_size=1), 3)]
    dataset = EncodedDataset(latents.out, batch_size=1)
    for num_workers, epoch in ((1, 1), (4, 2)):
        loader = loader_of(dataset, num_workers, multiprocessing_context=method)
        if epoch == 1:
            next(iter(loader))
        assert keys_of(list(loader)) == expected[epoch]


def test_each_pass_is_the_next_epoch_whoever_makes_it(latents: Encoded) -> None:
    dataset = EncodedDataset(latents.out, batch_size=3)
    kept, seen = loader_of(dataset, 2, persistent_workers=True), []
    two, three, one_only, two_again = (loader_of(dataset, number) for number in (2, 3, 1, 2))
    for one in (dataset, two, kept, three, kept, dataset, one_only, two_again):
        torch.manual_seed(0)  # of which a loader's workers have their seeds
        seen.append({batch["epoch"] for batch in one})
    assert seen == [{epoch} for epoch in range(8)]
    assert dataset.epoch == 8


def test_passes_side_by_side_are_epochs_of_their_own(latents: Encoded) -> None:
    dataset = EncodedDataset(latents.out, batch_size=3)
    loader = loader_of(dataset, 2, worker_init_fn=lambda number: time.sleep(number))  # the other one comes between
    other = loader_of(dataset, 3)
    pairs = list(zip(loader, other, strict=True))
    assert {batch["epoch"] for batch, _ in pairs} == {0}
    assert {batch["epoch"] for _, batch in pairs} == {1}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda dataset: pickle.loads(pickle.dumps(dataset))])
def test_a_copy_goes_its_own_way_with_its_workers(
    latents: Encoded, copied: Callable[[EncodedDataset], EncodedDataset]
) -> None:
    dataset = EncodedDataset(latents.out, batch_size=3)
    list(loader_of(dataset, 2))
    again = copied(dataset)
    loader = loader_of(again, 2, persistent_workers=True)
    assert [{batch["epoch"] for batch in loader} for _ in range(2)] == [{1}, {2}]
    again.set_epoch(9)
    assert {batch["epoch"] for batch in loader} == {9}
    assert (dataset.epoch, again.epoch) == (1, 10)


def test_ranks_share_the_batches_of_the_one_order(ranks_of: Callable[..., list[EncodedDataset]]) -> None:
    (whole,) = ([(batch["number"], batch["keys"]) for batch in dataset] for dataset in ranks_of(1))
    parts = [[(batch["number"], batch["keys"]) for batch in dataset] for dataset in ranks_of(3)]
    assert [item for step in zip(*parts, strict=True) for item in step] == whole[:9]


def test_every_pass_is_reported(ranks_of: Callable[..., list[EncodedDataset]]) -> None:
    dataset = ranks_of(3, batch_size=4)[0]  # 14 and 6 rows: 3 + 1 batches
    summary = dataset.summary()
    assert (summary.num_rows, summary.num_batches, summary.dropped_rows, summary.repeated_rows) == (20, 3, 8, 0)
    assert len(dataset) == len(list(dataset)) == 1
    assert str(dataset.summary()) == "epoch 1: 3 batches of 20 rows, 8 dropped, 0 repeated"
    summary = ranks_of(4, batch_size=4, drop_last=False)[0].summary()  # 4 + 2 batches
    assert (summary.num_batches, summary.dropped_rows, summary.repeated_rows) == (8, 0, 4 * 8 - 20)


def test_a_bucket_that_fills_no_batch_is_warned_of(latents: Encoded) -> None:
    with pytest.warns(
        UserWarning, match=r"no batch of 7 can be made of the rows in 5x48x32 \(6\): they are never seen"
    ):
        EncodedDataset(latents.out, batch_size=7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EncodedDataset(latents.out, batch_size=7, drop_last=False)


# --- stopping and going on


def train(
    ranks: Sequence[EncodedDataset], steps: int, num_workers: int
) -> tuple[list[list[str]], dict[str, Any] | None]:
    """The keys of so many steps of all ranks, batch by batch, and the state after them."""
    taken, state = [], None
    loaders = [iter(loader_of(dataset, num_workers)) for dataset in ranks]
    for batches in itertools.islice(zip(*loaders, strict=True), steps):
        taken += keys_of(batches)
        states = {json.dumps(batch["state"]) for batch in batches}
        assert len(states) == 1, "all ranks save the same"
        state = json.loads(states.pop())  # as a checkpoint would keep it
    return taken, state


@settings(max_examples=25)
@given(data=st.data(), drop_last=st.booleans(), batch_size=st.sampled_from([1, 2, 3, 4]))
def test_going_on_with_other_ranks_gives_the_rest_of_the_epoch(
    ranks_of: Callable[..., list[EncodedDataset]], data: st.DataObject, drop_last: bool, batch_size: int
) -> None:
    make = {"batch_size": batch_size, "drop_last": drop_last}
    whole = keys_of(list(ranks_of(1, **make)[0]))
    taken: list[list[str]] = []
    state: dict[str, Any] | None = None
    for last in [False] * data.draw(st.integers(0, 3)) + [True]:
        ranks = ranks_of(data.draw(st.integers(1, 4)), **make)
        if state is not None:
            for dataset in ranks:
                dataset.load_state_dict(state)
        steps, new = train(ranks, 100 if last else data.draw(st.integers(0, 3)), 0)
        state = new or state
        taken += steps
        if state is not None and state["epoch"] == 1:
            break
    else:
        assert drop_last and len(whole) - len(taken) < len(ranks)  # no step was left to do
    assert taken[: len(whole)] == whole[: len(taken)]
    assert taken[len(whole) :] == whole[: max(0, len(taken) - len(whole))]
    if drop_last:
        assert max(Counter(itertools.chain(*taken)).values()) == 1
        assert len(whole) - len(taken) < len(ranks)
    else:
        assert len(set(itertools.chain(*taken))) == NUM_ROWS


@pytest.mark.parametrize(
    "topologies",
    [((2, 2, 2), (1, 3, 100)), ((1, 0, 3), (3, 2, 100)), ((3, 1, 1), (2, 0, 1), (1, 2, 100))],
    ids=lambda topologies: "-then-".join(f"{ranks}x{workers}" for ranks, workers, _ in topologies),
)
def test_prefetching_workers_lose_and_repeat_nothing(
    ranks_of: Callable[..., list[EncodedDataset]], topologies: Sequence[tuple[int, int, int]]
) -> None:
    whole = keys_of(list(ranks_of(1)[0]))
    taken: list[list[str]] = []
    state = None
    for world_size, num_workers, steps in topologies:
        ranks = ranks_of(world_size)
        if state is not None:
            for dataset in ranks:
                dataset.load_state_dict(state)
        new, state = train(ranks, steps, num_workers)
        taken += new
    assert taken == whole[: len(taken)]
    assert len(whole) - len(taken) < topologies[-1][0]
    assert state is not None and (state["epoch"], state["consumed"]) == (1, 0)


def test_after_the_last_batch_the_state_is_the_next_epochs(latents: Encoded) -> None:
    dataset = EncodedDataset(latents.out, batch_size=3)
    first = list(dataset)
    assert first[-1]["state"] == dataset.state_dict()
    again = EncodedDataset(latents.out, batch_size=3)
    again.load_state_dict(first[-1]["state"])
    assert again.epoch == 1
    again.set_epoch(again.epoch)
    assert keys_of(list(again)) == keys_of(list(dataset))


def test_set_epoch_of_the_epoch_that_was_loaded_goes_on_in_it(latents: Encoded) -> None:
    batches = list(EncodedDataset(latents.out, batch_size=3))
    dataset = EncodedDataset(latents.out, batch_size=3)
    dataset.load_state_dict(batches[1]["state"])
    for epoch in range(dataset.epoch, 2):  # the loop that trainers have
        dataset.set_epoch(epoch)
        assert len(dataset) == len(batches)
        passed = list(loader_of(dataset, 2))
        assert {batch["epoch"] for batch in passed} == {epoch}
        if epoch == 0:
            assert keys_of(passed) == keys_of(batches[2:])
        else:
            assert len(passed) == len(batches)


def test_without_workers_the_dataset_knows_its_state_itself(latents: Encoded) -> None:
    dataset = EncodedDataset(latents.out, batch_size=3)
    assert dataset.state_dict()["consumed"] == 0
    for batch in loader_of(dataset, 0):
        assert dataset.state_dict() == batch["state"]


def test_with_workers_it_refuses_to_guess_what_the_trainer_has(latents: Encoded) -> None:
    dataset = EncodedDataset(latents.out, batch_size=3)
    loader = iter(loader_of(dataset, 1))
    state = next(loader)["state"]
    with pytest.raises(UserError, match=r"save batch\['state'\] of the last batch that was trained on"):
        dataset.state_dict()
    dataset.load_state_dict(state)
    assert dataset.state_dict() == state


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 4}, "batch_size was 3 and is 4"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"drop_last": False}, "drop_last was True and is False"),
        ({"captions": "one"}, "data_sha256 was"),
    ],
)
def test_in_the_middle_of_an_epoch_its_order_must_stay(latents: Encoded, changes: Any, message: str) -> None:
    batches = list(EncodedDataset(latents.out, batch_size=3))
    other = EncodedDataset(latents.out, **{"batch_size": 3} | changes)
    with pytest.raises(UserError, match=rf"the state is 2 batches into epoch 0, whose order changed: {message}"):
        other.load_state_dict(batches[1]["state"])
    other.load_state_dict(batches[-1]["state"])  # between two epochs anything may change
    assert other.epoch == 1


def test_other_rows_are_another_order(latents: Encoded, copy_of: Callable[[Encoded], Path]) -> None:
    state = list(EncodedDataset(latents.out, batch_size=3))[1]["state"]
    out = copy_of(latents)
    EncodedDataset(out, batch_size=3).load_state_dict(state)  # the same, elsewhere
    change_index(out, lambda table: table.slice(1))
    with pytest.raises(UserError, match="data_sha256"):
        EncodedDataset(out, batch_size=3).load_state_dict(state)


def test_something_else_is_no_state(latents: Encoded) -> None:
    with pytest.raises(UserError, match="not a state of EncodedDataset"):
        EncodedDataset(latents.out, batch_size=3).load_state_dict({"epoch": 0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"consumed": -1}, "the state's consumed must be a whole number from 0, got -1"),
        ({"consumed": 2.5}, "the state's consumed must be a whole number from 0, got 2.5"),
        ({"epoch": -3}, "the state's epoch must be a whole number from 0"),
        ({"seed": None}, "the state lacks seed"),
    ],
)
def test_a_state_that_was_changed_is_refused(latents: Encoded, change: dict[str, Any], message: str) -> None:
    state = EncodedDataset(latents.out, batch_size=3).state_dict() | change
    with pytest.raises(UserError, match=message):
        EncodedDataset(latents.out, batch_size=3).load_state_dict({k: v for k, v in state.items() if v is not None})


# --- torchdata


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop_after", [1, 2, 3, 4])
def test_torchdatas_stateful_loader_goes_on_where_it_was(latents: Encoded, num_workers: int, stop_after: int) -> None:
    from torchdata.stateful_dataloader import StatefulDataLoader

    def new() -> Any:
        dataset = EncodedDataset(latents.out, batch_size=3)
        return StatefulDataLoader(dataset, batch_size=None, num_workers=num_workers)

    expected = [keys_of(list(pass_)) for pass_ in itertools.repeat(EncodedDataset(latents.out, batch_size=3), 3)]
    loader = new()
    passed = keys_of(list(loader))  # an epoch before the one that is stopped
    batches = iter(loader)
    passed += keys_of([next(batches) for _ in range(stop_after)])
    state = pickle.loads(pickle.dumps(loader.state_dict()))
    resumed = new()
    resumed.load_state_dict(state)
    passed += keys_of(list(resumed))
    passed += keys_of(list(resumed))
    assert passed == [keys for epoch in expected for keys in epoch]


def test_torchdatas_stateful_loader_goes_back_as_often_as_it_is_told(latents: Encoded) -> None:
    """It restores the seed of its workers, too: they have what those of earlier passes had in common."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    dataset = EncodedDataset(latents.out, batch_size=3)
    loader = StatefulDataLoader(dataset, batch_size=None, num_workers=2)
    batches, states = iter(loader), []
    for _ in range(2):
        next(batches)
        states.append(loader.state_dict())
    del batches
    for number in (1, 0, 0, 1):
        loader = StatefulDataLoader(dataset, batch_size=None, num_workers=2)
        loader.load_state_dict(states[number])
        found = [(batch["epoch"], batch["number"]) for batch in loader]
        assert found == [(0, at) for at in range(1 + number, len(dataset))]


def test_torchdatas_stateful_loader_with_workers_goes_on_only_on_as_many_ranks(latents: Encoded) -> None:
    """What its workers have given out was taken for that of others: batches lost, or twice."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    def new(world_size: int, num_workers: int) -> Any:
        dataset = EncodedDataset(latents.out, batch_size=3, rank=0, world_size=world_size)
        return StatefulDataLoader(dataset, batch_size=None, num_workers=num_workers)

    for num_workers in (2, 0):
        loader = new(2, num_workers)
        next(iter(loader))
        state, again = loader.state_dict(), new(1, num_workers)
        again.load_state_dict(state)
        if num_workers:
            with pytest.raises(
                UserError, match="with workers on 2 ranks, which goes on only on as many, and there are 1"
            ):
                list(again)
        else:
            assert [batch["number"] for batch in again] == list(range(2, len(again)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_torchdatas_stateful_loader_after_an_epoch_goes_on_with_the_next(latents: Encoded, num_workers: int) -> None:
    from torchdata.stateful_dataloader import StatefulDataLoader

    expected = [keys_of(list(pass_)) for pass_ in itertools.repeat(EncodedDataset(latents.out, batch_size=3), 2)]
    loader = StatefulDataLoader(EncodedDataset(latents.out, batch_size=3), batch_size=None, num_workers=num_workers)
    list(loader)
    resumed = StatefulDataLoader(EncodedDataset(latents.out, batch_size=3), batch_size=None, num_workers=num_workers)
    resumed.load_state_dict(loader.state_dict())
    assert keys_of(list(resumed)) == expected[1]


# --- several outputs


@pytest.fixture
def two(latents: Encoded, copy_of: Callable[[Encoded], Path]) -> tuple[Path, Path]:
    return latents.out, copy_of(latents)


def counts_of(dataset: EncodedDataset) -> Counter[int]:
    return Counter(source for batch in dataset for source in batch["sources"])


def test_sources_are_repeated_and_weighted(two: tuple[Path, Path]) -> None:
    one, other = two
    both = EncodedDataset(two, batch_size=2)
    assert counts_of(both) == {0: NUM_ROWS, 1: NUM_ROWS}
    repeated = EncodedDataset([one, Source(url=other, repeats=3)], batch_size=2)
    assert counts_of(repeated) == {0: NUM_ROWS, 1: 3 * NUM_ROWS}
    half = EncodedDataset([one, Source(url=other, repeats=0.5)], batch_size=1)
    assert counts_of(half) == {0: NUM_ROWS, 1: NUM_ROWS // 2}
    weighted = EncodedDataset([Source(url=one, weight=3), Source(url=other, weight=1)], batch_size=1, drop_last=False)
    assert counts_of(weighted) == {0: NUM_ROWS, 1: int(NUM_ROWS / 3)}


def test_each_row_comes_from_the_source_it_says(two: tuple[Path, Path], latents: Encoded) -> None:
    change_index(
        two[1], lambda table: table.set_column(0, "key", pa.array([f"b/{key}" for key in table["key"].to_pylist()]))
    )
    mixed = set()
    for batch in EncodedDataset(two, batch_size=4):
        mixed.add(len(set(batch["sources"])))
        for key, source, latent in zip(batch["keys"], batch["sources"], batch["vae_latent"], strict=True):
            assert key.startswith("b/") == (source == 1)
            np.testing.assert_array_equal(latent, latents.tensors[key.removeprefix("b/")]["vae_latent"])
    assert 2 in mixed, "batches are made of both"


@pytest.mark.parametrize(
    ("part", "changes", "names"),
    [
        ("video", {"space": "normalised"}, 'video.space: "raw" there, "normalised" here'),
        ("video", {"latents_std": [1.0] * 16}, "video.latents_std"),
        ("video", {"sha256": "1" * 64}, "video.sha256"),
        ("text", {"padding": "padded"}, 'text.padding: "trimmed" there, "padded" here'),
        ("text", {"max_length": 226}, "text.max_length: 512 there, 226 here"),
    ],
)
def test_latents_that_mean_something_else_are_not_mixed(
    two: tuple[Path, Path], part: str, changes: dict[str, Any], names: str
) -> None:
    change_plan(two[1], lambda contract: contract[part].update(changes))
    with pytest.raises(UserError, match="cannot be mixed") as refused:
        EncodedDataset(two, batch_size=2)
    assert names in str(refused.value)
    assert str(two[1]) in str(refused.value)
    other = "text_embedding" if part == "video" else "vae_latent"
    assert len(EncodedDataset(two, batch_size=2, tensors=(other,))), "what is not read does not matter"


def test_how_exactly_the_same_was_computed_does_not_matter(two: tuple[Path, Path]) -> None:
    def change(contract: dict[str, Any]) -> None:
        contract["model"], contract["video"]["dtype"], contract["text"]["dtype"] = "moved", "bfloat16", "bfloat16"

    change_plan(two[1], change)
    EncodedDataset(two, batch_size=2)


def test_outputs_with_other_tensors_need_to_say_which_are_read(latents: Encoded, i2v_latents: Encoded) -> None:
    urls = [latents.out, i2v_latents.out]
    with pytest.raises(UserError, match=r"say tensors=\(...\), the ones to be read"):
        EncodedDataset(urls, batch_size=1)


def test_what_the_trainer_needs_is_compared(latents: Encoded) -> None:
    EncodedDataset(latents.out, batch_size=2, contract=latents.contract)
    EncodedDataset(
        latents.out, batch_size=2, contract={"family": "wan", "video": {"space": "raw"}, "tensors": ["vae_latent"]}
    )
    with pytest.raises(UserError) as refused:
        EncodedDataset(
            latents.out,
            batch_size=2,
            contract={"family": "ltx", "video": {"space": "normalised", "latent_channels": 16}},
        )
    assert 'family: "wan", expected "ltx"' in str(refused.value)
    assert 'video.space: "raw", expected "normalised"' in str(refused.value)
    assert "latent_channels" not in str(refused.value)
    with pytest.raises(UserError, match=r"has no field video\.spaces"):
        EncodedDataset(latents.out, batch_size=2, contract={"video": {"spaces": "raw"}})
    with pytest.raises(UserError, match="has no clip_feature"):
        EncodedDataset(latents.out, batch_size=2, contract={"tensors": ["clip_feature"]})


# --- what is wrong


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"batch_size": 50}, "20 rows in 2 buckets give 0 whole batches of 50, fewer than the 1 ranks"),
        ({"caption_dropout": 1.5}, "caption_dropout must be from 0 to 1"),
        ({"text_padding": "shortest"}, "text_padding must be one of 'max_length', 'longest', got 'shortest'"),
        ({"captions": "some"}, "captions must be one of"),
        ({"posterior": "sample"}, "encode with --posterior moments"),
        ({"dtype": torch.int64}, "dtype must be one of floating point"),
        ({"tensors": ["vae_latents"]}, "has no vae_latents: its tensors are"),
        ({"rank": 2, "world_size": 2}, "rank must be from 0 to 1, got 2"),
        ({"rank": 2}, "give rank and world_size both"),
        ({"batch_size": "3"}, "batch_size must be a whole number, got '3'"),
        ({"batch_size": 2.5}, "batch_size must be a whole number, got 2.5"),
        ({"batch_size": True}, "batch_size must be a whole number, got True"),
        ({"dtype": "bfloat16"}, "dtype must be one of torch, torch.bfloat16 say, got 'bfloat16'"),
        ({"tensors": "vae_latent"}, "say tensors=('vae_latent',)"),
        ({"contract": "wan"}, "contract must be a dict, or what declare_contract() gives"),
        ({"max_ahead_bytes": -5}, "max_ahead_bytes must be 1 or more"),
        ({"posterior": "sample", "tensors": ("text_embedding",)}, "is about vae_latent, which is not read"),
    ],
)
def test_a_mistake_is_refused_before_any_batch(latents: Encoded, how: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        EncodedDataset(latents.out, **{"batch_size": 2} | how)
    assert message in str(refused.value)


def test_sources_that_contradict_each_other_are_refused(latents: Encoded) -> None:
    with pytest.raises(UserError, match="no source"):
        EncodedDataset([], batch_size=2)
    with pytest.raises(UserError, match="all sources a weight, or none"):
        EncodedDataset([latents.out, Source(url=latents.out, weight=1)], batch_size=2)
    with pytest.raises(UserError, match="must be above 0"):
        EncodedDataset([Source(url=latents.out, repeats=0)], batch_size=2)
    with pytest.raises(UserError, match="must be above 0, and finite"):
        EncodedDataset(Source(latents.out, weight=float("inf")), batch_size=2)
    with pytest.raises(UserError, match="a source is a folder or a URL, got None"):
        EncodedDataset([None], batch_size=2)  # type: ignore[list-item]
    with pytest.raises(UserError, match="an epoch would have no row of"):
        EncodedDataset([latents.out, Source(latents.out, repeats=0.01)], batch_size=2)


def test_what_is_no_finished_output_says_so(
    latents: Encoded, copy_of: Callable[[Encoded], Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="is not the output of `streamprep encode`"):
        EncodedDataset(tmp_path / "nowhere", batch_size=2)
    out = copy_of(latents)
    (out / job.INDEX).unlink()
    with pytest.raises(UserError, match=r"is not finished, it has no .*: run the same `streamprep encode` again"):
        EncodedDataset(out, batch_size=2)


def test_rows_without_a_tensor_are_refused(latents: Encoded, copy_of: Callable[[Encoded], Path]) -> None:
    out = copy_of(latents)

    def lose_one(table: pa.Table) -> pa.Table:
        offsets = table["vae_latent_offset"].to_pylist()
        at = table.schema.get_field_index("vae_latent_offset")
        return table.set_column(at, "vae_latent_offset", pa.array([None, *offsets[1:]], pa.int64()))

    change_index(out, lose_one)
    with pytest.raises(UserError, match=f"1 of {NUM_ROWS} rows have no vae_latent"):
        EncodedDataset(out, batch_size=2)
    EncodedDataset(out, batch_size=2, tensors=["text_embedding"])


def data_files(out: Path) -> list[Path]:
    return sorted((out / "combined_parquet_dataset").iterdir())


def test_a_caption_that_is_no_text_any_more_is_named(latents: Encoded, copy_of: Callable[[Encoded], Path]) -> None:
    out = copy_of(latents)
    (path, *_) = data_files(out)
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(DamagedFile, match=rf"{path.name} is damaged: \S+ cannot be read: .*`streamprep verify`"):
        list(EncodedDataset(out, batch_size=1, with_captions=True))


def test_a_damaged_embedding_of_the_empty_caption_is_named(
    latents: Encoded, copy_of: Callable[[Encoded], Path]
) -> None:
    out = copy_of(latents)
    (path,) = (out / "_streamprep").glob("uncond-*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"{path.name} is damaged: .*; `streamprep verify` says what to do"):
        EncodedDataset(out, batch_size=2, caption_dropout=0.5)
    EncodedDataset(out, batch_size=2)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("damage", ["missing", "cut off", "longer"])
def test_a_damaged_file_is_named(
    latents: Encoded, copy_of: Callable[[Encoded], Path], damage: str, num_workers: int
) -> None:
    out = copy_of(latents)
    path = data_files(out)[2]
    if damage == "missing":
        path.unlink()
    elif damage == "cut off":
        os.truncate(path, path.stat().st_size // 2)
    else:
        os.truncate(path, path.stat().st_size + 1)
    with pytest.raises(DamagedFile, match=path.name):
        list(loader_of(EncodedDataset(out, batch_size=2), num_workers))


def test_a_cut_off_file_is_found_where_the_index_does_not_know_sizes(
    latents: Encoded, copy_of: Callable[[Encoded], Path]
) -> None:
    out = copy_of(latents)
    change_index(out, lambda table: table.drop_columns(["file_size"]))
    assert len(list(EncodedDataset(out, batch_size=2))) == NUM_ROWS // 2
    path = data_files(out)[2]
    os.truncate(path, 1000)
    with pytest.raises(DamagedFile, match=rf"{path.name} has 1000 bytes, but a tensor lies at"):
        list(EncodedDataset(out, batch_size=2))


# --- processes, size


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_may_be_started_in_any_way(latents: Encoded, method: str) -> None:
    dataset = EncodedDataset(latents.out, batch_size=3)
    expected = [keys_of(list(dataset)) for _ in range(2)]
    dataset.set_epoch(0)
    loader = loader_of(dataset, 2, multiprocessing_context=method, persistent_workers=True)
    assert [keys_of(list(loader)) for _ in range(2)] == expected


def test_a_pickled_dataset_is_the_same(latents: Encoded) -> None:
    dataset = EncodedDataset(latents.out, batch_size=3)
    dataset.set_epoch(2)
    copy = pickle.loads(pickle.dumps(dataset))
    assert keys_of(list(copy)) == keys_of(list(dataset))
    assert copy.epoch == 3


def test_ranks_come_from_the_environment(latents: Encoded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    dataset = EncodedDataset(latents.out, batch_size=2)
    assert (dataset.rank, dataset.world_size) == (1, 3)


def test_a_hundred_thousand_rows_take_little_memory(latents: Encoded, tmp_path: Path) -> None:
    """Tens of MB, not hundreds: there is no Python object for a row."""
    out = write_table_of(tmp_path / "large", latents.out, num_rows=100_000)
    code = (
        "import gc, sys\n"
        "from streamprep.dataset import EncodedDataset\n"
        "def resident(): return int(open('/proc/self/statm').read().split()[1]) * 4096 / 1e6\n"
        f"small = next(iter(EncodedDataset({str(latents.out)!r}, batch_size=4)))\n"
        "before = resident()\n"
        f"dataset = EncodedDataset({str(out)!r}, batch_size=4)\n"
        "for number, batch in zip(range(200), dataset): pass\n"
        "del batch; gc.collect()\n"
        "print(resident() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 80, done.stdout


def test_reading_does_not_import_pandas(latents: Encoded) -> None:
    """Arrow imports it, where it is installed, for ``pa.array``, ``to_numpy`` and more: half a second each time."""
    code = (
        "import sys\n"
        "from streamprep.dataset import EncodedDataset\n"
        f"assert len(list(EncodedDataset({str(latents.out)!r}, batch_size=4, captions='one')))\n"
        "print('pandas' in sys.modules)\n"
        "import pandas\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_open_and_resume_take_no_time_that_grows_with_what_was_read(latents: Encoded, tmp_path: Path) -> None:
    """The goal is 0.3 s for 100 000 rows; in CPU time, because the machine may be busy."""
    out = write_table_of(tmp_path / "large", latents.out, num_rows=100_000)
    next(iter(EncodedDataset(out, batch_size=4)))  # what is imported and compiled once

    def seconds(state: dict[str, Any] | None) -> float:
        began = time.process_time()
        dataset = EncodedDataset(out, batch_size=4)
        if state is not None:
            dataset.load_state_dict(state)
        assert next(iter(dataset))["number"] == (20_000 if state else 0)
        return time.process_time() - began

    state = next(iter(EncodedDataset(out, batch_size=4)))["state"] | {"consumed": 20_000}
    assert min(seconds(None) for _ in range(3)) < 0.3
    assert min(seconds(state) for _ in range(3)) < 0.3


# --- ids and captions


def test_ids_and_captions_come_on_demand(latents: Encoded) -> None:
    assert not {"ids", "captions"} & set(next(iter(EncodedDataset(latents.out, batch_size=2))))
    seen = {}
    for batch in EncodedDataset(latents.out, batch_size=2, with_captions=True, caption_dropout=0.5):
        seen |= dict(zip(batch["keys"], zip(batch["ids"], batch["captions"], strict=True), strict=True))
    expected = {f"wide_{n}": (f"wide_{n}.mp4", f"This is wide_{n}.mp4.") for n in range(LANDSCAPE)}
    expected |= {f"tall_{n}": (f"tall_{n}.mp4", f"This is tall_{n}.mp4.") for n in range(PORTRAIT)}
    expected |= {
        f"wide_{n}@01": (f"wide_{n}.mp4@01", f"Again wide_{n}.mp4, in other and a few more words.")
        for n in range(TWO_CAPTIONS)
    }
    assert seen == expected


def test_captions_need_an_index_that_knows_them(latents: Encoded, copy_of: Callable[[Encoded], Path]) -> None:
    out = copy_of(latents)
    change_index(out, lambda table: table.select([name for name in table.column_names if "_text_" not in name]))
    assert EncodedDataset(out, batch_size=2).num_rows == NUM_ROWS
    with pytest.raises(UserError, match=r"index\.parquet does not say where id and caption lie"):
        EncodedDataset(out, batch_size=2, with_captions=True)


# --- a damaged index


def with_value(table: pa.Table, name: str, row: int, value: object) -> pa.Table:
    values = table[name].to_pylist()
    values[row] = value
    return table.set_column(table.column_names.index(name), name, pa.array(values, table[name].type))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("vae_latent_size", None, "1 of 20 rows have no vae_latent_size"),
        ("vae_latent_size", 8, r"row 3 \(.* in .*\.parquet\): vae_latent of \[16, 2, \d, \d\] float32 has 8 bytes"),
        ("vae_latent_shape", None, "vae_latent has no shape in 1 of 20 rows"),
        ("text_embedding_offset", -1, r"row 3 \(.*\): text_embedding lies at -1 to"),
        ("text_embedding_offset", 10**9, r"text_embedding lies at 1000000000 to \d+, the file has \d+ bytes"),
        ("caption_text_at", None, "1 of 20 rows have no caption_text_at"),
        ("id_text_size", 10**9, r"row 3 \(.*\): id lies at"),
    ],
)
def test_what_is_wrong_with_an_index_is_said(
    name: str, value: object, words: str, latents: Encoded, copy_of: Callable[[Encoded], Path]
) -> None:
    out = copy_of(latents)
    change_index(out, lambda table: with_value(table, name, 3, value))
    with pytest.raises(UserError, match=rf"{job.INDEX} is damaged: .*{words}.*`streamprep finalize`"):
        EncodedDataset(out, batch_size=2, with_captions=True)


@pytest.mark.parametrize("damage", [b"PAR1 nothing PAR1", "body", None])
def test_an_index_that_is_none_is_said(
    damage: bytes | str | None, latents: Encoded, copy_of: Callable[[Encoded], Path]
) -> None:
    out = copy_of(latents)
    if damage == "body":
        data = (out / job.INDEX).read_bytes()
        (out / job.INDEX).write_bytes(data[:4] + b"\xff" * 200 + data[204:])
    elif damage is None:
        change_index(out, lambda table: table.drop_columns(["bucket"]))
    else:
        assert isinstance(damage, bytes)
        (out / job.INDEX).write_bytes(damage)
    with pytest.raises(UserError, match=f"{job.INDEX} is damaged: "):
        EncodedDataset(out, batch_size=2)
