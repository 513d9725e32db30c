"""What can be made to go wrong with a request, and for which requests."""

from __future__ import annotations

import random
import re
import threading
import time
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit


@dataclass(frozen=True, slots=True)
class Answer:
    """The proxy answers instead of the server, which sees nothing of the request."""

    status: int
    """As 500, 503 (S3's SlowDown), 429, 403."""
    retry_after: int | None = None
    """Seconds, of a header Retry-After."""
    code: str | None = None
    """In the body, as S3 writes it (``ExpiredToken``); by default the usual one for the status."""
    headers: tuple[tuple[str, str], ...] = ()
    """More headers, as ``("x-amz-bucket-region", "eu-west-1")``."""
    details: str = ""
    """More XML inside S3's ``<Error>``."""


@dataclass(frozen=True, slots=True)
class Reset:
    """The connection is reset (TCP RST) and the request does not reach the server."""


@dataclass(frozen=True, slots=True)
class CutReply:
    """The server does what was asked, but its reply ends early."""

    at: float = 0.5
    """After this share of the body; of a reply without one (HEAD), in its first line."""
    reset: bool = True
    """By a TCP RST; otherwise the connection is closed, as if all were well."""


@dataclass(frozen=True, slots=True)
class StallReply:
    """A part of the reply, then nothing for some seconds, then the rest."""

    seconds: float
    at: float = 0.5
    """After this share of the body; 0 is before the head."""


@dataclass(frozen=True, slots=True)
class LoseReply:
    """The server does all that was asked. The client is told nothing: its connection is reset."""


@dataclass(frozen=True, slots=True)
class Delay:
    """The request is passed on some seconds late, even if the client has given up by then: networks do that."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Slow:
    """Both bodies pass at a limited speed: a store that is slower than who reads from it or writes to it."""

    bytes_per_second: float


@dataclass(frozen=True, slots=True)
class Flip:
    """One byte in the reply's body is another."""

    at: float = 0.5
    """Where, as a share of the body."""


@dataclass(frozen=True, slots=True)
class DropHeaders:
    """The request reaches the server without these headers, as if the server knew nothing of them.

    A server that checks signatures refuses it, if they are signed.
    """

    names: tuple[str, ...] = ("if-none-match", "if-match", "x-goog-if-generation-match")
    """By default the conditions of a put: what is behind becomes a store that ignores them."""


Fault = Answer | Reset | CutReply | StallReply | LoseReply | Delay | Slow | Flip | DropHeaders


@dataclass(slots=True, eq=False)
class Request:
    """A request that the proxy saw."""

    method: str
    target: str
    """Path and query, as they were sent (``%20`` stays)."""
    headers: dict[str, str]
    status: int | None = None
    """Of the reply, where there was one."""
    fault: Fault | None = None
    sent_bytes: int = 0
    """Of the request's body that came from the client."""
    received_bytes: int = 0
    """Of the reply's body that went to the client."""

    def __str__(self) -> str:
        return f"{self.method} {self.target}"

    @property
    def kind(self) -> str:
        """What a store is asked by it: ``put``, ``get range``, ``list``, ``start multipart``, ..."""
        query = parse_qs(urlsplit(self.target).query, keep_blank_values=True)
        if self.method in ("HEAD", "DELETE", "POST", "PUT", "GET"):
            for name, kinds in _KINDS_BY_PARAMETER.items():
                if name in query and self.method in kinds:
                    return kinds[self.method]
        if self.method == "PUT" and query.get("comp") in (["block"], ["blocklist"]):
            return {"block": "put part", "blocklist": "complete multipart"}[query["comp"][0]]
        if self.method == "GET" and query.get("comp") == ["list"]:
            return "list"
        if self.method == "PUT" and any("copy-source" in name for name in self.headers):
            return "copy"
        return "get range" if self.method == "GET" and "range" in self.headers else self.method.lower()


# S3's; Google's XML API has the same, Azure's are those with ``comp``.
_KINDS_BY_PARAMETER = {
    "uploadId": {
        "PUT": "put part",
        "POST": "complete multipart",
        "DELETE": "abort multipart",
        "GET": "list parts",
    },
    "uploads": {"POST": "start multipart", "GET": "list multipart"},
    "delete": {"POST": "delete many"},
    "list-type": {"GET": "list"},
}


@dataclass(slots=True, eq=False)
class Rule:
    """A fault, and the requests that it meets."""

    pattern: re.Pattern[str]
    fault: Fault
    times: int | None
    skip: int
    probability: float
    dice: random.Random
    hits: int = 0
    """How often it was applied."""
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def meets(self, request: Request) -> bool:
        """Whether this request is to fail; counts it where it is."""
        with self._changed:
            if not self.pattern.search(str(request)) or (self.times is not None and self.hits >= self.times):
                return False
            if self.skip:
                self.skip -= 1
                return False
            if self.dice.random() >= self.probability:
                return False
            self.hits += 1
            self._changed.notify_all()
            return True

    def wait(self, hits: int = 1, *, seconds: float = 30) -> None:
        """Until it has been applied that often."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while self.hits < hits:
                if not self._changed.wait(deadline - time.monotonic()) and self.hits < hits:
                    raise TimeoutError(f"{self.fault} met {self.hits} of {hits} requests {self.pattern.pattern!r}")
