"""A fake of the Hugging Face hub: what huggingface_hub and datasets ask of it, answered from a folder.

It is no hub: no accounts, no Xet, one commit, nothing can be written. Point the libraries at it by ``HF_ENDPOINT``,
before they are imported.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(repositories: dict[str, Path], log: list[str] | None = None) -> Iterator[str]:
    """Serve repositories and give the address.

    Args:
        repositories: ``{"org/name": folder}``; each is a dataset and a model, as it is asked for.
        log: Gets a line for each request, and the answer's status.
    """

    class Handler(HubHandler):
        served = repositories
        requests = log if log is not None else []

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def downloaded(log: list[str]) -> set[str]:
    """The files whose content was sent, by the lines of a log."""
    sent = (re.match(r"GET /\S+?/resolve/[^/]+/(\S+) .*20[06]$", line) for line in log)
    return {match[1] for match in sent if match}


class HubHandler(BaseHTTPRequestHandler):
    """Answers who reads. `servers.fake_hf` makes of it a hub that can be written, with more commits than one."""

    served: dict[str, Path]
    requests: list[str]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""

    def snapshot(self, repository: str, revision: str) -> tuple[str, Path] | None:
        """The commit that a repository's revision means, and the folder of its files."""
        root = self.served.get(repository)
        return None if root is None or revision not in ("main", COMMIT) else (COMMIT, root)

    def _answer(self, body: bytes = b"") -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        # Of a model, only the API's paths say that it is one.
        found = re.fullmatch(r"/((?P<api>api/)(models|datasets)/|datasets/)?(?P<id>[^/]+/[^/]+?)(/(?P<rest>.*))?", path)
        if found is None or self.snapshot(found["id"], "main") is None:
            self._send(HTTPStatus.NOT_FOUND, b'{"error":"Repository not found"}', {"X-Error-Code": "RepoNotFound"})
            return
        kind, _, rest = (found["rest"] or "").partition("/")
        revision, _, inside = rest.partition("/")
        snapshot = self.snapshot(found["id"], revision or "main")
        if snapshot is None:
            self._send(HTTPStatus.NOT_FOUND, b"", {"X-Error-Code": "RevisionNotFound"})
            return
        commit, root = snapshot
        if kind == "resolve" and (root / inside).is_file():
            self._send_file(root / inside, commit)
        elif found["api"] and kind in ("", "revision"):
            siblings = [{"rfilename": str(file.relative_to(root))} for file in _files(root)]
            info = {
                "id": found["id"],
                "sha": commit,
                "private": False,
                "gated": False,
                "tags": [],
                "siblings": siblings,
            }
            self._send_json(info)
        elif found["api"] and kind == "tree":
            recursive = parse_qs(url.query).get("recursive", [""])[0].lower() in ("true", "1")
            self._send_tree(root, inside, recursive=recursive)
        elif found["api"] and kind == "paths-info":
            wanted = _paths(body)
            entries = [root / name for name in wanted if (root / name).exists()]
            self._send_json([_entry(root, entry) for entry in entries])
        else:
            self._send(HTTPStatus.NOT_FOUND, b'{"error":"Entry not found"}', {"X-Error-Code": "EntryNotFound"})

    def _send_tree(self, root: Path, inside: str, *, recursive: bool) -> None:
        folder = root / inside
        if not folder.is_dir():
            self._send(HTTPStatus.NOT_FOUND, b'{"error":"Entry not found"}', {"X-Error-Code": "EntryNotFound"})
            return
        entries = sorted(folder.rglob("*") if recursive else folder.iterdir())
        self._send_json([_entry(root, entry) for entry in entries])

    def _send_file(self, file: Path, commit: str) -> None:
        data = file.read_bytes()
        headers = {"ETag": f'"{_digest(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            self._send(HTTPStatus.OK, data, headers)
            return
        first, last = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self._send(HTTPStatus.PARTIAL_CONTENT, data[first : last + 1], headers)

    def _send_json(self, value: Any) -> None:
        self._send(HTTPStatus.OK, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: HTTPStatus, body: bytes, headers: dict[str, str]) -> None:
        self.requests.append(f"{self.command} {self.path} {self.headers.get('Range', '')} {status.value}")
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def _entry(root: Path, path: Path) -> dict[str, Any]:
    name = str(path.relative_to(root))
    if path.is_dir():
        return {"type": "directory", "oid": _digest(name.encode()), "size": 0, "path": name}
    data = path.read_bytes()
    return {"type": "file", "oid": _digest(data), "size": len(data), "path": name}


def _paths(body: bytes) -> list[str]:
    """Of a request: JSON, or a form."""
    try:
        paths = json.loads(body)["paths"]
    except ValueError:
        paths = parse_qs(body.decode())["paths"]
    return [paths] if isinstance(paths, str) else list(paths)


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
