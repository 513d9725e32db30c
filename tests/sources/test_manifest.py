from __future__ import annotations

import csv
import datetime
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamprep.cli import main
from streamprep.config import PackConfig
from streamprep.errors import UserError
from streamprep.manifest import load_index, load_manifest
from streamprep.pack import pack
from streamprep.sources import list_dataset
from streamprep.sources._files import Listing, Skipped, SourceOptions
from streamprep.sources._tree import open_tree
from streamprep.sources.manifest import matches
from streamprep.storage import open_store

FORMATS = ["jsonl", "ndjson", "json", "csv", "tsv", "parquet"]
Rows = list[dict[str, Any]]


def write(file: Path, rows: Rows) -> Path:
    """A manifest in the format of its extension."""
    if file.suffix in (".jsonl", ".ndjson"):
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    elif file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        with open(file, "w", newline="") as target:
            writer = csv.DictWriter(target, list(rows[0]), delimiter="\t" if file.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files to list, one of them in a folder."""
    for name in "a.mp4", "b.webm", "sub/c.png":
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(os.fsencode(name))
    return tmp_path


def listed(dataset: Path, **options: str) -> Listing:
    return list_dataset(dataset, "manifest", SourceOptions(**options))


def pairs(dataset: Path, **options: str) -> dict[str, tuple[str, ...]]:
    return {sample.file_name: sample.captions for sample in listed(dataset, **options).samples}


# --- formats


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_lists_the_same(folder: Path, format: str) -> None:
    captions = {"a.mp4": 'an "apple", red\tand round', "b.webm": "日本\nline two", "sub/c.png": "a cat"}
    rows = [{"video": name, "caption": caption, "score": "1"} for name, caption in captions.items()]
    file = write(folder / f"metadata.{format}", rows)
    assert pairs(file) == {name: (caption,) for name, caption in captions.items()}
    assert [sample.extra for sample in listed(file).samples] == [{"score": "1"}] * 3
    for dataset in (file, folder):
        assert matches(open_tree(dataset))
        assert list_dataset(dataset, "auto").samples == listed(file).samples


@given(captions=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r")), min_size=1))
@pytest.mark.parametrize("format", ["csv", "tsv", "jsonl"])
def test_any_caption_comes_back(tmp_path_factory: pytest.TempPathFactory, format: str, captions: list[str]) -> None:
    folder = tmp_path_factory.mktemp("manifest")
    for number in range(len(captions)):
        (folder / f"{number}.mp4").touch()
    file = write(
        folder / f"m.{format}", [{"video": f"{number}.mp4", "caption": c} for number, c in enumerate(captions)]
    )
    assert pairs(file) == {f"{number}.mp4": (caption,) for number, caption in enumerate(captions)}


@pytest.mark.parametrize("format", ["jsonl", "json", "parquet"])
def test_a_caption_may_be_a_list_or_empty(folder: Path, format: str) -> None:
    rows: Rows = [{"video": "a.mp4", "text": ["one", "two"]}, {"video": "b.webm", "text": None}]
    assert pairs(write(folder / f"m.{format}", rows)) == {"a.mp4": ("one", "two"), "b.webm": ()}


def test_numbers_of_a_csv_are_compared_with_the_video(folder: Path) -> None:
    (folder / "m.csv").write_text("path,cap,fps,num_frames,duration\na.mp4,x,29.97,30.0,\n")
    (sample,) = listed(folder / "m.csv").samples
    assert sample.declared == {"fps": 29.97, "num_frames": 30}


def test_cells_of_parquet_become_json(folder: Path) -> None:
    row = {
        "video": "a.mp4",
        "caption": "x",
        "when": datetime.datetime(2026, 1, 2),
        "nan": float("nan"),
        "thumbnail": b"bytes",
        "nested": {"list": [1.5, None], "bytes": b"x"},
    }
    (sample,) = listed(write(folder / "m.parquet", [row])).samples
    assert sample.extra == {"when": "2026-01-02T00:00:00", "nan": None, "nested": {"list": [1.5, None]}}


def test_windows_line_ends_byte_order_mark_and_blank_lines(folder: Path) -> None:
    (folder / "m.jsonl").write_bytes('\ufeff{"video": "a.mp4", "cap": "x"}\r\n\r\n'.encode())
    (folder / "m.csv").write_bytes("\ufeffvideo,cap\r\na.mp4,x\r\n\r\n".encode())
    assert pairs(folder / "m.jsonl") == pairs(folder / "m.csv") == {"a.mp4": ("x",)}


# --- columns


@pytest.mark.parametrize("video", ["video", "path", "file_name", "video_path", "media_path", "filepath", "file"])
@pytest.mark.parametrize("caption", ["cap", "caption", "captions", "text", "prompt"])
def test_columns_go_by_convention(folder: Path, video: str, caption: str) -> None:
    assert pairs(write(folder / "m.csv", [{"other": "1", video: "a.mp4", caption: "x"}])) == {"a.mp4": ("x",)}


def test_columns_may_be_named(folder: Path) -> None:
    file = write(folder / "m.csv", [{"video": "missing.mp4", "caption": "no", "clip": "a.mp4", "description": "yes"}])
    assert pairs(file, video_column="clip", caption_column="description") == {"a.mp4": ("yes",)}
    (sample,) = listed(file, video_column="clip", caption_column="description").samples
    assert sample.extra == {"video": "missing.mp4", "caption": "no"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no column is called cap, caption, captions, text, prompt; it has 'x': name it by --caption-column"),
        ({"caption_column": "y"}, "there is no column 'y' for --caption-column; it has 'x'"),
        ({"video_column": "y"}, "there is no column 'y' for --video-column; it has 'video', 'x'"),
    ],
)
def test_a_column_that_is_not_there_is_refused(folder: Path, options: dict[str, str], message: str) -> None:
    file = write(folder / "m.csv", [{"video": "a.mp4", "x": "1"}])
    with pytest.raises(UserError, match=re.escape(f"{file}: {message}")):
        listed(file, **options)


# --- refusals, with file and line


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.jsonl", '{"video": "a.mp4", "cap": "x"}\n{"video": "b.webm"}\n', ", line 2: there is no 'cap'"),
        ("m.jsonl", '{"video": "a.mp4", "cap": "x"}\n\n{', ", line 3 is not JSON in UTF-8"),
        ("m.jsonl", "[1]", ", line 1: an object with a video and a caption is needed, got [1]"),
        ("m.jsonl", '{"video": "a.mp4", "cap": "x", "cap": "y"}', "an object has the name 'cap' twice"),
        ("m.jsonl", '{"video": "a.mp4", "cap": 7}', "line 1: the caption must be a string or a list of strings, got 7"),
        ("m.jsonl", '{"video": 7, "cap": "x"}', ", line 1: the column 'video' must hold paths"),
        ("m.jsonl", '{"video": "a.mp4", "cap": "x", "fps": "fast"}', "line 1: fps must be a positive number, got 'f"),
        ("m.jsonl", '{"video": "", "cap": "x"}', ", line 1: the video '' is not a relative path"),
        ("m.jsonl", '{"video": "https://e.org/a.mp4", "cap": "x"}', "line 1: the video 'https://e.org/a.mp4' is no"),
        ("m.jsonl", '{"video": "s3://b/a.mp4", "cap": "x"}', "but a URL, which is not fetched: download the videos"),
        ("m.jsonl", '{"video": "/etc/a.mp4", "cap": "x"}', ", line 1: the video '/etc/a.mp4' is not a relative path"),
        ("m.jsonl", '{"video": "sub/../../a.mp4", "cap": "x"}', "line 1: the video 'sub/../../a.mp4' is not a"),
        ("m.jsonl", '{"video": "a\\u0000.mp4", "cap": "x"}', r", line 1: the video 'a\x00.mp4' is not a relative path"),
        ("m.jsonl", '{"video": "sub", "cap": "x"}', ", line 1: the video 'sub' needs a video's extension"),
        ("m.jsonl", '{"video": "a.mp4", "cap": "x"}\n{"video": "a.mp4", "cap": "y"}', "line 2: 'a.mp4' and 'a.mp4' ("),
        ("m.jsonl", '{"video": "a.mp4", "cap": "x"}\n{"video": "./a.mp4", "cap": "y"}', "list it once (a video may ha"),
        ("m.jsonl", '{"video": "%s.mp4", "cap": "x"}' % ("x" * 300), ", line 1: "),
        ("m.jsonl", "", " lists no videos: it has no rows"),
        ("m.jsonl", '{"video": "a.mp4", "cap": "x", "n": ' + "9" * 5000 + "}", ", line 1 is not JSON in UTF-8: Ex"),
        ("m.jsonl", "[" * 100_000, ", line 1 is not JSON in UTF-8"),
        ("m.json", '{"a.mp4": "x"}', " must hold a list of objects, one for each video, got a dict"),
        ("m.json", '[{"video": "a.mp4", "cap": "x"}, 7]', ", entry 1: an object with a video and a caption is needed"),
        ("m.json", '{"format": "streamprep-shards/1"}', "is of packed shards: they are input of `streamprep encode`"),
        ("m.csv", "video,cap\na.mp4,x,y\n", ", line 2: 3 cells where the first line has 2: is a caption with ','"),
        ("m.csv", "video,cap\na.mp4\n", ", line 2: 1 cells where the first line has 2"),
        ("m.csv", "video,cap,cap\na.mp4,x,y\n", ", line 1: two columns are called 'cap': rename one"),
        ("m.csv", 'video,cap\na.mp4,"x\n', ", line 2: unexpected end of data"),
        ("m.csv", "video,cap,fps\na.mp4,x,fast\n", ", line 2: fps must be a positive number, got 'fast'"),
        ("m.csv", "video,cap,fps\na.mp4,x,inf\n", ", line 2: fps must be a positive number, got inf"),
        ("m.csv", "video,cap\n", " lists no videos: it has no rows"),
        ("m.parquet", "PAR1", " cannot be read as Parquet, after row 0: "),
        ("m.txt", "a.mp4", "m.txt: a manifest is one of .jsonl, .ndjson, .json, .csv, .tsv, .parquet"),
    ],
)  # fmt: skip
def test_a_manifest_that_is_wrong_is_refused(folder: Path, name: str, content: str, message: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        listed(folder / name)
    assert str(folder / name) in str(caught.value)


def test_text_that_is_not_utf_8_is_refused_with_its_line(folder: Path) -> None:
    (folder / "m.csv").write_bytes(b"video,cap\na.mp4,caf\xe9\n")
    with pytest.raises(UserError, match=r"m\.csv is not UTF-8: line 2 holds b'\\xe9'"):
        listed(folder / "m.csv")


def test_a_pipe_for_a_manifest_is_refused(folder: Path) -> None:
    os.mkfifo(folder / "m.jsonl")
    with pytest.raises(UserError, match=r"m\.jsonl is not a regular file"):
        listed(folder / "m.jsonl")


def test_a_link_out_of_the_dataset_is_refused_with_its_line(folder: Path) -> None:
    (folder / "host.mp4").symlink_to("/etc/hostname")
    file = write(folder / "m.jsonl", [{"video": "a.mp4", "cap": "x"}, {"video": "host.mp4", "cap": "x"}])
    with pytest.raises(UserError, match=r"m\.jsonl, line 2: .*host\.mp4 is a link to /etc/hostname, outside"):
        listed(file)


def test_missing_videos_are_skipped_and_half_a_surrogate_pair_is_kept(folder: Path) -> None:
    (folder / "m.jsonl").write_text('{"video": "a.mp4", "cap": "\\ud800"}\n{"video": "no.mp4", "cap": "x"}\n')
    listing = listed(folder / "m.jsonl")
    assert [sample.captions for sample in listing.samples] == [("\ud800",)]  # encoding drops it: caption_encoding
    assert listing.skipped == [Skipped(file_name="no.mp4", reason="missing")]


def test_a_folder_with_several_manifests_needs_one_to_be_named(folder: Path) -> None:
    write(folder / "metadata.csv", [{"video": "a.mp4", "cap": "x"}])
    write(folder / "metadata.jsonl", [{"video": "b.webm", "cap": "x"}])
    with pytest.raises(UserError, match=r"several manifests \(metadata\.jsonl, metadata\.csv\).*give the file itself"):
        listed(folder)
    assert pairs(folder / "metadata.csv") == {"a.mp4": ("x",)}


@pytest.mark.parametrize("layout", ["merged", "raw", "folder", "webdataset"])
def test_a_file_is_no_dataset_of_another_layout(folder: Path, layout: str) -> None:
    with pytest.raises(UserError, match=f"is a file; a dataset of the layout {layout} is a folder"):
        list_dataset(write(folder / "m.csv", [{"video": "a.mp4", "cap": "x"}]), layout)


# --- bytes in Parquet


@pytest.fixture
def videos(make_video: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("videos")
    return [make_video(folder / f"{n}.mp4", seed=n, padding_bytes=400 * 2**10).read_bytes() for n in range(5)]


@pytest.mark.parametrize("pairs_of_path", [False, True])
@pytest.mark.parametrize("row_group_size", [1, 2, 100])
def test_parquet_may_hold_the_videos_themselves(
    videos: list[bytes], tmp_path: Path, pairs_of_path: bool, row_group_size: int
) -> None:
    cells = [{"bytes": video, "path": f"{n}.mp4"} if pairs_of_path else video for n, video in enumerate(videos)]
    rows = [{"video": cell, "caption": f"caption {n}", "score": n} for n, cell in enumerate(cells)]
    (tmp_path / "dataset").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "dataset" / "m.parquet", row_group_size=row_group_size)
    for workers in 1, 2:
        pack(
            PackConfig(
                dataset=str(tmp_path / "dataset" / "m.parquet"),
                shards=str(tmp_path / f"shards{workers}"),
                shard_size_mb=1,
                num_workers=workers,
            )
        )
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / f"shards{n}").iterdir()} for n in (1, 2))
    assert one == two
    store = open_store(tmp_path / "shards1")
    manifest = load_manifest(store)
    assert [shard.num_samples for shard in manifest.shards] == [2, 2, 1]
    found = [
        (sample.key, store.read_range(shard.name, sample.video.offset, sample.video.size), sample.metadata["captions"])
        for shard in manifest.shards
        for sample in load_index(store, shard).samples
    ]
    assert found == [(f"{n:08d}", video, [f"caption {n}"]) for n, video in enumerate(videos)]


def test_bytes_are_named_by_what_they_begin_like(make_video: Callable[..., Path], tmp_path: Path) -> None:
    from PIL import Image

    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    videos = [make_video(tmp_path / "a.mp4").read_bytes(), make_video(tmp_path / "b.mkv").read_bytes()]
    cells = [*videos, picture.getvalue(), b"noise"]
    file = write(tmp_path / "m.parquet", [{"video": cell, "caption": ""} for cell in cells])
    assert [sample.file_name for sample in listed(file).samples] == [
        "00000000.mp4",
        "00000001.mkv",
        "00000002.png",
        "00000003.bin",
    ]


def test_a_row_without_bytes_is_skipped(tmp_path: Path) -> None:
    rows: Rows = [{"video": b"1", "caption": "x"}, {"video": None, "caption": "y"}, {"video": b"", "caption": "z"}]
    listing = listed(write(tmp_path / "m.parquet", rows))
    assert [sample.key for sample in listing.samples] == ["00000000"]
    assert [skipped.reason for skipped in listing.skipped] == ["no_video", "no_video"]


def test_shuffling_what_is_read_in_order_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "m.parquet", [{"video": b"1", "caption": "x"}])
    with pytest.raises(UserError, match=r"--shuffle: the videos of .* can only be read in their order"):
        pack(PackConfig(dataset=str(file), shards=str(tmp_path / "shards"), shuffle=1))
    assert not (tmp_path / "shards").exists()


def test_run_takes_the_columns_too(make_video: Callable[..., Path], tiny_model: Path, tmp_path: Path) -> None:
    make_video(tmp_path / "a.mp4")
    file = write(tmp_path / "clips.csv", [{"clip": "a.mp4", "description": "an apple", "caption": "no"}])
    columns = ["--video-column", "clip", "--caption_column", "description"]
    size = ["--max-height", "32", "--max-width", "48", "--num-frames", "1", "--serial"]
    assert main(["run", str(file), str(tmp_path / "out"), "--model-path", str(tiny_model), *columns, *size]) == 0
    rows = pq.read_table(tmp_path / "out" / "combined_parquet_dataset", columns=["id", "caption"]).to_pylist()
    assert rows == [{"id": "a.mp4", "caption": "an apple"}]
