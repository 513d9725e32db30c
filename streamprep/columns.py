"""``--keep-columns``: the dataset's further columns, as columns of the output.

Datasets are JSON at heart: a column may hold numbers here and text there. Output columns have one type for the whole
job: it is decided once, from every sample of the job, and written into its plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from streamprep import canonical
from streamprep.errors import UserError
from streamprep.shards import ShardSample

ALL = "all"

_EXACT_IN_FLOAT64 = 2**53
_TYPES = (
    ({"bool"}, "bool"),
    ({"small", "large"}, "int64"),
    ({"small", "float"}, "float64"),
    ({"text"}, "string"),
)
"""Kinds of values -> the type that holds just these without loss."""


class ColumnTypes:
    """Finds out the types of the columns that are asked for; knows them when it has seen every sample.

    Args:
        asked: Names separated by commas, or ``all``; None keeps nothing.
    """

    def __init__(self, asked: str | None) -> None:
        self._names = None if asked in (None, ALL) else parse_names(asked or "")
        self._asked = asked
        self._kinds: dict[str, set[str]] = {}
        """Of every column there is, in the order they turn up."""

    def see(self, samples: Iterable[ShardSample]) -> None:
        """Take some samples into account."""
        if self._asked is None:
            return
        for sample in samples:
            for name, value in sample.metadata["extra"].items():
                kinds = self._kinds.setdefault(name, set())
                if value is not None:
                    kinds.add(_kind(value))

    def types(self, *, problem: Callable[[str], str | None]) -> dict[str, str]:
        """The type of every column to keep: ``bool``, ``int64``, ``float64``, ``string``, or ``json``: text.

        Args:
            problem: What the exporter has against a column of a name, if anything.

        Raises:
            UserError: if no sample has one that is asked for, or the exporter cannot have it.
        """
        if self._asked is None:
            return {}
        names = sorted(self._kinds) if self._names is None else self._names
        missing = [name for name in names if name not in self._kinds]
        if missing:
            there = ", ".join(sorted(self._kinds)) or "none"
            raise UserError(f"--keep-columns: no sample has {', '.join(missing)}; the further columns are: {there}")
        for name in names:
            why = _unwritable(name) or problem(name)
            if why:
                raise UserError(
                    f"--keep-columns {self._asked}: {name!r} {why}: rename it in the dataset and pack again"
                    + (", or name the columns to keep" if self._names is None else ", or leave it out")
                )
        return {name: _type(self._kinds[name]) for name in names}


def parse_names(asked: str) -> tuple[str, ...]:
    """``a,b`` -> ``("a", "b")``.

    Raises:
        UserError: if a name is empty or twice there.
    """
    names = tuple(name.strip() for name in asked.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise UserError(f"--keep-columns {asked!r}: give each name once, separated by commas, or {ALL}")
    return names


def keep(extra: Mapping[str, Any], types: Mapping[str, str]) -> dict[str, Any]:
    """A sample's values of the kept columns, each of its column's type; None where it has none."""
    return {name: _as(extra.get(name), column_type) for name, column_type in types.items()}


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        if abs(value) <= _EXACT_IN_FLOAT64:
            return "small"
        return "large" if -(2**63) <= value < 2**63 else "other"
    if isinstance(value, float):
        return "float"
    return "text" if isinstance(value, str) else "other"


def _type(kinds: set[str]) -> str:
    if not kinds:
        return "string"  # nothing but null
    return next((name for fitting, name in _TYPES if kinds <= fitting), "json")


def _as(value: Any, column_type: str) -> Any:
    if value is None:
        return None
    if column_type == "json":
        return canonical.to_json(value).decode()
    if column_type == "float64":
        return float(value)
    if column_type == "string":
        return value.encode("utf-8", "replace").decode()  # JSON may hold half a character, UTF-8 may not
    return value


def _unwritable(name: str) -> str | None:
    try:
        name.encode()
    except UnicodeEncodeError:
        return "cannot be written as UTF-8"
    return None if name else "is no name"
