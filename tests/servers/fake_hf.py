"""A fake of the Hugging Face hub that can be written: repositories, LFS uploads, and commits of many files.

It adds to `fake_hub`, which can be read only, what ``HfApi.create_commit`` and ``create_repo`` ask for. A commit is
there as a whole or not at all, and one whose ``parent_commit`` is no longer the last is refused with 412. As on the
hub, files are listed by pages and with their digests, and large ones are read from another host, which wants no token.
It is no hub: one branch, two tokens, no Xet (``HF_HUB_DISABLE_XET`` is in its environment), no limit of commits.

A repository whose name begins with ``private`` is not seen without a token, one with ``gated`` by nobody.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from fake_hub import HubHandler

from servers import Server
from servers.threads import serving

OWNER = "fake"
TOKEN, READ_TOKEN = "hf_fake", "hf_fakereader"
LFS_SUFFIXES = (".parquet", ".tar", ".mp4", ".bin", ".safetensors")
LFS_FROM_BYTES = 10_000_000
PAGE = 5
"""Entries in one answer; 1000 on the hub."""


@contextmanager
def fake_hf(folder: Path) -> Iterator[Server]:
    """Serve while the context is open; files are under ``folder`` and removed at the end."""
    with TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as data:
        hub = _Hub(Path(data))
        with serving(_Handler, hub=hub, requests=[]) as url:
            env = {"HF_ENDPOINT": url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
            yield Server(
                name="fake_hf",
                url=url,
                root=f"hf://datasets/{OWNER}/",
                env=env,
                create_bucket=lambda name: hub.create(f"{OWNER}/{name}"),
            )


class _Refused(Exception):
    def __init__(self, status: HTTPStatus, error: str, *, code: str | None = None) -> None:
        self.status, self.error = status, error
        self.headers = {"X-Error-Message": error, **({"X-Error-Code": code} if code else {})}


@dataclass(slots=True)
class _Hub:
    """Repositories, each a list of commits; a commit is a folder of its own, and the files in it never change."""

    folder: Path
    commits: dict[str, list[str]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def create(self, repository: str) -> None:
        with self.lock:
            first = hashlib.sha1(repository.encode()).hexdigest()
            self.folder_of(repository, first).mkdir(parents=True)
            self.commits[repository] = [first]

    def folder_of(self, repository: str, commit: str) -> Path:
        return self.folder / "repositories" / repository / commit

    def blob(self, oid: str) -> Path:
        """Where an LFS object's content is."""
        return self.folder / "lfs" / oid

    def store(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            raise _Refused(HTTPStatus.BAD_REQUEST, "the content is not that of its digest")
        self.blob(oid).parent.mkdir(exist_ok=True)
        written = self.blob(f"{oid}.{threading.get_ident()}")
        written.write_bytes(data)
        written.replace(self.blob(oid))

    def commit(self, repository: str, lines: Iterable[dict[str, Any]]) -> str:
        """Add a commit; what it does is in lines as the hub takes them."""
        with self.lock:
            head = self.commits[repository][-1]
            entries = list(lines)
            parent = entries[0]["value"].get("parentCommit")
            if parent not in (None, head):
                raise _Refused(
                    HTTPStatus.PRECONDITION_FAILED, "A commit has happened since. Please refresh and try again."
                )
            commit = hashlib.sha1(json.dumps([head, entries]).encode()).hexdigest()
            there, new = self.folder_of(repository, head), self.folder_of(repository, commit)
            shutil.copytree(there, new, copy_function=os.link)
            try:
                for entry in entries[1:]:
                    self._apply(new, entry["key"], entry["value"])
            except _Refused:
                shutil.rmtree(new)
                raise
            self.commits[repository].append(commit)
            return commit

    def _apply(self, folder: Path, key: str, value: dict[str, Any]) -> None:
        path = folder / value["path"]
        if not path.resolve().is_relative_to(folder.resolve()):
            raise _Refused(HTTPStatus.BAD_REQUEST, f"{value['path']!r} is no path in a repository")
        if key in ("deletedFile", "deletedFolder"):
            if not path.exists():
                raise _Refused(HTTPStatus.NOT_FOUND, f"A file with this name doesn't exist: {value['path']}")
            shutil.rmtree(path) if key == "deletedFolder" else path.unlink()
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # it is one file with that of the commit before
        if key == "file":
            path.write_bytes(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if not self.blob(value["oid"]).exists():
                raise _Refused(HTTPStatus.NOT_FOUND, f"the LFS object {value['oid']} was not uploaded")
            os.link(self.blob(value["oid"]), path)
        else:
            raise _Refused(HTTPStatus.NOT_IMPLEMENTED, f"this fake knows no {key}")


class _Handler(HubHandler):
    hub: _Hub

    def do_PUT(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def snapshot(self, repository: str, revision: str) -> tuple[str, Path] | None:
        commits = self.hub.commits.get(repository, [])
        commit = commits[-1] if commits and revision == "main" else revision
        return (commit, self.hub.folder_of(repository, commit)) if commit in commits else None

    def _answer(self, body: bytes = b"") -> None:
        path = unquote(urlsplit(self.path).path)
        try:
            self._check_reader(path)
            if not self._answer_writer(path, body):
                super()._answer(body)
        except _Refused as refused:
            self._send(refused.status, json.dumps({"error": refused.error}).encode(), refused.headers)

    def _check_reader(self, path: str) -> None:
        """Refuse who must not see a repository."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if path.startswith("/content/"):
            if token:
                raise _Refused(HTTPStatus.BAD_REQUEST, "this host wants no token")
            return
        if token not in ("", TOKEN, READ_TOKEN):
            raise _Refused(HTTPStatus.UNAUTHORIZED, "Invalid credentials in Authorization header")
        name = re.match(rf"/(api/)?datasets/{OWNER}/(private|gated)", path)
        if name and name[2] == "private" and not token:
            raise _Refused(HTTPStatus.UNAUTHORIZED, "Invalid username or password.", code="RepoNotFound")
        if name and name[2] == "gated":
            raise _Refused(HTTPStatus.FORBIDDEN, "Access to this dataset is restricted.", code="GatedRepo")

    def _send_file(self, file: Path, commit: str) -> None:
        data = file.read_bytes()
        if not _is_large(file.name, len(data)) or self.path.startswith("/content/"):
            super()._send_file(file, commit)
            return
        oid = hashlib.sha256(data).hexdigest()
        port = self.headers["Host"].rpartition(":")[2]
        url = f"http://localhost:{port}/content/{oid}?Signature=SECRET"  # another host than 127.0.0.1
        headers = {"Location": url, "X-Repo-Commit": commit, "X-Linked-Size": str(len(data)), "X-Linked-Etag": oid}
        self._send(HTTPStatus.FOUND, b"", headers)

    def _send_tree(self, root: Path, inside: str, *, recursive: bool) -> None:
        folder = root / inside
        if not folder.is_dir():
            raise _Refused(HTTPStatus.NOT_FOUND, "Entry not found", code="EntryNotFound")
        entries = sorted(folder.rglob("*") if recursive else folder.iterdir())
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        start = int(query.get("cursor", ["0"])[0])
        headers = {"Content-Type": "application/json"}
        if start + PAGE < len(entries):
            recursively = "&recursive=true" if recursive else ""
            following = f"{self._own_url()}{url.path}?cursor={start + PAGE}{recursively}"
            headers["Link"] = f'<{following}>; rel="next"'
        page = [_entry(root, path) for path in entries[start : start + PAGE]]
        self._send(HTTPStatus.OK, json.dumps(page).encode(), headers)

    def _answer_writer(self, path: str, body: bytes) -> bool:
        """Answer what changes something, or leads to it. Returns whether it was such a request."""
        if path.startswith("/content/"):
            self._send_file(self.hub.blob(path.removeprefix("/content/")), "")
        elif self.command == "PUT" and path.startswith("/lfs/"):
            self.hub.store(path.removeprefix("/lfs/"), body)  # as on the hub, who knows the address is let in
            self._send_json({})
        elif path == "/api/repos/create":
            self._authorize()
            wanted = json.loads(body)
            repository = f"{wanted.get('organization') or OWNER}/{wanted['name']}"
            url = f"{self._own_url()}/datasets/{repository}"
            if repository in self.hub.commits:
                self._send(HTTPStatus.CONFLICT, json.dumps({"error": "it is there", "url": url}).encode(), {})
            else:
                self.hub.create(repository)
                self._send_json({"url": url})
        elif path == "/api/validate-yaml":
            self._send_json({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/preupload/main", path):
            self._authorize(found[1])
            head = self.hub.folder_of(found[1], self.hub.commits[found[1]][-1])
            self._send_json({"files": [_upload_mode(head, file) for file in json.loads(body)["files"]]})
        elif found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/auth-check/write", path):
            self._authorize(found[1])
            self._send_json({})
        elif (found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/refs", path)) and found[1] in self.hub.commits:
            branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": self.hub.commits[found[1]][-1]}
            self._send_json({"branches": [branch], "converts": [], "tags": []})
        elif found := re.fullmatch(r"/datasets/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._authorize(found[1])
            objects = [self._upload_action(wanted) for wanted in json.loads(body)["objects"]]
            self._send_json({"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/commit/main", path):
            self._authorize(found[1])
            commit = self.hub.commit(found[1], map(json.loads, body.splitlines()))
            url = f"{self._own_url()}/datasets/{found[1]}/commit/{commit}"
            self._send_json({"success": True, "commitOid": commit, "commitUrl": url})
        else:
            return False
        return True

    def _authorize(self, repository: str | None = None) -> None:
        if self.headers.get("Authorization") == f"Bearer {READ_TOKEN}":
            raise _Refused(HTTPStatus.FORBIDDEN, "Forbidden: you must use a write token to upload to a repository.")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise _Refused(HTTPStatus.UNAUTHORIZED, "Invalid username or password.")
        if repository is not None and repository not in self.hub.commits:
            raise _Refused(HTTPStatus.NOT_FOUND, "Repository not found", code="RepoNotFound")

    def _upload_action(self, wanted: dict[str, Any]) -> dict[str, Any]:
        answer = {"oid": wanted["oid"], "size": wanted["size"]}
        if self.hub.blob(wanted["oid"]).exists():
            return answer
        return {**answer, "actions": {"upload": {"href": f"{self._own_url()}/lfs/{wanted['oid']}"}}}

    def _own_url(self) -> str:
        """As the client knows it: it may have come through a proxy."""
        return f"http://{self.headers['Host']}"


def _upload_mode(head: Path, file: dict[str, Any]) -> dict[str, Any]:
    mode = "lfs" if _is_large(file["path"], file["size"]) else "regular"
    answer = {"path": file["path"], "uploadMode": mode, "shouldIgnore": file["path"].endswith(".ignored")}
    if (head / file["path"]).is_file():
        there = _entry(head, head / file["path"])
        answer["oid"] = there["lfs"]["oid"] if "lfs" in there else there["oid"]
    return answer


def _is_large(path: str, size: int) -> bool:
    return size >= LFS_FROM_BYTES or (size > 0 and path.endswith(LFS_SUFFIXES))


def _entry(root: Path, path: Path) -> dict[str, Any]:
    """As the tree lists it: with git's digest, of a large file that of the text that stands for it."""
    name = str(path.relative_to(root))
    if path.is_dir():
        return {"type": "directory", "oid": _git_digest(name.encode()), "size": 0, "path": name}
    data = path.read_bytes()
    if not _is_large(name, len(data)):
        return {"type": "file", "oid": _git_digest(data), "size": len(data), "path": name}
    oid = hashlib.sha256(data).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(data)}\n".encode()
    large = {"oid": oid, "size": len(data), "pointerSize": len(pointer)}
    return {"type": "file", "oid": _git_digest(pointer), "size": len(data), "path": name, "lfs": large}


def _git_digest(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
