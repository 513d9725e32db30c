"""torchrun's agent of one of two nodes, with an exit barrier of our choice: torchrun itself always waits 300 s.

``elastic_agent.py PORT EXIT_BARRIER_SECONDS ENCODE_ARGUMENTS...``; the agent that is first holds the store.
"""

from __future__ import annotations

import sys

import torch.distributed.elastic.rendezvous.registry as registry
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousParameters


def main(port: str, exit_barrier_seconds: str, *arguments: str) -> int:
    parameters = RendezvousParameters(
        backend="c10d", endpoint=f"127.0.0.1:{port}", run_id="test", min_nodes=2, max_nodes=2, local_addr="127.0.0.1"
    )
    spec = WorkerSpec(
        role="default",
        local_world_size=1,
        entrypoint=sys.executable,
        args=("-m", "streamprep", *arguments),
        rdzv_handler=registry.get_rendezvous_handler(parameters),
        max_restarts=20,
        monitor_interval=0.1,
        local_addr="127.0.0.1",
    )
    agent = LocalElasticAgent(
        spec=spec, logs_specs=DefaultLogsSpecs(), exit_barrier_timeout=float(exit_barrier_seconds)
    )
    try:
        result = agent.run()
    finally:
        spec.rdzv_handler.shutdown()
    return 1 if result.is_failed() else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
