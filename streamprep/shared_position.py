"""Where the next pass over a dataset begins, known to a process and to the loader's workers that it starts.

All workers of one pass must be in one epoch, and each pass in another, though workers are not told which pass they are
of: some begin late, or never, as when only one batch is looked at; passes go on side by side; and the next loader may
have more of them. What they have in common is the seed that the loader drew for that pass, and that they were started
one after the other: seeds come again where a user sets torch's, or a loader is restored, numbers of processes do not.
The first that begins writes both down with the pass's epoch; the others find it there, and join.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import multiprocessing
import multiprocessing.context
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.reduction import DupFd
from typing import Any

import torch.utils.data

_EPOCH, _CONSUMED, _BEGUN, _BEGUN_BY_WORKERS, _NUM_PASSES, _PASSES = range(6)
"""Where the numbers are: of the next pass, of what was begun since the position was set, and the latest passes."""
_KEPT_PASSES = 64
_NAME, _STARTED, _OF_EPOCH, _OF_CONSUMED, _FIELDS = range(5)
"""Of a pass: what its workers call it, which process was started as its first, and where it begins."""
_SIZE = _PASSES + _KEPT_PASSES * _FIELDS


class SharedPosition:
    """Which epoch is next, for this process and the workers it starts, those that live on from pass to pass included.

    Some numbers in shared memory, changed under a lock of the file that they are mapped from, which the system takes
    from a worker that is killed. A copy, unpickled or deep, goes its own way.
    """

    def __init__(self) -> None:
        self._map(os.memfd_create("streamprep-position"), [0] * _SIZE)
        self._begun_here = (os.getpid(), 0)
        self._told: tuple[int, int] | None = None

    @property
    def begun(self) -> bool:
        """Whether any pass was since the position was set."""
        return bool(self._numbers[_BEGUN])

    @property
    def begun_by_workers(self) -> bool:
        """Whether a loader's workers have begun any."""
        return bool(self._numbers[_BEGUN_BY_WORKERS])

    @property
    def epoch(self) -> int:
        """Of the next pass."""
        return self._numbers[_EPOCH] if self._told is None else self._told[0]

    @property
    def consumed(self) -> int:
        """Batches of it that all ranks have consumed already."""
        return self._numbers[_CONSUMED] if self._told is None else self._told[1]

    def begin(self) -> tuple[int, int]:
        """A pass begins, or another worker's pass does here, too.

        Returns:
            (its epoch, batches of it that all ranks have consumed already).
        """
        worker = torch.utils.data.get_worker_info()
        with self._locked():
            where = None if worker is None else self._find(self._name(worker), _started(worker), worker.num_workers)
            if where is None:
                where = self.epoch, self.consumed
                self._numbers[_EPOCH], self._numbers[_CONSUMED] = where[0] + 1, 0
                if worker is not None:
                    self._note(self._name(worker), _started(worker), *where)
            self._numbers[_BEGUN] = 1
            if worker is not None:
                self._numbers[_BEGUN_BY_WORKERS] = 1
        self._told = None
        self._begun_here = (os.getpid(), 1 + self._num_begun_here())
        return where

    def go_to(self, epoch: int, consumed: int) -> None:
        """Let the next pass begin there; a loader's workers, if they are told to, are all told the same."""
        if torch.utils.data.get_worker_info() is not None:
            self._told = epoch, consumed
            return
        with self._locked():
            self._numbers[_EPOCH], self._numbers[_CONSUMED] = epoch, consumed
            self._numbers[_BEGUN] = self._numbers[_BEGUN_BY_WORKERS] = 0

    def _find(self, name: int, started: int, num_workers: int) -> tuple[int, int] | None:
        """Where the pass begins that another worker has begun."""
        for at in range(_PASSES, _SIZE, _FIELDS):
            kept = self._numbers[at : at + _FIELDS].tolist()
            # Of another pass, with the same seed again, all workers were started before or after these.
            if kept[_NAME] == name and abs(kept[_STARTED] - started) < num_workers:
                return kept[_OF_EPOCH], kept[_OF_CONSUMED]
        return None

    def _note(self, *what: int) -> None:
        at = _PASSES + self._numbers[_NUM_PASSES] % _KEPT_PASSES * _FIELDS
        for field, value in enumerate(what):
            self._numbers[at + field] = value
        self._numbers[_NUM_PASSES] += 1

    def _name(self, worker: Any) -> int:
        """What all workers of a pass have in common, above 0."""
        family = multiprocessing.current_process()._identity[:-1]
        name = f"{worker.seed - worker.id}/{worker.num_workers}/{self._num_begun_here()}/{family}"
        return 1 + int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")

    def _num_begun_here(self) -> int:
        """Passes that this process has begun; a worker that lives on has the seed of its first."""
        pid, number = self._begun_here
        return number if pid == os.getpid() else 0

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)

    def _map(self, file: int, numbers: list[int] | None = None) -> None:
        self._file = file
        weakref.finalize(self, os.close, file)
        os.ftruncate(file, 8 * _SIZE)
        self._numbers = memoryview(mmap.mmap(file, 8 * _SIZE)).cast("q")
        for at, number in enumerate(numbers or ()):
            self._numbers[at] = number

    def __getstate__(self) -> dict[str, Any]:
        if multiprocessing.context.get_spawning_popen() is not None:  # to a process that is being started: shared
            return {"file": DupFd(self._file)}
        return {"numbers": self._numbers.tolist()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "file" in state:
            self._map(state["file"].detach())
        else:
            self._map(os.memfd_create("streamprep-position"), state["numbers"])
        self._begun_here, self._told = (os.getpid(), 0), None


def _started(worker: Any) -> int:
    """Which process was started as the first of the worker's pass, if none was between."""
    identity = multiprocessing.current_process()._identity
    return int(identity[-1]) - int(worker.id) if identity else 0
