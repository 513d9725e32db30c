"""``--keep-columns``: what a dataset knows more of its videos becomes columns of the output, each of one type."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporters import fastvideo
from streamprep.cli import main
from streamprep.columns import ColumnTypes, keep
from streamprep.errors import UserError
from streamprep.shards import ShardSample
from streamprep.storage import open_store
from streamprep.types import EncodedSample

if TYPE_CHECKING:
    from jobs import EncodeJob

    NewJob = Callable[..., EncodeJob]

pytest_plugins = ["jobs"]

EXTRA: list[dict[str, Any]] = [
    {"aesthetic": 5, "source": "pexels", "checked": True, "id_there": 2**60, "tags": ["dog", "sea"], "mixed": 1},
    {"aesthetic": 5.5, "source": None, "checked": False, "id_there": 1, "tags": {"a": 1}, "mixed": "one"},
    {"id_there": None, "sometimes": "yes"},
]
KEPT = {
    "aesthetic": (pa.float64(), [5.0, 5.5, None]),
    "checked": (pa.bool_(), [True, False, None]),
    "id_there": (pa.int64(), [2**60, 1, None]),
    "mixed": (pa.string(), ["1", '"one"', None]),
    "sometimes": (pa.string(), [None, None, "yes"]),
    "source": (pa.string(), ["pexels", None, None]),
    "tags": (pa.string(), ['["dog","sea"]', '{"a":1}', None]),
}


def types_of(*values: Any) -> str:
    """The type of a column with these values."""
    types = ColumnTypes("x")
    types.see(ShardSample(key="a", members={}, metadata={"extra": {"x": value}}) for value in values)
    return types.types(problem=lambda name: None)["x"]


# Types


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, None, -3], "int64"),
        ([1, 2.5], "float64"),
        ([True, False], "bool"),
        (["a", None], "string"),
        ([None], "string"),
        ([True, 1], "json"),
        ([1, "1"], "json"),
        ([2**63], "json"),
        ([2**53 + 1, 0.5], "json"),
        ([2**53 + 1, 1], "int64"),
        ([[1, 2]], "json"),
        ([{"a": None}], "json"),
    ],
)
def test_a_column_has_the_type_that_holds_all_its_values_without_loss(values: list[Any], expected: str) -> None:
    assert types_of(*values) == expected


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
json_values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner))


@given(st.lists(json_values, min_size=1, max_size=5))
def test_any_value_comes_back_out_of_a_column(values: list[Any]) -> None:
    kind = types_of(*values)
    kept = [keep({"x": value}, {"x": kind})["x"] for value in values]
    written = pa.array(kept, fastvideo._ARROW[kind]).to_pylist()
    back = [json.loads(value) if kind == "json" and value is not None else value for value in written]
    assert back == values


def test_half_a_character_does_not_stop_a_job() -> None:
    assert keep({"x": "a\ud83d"}, {"x": "string"}) == {"x": "a?"}
    assert json.loads(keep({"x": ["a\ud83d"]}, {"x": "json"})["x"]) == ["a\ud83d"]


# What is refused


@pytest.mark.parametrize("asked", ["", ",", "a,,b", "a,a"])
def test_a_list_that_is_none_is_refused(asked: str) -> None:
    with pytest.raises(UserError, match="give each name once, separated by commas, or all"):
        ColumnTypes(asked)


@pytest.mark.parametrize("workload", fastvideo.WORKLOADS)
def test_names_of_the_schema_and_of_tensors_are_refused(workload: str) -> None:
    for name in fastvideo.schema(workload).names:
        assert fastvideo.column_problem(name, workload=workload)
    for name in ("mask_bytes", "mask_shape", "mask_dtype"):
        assert "ends as the columns of tensors do" in str(fastvideo.column_problem(name, workload=workload))
    assert fastvideo.column_problem("aesthetic", workload=workload) is None


# Whole jobs


@pytest.fixture
def shards(make_video: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """``shards(*extra)``: a packed video for each."""

    def pack(*extra: dict[str, Any]) -> Path:
        rows = [{"path": f"{n}.mp4", "cap": f"Video {n}."} | columns for n, columns in enumerate(extra)]
        for row in rows:
            make_video(tmp_path / "dataset/videos" / row["path"], fps=1, seed=int(row["path"][0]))
        (tmp_path / "dataset/videos2caption.json").write_text(json.dumps(rows))
        assert main(["pack", str(tmp_path / "dataset"), str(tmp_path / "shards"), "--num-workers", "1"]) == 0
        return tmp_path / "shards"

    return pack


@pytest.mark.parametrize("workload", ["t2v", "text"])
def test_all_further_columns_are_in_the_output_after_the_schemas_own(
    new_job: NewJob, shards: Callable[..., Path], workload: str
) -> None:
    job = new_job(shards(*EXTRA))
    ended = job.run(serial=True, keep_columns="all", workload_type=workload)
    assert ended.code == 0, ended.output
    table = pq.read_table(job.out / fastvideo.FOLDER)
    own = fastvideo.schema(workload)
    assert table.column_names == [*own.names, *KEPT]
    assert all(table.schema.field(name).type == own.field(name).type for name in own.names)
    assert table["id"].to_pylist() == ["0.mp4", "1.mp4", "2.mp4"]
    assert {name: (table.schema.field(name).type, table[name].to_pylist()) for name in KEPT} == KEPT
    assert job.problems() == []
    assert list(job.job.plan.columns) == list(KEPT)


def test_named_columns_are_kept_in_the_order_they_are_named(new_job: NewJob, shards: Callable[..., Path]) -> None:
    job = new_job(shards(*EXTRA))
    assert job.run(serial=True, keep_columns="tags, checked").code == 0
    (path,) = {path for path in (job.out / fastvideo.FOLDER).iterdir() if "00000-00000" in path.name}
    assert pq.read_schema(path).names[-2:] == ["tags", "checked"]
    other = job.run(serial=True, keep_columns="tags")
    assert other.code == 2
    assert "export.keep_columns: tags, checked there, tags now" in other.output


def test_a_file_of_a_unit_where_no_sample_has_a_column_has_it_all_the_same(tmp_path: Path) -> None:
    """A reader of all files together needs one schema."""
    import torch

    sample = EncodedSample(
        key="a",
        id="a.mp4",
        tensors={"text_embedding": torch.zeros(2, 3)},
        file_name="a.mp4",
        caption="",
        clip=None,
        columns={"a.b": None, "score": 1.5},
    )
    columns = {"a.b": "int64", "score": "float64"}
    with fastvideo.open_shard(
        open_store(tmp_path), "000000", workload="text", samples_per_file=1, contract={}, columns=columns
    ) as writer:
        writer.write(sample)
        (file,) = writer.close()
    table = pq.ParquetFile(tmp_path / file.name).read()
    assert table.schema.field("a.b").type == pa.int64()
    assert (table["a.b"].to_pylist(), table["score"].to_pylist()) == ([None], [1.5])
    assert file.rows[0].tensors["text_embedding"].size == 24


@pytest.mark.parametrize("verb", ["encode", "plan"])
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("nowhere", "no sample has nowhere; the further columns are: aesthetic, media_type"),
        (
            "media_type",
            "'media_type' is a column of FastVideo's own: rename it in the dataset and pack again, or leave it",
        ),
        ("all", "--keep-columns all: 'media_type' is a column of FastVideo's own: rename it"),
    ],
)
def test_a_column_that_cannot_be_kept_is_refused_before_work(
    shards: Callable[..., Path],
    tiny_model: Path,
    tmp_path: Path,
    verb: str,
    asked: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    packed = shards({"aesthetic": 1, "media_type": "film"})
    out = [str(tmp_path / "out")] if verb == "encode" else []
    size = ["--max-height", "32", "--max-width", "48", "--num-frames", "5", "--train-fps", "1"]
    assert main([verb, str(packed), *out, "--model-path", str(tiny_model), "--keep-columns", asked, *size]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_plan_lists_the_columns_and_their_types(
    shards: Callable[..., Path], tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = shards(*EXTRA)
    size = ["--max-height", "32", "--max-width", "48", "--num-frames", "5", "--train-fps", "1"]
    assert main(["plan", str(packed), "--model-path", str(tiny_model), "--keep-columns", "source,tags", *size]) == 0
    assert "columns   source (string), tags (json)\n" in capsys.readouterr().out
