"""``python die_with_parent.py PID COMMAND...``: become the command, which the kernel kills as soon as process PID ends.

A killed pytest runs no ``finally``, and would leave its servers behind.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # survives exec
    if os.getppid() != int(sys.argv[1]):  # it ended before we had asked
        sys.exit("the parent is gone")
    os.execvp(sys.argv[2], sys.argv[2:])
