from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamprep.errors import UserError
from streamprep.sources import list_dataset
from streamprep.sources._files import Skipped, SourceOptions
from streamprep.types import RawSample

MakeDataset = Callable[..., Path]


@pytest.fixture
def make_merged(make_dataset: MakeDataset) -> Callable[..., Path]:
    """``make_merged(rows, files)``: the JSON as given, the files as named."""

    def make(rows: Any, files: tuple[str, ...] = ("a.mp4",)) -> Path:
        root = make_dataset("merged", dict.fromkeys(files, ""))
        (root / "videos2caption.json").write_text(rows if isinstance(rows, str) else json.dumps(rows))
        return root

    return make


def only(samples: list[RawSample]) -> RawSample:
    (sample,) = samples
    return sample


# --- which layout


def test_the_more_particular_layout_wins(make_dataset: MakeDataset) -> None:
    root = make_dataset("folder", {"videos/a.mp4": "folder"})
    assert only(list_dataset(root, "auto").samples).captions == ("folder",)
    make_dataset("raw", {"a.mp4": "raw"})
    assert only(list_dataset(root, "auto").samples).captions == ("raw",)
    make_dataset("merged", {"a.mp4": "merged"})
    assert only(list_dataset(root, "auto").samples).captions == ("merged",)
    assert only(list_dataset(root, "raw").samples).captions == ("raw",)


def test_a_folder_of_no_layout_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(
        UserError,
        match=r"none of the layouts prompts, merged, raw, hf, manifest, webdataset, folder: no videos2caption\.json",
    ):
        list_dataset(tmp_path, "auto")


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is not a folder or file"):
        list_dataset(tmp_path / "nowhere", "auto")


def test_an_unknown_layout_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no source 'mergd'; one of folder, .*manifest, merged, .*raw"):
        list_dataset(tmp_path, "mergd")


# --- missing files


@pytest.mark.parametrize(("total", "missing"), [(21, 20), (500, 25)])
def test_a_few_missing_videos_are_skipped(make_merged: Callable[..., Path], total: int, missing: int) -> None:
    rows = [{"path": f"{number:03d}.mp4", "cap": ""} for number in range(total)]
    root = make_merged(rows, tuple(row["path"] for row in rows[missing:]))
    listing = list_dataset(root, "merged")
    assert len(listing.samples) == total - missing
    assert listing.skipped == [Skipped(file_name=row["path"], reason="missing") for row in rows[:missing]]


@pytest.mark.parametrize(("total", "missing"), [(3, 3), (22, 21), (500, 26)])
def test_many_missing_videos_are_refused(make_merged: Callable[..., Path], total: int, missing: int) -> None:
    rows = [{"path": f"{number:03d}.mp4", "cap": ""} for number in range(total)]
    root = make_merged(rows, tuple(row["path"] for row in rows[missing:]))
    with pytest.raises(UserError, match=rf"{missing} of {total} listed entries are missing, the first is '000\.mp4'"):
        list_dataset(root, "merged")


def test_a_dangling_link_is_a_missing_video(make_merged: Callable[..., Path]) -> None:
    root = make_merged([{"path": "a.mp4", "cap": ""}, {"path": "b.mp4", "cap": ""}])
    (root / "videos" / "b.mp4").symlink_to("nowhere")
    assert list_dataset(root, "merged").skipped == [Skipped(file_name="b.mp4", reason="missing")]


# --- merged


def test_a_caption_is_a_string_or_a_list_of_strings(make_merged: Callable[..., Path]) -> None:
    root = make_merged([{"path": "a.mp4", "cap": "one"}, {"path": "b.mp4", "cap": ["one", "two"]}], ("a.mp4", "b.mp4"))
    assert [sample.captions for sample in list_dataset(root, "merged").samples] == [("one",), ("one", "two")]


def test_columns_of_the_video_are_declared_and_others_kept(make_merged: Callable[..., Path]) -> None:
    row = {"path": "a.mp4", "cap": "x", "fps": 24, "num_frames": 3, "resolution": {"width": 8}, "duration": None}
    sample = only(list_dataset(make_merged([row | {"score": 0.5, "text": "kept"}]), "merged").samples)
    assert sample.declared == {"fps": 24, "num_frames": 3, "resolution": {"width": 8}}
    assert sample.extra == {"score": 0.5, "text": "kept"}


