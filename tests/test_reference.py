"""What finds every mistake must itself make none: does `reference.compare` see all there is to see?"""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest
import torch
from reference import Row, compare, read_tensor


def make_row(**changes: object) -> Row:
    row: Row = {
        "id": "a.mp4",
        "caption": "A dog runs.",
        "width": 96,
        "fps": 29.97,
        "vae_latent": torch.zeros(16, 2, 4, 6),
        "text_embedding": torch.zeros(5, 32),
        "pil_image": None,
    }
    return row | changes


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, None),
        ({"fps": 29.97 * (1 + 1e-14)}, None),
        ({"text_embedding": torch.full((5, 32), 9e-6)}, None),
        (
            {"text_embedding": torch.full((5, 32), 2e-5)},
            "text_embedding: numbers differ by up to 2e-05, 1e-05 is allowed",
        ),
        ({"vae_latent": torch.full((16, 2, 4, 6), 1e-7)}, "vae_latent: numbers differ by up to 1e-07, 0 is allowed"),
        ({"vae_latent": torch.full((16, 2, 4, 6), math.nan)}, "vae_latent: numbers differ by up to nan, 0 is allowed"),
        (
            {"vae_latent": torch.zeros(16, 2, 6, 4)},
            "vae_latent: it is '(16, 2, 6, 4) torch.float32' instead of '(16, 2, 4, 6) torch.float32'",
        ),
        (
            {"text_embedding": torch.zeros(5, 32).half()},
            "text_embedding: it is '(5, 32) torch.float16' instead of '(5, 32) torch.float32'",
        ),
        ({"vae_latent": None}, "vae_latent: it is None instead of '(16, 2, 4, 6) torch.float32'"),
        ({"pil_image": torch.zeros(3, 64, 96)}, "pil_image: it is '(3, 64, 96) torch.float32' instead of None"),
        ({"caption": "A dog runs. "}, "caption: it is 'A dog runs. ' instead of 'A dog runs.'"),
        ({"width": 64}, "width: it is 64 instead of 96"),
        ({"fps": 30.0}, "fps: it is 30.0 instead of 29.97"),
        ({"mask": torch.zeros(4)}, "mask: it should not be there"),
    ],
)
def test_every_difference_is_a_line_with_its_column(changes: dict[str, object], line: str | None) -> None:
    assert compare({"a.mp4": make_row(**changes)}, {"a.mp4": make_row()}) == ([f"a.mp4 {line}"] if line else [])


def test_a_missing_column_and_rows_too_few_or_too_many_are_differences() -> None:
    row = make_row()
    del row["fps"]
    assert compare({"a.mp4": row}, {"a.mp4": make_row()}) == ["a.mp4 fps: it is missing"]
    assert compare({}, {"a.mp4": make_row()}) == ["a.mp4 id: there is no such row"]
    assert compare({"a.mp4": make_row()}, {}) == ["a.mp4 id: there should be no such row"]


@pytest.mark.parametrize(
    ("data", "shape", "dtype"),
    [(b"", [2], "float32"), (b"", [], "float32"), (bytes(8), [2], "bfloat16"), (bytes(8), [3], "float32")],
)
def test_bytes_that_are_not_what_is_said_of_them_are_neither_a_tensor_nor_none(
    data: bytes, shape: list[int], dtype: str
) -> None:
    row = {"x_bytes": data, "x_shape": shape, "x_dtype": dtype}
    assert read_tensor(row, "x") == f"{len(data)} bytes said to be {shape} {dtype!r}"


def test_it_shares_no_code_with_what_it_checks() -> None:
    tree = ast.parse((Path(__file__).parent / "reference.py").read_text())
    imported = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        for name in (
            [node.module or "."]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else []
        )
    }
    assert "torch" in imported
    ours = {"streamprep", "exporters", "tools", "."} | {path.stem for path in Path(__file__).parent.rglob("*.py")}
    assert not imported & ours
