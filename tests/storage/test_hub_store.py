"""A folder on the hub: one commit is read, one commit is written, and whatever comes in between nothing is lost."""

from __future__ import annotations

import logging
import multiprocessing
import pickle
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from object_stores import Faulty, NewBucket
from servers import Server
from servers.fake_hf import READ_TOKEN, TOKEN
from servers.fault_proxy import FaultProxy
from servers.faults import Answer, CutReply, Fault, LoseReply, Reset, StallReply

from streamprep.crashpoints import HUB_STEPS
from streamprep.errors import UserError
from streamprep.storage import StoreError, check_writable, hub_commit, hub_requests, open_store
from streamprep.storage.hub import HubStore, _pins
from streamprep.storage.hub_requests import HubPlace, parse_hub_url

pytest_plugins = ["object_stores"]

LARGE = bytes(range(256)) * 2**16 * 2 + b"end"  # of three pieces

PUBLISH = """
import sys
from streamprep.storage import open_store
store = open_store(sys.argv[1])
store.put("data/a.parquet", b"a" * 1000, step="data")
store.put("_streamprep/plan.json", b"{}", step="plan")
store.put("_streamprep/attempts/1.json", b"{}", step="attempt")
store.publish_all(leave_out=["_streamprep/attempts"])
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_waits: list[float]) -> list[float]:
    """Seconds instead of minutes, a cache of our own, nothing that an earlier test's process knows; the waits."""
    monkeypatch.setattr(hub_requests, "REQUEST_SECONDS", 1.0)
    monkeypatch.setattr("time.sleep", no_waits.append)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr(hub_requests, "_answered", set())
    _pins.clear()
    return no_waits


@pytest.fixture
def url(fake_hf_server: Server, new_bucket: NewBucket) -> str:
    return f"{new_bucket(fake_hf_server)}/a folder/out"


@pytest.fixture
def proxy(url: str, fake_hf_server: Server, faulty: Faulty) -> FaultProxy:
    """Before the hub that has the repository."""
    return faulty(fake_hf_server)[1]


def open_hub(url: str, **how: Any) -> HubStore:
    """As a process does that has just been started."""
    _pins.clear()
    store = open_store(url, **how)
    assert isinstance(store, HubStore)
    return store


def add(url: str, files: dict[str, bytes], delete: tuple[str, ...] = ()) -> str:
    """What somebody else does; the commit."""
    place = parse_hub_url(url)
    operations = [CommitOperationAdd(place.path(name), data) for name, data in files.items()]
    removed = [CommitOperationDelete(place.path(name)) for name in delete]
    return str(
        HfApi().create_commit(place.repository, [*operations, *removed], commit_message="m", repo_type="dataset").oid
    )


def published(url: str) -> dict[str, bytes]:
    """All that the hub has below a place, as a new reader finds it."""
    store = open_hub(url, spool_dir="/nothing/is/staged/here")
    return {entry.path: store.read(entry.path) for entry in store.walk()}


