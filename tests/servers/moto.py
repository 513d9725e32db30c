"""moto's server: S3 in the memory of one Python process. It looks at no signature: any key is let in."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from servers import Server
from servers.processes import answers, running
from servers.s3_buckets import bucket_maker, s3_env


@contextmanager
def moto(folder: Path) -> Iterator[Server]:
    """Run it; its log goes to ``folder``."""
    with running(
        lambda ports: [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(ports[0])],
        num_ports=1,
        log=folder / "moto.log",
        is_ready=lambda ports: answers(ports[0], "/moto-api/"),
    ) as [port]:
        url = f"http://127.0.0.1:{port}"
        env = s3_env(url)
        yield Server(name="moto", url=url, root="s3://", env=env, create_bucket=bucket_maker(env))
