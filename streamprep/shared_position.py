"""Where the next pass over a dataset begins, known to a process and to the loader's workers that it starts.

All workers of one pass must be in one epoch, and each pass in another, though workers are not told which pass they are
of: some begin late, or never, as when only one batch is looked at, and the next loader may have more of them. What they
have in common is the seed that the loader drew for that pass: the first that begins leaves a mark with it, by which the
others know that they join.
"""

from __future__ import annotations

import hashlib
import multiprocessing.context
import os
from typing import Any

import torch
import torch.utils.data

from streamprep.errors import UserError

_MAX_WORKERS = 1023
_EPOCH, _CONSUMED, _GENERATION, _MARKS = 0, 1, 2, 3
_GENERATION_BITS, _PASS_BITS, _NUMBER_BITS = 10, 30, 23


class SharedPosition:
    """Which epoch is next, for this process and the workers it starts, those that live on from pass to pass included.

    A few numbers in shared memory: where the first pass begins since the position was set, and a mark of each process
    about the latest pass that it has begun. A mark is one number, so that it is written at once; it knows which setting
    of the position it counts from (the generation), the pass, and the pass's number. Nobody waits for a lock that a
    killed worker might hold: two who begin a pass at the same moment find the same marks, and give it the same number.
    """

    def __init__(self) -> None:
        self._numbers = _share([0] * (_MARKS + 1 + _MAX_WORKERS))
        self._begun_here = (os.getpid(), 0)

    @property
    def begun(self) -> int:
        """Passes since the position was set."""
        numbers = self._numbers.tolist()
        return max(number for _, number in _marks(numbers))

    @property
    def begun_by_workers(self) -> bool:
        """Whether a loader's workers have begun any."""
        return any(number for _, number in _marks(self._numbers.tolist())[1:])

    @property
    def epoch(self) -> int:
        """Of the next pass."""
        return int(self._numbers[_EPOCH]) + self.begun

    @property
    def consumed(self) -> int:
        """Batches of it that all ranks have consumed already."""
        return 0 if self.begun else int(self._numbers[_CONSUMED])

    def begin(self) -> tuple[int, int]:
        """A pass begins, or another worker's pass does here, too.

        Returns:
            (its epoch, batches of it that all ranks have consumed already).
        """
        slot, this_pass = _slot(), self._this_pass()
        numbers = self._numbers.tolist()
        marks = _marks(numbers)
        mine = marks[slot]
        begun = [number for one, number in marks if this_pass and one == this_pass]
        if mine[0] == this_pass:  # a user who sets torch's seed before each pass has the same one again
            begun = [number for number in begun if number > mine[1]]
        number = max(begun) if begun else 1 + max(number for _, number in marks)
        self._numbers[_MARKS + slot] = _pack(numbers[_GENERATION], this_pass, number)
        self._begun_here = (os.getpid(), 1 + self._num_begun_here())
        return numbers[_EPOCH] + number - 1, numbers[_CONSUMED] if number == 1 else 0

    def go_to(self, epoch: int, consumed: int) -> None:
        """Let the next pass begin there; a loader's workers, if they are told to, are all told the same."""
        self._numbers[_EPOCH], self._numbers[_CONSUMED] = epoch, consumed
        if torch.utils.data.get_worker_info() is None:
            self._numbers[_GENERATION] += 1
            self._numbers[_MARKS:] = 0
        else:  # it is another generation, and for all workers the same one
            self._numbers[_GENERATION] = self._this_pass()

    def _this_pass(self) -> int:
        """What all workers of a pass have in common, and no others; 0 for a process that is no loader's worker."""
        worker = torch.utils.data.get_worker_info()
        if worker is None:
            return 0
        name = f"{worker.seed - worker.id}/{worker.num_workers}/{self._num_begun_here()}"
        digest = hashlib.sha256(name.encode()).digest()
        return 1 + int.from_bytes(digest[:8], "little") % ((1 << _PASS_BITS) - 1)

    def _num_begun_here(self) -> int:
        """Passes that this process has begun; a worker that lives on has the seed of its first."""
        pid, number = self._begun_here
        return number if pid == os.getpid() else 0

    def __getstate__(self) -> dict[str, Any]:
        begun_here = (0, 0)  # a number of a process means nothing elsewhere
        if multiprocessing.context.get_spawning_popen() is not None:  # to a process that is being started: shared
            return {"_numbers": self._numbers, "_begun_here": begun_here}
        return {"_numbers": self._numbers.tolist(), "_begun_here": begun_here}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self._numbers, list):  # a copy, which goes its own way
            self._numbers = _share(self._numbers)


def _share(numbers: list[int]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu").share_memory_()  # type: ignore[no-untyped-call,no-any-return]


def _marks(numbers: list[int]) -> list[tuple[int, int]]:
    """(pass, its number) by slot; (0, 0) of those who have begun none since the position was set."""
    generation = numbers[_GENERATION] % 2**_GENERATION_BITS
    marks = []
    for packed in numbers[_MARKS:]:
        rest, number = divmod(packed, 2**_NUMBER_BITS)
        of, this_pass = divmod(rest, 2**_PASS_BITS)
        marks.append((this_pass, number) if number and of == generation else (0, 0))
    return marks


def _pack(generation: int, this_pass: int, number: int) -> int:
    assert number < 2**_NUMBER_BITS
    of = generation % 2**_GENERATION_BITS
    return int((of << _PASS_BITS | this_pass) << _NUMBER_BITS | number)


def _slot() -> int:
    worker = torch.utils.data.get_worker_info()
    if worker is None:
        return 0
    if worker.id >= _MAX_WORKERS:
        raise UserError(f"num_workers must be at most {_MAX_WORKERS}, got {worker.num_workers}")
    return int(worker.id) + 1