# --- places


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("hf://datasets/org/name", HubPlace("org/name", None, "")),
        ("hf://datasets/org/name/", HubPlace("org/name", None, "")),
        ("hf://datasets/org/na.me@v1/a b/c/", HubPlace("org/na.me", "v1", "a b/c")),
        ("hf://datasets/org/name@main/a", HubPlace("org/name", None, "a")),
        ("hf://datasets/org/name@refs%2Fpr%2F1/a", HubPlace("org/name", "refs/pr/1", "a")),
    ],
)
def test_urls_of_datasets_name_a_place(url: str, place: HubPlace) -> None:
    assert parse_hub_url(url) == place
    assert parse_hub_url(place.url) == place


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("hf://org/name/x", "only repositories of datasets hold shards"),
        ("hf://models/org/name", "only repositories of datasets hold shards"),
        ("hf://spaces/org/name", "only repositories of datasets hold shards"),
        ("hf://buckets/org/name", "s3://BUCKET/PREFIX, with AWS_ENDPOINT_URL"),
        ("hf://datasets/name", "is hf://datasets/ORG/NAME"),
        ("hf://datasets/org/name/../x", "no empty parts"),
        ("hf://datasets/org/name/a//b", "no empty parts"),
        ("hf://datasets/org/name/a?token=hf_SECRET", r"has no \? or #"),
        ("hf://user:hf_SECRET@datasets/org/name", "no names or passwords in URLs"),
    ],
)
def test_other_urls_of_the_hub_are_refused_without_repeating_secrets(url: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        open_store(url)
    assert "SECRET" not in str(caught.value)


# --- reading


def test_what_is_published_is_read_by_ranges_and_listed_by_pages(url: str, proxy: FaultProxy) -> None:
    names = [f"{number:02d}.json" for number in range(12)]
    add(url, {"large.tar": LARGE, "sub/x#y?.bin": b"x", **{name: name.encode() for name in names}})
    store = open_hub(url)
    assert store.read_range("large.tar", 5, len(LARGE) - 6) == LARGE[5:-1]
    assert store.read("sub/x#y?.bin") == b"x"
    assert [entry.path for entry in store.list()] == [*names, "large.tar"]
    assert [entry.path for entry in store.list("sub")] == ["sub/x#y?.bin"]
    assert [entry.path for entry in store.list(prefix="1")] == ["10.json", "11.json"]
    assert list(store.list("nowhere")) == []
    assert [entry.path for entry in store.walk()] == [*names, "large.tar", "sub/x#y?.bin"]
    assert store.size_bytes("large.tar") == len(LARGE)
    assert store.exists("sub/x#y?.bin") and not store.exists("sub/x") and not store.exists("sub")
    with store.open("large.tar") as file:
        file.seek(-10, 2)
        assert file.read() == LARGE[-10:]
    with pytest.raises(EOFError, match="were expected"):
        store.read_range("large.tar", 10, len(LARGE))
    with pytest.raises(EOFError):
        store.read_range("large.tar", len(LARGE) + 5, 1)
    for use in (store.read, store.open, store.size_bytes, lambda path: store.read_range(path, 0, 1)):
        for name in ("gone", "sub", "00.json/x"):
            with pytest.raises(FileNotFoundError):
                use(name)
    assert store.is_all_published()
    assert store.stats.requests["get"] and store.stats.bytes_read > len(LARGE)
    whole = [request for request in proxy.requests if "large.tar" in request.target and "range" not in request.headers]
    assert not whole


def test_a_repository_that_moves_is_read_as_it_was_first_seen(url: str) -> None:
    first = add(url, {"a": b"old", "b": b"old"})
    store = open_hub(url)
    assert store.read("a") == b"old"
    add(url, {"a": b"new", "c": b"new"}, delete=("b",))
    again, sent = open_store(url), pickle.dumps(store)
    for one in (store, again):
        assert one.read("a") == b"old"
        assert [entry.path for entry in one.list()] == ["a", "b"]
    _pins.clear()  # as in another process
    assert pickle.loads(sent).read("a") == b"old"
    fresh = open_hub(url)
    assert fresh.read("a") == b"new"
    assert [entry.path for entry in fresh.list()] == ["a", "c"]
    by_commit = open_hub(url.replace("/a folder", f"@{first}/a folder"))
    assert by_commit.read("b") == b"old"


def _read_in_a_fork(store: HubStore, answers: Any) -> None:
    try:
        answers.put(store.read_range("large.tar", 0, len(LARGE)) == LARGE)
    except BaseException:
        answers.put(traceback.format_exc())
        raise


def test_a_fork_can_read_what_its_parent_has_read(url: str) -> None:
    add(url, {"large.tar": LARGE})
    store = open_hub(url)
    assert len(store.read_range("large.tar", 0, len(LARGE))) == len(LARGE)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_read_in_a_fork, args=(store, answers))
    child.start()
    assert answers.get(timeout=30) is True
    child.join()


@pytest.mark.parametrize(
    ("what", "fault"),
    [
        *(
            ("/resolve/.*a.json", fault)
            for fault in (
                Answer(503),
                Answer(500),
                Answer(429),
                Reset(),
                CutReply(),
                CutReply(reset=False),
                StallReply(3.0),
            )
        ),
        *((what, fault) for what in ("/tree/", "/datasets/fake/[^/]*$") for fault in (Answer(503), CutReply())),
    ],
    ids=repr,
)
def test_reads_are_sent_again(url: str, proxy: FaultProxy, fault: Fault, what: str) -> None:
    add(url, {"a.json": b"0123456789" * 100})
    rule = proxy.inject(f"^GET .*({what})", fault, times=2)
    store = open_hub(url)
    assert [entry.path for entry in store.list()] == ["a.json"]
    assert store.read("a.json") == b"0123456789" * 100
    assert rule.hits == 2