def test_columns_may_be_missing(make_merged: Callable[..., Path]) -> None:
    sample = only(list_dataset(make_merged([{"path": "a.mp4", "cap": "x"}]), "merged").samples)
    assert (sample.declared, sample.extra) == ({}, {})


def test_nan_is_an_empty_cell(make_merged: Callable[..., Path]) -> None:
    # json.dump writes NaN for pandas' empty cells; packing crashed on it, as it is no JSON.
    root = make_merged('[{"path": "a.mp4", "cap": "x", "fps": NaN, "score": NaN}]')
    sample = only(list_dataset(root, "merged").samples)
    assert (sample.declared, sample.extra) == ({}, {"score": None})


def test_a_json_with_a_byte_order_mark_is_read(make_merged: Callable[..., Path]) -> None:
    root = make_merged('\ufeff[{"path": "a.mp4", "cap": "x"}]')
    assert only(list_dataset(root, "merged").samples).captions == ("x",)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("[{", "videos2caption.json is not JSON in UTF-8: "),
        ("[" * 100_000, "videos2caption.json is not JSON in UTF-8: "),
        ({"a.mp4": "x"}, "must hold a list of objects with 'path' and 'cap', got a dict"),
        (["a.mp4"], "entry 0: an object with 'path' and 'cap' is needed, got 'a.mp4'"),
        ([{"cap": "x"}], "entry 0: an object with 'path' and 'cap' is needed, got {'cap': 'x'}"),
        ([{"path": 7, "cap": "x"}], "entry 0: an object with 'path' and 'cap' is needed"),
        ([{"path": "a.mp4"}], "entry 0: 'a.mp4' has no 'cap'"),
        ([{"path": "a.mp4", "cap": 7}], "entry 0: the caption must be a string or a list of strings, got 7"),
        ([{"path": "a.mp4", "cap": ["x", None]}], "must be a string or a list of strings, got ['x', None]"),
        ([{"path": "a.mp4", "cap": "x", "fps": "24"}], "entry 0: fps must be a positive number, got '24'"),
        ([{"path": "a.mp4", "cap": "x", "fps": 0}], "entry 0: fps must be a positive number, got 0"),
        ([{"path": "a.mp4", "cap": "x", "num_frames": True}], "num_frames must be a positive number, got True"),
        ([], "lists no videos"),
    ],
)
def test_a_json_of_another_shape_is_refused(make_merged: Callable[..., Path], rows: Any, message: str) -> None:
    root = make_merged(rows)
    with pytest.raises(UserError, match=re.escape(message)):
        list_dataset(root, "merged")


@pytest.mark.parametrize(
    "path", ["/etc/hostname.mp4", "../a.mp4", "b/../../a.mp4", "https://example.com/a.mp4", "a\0.mp4", "\ud800.mp4"]
)
def test_a_path_that_leaves_the_dataset_is_refused(make_merged: Callable[..., Path], path: str) -> None:
    root = make_merged([{"path": path, "cap": "x"}, {"path": "a.mp4", "cap": "x"}])
    with pytest.raises(UserError, match=re.escape(f"the video {path!r} is not a relative path inside the dataset")):
        list_dataset(root, "merged")


@pytest.mark.parametrize("name", ["clip", "clip.", ".mp4", "a.d/clip", "clip.json", "clip.TXT", "clip.a b", "clip.é"])
def test_a_video_needs_an_extension_that_a_member_can_have(make_merged: Callable[..., Path], name: str) -> None:
    # A shard has KEY.json and KEY.txt of its own; a path without an extension became a member KEY.videos/KEY.
    root = make_merged([{"path": name, "cap": "x"}], (name,))
    with pytest.raises(UserError, match=re.escape(f"the video {name!r} needs a video's extension, such as .mp4")):
        list_dataset(root, "merged")


