"""Where the next pass over a dataset begins, known to a process and to the loader's workers that it starts."""

from __future__ import annotations

import torch
import torch.utils.data

from streamprep.errors import UserError

_MAX_WORKERS = 1023


class SharedPosition:
    """Which epoch is next, for this process and the workers it starts, those that live on from pass to pass included.

    A few numbers in shared memory: where the next pass begins, and how many passes each process has begun since that
    was set, so that each pass is the next epoch in all of them.
    """

    def __init__(self) -> None:
        self._numbers = torch.zeros(3 + _MAX_WORKERS, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    @property
    def begun(self) -> int:
        """Passes since the position was set."""
        slot = self._slot()
        return int(self._numbers[2:].max() if slot == 0 else self._numbers[2 + slot])

    @property
    def begun_by_workers(self) -> bool:
        """Whether a loader's workers have begun any."""
        return bool(self._numbers[3:].any())

    @property
    def epoch(self) -> int:
        """Of the next pass."""
        return int(self._numbers[0]) + self.begun

    @property
    def consumed(self) -> int:
        """Batches of it that all ranks have consumed already."""
        return 0 if self.begun else int(self._numbers[1])

    def begin(self) -> None:
        """A pass of this process begins."""
        self._numbers[2 + self._slot()] += 1

    def go_to(self, epoch: int, consumed: int) -> None:
        """Let the next pass begin there; of a loader's workers, which all go to one place, each counts for itself."""
        self._numbers[0], self._numbers[1] = epoch, consumed
        if self._slot():
            self._numbers[2 + self._slot()] = 0
        else:
            self._numbers[2:] = 0

    def _slot(self) -> int:
        worker = torch.utils.data.get_worker_info()
        if worker is None:
            return 0
        if worker.id >= _MAX_WORKERS:
            raise UserError(f"num_workers must be at most {_MAX_WORKERS}, got {worker.num_workers}")
        return worker.id + 1
