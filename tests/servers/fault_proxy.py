"""A proxy between a client and a server that makes requests fail as the test says, and counts them.

One thread with an event loop of its own. For each request:

1. its head is read, noted, and the rules are asked for a fault;
2. it goes to the server by a connection of its own, its body while it comes (``Expect: 100-continue`` works);
3. the reply goes back while it comes, unless the fault cuts, delays or changes it.

What is not asked to fail is passed on byte for byte, so signatures stay right.
"""

from __future__ import annotations

import asyncio
import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from servers.faults import (
    Answer,
    CutReply,
    Delay,
    DropHeaders,
    Fault,
    Flip,
    LoseReply,
    Request,
    Reset,
    Rule,
    Slow,
    StallReply,
)
from servers.wire import UNTIL_END, Head, Piece, read_body, read_head, reply_length, request_length

MAX_HEAD_BYTES = 1 << 20
CODES = {403: "AccessDenied", 404: "NoSuchKey", 429: "TooManyRequests", 500: "InternalError", 503: "SlowDown"}
BYTES_OF_A_CUT_HEAD = len("HTTP/1")
"""Some clients take a few whole headers for all of them."""
SECONDS_TO_ARRIVE = 0.05
"""Before a reset, which throws away what the client has not yet read."""


class FaultProxy:
    """See `fault_proxy`. All methods may be called from any thread while requests pass."""

    def __init__(self, upstream: str, *, seed: int = 0) -> None:
        """Stand before the server at the URL ``upstream``; ``seed`` is that of the probabilities."""
        address = urlsplit(upstream)
        assert address.hostname is not None and address.port is not None, upstream
        self._upstream = (address.hostname, address.port)
        self._dice = random.Random(seed)
        self._lock = threading.Lock()
        self._rules: list[Rule] = []
        self._requests: list[Request] = []
        # Bound and never listening: the port stays ours while connections are refused.
        self._reserve = _bound_socket(0)
        self._port: int = self._reserve.getsockname()[1]
        self._connections: set[asyncio.StreamWriter] = set()
        self._loop: asyncio.AbstractEventLoop
        self._listener: asyncio.Server | None = None
        self.url = f"http://127.0.0.1:{self._port}"

    def inject(
        self, pattern: str, fault: Fault, *, times: int | None = None, skip: int = 0, probability: float = 1.0
    ) -> Rule:
        """Make requests fail from now on. The first rule that meets a request has it.

        Args:
            pattern: A regular expression, searched for in ``METHOD /path?query`` as sent: ``^PUT .*/data/``.
            fault: What happens to them.
            times: At most so often.
            skip: Let so many pass before.
            probability: Of each one that matches.
        """
        rule = Rule(re.compile(pattern), fault, times, skip, probability, self._dice)
        with self._lock:
            self._rules.append(rule)
        return rule

    def clear(self) -> None:
        """Forget all rules. What stalls or waits already goes on doing so."""
        with self._lock:
            self._rules.clear()

    @property
    def requests(self) -> list[Request]:
        """All requests so far, in the order in which they came."""
        with self._lock:
            return list(self._requests)

    def count(self, pattern: str = "") -> int:
        """How many requests match, as for `inject`."""
        return sum(bool(re.search(pattern, str(request))) for request in self.requests)

    def kinds(self) -> Counter[str]:
        """How many requests of each kind: ``put``, ``get range``, ``list``, ..."""
        return Counter(request.kind for request in self.requests)

    def forget(self) -> None:
        """Count from nothing."""
        with self._lock:
            self._requests.clear()

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Refuse connections, and reset those that are open."""
        self._run(self._stop_listening())
        try:
            yield
        finally:
            self._run(self._listen())

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=30)

    # In the thread of the loop

    async def serve(self, ready: threading.Event, stop: asyncio.Event) -> None:
        """Serve until told to stop; then reset what is open."""
        self._loop = asyncio.get_running_loop()
        await self._listen()
        ready.set()
        await stop.wait()
        await self._stop_listening()
        self._reserve.close()

    async def _listen(self) -> None:
        self._listener = await asyncio.start_server(
            self._serve_client, sock=_bound_socket(self._port), limit=MAX_HEAD_BYTES, backlog=1024
        )

    async def _stop_listening(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for writer in list(self._connections):
            _reset(writer)

    async def _serve_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        _flush_always(writer)
        try:
            while (head := await read_head(reader)) is not None and await self._exchange(head, reader, writer):
                pass
            writer.close()
        except (OSError, EOFError, asyncio.LimitOverrunError, asyncio.CancelledError):
            _reset(writer)  # the client sees what the server did: a connection that breaks
        finally:
            self._connections.discard(writer)

    async def _exchange(self, head: Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its reply. Returns whether the connection can carry another."""
        request = self._note(head)
        match request.fault:
            case Answer() as answer:
                return await _answer(answer, request, head, reader, writer)
            case Reset():
                _reset(writer)
                return False
            case Delay(seconds):
                await asyncio.sleep(seconds)
        server_reader, server_writer = await asyncio.open_connection(*self._upstream, limit=MAX_HEAD_BYTES)
        _flush_always(server_writer)
        server_writer.write(_request_head(head, request.fault))
        upload = asyncio.create_task(_pass_request(request, head, reader, server_writer))
        download = asyncio.create_task(_pass_reply(request, server_reader, writer))
        try:
            await asyncio.wait({upload, download}, return_when=asyncio.FIRST_COMPLETED)
            if upload.done():
                upload.result()  # raises where the client is gone: then nobody waits for a reply
            if not await download:
                return False
            if not upload.done() and "expect" not in head.headers:
                await upload  # a server may refuse early; a client that still sends would not read why
            return upload.done() and not head.closes
        finally:
            upload.cancel()
            download.cancel()
            await asyncio.gather(upload, download, return_exceptions=True)
            server_writer.transport.abort()

    def _note(self, head: Head) -> Request:
        method, target, _ = head.first_line.split(" ", 2)
        request = Request(method, target, head.headers)
        with self._lock:
            self._requests.append(request)
            for rule in self._rules:
                if rule.meets(request):
                    request.fault = rule.fault
                    break
        return request


