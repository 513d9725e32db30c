"""Requests to the Hugging Face hub, and what its answers mean: sent again within limits, put into words.

huggingface_hub knows the endpoint (``HF_ENDPOINT``), the token (``HF_TOKEN``, or what ``hf auth login`` has kept) and
the HTTP client; it makes the commits. What is only read is asked for here: its own functions have no limit to how long
an answer may take, or fetch whole files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from errno import ENOENT
from typing import Any, Literal, NoReturn, TypeVar
from urllib.parse import quote, unquote

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from streamprep import __version__
from streamprep.errors import UserError, first_line
from streamprep.storage.interface import FileEntry, StoreError, StoreStats
from streamprep.storage.patience import Patience, patience_seconds
from streamprep.storage.places import without_secrets

REQUEST_SECONDS = 60.0
"""Without a byte; then a request is given up and sent again."""
_LIMIT_SECONDS = 330.0
"""How long a request may wait that the hub has asked to: it counts requests by windows of five minutes."""

ERRORS = (HfHubHTTPError.__bases__[0], OSError, RuntimeError, ValueError)
"""What huggingface_hub raises: the first is of the HTTP client that it uses, which is not the same in all versions;
RuntimeError is hf_xet's, ValueError that of an answer which it cannot read."""

Kind = Literal["missing", "refused", "passing", "conflict", "too short", "other"]

T = TypeVar("T")

_URL = re.compile(r"hf://datasets/(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.%-]+))?(/(?P<folder>.*))?")
_OTHER_REPOSITORIES = re.compile(r"hf://(?P<kind>models|spaces|buckets|[\w.-]+)(/|$)")


@dataclass(frozen=True, slots=True)
class HubPlace:
    """A folder of a dataset's repository."""

    repository: str
    """``ORG/NAME``."""
    revision: str | None
    """Branch, tag or commit; None is the main branch."""
    folder: str
    """Without slashes at its ends; may be empty."""

    @property
    def url(self) -> str:
        """As a user would write it."""
        revision = f"@{quote(self.revision, safe='')}" if self.revision else ""
        return f"hf://datasets/{self.repository}{revision}" + (f"/{self.folder}" if self.folder else "")

    def path(self, name: str) -> str:
        """In the repository, of a name below the folder."""
        return f"{self.folder}/{name}" if self.folder and name else self.folder or name


def parse_hub_url(url: str) -> HubPlace:
    """What ``hf://datasets/ORG/NAME[@REVISION][/FOLDER]`` means.

    Raises:
        UserError: if it is another URL.
    """
    found = _URL.fullmatch(url)
    if found is None:
        raise UserError(_why_not(url))
    folder = (found["folder"] or "").rstrip("/")
    if "?" in folder or "#" in folder:
        raise UserError(f"{url.split('?')[0].split('#')[0]}: a folder of a repository has no ? or #")
    if folder and any(part in ("", ".", "..", ".git") for part in folder.split("/")):
        raise UserError(f"{url}: a folder of a repository has no empty parts, '.', '..' or '.git'")
    revision = unquote(found["revision"] or "main")
    return HubPlace(found["repository"], None if revision == "main" else revision, folder)


def _why_not(url: str) -> str:
    form = "a folder of a dataset's repository is hf://datasets/ORG/NAME[@REVISION]/FOLDER"
    other = _OTHER_REPOSITORIES.match(url)
    shown = url.split("?")[0]  # what follows may be a secret
    if "@" in url.removeprefix("hf://").partition("/")[0]:
        return (
            f"hf://...@{url.partition('@')[2].split('?')[0]}: no names or passwords in URLs; run `hf auth login`, or "
            "set HF_TOKEN"
        )
    if other is not None and other["kind"] == "buckets":
        return (
            f"{shown}: the hub's buckets are reached by their S3 API: s3://BUCKET/PREFIX, with AWS_ENDPOINT_URL "
            "and its keys in the environment"
        )
    if other is not None and other["kind"] != "datasets":
        return f"{shown}: of the hub, only repositories of datasets hold shards and latents: {form}"
    return f"{shown}: {form}"


@dataclass(frozen=True, slots=True)
class Trouble:
    """What went wrong with a request."""

    kind: Kind
    what: str
    """In words, without secrets; and what to check."""
    wait_seconds: float | None = None
    """As the hub has asked for."""


