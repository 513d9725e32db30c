"""Parquet that FastVideo's own scripts wrote: read, converted, and refused where it is not what is declared."""

from __future__ import annotations

import json
import pickle
import re
import tarfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fastvideo_files
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fastvideo_files import Row, changed, with_its_metadata
from fastvideo_schemas import SCHEMAS
from latents import LANDSCAPE, NUM_ROWS, PORTRAIT, TWO_CAPTIONS, Encoded, read_all
from object_stores import NewBucket
from servers import Server
from torch.utils.data import DataLoader

from streamprep import cli, job
from streamprep.dataset import EncodedDataset, Source, declare_contract
from streamprep.errors import UserError
from streamprep.foreign import groups
from streamprep.foreign import origin as foreign_origin
from streamprep.foreign.declared import DeclaredContract
from streamprep.foreign.survey import survey
from streamprep.job import Job, open_job
from streamprep.record import Record
from streamprep.storage import open_store
from streamprep.tensor_reads import DamagedFile
from streamprep.verify import verify_job

pytest_plugins = ["jobs", "latents", "object_stores"]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*look neither like raw nor like normalised"),  # random weights
    pytest.mark.filterwarnings("ignore:.*its row groups hold up to"),
]

WriteRows = Callable[..., Path]


@pytest.fixture(scope="module")
def rows(latents: Encoded) -> list[Row]:
    """All rows of the output, with FastVideo's mistakes in the metadata."""
    return [with_its_metadata(row) for row in fastvideo_files.rows_of(latents.out)]


@pytest.fixture
def write(tmp_path: Path) -> WriteRows:
    """``write(rows, ...)``: a folder as FastVideo's scripts leave it."""

    def write_rows(rows: Sequence[Row], **how: Any) -> Path:
        return fastvideo_files.write(tmp_path / f"theirs{len(list(tmp_path.iterdir()))}", rows, **how)

    return write_rows


@pytest.fixture(scope="module")
def declared(tiny_model: Path) -> DeclaredContract:
    return declare_contract(str(tiny_model))


def by_key(dataset: EncodedDataset) -> dict[str, dict[str, Any]]:
    """What batches hold, row by row."""
    found: dict[str, dict[str, Any]] = {}
    for batch in dataset:
        for number, key in enumerate(batch["keys"]):
            assert key not in found
            named = {name: value[number] for name, value in batch.items() if torch.is_tensor(value)}
            found[key] = {"bucket": batch["bucket"], **named}
            found[key] |= {name: batch[name][number] for name in ("ids", "captions") if name in batch}
    return found


def assert_same_rows(ours: dict[str, dict[str, Any]], theirs: dict[str, dict[str, Any]]) -> None:
    assert ours.keys() == theirs.keys()
    for key, row in ours.items():
        assert row.keys() == theirs[key].keys()
        for name, value in row.items():
            assert torch.equal(value, theirs[key][name]) if torch.is_tensor(value) else value == theirs[key][name], name


# --- reading


@pytest.mark.parametrize("compression", ["zstd", "snappy", "none"])
def test_batches_hold_the_same_as_those_of_our_files(
    compression: str, latents: Encoded, rows: list[Row], write: WriteRows, declared: DeclaredContract
) -> None:
    theirs = write(rows, compression=compression)
    metadata = pq.read_metadata(theirs / "combined_parquet_dataset/worker_0/data_chunk_0.parquet")
    assert metadata.num_row_groups == 1 and metadata.row_group(0).column(1).has_dictionary_page
    how: dict[str, Any] = {"batch_size": 1, "with_captions": True}
    dataset = EncodedDataset(theirs, contract=declared, **how)
    assert dataset.buckets == {"5x32x48": LANDSCAPE + TWO_CAPTIONS, "5x48x32": PORTRAIT}
    assert dataset.dropped == []
    found = by_key(dataset)
    assert len(found) == NUM_ROWS
    assert_same_rows(found, by_key(EncodedDataset(latents.out, **how)))


def test_image_to_video_has_its_further_tensors(
    i2v_latents: Encoded, write: WriteRows, tiny_models: Callable[[str], Path]
) -> None:
    rows = [with_its_metadata(row) for row in fastvideo_files.rows_of(i2v_latents.out)]
    assert {row["pil_image_bytes"] for row in rows} == {b""}
    theirs = write(rows, workload="i2v")
    contract = declare_contract(str(tiny_models("2.1-i2v")), workload="i2v")
    found = by_key(EncodedDataset(theirs, batch_size=3, contract=contract))
    assert set(found["0"]) >= {"clip_feature", "first_frame_latent"}
    assert_same_rows(found, by_key(EncodedDataset(i2v_latents.out, batch_size=3)))


def test_workers_and_a_resumed_run_read_the_same(rows: list[Row], write: WriteRows, declared: DeclaredContract) -> None:
    theirs = write(rows)
    alone = list(EncodedDataset(theirs, batch_size=3, contract=declared))
    dataset = EncodedDataset(theirs, batch_size=3, contract=declared)
    dataset.load_state_dict(alone[1]["state"])
    rest = list(DataLoader(pickle.loads(pickle.dumps(dataset)), batch_size=None, num_workers=2))
    assert [batch["keys"] for batch in rest] == [batch["keys"] for batch in alone[2:]]
    for ours, expected in zip(rest, alone[2:], strict=True):
        assert torch.equal(ours["vae_latent"], expected["vae_latent"])


def test_a_bucket_reads_and_converts_as_the_folder(
    latents: Encoded, rows: list[Row], write: WriteRows, declared: DeclaredContract, moto_server: Server,
    new_bucket: NewBucket, declaration: str, tmp_path: Path,
) -> None:  # fmt: skip
    theirs, url = write(rows), f"{new_bucket(moto_server)}/theirs"
    store = open_store(url)
    for path in sorted(theirs.rglob("*.parquet")):
        store.put(str(path.relative_to(theirs)), path.read_bytes(), step="copy")
    assert_same_rows(
        by_key(EncodedDataset(url, batch_size=1, contract=declared)), by_key(EncodedDataset(latents.out, batch_size=1))
    )
    new = converted(url, tmp_path / "new", declaration)
    assert_same_rows(
        by_key(EncodedDataset(new.store.url, batch_size=1)), by_key(EncodedDataset(latents.out, batch_size=1))
    )


