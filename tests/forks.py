"""The command line in processes of its own that start in milliseconds instead of six seconds.

1. `Forks` starts one server, which imports what every command needs (torch, diffusers, transformers) and no more.
2. For each command the server forks. The child opens a session of its own, writes to a file, and then does what
   ``python -m streamprep`` does, up to the handlers at its exit.
3. Whoever asked may kill it in any way; the server says how it ended.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import psutil

T = TypeVar("T")

_PATIENCE_SECONDS = 120.0


class Forks:
    """The server; a context manager, after which none of the processes is left."""

    def __init__(self, repo_root: Path, logs: Path) -> None:
        self._logs = logs
        self._started: list[Process] = []
        # Threads of OpenBLAS, which importing numpy would start, do not survive a fork.
        environment = os.environ | {"PYTHONPATH": f"{repo_root}:{Path(__file__).parent}", "OPENBLAS_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, "-c", "import forks; forks.serve()"],
            cwd=repo_root,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(
        self, *arguments: object, environment: Mapping[str, str] | None = None, source: Path | None = None
    ) -> Process:
        """Start ``streamprep ARGUMENTS``, or a Python file if that is the first of them.

        Args:
            *arguments: Of the command line.
            environment: Variables to add.
            source: A folder with other versions of our packages to run instead.
        """
        log = self._logs / f"{len(self._started):04d}.log"
        pid = self._ask(
            arguments=[str(argument) for argument in arguments],
            environment=environment or {},
            log=str(log),
            source=source and str(source),
        )
        process = Process(pid, log, lambda: self._ask(poll=pid))
        self._started.append(process)
        return process

    def run(self, *arguments: object, **how: Any) -> Process:
        """The same, and wait until it has ended."""
        process = self.start(*arguments, **how)
        process.wait()
        return process

    def __enter__(self) -> Forks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._started:
            for pid in process.alive():
                os.kill(pid, signal.SIGKILL)
        self._server.kill()
        self._server.communicate()

    def _ask(self, **request: Any) -> Any:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, f"the server of forks ended with {self._server.wait()}"
        return json.loads(answer)


class Process:
    """One command."""

    def __init__(self, pid: int, log: Path, poll: Callable[[], int | None]) -> None:
        self.pid, self._log, self._poll = pid, log, poll
        self._code: int | None = None
        self._all_gone = False

    @property
    def code(self) -> int | None:
        """How it ended, as `subprocess` says it: negative for a signal; None while it runs."""
        if self._code is None:
            self._code = self._poll()
            if self._code is not None:
                self.alive()  # while the number is still its own
        return self._code

    @property
    def output(self) -> str:
        """What it wrote to stdout and stderr."""
        return self._log.read_text() if self._log.exists() else ""  # it makes the file itself

    def wait(self, *, seconds: float = _PATIENCE_SECONDS) -> int:
        """Until it has ended; how it ended."""
        self._wait_until(lambda: self.code is not None, seconds=seconds)
        assert self._code is not None
        return self._code

    def wait_for(self, condition: Callable[[], T]) -> T:
        """Until the condition holds, which it must before the process ends; what it gave."""

        def holds() -> T | None:
            ended = self.code is not None
            value = condition()
            if ended and not value:
                raise AssertionError(f"it ended with {self.code} before that; it said:\n{self.output}")
            return value

        value: T = self._wait_until(holds, seconds=_PATIENCE_SECONDS)
        return value

    def wait_until_all_gone(self, *, seconds: float) -> None:
        """Until neither itself nor anything it started is alive."""
        self._wait_until(lambda: not self.alive(), seconds=seconds)

    def kill(self, number: int = signal.SIGKILL, *, group: bool = False) -> None:
        """Send a signal to the process, or to all of its group as a terminal does."""
        if self.code is None:
            (os.killpg if group else os.kill)(self.pid, number)

    def alive(self) -> list[int]:
        """Processes of its session: itself and whatever it started, orphans too."""
        if self._all_gone:
            return []  # by now a process of somebody else may have its number
        found = [pid for pid in psutil.pids() if _is_alive_in(pid, session=self.pid)]
        self._all_gone = self._code is not None and not found
        return found

    def decode_children(self) -> list[psutil.Process]:
        """The processes that its decoding fork server has forked."""
        try:
            servers = [
                child for child in psutil.Process(self.pid).children() if "forkserver" in "".join(child.cmdline())
            ]
            return [child for server in servers for child in server.children()]
        except psutil.NoSuchProcess:
            return []

    def _wait_until(self, condition: Callable[[], Any], *, seconds: float) -> Any:
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {seconds:g} s; alive: {self.alive()}; it said:\n{self.output}")
            time.sleep(0.005)
        return value


def serve() -> None:
    """The server: requests on stdin, answers on stdout, both JSON lines."""
    _import_what_commands_need()
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                _end(_command(**request))
        print(json.dumps(answer), flush=True)


def _import_what_commands_need() -> None:
    # The lazy packages of diffusers and transformers import a class's module when the class is first touched.
    import diffusers.pipelines.wan.pipeline_wan
    import pyarrow
    import torchcodec.decoders
    from diffusers import AutoencoderKLWan
    from PIL import Image
    from transformers import (
        AutoTokenizer,
        CLIPImageProcessor,
        CLIPVisionModel,
        PreTrainedTokenizerFast,
        UMT5EncoderModel,
    )

    import exporters.fastvideo
    import streamprep.encode
    import streamprep.encoders.wan
    import streamprep.verbs  # noqa: F401

    _ = diffusers.pipelines.wan.pipeline_wan, torchcodec.decoders, exporters.fastvideo
    _ = AutoencoderKLWan, AutoTokenizer, PreTrainedTokenizerFast, UMT5EncoderModel
    _ = CLIPImageProcessor, CLIPVisionModel, Image
    pyarrow.array([0])  # its first imports pandas, where there is one


def _command(arguments: list[str], environment: dict[str, str], log: str, source: str | None) -> int:
    os.setsid()
    os.environ.update(environment)
    if any(name.startswith("HF_") for name in environment):
        importlib.reload(importlib.import_module("huggingface_hub.constants"))  # read once, when the server began
    with open(os.devnull) as nothing, open(log, "w") as file:
        for stream, target in ((nothing, 0), (file, 1), (file, 2)):
            os.dup2(stream.fileno(), target)
    if source is not None:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("streamprep", "exporters")]:
            del sys.modules[name]
        sys.path.insert(0, source)
    if arguments[0].endswith(".py"):
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")
        return 0
    from streamprep.cli import main

    return main(arguments)


def _end(code: int) -> NoReturn:
    """What `sys.exit` does, but for taking apart all that was imported, which after a fork takes a second."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_alive_in(pid: int, *, session: int) -> bool:
    try:
        return os.getsid(pid) == session and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, ProcessLookupError):
        return False