def understand(error: BaseException, place: HubPlace) -> Trouble:
    """Put an error of huggingface_hub's into words."""
    login = "run `hf auth login`, or set HF_TOKEN"
    if isinstance(error, OfflineModeIsEnabled):
        return Trouble("refused", "HF_HUB_OFFLINE is set in the environment: the hub is not asked")
    if isinstance(error, RevisionNotFoundError):
        return Trouble("refused", f"the repository has no revision {place.revision or 'main'!r}")
    if isinstance(error, GatedRepoError):
        return Trouble("refused", f"the repository is gated: ask for access on its page; then {login}")
    if isinstance(error, DisabledRepoError):
        return Trouble("refused", "the hub has disabled access to this repository")
    if isinstance(error, RepositoryNotFoundError):
        return Trouble(
            "refused",
            f"there is no such repository of a dataset, or it needs a login. Check the name; if it is private, "
            f"{login}; a new one is made by `hf repos create {place.repository} --repo-type dataset --private`",
        )
    if isinstance(error, EntryNotFoundError):
        return Trouble("missing", "there is no such file")
    if not isinstance(error, HfHubHTTPError) or error.response is None:
        kind: Kind = "other" if isinstance(error, ValueError) else "passing"
        said = f"{type(error).__name__}: {first_line(error)}" if isinstance(error, Exception) else str(error)
        return Trouble(kind, f"the hub did not answer as it should ({without_secrets(said)})")
    status = int(error.response.status_code)
    said = without_secrets(", ".join(filter(None, (str(status), *_one_line(error.server_message)))))
    if status in (401, 403):
        whose = "the token" if get_token() else "without a token it"
        return Trouble("refused", f"{whose} was refused ({said}). Check what the token may do, or {login}")
    if status in (409, 412):
        return Trouble("conflict", f"somebody else has made a commit meanwhile ({said})")
    if status == 416:
        return Trouble("too short", said)
    if status == 429:
        return Trouble("passing", f"the hub takes no more requests for now ({said})", _asked_to_wait(error.response))
    if status == 408 or status >= 500:
        what = f"the hub did not answer as it should, nor when asked again ({said})"
        return Trouble("passing", what, _asked_to_wait(error.response))
    return Trouble("other", f"the hub answered {said}")


def _one_line(message: str | None) -> list[str]:
    return [" ".join(message.split())[:300]] if message else []


def _asked_to_wait(response: Any) -> float | None:
    """By ``Retry-After``, or by the hub's own ``RateLimit: "api";r=0;t=55``."""
    after = response.headers.get("Retry-After", "").strip()
    if after.isdecimal():
        return float(after)
    found = re.search(r"\bt=(\d+)", response.headers.get("RateLimit", ""))
    return float(found[1]) + 1 if found and response.status_code == 429 else None


_answered: set[str] = set()
"""Repositories that have given this process what it asked for: so the request is right, and trouble is the hub's."""


