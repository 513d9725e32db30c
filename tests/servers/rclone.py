"""``rclone serve s3``: a store that ignores If-None-Match and If-Match. Of 16 that create one name, 16 are told yes.

It answers a range with 200 instead of 206, so obstore reads no ranges from it. Where a job must be able to run, take
moto behind a proxy with the fault `servers.faults.DropHeaders`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from servers import Server
from servers.processes import answers, program, running
from servers.s3_buckets import bucket_maker, s3_env


@contextmanager
def rclone(folder: Path) -> Iterator[Server]:
    """Run it; log and objects go to ``folder``, and the objects are removed at the end."""
    with TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as data:
        with running(
            lambda ports: [
                *[program("rclone"), "serve", "s3", data, "--addr", f"127.0.0.1:{ports[0]}"],
                *["--auth-key", "test,testsecret", "--config", "/dev/null"],
            ],
            num_ports=1,
            log=folder / "rclone.log",
            is_ready=lambda ports: answers(ports[0]),
        ) as [port]:
            url = f"http://127.0.0.1:{port}"
            env = s3_env(url)
            yield Server(name="rclone", url=url, root="s3://", env=env, create_bucket=bucket_maker(env))
