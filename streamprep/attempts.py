"""Who is at which unit, and what became of those who were: small files, one for each time a unit is taken.

``attempts/000012-3fa9c1d2.json`` is written when process 3fa9c1d2 takes unit 000012, and removed when the unit has its
record. While it lies there the process is at it, has died at it, or says in it how it ended. So whoever comes later, in
the same run or the next one, knows which units are worth waiting for, which are free, and which have killed so many
that they are set aside: ``failed/000012.json``, with the attempts as evidence.

This saves work and never decides what is committed: two processes at one unit waste work and change nothing.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import itertools
import json
import os
import socket
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Literal, TypeVar, cast

from streamprep import canonical
from streamprep.errors import UserError, first_line
from streamprep.progress import count
from streamprep.ranks import TOKEN
from streamprep.storage import FileEntry, Store, how_to_delete

T = TypeVar("T")

How = Literal["stopped", "exception", "signal", "machine", "vanished"]
"""How an attempt ended: a signal asked to stop, an error, a crash, trouble of the machine, or without a word."""

_TOLD_DEATHS, _DEATHS = 2, 5
"""After so many a unit is set aside: of deaths that said why; of all of processes that had nothing else at hand. A kill
from outside says nothing about the unit, and a machine without memory or with a broken GPU neither."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """One process, so described that others can tell whether it still lives."""

    token: str
    """Another for every process."""
    host: str
    machine: str
    """Which processes can see it: of the same boot and the same namespace of process ids."""
    pid: int
    started: str
    """As the kernel counts it, so that a later process of the same number is not taken for it."""
    rank: int

    @classmethod
    def this(cls, rank: int = 0) -> Worker:
        """This process."""
        return cls(
            token=os.environ.get(TOKEN) or uuid.uuid4().hex[:12],
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            started=_started(os.getpid()) or "",
            rank=rank,
        )

    def is_gone(self, *, seen_by: Worker) -> bool:
        """Whether it is known to have ended; only who shares its machine can know."""
        return self.machine == seen_by.machine and _started(self.pid) != self.started

    @property
    def name(self) -> str:
        """For people."""
        return f"rank {self.rank} (process {self.pid} on {self.host})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How an attempt ended, if not with a record."""

    how: How
    message: str = ""
    traceback: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One process at one unit."""

    unit: str
    by: Worker
    number: int
    """Among those of its process."""
    began: str
    """UTC; for people, no clocks are compared."""
    alone: bool
    """Whether its process had no other unit at hand: if it dies, it is this unit's doing, or nobody's."""
    ended: Ended | None = None

    @property
    def deters(self) -> bool:
        """Whether it speaks against taking the unit before all others."""
        return self.ended is None or self.ended.how != "stopped"

    def to_json(self) -> bytes:
        """The content of its file."""
        return canonical.to_pretty_json(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, data: bytes) -> Attempt:
        """The reverse of `to_json`."""
        value = canonical.from_json(data)
        ended = value.pop("ended")
        return cls(by=Worker(**value.pop("by")), ended=Ended(**ended) if ended else None, **value)


def _all_from_json(data: bytes) -> list[Attempt]:
    value = json.loads(data)
    if not isinstance(value, list):
        raise TypeError(f"it holds a {type(value).__name__}, not a list")
    return [Attempt.from_json(canonical.to_json(one)) for one in value]


class Attempts:
    """The files of one folder; safe to use from several threads.

    Args:
        store: Where.
        folder: For ``attempts/`` and ``failed/``.
        worker: This process.
    """

    def __init__(self, store: Store, folder: str, worker: Worker) -> None:
        self.worker = worker
        self._store = store
        self._attempts, self._failed = f"{folder}/attempts", f"{folder}/failed"
        self._seen: dict[str, tuple[str, Attempt]] = {}
        self._number = 0

    # --- taking

    def begin(self, unit: str, *, alone: bool) -> Attempt:
        """Say that this process is at a unit."""
        self._number += 1
        attempt = Attempt(
            unit=unit,
            by=self.worker,
            number=self._number,
            began=datetime.now(UTC).isoformat(timespec="seconds"),
            alone=alone,
        )
        self._store.put(self.path(attempt), attempt.to_json(), step="attempt")
        return attempt

    def withdraw(self, attempt: Attempt) -> None:
        """The unit has its record, or another process keeps it."""
        self._store.delete(self.path(attempt), step="withdraw")

    def end(self, attempt: Attempt, ended: Ended) -> None:
        """Say how an attempt ended; set the unit aside if that was once too often.

        Raises:
            OSError: if the store takes nothing; who finds the mark then reads it in the file of last words.
        """
        try:
            self._store.put(self.path(attempt), dataclasses.replace(attempt, ended=ended).to_json(), step="attempt")
        except OSError:
            with suppress(OSError):
                _last_words_file(attempt.by).write_text(f"{_NOT_A_CRASH}{ended.how}\n{ended.traceback}")
            raise
        if ended.how != "stopped":
            self._judge(attempt.unit)

    # --- looking

    def of(self, unit: str) -> list[Attempt]:
        """Those of one unit."""
        return self.read(self._store.list(self._attempts, prefix=f"{unit}-"))

    def all(self) -> dict[str, list[Attempt]]:
        """Those of every unit that has any."""
        return {unit: attempts for unit, files in self.files().items() if (attempts := self.read(files))}

    def files(self) -> dict[str, list[FileEntry]]:
        """The files of every unit that has any, unread: a thousand ranks that read a thousand files are too many."""
        found: dict[str, list[FileEntry]] = {}
        for entry in self._store.list(self._attempts):
            unit, dash, _ = entry.path.rpartition("/")[2].rpartition("-")
            if dash and entry.path.endswith(".json"):
                found.setdefault(unit, []).append(entry)
        return found

    def read(self, files: Iterable[FileEntry]) -> list[Attempt]:
        """What some files say; each is read once, unless it changes."""
        found = []
        for entry in files:
            if not entry.path.endswith(".json"):
                continue
            version, attempt = self._seen.get(entry.path, ("", None))
            if attempt is None or version != entry.version:
                try:
                    attempt = self._understood(entry.path, Attempt.from_json)
                except FileNotFoundError:
                    continue  # withdrawn just now
                self._seen[entry.path] = (entry.version, attempt)
            found.append(attempt)
        return found

    def has_read(self, files: Iterable[FileEntry]) -> bool:
        """Whether `read` would read nothing."""
        return all(self._seen.get(entry.path, ("",))[0] == entry.version for entry in files)

    def conclude(self, attempts: Iterable[Attempt]) -> list[Attempt]:
        """The same; those whose process has died, as is seen from here, with their end, which is noted."""
        concluded = []
        for attempt in attempts:
            if attempt.ended is None and attempt.by.is_gone(seen_by=self.worker):
                try:  # before it ended it may have said how, or withdrawn the mark
                    attempt = self._understood(self.path(attempt), Attempt.from_json)
                except FileNotFoundError:
                    continue
                if attempt.ended is None:
                    ended = _last_words(attempt.by)
                    self.end(attempt, ended)
                    attempt = dataclasses.replace(attempt, ended=ended)
                _last_words_file(attempt.by).unlink(missing_ok=True)
            concluded.append(attempt)
        return concluded

    def conclude_lost(self, token: str) -> None:
        """Note the end of a process of which a launcher knows, though it cannot be seen from here.

        Args:
            token: Its own.
        """
        for attempt in itertools.chain.from_iterable(self.all().values()):
            if attempt.ended is None and attempt.by.token == token:
                self.end(attempt, _VANISHED)

    def failed(self) -> dict[str, list[Attempt]]:
        """The units that are set aside, with what happened to those who tried."""
        found = {}
        for entry in self._store.list(self._failed):
            unit = PurePosixPath(entry.path).name.removesuffix(".json")
            found[unit] = self._understood(entry.path, _all_from_json)
        return found

    def _understood(self, path: str, parse: Callable[[bytes], T]) -> T:
        """A file's content.

        Raises:
            FileNotFoundError: if it is gone.
            UserError: if it is something else than was written.
        """
        data = self._store.read(path)
        try:
            return parse(data)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{self._store.url}/{path}: cannot be read: {first_line(error)}; delete "
                f"{how_to_delete(self._store.url, path)}, then run the same command again"
            ) from error

    def failed_units(self) -> set[str]:
        """The units that are set aside."""
        return {PurePosixPath(entry.path).name.removesuffix(".json") for entry in self._store.list(self._failed)}

    def is_failed(self, unit: str) -> bool:
        """Whether it is set aside."""
        return self._store.exists(f"{self._failed}/{unit}.json")

    # --- clearing

    def forget_the_dead(self) -> None:
        """For a new run that does not hold the end of an earlier one against its units: it needs all of them."""
        for unit, those in self.all().items():
            gone = [one for one in those if one.ended is not None or one.by.is_gone(seen_by=self.worker)]
            if len(gone) == len(those):
                self.forget([unit])
            for one in gone:
                self.withdraw(one)
        self.forget(self.failed())

    def forget(self, units: Iterable[str]) -> None:
        """Remove what is known of some units: they have their records, or are to be tried as if for the first time."""
        wanted = set(units)
        for entry in list(self._store.list(self._attempts)):
            if PurePosixPath(entry.path).name.rpartition("-")[0] in wanted:
                for attempt in self.read([entry]):
                    if attempt.by.is_gone(seen_by=self.worker):
                        _last_words_file(attempt.by).unlink(missing_ok=True)
                self._store.delete(entry.path, step="withdraw")
        for unit in wanted:
            if self.is_failed(unit):
                self._store.delete(f"{self._failed}/{unit}.json", step="withdraw")

    def _judge(self, unit: str) -> None:
        if not unit[:1].isdecimal():  # no unit, but the end of a job: there is nothing to set aside
            return
        told, silent = [], []
        for attempt in self.of(unit):
            if attempt.ended is not None and attempt.ended.how in ("exception", "signal"):
                told.append(attempt)
            elif attempt.ended is not None and attempt.ended.how == "vanished" and attempt.alone:
                silent.append(attempt)
        if len(told) >= _TOLD_DEATHS or len(told + silent) >= _DEATHS:
            evidence = canonical.to_pretty_json([dataclasses.asdict(attempt) for attempt in silent + told])
            self._store.put_if_absent(f"{self._failed}/{unit}.json", evidence, step="failed")

    def path(self, attempt: Attempt) -> str:
        """Of its file."""
        return f"{self._attempts}/{attempt.unit}-{attempt.by.token}.json"


def describe_end(ended: Ended) -> str:
    """In a few words."""
    return {
        "stopped": "was stopped",
        "exception": f"failed: {ended.message}",
        "signal": f"crashed: {ended.message}",
        "machine": f"met trouble of the machine: {ended.message}",
        "vanished": "ended without a word: killed, by the system for its memory perhaps",
    }[ended.how]


def describe_set_aside(
    failed: Mapping[str, Sequence[Attempt]], *, noun: str, then: str, name: Callable[[str], str] = str
) -> str:
    """Which units are set aside, and why.

    Args:
        failed: The attempts at each.
        noun: What a unit is, to the user.
        then: What can be done.
        name: Of a unit.
    """
    lines = [f"{count(len(failed), noun)} set aside: every process that tried has died. {then}"]
    for unit, attempts in failed.items():
        last = attempts[-1]
        how = describe_end(last.ended or _VANISHED)
        lines.append(f"  {name(unit)}: {count(len(attempts), 'time')}; the last, {last.by.name}, {how}")
    return "\n".join(lines)


def what_happened(error: BaseException) -> Ended:
    """An error as the end of an attempt."""
    text = "".join(traceback.format_exception(error))
    lines = str(error).strip().splitlines()
    message = f"{type(error).__name__}: {lines[0] if lines else ''}"[:500]
    return Ended(how="machine" if _is_of_the_machine(error) else "exception", message=message, traceback=text[-8000:])


_VANISHED = Ended(how="vanished")
_NOT_A_CRASH = "streamprep: "
_OLD_SECONDS = 24 * 3600.0


class LastWords:
    """While it lasts, a crash of this process (SIGSEGV, SIGABRT, ...) leaves its stack for `Attempts.conclude`."""

    def __init__(self, worker: Worker) -> None:
        self._path = _last_words_file(worker)

    def __enter__(self) -> LastWords:
        _sweep_last_words()
        self._takes_over = not faulthandler.is_enabled()
        if self._takes_over:
            self._file = open(self._path, "w")
            faulthandler.enable(self._file)
        return self

    def __exit__(self, *_: object) -> None:
        if self._takes_over:
            faulthandler.disable()
            self._file.close()
            with suppress(FileNotFoundError):
                if not self._path.stat().st_size:
                    self._path.unlink()


def _last_words(worker: Worker) -> Ended:
    """How a process ended that could not say so in its mark."""
    try:
        told = _last_words_file(worker).read_text(errors="replace")[:8000]
    except OSError:
        return _VANISHED
    first, _, rest = told.partition("\n")
    if not first.startswith(_NOT_A_CRASH):
        return Ended(how="signal", message=first, traceback=told) if told else _VANISHED
    how = cast("How", first.removeprefix(_NOT_A_CRASH))
    return Ended(how=how, message="and the store would not take a note of it", traceback=rest)


def _sweep_last_words() -> None:
    """Remove empty files of processes that were killed with no unit at hand: nobody asks for those."""
    for path in Path(tempfile.gettempdir()).glob("streamprep-*-*.crash"):
        pid = path.name.split("-")[1]
        with suppress(OSError):
            status = path.stat()
            old = time.time() - status.st_mtime > _OLD_SECONDS
            if pid.isdecimal() and not status.st_size and old and _started(int(pid)) is None:
                path.unlink()


def _last_words_file(worker: Worker) -> Path:
    return Path(tempfile.gettempdir()) / f"streamprep-{worker.pid}-{worker.token}.crash"


def _is_of_the_machine(error: BaseException) -> bool:
    from torch import AcceleratorError, OutOfMemoryError

    return isinstance(error, (AcceleratorError, OutOfMemoryError, MemoryError, OSError))


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"  # noqa: PTH116 - it is a link to no file


def _started(pid: int) -> str | None:
    """When a process began, in ticks since the boot; None if there is none, or only what is left of one."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]
