"""The fake hub takes commits from huggingface_hub, each as a whole and after the last only."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from servers.fake_hf import READ_TOKEN
from servers.faults import Answer, LoseReply

if TYPE_CHECKING:
    from object_stores import Faulty, NewBucket

    from servers import Server

pytest_plugins = ["object_stores"]

# In a process of its own: the library reads its environment when it is imported.
PRELUDE = """
import json, sys
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, HfFileSystem, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
api, repo = HfApi(), sys.argv[1]
def commit(files, delete=(), **options):
    operations = [CommitOperationAdd(path, data.encode()) for path, data in files.items()]
    operations += [CommitOperationDelete(path) for path in delete]
    return api.create_commit(repo, operations, commit_message="m", repo_type="dataset", **options).oid
def content(path, **options):
    return open(hf_hub_download(repo, path, repo_type="dataset", **options)).read()
def files():
    return sorted(api.list_repo_files(repo, repo_type="dataset"))
def say(value):
    print(json.dumps(value))
"""


@pytest.fixture
def run(tmp_path: Path) -> Callable[[str, str], Any]:
    """``run(code, repository_url)``: what the code says by ``say``."""

    def run(code: str, url: str) -> Any:
        arguments = [sys.executable, "-c", PRELUDE + code, url.removeprefix("hf://datasets/")]
        ran = subprocess.run(arguments, capture_output=True, text=True, timeout=100)
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout)

    return run


Run = Callable[[str, str], Any]


def test_a_commit_of_many_files_is_read_back(fake_hf_server: Server, new_bucket: NewBucket, run: Run) -> None:
    code = """
first = commit({"a/small.json": "1", "a/data.parquet": "x" * 100, "b.tar": "y"})
second = commit({"a/small.json": "2", "c.tar": "y"}, delete=["b.tar"], parent_commit=first)
say([files(), content("a/small.json"), content("a/small.json", revision=first), content("a/data.parquet"),
     HfFileSystem().ls("datasets/" + repo + "/a", detail=False), api.dataset_info(repo).sha == second])
"""
    url = new_bucket(fake_hf_server)
    listed = [f"{url.removeprefix('hf://')}/a/{name}" for name in ("data.parquet", "small.json")]
    assert run(code, url) == [["a/data.parquet", "a/small.json", "c.tar"], "2", "1", "x" * 100, listed, True]


def test_a_commit_after_another_than_the_last_is_refused(
    fake_hf_server: Server, new_bucket: NewBucket, run: Run
) -> None:
    code = """
first = commit({"a": "1"})
commit({"b": "1"}, parent_commit=first)
try:
    commit({"c": "1"}, parent_commit=first)
except HfHubHTTPError as error:
    say([error.response.status_code, files()])
"""
    assert run(code, new_bucket(fake_hf_server)) == [412, ["a", "b"]]


def test_a_wrong_token_is_refused(
    fake_hf_server: Server, new_bucket: NewBucket, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
try:
    commit({"a": "1"})
except HfHubHTTPError as error:
    say(error.response.status_code)
"""
    url = new_bucket(fake_hf_server)
    for token, status in (("hf_wrong", 401), (READ_TOKEN, 403)):
        monkeypatch.setenv("HF_TOKEN", token)
        assert run(code, url) == status
    assert run("say(files())", url) == []


def test_a_repository_is_created_once(fake_hf_server: Server, new_bucket: NewBucket, run: Run) -> None:
    code = """
api.create_repo(repo, repo_type="dataset", exist_ok=True)
other = repo + "-other"
api.create_repo(other, repo_type="dataset")
try:
    api.create_repo(other, repo_type="dataset")
except HfHubHTTPError as error:
    say([error.response.status_code, api.list_repo_files(other, repo_type="dataset")])
"""
    assert run(code, new_bucket(fake_hf_server)) == [409, []]


def test_uploads_go_through_the_proxy_and_are_tried_again(
    fake_hf_server: Server, new_bucket: NewBucket, faulty: Faulty, run: Run
) -> None:
    url = new_bucket(fake_hf_server)
    _, proxy = faulty(fake_hf_server)
    rule = proxy.inject("^PUT /lfs/", Answer(503), times=1)
    assert run('commit({"a.tar": "1"}); say(content("a.tar"))', url) == "1"
    assert rule.hits == 1
    assert proxy.count("^POST .*/commit/main") == 1


def test_a_commit_whose_reply_is_lost_has_happened(
    fake_hf_server: Server, new_bucket: NewBucket, faulty: Faulty, run: Run
) -> None:
    code = """
try:
    commit({"a.tar": "1"})
except Exception:
    say(files())
"""
    url = new_bucket(fake_hf_server)
    _, proxy = faulty(fake_hf_server)
    proxy.inject("^POST .*/commit/main", LoseReply(), times=1)
    assert run(code, url) == ["a.tar"]
