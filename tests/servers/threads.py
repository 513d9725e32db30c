"""HTTP servers in threads of this process, for what is small enough to be written here."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler], **attributes: Any) -> Iterator[str]:
    """Serve by a handler with these attributes of its class while the context is open, and give the URL."""
    with _Server(("127.0.0.1", 0), type(handler.__name__, (handler,), attributes)) as server:
        threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # with the usual 5, Linux resets connections of clients that open many at once

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves, or a proxy that resets, is nothing to write about."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)