def test_a_folder_in_the_place_of_a_video_is_refused(make_merged: Callable[..., Path]) -> None:
    root = make_merged([{"path": "sub.mp4", "cap": "x"}], ("sub.mp4/a.mp4",))
    with pytest.raises(UserError, match=r"sub\.mp4 is not a regular file"):
        list_dataset(root, "merged")


def test_a_video_too_large_for_a_tar_is_refused(make_merged: Callable[..., Path]) -> None:
    root = make_merged([{"path": "a.mp4", "cap": "x"}])
    os.truncate(root / "videos" / "a.mp4", 2**33 - 1)
    assert only(list_dataset(root, "merged").samples).size_bytes == 2**33 - 1
    os.truncate(root / "videos" / "a.mp4", 2**33)
    with pytest.raises(UserError, match=r"'a\.mp4' is of 8589934592 bytes, shards hold less than 8 GiB"):
        list_dataset(root, "merged")


# --- raw


def test_a_raw_line_may_start_with_the_videos_folder(make_dataset: MakeDataset) -> None:
    root = make_dataset("raw", {"a.mp4": "an apple", "b.mp4": "a ball"})
    (root / "videos.txt").write_bytes(b"\xef\xbb\xbfvideos/a.mp4\r\nb.mp4\r\n")  # as editors on Windows write it
    assert [(sample.file_name, sample.path) for sample in list_dataset(root, "raw").samples] == [
        ("a.mp4", "videos/a.mp4"),
        ("b.mp4", "videos/b.mp4"),
    ]


def test_the_last_raw_prompt_may_be_empty_and_blank_lines_may_follow(make_dataset: MakeDataset) -> None:
    root = make_dataset("raw", {"a.mp4": "an apple", "b.mp4": ""})
    for end in "", "\n", "\n\n":
        (root / "videos.txt").write_text(f"a.mp4\nb.mp4\n{end}")
        (root / "prompt.txt").write_text(f"an apple\n\n{end}")
        assert [sample.captions for sample in list_dataset(root, "raw").samples] == [("an apple",), ("",)]


def test_raw_videos_may_lie_beside_their_list(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"1")
    (tmp_path / "videos.txt").write_text("a.mp4")
    (tmp_path / "prompt.txt").write_text("an apple")
    assert only(list_dataset(tmp_path, "raw").samples).path == "a.mp4"


@pytest.mark.parametrize(
    ("videos", "prompts", "message"),
    [
        (b"a.mp4\nb.mp4\n", b"one\n", "videos.txt has 2 lines and prompt.txt has 1; line n of one is for line n"),
        (b"a.mp4\n\nb.mp4\n", b"1\n2\n3\n", "videos.txt, line 2: videos.txt has an empty line"),
        (b"", b"", "lists no videos"),
        (b"a.mp4", b"\xff\n", "prompt.txt is not UTF-8: line 1 holds b'\\xff'"),
        (b"../a.mp4", b"1", "'../a.mp4' is not a relative path inside the dataset"),
        (b"/proc/version", b"1", "'/proc/version' is not a relative path inside the dataset"),
    ],
)
def test_raw_lists_that_do_not_fit_are_refused(
    make_dataset: MakeDataset, videos: bytes, prompts: bytes, message: str
) -> None:
    root = make_dataset("raw", {"a.mp4": ""})
    (root / "videos.txt").write_bytes(videos)
    (root / "prompt.txt").write_bytes(prompts)
    with pytest.raises(UserError, match=re.escape(message)):
        list_dataset(root, "raw")


def test_raw_without_its_prompts_is_refused(make_dataset: MakeDataset) -> None:
    root = make_dataset("raw", {"a.mp4": ""})
    (root / "prompt.txt").unlink()
    with pytest.raises(UserError, match=r"prompt\.txt is missing"):
        list_dataset(root, "raw")


# --- folder


def test_a_folders_json_goes_before_its_txt(make_dataset: MakeDataset) -> None:
    root = make_dataset("folder", {"a.mp4": "text"})
    (root / "a.json").write_text('{"fps": 24, "score": 1}')
    sample = only(list_dataset(root, "folder").samples)
    assert (sample.captions, sample.declared, sample.extra) == (("text",), {"fps": 24}, {"score": 1})
    (root / "a.json").write_text('{"caption": "json", "fps": 24}')
    assert only(list_dataset(root, "folder").samples).captions == ("json",)


