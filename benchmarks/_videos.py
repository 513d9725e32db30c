"""Datasets to measure with: a few real clips, copied under many names, each made unique and as large as wanted.

An MP4 may end in a ``free`` box, which players pass over: with random bytes in it a copy is a valid video, probed and
decoded like its original, that neither a disk nor a digest takes for another one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_MAKE_CLIPS = Path(__file__).parents[1] / "tools" / "make_clips.py"
_BOX_HEADER_BYTES = 8


def make_dataset(
    folder: Path,
    *,
    num_videos: int,
    size_bytes: tuple[int, int],
    seconds: float,
    num_distinct: int = 10,
    seed: int = 0,
) -> int:
    """Write a dataset of videos of all sizes between two; see `make_dataset_of`.

    Args:
        folder: Where to.
        num_videos: How many.
        size_bytes: Smallest and largest; sizes are spread evenly.
        seconds: Length of all.
        num_distinct: How many clips are really made; the rest are copies.
        seed: Of the sizes, the clips and the random bytes.

    Returns:
        Bytes of all videos together.
    """
    import numpy as np

    sizes = np.random.default_rng(seed).integers(*size_bytes, endpoint=True, size=num_videos)
    return make_dataset_of(folder, sizes.tolist(), seconds=seconds, num_distinct=num_distinct, seed=seed)


def make_dataset_of(
    folder: Path, sizes_bytes: Sequence[int], *, seconds: float, num_distinct: int = 10, seed: int = 0
) -> int:
    """Write a dataset in the merged layout (``videos/`` and ``videos2caption.json``).

    Args:
        folder: Where to, with `num_distinct` original clips in a folder beside it.
        sizes_bytes: Of each video, in the order of their names. A clip that is larger as it is stays so.
        seconds: Length of all.
        num_distinct: How many clips are really made; the rest are copies.
        seed: Of the clips and the random bytes.

    Returns:
        Bytes of all videos together.
    """
    import numpy as np

    originals = folder.with_name(f"{folder.name}-originals")
    command = [sys.executable, _MAKE_CLIPS, originals, "--seconds", seconds, "--seed", seed]
    command += ["--num-clips", min(num_distinct, len(sizes_bytes))]
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
    clips = json.loads((originals / "videos2caption.json").read_text(encoding="utf-8"))
    rng = np.random.default_rng(seed)
    (folder / "videos").mkdir(parents=True)
    rows, total_bytes = [], 0
    for number, size_bytes in enumerate(sizes_bytes):
        clip = clips[number % len(clips)]
        data = (originals / "videos" / clip["path"]).read_bytes()
        data += _free_box(rng, size_bytes - len(data))
        name = f"video_{number:06d}.mp4"
        (folder / "videos" / name).write_bytes(data)
        rows.append({**clip, "path": name, "cap": [f"{clip['cap'][0]} Take {number}."]})
        total_bytes += len(data)
    (folder / "videos2caption.json").write_text(json.dumps(rows), encoding="utf-8")
    return total_bytes


def _free_box(rng: np.random.Generator, size_bytes: int) -> bytes:
    size_bytes = max(size_bytes, _BOX_HEADER_BYTES + 16)
    return size_bytes.to_bytes(4, "big") + b"free" + rng.bytes(size_bytes - _BOX_HEADER_BYTES)
