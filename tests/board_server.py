"""A board for ranks, in a process that can be killed: writes its port to stdout, and ends with what started it."""

from __future__ import annotations

import os
import time

from torch.distributed import TCPStore

store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
parent = os.getppid()
while os.getppid() == parent:
    time.sleep(1)
