"""The fault proxy: what it passes on is untouched, and each fault is what its name says."""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from random import Random
from xml.etree import ElementTree

import pytest

from servers.fault_proxy import FaultProxy, fault_proxy
from servers.faults import Answer, CutReply, Delay, DropHeaders, Flip, LoseReply, Request, Reset, Slow, StallReply
from servers.threads import serving

CONTENT = Random(0).randbytes(3_000_000)


class Echo(BaseHTTPRequestHandler):
    """GET gives `CONTENT`, PUT and POST give back what they got, in the same coding."""

    protocol_version = "HTTP/1.1"
    seen: list[str]

    def do_GET(self) -> None:
        self._reply(CONTENT)

    def do_HEAD(self) -> None:
        self._reply(CONTENT)

    def do_DELETE(self) -> None:
        self.seen.append(f"DELETE {self.path}")
        self.send_response(204)
        self.end_headers()

    def do_PUT(self) -> None:
        if self.path == "/forbidden":  # without reading the body, and as Go's servers do it
            self._reply(b"no", status=403)
            self.connection.shutdown(socket.SHUT_WR)
            time.sleep(0.5)
            self.close_connection = True
        elif self.headers.get("Transfer-Encoding") == "chunked":
            self._reply_chunked(self._chunks())
        else:
            self._reply(self.rfile.read(int(self.headers["Content-Length"])))

    def do_POST(self) -> None:
        self.do_PUT()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr."""

    def _reply(self, body: bytes, *, status: int = 200) -> None:
        self.seen.append(f"{self.command} {self.path}")
        self.send_response(status)
        if "X-Told" in self.headers:
            self.send_header("X-Told", self.headers["X-Told"])
        if self.path != "/until-end":
            self.send_header("Content-Length", str(len(body)))
        else:
            self.close_connection = True
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _chunks(self) -> list[bytes]:
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return chunks

    def _reply_chunked(self, chunks: list[bytes]) -> None:
        self.seen.append(f"{self.command} {self.path}")
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for chunk in chunks:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
        self.wfile.write(b"0\r\n\r\n")


@pytest.fixture
def seen() -> list[str]:
    """The requests that reached the server."""
    return []


@pytest.fixture
def proxy(seen: list[str]) -> Iterator[FaultProxy]:
    with serving(Echo, seen=seen) as url, fault_proxy(url) as proxy:
        yield proxy


@pytest.fixture
def connect(proxy: FaultProxy) -> Iterator[Callable[[], http.client.HTTPConnection]]:
    connections: list[http.client.HTTPConnection] = []

    def connect() -> http.client.HTTPConnection:
        connections.append(http.client.HTTPConnection(proxy.url.removeprefix("http://"), timeout=20))
        return connections[-1]

    yield connect
    for connection in connections:
        connection.close()


Connect = Callable[[], http.client.HTTPConnection]


def get(connection: http.client.HTTPConnection, path: str = "/file") -> tuple[int, bytes]:
    connection.request("GET", path)
    reply = connection.getresponse()
    return reply.status, reply.read()


# Nothing asked to fail


def test_one_connection_carries_requests_of_every_kind(connect: Connect, seen: list[str]) -> None:
    connection = connect()
    connection.connect()
    first = connection.sock
    assert get(connection) == (200, CONTENT)
    connection.request("HEAD", "/file")
    reply = connection.getresponse()
    assert (reply.status, reply.headers["Content-Length"], reply.read()) == (200, str(len(CONTENT)), b"")
    connection.request("PUT", "/file", body=CONTENT)
    assert connection.getresponse().read() == CONTENT
    connection.request("PUT", "/chunked", body=iter([b"one", b"two" * 1000]), encode_chunked=True)
    assert connection.getresponse().read() == b"one" + b"two" * 1000
    connection.request("DELETE", "/file")
    reply = connection.getresponse()
    assert (reply.status, reply.read()) == (204, b"")
    connection.request("POST", "/empty", body=b"")
    assert connection.getresponse().read() == b""
    assert connection.sock is first
    assert seen == ["GET /file", "HEAD /file", "PUT /file", "PUT /chunked", "DELETE /file", "POST /empty"]


def test_a_reply_that_ends_with_its_connection_is_whole(connect: Connect) -> None:
    assert get(connect(), "/until-end") == (200, CONTENT)


def test_a_refusal_before_the_body_is_read_arrives(connect: Connect) -> None:
    connection = connect()
    connection.request("PUT", "/forbidden", body=bytes(20_000_000))
    assert connection.getresponse().status == 403


def test_a_client_that_waits_for_100_continue_is_told_so(proxy: FaultProxy) -> None:
    host, port = proxy.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(b"PUT /file HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 100 ")
        client.sendall(b"abc")
        replies = b""
        while not replies.endswith(b"abc"):
            replies += client.recv(1000)
        assert replies.startswith(b"HTTP/1.1 200 ")


def test_many_clients_at_once_each_get_their_own(connect: Connect) -> None:
    def echo(number: int) -> bool:
        body = Random(number).randbytes(300_000)
        connection = connect()
        for _ in range(3):
            connection.request("PUT", f"/{number}", body=body)
            if connection.getresponse().read() != body:
                return False
        return True

    with ThreadPoolExecutor(32) as pool:
        assert all(pool.map(echo, range(32)))


def test_a_client_that_leaves_is_not_waited_for(proxy: FaultProxy, connect: Connect) -> None:
    connection = connect()
    connection.putrequest("PUT", "/file")
    connection.putheader("Content-Length", "1000000")
    connection.endheaders(bytes(500_000))
    connection.close()
    assert get(connect()) == (200, CONTENT)


# Faults


def test_an_answer_of_the_proxy_keeps_the_request_from_the_server(
    proxy: FaultProxy, connect: Connect, seen: list[str]
) -> None:
    proxy.inject("^PUT", Answer(503, retry_after=7), times=1)
    connection = connect()
    connection.request("PUT", "/file", body=CONTENT)
    reply = connection.getresponse()
    assert (reply.status, reply.headers["Retry-After"]) == (503, "7")
    assert b"<Code>SlowDown</Code>" in reply.read()
    assert seen == []
    connection.request("PUT", "/file", body=b"again")
    assert connection.getresponse().read() == b"again"


def test_an_answer_can_say_all_that_a_store_says(proxy: FaultProxy, connect: Connect) -> None:
    region = ("x-amz-bucket-region", "eu-west-1")
    proxy.inject("^GET", Answer(301, code="PermanentRedirect", headers=(region,), details="<Endpoint>e</Endpoint>"))
    connection = connect()
    connection.request("GET", "/")
    reply = connection.getresponse()
    assert reply.headers["x-amz-bucket-region"] == "eu-west-1"
    error = ElementTree.fromstring(reply.read())
    assert [child.text for child in error] == ["PermanentRedirect", "by the fault proxy", "e"]


def test_dropped_headers_do_not_reach_the_server(proxy: FaultProxy, connect: Connect) -> None:
    proxy.inject("/dropped", DropHeaders(("x-told",)))
    connection = connect()
    for path in ("/dropped", "/kept"):
        connection.request("PUT", path, body=b"abc", headers={"X-Told": "1"})
        reply = connection.getresponse()
        assert reply.read() == b"abc"
        assert reply.headers["X-Told"] == (None if path == "/dropped" else "1")


def test_the_answer_to_head_has_no_body(proxy: FaultProxy, connect: Connect) -> None:
    proxy.inject("^HEAD", Answer(500))
    connection = connect()
    for _ in range(2):
        connection.request("HEAD", "/file")
        reply = connection.getresponse()
        assert (reply.status, reply.read()) == (500, b"")


def test_an_answer_to_a_client_that_waits_for_100_continue_spares_it_the_body(proxy: FaultProxy) -> None:
    proxy.inject("^PUT", Answer(500))
    host, port = proxy.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(b"PUT /file HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n")
        reply = b""
        while data := client.recv(1000):
            reply += data
        assert reply.startswith(b"HTTP/1.1 500 ")


def test_a_reset_request_does_not_reach_the_server(proxy: FaultProxy, connect: Connect, seen: list[str]) -> None:
    proxy.inject("^GET", Reset(), times=1)
    with pytest.raises(ConnectionResetError):
        get(connect())
    assert seen == []
    assert get(connect()) == (200, CONTENT)


def read_until_it_breaks(connection: http.client.HTTPConnection) -> tuple[bytes, type[Exception]]:
    connection.request("GET", "/file")
    reply = connection.getresponse()
    got = b""
    try:
        while len(got) < len(CONTENT):
            piece = reply.read1()
            if not piece:
                raise EOFError
            got += piece
    except (OSError, EOFError) as error:
        return got, type(error)
    raise AssertionError("the reply is whole")


def test_a_reply_is_reset_in_the_middle(proxy: FaultProxy, connect: Connect) -> None:
    proxy.inject("^GET", CutReply())
    got, how = read_until_it_breaks(connect())
    assert how is ConnectionResetError
    assert 0 < len(got) <= len(CONTENT) // 2
    assert got == CONTENT[: len(got)]


def test_a_reply_is_closed_early_as_if_all_were_well(proxy: FaultProxy, connect: Connect) -> None:
    proxy.inject("^GET", CutReply(0.25, reset=False))
    assert read_until_it_breaks(connect()) == (CONTENT[: len(CONTENT) // 4], EOFError)


@pytest.mark.parametrize("reset", [True, False])
def test_a_reply_without_body_is_cut_in_its_first_line(proxy: FaultProxy, connect: Connect, reset: bool) -> None:
    proxy.inject("^HEAD", CutReply(reset=reset))
    connection = connect()
    connection.request("HEAD", "/file")
    with pytest.raises(ConnectionResetError if reset else http.client.BadStatusLine):
        connection.getresponse()


def test_a_reply_in_chunks_is_cut_too(proxy: FaultProxy, connect: Connect) -> None:
    proxy.inject("^PUT", CutReply(reset=False))
    connection = connect()
    connection.request("PUT", "/chunked", body=iter([b"one", b"two"]), encode_chunked=True)
    with pytest.raises(http.client.IncompleteRead):
        connection.getresponse().read()
    assert proxy.requests[0].received_bytes == 1


@pytest.mark.parametrize("at", [0, 0.5])
def test_a_reply_stalls_and_then_goes_on(proxy: FaultProxy, connect: Connect, at: float) -> None:
    proxy.inject("^GET", StallReply(0.5, at=at))
    begin = time.monotonic()
    assert get(connect()) == (200, CONTENT)
    assert time.monotonic() - begin >= 0.5


def test_a_lost_reply_is_that_of_a_request_that_was_done(proxy: FaultProxy, connect: Connect, seen: list[str]) -> None:
    proxy.inject("^PUT", LoseReply())
    connection = connect()
    with pytest.raises(ConnectionResetError):
        connection.request("PUT", "/file", body=b"data")
        connection.getresponse()
    assert seen == ["PUT /file"]
    [request] = proxy.requests
    assert (request.status, request.received_bytes) == (200, 0)


def test_a_late_request_arrives_after_all(proxy: FaultProxy, connect: Connect) -> None:
    proxy.inject("^GET", Delay(0.5))
    begin = time.monotonic()
    assert get(connect()) == (200, CONTENT)
    assert time.monotonic() - begin >= 0.5


@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_bodies_pass_slowly(proxy: FaultProxy, connect: Connect, method: str) -> None:
    proxy.inject(f"^{method}", Slow(6_000_000))
    connection = connect()
    begin = time.monotonic()
    connection.request(method, "/file", body=CONTENT if method == "PUT" else None)
    assert connection.getresponse().read() == CONTENT
    assert time.monotonic() - begin >= 0.5


@pytest.mark.parametrize("at", [0, 0.5, 1])
def test_a_flipped_reply_differs_in_one_byte(proxy: FaultProxy, connect: Connect, at: float) -> None:
    proxy.inject("^GET", Flip(at))
    _, got = get(connect())
    assert len(got) == len(CONTENT)
    [where] = [n for n, (a, b) in enumerate(zip(got, CONTENT, strict=True)) if a != b]
    assert where == min(int(at * len(CONTENT)), len(CONTENT) - 1)


def test_refused_connections_break_open_ones_and_are_taken_again_at_the_same_port(
    proxy: FaultProxy, connect: Connect
) -> None:
    waiting = connect()
    assert get(waiting) == (200, CONTENT)
    for _ in range(3):
        with proxy.refusing():
            with pytest.raises(ConnectionRefusedError):
                connect().connect()
            assert waiting.sock is not None
            with pytest.raises(ConnectionResetError):
                waiting.sock.recv(1)
        waiting = connect()
        assert get(waiting) == (200, CONTENT)


# Which requests


def test_rules_choose_by_pattern_count_and_order(proxy: FaultProxy, connect: Connect) -> None:
    late = proxy.inject("/b$", Answer(500), skip=1, times=2)
    proxy.inject("^GET /b", Answer(429), times=1)
    connection = connect()
    assert [get(connection, "/b")[0] for _ in range(5)] == [429, 500, 500, 200, 200]
    assert get(connection, "/a")[0] == 200
    assert late.hits == 2
    proxy.inject("", Answer(503))
    assert get(connection, "/a")[0] == 503
    proxy.clear()
    assert get(connection, "/a")[0] == 200


def test_a_probability_is_that_of_each_request_and_the_same_each_time(proxy: FaultProxy, connect: Connect) -> None:
    def statuses(proxy: FaultProxy, connection: http.client.HTTPConnection) -> list[int]:
        proxy.inject("^HEAD", Answer(503), probability=0.3)
        got = []
        for _ in range(100):
            connection.request("HEAD", "/")
            reply = connection.getresponse()
            reply.read()
            got.append(reply.status)
        return got

    got = statuses(proxy, connect())
    assert 15 < got.count(503) < 45
    host, port = proxy._upstream
    with fault_proxy(f"http://{host}:{port}") as other:
        assert statuses(other, http.client.HTTPConnection(other.url.removeprefix("http://"))) == got


def test_a_test_can_wait_for_a_fault(proxy: FaultProxy, connect: Connect) -> None:
    rule = proxy.inject("^GET", Delay(0), times=1)
    with pytest.raises(TimeoutError, match="0 of 1"):
        rule.wait(seconds=0.05)
    with ThreadPoolExecutor(1) as pool:
        getting = pool.submit(get, connect())
        rule.wait()
        assert getting.result() == (200, CONTENT)


# Counting


@pytest.mark.parametrize(
    ("line", "headers", "kind"),
    [
        ("GET /b/k", {}, "get"),
        ("GET /b/k", {"range": "bytes=0-1"}, "get range"),
        ("HEAD /b/k", {}, "head"),
        ("PUT /b/k", {}, "put"),
        ("PUT /b/k", {"x-amz-copy-source": "/b/a"}, "copy"),
        ("GET /b?list-type=2&prefix=uploads", {}, "list"),
        ("POST /b/k?uploads", {}, "start multipart"),
        ("PUT /b/k?partNumber=1&uploadId=x", {}, "put part"),
        ("POST /b/k?uploadId=x", {}, "complete multipart"),
        ("DELETE /b/k?uploadId=x", {}, "abort multipart"),
        ("DELETE /b/k", {}, "delete"),
        ("POST /b?delete", {}, "delete many"),
        ("PUT /a/b/k?comp=block&blockid=x", {}, "put part"),
        ("PUT /a/b/k?comp=blocklist", {}, "complete multipart"),
        ("GET /a/b?restype=container&comp=list", {}, "list"),
    ],
)
def test_requests_are_counted_by_what_they_ask(line: str, headers: dict[str, str], kind: str) -> None:
    method, target = line.split(" ")
    assert Request(method, target, headers).kind == kind


def test_requests_are_noted_with_their_bytes(proxy: FaultProxy, connect: Connect) -> None:
    connection = connect()
    get(connection)
    connection.request("PUT", "/b/k?uploadId=1&partNumber=1", body=b"abcd")
    connection.getresponse().read()
    first, second = proxy.requests
    assert (first.status, first.sent_bytes, first.received_bytes) == (200, 0, len(CONTENT))
    assert (second.kind, second.sent_bytes, second.received_bytes) == ("put part", 4, 4)
    assert proxy.kinds() == {"get": 1, "put part": 1}
    assert (proxy.count(), proxy.count("^PUT")) == (2, 1)
    proxy.forget()
    assert proxy.count() == 0


# The end


def test_a_proxy_ends_while_requests_wait_in_it(proxy: FaultProxy) -> None:
    host, port = proxy._upstream
    with ThreadPoolExecutor(2) as pool:
        with fault_proxy(f"http://{host}:{port}") as other:
            rules = [other.inject("/stalled", StallReply(1000)), other.inject("/late", Delay(1000))]
            address = other.url.removeprefix("http://")
            waiting = [pool.submit(get, http.client.HTTPConnection(address), path) for path in ("/stalled", "/late")]
            for rule in rules:
                rule.wait()
        for getting in waiting:
            assert isinstance(getting.exception(timeout=20), OSError | http.client.HTTPException)


def test_servers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    code = f"""
import os, signal, sys, time
from pathlib import Path
from servers.processes import running
with running(
    lambda ports: [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(1000)"],
    num_ports=1, log=Path({str(tmp_path / "log")!r}), is_ready=lambda ports: True,
):
    while not Path({str(tmp_path / "log")!r}).read_text().strip():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    tests = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=tests, timeout=60).returncode == -9
    server = int((tmp_path / "log").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{server}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