def test_a_video_without_a_caption_has_none(make_dataset: MakeDataset) -> None:
    root = make_dataset("folder", {"a.mp4": " \n", "b.mp4": ""})
    (root / "b.txt").unlink()
    assert [sample.captions for sample in list_dataset(root, "folder").samples] == [(), ()]


def test_hidden_files_and_files_of_other_kinds_are_no_videos(make_dataset: MakeDataset) -> None:
    root = make_dataset("folder", {"a.mp4": "", ".hidden.mp4": "", ".cache/b.mp4": "", "c.heic": "", "mp4": ""})
    assert [sample.key for sample in list_dataset(root, "folder").samples] == ["a"]


def test_a_file_name_that_is_not_utf_8_is_listed(make_dataset: MakeDataset) -> None:
    root = make_dataset("folder", {os.fsdecode(b"caf\xe9.mp4"): "coffee"})
    sample = only(list_dataset(root, "folder").samples)
    assert (sample.key, sample.file_name, sample.captions) == ("caf%E9", r"caf\xe9.mp4", ("coffee",))
    assert (root / sample.path).is_file()


def test_a_linked_folder_is_refused_not_passed_over(make_dataset: MakeDataset, tmp_path: Path) -> None:
    root = make_dataset("folder", {"a.mp4": ""})
    (tmp_path / "more").mkdir()
    (root / "more").symlink_to(tmp_path / "more")
    with pytest.raises(UserError, match="more is a link to a folder, which is not followed"):
        list_dataset(root, "folder")


def test_a_folder_that_cannot_be_read_is_not_passed_over(make_dataset: MakeDataset) -> None:
    root = make_dataset("folder", {"a.mp4": ""})
    handle = os.open(root, os.O_RDONLY)
    for _ in range(20):  # nested too deep to be opened by its path, which even root cannot get round
        os.mkdir("d" * 250, dir_fd=handle)
        inner = os.open("d" * 250, os.O_RDONLY, dir_fd=handle)
        os.close(handle)
        handle = inner
    os.close(handle)
    with pytest.raises(OSError, match="File name too long"):
        list_dataset(root, "folder")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"{", "a.json is not JSON in UTF-8"),
        ("a.json", b"[]", "a.json must hold an object, got a list"),
        ("a.json", b'{"caption": 7}', "a.json: the caption must be a string or a list of strings, got 7"),
        ("a.json", b'{"duration": -1}', "a.json: duration must be a positive number, got -1"),
        ("a.txt", b"\xff", "a.txt is not UTF-8"),
    ],
)
def test_a_caption_file_that_cannot_be_read_is_refused(
    make_dataset: MakeDataset, name: str, content: bytes, message: str
) -> None:
    root = make_dataset("folder", {"a.mp4": ""})
    (root / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)):
        list_dataset(root, "folder")


@pytest.mark.parametrize("name", ["a.txt", "a.json"])
def test_a_caption_that_is_a_pipe_or_a_link_out_is_refused(
    make_dataset: MakeDataset, tmp_path: Path, name: str
) -> None:
    root = make_dataset("folder", {"a.mp4": ""})
    (root / "a.txt").unlink()
    os.mkfifo(root / name)  # which would block for ever
    with pytest.raises(UserError, match=rf"{re.escape(name)} is not a regular file"):
        list_dataset(root, "folder")
    (root / name).unlink()
    (root / name).symlink_to("/etc/hostname")
    with pytest.raises(UserError, match=rf"{re.escape(name)} is a link to /etc/hostname, outside the dataset"):
        list_dataset(root, "folder")


