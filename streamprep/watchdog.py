"""No process outlives the one that started it."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.connection import wait


def end_with_the_parent() -> None:
    """From now on, leave as soon as the process that started this one is gone, whatever this one is doing.

    A thread that waits for the parent's end of a pipe: PR_SET_PDEATHSIG would name the fork server, which is the parent
    of a forkserver process as far as the kernel knows, and lives as long as its children.
    """
    threading.Thread(target=_leave_with_the_parent, daemon=True).start()


def _leave_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
