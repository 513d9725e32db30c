"""One rank in each of the actors of a Ray cluster, one actor for each GPU.

1. Connect to the cluster, or start one on this machine. This process holds the board.
2. Start the actors. Each has a process for its rank (`streamprep.launch.actor`), which we ask every second for what it
   says and whether it has ended.
3. A rank that dies is started again in its actor; if actor or node has died, in another one, once there is room for it.
   We note that the units it was at are free: no process on another machine could know.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from streamprep.attempts import Attempts, Worker
from streamprep.errors import Stopped, UserError, first_line
from streamprep.job import FOLDER
from streamprep.launch.actor import RankActor
from streamprep.launch.supervise import describe_code, open_own_board, say, supervise
from streamprep.ranks import TOKEN, Rank
from streamprep.settings import LaunchSettings
from streamprep.storage import open_store

_CONNECT_SECONDS = 10.0
_OBJECT_STORE_BYTES = 100 * 2**20  # we put nothing there
_RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # it warns that this will be the default
    "RAY_worker_niceness": "0",  # of a cluster that we start: else ranks give way to whatever else runs
}
_PLACED_SECONDS = 30.0
_POLL_SECONDS = 1.0


def launch_on_ray(config: LaunchSettings, arguments: Sequence[str]) -> int:
    """Start the ranks, start those that die again, and wait for all.

    Args:
        config: How many, where, and how often again.
        arguments: Their command line, the verb first.

    Returns:
        0 if all is done, else what says most: 3 before 2, 1 and 4.

    Raises:
        UserError: if there is no Ray, no such cluster, no GPU in it for ``--nproc auto``, or the command cannot be run
            on its nodes.
    """
    device = getattr(config, "device", None)
    if device is not None and device.startswith("cuda:"):
        raise UserError(f"--device {device}: every Ray worker sees its own GPU alone, so leave that out or say cuda")
    with _connected(config.ray_address):
        num_gpus = _gpus_per_worker(config.gpus_per_worker, device)
        number = _num_ranks(config.nproc, num_gpus)
        board, port = open_own_board(number)
        actors = _Actors(number, num_gpus, arguments, port, _attempts(config))
        actors.wait_for_places()
        return supervise(number, actors.start, board, config)


@contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """While it lasts, Ray's functions are about this cluster."""
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address.startswith("ray://"):
        raise UserError(
            f"--ray-address {address}: Ray's client cannot serve the ranks; give the command on a node of the cluster, "
            "with --ray-address auto"
        )
    ray = _import_ray()
    _check_reachable(address)
    options = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES} if address == "local" else {}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, AssertionError) as error:
        raise UserError(f"--ray-address {address}: {first_line(error)}") from error
    except SystemExit as error:  # Ray's own handler, while it starts
        raise Stopped("stopped by SIGTERM; the same command goes on from here") from error
    try:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        yield
    finally:
        ray.shutdown()


def _import_ray() -> Any:
    for name, value in _RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise UserError(f"--launcher ray needs the library ray ({error}): pip install streamprep[ray]") from error
    logging.getLogger("ray").setLevel(logging.ERROR)
    return ray


