"""A fake of Google Cloud Storage: of its XML API, what obstore's client asks for, in the memory of this process.

It is no Google: nobody is asked who he is, buckets have one class and no versions, an object's generation is a count.
What it does keep is what streamprep relies on: ``x-goog-if-generation-match``, ranges, listings in pages, multipart
uploads that nobody sees before they are complete.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from servers import Server
from servers.threads import serving

PAGE_KEYS = 1000


@contextmanager
def fake_gs() -> Iterator[Server]:
    """Serve while the context is open."""
    buckets: dict[str, _Bucket] = {}
    with serving(_Handler, buckets=buckets) as url:
        account = {"gcs_base_url": url, "disable_oauth": True, "client_email": "", "private_key": ""}
        env = {
            "GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps({**account, "private_key_id": ""}),
            "GOOGLE_ALLOW_HTTP": "true",
        }
        yield Server(
            name="fake_gs",
            url=url,
            root="gs://",
            env=env,
            create_bucket=lambda name: buckets.update({name: _Bucket()}),
        )


@dataclass(frozen=True, slots=True)
class _Object:
    data: bytes
    generation: int
    modified: datetime

    @property
    def etag(self) -> str:
        return f'"{hashlib.md5(self.data).hexdigest()}"'


@dataclass(slots=True)
class _Bucket:
    objects: dict[str, _Object] = field(default_factory=dict)
    uploads: dict[str, tuple[str, dict[int, bytes]]] = field(default_factory=dict)
    """By its number, each upload that is neither complete nor aborted: the key and the parts."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    count: Iterator[int] = field(default_factory=lambda: itertools.count(1))


