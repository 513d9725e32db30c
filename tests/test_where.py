"""--where chooses by any column, means the same in every shard, and can do nothing but that."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_plan import make_sample

from streamprep.errors import UserError
from streamprep.shards import ShardSample
from streamprep.where import COLUMNS, Where


def sample(key: str = "a", extra: dict[str, Any] | None = None, **options: Any) -> ShardSample:
    made = make_sample(key, **options)
    return dataclasses.replace(made, metadata={**made.metadata, "extra": extra or {}})


def keys(expression: str, *samples: ShardSample) -> str:
    """The chosen keys, joined."""
    return "".join(sorted(Where(expression).keys_of(samples)))


def holds(expression: str, extra: dict[str, Any] | None = None, **options: Any) -> bool:
    return keys(expression, sample(extra=extra, **options)) == "a"


# Columns


@pytest.mark.parametrize(
    "expression",
    [
        "key = 'a'",
        "file_name = 'a.mp4'",
        "caption = 'A dog.' and num_captions = 2",
        "caption like '%DOG%'",
        "extension = 'mp4' and size_bytes = 1000",
        "num_frames = 48 and fps = 24 and duration = 2",
        "width = 320 and height = 180 and rotation = 0",
        "codec in ('h264', 'hevc')",
        "not variable_frame_rate",
        "width * 1.0 / height between 1.7 and 1.8",
        "length(caption) > 3 and instr(caption, 'dog') and round(fps) = 24",
        'FPS = 24 and Width = 320 and "HEIGHT" = 180',
        "samples.fps = 24 and [width] = 320 and `height` = 180",
        "fps = 24 -- a comment",
        "/* a comment */ fps = 24",
    ],
)
def test_columns_of_the_file(expression: str) -> None:
    assert holds(expression, captions=("A dog.", "A cat."))
    assert not holds(f"not ({expression}\n)", captions=("A dog.", "A cat."))


def test_every_column_that_is_named_is_there() -> None:
    assert holds(" and ".join(f"{name} is not null" for name in COLUMNS))


def test_a_file_without_a_readable_header_has_nulls() -> None:
    unread = {"probe_error": "no video"}
    assert holds("fps is null and width is null and duration is null and key = 'a'", **unread)
    assert not holds("fps > 1", **unread)
    assert not holds("not fps > 1", **unread)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("score > 5", 5.5),
        ("score = 6", 6),
        ("score > 9e18", 10**30),
        ("score = 'good'", "good"),
        ("score > 5", "text is more than any number"),
        ("score = 1 and score", True),
        ("score = 0 and not score", False),
        ("score is null", None),
        ("score is null", float("nan")),
        ("score > 1e300", float("inf")),
        ("json_extract(score, '$[1]') = 2", [1, 2]),
        ("score ->> '$.a.b' = 'c'", {"a": {"b": "c"}}),
        ("json_array_length(score) = 0", []),
    ],
)
def test_types_of_the_datasets_columns(expression: str, value: Any) -> None:
    assert holds(expression, {"score": value})


@pytest.mark.parametrize("name", ["two words", 'quo"te', "select", "dot.ted", "\u00e9", "1st", "a--b", "x'y", "[x]"])
def test_a_quoted_name_is_a_column_whatever_it_looks_like(name: str) -> None:
    quoted = '"' + name.replace('"', '""') + '"'
    assert holds(f"{quoted} = 1", {name: 1})
    assert not holds(f"{quoted} = 1", {name: 2})


def test_a_quoted_name_without_a_column_is_no_text() -> None:
    """SQLite takes it for a string: then "aesthetic" > 5 holds of every sample."""
    where = Where('"aesthetic" > 5')
    assert where.keys_of([sample()]) == set()
    with pytest.raises(UserError, match="no sample has aesthetic"):
        where.check_known()
    assert holds("caption = 'say \"aesthetic\"'", captions=('say "aesthetic"',))


def test_a_datasets_column_does_not_hide_the_files() -> None:
    assert holds("fps = 24 and Key = 'a'", {"fps": 99, "KEY": "z", "Fps": 98})


def test_one_column_spelt_in_two_ways_is_one_column() -> None:
    """It was refused as "duplicate column name"."""
    two = sample("a", {"Score": 1}), sample("b", {"score": 1})
    assert keys("score = 1", *two) == "ab"
    assert keys("sCORE = 1", *two) == "ab"
    assert holds("score = 1", {"Score": 1, "score": 2})  # the first counts


def test_letters_that_sqlite_tells_apart_are_two_columns() -> None:
    assert holds("\u00e9 = 1 and \u00c9 = 2", {"\u00e9": 1, "\u00c9": 2})


def test_a_huge_caption_harms_nothing() -> None:
    """It was refused as "string or blob too big", and so was the job."""
    assert holds("caption like 'ab%' and length(caption) > 99999 and fps = 24", captions=("ab" * 20_000_000,))


@pytest.mark.parametrize("name", ["\ud800", "nul\0", ""])
def test_a_name_that_sqlite_cannot_have_harms_nothing(name: str) -> None:
    assert holds("score = 1 and fps = 24", {name: 5, "score": 1})


def test_text_that_is_no_unicode_harms_nothing() -> None:
    assert holds("score like 'x%' and caption = 'a ?'", {"score": "x\ud83d"}, captions=("a \ud83d",))


@given(
    st.dictionaries(
        st.text(max_size=8),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
            max_leaves=5,
        ),
        max_size=6,
    )
)
def test_whatever_a_dataset_holds_the_other_columns_mean_what_they_did(extra: dict[str, Any]) -> None:
    assert holds("fps = 24 and caption = 'A dog.'", extra)


# Columns that are not everywhere


def test_a_column_that_only_other_samples_have_is_null() -> None:
    three = sample("a", {"score": 9}), sample("b"), sample("c", {"score": 1})
    assert keys("score > 5", *three) == "a"
    assert keys("score is null", *three) == "b"


@pytest.mark.parametrize("expression", ["score > 5", '"score" > 5', "samples.score > 5", "[SCORE] > 5"])
def test_a_column_is_missing_only_if_no_shard_has_it(expression: str) -> None:
    where = Where(expression)
    for shard in [sample("a")], [sample("b", {"score": 9})], [sample("c")]:
        assert where.keys_of(shard) == ({"b"} if shard[0].key == "b" else set())
    where.check_known()


def test_a_missing_column_is_refused_with_those_there_are() -> None:
    where = Where("aesthetics > 5 and blurr < 1 and fps > 1")
    where.keys_of([sample("a", {"aesthetic": 9})])
    where.keys_of([sample("b", {"blur": 0})])
    with pytest.raises(UserError, match=r"no sample has aesthetics, blurr; there are aesthetic, blur, caption, codec"):
        where.check_known()


def test_a_rows_number_is_no_column() -> None:
    """It depends on the shard."""
    for name in "rowid", "oid", "_rowid_":
        where = Where(f"{name} = 1")
        assert where.keys_of([sample()]) == set()
        with pytest.raises(UserError, match=f"no sample has {name}"):
            where.check_known()
        assert holds(f"{name} = 7", {name: 7})


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9) | st.none()), max_size=12))
def test_what_is_chosen_does_not_depend_on_the_cut_into_shards(values: list[tuple[int, int | None]]) -> None:
    samples = [sample(f"{n:02d}", {f"x{x}": y} if x else {}) for n, (x, y) in enumerate(values)]
    expression = 'x1 > 3 or x2 is null and "x3" is not null'
    apart = Where(expression)
    chosen = set().union(*(apart.keys_of([one]) for one in samples))
    assert chosen == Where(expression).keys_of(samples)
    assert chosen == {
        one.key
        for one in samples
        for extra in [one.metadata["extra"]]
        if (extra.get("x1") or 0) > 3 or (extra.get("x2") is None and extra.get("x3") is not None)
    }


# What is refused


@pytest.mark.parametrize(
    "expression",
    [
        "",
        " ",
        "fps >",
        "fps > 1)",
        "(fps > 1",
        "fps > 1; drop table samples",
        "1; select 1",
        "'open",
        "fps > ?",
        "fps > :x",
        "nosuch(fps)",
        "fps > 1 order by fps",
        "count(*) > 1",
        "row_number() over () = 1",
        "__import__('os')",
        "fps > 1\0",
        "fps > '\udcff'",
    ],
)
def test_what_is_no_expression_is_refused_at_once(expression: str) -> None:
    with pytest.raises(UserError, match=r"(?s)^--where .*: "):
        Where(expression)


HOSTILE = [
    "load_extension('x.so')",
    "readfile('/etc/passwd') is null",
    "writefile('{there}', 'x') = 1",
    "edit('x') = 1",
    "fts3_tokenizer('simple') is null",
    "(select count(*) from sqlite_master) > 0",
    "(select count(*) from sqlite_schema) > 0",
    "(select count(*) from pragma_database_list) > 0",
    "(select count(*) from json_each('[1]')) > 0",
    "exists (select 1 from samples)",
    "fps > (select avg(fps) from samples)",
    "key in samples",
    "(with recursive n(i) as (select 1 union all select i + 1 from n) select count(*) from n) > 0",
    "1) union select 'z' where (1",
    "1) limit (1",
    "1) order by (1",
    "1) group by (width",
    "1) limit 1 /*",
    "1) union select 'z' /*",
    "0) is true, (1",
    "1); attach '{there}' as other; --",
    "1); pragma user_version = 1; --",
    "1); vacuum into '{there}'; --",
    "attach '{there}'",
]


@pytest.mark.parametrize("expression", HOSTILE)
def test_what_does_more_than_look_at_a_sample_is_refused(expression: str, tmp_path: Path) -> None:
    there = tmp_path / "made.db"
    began = time.monotonic()
    with pytest.raises(UserError, match=r"(?s)^--where .*: "):
        Where(expression.format(there=there)).keys_of([sample("a"), sample("b")])
    assert time.monotonic() - began < 10
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "expression",
    [
        "random() > 0",
        "length(randomblob(3)) = 3",
        "current_date > '2000'",
        "current_timestamp > ''",
        "current_time > ''",
    ]
    + [f"{name}('now') is not null" for name in ("date", "time", "datetime", "julianday")]
    + [
        "strftime('%s', 'now') > 0",
        "unixepoch() > 0",
        "total_changes() > 0",
        "changes() = 0",
        "last_insert_rowid() > 0",
    ],
)
def test_what_another_run_would_answer_otherwise_is_refused(expression: str) -> None:
    with pytest.raises(UserError, match="only a sample's columns"):
        Where(expression)


@pytest.mark.parametrize(
    "expression",
    [
        "hex(zeroblob(1000000000)) = ''",
        "replace(hex(zeroblob(4000000)), '0', hex(zeroblob(4000000))) = ''",
    ],
)
def test_a_bomb_of_memory_is_refused(expression: str) -> None:
    with pytest.raises(UserError, match="too big"):
        Where(f"key = 'a' and {expression}").keys_of([sample()])


def test_a_hostile_caption_or_name_is_only_text() -> None:
    hostile = "x'); DROP TABLE samples; --"
    assert holds("caption like 'x%' and score = 1", {hostile: 1, "score": 1, '"': 2}, captions=(hostile,))


def test_a_long_pattern_over_a_long_caption_takes_no_ages() -> None:
    began = time.monotonic()
    assert not holds("caption like '" + "%a" * 50 + "%b'", captions=("a" * 5000,))
    assert time.monotonic() - began < 10
