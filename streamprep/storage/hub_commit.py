"""Publishing: one commit of all that is staged, whatever else happens to the repository meanwhile.

1. Upload what the hub does not have yet (large files by LFS or Xet, from the disk).
2. Commit, on condition that the head is the one we have seen. If the reply is lost, or another commit came first, what
   is there decides: if all of ours is, it is done; if ours is untouched, it is tried on top; else it is refused.
3. Look whether the commit lists every file with its size and digest.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NoReturn

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, get_session
from huggingface_hub.utils.sha import git_hash

from streamprep.crashpoints import crash_point
from streamprep.errors import UserError
from streamprep.progress import Progress, count, size
from streamprep.storage.hub_requests import ERRORS, HubFile, HubRequests, understand
from streamprep.storage.interface import StoreError, StoreStats
from streamprep.storage.staging import Staging

_COMMIT_SECONDS = 300.0
"""Without a byte; a commit of thousands of files takes the hub a while."""
_ATTEMPTS = 6
_LONGEST_WAIT_SECONDS = 900.0
"""For the hub's limit of commits; then the command ends, and the same one goes on."""


class Publication:
    """One commit of all that is staged.

    Args:
        hub: Where to.
        staging: What.
        base: The commit that it adds to.
        stats: Gets the counts.
        leave_out: Folders that do not belong to the result.
    """

    def __init__(
        self, hub: HubRequests, staging: Staging, *, base: str, stats: StoreStats, leave_out: Sequence[str]
    ) -> None:
        self._place, self._hub, self._staging, self._base, self._stats = hub.place, hub, staging, base, stats
        paths = sorted(entry.path for entry in staging.all_files())
        names = [path for path in paths if not any(path.startswith(f"{folder}/") for folder in leave_out)]
        self._additions = {
            name: CommitOperationAdd(self._place.path(name), str(staging.files.root / name)) for name in names
        }
        self._deletions = staging.all_deleted() - self._additions.keys()
        self._progress = Progress(total=len(names), unit="files", verb="publishing")

    def publish(self, summary: str | None) -> str:
        """Make it, unless it is there, or somebody else has made one with the same summary.

        Returns:
            The commit that has all of it.

        Raises:
            UserError: if the hub has other files of these names by now.
            StoreError: if it is not reached, or refuses.
        """
        problem: StoreError | None = None
        for attempt in range(_ATTEMPTS):
            head = self._hub.commit_of(self._place.revision)
            there = {file.path: file for file in self._hub.tree("", head, recursive=True)}
            if summary is not None and (
                summary in self._deletions or summary not in self._additions.keys() | there.keys()
            ):
                raise StoreError(
                    f"{self._place.url}/{summary}", "another process has removed it: run the same command again"
                )
            missing = [name for name, addition in self._additions.items() if not _is(addition, there.get(name))]
            surplus = sorted(self._deletions & there.keys())
            if not missing and not surplus:
                self._say(head)
                return head
            if head != self._base:
                before = {file.path: file for file in self._hub.tree("", self._base, recursive=True)}
                if summary is not None and self._is_new_and_ours(summary, before, there):
                    self._say(head)
                    return head
                self._check_untouched(head, before, there)
            wait = 0.5 * 2**attempt
            try:
                commit = self._commit(head, missing, surplus)
            except _NotNow as trouble:
                problem, wait = trouble.problem, max(wait, trouble.wait_seconds)
                if wait > _LONGEST_WAIT_SECONDS or attempt == _ATTEMPTS - 1:
                    break
                time.sleep(wait)
            else:
                self._check(commit)
                self._say(commit)
                return commit
        assert problem is not None
        raise StoreError(
            problem.url,
            f"{problem.what}. Nothing is lost: all is in {self._staging.folder}, and the same command publishes it",
            passing=True,
        )

    def _commit(self, head: str, missing: Sequence[str], surplus: Sequence[str]) -> str:
        additions = [self._additions[name] for name in missing]
        num_bytes = sum(addition.upload_info.size for addition in additions)
        removed = f", {count(len(surplus), 'file')} removed" if surplus else ""
        self._progress.message(
            f"publishing {count(len(missing), 'file')} ({size(num_bytes)}){removed} as one commit to {self._place.url}"
        )
        crash_point("commit")
        try:
            with _quiet():
                made = HfApi(library_name="streamprep").create_commit(
                    self._place.repository,
                    [*(CommitOperationDelete(self._place.path(name)) for name in surplus), *additions],
                    commit_message=f"{count(len(missing), 'file')} of streamprep in {self._place.folder or '/'}",
                    repo_type="dataset",
                    revision=self._place.revision,
                    parent_commit=head,
                )
        except ERRORS as error:
            if self._staging.base() != self._base:
                raise  # the files are gone: published
            trouble = understand(error, self._place)
            if trouble.kind not in ("passing", "conflict"):
                self._refused(trouble.what)
            raise _NotNow(StoreError(self._place.url, trouble.what, True), trouble.wait_seconds or 0.0) from None
        finally:
            self._stats.count("put", number=len(missing) + 1, bytes_written=num_bytes)
        crash_point("commit.after")
        return str(made.oid)

    def _refused(self, what: str) -> NoReturn:
        raise StoreError(
            self._place.url,
            f"it could not be published: {what}. Nothing is lost: all is in {self._staging.folder}, and the same "
            "command publishes it",
        )

    def _check(self, commit: str) -> None:
        """Does the commit have all of it?"""
        there = {file.path: file for file in self._hub.tree("", commit, recursive=True)}
        for name, addition in self._additions.items():
            if not _is(addition, there.get(name)):
                raise StoreError(
                    f"{self._place.url}/{name}",
                    f"the hub has taken commit {commit}, but the file is "
                    + (
                        "another one there"
                        if name in there
                        else "not there; is it named in the repository's .gitignore?"
                    )
                    + f" All is still in {self._staging.folder}",
                )

    def _is_new_and_ours(self, name: str, before: Mapping[str, HubFile], now: Mapping[str, HubFile]) -> bool:
        addition = self._additions.get(name)
        return addition is not None and now.get(name) != before.get(name) and _is(addition, now.get(name))

    def _check_untouched(self, head: str, before: Mapping[str, HubFile], there: Mapping[str, HubFile]) -> None:
        """Refuse to replace what somebody else has put there since the job began."""
        for name in (*self._additions, *sorted(self._deletions)):
            now = there.get(name)
            if now != before.get(name) and not (name in self._additions and _is(self._additions[name], now)):
                raise UserError(
                    f"{self._place.url}/{name} was {'changed' if now else 'removed'} by somebody else since this job "
                    f"began (commit {self._base[:12]} then, {head[:12]} now): what is encoded stays in "
                    f"{self._staging.folder}. Publish to another place, or put the repository back as it was and run "
                    "the same command again"
                )

    def _say(self, commit: str) -> None:
        self._progress.message(
            f"published as commit {commit[:12]}: the hub lists all of {count(len(self._additions), 'file')}; the local "
            f"copy in {self._staging.folder} is removed"
        )


class _NotNow(Exception):
    """The commit was not made, or may not have been."""

    def __init__(self, problem: StoreError, wait_seconds: float) -> None:
        super().__init__(str(problem))
        self.problem, self.wait_seconds = problem, wait_seconds


def _is(addition: CommitOperationAdd, found: HubFile | None) -> bool:
    """Whether a file on the hub is this one, by its digest."""
    if found is None or found.size_bytes != addition.upload_info.size:
        return False
    if found.sha256 is not None:
        return bool(addition.upload_info.sha256.hex() == found.sha256)
    with addition.as_file() as file:
        return bool(git_hash(file.read()) == found.blob)


@contextmanager
def _quiet() -> Iterator[None]:
    """huggingface_hub shows bars, and in its warnings URLs that are signed; and it would wait for ever."""
    logger, had_bars = logging.getLogger("huggingface_hub"), not are_progress_bars_disabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    if had_bars:
        disable_progress_bars()
    session = get_session()
    timeout = getattr(session, "timeout", None)
    if hasattr(session, "timeout"):
        session.timeout = _COMMIT_SECONDS
    try:
        yield
    finally:
        logger.setLevel(level)
        if had_bars:
            enable_progress_bars()
        if hasattr(session, "timeout"):
            session.timeout = timeout
