"""SeaweedFS, a real object store in one program: conditional puts of all kinds, and a wrong key is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from servers import Server
from servers.processes import answers, program, running
from servers.s3_buckets import bucket_maker, s3_env, takes_an_object

IDENTITIES = {
    "identities": [
        {
            "name": "test",
            "credentials": [{"accessKey": "test", "secretKey": "testsecret"}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
    ]
}
# Each bucket has volumes of its own. It would begin with seven, which the tests' many buckets would use up soon.
ONE_VOLUME_A_BUCKET = {"WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"}
PORTS = (
    *["-s3.port", "-s3.port.grpc", "-filer.port", "-filer.port.grpc"],
    *["-master.port", "-master.port.grpc", "-volume.port", "-volume.port.grpc"],
)


@contextmanager
def seaweedfs(folder: Path) -> Iterator[Server]:
    """Run it; log and objects go to ``folder``, and the objects are removed at the end."""
    with TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as data, _running(Path(data), folder) as ports:
        yield _server(ports)


class MortalSeaweedFS:
    """One that can be killed, and started again with the same objects at the same address; a context manager.

    Args:
        folder: For its log and objects.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ports: list[int] = []
        self._life = ExitStack()
        (folder / "data").mkdir()

    def __enter__(self) -> MortalSeaweedFS:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def server(self) -> Server:
        """How it is found."""
        return _server(self._ports)

    def start(self) -> None:
        """Until it takes objects."""
        self._ports = self._life.enter_context(_running(self._folder / "data", self._folder, self._ports))

    def kill(self) -> None:
        """By SIGKILL: then nobody listens."""
        self._life.close()


@contextmanager
def _running(data: Path, logs: Path, ports: Sequence[int] = ()) -> Iterator[list[int]]:
    identities = data / "s3.json"
    identities.write_text(json.dumps(IDENTITIES))
    with running(
        lambda ports: _command(str(data), identities, ports),
        num_ports=len(PORTS),
        log=logs / "seaweedfs.log",
        is_ready=lambda ports: answers(ports[0]) and takes_an_object(s3_env(_url(ports))),
        env=ONE_VOLUME_A_BUCKET,
        ports=ports,
    ) as chosen:
        yield chosen


def _server(ports: Sequence[int]) -> Server:
    env = s3_env(_url(ports))
    return Server(name="seaweedfs", url=_url(ports), root="s3://", env=env, create_bucket=bucket_maker(env))


def _url(ports: Sequence[int]) -> str:
    return f"http://127.0.0.1:{ports[0]}"


def _command(data: str, identities: Path, ports: Sequence[int]) -> list[str]:
    return [
        *[program("weed"), "-logtostderr=true", "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"],
        *[f"{flag}={port}" for flag, port in zip(PORTS, ports, strict=True)],
        *["-filer=true", "-s3=true", f"-s3.config={identities}", "-s3.port.iceberg=0", "-s3.port.lance=0"],
        *["-master.volumeSizeLimitMB=128", "-volume.max=1000", "-volume.preStopSeconds=0"],
        "-master.telemetry=false",
    ]
