"""``--config job.toml``: flags in a file, which the command line overrules."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import Field, fields
from pathlib import Path

from streamprep.errors import UserError

_LISTS = ("filters",)


def with_file_defaults(config: type, arguments: Sequence[str]) -> list[str]:
    """Take ``--config FILE`` out of a command line and put what the TOML file says before the other flags.

    A flag given on the command line comes later and so has the last word. A list would take in what follows it: it
    comes last, unless the command line has one.

    Raises:
        UserError: if the file cannot be read, or says something that ``config`` has no field for.
    """
    rest, path = [], None
    given = iter(arguments)
    for argument in given:
        if argument == "--config":
            path = next(given, None)
            if path is None or path.startswith("--"):
                raise UserError("--config needs a file")
        elif argument.startswith("--config="):
            path = argument.removeprefix("--config=")
        else:
            rest.append(argument)
    if path is None:
        return rest
    flags, lists = _read_flags(config, Path(path))
    named = {argument.partition("=")[0].replace("_", "-") for argument in rest}
    return [*flags, *rest, *(word for flag, words in lists.items() if flag not in named for word in (flag, *words))]


def _read_flags(config: type, path: Path) -> tuple[list[str], dict[str, list[str]]]:
    """The flags of a TOML file, and its lists by flag."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the settings of {path}: {error}") from error
    positional: tuple[str, ...] = config.POSITIONAL  # type: ignore[attr-defined]
    kinds = {field.name: _kind_of(field) for field in fields(config) if field.name not in positional}
    flags: list[str] = []
    lists: dict[str, list[str]] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name in positional:
            raise UserError(f"{path}: {key} is given on the command line, not in the file")
        if name not in kinds:
            raise UserError(f"{path}: no setting is called {key!r}; one of {', '.join(sorted(kinds))}")
        flag = name.replace("_", "-")
        if name in _LISTS:
            if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
                raise UserError(f"{path}: {key} must be a list of strings, got {value!r}")
            lists[f"--{flag}"] = value
        elif type(value) not in _TOML_TYPES[kinds[name]]:
            raise UserError(f"{path}: {key} must be {_TOML_WORDS[kinds[name]]}, got {value!r}")
        elif isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags.append(f"--{flag}={value}")
    return flags, lists


_TOML_TYPES = {"bool": (bool,), "int": (int,), "float": (int, float), "str": (str,)}
_TOML_WORDS = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "a string"}


def _kind_of(setting: Field[object]) -> str:
    """What a setting is, by its annotation, which is text: ``bool``, ``int``, ``float``, or else ``str``."""
    named = str(setting.type).removeprefix("Annotated[")
    return next((kind for kind in ("bool", "int", "float") if named.startswith(kind)), "str")
