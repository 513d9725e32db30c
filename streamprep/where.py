"""``--where``: choosing samples by an SQL expression over their metadata, such as ``aesthetic > 5 and duration < 20``.

Columns are what packing found out about a video (`COLUMNS`) and the dataset's own further columns. The expression is
evaluated by SQLite in memory, on a connection that may do nothing but read that one table: see `_Authorizer`. Whether a
sample is chosen follows from that sample alone, so neither subqueries nor the clock may be asked.
"""

from __future__ import annotations

import functools
import json
import re
import sqlite3
import string
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from streamprep.errors import UserError
from streamprep.shards import ShardSample

COLUMNS = (
    "key",
    "file_name",
    "caption",
    "num_captions",
    "extension",
    "media_type",
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
_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
_NO_SUCH_COLUMN = re.compile(r"no such column: (?:samples\.)?(.+)")
_MAX_TEXT = 1_000_000
"""Characters of a caption or another text that are looked at."""
_MAX_VALUE_BYTES = 20_000_000
_ALLOWED = (sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION)
_FORBIDDEN_FUNCTIONS = frozenset(
    (
        *("load_extension", "readfile", "writefile", "edit", "fts3_tokenizer"),
        *("random", "randomblob", "changes", "total_changes", "last_insert_rowid"),
        *("current_date", "current_time", "current_timestamp", "date", "time", "datetime", "julianday", "unixepoch"),
        *("strftime", "timediff"),
    )
)


class Where:
    """An expression, checked.

    Args:
        expression: SQL, as after ``WHERE``.

    Raises:
        UserError: if it is no expression, or one that does more than look at columns.
    """

    def __init__(self, expression: str) -> None:
        self.expression = expression
        self._seen = {_folded(name): name for name in COLUMNS}
        self._missing: dict[str, str] = {}
        # SQLite takes a quoted name that is no column for a string, and would compare with that.
        self._quoted_names = [name.replace('""', '"') for name in _QUOTED_NAME.findall(expression) if name]
        if not _is_balanced(expression):
            raise UserError(f"--where {expression!r}: its parentheses do not match")
        # What is an expression as a condition and as a value is one expression: no `1) LIMIT (1`.
        self._evaluate([], f"SELECT key, ({expression}\n) IS TRUE FROM samples")
        self.keys_of([])

    @property
    def unknown(self) -> list[str]:
        """Columns it names that no sample it has seen has: NULL there."""
        return sorted(name for folded, name in self._missing.items() if folded not in self._seen)

    def keys_of(self, samples: Sequence[ShardSample]) -> set[str]:
        """The keys of the samples for which the expression holds.

        Raises:
            UserError: if it cannot be evaluated.
        """
        return self._evaluate(samples, f"SELECT key FROM samples WHERE ({self.expression}\n)")

    def check_known(self) -> None:
        """Refuse a column that no sample has: after all were seen.

        Raises:
            UserError: naming those there are.
        """
        if self.unknown:
            raise UserError(
                f"--where {self.expression!r}: no sample has {', '.join(self.unknown)}; there are "
                f"{', '.join(sorted(self._seen.values()))}"
            )

    def _evaluate(self, samples: Sequence[ShardSample], query: str) -> set[str]:
        rows = [_row(sample) for sample in samples]
        columns = {_folded(name): name for name in COLUMNS}
        for row in rows:
            columns |= {folded: name for folded, (name, _) in row.items() if folded not in columns}
        self._seen = columns | self._seen
        for name in self._quoted_names:
            self._add_missing(columns, name)
        while True:
            nothing = ("", None)
            values = ([row.get(folded, nothing)[1] for folded in columns] for row in rows)
            try:
                return _select(columns.values(), values, query)
            except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
                missing = _NO_SUCH_COLUMN.fullmatch(str(error))
                if missing is None or not self._add_missing(columns, missing[1]):
                    raise UserError(f"--where {self.expression!r}: {_explained(error)}") from error

    def _add_missing(self, columns: dict[str, str], name: str) -> bool:
        """Give the table a column that the expression names; False if it has it."""
        if _folded(name) in columns:
            return False
        columns[_folded(name)] = self._missing[_folded(name)] = name
        return True


def _select(columns: Collection[str], rows: Iterable[Sequence[Any]], query: str) -> set[str]:
    connection = sqlite3.connect(":memory:")
    try:
        # Without a row number, which is no property of a sample.
        connection.execute(
            f"CREATE TABLE samples ({', '.join(map(_quoted, columns))}, PRIMARY KEY (key)) WITHOUT ROWID"
        )
        connection.executemany(f"INSERT INTO samples VALUES ({', '.join('?' * len(columns))})", rows)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_VALUE_BYTES)
        connection.set_authorizer(_Authorizer())
        return {key for key, *_ in connection.execute(query)}
    finally:
        connection.close()


class _Authorizer:
    """Allows to read the table, once, and to call harmless functions: no files, no other tables, no settings."""

    def __init__(self) -> None:
        self._num_selects = 0

    def __call__(self, action: int, first: str | None, second: str | None, *_: str | None) -> int:
        if action == sqlite3.SQLITE_SELECT:
            self._num_selects += 1
            return sqlite3.SQLITE_OK if self._num_selects == 1 else sqlite3.SQLITE_DENY
        if action not in _ALLOWED or (action == sqlite3.SQLITE_READ and first != "samples"):
            return sqlite3.SQLITE_DENY
        if action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in _FORBIDDEN_FUNCTIONS:
            return sqlite3.SQLITE_DENY
        return sqlite3.SQLITE_OK


def _is_balanced(expression: str) -> bool:
    depth = 0
    for character in _QUOTED_NAME.sub("", expression):
        depth += (character == "(") - (character == ")")
        if depth < 0:
            return False
    return depth == 0


def _explained(error: Exception) -> str:
    if any(word in str(error) for word in ("not authorized", "prohibited")):
        return f"{error}: only a sample's columns may be looked at, without subqueries, files, clock or chance"
    return str(error)


def _row(sample: ShardSample) -> dict[str, tuple[str, Any]]:
    """A sample's columns by folded name: (name, value); the dataset's own do not hide those of the file."""
    metadata = sample.metadata
    captions = metadata["captions"]
    known = {name: metadata.get(name) for name in COLUMNS} | {
        "key": sample.key,
        "caption": captions[0] if captions else None,
        "num_captions": len(captions),
        "size_bytes": sample.video.size if "sha256" in metadata else None,
        "duration": metadata.get("duration_seconds"),
    }
    row: dict[str, tuple[str, Any]] = {}
    for name, value in [*known.items(), *metadata["extra"].items()]:
        if _can_be_a_column(name):
            row.setdefault(_folded(name), (name, _sql_value(value)))
    return row


@functools.lru_cache(maxsize=1024)
def _can_be_a_column(name: str) -> bool:
    return "\0" not in name and _as_unicode(name) == name


def _sql_value(value: Any) -> Any:
    if isinstance(value, str):
        return _as_unicode(value[:_MAX_TEXT])
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**63 else float(value)
    return json.dumps(value)  # lists and objects, for json_extract


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _as_unicode(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


@functools.lru_cache(maxsize=1024)
def _folded(name: str) -> str:
    """SQLite's columns are the same in any case, of ASCII letters."""
    return name.translate(_LOWER)