@pytest.mark.parametrize(
    ("layout", "name"), [("merged", "videos2caption.json"), ("raw", "videos.txt"), ("raw", "prompt.txt")]
)
def test_a_list_that_is_a_pipe_or_a_link_out_is_refused(make_dataset: MakeDataset, layout: str, name: str) -> None:
    root = make_dataset(layout, {"a.mp4": "x"})
    (root / name).unlink()
    (root / name).symlink_to("/etc/hostname")
    with pytest.raises(UserError, match=rf"{re.escape(name)} is a link to /etc/hostname, outside the dataset"):
        list_dataset(root, layout)
    (root / name).unlink()
    os.mkfifo(root / name)
    with pytest.raises(UserError, match=rf"{re.escape(name)} is not a regular file"):
        list_dataset(root, layout)


def test_a_raw_line_that_is_not_utf_8_is_named(make_dataset: MakeDataset) -> None:
    root = make_dataset("raw", {"a.mp4": "x"})
    (root / "prompt.txt").write_bytes(b"one\ntwo\nth\xffee\n")
    with pytest.raises(UserError, match=r"prompt\.txt is not UTF-8: line 3 holds b'\\xff'"):
        list_dataset(root, "raw")


def test_an_object_with_a_name_twice_is_refused(make_merged: Callable[..., Path]) -> None:
    root = make_merged('[{"path": "a.mp4", "cap": "one", "cap": "two"}]')
    with pytest.raises(UserError, match="an object has the name 'cap' twice"):
        list_dataset(root, "merged")


def test_a_number_too_large_for_json_becomes_none(make_merged: Callable[..., Path]) -> None:
    # 1e999 is JSON, and infinity in Python: writing the listing's digest crashed on it.
    sample = only(list_dataset(make_merged('[{"path": "a.mp4", "cap": "x", "score": 1e999}]'), "merged").samples)
    assert sample.extra == {"score": None}


def test_a_videos_place_beside_the_json_is_found_too(make_merged: Callable[..., Path]) -> None:
    root = make_merged([{"path": "a.mp4", "cap": "x"}])
    (root / "videos" / "a.mp4").rename(root / "a.mp4")
    assert only(list_dataset(root, "merged").samples).path == "a.mp4"


def test_an_image_beside_a_video_is_its_thumbnail(make_dataset: MakeDataset) -> None:
    root = make_dataset("folder", {"a.mp4": "video", "a.jpg": "video", "b.jpg": "image"})
    listing = list_dataset(root, "folder")
    assert [sample.file_name for sample in listing.samples] == ["a.mp4", "b.jpg"]
    assert listing.skipped == [Skipped(file_name="a.jpg", reason="thumbnail")]


def test_tars_beside_videos_do_not_hide_them(make_dataset: MakeDataset) -> None:
    root = make_dataset("folder", {"a.mp4": "video"})
    (root / "backup.tar").touch()
    assert [sample.file_name for sample in list_dataset(root, "auto").samples] == ["a.mp4"]


# Annotations elsewhere


@pytest.mark.parametrize("dataset_type", ["merged", "auto"])
def test_annotations_may_lie_elsewhere_than_beside_their_videos(
    make_dataset: MakeDataset, tmp_path: Path, dataset_type: str
) -> None:
    root = make_dataset("merged", {"a.mp4": "One.", "b/c.mp4": "Two."})
    elsewhere = (root / "videos2caption.json").rename(tmp_path / "captions.json")
    listing = list_dataset(root / "videos", dataset_type, SourceOptions(annotations=str(elsewhere)))
    assert [(sample.file_name, sample.path, sample.captions) for sample in listing.samples] == [
        ("a.mp4", "a.mp4", ("One.",)),
        ("b/c.mp4", "b/c.mp4", ("Two.",)),
    ]


def test_annotations_that_are_missing_are_refused(make_dataset: MakeDataset, tmp_path: Path) -> None:
    root = make_dataset("merged", {"a.mp4": "One."})
    with pytest.raises(UserError, match=r"--annotations .*no\.json: there is no such file"):
        list_dataset(root, "auto", SourceOptions(annotations=str(tmp_path / "no.json")))


def test_annotations_of_another_layout_are_refused(make_dataset: MakeDataset, tmp_path: Path) -> None:
    root = make_dataset("folder", {"a.mp4": "One."})
    with pytest.raises(UserError, match="--annotations says nothing about a dataset of the layout folder"):
        list_dataset(root, "folder", SourceOptions(annotations=str(tmp_path / "x.json")))