class HubRequests:
    """What is asked of one place; counts.

    Args:
        place: Which.
        stats: Gets the counts.
        answered: Whether another process has seen that the place is there.
    """

    def __init__(self, place: HubPlace, stats: StoreStats, *, answered: bool = False) -> None:
        self.place, self._stats = place, stats
        if answered:
            _answered.add(place.repository)

    @property
    def answered(self) -> bool:
        """Whether the repository has been seen."""
        return self.place.repository in _answered

    def commit_of(self, revision: str | None) -> str:
        """The commit that a revision means now."""
        at = f"/revision/{quote(revision, safe='')}" if revision else ""
        response = self._get(f"{self._api}{at}", "head", "", params={"expand": "sha"})
        return str(response.json()["sha"])

    def is_branch(self, name: str) -> bool:
        """Whether a revision is one that commits can be added to."""
        branches = self._get(f"{self._api}/refs", "list", "").json()["branches"]
        return any(branch["name"] == name for branch in branches)

    def check_may_write(self) -> None:
        """Ask whether the token may add commits.

        Raises:
            UserError: if not. A hub that does not know the question is believed to let us.
        """
        if get_token() is None:
            raise UserError(
                f"{self.place.url}: to write there a token is needed: run `hf auth login`, or set HF_TOKEN to one that "
                "may write"
            )
        try:
            self._get(f"{self._api}/auth-check/write", "head", "")
        except FileNotFoundError:
            return
        except (UserError, StoreError) as error:
            if isinstance(error, StoreError) and error.passing:
                raise
            raise UserError(f"{error}. It must be allowed to write to the repository") from None

    def read(self, path: str, commit: str, *, start: int | None = None, size: int | None = None) -> bytes:
        """A file, or at most ``size`` bytes of it; fewer where it ends."""
        headers = {"Accept-Encoding": "identity"}
        if start is not None and size is not None:
            headers["Range"] = f"bytes={start}-{start + size - 1}"
        url = f"{constants.ENDPOINT}/datasets/{self.place.repository}/resolve/{commit}/{quote(self.place.path(path))}"
        try:
            response = self._get(url, "get", path, headers=headers)
        except _TooShort:
            return b""
        data = bytes(response.content)
        if start is not None and size is not None and response.status_code == 200:  # it takes no notice of ranges
            data = data[start : start + size]
        return data

    def tree(self, folder: str, commit: str, *, recursive: bool = False) -> Iterator[HubFile]:
        """The files of a folder; none if there is no such folder."""
        path = self.place.path(folder)
        url: str | None = f"{self._api}/tree/{commit}" + (f"/{quote(path)}" if path else "")
        params: dict[str, str] | None = {"recursive": "true"} if recursive else None
        start = f"{self.place.folder}/" if self.place.folder else ""
        while url is not None:
            try:
                response = self._get(url, "list", folder, params=params)
            except FileNotFoundError:
                return
            for entry in response.json():
                if entry["type"] == "file":
                    yield HubFile.of(entry, path=entry["path"].removeprefix(start))
            url, params = response.links.get("next", {}).get("url"), None  # whose query is complete

    @property
    def _api(self) -> str:
        return f"{constants.ENDPOINT}/api/datasets/{self.place.repository}"

    def _get(self, url: str, kind: str, path: str, headers: dict[str, str] | None = None, params: Any = None) -> Any:
        def request() -> Any:
            headers_of_all = build_hf_headers(library_name="streamprep", library_version=__version__)
            try:
                response = get_session().get(
                    url, headers={**headers_of_all, **(headers or {})}, params=params, timeout=REQUEST_SECONDS
                )
                hf_raise_for_status(response)
            finally:
                self._stats.count(kind)
            return response

        response = self.asked(request, path)
        if kind == "get":
            self._stats.count(kind, number=0, bytes_read=len(response.content))
        return response

    def asked(self, request: Callable[[], T], path: str) -> T:
        """What a request gives, which is made again while its trouble may pass; its errors become ours."""
        patience = Patience()
        while True:
            try:
                result = request()
                _answered.add(self.place.repository)
                return result
            except ERRORS as error:
                trouble = understand(error, self.place)
                heard = self.answered or getattr(error, "response", None) is not None
                seconds = patience_seconds(heard=heard) if trouble.wait_seconds is None else _LIMIT_SECONDS
                said = f"{self.place.url}: {trouble.what}"
                if trouble.kind != "passing" or not patience.wait(said, seconds, at_least=trouble.wait_seconds):
                    self.fail(trouble, path)

    def fail(self, trouble: Trouble, path: str) -> NoReturn:
        """Raise what a trouble is for us."""
        url = f"{self.place.url}/{path}" if path else self.place.url
        if trouble.kind == "missing":
            raise FileNotFoundError(ENOENT, trouble.what, url) from None
        if trouble.kind == "too short":
            raise _TooShort from None
        if trouble.kind == "refused" and not self.answered:
            raise UserError(f"{url}: {trouble.what}") from None
        what = trouble.what
        if trouble.wait_seconds is not None:
            what += f"; it asks to wait for {trouble.wait_seconds:.0f} s"
        raise StoreError(url, what, passing=trouble.kind == "passing") from None


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file as the hub lists it."""

    path: str
    """Below the place's folder."""
    size_bytes: int
    blob: str
    """Git's digest of the content, or of what stands for it if the file is large."""
    sha256: str | None
    """Of a large file (LFS)."""

    @classmethod
    def of(cls, entry: dict[str, Any], *, path: str) -> HubFile:
        """Out of the hub's JSON."""
        large = entry.get("lfs")
        size = large["size"] if large else entry["size"]
        return cls(path=path, size_bytes=size, blob=entry["oid"], sha256=large["oid"] if large else None)

    def as_entry(self) -> FileEntry:
        """As a store lists it."""
        return FileEntry(self.path, self.size_bytes, self.sha256 or self.blob)


class _TooShort(Exception):
    """The range begins behind the end."""