def test_theirs_and_ours_may_be_mixed(
    latents: Encoded, rows: list[Row], write: WriteRows, declared: DeclaredContract
) -> None:
    mixed = list(EncodedDataset([write(rows), Source(url=latents.out)], batch_size=4, contract=declared))
    assert {source for batch in mixed for source in batch["sources"]} == {0, 1}
    for batch in mixed:
        for key, latent in zip(batch["keys"], batch["vae_latent"], strict=True):
            np.testing.assert_array_equal(latent, latents.tensors[key]["vae_latent"])


def test_what_is_declared_of_an_output_that_knows_itself_is_compared(
    latents: Encoded, declared: DeclaredContract, make_model: Callable[[int], Path]
) -> None:
    assert EncodedDataset(latents.out, batch_size=2, contract=declared).num_rows == NUM_ROWS
    other = declare_contract(str(make_model(1)))
    with pytest.raises(UserError, match=r"cannot be mixed with what is declared(.|\n)*video.sha256"):
        EncodedDataset(latents.out, batch_size=2, contract=other)
    video = {**declared.contract["video"], "latents_mean": [0.0] * 16}
    other = DeclaredContract(contract={**declared.contract, "video": video})
    with pytest.raises(UserError, match=r"video.latents_mean"):
        EncodedDataset(latents.out, batch_size=2, contract=other)


def test_a_row_group_is_decoded_once_for_all_its_rows_of_two_batches(
    rows: list[Row], write: WriteRows, declared: DeclaredContract
) -> None:
    store = open_store(write(rows, samples_per_file=5))
    index = survey(store, declared.contract).row_index(None)
    reader = groups.RowGroupReader(index, store, kept_bytes=0)
    in_group = {place: np.flatnonzero(index.file == place) for place in range(4)}
    wanted = [int(in_group[place][at]) for at in range(3) for place in range(4)]  # round and round
    for row in wanted:
        reader.expect(row)
    for row in wanted:
        assert (
            len(reader.row(row).read("vae_latent"))
            == reader.fetched_bytes(row) - index.tensors["text_embedding"].size[row]
        )
    assert reader.num_decoded == 4
    for row in wanted:
        reader.row(row)
    assert reader.num_decoded == 4 + len(wanted)  # nothing was kept, nothing expected
    kept = groups.RowGroupReader(index, store)
    for row in wanted:
        kept.row(row)
    assert kept.num_decoded == 4


