"""What every verb can be told. The fields are the command line's flags and the keys of a ``--config`` TOML file."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from streamprep.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """Pack raw videos and captions into tar shards.

    Example: streamprep pack my_dataset my_shards

    Running the same command again goes on where it was stopped. The shards depend on the dataset and the options
    alone, not on the number of workers.
    """

    dataset: Annotated[Positional[str], arg(metavar="DATASET")]
    """Folder with the videos and captions."""
    shards: Annotated[Positional[str], arg(metavar="SHARDS")]
    """Folder to write the shards to."""
    dataset_type: str = "auto"
    """Layout: merged (videos/ + videos2caption.json), raw (videos.txt + prompt.txt), folder (each video with a .txt or
    .json beside it), or auto."""
    shard_size_mb: int = 256
    """Most MiB of video in a shard."""
    shuffle: int | None = None
    """Seed to shuffle the videos by before they are cut into shards; by default they are sorted."""
    num_workers: int = 0
    """Processes; 0 is one for each core."""

    def __post_init__(self) -> None:
        _at_least(1, shard_size_mb=self.shard_size_mb)
        _at_least(0, num_workers=self.num_workers)


def _at_least(limit: float, **fields: float) -> None:
    for name, value in fields.items():
        if value < limit:
            raise UserError(f"--{name.replace('_', '-')} must be at least {limit}, got {value}")


def with_file_defaults(config: type, arguments: Sequence[str]) -> list[str]:
    """Take ``--config FILE`` out of a command line and put what the TOML file says before the other flags.

    A flag given on the command line comes later and so has the last word.

    Raises:
        UserError: if the file cannot be read, or says something that ``config`` has no field for.
    """
    rest, path = [], None
    given = iter(arguments)
    for argument in given:
        if argument == "--config":
            path = next(given, None)
            if path is None:
                raise UserError("--config needs a file")
        elif argument.startswith("--config="):
            path = argument.removeprefix("--config=")
        else:
            rest.append(argument)
    return [*_read_flags(config, Path(path)), *rest] if path is not None else rest


def _read_flags(config: type, path: Path) -> list[str]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the settings of {path}: {error}") from error
    names = {field.name for field in fields(config)}
    flags = []
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in names:
            raise UserError(f"{path}: no setting is called {key!r}; one of {', '.join(sorted(names))}")
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, (str, int, float)):
            flags += [f"--{flag}", str(value)]
        else:
            raise UserError(f"{path}: {key} must be a string, a number or a boolean, got {value!r}")
    return flags