def test_a_hub_that_is_away_is_waited_for(url: str, proxy: FaultProxy, impatient: list[float]) -> None:
    add(url, {"a": b"1"})
    store = open_hub(url)
    assert store.read("a") == b"1"
    rule = proxy.inject("^GET .*/resolve/", Reset(), times=15)
    assert store.read("a") == b"1"
    assert rule.hits == 15 and 30 < sum(impatient) < 90
    impatient.clear()
    with proxy.refusing(), pytest.raises(StoreError, match="did not answer as it should"):
        store.read("a")
    assert 60 < sum(impatient) <= 90


def test_a_hub_that_has_never_answered_is_given_up_sooner(url: str, proxy: FaultProxy, impatient: list[float]) -> None:
    with proxy.refusing(), pytest.raises(StoreError, match="did not answer as it should"):
        open_hub(url).read("a")
    assert 5 < sum(impatient) <= 15


def test_the_hub_says_how_long_to_wait(url: str, proxy: FaultProxy, impatient: list[float]) -> None:
    add(url, {"a": b"1"})
    proxy.inject("^GET .*/resolve/", Answer(429, retry_after=7), times=1)
    proxy.inject("^GET .*/resolve/", Answer(429, headers=(("RateLimit", '"resolvers";r=0;t=55'),)), times=1)
    assert open_hub(url).read("a") == b"1"
    assert impatient == [7.0, 56.0]
    proxy.inject("^GET .*/resolve/", Answer(429, retry_after=100))
    with pytest.raises(StoreError, match=r"takes no more requests for now .*asks to wait for 100 s") as caught:
        open_hub(url).read("a")
    assert caught.value.passing
    assert impatient[2:] == [100.0] * 3


# --- what is refused