def test_no_blob_is_read_to_count_rows(
    rows: list[Row], write: WriteRows, declared: DeclaredContract, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = write(rows, samples_per_file=64)
    (path,) = theirs.rglob("*.parquet")
    column = pq.read_metadata(path).row_group(0).column(1)
    assert column.path_in_schema == "vae_latent_bytes"
    begin = column.dictionary_page_offset + 100
    with open(path, "r+b") as file:
        file.seek(begin)
        file.write(b"\xff" * (column.total_compressed_size - 200))
    assert survey(open_store(theirs), declared.contract).num_rows == NUM_ROWS
    with pytest.raises(UserError, match=rf"{path.name}, row group 0: cannot be read"):
        EncodedDataset(theirs, batch_size=2, contract=declared)


def test_the_cost_is_said(rows: list[Row], write: WriteRows, declared: DeclaredContract) -> None:
    with pytest.warns(UserWarning, match=r"row groups hold up to 20 rows, .* decompressed whole.*`streamprep convert`"):
        EncodedDataset(write(rows, samples_per_file=64), batch_size=2, contract=declared)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        EncodedDataset(write(rows, samples_per_file=1), batch_size=2, contract=declared)
    assert not [one for one in said if "row groups" in str(one.message)]


def test_a_file_that_changes_under_the_reader_is_named(
    rows: list[Row], write: WriteRows, declared: DeclaredContract
) -> None:
    theirs = write(rows)
    dataset = EncodedDataset(theirs, batch_size=2, contract=declared)
    path = theirs / "combined_parquet_dataset/worker_1/data_chunk_0.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedFile, match=r"worker_1/data_chunk_0.parquet has \d+ bytes and had \d+ when"):
        list(dataset)
    path.unlink()
    with pytest.raises(DamagedFile, match=r"worker_1/data_chunk_0.parquet is missing"):
        list(EncodedDataset.__iter__(dataset))


def test_dropping_captions_needs_the_empty_ones_embedding(
    rows: list[Row], write: WriteRows, declared: DeclaredContract
) -> None:
    theirs = write(rows)
    with pytest.raises(UserError, match="FastVideo's files hold none; say empty_text="):
        EncodedDataset(theirs, batch_size=2, contract=declared, caption_dropout=0.5)
    empty = torch.full((1, 32), 7.0)
    dropped = [
        one
        for batch in EncodedDataset(theirs, batch_size=2, contract=declared, caption_dropout=0.5, empty_text=empty)
        for one in zip(batch["text_embedding"], batch["text_dropped"].tolist(), strict=True)
    ]
    assert {without for _, without in dropped} == {True, False}
    assert all(torch.equal(text[:1], empty) == without for text, without in dropped)


@pytest.mark.parametrize(
    ("empty", "message"),
    [
        (torch.zeros(32), r"empty_text must be \(L, 32\) with L from 1 to 512, got \(32,\)"),
        (torch.zeros(2, 31), r"got \(2, 31\)"),
        (torch.zeros(0, 32), r"got \(0, 32\)"),
        (torch.zeros(600, 32), r"got \(600, 32\)"),
        (torch.full((2, 32), torch.nan), "empty_text holds NaN or infinity"),
        (np.zeros((2, 32), np.float32), "empty_text must be a tensor of floating point, got ndarray"),
    ],
    ids=["flat", "narrow", "none", "long", "NaN", "numpy"],
)
def test_an_embedding_that_is_none_is_refused_before_any_batch(
    empty: Any, message: str, rows: list[Row], write: WriteRows, declared: DeclaredContract
) -> None:
    with pytest.raises(UserError, match=message):
        EncodedDataset(write(rows), batch_size=2, contract=declared, caption_dropout=0.5, empty_text=empty)


# --- rows that cannot be used, or are there twice


def test_rows_of_empty_tensors_are_left_out_and_listed(
    rows: list[Row], write: WriteRows, declared: DeclaredContract
) -> None:
    def empty(name: str, dtype: str) -> Callable[[Row], Row]:
        return lambda row: {f"{name}_bytes": b"", f"{name}_shape": [], f"{name}_dtype": dtype}

    broken = changed(rows, 3, empty("vae_latent", "unknown"))
    broken = changed(broken, 9, lambda row: {"text_embedding_bytes": b"", "text_embedding_shape": [0]})
    with pytest.warns(
        UserWarning, match=r"2 rows left out: 2 empty_tensor \(the first: .*worker_0/data_chunk_0.parquet, row 3"
    ):
        dataset = EncodedDataset(write(broken), batch_size=1, contract=declared)
    assert dataset.num_rows == NUM_ROWS - 2
    found = {(row.file.removeprefix("combined_parquet_dataset/"), row.row, row.reason) for row in dataset.dropped}
    assert len(found) == 2 and {reason for _, _, reason in found} == {"empty_tensor"}
    assert not {keys[0] for batch in dataset for keys in [batch["keys"]]} & {row.key for row in dataset.dropped}


def test_a_row_that_is_there_twice_is_taken_once_and_another_of_its_id_is_kept(
    rows: list[Row], write: WriteRows, declared: DeclaredContract
) -> None:
    more = [*rows, rows[2], {**rows[4], "caption": "Another video of that name."}]
    with pytest.warns(UserWarning) as said:
        dataset = EncodedDataset(write(more), batch_size=1, contract=declared, with_captions=True)
    texts = " ".join(str(one.message) for one in said)
    assert "1 row left out: 1 repeated_row" in texts
    found = by_key(dataset)
    assert len(found) == NUM_ROWS + 1
    (kept,) = [key for key in found if key.endswith("~02")]
    assert found[kept]["ids"] == rows[4]["id"] and f"its key is {kept}" in texts
    assert {found[kept]["captions"], found[kept.removesuffix("~02")]["captions"]} == {
        "Another video of that name.",
        rows[4]["caption"],
    }


def test_another_clip_of_the_same_id_and_caption_is_no_repetition(
    rows: list[Row], write: WriteRows, declared: DeclaredContract
) -> None:
    """Its ids are names cut at the first dot, and one caption may be that of all."""
    video = declared.contract["video"]
    latent = np.frombuffer(rows[0]["vae_latent_bytes"], np.float32).reshape(rows[0]["vae_latent_shape"])
    std = np.array(video["latents_std"], np.float32)[:, None, None, None]
    again = latent.astype(np.float16).astype(np.float32)  # encoded anew, not bit for bit the same
    detail = latent.copy()
    detail[:, 0, 0, 0] += 3 * std[:, 0, 0, 0]
    others = [latent + 0.05 * std, latent[:, :, ::-1], detail, again]
    theirs = write([*rows, *({**rows[0], "vae_latent_bytes": other.tobytes()} for other in others)])
    with pytest.warns(UserWarning) as said:
        dataset = EncodedDataset(theirs, batch_size=1, contract=declared)
    assert any("1 row left out: 1 repeated_row" in str(one.message) for one in said)
    found = by_key(dataset)
    key = next(key for key in found if f"{key}~02" in found)
    for number, one in enumerate((latent, *others[:3]), 1):
        name = key if number == 1 else f"{key}~{number:02d}"
        np.testing.assert_array_equal(found[name]["vae_latent"], one)
    assert f"{key}~05" not in found


def test_captions_alone_are_repetitions_if_their_embeddings_are_the_same(
    rows: list[Row], write: WriteRows, tiny_model: Path
) -> None:
    declared = declare_contract(str(tiny_model), workload="text")
    other = (np.frombuffer(rows[0]["text_embedding_bytes"], np.float32) * 2).tobytes()
    theirs = write([*rows, {**rows[0], "text_embedding_bytes": other}, rows[0]], workload="text")
    with pytest.warns(UserWarning, match="1 row left out: 1 repeated_row"):
        dataset = EncodedDataset(theirs, batch_size=1, contract=declared)
    assert dataset.num_rows == NUM_ROWS + 1


def test_captions_of_another_video_of_the_same_id_are_one_clip(
    rows: list[Row], write: WriteRows, declared: DeclaredContract
) -> None:
    theirs = write([*rows, *({**row, "caption": f"{row['caption']} Elsewhere."} for row in rows)])
    with pytest.warns(UserWarning, match="has the id of another row"):
        dataset = EncodedDataset(theirs, batch_size=1, contract=declared, captions="one", with_captions=True)
    clips = [key.partition("@")[0] for key in by_key(dataset)]
    assert len(clips) == len(set(clips)) == 2 * (NUM_ROWS - TWO_CAPTIONS)


@pytest.mark.filterwarnings("ignore:.*says")
def test_files_of_older_schemas_are_read(
    latents: Encoded, rows: list[Row], write: WriteRows, declared: DeclaredContract
) -> None:
    """``latent``, ``prompt``, no sizes, and a batch of one in front of every shape."""
    schema = pa.schema(
        [
            *((f"{name}_{what}", kind) for name in ("latent", "text_embedding") for what, kind in
              (("bytes", pa.binary()), ("shape", pa.list_(pa.int64())), ("dtype", pa.string()))),
            ("id", pa.string()),
            ("prompt", pa.string()),
        ]
    )  # fmt: skip
    older = []
    for row in rows:
        renamed = {name.replace("vae_latent", "latent"): value for name, value in row.items()}
        shapes = {f"{name}_shape": [1, *renamed[f"{name}_shape"]] for name in ("latent", "text_embedding")}
        older.append(renamed | shapes | {"prompt": row["caption"]})
    found = by_key(EncodedDataset(write(older, schema=schema), batch_size=1, contract=declared, with_captions=True))
    assert_same_rows(found, by_key(EncodedDataset(latents.out, batch_size=1, with_captions=True)))


# --- what is declared, against what is there


def padded(rows: Sequence[Row], length: int = 512) -> list[Row]:
    """As FastVideo's text_only task leaves embeddings."""
    size = length * 32 * 4
    return [
        {
            **row,
            "text_embedding_bytes": row["text_embedding_bytes"].ljust(size, b"\0"),
            "text_embedding_shape": [length, 32],
        }
        for row in rows
    ]


def test_padded_text_has_the_mask_of_its_captions(
    latents: Encoded, rows: list[Row], write: WriteRows, tiny_model: Path
) -> None:
    contract = declare_contract(str(tiny_model), text="padded")
    for how in ("max_length", "longest"):
        found = EncodedDataset(write(padded(rows)), batch_size=3, contract=contract, text_padding=how)
        lengths = {key: len(stored["text_embedding"]) for key, stored in latents.tensors.items()}
        for batch in found:
            expected = [lengths[key] for key in batch["keys"]]
            assert batch["text_attention_mask"].sum(1).tolist() == expected
            assert batch["text_embedding"].shape[1] == (512 if how == "max_length" else max(expected))
            for key, text in zip(batch["keys"], batch["text_embedding"], strict=True):
                np.testing.assert_array_equal(text[: lengths[key]], latents.tensors[key]["text_embedding"])
                assert not text[lengths[key] :].any()


def nan_in(name: str) -> Callable[[Row], Row]:
    def change(row: Row) -> Row:
        values = np.frombuffer(row[f"{name}_bytes"], np.float32).copy()
        values[7] = np.nan
        return {f"{name}_bytes": values.tobytes()}

    return change


REFUSED = {
    "channels": (
        lambda rows: changed(rows, 3, lambda row: {"vae_latent_shape": [8, 4, *row["vae_latent_shape"][2:]]}),
        r"_0.parquet, row 3 \(.*\), column vae_latent_shape: \[8, 4, \d, \d\], .*\(wan 2.1-t2v\) has \[16, any",
    ),
    "dtype": (
        lambda rows: changed(rows, 3, lambda _: {"vae_latent_dtype": "float16"}),
        r"row 3 \(.*\), column vae_latent_dtype: float16, float32 is",
    ),
    "text width": (
        lambda rows: changed(
            rows, 1, lambda row: {"text_embedding_shape": [2 * row["text_embedding_shape"][0], 16]}
        ),
        r"row 1 \(.*\), column text_embedding_shape: \[\d+, 16\], .*\[any, 32\]",
    ),
    "spatial factor": (
        lambda rows: [{**row, "width": 2 * row["width"], "height": 2 * row["height"]} for row in rows],
        r"row 0 \(.*\), columns width and height: \d+ and \d+ .* of factor 16, the declared model's is 8",
    ),
    "padded as trimmed": (
        lambda rows: padded(rows),
        r"column text_embedding_bytes: its last tokens are zeros.*declare text = 'padded'",
    ),
    "padded less as trimmed": (
        lambda rows: padded(rows, 100),
        r"column text_embedding_bytes: its last tokens are zeros.*declare text = 'padded'",
    ),
    "too many tokens": (lambda rows: padded(rows, 600), r"600 tokens, the declared model takes 512 at most"),
    "not finite": (lambda rows: changed(rows, 0, nan_in("vae_latent")), r"column vae_latent_bytes: NaN or infinity"),
    "fewer bytes": (
        lambda rows: changed(rows, 0, lambda row: {"vae_latent_bytes": row["vae_latent_bytes"][:-4]}),
        r"data_chunk_0.parquet, row group 0, row 0 of it, column vae_latent_bytes: \d+ bytes, and its shape needs",
    ),
    "a negative size": (
        lambda rows: changed(rows, 3, lambda row: {"vae_latent_shape": [16, -2, -4, 6]}),
        r"row 3 \(.*\), column vae_latent_shape: \[16, -2, -4, 6\], no tensor has such a shape",
    ),
    "no values at all": (
        lambda rows: [{**row, "vae_latent_bytes": b"", "vae_latent_shape": []} for row in rows],
        r"none of 20 rows can be used: .*empty_tensor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_what_is_declared_is_refused(
    case: str, rows: list[Row], write: WriteRows, declared: DeclaredContract
) -> None:
    change, words = REFUSED[case]
    with pytest.raises(UserError, match=words):
        EncodedDataset(write(change(rows)), batch_size=2, contract=declared)


def test_trimmed_as_padded_is_refused(rows: list[Row], write: WriteRows, tiny_model: Path) -> None:
    contract = declare_contract(str(tiny_model), text="padded")
    with pytest.raises(UserError, match=r"rows have \d+ to \d+ tokens, padded ones.*declare text = 'trimmed'"):
        EncodedDataset(write(rows), batch_size=2, contract=contract)
    alike = [row for row in rows if row["text_embedding_shape"] == rows[0]["text_embedding_shape"]]
    assert len(alike) > 1
    with pytest.raises(UserError, match=r"none of \d+ rows has zeros after its caption"):
        EncodedDataset(write(alike), batch_size=1, contract=contract)


def test_a_missing_column_is_named(rows: list[Row], write: WriteRows, declared: DeclaredContract) -> None:
    text_only = SCHEMAS["text"]
    with pytest.raises(UserError, match=r"data_chunk_0.parquet has no column vae_latent_bytes, which the declared"):
        EncodedDataset(write(rows, schema=text_only), batch_size=2, contract=declared)
    without = pa.schema([field for field in SCHEMAS["t2v"] if field.name != "vae_latent_dtype"])
    with pytest.raises(UserError, match=r"has no column vae_latent_dtype"):
        EncodedDataset(write(rows, schema=without), batch_size=2, contract=declared)


WRONG_TYPES = {
    "caption": (pa.list_(pa.string()), lambda row: [row["caption"], "x"]),
    "id": (pa.int64(), lambda _: 7),
    "file_name": (pa.binary(), lambda row: row["file_name"].encode()),
    "width": (pa.string(), lambda _: "wide"),
    "fps": (pa.string(), lambda _: "24/1"),
    "num_frames": (pa.bool_(), lambda _: True),
    "vae_latent_shape": (pa.string(), lambda row: str(row["vae_latent_shape"])),
    "vae_latent_bytes": (pa.list_(pa.float32()), lambda _: [0.5]),
    "text_embedding_bytes": (pa.dictionary(pa.int32(), pa.binary()), lambda row: row["text_embedding_bytes"]),
    "text_embedding_dtype": (pa.int64(), lambda _: 32),
}


@pytest.mark.parametrize("column", WRONG_TYPES)
def test_a_column_of_another_type_is_refused_before_it_is_read_as_what_it_is_not(
    column: str, rows: list[Row], write: WriteRows, declared: DeclaredContract
) -> None:
    type, value = WRONG_TYPES[column]
    schema = pa.schema([field.with_type(type) if field.name == column else field for field in SCHEMAS["t2v"]])
    theirs = write([{**row, column: value(row)} for row in rows], schema=schema)
    with pytest.raises(
        UserError,
        match=rf"data_chunk_0.parquet, column {column}: of type .*, it must be (text|bytes|a number|a list of)",
    ):
        EncodedDataset(theirs, batch_size=2, contract=declared)


@pytest.mark.parametrize("type", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_text_is_text_however_arrow_keeps_it(
    type: pa.DataType, rows: list[Row], write: WriteRows, declared: DeclaredContract
) -> None:
    schema = pa.schema([field.with_type(type) if field.name == "caption" else field for field in SCHEMAS["t2v"]])
    dataset = EncodedDataset(write(rows, schema=schema), batch_size=1, contract=declared, with_captions=True)
    assert Counter(caption for batch in dataset for caption in batch["captions"]) == Counter(
        row["caption"] for row in rows
    )


def test_a_column_that_is_there_twice_is_refused(rows: list[Row], write: WriteRows, declared: DeclaredContract) -> None:
    theirs = write(rows)
    path = theirs / "combined_parquet_dataset/worker_1/data_chunk_0.parquet"
    table = pq.read_table(path, partitioning=None)
    pq.write_table(table.append_column("caption", table["caption"]), path)
    with pytest.raises(UserError, match=r"worker_1/data_chunk_0.parquet has several columns caption"):
        EncodedDataset(theirs, batch_size=2, contract=declared)


def test_columns_that_its_scripts_get_wrong_are_no_reason_to_refuse(
    rows: list[Row], write: WriteRows, declared: DeclaredContract
) -> None:
    wrong = [{**row, "num_frames": 163, "duration_sec": -1.0, "width": 1920, "height": 1080} for row in rows]
    with pytest.warns(UserWarning) as said:
        found = EncodedDataset(write(wrong), batch_size=1, contract=declared)
    texts = [str(one.message) for one in said]
    assert any(
        re.search(r"row 0 \(.*\) says num_frames 163, its latent is of 5 .*; so do 19 more", text) for text in texts
    )
    assert any(re.search(r"says 1920x1080 pixels, its latent is of \d+x\d+; so do 19 more", text) for text in texts)
    assert found.num_rows == NUM_ROWS


@pytest.mark.parametrize("fps", [float("nan"), float("inf"), -3.0])
def test_a_rate_that_is_none_is_unknown(
    fps: float, rows: list[Row], write: WriteRows, declaration: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = write([{**row, "fps": fps} for row in rows])
    converted(theirs, tmp_path / "new", declaration, "--exporter=webdataset", "--latent-dtype=float32")
    assert re.search(rf"says fps {fps}, which is no rate: it is unknown; so do 19 more", capsys.readouterr().err)
    (tar, *_) = sorted((tmp_path / "new/latent_shards").glob("*.tar"))
    with tarfile.open(tar) as file:
        member = file.extractfile(next(name for name in file.getnames() if name.endswith(".json")))
        assert member is not None and json.loads(member.read())["source_fps"] == 0.0


def of_statistics(rows: Sequence[Row], mean: Sequence[float], std: Sequence[float]) -> list[Row]:
    """Rows whose latents' channels are Gaussian."""
    random = np.random.default_rng(0)
    new = []
    for row in rows:
        shape = row["vae_latent_shape"]
        noise = random.standard_normal(shape).astype(np.float32)
        mean_of, std_of = (np.array(values, np.float32)[:, None, None, None] for values in (mean, std))
        new.append({**row, "vae_latent_bytes": (mean_of + 0.8 * std_of * noise).tobytes()})
    return new


@pytest.mark.parametrize("space", ["raw", "normalised"])
def test_channels_tell_raw_from_normalised(space: str, rows: list[Row], write: WriteRows, tiny_model: Path) -> None:
    right = declare_contract(str(tiny_model), space=space)
    (other,) = {"raw", "normalised"} - {space}
    wrong = declare_contract(str(tiny_model), space=other)
    video = right.contract["video"]
    statistics = (video["latents_mean"], video["latents_std"]) if space == "raw" else ([0.0] * 16, [1.0] * 16)
    theirs = write(of_statistics(rows, *statistics))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        dataset = EncodedDataset(theirs, batch_size=2, contract=right)
    assert not [one for one in said if "neither" in str(one.message)]
    assert dataset.contracts[0]["video"]["space"] == space
    with pytest.raises(UserError, match=rf"what {space} latents .* are declared {other}: declare space = '{space}'"):
        EncodedDataset(theirs, batch_size=2, contract=wrong)


@pytest.mark.filterwarnings("default")
def test_channels_of_another_model_are_doubted(rows: list[Row], write: WriteRows, declared: DeclaredContract) -> None:
    with pytest.warns(UserWarning, match="look neither like raw nor like normalised latents of the declared model"):
        EncodedDataset(write(of_statistics(rows, [9.0] * 16, [0.1] * 16)), batch_size=2, contract=declared)


def test_a_folder_with_training_and_validation_is_refused(
    rows: list[Row], write: WriteRows, declared: DeclaredContract
) -> None:
    theirs = write(rows)
    (theirs / "combined_parquet_dataset").rename(theirs / "training_dataset")
    (theirs / "validation_dataset").mkdir()
    pq.write_table(pa.table({"id": ["a"]}), theirs / "validation_dataset/data_chunk_0.parquet")
    with pytest.raises(UserError, match="has training_dataset and validation_dataset: give the one"):
        EncodedDataset(theirs, batch_size=2, contract=declared)
    assert EncodedDataset(theirs / "training_dataset", batch_size=2, contract=declared).num_rows == NUM_ROWS


def test_files_that_are_none_of_its_are_refused(
    rows: list[Row], write: WriteRows, declared: DeclaredContract, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"has no _streamprep/index.parquet; if FastVideo's scripts wrote it, say"):
        EncodedDataset(write(rows), batch_size=2)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"none has no .parquet files"):
        EncodedDataset(tmp_path / "none", batch_size=2, contract=declared)
    for damage in (b"", b"PAR1", b"not a Parquet file at all", None):
        theirs = write(rows)
        path = theirs / "combined_parquet_dataset/worker_1/data_chunk_0.parquet"
        path.write_bytes(path.read_bytes()[:-100] if damage is None else damage)
        with pytest.raises(UserError, match=r"worker_1/data_chunk_0.parquet cannot be read as Parquet: "):
            EncodedDataset(theirs, batch_size=2, contract=declared)


# --- declaring


def test_a_contract_says_that_it_is_declared_and_what_nobody_knows(
    latents: Encoded, declared: DeclaredContract, tiny_model: Path
) -> None:
    ours, theirs = latents.contract, declared.contract
    assert theirs["provenance"].startswith("declared by the user")
    assert (theirs["family"], theirs["variant"], theirs["model"]) == ("wan", "2.1-t2v", ours["model"])
    assert theirs["video"]["sha256"] == ours["video"]["sha256"] and theirs["text"]["sha256"] == ours["text"]["sha256"]
    unknown = {
        (part, name) for part in ("video", "text") for name, value in theirs[part].items() if value == "not known"
    }
    assert unknown == {
        *(("video", name) for name in ("dtype", "tf32", "resize_rule", "fps_rule")),
        *(("text", name) for name in ("dtype", "captions_cleaned")),
    }


def test_a_model_without_weights_will_do(
    rows: list[Row], latents: Encoded, write: WriteRows, tiny_model: Path, tmp_path: Path
) -> None:
    for path in tiny_model.rglob("*.json"):
        target = tmp_path / "configs" / path.relative_to(tiny_model)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    contract = declare_contract(str(tmp_path / "configs"))
    assert contract.contract["video"]["sha256"] == "not taken"
    assert EncodedDataset([write(rows), latents.out], batch_size=2, contract=contract).num_rows == 2 * NUM_ROWS


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must say model_path"),
        ("model_path = 'MODEL'\nvae = 'wan'", "nothing is called vae; it may say model_path, workload, space, text"),
        ("model_path = 'MODEL'\nspace = 'latent'", "space must be one of raw, normalised, got 'latent'"),
        ("model_path = 'MODEL'\nworkload = 'i2v'", "is a Wan 2.1-t2v model"),
        ("model_path = 'MODEL'\ntrain_fps = 0", "train_fps must be above 0"),
        ("model_path = 'MODEL'\ntrain_fps = '16'", "train_fps must be above 0, got '16'"),
        ("model_path = 'MODEL'", "must say train_fps"),
        ("model_path = '/no/such/folder'", "there is no such folder"),
        ("model_path =", "cannot be read"),
    ],
)
def test_a_file_that_does_not_declare_is_refused(
    text: str, words: str, rows: list[Row], write: WriteRows, tiny_model: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "contract.toml").write_text(text.replace("MODEL", str(tiny_model)))
    assert convert(write(rows), tmp_path / "new", tmp_path / "contract.toml") == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


# --- converting


@pytest.fixture
def declaration(tiny_model: Path, tmp_path: Path) -> str:
    path = tmp_path / "declared.toml"
    path.write_text(f"model_path = '{tiny_model}'\ntrain_fps = 1\n")
    return str(path)


def convert(source: object, out: object, declaration: object, *flags: str) -> int:
    how = flags or ("--exporter=fastvideo",)
    return cli.main(["convert", str(source), str(out), f"--contract={declaration}", *how])


def converted(source: object, out: Path, declaration: object, *flags: str) -> Job:
    assert convert(source, out, declaration, *flags) == 0
    current = open_job(open_store(out))
    assert verify_job(current).problems == []
    return current


@pytest.mark.parametrize("flags", [("--exporter=fastvideo",), ("--exporter=webdataset", "--latent-dtype=float32")])
def test_what_is_converted_holds_the_same_as_our_files(
    flags: tuple[str, ...], latents: Encoded, rows: list[Row], write: WriteRows, declaration: str, tmp_path: Path
) -> None:
    current = converted(write(rows), tmp_path / "new", declaration, *flags)
    how: dict[str, Any] = {"batch_size": 1, "with_captions": True}
    assert_same_rows(by_key(EncodedDataset(tmp_path / "new", **how)), by_key(EncodedDataset(latents.out, **how)))
    assert len(current.plan.units) == 3
    contract = current.plan.contract
    assert contract["provenance"].startswith("declared by the user")
    both = EncodedDataset([tmp_path / "new", latents.out], batch_size=2)
    assert both.num_rows == 2 * NUM_ROWS


def test_rows_come_out_as_encoding_writes_them(
    latents: Encoded, rows: list[Row], write: WriteRows, declaration: str, tmp_path: Path
) -> None:
    """With the sizes, seconds and rates that FastVideo's own files have wrong."""
    converted(write(rows), tmp_path / "new", declaration)
    expected = {row["id"]: row for row in fastvideo_files.rows_of(latents.out)}
    for row in fastvideo_files.rows_of(tmp_path / "new"):
        # its scripts know of no further captions: the file's name is the id there
        assert row == expected[row["id"]]
    assert len(fastvideo_files.rows_of(tmp_path / "new")) == NUM_ROWS


def test_image_to_video_and_captions_alone_are_converted(
    i2v_latents: Encoded, rows: list[Row], write: WriteRows, tiny_models: Callable[[str], Path], tiny_model: Path,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / "i2v.toml"
    path.write_text(f"model_path = '{tiny_models('2.1-i2v')}'\nworkload = 'i2v'\ntrain_fps = 1.0\n")
    converted(write(fastvideo_files.rows_of(i2v_latents.out), workload="i2v"), tmp_path / "i2v", path)
    assert "columns that are not converted: pil_image" in capsys.readouterr().err
    ours, theirs = read_all(i2v_latents.out).tensors, read_all(tmp_path / "i2v").tensors
    assert ours.keys() == theirs.keys()
    for key, tensors in ours.items():
        assert tensors.keys() == theirs[key].keys()
        assert all(np.array_equal(tensor, theirs[key][name]) for name, tensor in tensors.items())

    path.write_text(f"model_path = '{tiny_model}'\nworkload = 'text'\ntext = 'padded'\n")
    current = converted(write(padded(rows), workload="text"), tmp_path / "text", path)
    assert "the zeros after captions are left out" in capsys.readouterr().err
    assert current.plan.contract["text"]["padding"] == "trimmed" and current.plan.contract["video"] is None
    lengths = {row["id"]: row["text_embedding_shape"][0] for row in rows}
    for row in fastvideo_files.rows_of(tmp_path / "text"):
        assert row["text_embedding_shape"] == [lengths[row["id"]], 32]


def records_of(current: Job) -> list[Record]:
    return list(current.records())


def test_rows_that_cannot_be_used_are_counted_and_listed(
    rows: list[Row], write: WriteRows, declaration: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [*rows, rows[2]]
    more = changed(more, 3, lambda _: {"vae_latent_bytes": b"", "vae_latent_shape": [], "vae_latent_dtype": ""})
    more = changed(more, 5, nan_in("text_embedding"))
    more = changed(more, 6, lambda row: {"vae_latent_bytes": row["vae_latent_bytes"][:-4]})
    current = converted(write(more), tmp_path / "new", declaration)
    said = capsys.readouterr()
    assert "17 rows" in said.out and "dropped 2: " in said.out and "bad 2: " in said.out
    assert "2 rows left out: " in said.err and "repeated_row" in said.err and "empty_tensor" in said.err
    dropped = {(item.reason, item.message) for record in records_of(current) for item in record.dropped}
    assert {reason for reason, _ in dropped} == {"empty_tensor", "repeated_row"}
    assert any("row 3 of combined_parquet_dataset/worker_0/data_chunk_0.parquet" in message for _, message in dropped)
    bad = {clip.key: clip for clip in current.bad_clips().values()}
    assert Counter(clip.reason for clip in bad.values()) == {"non_finite": 1, "read_error": 1}
    assert all("data_chunk" in clip.exception and "column" in clip.exception for clip in bad.values())
    kept = {row.key for record in records_of(current) for file in record.files for row in file.rows}
    assert len(kept) == 17 and not kept & set(bad)


def test_rows_of_a_damaged_row_group_are_bad_and_the_others_are_converted(
    rows: list[Row], write: WriteRows, declaration: str, tmp_path: Path
) -> None:
    """It ended every process that tried, and nothing could be done about it."""
    theirs, out = write(rows), tmp_path / "new"
    path = theirs / "combined_parquet_dataset/worker_1/data_chunk_0.parquet"
    metadata = pq.read_metadata(path)
    chunks = [metadata.row_group(0).column(number) for number in range(metadata.num_columns)]
    chunk = next(chunk for chunk in chunks if chunk.path_in_schema == "vae_latent_bytes")
    data = bytearray(path.read_bytes())
    middle = chunk.dictionary_page_offset + chunk.total_compressed_size // 2
    data[middle : middle + 64] = bytes(64)
    path.write_bytes(data)
    current = converted(theirs, out, declaration, "--exporter=fastvideo")
    bad = list(current.bad_clips().values())
    assert len(bad) == 8 and {clip.reason for clip in bad} == {"read_error"}
    assert all("worker_1/data_chunk_0.parquet, row group 0: cannot be read" in clip.exception for clip in bad)
    assert sum(record.num_rows for record in current.records()) == NUM_ROWS - 8
    assert verify_job(current).problems == []


def test_captions_that_were_all_cut_off_are_read(rows: list[Row], write: WriteRows, declared: DeclaredContract) -> None:
    """They were refused as padded when declared trimmed, and as trimmed when declared padded."""
    long = [
        {**row, "text_embedding_bytes": np.full((512, 32), 1 + number, np.float32).tobytes(),
         "text_embedding_shape": [512, 32]}
        for number, row in enumerate(rows)
    ]  # fmt: skip
    with pytest.warns(UserWarning, match="all 20 rows have 512 tokens.*are all captions that long?"):
        dataset = EncodedDataset(write(long), batch_size=2, contract=declared)
    assert all(batch["text_attention_mask"].all() for batch in dataset)


def test_too_many_rows_that_cannot_be_used_stop_the_conversion(
    rows: list[Row], write: WriteRows, declaration: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many = [{**row, "id": f"{number}.mp4"} for number, row in enumerate([*rows, *rows])]
    for number in range(NUM_ROWS, NUM_ROWS + 21):
        many.append({**many[0], **nan_in("vae_latent")(many[0]), "id": f"{number + NUM_ROWS}.mp4"})
    theirs, out = write(many), tmp_path / "new"
    assert convert(theirs, out, declaration) == 3
    said = capsys.readouterr().err
    assert "21 of " in said and "samples are bad" in said and "non_finite 21" in said and "another NEW" in said
    assert "retry" not in said and not (out / job.SUCCESS).exists()
    assert cli.main(["status", str(out)]) == 3
    assert convert(theirs, out, declaration) == 3
    current = converted(theirs, out, declaration, "--exporter=fastvideo", "--max-bad-fraction=0.5")
    assert sum(record.num_rows for record in current.records()) == 2 * NUM_ROWS
    assert len(current.bad_clips()) == 21


def test_a_file_replaced_while_it_is_converted_is_an_error(
    rows: list[Row], write: WriteRows, declaration: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """By one of the same size, whose rows are others: their keys would be those of the rows before."""
    theirs = write(rows, compression="none")
    path = theirs / "combined_parquet_dataset/worker_1/data_chunk_0.parquet"
    size = path.stat().st_size
    check = foreign_origin.checks.check_values

    def replace_after(*arguments: Any) -> Any:
        found = check(*arguments)
        table = pq.read_table(path, partitioning=None)
        table = table.set_column(0, "id", pa.array([f"{number:0>{len(id)}}" for number, id in
                                                    enumerate(table["id"].to_pylist())]))  # fmt: skip
        pq.write_table(table, path, compression="none")
        assert path.stat().st_size == size
        return found

    monkeypatch.setattr(foreign_origin.checks, "check_values", replace_after)
    assert convert(theirs, tmp_path / "new", declaration, "--exporter=fastvideo") != 0
    assert "worker_1/data_chunk_0.parquet was changed since its rows were counted" in capsys.readouterr().err
    assert not (tmp_path / "new" / job.SUCCESS).exists()


def test_padding_in_a_later_row_ends_the_conversion(
    rows: list[Row], write: WriteRows, declaration: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rows that are looked at beforehand are a few of each row group."""
    late = [dict(row) for row in rows] * 2
    late = [{**row, "id": f"{number}.mp4"} for number, row in enumerate(late)]
    late = changed(late, 1, lambda row: padded([row], 100)[0])
    theirs = write(late, samples_per_file=40)
    assert convert(theirs, tmp_path / "new", declaration) == 2
    assert "its last tokens are zeros, so it is padded, and declared trimmed" in capsys.readouterr().err
    assert not (tmp_path / "new" / job.SUCCESS).exists()


def test_a_stopped_conversion_goes_on_and_a_changed_source_is_refused(
    rows: list[Row], write: WriteRows, declaration: str, tmp_path: Path, forks: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    theirs, out = write(rows), tmp_path / "new"
    flags = ("--contract", declaration, "--exporter", "fastvideo")
    killed = forks.start("convert", theirs, out, *flags, environment={"STREAMPREP_CRASH_AT": "record:2"})
    killed.wait()
    assert killed.code == 137
    first = {path: path.stat().st_mtime_ns for path in (out / job.RECORDS).glob("*.json")}
    assert len(first) == 1
    current = converted(theirs, out, declaration)
    assert all(path.stat().st_mtime_ns == before for path, before in first.items())
    assert sum(record.num_rows for record in current.records()) == NUM_ROWS
    assert convert(theirs, out, declaration) == 0  # nothing left to do
    fastvideo_files.write(theirs, [*rows[:-1], {**rows[-1], "caption": "Another."}])
    capsys.readouterr()
    assert convert(theirs, out, declaration) == 2
    assert "inputs.files_sha256" in capsys.readouterr().err


def test_what_is_made_of_it_says_where_it_is_from(
    rows: list[Row], write: WriteRows, declaration: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = write(rows)
    converted(theirs, tmp_path / "new", declaration)
    capsys.readouterr()
    assert cli.main(["status", str(tmp_path / "new")]) == 0
    assert f"{theirs} by `streamprep convert`" in capsys.readouterr().out
    assert cli.main(["status", str(tmp_path / "new"), "--contract"]) == 0
    assert "declared by the user" in " ".join(capsys.readouterr().out.split())
    file = next((tmp_path / "new/combined_parquet_dataset").glob("*.parquet"))
    metadata = pq.read_schema(file).metadata[b"streamprep.contract"]
    assert json.loads(metadata)["provenance"].startswith("declared by the user")
    assert cli.main(["retry", str(tmp_path / "new")]) == 2


def test_wrong_uses_are_refused(
    latents: Encoded, rows: list[Row], write: WriteRows, declaration: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert convert(latents.out, tmp_path / "new", declaration) == 2
    assert "says itself what its latents are: leave --contract out" in capsys.readouterr().err
    theirs = write(rows)
    assert convert(theirs, theirs / "new", declaration) == 2
    assert "is within" in capsys.readouterr().err
    (tmp_path / "link").symlink_to(theirs)
    assert convert(tmp_path / "link", theirs / "new", declaration) == 2
    assert "is within" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["convert", str(latents.out), "new", "--exporter=fastvideo", "--max-bad-fraction=1"])
    assert "--max-bad-fraction goes with --contract" in capsys.readouterr().err
    assert cli.main(["convert", str(theirs), str(tmp_path / "new"), "--exporter=fastvideo"]) == 2
    assert "if FastVideo's scripts wrote it, say what it is: --contract FILE" in capsys.readouterr().err


def test_normalised_latents_are_not_written_for_fastvideos_trainers(
    rows: list[Row], write: WriteRows, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "declared.toml"
    path.write_text(f"model_path = '{tiny_model}'\ntrain_fps = 1\nspace = 'normalised'\n")
    theirs = write(of_statistics(rows, [0.0] * 16, [1.0] * 16))
    assert convert(theirs, tmp_path / "new", path) == 2
    assert "its trainers take them raw and normalise them once more" in capsys.readouterr().err
    current = converted(theirs, tmp_path / "new", path, "--exporter=webdataset")
    assert current.plan.contract["video"]["space"] == "normalised"
