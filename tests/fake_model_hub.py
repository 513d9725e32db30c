"""A model hub on this machine: what `huggingface_hub` asks of one, and which files were asked for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True, kw_only=True)
class FakeHub:
    """It has one model."""

    hub_id: str
    root: Path
    url: str = ""
    downloaded: set[str] = field(default_factory=set)
    """The files whose content was sent."""

    def answer(self, path: str) -> tuple[bytes, str | None] | None:
        """(content, name of the file that it is of), None if there is no such thing."""
        files = sorted(file.relative_to(self.root).as_posix() for file in self.root.rglob("*") if file.is_file())
        api, resolve = f"/api/models/{self.hub_id}", f"/{self.hub_id}/resolve/{COMMIT}/"
        if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            siblings = [{"rfilename": file} for file in files]
            return json.dumps({"id": self.hub_id, "sha": COMMIT, "siblings": siblings}).encode(), None
        if path == f"{api}/tree/{COMMIT}":
            tree = [{"type": "file", "path": file, "size": self.size(file), "oid": self.etag(file)} for file in files]
            return json.dumps(tree).encode(), None
        if path.startswith(resolve) and (name := path.removeprefix(resolve)) in files:
            return (self.root / name).read_bytes(), name
        return None

    def size(self, name: str) -> int:
        return (self.root / name).stat().st_size

    def etag(self, name: str) -> str:
        return hashlib.sha1((self.root / name).read_bytes()).hexdigest()


@contextmanager
def fake_hub(hub_id: str, root: Path) -> Iterator[FakeHub]:
    """Serve a folder as a model of that id."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_content=False)

        def do_GET(self) -> None:
            self._answer(with_content=True)

        def _answer(self, *, with_content: bool) -> None:
            found = hub.answer(unquote(self.path.partition("?")[0]))
            content, name = found or (b"", None)
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(content)))
            if name is not None:
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", f'"{hub.etag(name)}"')
            self.end_headers()
            if with_content:
                self.wfile.write(content)
                if name is not None:
                    hub.downloaded.add(name)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub = FakeHub(hub_id=hub_id, root=root, url=f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()