def _check_reachable(address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
        except OSError as error:
            raise UserError(f"--ray-address {address}: {error}") from error


def _attempts(config: LaunchSettings) -> Attempts:
    """Who is at which unit, to say whom we lost."""
    store = open_store(getattr(config, "out"), spool_dir=getattr(config, "spool_dir"))  # noqa: B009
    return Attempts(store, FOLDER, Worker.this())


def _gpus_per_worker(asked: float | None, device: str | None) -> float:
    import ray

    if asked is not None:
        return asked
    return 0.0 if device == "cpu" or not ray.cluster_resources().get("GPU") else 1.0


def _num_ranks(nproc: str, num_gpus: float) -> int:
    import ray

    if nproc != "auto":
        return int(nproc)
    found = ray.cluster_resources().get("GPU", 0)
    number = int(found / num_gpus) if num_gpus else 0
    if not number:
        raise UserError(
            f"--nproc auto: one process for each {num_gpus or 1:g} GPU is none, as the Ray cluster has {found:g} and "
            f"{num_gpus:g} are asked for; say how many processes"
        )
    return number


@dataclass
class _Place:
    """Of one rank in the cluster."""

    rank: int
    actor: Any = None
    """Its handle; None when the last one is lost."""
    node: str | None = None
    """Where that is, once it is anywhere."""


class _Actors:
    """Those of all ranks.

    Args:
        number: How many.
        num_gpus: For each.
        arguments: The ranks' command line.
        port: Of the board in this process.
        attempts: Of the job.
    """

    def __init__(self, number: int, num_gpus: float, arguments: Sequence[str], port: int, attempts: Attempts) -> None:
        import ray

        self.attempts = attempts
        self.all_done = False
        """Whether a rank has seen that; then those that wait for room are not needed any more."""
        self._arguments = list(arguments)
        self._address = str(ray.util.get_node_ip_address()), port
        # Without CPUs: decoding takes a node's cores, whatever Ray counts, and actors must not wait for them.
        self._class = ray.remote(RankActor).options(
            num_cpus=0, num_gpus=num_gpus, scheduling_strategy="SPREAD", max_restarts=0
        )
        self._places = [_Place(rank, actor=self._class.remote()) for rank in range(number)]

    def wait_for_places(self) -> None:
        """Until all have started, or some have no room in the cluster: those are to be the last ranks."""
        import ray

        replies = [place.actor.node.remote() for place in self._places]
        ready, waiting = ray.wait(replies, num_returns=len(replies), timeout=_PLACED_SECONDS)
        actors = {reply: place.actor for reply, place in zip(replies, self._places, strict=True)}
        for place, reply in zip(self._places, [*ready, *waiting], strict=True):
            place.actor, place.node = actors[reply], _answer_or_none(reply) if reply in ready else None
        if waiting:
            say(f"{len(waiting)} of {len(replies)} Ray actors wait for room in the cluster")

    def start(self, rank: int) -> _Started:
        """A rank, in its actor if that lives."""
        place = self._places[rank]
        if place.actor is None:
            place.actor, place.node = self._class.remote(), None
        return _Started(self, place)

    def start_process(self, place: _Place, token: str) -> Any:
        """Ask an actor for it."""
        near = [other.rank for other in self._places if other.node == place.node]
        rank = Rank(
            number=place.rank,
            world_size=len(self._places),
            local_number=near.index(place.rank),
            local_world_size=len(near),
        )
        environment = {
            **rank.environment(*self._address),
            TOKEN: token,
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),  # Ray says 1 in the place of nothing
        }
        return place.actor.start.remote(self._arguments, environment, str(Path.cwd()))


class _Started:
    """A rank, seen from here: we always wait for one answer of its actor, and what to do then is `_then`."""

    def __init__(self, actors: _Actors, place: _Place) -> None:
        self._actors, self._place = actors, place
        self._token = uuid.uuid4().hex[:12]
        self._is_running = False
        self._code: int | None = None
        self._end = ""
        self._reply = place.actor.node.remote()
        self._then: Callable[[Any], None] = self._placed

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        import ray

        if self._actors.all_done and not self._is_running:
            self._code = 0
        while self._code is None:
            ready, _ = ray.wait([self._reply], timeout=0)
            if not ready:
                return None
            try:
                answer = ray.get(self._reply)
            except ray.exceptions.RayError as error:
                self._lost(error)
            else:
                self._then(answer)
        return self._code

    def describe_end(self) -> str:
        """How it ended."""
        return self._end

    def stop(self) -> None:
        """Send it SIGTERM."""
        if not self._is_running:
            self._code = self._code or 4
        elif self._place.actor is not None:
            self._place.actor.stop.remote()

    def kill(self) -> None:
        """End its actor, and so the process."""
        import ray

        if self._place.actor is not None:
            ray.kill(self._place.actor)
            self._place.actor = self._place.node = None

    def _placed(self, node: str) -> None:
        self._place.node = node
        self._reply, self._then = self._actors.start_process(self._place, self._token), self._was_started
        self._is_running = True

    def _was_started(self, problem: str | None) -> None:
        if problem is not None:
            raise UserError(problem)
        self._reply, self._then = self._place.actor.poll.remote(_POLL_SECONDS), self._has_news

    def _has_news(self, news: tuple[bytes, bytes, int | None]) -> None:
        out, err, code = news
        _write(sys.stdout.buffer, out)
        _write(sys.stderr.buffer, err)
        if code is None:
            self._reply = self._place.actor.poll.remote(_POLL_SECONDS)
        else:
            self._code, self._end = code, describe_code(code)
            self._actors.all_done |= code == 0

    def _lost(self, error: Exception) -> None:
        self.kill()
        with suppress(OSError):  # it only saves the others time
            self._actors.attempts.conclude_lost(self._token)
        self._code, self._end = 1, f"has lost its Ray actor ({_one_line(error)})"


def _answer_or_none(reply: Any) -> Any:
    """None if the actor is lost by now."""
    import ray

    try:
        return ray.get(reply)
    except ray.exceptions.RayError:
        return None


def _write(stream: BinaryIO, text: bytes) -> None:
    if text:
        stream.write(text)
        stream.flush()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