@contextmanager
def fault_proxy(upstream: str, *, seed: int = 0) -> Iterator[FaultProxy]:
    """A proxy before the server at this URL, while the context is open."""
    proxy = FaultProxy(upstream, seed=seed)
    ready = threading.Event()
    loop_and_stop: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serve() -> None:
        stop = asyncio.Event()
        loop_and_stop.append((asyncio.get_running_loop(), stop))
        await proxy.serve(ready, stop)

    thread = threading.Thread(target=asyncio.run, args=[serve()], name="fault-proxy", daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield proxy
    finally:
        [(loop, stop)] = loop_and_stop
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        assert not thread.is_alive()


def _request_head(head: Head, fault: Fault | None) -> bytes:
    if not isinstance(fault, DropHeaders):
        return head.raw
    first_line, *lines = head.raw.split(b"\r\n")
    kept = [line for line in lines if line.partition(b":")[0].decode().strip().lower() not in fault.names]
    return b"\r\n".join([first_line, *kept])


async def _pass_request(
    request: Request, head: Head, reader: asyncio.StreamReader, server_writer: asyncio.StreamWriter
) -> None:
    """Pass the body on, and read it to its end even if the server does not, so that the client gets to the reply."""
    server_listens = True
    async for piece in read_body(reader, request_length(head)):
        await _keep_pace(request.fault, piece)
        request.sent_bytes += len(piece.data) * piece.is_content
        if server_listens:
            try:
                server_writer.write(piece.data)
                await server_writer.drain()
            except OSError:
                server_listens = False


async def _pass_reply(request: Request, server_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """Pass the reply on. Returns whether the connection can go on after it."""
    head = await _final_head(server_reader, writer)
    request.status = head.status
    length = reply_length(head, request.method)
    fault = request.fault
    pieces = read_body(server_reader, length)
    if isinstance(fault, LoseReply):
        async for _ in pieces:
            pass
        _reset(writer)
        return False
    if isinstance(fault, CutReply) and length == 0:
        writer.write(head.raw[:BYTES_OF_A_CUT_HEAD])
        await _cut(fault, writer)
        return False
    if isinstance(fault, StallReply) and (fault.at == 0 or length == 0):
        await asyncio.sleep(fault.seconds)
        fault = None
    writer.write(head.raw)
    await writer.drain()
    turn = _turn(fault, length)
    async for piece in _split_at(turn, pieces):
        if turn == request.received_bytes and piece.is_content:
            match fault:
                case CutReply():
                    await _cut(fault, writer)
                    return False
                case StallReply(seconds):
                    await asyncio.sleep(seconds)
                case Flip():
                    piece = Piece(bytes([piece.data[0] ^ 0xFF]) + piece.data[1:])
        await _keep_pace(fault, piece)
        writer.write(piece.data)
        await writer.drain()
        request.received_bytes += len(piece.data) * piece.is_content
    return not head.closes and length != UNTIL_END


async def _keep_pace(fault: Fault | None, piece: Piece) -> None:
    if isinstance(fault, Slow):
        await asyncio.sleep(len(piece.data) / fault.bytes_per_second)


async def _final_head(server_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Head:
    """The reply's head, after any ``100 Continue``, which are passed on."""
    while (head := await read_head(server_reader)) is not None:
        if head.status >= 200:
            return head
        writer.write(head.raw)
        await writer.drain()
    raise ConnectionResetError("the server closed the connection without a reply")


def _turn(fault: Fault | None, length: int | None) -> int | None:
    """At which byte of a reply's body its fault happens. Where the length is not known, after the first."""
    if not isinstance(fault, CutReply | StallReply | Flip):
        return None
    if length is None or length == UNTIL_END:
        return int(fault.at > 0)
    return min(int(length * fault.at), max(length - 1, 0))


async def _split_at(turn: int | None, pieces: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
    """The same bytes, and a piece of content begins at byte ``turn``."""
    seen = 0
    async for piece in pieces:
        if piece.is_content:
            size = len(piece.data)
            if turn is not None and seen < turn < seen + size:
                yield Piece(piece.data[: turn - seen])
                piece = Piece(piece.data[turn - seen :])
            seen += size
        yield piece


async def _cut(fault: CutReply, writer: asyncio.StreamWriter) -> None:
    await writer.drain()
    if fault.reset:
        await asyncio.sleep(SECONDS_TO_ARRIVE)
        _reset(writer)
    else:
        writer.close()


async def _answer(
    answer: Answer, request: Request, head: Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> bool:
    """Answer as a server in trouble does, after reading the request. Returns whether the connection can go on."""
    waits_to_send = "expect" in head.headers
    if not waits_to_send:
        async for piece in read_body(reader, request_length(head)):
            request.sent_bytes += len(piece.data) * piece.is_content
    code = answer.code or CODES.get(answer.status, "ServiceUnavailable")
    error = f"<Error><Code>{code}</Code><Message>by the fault proxy</Message>{answer.details}</Error>"
    body = f"<?xml version='1.0' encoding='UTF-8'?>{error}".encode()
    closes = waits_to_send or head.closes
    lines = [
        f"HTTP/1.1 {answer.status} {code}",
        "Content-Type: application/xml",
        f"Content-Length: {len(body)}",
        *([f"Retry-After: {answer.retry_after}"] if answer.retry_after is not None else []),
        *(f"{name}: {value}" for name, value in answer.headers),
        *(["Connection: close"] if closes else []),
    ]
    writer.write("\r\n".join([*lines, "", ""]).encode() + (b"" if request.method == "HEAD" else body))
    await writer.drain()
    request.status = answer.status
    return not closes


def _bound_socket(port: int) -> socket.socket:
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    bound.bind(("127.0.0.1", port))
    return bound


def _flush_always(writer: asyncio.StreamWriter) -> None:
    """Let ``drain`` wait until the kernel has all, so that nobody is told of bytes that did not leave."""
    writer.transport.set_write_buffer_limits(high=0)


def _reset(writer: asyncio.StreamWriter) -> None:
    """End the connection by a TCP RST."""
    with suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
