"""A local folder for what is not published yet: files that are new, and the names of those that are to go.

``base.json`` names the commit that it adds to; the folder counts from the moment that file is there. It is removed as a
whole, in one step, when all of it is published. Any number of processes may use it at once.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from streamprep import canonical
from streamprep.crashpoints import crash_point
from streamprep.storage.interface import FileEntry
from streamprep.storage.local import LocalStore

_REMOVED = ".published-"


class Staging:
    """The folder, which need not be there.

    Args:
        folder: Where.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = LocalStore(folder / "files")
        """What is new."""
        self._deleted = LocalStore(folder / "deleted")
        self._itself = LocalStore(folder)

    def base(self) -> str | None:
        """The commit that is added to; None if nothing is staged."""
        try:
            return str(json.loads(self._itself.read("base.json"))["commit"])
        except (FileNotFoundError, NotADirectoryError):
            return None

    def begin(self, head: Callable[[], str], *, url: str) -> None:
        """From now on something is staged; it is no error if it is already.

        Args:
            head: Asks for the commit to add to. It is asked while no other process can begin, and publish what this one
                would know nothing of.
            url: For people.
        """
        with self._lock():
            if self.base() is None:
                data = canonical.to_pretty_json({"url": url, "commit": head()})
                self._itself.put_if_absent("base.json", data, step="base")

    def remove(self, *, base: str) -> None:
        """All is published: nothing is staged any more, unless something else has been begun since."""
        gone = self.folder.with_name(f"{self.folder.name}{_REMOVED}{uuid.uuid4().hex[:8]}")
        with self._lock():
            if self.base() != base:
                return
            crash_point("unstage")
            self.folder.rename(gone)
        crash_point("unstage.after")
        shutil.rmtree(gone, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what a process has left that was killed while it removed the folder."""
        for rest in self.folder.parent.glob(f"{self.folder.name}{_REMOVED}*"):
            shutil.rmtree(rest, ignore_errors=True)

    def all_files(self, folder: str = "") -> Iterator[FileEntry]:
        """All that is new below a folder."""
        for inside, subfolders, _ in os.walk(self.files.root / folder):
            relative = Path(inside).relative_to(self.files.root)
            if relative == Path():
                subfolders[:] = [name for name in subfolders if name != ".tmp"]
            yield from self.files.list("" if relative == Path() else str(relative))

    def delete(self, path: str, *, step: str) -> None:
        """Note that a published file is to go."""
        self._deleted.put(quote(path, safe=""), path.encode(), step=step)

    def is_deleted(self, path: str) -> bool:
        """Whether it is noted so."""
        return self._deleted.exists(quote(path, safe=""))

    def all_deleted(self) -> set[str]:
        """The names of those that are to go."""
        return {self._deleted.read(entry.path).decode() for entry in self._deleted.list()}

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Held for a moment, to begin and to end."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with open(self.folder.with_name(f"{self.folder.name}.lock"), "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def staging_folder(url: str, name: str, spool_dir: str | None) -> Path:
    """Where a URL's files are staged: the same place whenever and by whatever command it is asked for.

    Args:
        url: That decides, with what else tells it apart.
        name: For people.
        spool_dir: The user's; by default the user's folder of caches, as that of temporary files may be emptied.
    """
    if spool_dir is not None:
        parent = Path(spool_dir) / f"streamprep-staging-{os.getuid()}"
    else:
        caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        parent = Path(caches).expanduser() / "streamprep" / "staging"
    safe = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)[:80]
    return Path(os.path.abspath(parent)) / f"{safe}-{canonical.bytes_digest(url.encode())[:12]}"  # noqa: PTH100
