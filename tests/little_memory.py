"""``little_memory.py MIB VERB ...``: a command that gets only so much memory beyond what encoding one clip has taken.

The kernel's limit on a process's address space makes torch's CPU allocator fail as a GPU's does.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path

from torch import Tensor

from streamprep.cli import main
from streamprep.encoders.wan import WanEncoder
from streamprep.types import ClipBatch

_SELF_CHECK_CLIPS = 2
_M_MMAP_THRESHOLD = -3
_encode_batch = WanEncoder.encode_batch


def encode_batch(self: WanEncoder, batch: ClipBatch) -> list[dict[str, Tensor]]:
    """Limit the memory before the first real batch; what encoding takes once, oneDNN's kernels say, it has by then."""
    if len(batch.keys) > _SELF_CHECK_CLIPS and resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        _encode_batch(self, ClipBatch(keys=batch.keys[:1], frames=batch.frames[:1]))
        size_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size_bytes + int(sys.argv[1]) * 2**20, resource.RLIM_INFINITY))
    return _encode_batch(self, batch)


ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**16)  # so that what a tensor had can be had by any other
WanEncoder.encode_batch = encode_batch  # type: ignore[method-assign]
code = main(sys.argv[2:])
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