@pytest.mark.parametrize(
    ("name", "token", "said"),
    [
        ("no-such", TOKEN, r"no such repository .*hf auth login.*hf repos create fake/no-such"),
        ("private-1", None, r"no such repository .*hf auth login"),
        ("gated-1", TOKEN, r"is gated: ask for access on its page"),
        ("private-1@no-such", TOKEN, r"has no revision 'no-such'"),
        ("private-1", "hf_wrongSECRET", r"the token was refused \(401, Invalid credentials"),
    ],
)
def test_what_cannot_be_read_is_said_before_anything_is_done(
    fake_hf_server: Server, url: str, name: str, token: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for repository in ("private-1", "gated-1"):
        with suppress(FileExistsError):
            fake_hf_server.create_bucket(repository)
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    for use in (lambda store: store.read("a"), lambda store: list(store.list()), lambda store: store.exists("a")):
        with pytest.raises(UserError, match=said) as caught:
            use(open_hub(f"hf://datasets/fake/{name}/x"))
        assert "SECRET" not in "".join(traceback.format_exception(caught.value))


def test_an_offline_process_asks_nothing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        open_hub(url).read("a")


@pytest.mark.parametrize(
    ("token", "said"),
    [(None, "a token is needed"), (READ_TOKEN, "you must use a write token.*must be allowed to write")],
)
def test_who_may_not_write_is_told_before_any_work(
    url: str, token: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    store = open_hub(url)
    with pytest.raises(UserError, match=said):
        check_writable(store, only_writer=False)
    assert store.is_all_published()


def test_only_a_branch_can_be_added_to(url: str) -> None:
    commit = add(url, {"a": b"1"})
    with pytest.raises(UserError, match="is no branch of the repository"):
        check_writable(open_hub(url.replace("/a folder", f"@{commit}/a folder")), only_writer=False)
    check_writable(open_hub(url), only_writer=False)


# --- staging


def test_what_is_staged_is_seen_by_every_process_here_and_by_nobody_elsewhere(url: str, tmp_path: Path) -> None:
    add(url, {"kept": b"1", "replaced": b"1", "deleted": b"1", "sub/kept": b"1"})
    store = open_hub(url)
    store.put("new", b"2", step="data")
    store.put("replaced", b"2", step="data")
    store.delete("deleted", step="delete")
    assert store.put_if_absent("kept", b"2", step="record") is False
    assert store.put_if_absent("deleted2", b"2", step="record") is True
    with store.new_file() as file:
        file.path.write_bytes(b"2")
        assert file.publish("sub/kept", step="data", replace=False) is False
        assert file.publish("sub/new", step="data", replace=False) is True
    for one in (store, open_hub(url), pickle.loads(pickle.dumps(store))):
        assert {entry.path: one.read(entry.path) for entry in one.walk()} == {
            "kept": b"1", "replaced": b"2", "new": b"2", "deleted2": b"2", "sub/kept": b"1", "sub/new": b"2"
        }  # fmt: skip
        assert [entry.path for entry in one.list("sub")] == ["sub/kept", "sub/new"]
        assert not one.exists("deleted") and one.exists("kept")
        assert one.read_range("kept", 0, 1) == b"1" and one.read_range("new", 0, 1) == b"2"
        assert one.open("kept").read() == b"1"
        with pytest.raises(FileNotFoundError):
            one.read("deleted")
        assert not one.is_all_published()
    assert published(url) == {"kept": b"1", "replaced": b"1", "deleted": b"1", "sub/kept": b"1"}
    other_spool = open_hub(url, spool_dir=str(tmp_path / "spool"))
    assert other_spool.is_all_published() and other_spool.staged_in() != store.staged_in()


def test_a_deleted_file_can_come_again(url: str) -> None:
    add(url, {"a": b"1", "b": b"1"})
    store = open_hub(url)
    for name in ("a", "b"):
        store.delete(name, step="delete")
        store.delete(name, step="delete")
    assert store.put_if_absent("a", b"2", step="record") is True
    assert store.read("a") == b"2"
    store.publish_all()
    assert published(url) == {"a": b"2"}


def test_deleting_what_is_not_there_stages_nothing(url: str) -> None:
    store = open_hub(url)
    store.delete("a", step="delete")
    store.remove_if_empty("a")
    store.remove_unpublished()
    assert store.is_all_published()


# --- publishing


def test_all_is_published_as_one_commit_and_the_local_copy_is_removed(url: str, proxy: FaultProxy) -> None:
    store = open_hub(url)
    check_writable(store, only_writer=False)
    store.put("data/large.parquet", LARGE, step="data")
    store.put("data/empty.parquet", b"", step="data")
    for number in range(9):
        store.put(f"_streamprep/records/{number}.json", b"%d" % number, step="record")
    store.put("_streamprep/attempts/1.json", b"{}", step="attempt")
    folder = store.staged_in()
    assert folder is not None and folder.is_dir()
    store.publish_all(leave_out=["_streamprep/attempts"])
    assert not folder.exists()
    assert store.is_all_published()
    assert store.read("data/large.parquet") == LARGE
    assert not store.exists("_streamprep/attempts/1.json")
    assert proxy.count("^POST .*/commit/main") == 1
    records = {f"_streamprep/records/{number}.json": b"%d" % number for number in range(9)}
    assert published(url) == {"data/large.parquet": LARGE, "data/empty.parquet": b"", **records}
    store.publish_all()
    assert proxy.count("^POST .*/commit/main") == 1


def test_another_process_sees_the_commit_when_the_local_copy_goes(url: str) -> None:
    first, second = open_hub(url), open_hub(url)
    first.put("a", b"1", step="data")
    assert second.read("a") == b"1" and not second.is_all_published()
    place_of_second, pins = second.place, dict(_pins)
    first.publish_all()
    _pins.clear()
    _pins.update(pins)  # as in a process that knows nothing of the new commit
    assert place_of_second == first.place
    assert second.is_all_published()
    assert second.read("a") == b"1"
    assert [entry.path for entry in second.list()] == ["a"]


def test_a_rank_that_comes_late_finds_what_was_published_meanwhile(url: str) -> None:
    late = open_hub(url)
    assert not late.exists("plan")
    pins = dict(_pins)
    other = open_hub(url)
    other.put_if_absent("plan", b"1", step="plan")
    other.publish_all()
    _pins.clear()
    _pins.update(pins)  # as in a process of its own
    assert late.put_if_absent("plan", b"2", step="plan") is False
    assert late.read("plan") == b"1"
    assert late.is_all_published()


@pytest.mark.parametrize(
    ("what", "fault"),
    [
        ("^POST .*/commit/main", LoseReply()),
        ("^POST .*/commit/main", Reset()),
        ("^POST .*/commit/main", Answer(503)),
        ("^POST .*/commit/main", Answer(429, retry_after=3)),
        ("^POST .*/commit/main", Answer(504)),
        ("^PUT /lfs/", Answer(503)),
        ("^PUT /lfs/", Reset()),
        ("^PUT /lfs/", LoseReply()),
        ("^POST .*/lfs/objects/batch", Answer(500)),
        ("^POST .*/preupload/", Answer(503)),
        ("^GET .*/tree/", CutReply()),
    ],
    ids=repr,
)
def test_a_commit_is_made_once_whatever_happens_to_the_requests(
    url: str, proxy: FaultProxy, what: str, fault: Fault, impatient: list[float]
) -> None:
    store = open_hub(url)
    data = url.encode() * 100  # other bytes than in other tests: the hub has those already
    store.put("a.parquet", data, step="data")
    store.put("b.json", b"2", step="data")
    rule = proxy.inject(what, fault, times=1)
    store.publish_all()
    assert rule.hits == 1
    proxy.clear()
    assert published(url) == {"a.parquet": data, "b.json": b"2"}
    assert store.is_all_published()
    commits = sum(request.status == 200 for request in proxy.requests if "/commit/main" in request.target)
    assert commits == 1
    if fault == Answer(429, retry_after=3):
        assert 3.0 in impatient


def test_what_cannot_be_published_stays_and_is_published_later(
    url: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_hub(url)
    store.put("a.parquet", b"1" * 1000, step="data")
    folder = str(store.staged_in())
    for fault, said in (
        (Answer(503), "Nothing is lost: all is in"),
        (Answer(429, retry_after=3600), "takes no more requests for now.*Nothing is lost"),
        (Answer(403), "could not be published: the token was refused .*Nothing is lost"),
    ):
        proxy.inject("^POST .*/commit/main", fault)
        with pytest.raises(StoreError, match=said) as caught:
            store.publish_all()
        assert folder in str(caught.value)
        proxy.clear()
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    with pytest.raises(StoreError, match=r"must use a write token.*Nothing is lost"):
        open_hub(url).publish_all()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    later = open_hub(url)
    assert later.read("a.parquet") == b"1" * 1000
    later.publish_all()
    assert published(url) == {"a.parquet": b"1" * 1000}


def test_secrets_are_in_no_message_and_no_log(
    url: str, proxy: FaultProxy, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.WARNING)
    store = open_hub(url)
    store.put("a.parquet", url.encode() * 100, step="data")
    proxy.inject("^PUT /lfs/", Answer(503), times=2)
    proxy.inject("^POST .*/commit/main", Answer(403))
    with pytest.raises(StoreError) as caught:
        store.publish_all()
    said = "".join((caplog.text, *capfd.readouterr(), *traceback.format_exception(caught.value)))
    assert TOKEN not in said and "/lfs/" not in said
    assert logging.getLogger("huggingface_hub").level != logging.ERROR


def test_a_commit_to_other_files_meanwhile_does_no_harm(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    add(url, {"old": b"1"})
    store = open_hub(url)
    store.put("a", b"1", step="data")
    add(url, {"other": b"1"})
    add(url.replace("/a folder/out", ""), {"README.md": b"# Hi"})
    real, calls = HfApi.create_commit, []

    def create_commit(self: HfApi, *arguments: Any, **options: Any) -> Any:
        if not calls:  # one comes between our look at the head and our commit
            calls.append(add)
            add(url, {"third": b"1"})
        return real(self, *arguments, **options)

    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    store.publish_all()
    assert published(url) == {"old": b"1", "a": b"1", "other": b"1", "third": b"1"}


@pytest.mark.parametrize("theirs", [{"a": b"other"}, {"old": b"other"}], ids=["new", "changed"])
def test_what_somebody_else_has_written_meanwhile_is_not_replaced(url: str, theirs: dict[str, bytes]) -> None:
    add(url, {"old": b"1"})
    store = open_hub(url)
    store.put("a", b"1", step="data")
    store.put("old", b"2", step="data")
    add(url, theirs)
    with pytest.raises(UserError, match="changed by somebody else since this job began") as caught:
        store.publish_all()
    assert str(store.staged_in()) in str(caught.value)
    assert store.read("a") == b"1"
    assert published(url) == {"old": b"1", **theirs}


def test_the_same_published_by_another_machine_is_enough(url: str, proxy: FaultProxy, tmp_path: Path) -> None:
    stores = [open_hub(url, spool_dir=str(tmp_path / name)) for name in ("one", "two")]
    for store in stores:
        store.put("a.parquet", b"1" * 1000, step="data")
        store.put("b", b"1", step="data")
    for store in stores:
        store.publish_all()
        assert store.is_all_published()
    assert proxy.count("^POST .*/commit/main") == 1


def test_the_same_result_of_another_machine_is_enough_whatever_it_says_of_itself(url: str, tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        store = open_hub(url, spool_dir=str(tmp_path / name))
        store._begin()
        store.put("summary", b"two" if name == "three" else b"1", step="data")
        store.put("seconds", name.encode(), step="data")
    add(url, {"before": b"1"})
    for name in ("one", "two"):
        store = open_hub(url, spool_dir=str(tmp_path / name))
        store.publish_all(summary="summary")
        assert store.is_all_published()
        assert published(url) == {"before": b"1", "summary": b"1", "seconds": b"one"}
    with pytest.raises(UserError, match="changed by somebody else"):
        open_hub(url, spool_dir=str(tmp_path / "three")).publish_all(summary="summary")


def test_nothing_is_published_without_its_summary(url: str) -> None:
    add(url, {"summary": b"1"})
    store = open_hub(url)
    store.put("stray", b"1", step="data")
    store.delete("summary", step="delete")
    with pytest.raises(StoreError, match="summary: another process has removed it"):
        store.publish_all(summary="summary")
    assert published(url) == {"summary": b"1"}
    store.put("summary", b"2", step="success")
    store.publish_all(summary="summary")
    assert published(url) == {"summary": b"2", "stray": b"1"}
    store.put("stray", b"2", step="data")
    store.publish_all(summary="summary")  # which is there as it was
    assert published(url) == {"summary": b"2", "stray": b"2"}


def test_a_file_that_the_repository_ignores_is_missed(url: str) -> None:
    store = open_hub(url)
    store.put("a.ignored", b"1", step="data")
    store.put("b", b"1", step="data")
    with pytest.raises(StoreError, match=r"a\.ignored.*the file is not there; .*\.gitignore"):
        store.publish_all()
    assert store.read("a.ignored") == b"1"


@pytest.mark.parametrize(
    "point",
    [
        pytest.param(f"{step}{when}", marks=[] if step == "commit" else pytest.mark.slow)
        for step in HUB_STEPS
        for when in ("", ".after")
    ],
)
def test_a_process_killed_while_publishing_has_published_all_or_nothing(
    url: str, proxy: FaultProxy, point: str, run_python: Callable[..., Any]
) -> None:
    wanted = {"data/a.parquet": b"a" * 1000, "_streamprep/plan.json": b"{}"}
    assert run_python("-c", PUBLISH, url, crash_at=point).returncode == 137
    assert published(url) in ({}, wanted)
    assert (published(url) == wanted) == (point in ("commit.after", "unstage", "unstage.after"))
    store = open_hub(url)
    check_writable(store, only_writer=False)
    for name, data in wanted.items():
        store.put(name, data, step="data")
    store.publish_all(leave_out=["_streamprep/attempts"])
    assert published(url) == wanted
    assert sum(request.status == 200 for request in proxy.requests if "/commit/main" in request.target) == 1
    folder = store.staged_in()
    assert folder is not None
    assert [path.name for path in folder.parent.iterdir()] == [f"{folder.name}.lock"]


def test_a_publisher_whose_files_another_has_published_and_removed_is_content(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = open_hub(url), open_hub(url)
    first.put("a.parquet", b"1" * 1000, step="data")
    real = hub_commit.Publication._commit

    def after_the_other(self: hub_commit.Publication, *arguments: Any) -> str:
        monkeypatch.setattr(hub_commit.Publication, "_commit", real)
        second.publish_all()
        return real(self, *arguments)

    monkeypatch.setattr(hub_commit.Publication, "_commit", after_the_other)
    first.publish_all()
    assert published(url) == {"a.parquet": b"1" * 1000}
    assert first.is_all_published()
