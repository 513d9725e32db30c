"""Write FastVideo's ``videos2caption.json`` for a folder of videos, from their headers alone.

    python tools/prepare_json_file.py --data_folder my_dataset --output videos2caption.json

The folder is one that `streamprep pack` takes as ``raw`` (videos.txt + prompt.txt) or ``folder`` (each video with a
.txt or .json beside it). ``--output`` without a folder goes into the data folder, as FastVideo's script has it; a
folder gets a ``videos2caption.json``. Paths are relative to ``videos/`` if all videos lie there, where FastVideo looks
for them, else to the data folder. Nothing is decoded; a video whose header cannot be read is left out and named.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from streamprep.errors import UserError
from streamprep.probe import ProbeError, probe_video
from streamprep.progress import Progress, count
from streamprep.sources import list_dataset
from streamprep.storage import open_store
from streamprep.types import RawSample

NAME = "videos2caption.json"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0 done, 2 wrong usage."""
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    root = Path(arguments.data_folder)
    try:
        output = output_path(root, arguments.output)
        samples, missing = _list(root)
    except UserError as error:
        print(f"prepare_json_file.py: {error}", file=sys.stderr)
        return 2
    rows, unreadable = prepare(root, samples)
    with open_store(output.parent).new_file() as file:  # under a temporary name: a file that can be seen is whole
        file.path.write_text(json.dumps(rows, indent=2))
        file.publish(output.name, step="data")
    open_store(output.parent).remove_unpublished()
    for name, problem in [*((name, "missing") for name in missing), *unreadable]:
        print(f"left out {name}: {problem}", file=sys.stderr)
    print(f"{count(len(rows), 'video')} in {output}, {len(missing) + len(unreadable)} left out")
    return 0


def prepare(root: Path, samples: list[RawSample]) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Look at every video's header.

    Returns:
        (the objects of the JSON, the name and problem of each video whose header cannot be read).
    """
    rows, unreadable = [], []
    paths = _relative_paths(samples)
    with Progress(total=len(samples), unit="videos", verb="probing") as progress:
        for sample, path in zip(samples, paths, strict=True):
            try:
                with open(root / sample.path, "rb") as file:
                    rows.append(_row(path, sample, file))
            except ProbeError as error:
                unreadable.append((sample.file_name, str(error)))
            progress.advance()
    return rows, unreadable


def output_path(root: Path, output: str) -> Path:
    """Where ``--output`` goes."""
    path = Path(output)
    if path.is_dir() or output.endswith("/"):
        return path / NAME
    return root / path if len(path.parts) == 1 else path


def _list(root: Path) -> tuple[list[RawSample], list[str]]:
    layout = "raw" if (root / "videos.txt").exists() else "folder"
    listing = list_dataset(root, layout)
    if not any(sample.captions for sample in listing.samples):
        raise UserError(f"{root}: none of {count(len(listing.samples), 'video')} has a caption, a .txt beside it")
    return listing.samples, [skipped.file_name for skipped in listing.skipped if skipped.reason != "thumbnail"]


def _relative_paths(samples: list[RawSample]) -> list[str]:
    paths = [sample.path for sample in samples]
    if all(path.startswith("videos/") for path in paths):
        return [path.removeprefix("videos/") for path in paths]
    print("not all videos lie in videos/, where FastVideo looks for them; streamprep finds them", file=sys.stderr)
    return paths


def _row(path: str, sample: RawSample, file: Any) -> dict[str, Any]:
    info = probe_video(file)
    return {
        "path": path,
        "resolution": {"width": info.width, "height": info.height},
        "size": os.fstat(file.fileno()).st_size,
        "fps": info.fps,
        "duration": info.duration_seconds,
        "num_frames": info.num_frames,
        "cap": list(sample.captions),
    }


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data_folder", "--data-folder", required=True, help="folder with the videos and captions")
    parser.add_argument("--output", required=True, help="the JSON: a name in the data folder, or a path")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