class _Refused(Exception):
    """What the client asked for cannot be; becomes the reply."""

    def __init__(self, status: HTTPStatus, code: str) -> None:
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    buckets: dict[str, _Bucket]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_DELETE(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""

    def _answer(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size)
        if len(body) < size:  # the client is gone: a half is no object
            self.close_connection = True
            return
        url = urlsplit(self.path)
        name, _, key = url.path.removeprefix("/").partition("/")
        query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        try:
            bucket = self.buckets.get(unquote(name))
            if bucket is None:
                raise _Refused(HTTPStatus.NOT_FOUND, "NoSuchBucket")
            with bucket.lock:
                self._answer_for(bucket, unquote(key), query, body)
        except _Refused as refused:
            self._send(refused.status, f"<Error><Code>{refused.code}</Code></Error>".encode())

    def _answer_for(self, bucket: _Bucket, key: str, query: Mapping[str, str], body: bytes) -> None:
        match self.command:
            case "GET" if not key and "uploads" in query:  # none of obstore's calls: for tests
                keys = [f"<Upload><Key>{escape(key)}</Key></Upload>" for key, _ in bucket.uploads.values()]
                self._send_xml("ListMultipartUploadsResult", *keys)
            case "GET" if not key:
                self._send_listing(bucket, query)
            case "GET" | "HEAD":
                self._send_object(_find(bucket, key))
            case "PUT" if "uploadId" in query:
                _, parts = _find_upload(bucket, key, query)
                parts[int(query["partNumber"])] = body
                self._send(HTTPStatus.OK, headers={"ETag": f'"{hashlib.md5(body).hexdigest()}"'})
            case "PUT" if "x-goog-copy-source" in self.headers:
                source_bucket, _, source = unquote(self.headers["x-goog-copy-source"]).lstrip("/").partition("/")
                if self.buckets.get(source_bucket) is not bucket:
                    raise _Refused(HTTPStatus.NOT_IMPLEMENTED, "NotImplemented")
                self._create(bucket, key, _find(bucket, source).data)
            case "PUT":
                self._create(bucket, key, body)
            case "POST" if "uploads" in query:
                upload = f"upload-{next(bucket.count)}"
                bucket.uploads[upload] = (key, {})
                self._send_xml(
                    "InitiateMultipartUploadResult",
                    f"<Bucket>any</Bucket><Key>{escape(key)}</Key><UploadId>{upload}</UploadId>",
                )
            case "POST" if "uploadId" in query:
                _, parts = _find_upload(bucket, key, query)
                data = _joined(parts, body)
                stored = self._store(bucket, key, data)
                del bucket.uploads[query["uploadId"]]
                self._send_xml("CompleteMultipartUploadResult", f"<ETag>{escape(stored.etag)}</ETag>", stored=stored)
            case "DELETE" if "uploadId" in query:
                _find_upload(bucket, key, query)
                del bucket.uploads[query["uploadId"]]
                self._send(HTTPStatus.NO_CONTENT)
            case "DELETE":
                _find(bucket, key)
                del bucket.objects[key]
                self._send(HTTPStatus.NO_CONTENT)
            case _:
                raise _Refused(HTTPStatus.NOT_IMPLEMENTED, "NotImplemented")

    def _create(self, bucket: _Bucket, key: str, data: bytes) -> None:
        stored = self._store(bucket, key, data)
        self._send(HTTPStatus.OK, headers=_headers(stored))

    def _store(self, bucket: _Bucket, key: str, data: bytes) -> _Object:
        wanted = self.headers.get("x-goog-if-generation-match")
        there = bucket.objects.get(key)
        if wanted is not None and int(wanted) != (0 if there is None else there.generation):
            raise _Refused(HTTPStatus.PRECONDITION_FAILED, "PreconditionFailed")
        bucket.objects[key] = _Object(data, next(bucket.count), datetime.now(UTC))
        return bucket.objects[key]

    def _send_object(self, stored: _Object) -> None:
        if self.headers.get("If-Match", stored.etag) not in (stored.etag, "*"):
            raise _Refused(HTTPStatus.PRECONDITION_FAILED, "PreconditionFailed")
        if self.headers.get("If-None-Match") in (stored.etag, "*"):
            self._send(HTTPStatus.NOT_MODIFIED, headers=_headers(stored))
            return
        wanted = self.headers.get("Range")
        if wanted is None:
            self._send(HTTPStatus.OK, stored.data, _headers(stored))
            return
        first, last = _range(wanted, len(stored.data))
        where = {"Content-Range": f"bytes {first}-{last}/{len(stored.data)}"}
        self._send(HTTPStatus.PARTIAL_CONTENT, stored.data[first : last + 1], {**_headers(stored), **where})

    def _send_listing(self, bucket: _Bucket, query: Mapping[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = query.get("continuation-token") or query.get("start-after", "")
        entries: dict[str, str] = {}
        for key in sorted(bucket.objects):
            head, found, _ = key[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            name = prefix + head + found if found else key
            if key.startswith(prefix) and name > after:
                entries[name] = _prefix_entry(name) if found else _object_entry(name, bucket.objects[name])
        page = list(entries)[: int(query.get("max-keys", PAGE_KEYS))]
        more = len(page) < len(entries)
        self._send_xml(
            "ListBucketResult",
            f"<IsTruncated>{str(more).lower()}</IsTruncated>",
            f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else "",
            *(entries[name] for name in page),
        )

    def _send_xml(self, element: str, *inside: str, stored: _Object | None = None) -> None:
        body = f"<?xml version='1.0' encoding='UTF-8'?><{element}>{''.join(inside)}</{element}>"
        headers = {"x-goog-generation": str(stored.generation)} if stored else {}
        self._send(HTTPStatus.OK, body.encode(), {"Content-Type": "application/xml", **headers})

    def _send(self, status: HTTPStatus, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        if status not in (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED):
            self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _find(bucket: _Bucket, key: str) -> _Object:
    if key not in bucket.objects:
        raise _Refused(HTTPStatus.NOT_FOUND, "NoSuchKey")
    return bucket.objects[key]


def _find_upload(bucket: _Bucket, key: str, query: Mapping[str, str]) -> tuple[str, dict[int, bytes]]:
    upload = bucket.uploads.get(query["uploadId"])
    if upload is None or upload[0] != key:
        raise _Refused(HTTPStatus.NOT_FOUND, "NoSuchUpload")
    return upload


def _joined(parts: Mapping[int, bytes], manifest: bytes) -> bytes:
    """The object that a list of parts describes, whose ETags must be those that were given for them."""
    wanted = ElementTree.fromstring(manifest).findall("{*}Part")
    data = []
    for part in wanted:
        number, etag = int(part.findtext("{*}PartNumber", "0")), part.findtext("{*}ETag", "").strip('"')
        if number not in parts or hashlib.md5(parts[number]).hexdigest() != etag:
            raise _Refused(HTTPStatus.BAD_REQUEST, "InvalidPart")
        data.append(parts[number])
    return b"".join(data)


def _range(wanted: str, size: int) -> tuple[int, int]:
    """First and last byte."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted)
    if found is None or found[0] == "bytes=-":
        raise _Refused(HTTPStatus.BAD_REQUEST, "InvalidArgument")
    first = int(found[1]) if found[1] else max(size - int(found[2]), 0)
    last = min(int(found[2]), size - 1) if found[1] and found[2] else size - 1
    if first > last:
        raise _Refused(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, "InvalidRange")
    return first, last


def _headers(stored: _Object) -> dict[str, str]:
    return {
        "ETag": stored.etag,
        "x-goog-generation": str(stored.generation),
        "Last-Modified": format_datetime(stored.modified, usegmt=True),
    }


def _object_entry(name: str, stored: _Object) -> str:
    return (
        f"<Contents><Key>{escape(name)}</Key><Generation>{stored.generation}</Generation>"
        f"<LastModified>{stored.modified.isoformat()}</LastModified><ETag>{escape(stored.etag)}</ETag>"
        f"<Size>{len(stored.data)}</Size></Contents>"
    )


def _prefix_entry(name: str) -> str:
    return f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
