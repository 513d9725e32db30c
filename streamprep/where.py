"""``--where``: choosing samples by an SQL expression over their metadata, such as ``aesthetic > 5 and duration < 20``.

Columns are what packing found out about a video (`COLUMNS`) and the dataset's own further columns. The expression is
evaluated by SQLite in memory, on a connection that may do nothing but read that one table: see `_authorize`.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

from streamprep.errors import UserError
from streamprep.shards import ShardSample

COLUMNS = (
    "key",
    "file_name",
    "caption",
    "num_captions",
    "extension",
    "size_bytes",
    "num_frames",
    "fps",
    "width",
    "height",
    "duration",
    "rotation",
    "codec",
    "variable_frame_rate",
)
"""What every sample has; NULL where packing could not find it out."""

_QUOTED_NAME = re.compile(r"""'(?:[^']|'')*'|"((?:[^"]|"")*)\"""")  # a string, or a name
_NO_SUCH_COLUMN = re.compile(r"no such column: (?:samples\.)?(.+)")
_MAX_STEPS = 10_000  # of SQLite's machine, between two looks at whether an expression takes too long
_MAX_LOOKS_PER_SAMPLE = 100
_ALLOWED = (sqlite3.SQLITE_READ, sqlite3.SQLITE_SELECT, sqlite3.SQLITE_FUNCTION)
_FORBIDDEN_FUNCTIONS = ("load_extension", "readfile", "writefile", "edit", "fts3_tokenizer", "randomblob", "random")


class Where:
    """An expression, checked.

    Args:
        expression: SQL, as after ``WHERE``.

    Raises:
        UserError: if it is no expression, or one that does more than look at columns.
    """

    def __init__(self, expression: str) -> None:
        self.expression = expression
        self.unknown: set[str] = set()
        """Columns it names that no sample it has seen has: NULL there."""
        self._seen: set[str] = set()
        # SQLite takes a quoted name that is no column for a string, and would compare with that.
        self._quoted_names = [name.replace('""', '"') for name in _QUOTED_NAME.findall(expression) if name]
        self.keys_of([])

    def keys_of(self, samples: Sequence[ShardSample]) -> set[str]:
        """The keys of the samples for which the expression holds.

        Raises:
            UserError: if it cannot be evaluated.
        """
        rows = [_row(sample) for sample in samples]
        columns = list(COLUMNS)
        for row in rows:
            columns += [name for name in row if name not in columns]
        self._seen.update(columns)
        for name in self._quoted_names:
            if _folded(name) not in map(_folded, columns):
                columns.append(name)
                self.unknown.add(name)
        while True:
            try:
                return self._select(columns, rows)
            except sqlite3.Error as error:
                missing = _NO_SUCH_COLUMN.fullmatch(str(error))
                if missing is None or missing[1] in columns:
                    raise UserError(f"--where {self.expression!r}: {error}") from error
                columns.append(missing[1])
                self.unknown.add(missing[1])
            finally:
                self.unknown -= {name for name in self.unknown if _folded(name) in map(_folded, self._seen)}

    def check_known(self) -> None:
        """Refuse a column that no sample has: after all were seen.

        Raises:
            UserError: naming those there are.
        """
        if self.unknown:
            raise UserError(
                f"--where {self.expression!r}: no sample has {', '.join(sorted(self.unknown))}; there are "
                f"{', '.join(sorted(self._seen))}"
            )

    def _select(self, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> set[str]:
        connection = sqlite3.connect(":memory:")
        try:
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 10_000_000)
            connection.setlimit(sqlite3.SQLITE_LIMIT_COLUMN, 2000)
            connection.execute(f"CREATE TABLE samples ({', '.join(map(_quoted, columns))})")
            connection.executemany(
                f"INSERT INTO samples VALUES ({', '.join('?' * len(columns))})",
                ([row.get(name) for name in columns] for row in rows),
            )
            looks = iter(range(_MAX_LOOKS_PER_SAMPLE * (len(rows) + 1)))
            connection.set_progress_handler(lambda: next(looks, None) is None, _MAX_STEPS)
            connection.set_authorizer(_authorize)
            return {key for (key,) in connection.execute(f"SELECT key FROM samples WHERE ({self.expression}\n)")}
        finally:
            connection.close()


def _authorize(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    """Reading the table and calling harmless functions, nothing else: no files, no other tables, no settings."""
    if action not in _ALLOWED or (action == sqlite3.SQLITE_READ and first != "samples"):
        return sqlite3.SQLITE_DENY
    if action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in _FORBIDDEN_FUNCTIONS:
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK


def _row(sample: ShardSample) -> dict[str, Any]:
    """A sample's columns; the dataset's own do not hide those of the file."""
    metadata = sample.metadata
    captions = metadata["captions"]
    known = {name: metadata.get(name) for name in COLUMNS} | {
        "key": sample.key,
        "caption": captions[0] if captions else None,
        "num_captions": len(captions),
        "size_bytes": sample.video.size if "sha256" in metadata else None,
        "duration": metadata.get("duration_seconds"),
    }
    taken = set(map(_folded, known))
    extra = {name: value for name, value in metadata["extra"].items() if _folded(name) not in taken}
    return {name: _sql_value(value) for name, value in {**extra, **known}.items()}


def _sql_value(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**63 else float(value)
    return json.dumps(value)  # lists and objects, for json_extract


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _folded(name: str) -> str:
    return name.lower()  # SQLite's columns are the same in any case
