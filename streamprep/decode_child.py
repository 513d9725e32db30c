"""A process that decodes what it is sent: its life, and what the rank can do with it.

1. Forked from multiprocessing's fork server, it gives up what a broken or hostile file could misuse: store credentials,
   memory without end, core dumps.
2. The rank sends a small message and an open file that holds the encoded video and the request. A file travels without
   filling the channel, so the rank never blocks on a child that has stopped reading.
3. The frames are written to their place in the ring, memory that the rank maps as well.
4. Small messages say where it is: ``ready`` once, then for each task ``taken`` and how it went: ``frames``, ``bad``,
   out of ``memory`` or a ``bug``. They are JSON: nothing a child says can run code in the rank.
"""

from __future__ import annotations

import json
import mmap
import multiprocessing
import os
import resource
import signal
import socket
import time
import traceback
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamprep.decode import decode_into
from streamprep.errors import BadSample, says_out_of_memory
from streamprep.types import DecodeRequest
from streamprep.watchdog import end_with_the_parent

_MESSAGE_BYTES = 64 * 2**10
_TRACEBACK_CHARACTERS = 8000  # the end; as JSON, at six bytes each, it still fits a message
_CREDENTIALS = ("AWS_", "AZURE_", "GOOGLE_", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""What messages say; the last is all that torchcodec 0.13 lets through of PyTorch's."""


class ChildProcess:
    """A decoding process as the rank sees it.

    Args:
        ring_fd: The file that frames are written to.
        memory_bytes: What decoding may map on top of what is mapped once everything is imported.
    """

    def __init__(self, ring_fd: int, memory_bytes: int) -> None:
        context = multiprocessing.get_context("forkserver")
        # Imported once, in the server that children are forked from: they start in milliseconds instead of 3 s.
        context.set_forkserver_preload(
            ["streamprep.decode_server", "streamprep.decode_child", "torchcodec.decoders", "av", "PIL.Image"]
        )
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(self.channel, [b"ring"], [ring_fd])
            self._process = context.Process(target=_serve, args=(theirs, memory_bytes), daemon=True)
            try:
                self._process.start()
            except (OSError, EOFError) as error:
                raise RuntimeError("multiprocessing's fork server could not start a decoding process") from error
        assert self._process.pid is not None
        self.pid = self._process.pid

    def send_task(self, video: bytes, request: DecodeRequest, *, offset: int) -> None:
        """Have it decode `video` to the bytes from `offset` of the ring. Returns at once, even if it died meanwhile."""
        file_fd = os.memfd_create("streamprep-video")
        try:
            with open(file_fd, "wb", closefd=False) as file:
                file.write(video)
                file.write(json.dumps(asdict(request)).encode())
            message = json.dumps({"offset": offset, "video_bytes": len(video)}).encode()
            with suppress(ConnectionError):
                socket.send_fds(self.channel, [message], [file_fd])
        finally:
            os.close(file_fd)

    def receive(self) -> dict[str, Any] | None:
        """What it has to say, by ``kind``; None when it is gone."""
        try:
            message = self.channel.recv(_MESSAGE_BYTES)
        except ConnectionError:
            return None
        return json.loads(message) if message else None

    def kill(self) -> None:
        """Send SIGKILL, which ends a stopped process as well."""
        # multiprocessing's kill() does nothing once the fork server has died: it takes all its children for dead.
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> str:
        """Wait until it is gone; says how it ended."""
        # Its end of the channel closes with its last thread: after this, nothing of it can write to the ring.
        while self.receive() is not None:
            pass
        self.channel.close()
        self._process.join()
        code = self._process.exitcode
        self._process.close()
        if code is not None and code < 0:
            return f"signal {-code} ({signal.strsignal(-code)})"
        return f"exit code {code}"


def map_ring(ring_fd: int) -> Tensor:
    """The whole ring as flat uint8, shared with every process that maps it."""
    return torch.frombuffer(mmap.mmap(ring_fd, 0), dtype=torch.uint8)


def slot_frames(ring: Tensor, offset: int, request: DecodeRequest) -> Tensor:
    """The request's ``(T, C, H, W)`` uint8 frames as they lie in the ring."""
    num_frames, channels, height, width = request.shape
    size_bytes = num_frames * channels * height * width
    return ring[offset : offset + size_bytes].view(request.shape)


def _serve(channel: socket.socket, memory_bytes: int) -> None:
    """The life of a child."""
    import av.filter  # noqa: F401 - what decoding imports, before the limit, which counts from here
    import PIL.Image  # noqa: F401
    import torchcodec.decoders  # noqa: F401

    _leave_signals_to_the_rank()
    end_with_the_parent()
    _forget_credentials()
    torch.set_num_threads(1)
    ring = _receive_ring(channel)
    _limit_memory(memory_bytes)
    with suppress(ConnectionError):
        _reply(channel, "ready")
        while _answer_one(channel, ring, memory_bytes):
            pass


def _leave_signals_to_the_rank() -> None:
    """Ctrl-C reaches the whole group, and Slurm's SIGTERM all processes of a step: the rank decides, by SIGKILL."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _forget_credentials() -> None:
    for name in [name for name in os.environ if name.startswith(_CREDENTIALS)]:
        del os.environ[name]


def _receive_ring(channel: socket.socket) -> Tensor:
    _, (ring_fd,), _, _ = socket.recv_fds(channel, _MESSAGE_BYTES, 1)
    try:
        return map_ring(ring_fd)
    finally:
        os.close(ring_fd)


def _limit_memory(memory_bytes: int) -> None:
    limit = _mapped_bytes("VmSize") + memory_bytes
    _, hard_limit = resource.getrlimit(resource.RLIMIT_AS)
    if hard_limit != resource.RLIM_INFINITY:
        limit = min(limit, hard_limit)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _mapped_bytes(field: str) -> int:
    """``VmSize``, what is mapped now, or ``VmPeak``, the most that ever was."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])


def _answer_one(channel: socket.socket, ring: Tensor, memory_bytes: int) -> bool:
    """Wait for a task and answer it; False when there will be no more."""
    message, file_fds, _, _ = socket.recv_fds(channel, _MESSAGE_BYTES, 1)
    if not message:
        return False
    _reply(channel, "taken")  # until then, nothing that happens to this process is the task's fault
    began = time.perf_counter()
    try:
        outcome = {"kind": "frames", "decoder": _decode(json.loads(message), file_fds[0], ring)}
    except Exception as error:  # noqa: BLE001 - the rank raises what is not the video's fault
        outcome = _explain(error, memory_bytes)
    _reply(channel, **outcome, seconds=time.perf_counter() - began)
    return True


def _decode(where: dict[str, int], file_fd: int, ring: Tensor) -> str:
    try:
        # Writable, because PyTorch warns of read-only memory; private, so nothing that is written reaches the rank.
        # The tensors made of it keep the mapping alive, and take it with them.
        mapped = memoryview(mmap.mmap(file_fd, 0, flags=mmap.MAP_PRIVATE))
    finally:
        os.close(file_fd)
    video, request_json = mapped[: where["video_bytes"]], mapped[where["video_bytes"] :]
    fields = json.loads(bytes(request_json))
    timestamps, indices = fields.pop("timestamps"), fields.pop("indices")
    request = DecodeRequest(timestamps=tuple(timestamps), indices=None if indices is None else tuple(indices), **fields)
    return decode_into(slot_frames(ring, where["offset"], request), video, request)


def _explain(error: Exception, memory_bytes: int) -> dict[str, str]:
    if _is_out_of_memory(error, memory_bytes):
        return {"kind": "memory", "message": str(error).partition("\n")[0]}
    if isinstance(error, BadSample):
        return {"kind": "bad", "reason": error.reason, "message": error.message, "stage": error.stage}
    return {"kind": "bug", "message": "".join(traceback.format_exception(error))[-_TRACEBACK_CHARACTERS:]}


def _is_out_of_memory(error: Exception, memory_bytes: int) -> bool:
    if says_out_of_memory(error):
        return True
    # FFmpeg's H.264 decoder says "Invalid data found" when it gets no memory. Close to the limit that is what it means,
    # or nearly always: the rank asks a fresh child before it believes it.
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    near_limit = _mapped_bytes("VmPeak") > limit - memory_bytes // 4
    return near_limit and isinstance(error, BadSample) and error.reason == "decode_error"


def _reply(channel: socket.socket, kind: str, *, seconds: float = 0.0, **text: str) -> None:
    channel.send(json.dumps({"kind": kind, "seconds": seconds, **text}).encode())
