"""A bucket behind a proxy that makes requests fail: nothing is lost or half visible, and errors say what to do."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import subprocess
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from object_stores import Faulty, NewBucket
from servers import Server
from servers.fault_proxy import FaultProxy
from servers.faults import Answer, CutReply, Fault, Flip, LoseReply, Reset, StallReply
from servers.s3_buckets import unfinished_uploads

from streamprep.claims import is_to_blame
from streamprep.errors import UserError
from streamprep.shards import Member, read_member
from streamprep.storage import StoreError, check_writable, objects, open_store, patience, places
from streamprep.storage.objects import ObjectStore

pytest_plugins = ["object_stores"]

LARGE = bytes(range(256)) * 2**16 + b"end"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_waits: list[float]) -> list[float]:
    """Seconds instead of minutes, and a spool of our own; what would have been waited."""
    monkeypatch.setattr(places, "REQUEST_SECONDS", 3.0)
    monkeypatch.setattr(places, "MAX_RETRIES", 1)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return no_waits


@pytest.fixture
def bucket(moto_server: Server, new_bucket: NewBucket, faulty: Faulty) -> tuple[ObjectStore, FaultProxy]:
    """A store that goes through a proxy, and has had its first answer."""
    url = new_bucket(moto_server)
    _, proxy = faulty(moto_server)
    store = open_store(f"{url}/place")
    assert isinstance(store, ObjectStore)
    store.put("there", b"0123456789", step="data")
    return store, proxy


def publish(store: ObjectStore, path: str, data: bytes, *, replace: bool = True) -> bool:
    with store.new_file() as file:
        file.path.write_bytes(data)
        return file.publish(path, step="data", replace=replace)


def kinds(proxy: FaultProxy) -> Counter[str]:
    return Counter(request.kind for request in proxy.requests)


# --- trouble that passes


@pytest.mark.parametrize(
    "fault",
    [Answer(500), Answer(503), Answer(429), Reset(), CutReply(), CutReply(reset=False), StallReply(30), LoseReply()],
    ids=lambda fault: (
        f"{type(fault).__name__}{getattr(fault, 'status', '')}{'' if getattr(fault, 'reset', 1) else 'close'}"
    ),
)
def test_trouble_that_passes_is_not_seen(bucket: tuple[ObjectStore, FaultProxy], fault: Fault) -> None:
    store, proxy = bucket
    rules = [proxy.inject(f"^{method} ", fault, times=1) for method in ("GET", "PUT", "HEAD", "POST")]
    publish(store, "large", LARGE)
    assert store.size_bytes("large") == len(LARGE)
    assert store.read_range("large", 3, len(LARGE) - 3) == LARGE[3:]
    store.put("small", b"1", step="data")
    assert store.read("small") == b"1"
    assert [entry.path for entry in store.list()] == ["large", "small", "there"]
    assert store.put_if_absent("record", b"1", step="record") is True
    store.delete("small", step="delete")
    assert not store.exists("small")
    assert sum(rule.hits for rule in rules) == 4


def test_what_is_deleted_while_it_is_read_is_not_there(bucket: tuple[ObjectStore, FaultProxy]) -> None:
    """The client says so in another way if it had half of it: a rank ended by it, as a mark was withdrawn just then."""
    store, proxy = bucket
    proxy.inject("^GET ", CutReply(), times=1)
    proxy.inject("^GET .*there", Answer(404, code="NoSuchKey"))
    with pytest.raises(FileNotFoundError, match="there is no such object"):
        store.read("there")


@pytest.mark.parametrize(
    "fault",
    [CutReply(), CutReply(reset=False), pytest.param(StallReply(30), marks=pytest.mark.slow), LoseReply(), Reset()],
    ids=["cut", "closed", "stalled", "lost", "reset"],
)
def test_a_listing_or_a_deletion_that_breaks_off_is_asked_for_again(
    bucket: tuple[ObjectStore, FaultProxy], fault: Fault
) -> None:
    """The client sends neither again once there is a connection; ranks ended by it."""
    store, proxy = bucket
    rules = [proxy.inject(pattern, fault, times=2) for pattern in ("^GET .*list-type", "^POST .*delete")]
    assert [entry.path for entry in store.list()] == ["there"]
    store.delete("there", step="delete")
    assert [rule.hits for rule in rules] == [2, 2]
    proxy.clear()
    assert not store.exists("there")


@pytest.mark.parametrize(
    "fault", [LoseReply(), CutReply(), StallReply(30, at=0)], ids=lambda fault: type(fault).__name__
)
def test_a_lost_reply_to_a_creation_is_settled_by_reading_back(
    bucket: tuple[ObjectStore, FaultProxy], fault: Fault
) -> None:
    store, proxy = bucket
    proxy.inject("^PUT .*record", fault, times=1)
    assert store.put_if_absent("record", b"ours", step="record") is True
    proxy.inject("^PUT .*other", fault, times=1)
    assert publish(store, "other", LARGE, replace=False) is True
    assert store.read("other") == LARGE
    proxy.inject("^PUT .*record", fault, times=1)
    assert store.put_if_absent("record", b"mine", step="record") is False
    assert store.read("record") == b"ours"


def test_a_creation_that_succeeded_though_it_was_answered_by_500_is_ours(
    bucket: tuple[ObjectStore, FaultProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, proxy = bucket
    assert store.put_if_absent("record", b"ours", step="record") is True  # what the first, unanswered try did
    proxy.inject("^PUT .*record", Answer(500), times=1)
    assert store.put_if_absent("record", b"ours", step="record") is True


def test_a_conflict_is_tried_again_until_it_is_known_who_was_first(bucket: tuple[ObjectStore, FaultProxy]) -> None:
    store, proxy = bucket
    conflict = Answer(409, code="ConditionalRequestConflict")
    proxy.inject("^PUT .*record", conflict, times=2)
    assert store.put_if_absent("record", b"ours", step="record") is True
    assert store.read("record") == b"ours"
    proxy.inject("^PUT .*busy", conflict)
    with pytest.raises(StoreError, match="other writers kept it busy"):
        store.put_if_absent("busy", b"ours", step="record")


def test_a_lost_reply_that_was_never_a_request_is_asked_again(bucket: tuple[ObjectStore, FaultProxy]) -> None:
    store, proxy = bucket
    rule = proxy.inject("^PUT .*record", Reset(), times=1)
    assert store.put_if_absent("record", b"ours", step="record") is True
    assert rule.hits == 1
    assert store.read("record") == b"ours"


def test_each_kind_of_request_outlasts_a_store_that_is_away(
    moto_server: Server, new_bucket: NewBucket, faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no patience but the client's, which gives up after half a second here."""
    monkeypatch.undo()
    monkeypatch.setattr(places, "MAX_RETRIES", 1)
    url = new_bucket(moto_server)
    _, proxy = faulty(moto_server)
    store = open_store(f"{url}/place")
    assert isinstance(store, ObjectStore)
    for name in ("there", "away"):
        store.put(name, b"0123456789", step="data")
    requests: dict[str, Callable[[], object]] = {
        "get": lambda: store.read("there"),
        "get range": lambda: store.read_range("there", 2, 3),
        "get ranges side by side": lambda: store.open("there").read(),
        "head": lambda: store.size_bytes("there"),
        "list": lambda: [entry.path for entry in store.list(prefix="the")],
        "walk": lambda: "there" in {entry.path for entry in store.walk()},
        "put": lambda: store.put("small", b"1", step="data"),
        "put in parts": lambda: publish(store, "large", LARGE),
        "create": lambda: store.put_if_absent("record", b"ours", step="record"),
        "create a file": lambda: publish(store, "file", b"ours", replace=False),
        "probe": lambda: store.check_create_only(),
        "delete": lambda: store.delete("away", step="delete"),
    }
    with ThreadPoolExecutor(len(requests)) as pool:
        with proxy.refusing():
            replies = {kind: pool.submit(request) for kind, request in requests.items()}
            time.sleep(4.0)
            assert not [kind for kind, reply in replies.items() if reply.done()]
        assert {kind: reply.result(timeout=30) for kind, reply in replies.items()} == {
            "get": b"0123456789",
            "get range": b"234",
            "get ranges side by side": b"0123456789",
            "head": 10,
            "list": ["there"],
            "walk": True,
            "put": None,
            "put in parts": True,
            "create": True,
            "create a file": True,
            "probe": True,
            "delete": None,
        }
    assert store.read("large") == LARGE and store.read("record") == store.read("file") == b"ours"
    assert not store.exists("away")
    assert unfinished_uploads(moto_server.env, url) == []


def test_a_part_that_fails_is_sent_again_and_not_all_of_the_upload(bucket: tuple[ObjectStore, FaultProxy]) -> None:
    store, proxy = bucket
    rule = proxy.inject("^PUT .*partNumber=2", Answer(503), times=places.MAX_RETRIES + 3)
    publish(store, "large", LARGE)
    assert rule.hits == places.MAX_RETRIES + 3
    assert kinds(proxy)["start multipart"] == 1
    assert store.read("large") == LARGE


# --- trouble that stays


@pytest.mark.parametrize("kind", ["get", "put", "create", "list", "delete", "walk"])
def test_a_request_that_stalls_has_one_time_for_all_that_belongs_to_it(
    kind: str, bucket: tuple[ObjectStore, FaultProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, proxy = bucket
    monkeypatch.setattr(places, "REQUEST_SECONDS", 0.6)
    monkeypatch.setattr(places, "RETRY_SECONDS", 0.1)
    monkeypatch.setattr(patience, "PATIENCE_SECONDS", 2.0)
    requests: dict[str, Callable[[], object]] = {
        "get": lambda: store.read("there"),
        "put": lambda: store.put("small", b"1", step="data"),
        "create": lambda: store.put_if_absent("record", b"ours", step="record"),
        "list": lambda: list(store.list()),
        "delete": lambda: store.delete("there", step="delete"),
        "walk": lambda: list(store.walk()),
    }
    store._clients.clear()
    before = len(proxy.requests)
    proxy.inject("", StallReply(30, at=0))
    began = time.monotonic()
    with pytest.raises(StoreError, match="did not answer as it should"):
        requests[kind]()
    assert time.monotonic() - began < 2.0 + 2 * 0.6
    assert 2 <= len(proxy.requests) - before <= 4


def test_a_store_that_has_never_answered_is_given_up_sooner(
    bucket: tuple[ObjectStore, FaultProxy], impatient: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, proxy = bucket
    monkeypatch.setattr(places, "MAX_RETRIES", 0)
    store._clients.clear()

    def waits_of(one: ObjectStore) -> float:
        impatient.clear()
        with pytest.raises(StoreError, match="Connection refused"):
            one.read("there")
        return sum(impatient)

    for one in (store, open_store(store.url), pickle.loads(pickle.dumps(store))):
        assert one.read("there")
        with proxy.refusing():
            assert 60 < waits_of(one) <= patience.PATIENCE_SECONDS
            assert 5 < waits_of(one) <= patience.FIRST_PATIENCE_SECONDS  # what there is still to do
            assert waits_of(pickle.loads(pickle.dumps(one))) > 60  # another process begins anew
    monkeypatch.setattr(objects, "_heard", set())
    with proxy.refusing():
        assert 5 < waits_of(open_store(store.url)) <= patience.FIRST_PATIENCE_SECONDS
    proxy.inject("", Answer(503))  # whoever says so is there
    impatient.clear()
    with pytest.raises(StoreError, match="503"):
        open_store(store.url).read("there")
    assert sum(impatient) > 60


def test_an_answer_that_no_repetition_changes_is_taken_at_once(
    bucket: tuple[ObjectStore, FaultProxy], impatient: list[float]
) -> None:
    store, proxy = bucket
    for answer in (Answer(400, code="KeyTooLongError"), Answer(403)):
        proxy.inject("", answer)
        for request in (store.read, store.size_bytes, lambda name: store.put(name, b"", step="data")):
            with pytest.raises(StoreError) as caught:
                request("there")
            assert not caught.value.passing
        proxy.clear()
    assert impatient == []


def test_trouble_that_stays_is_the_machines_and_not_the_samples(bucket: tuple[ObjectStore, FaultProxy]) -> None:
    store, proxy = bucket
    proxy.inject("^GET ", Answer(503))
    with pytest.raises(StoreError, match=r"s3://.*/place/there: it did not answer.*503.*SlowDown") as caught:
        read_member(store, "there", Member(offset=0, size=1, sha256=""))
    assert not is_to_blame(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_an_upload_that_fails_is_aborted_and_nothing_is_seen(bucket: tuple[ObjectStore, FaultProxy]) -> None:
    store, proxy = bucket
    proxy.inject("^PUT .*partNumber=2", Answer(403))
    with pytest.raises(StoreError, match="refused"):
        publish(store, "large", LARGE)
    assert kinds(proxy)["abort multipart"] == 1
    proxy.clear()
    assert [entry.path for entry in store.list()] == ["there"]
    assert not list((store.spool.root / ".tmp").glob("*"))


def test_an_upload_that_fails_leaves_what_was_there(bucket: tuple[ObjectStore, FaultProxy]) -> None:
    store, proxy = bucket
    proxy.inject("^POST .*uploadId", Answer(403))
    with pytest.raises(StoreError):
        publish(store, "there", LARGE)
    assert store.read("there") == b"0123456789"


def test_what_another_removes_as_soon_as_it_is_written_was_written(bucket: tuple[ObjectStore, FaultProxy]) -> None:
    store, proxy = bucket
    proxy.inject("^HEAD .*mark", Answer(404), times=1)
    store.put("mark", b"1", step="attempt")
    assert store.read("mark") == b"1"
    proxy.inject("^HEAD .*data", Answer(404), times=1)
    with pytest.raises(FileNotFoundError):  # of a file of the result it is no good sign
        publish(store, "data", b"1")


def test_a_whole_upload_is_done_again(bucket: tuple[ObjectStore, FaultProxy]) -> None:
    store, proxy = bucket
    proxy.inject("^PUT .*partNumber=2", Answer(404, code="NoSuchUpload"), times=1)
    publish(store, "large", LARGE)
    assert kinds(proxy)["start multipart"] == 2
    assert store.read("large") == LARGE


def test_an_upload_of_another_size_is_noticed(
    bucket: tuple[ObjectStore, FaultProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = bucket
    monkeypatch.setattr(store, "size_bytes", lambda path: 5)
    with pytest.raises(StoreError, match="3 bytes were written, 5 are there"):
        store.put("file", b"123", step="data")


def test_a_file_that_is_replaced_while_it_is_read_is_no_mixture(bucket: tuple[ObjectStore, FaultProxy]) -> None:
    store, _ = bucket
    publish(store, "file", bytes(2**20))
    with store.open("file") as file:
        file.read(1)
        publish(store, "file", b"1" * 2**20)
        with pytest.raises(StoreError, match="replaced while it was read"):
            file.read()


@pytest.mark.parametrize("fault", [CutReply(), CutReply(reset=False)], ids=["reset", "closed"])
def test_a_listing_that_is_cut_off_is_asked_for_again(bucket: tuple[ObjectStore, FaultProxy], fault: CutReply) -> None:
    store, proxy = bucket
    for listing in (store.list, store.walk):
        rule = proxy.inject("list-type", fault, times=2)
        assert [entry.path for entry in listing()] == ["there"]
        assert rule.hits == 2
        proxy.clear()
        rule = proxy.inject("list-type", fault)
        with pytest.raises(StoreError, match=r"/place: it did not answer as it should.*body error"):
            list(listing())
        proxy.clear()


def test_a_walk_that_is_cut_off_midway_gives_each_file_once(bucket: tuple[ObjectStore, FaultProxy]) -> None:
    store, proxy = bucket
    names = [f"many/{number:05d}" for number in range(1100)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: store.put(name, b"1", step="data"), names))
    rule = proxy.inject("list-type", CutReply(), skip=1, times=1)  # the second page
    before = store.stats.requests["list"]
    assert [entry.path for entry in store.walk("many")] == names
    assert rule.hits == 1
    assert store.stats.requests["list"] == before + 3


def test_a_flipped_byte_is_none_of_ours_to_notice(bucket: tuple[ObjectStore, FaultProxy]) -> None:
    """It is what digests are for: TLS does not see what a store or a proxy does, and neither does the client."""
    store, proxy = bucket
    proxy.inject("^GET ", Flip(), times=1)
    assert store.read("there") != b"0123456789"


# --- the request is wrong


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Answer(403, code="AccessDenied"), r"refused \(403 Forbidden, AccessDenied.*AWS_ACCESS_KEY_ID"),
        (Answer(403, code="InvalidAccessKeyId"), "InvalidAccessKeyId.*AWS_ACCESS_KEY_ID"),
        (Answer(403, code="SignatureDoesNotMatch"), "SignatureDoesNotMatch.*AWS_SECRET_ACCESS_KEY"),
        (Answer(400, code="ExpiredToken"), "ExpiredToken.*AWS_SESSION_TOKEN"),
        (Answer(401), "refused"),
        (Answer(301, code="PermanentRedirect"), "the region is wrong.*AWS_REGION"),
        (Answer(400, code="AuthorizationHeaderMalformed"), "the region is wrong.*AWS_REGION"),
    ],
    ids=lambda value: value.code or str(value.status) if isinstance(value, Answer) else "",
)
def test_a_refusal_is_the_users_mistake_at_first_and_the_machines_later(
    bucket: tuple[ObjectStore, FaultProxy], answer: Answer, said: str
) -> None:
    store, proxy = bucket
    proxy.inject("", answer)
    fresh = open_store(store.url)
    for use in (fresh.read, fresh.size_bytes, fresh.open):
        if use == fresh.read or answer.status != 400:  # a HEAD is answered without a word
            with pytest.raises((UserError, StoreError), match=rf"{store.url}/there: "):
                use("there")
    with pytest.raises(UserError, match=said):
        fresh.read("there")
    with pytest.raises(UserError, match=said):
        list(fresh.list())
    with pytest.raises(StoreError, match=said) as caught:
        store.put("file", b"", step="data")
    assert not is_to_blame(caught.value)


def test_a_missing_bucket_is_named_whatever_is_asked_first(moto_server: Server, new_bucket: NewBucket) -> None:
    new_bucket(moto_server)
    for use in (
        lambda store: store.read("a"),
        lambda store: store.exists("a"),
        lambda store: list(store.list()),
        lambda store: store.put("a", b"", step="data"),
        lambda store: store.check_create_only(),
    ):
        with pytest.raises(UserError, match=r"s3://no-such-bucket/x.*there is no such bucket"):
            use(open_store("s3://no-such-bucket/x"))


def test_nobody_listening_is_said_so(moto_server: Server, point_at: Callable[..., None]) -> None:
    point_at({**moto_server.env, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"})
    with pytest.raises(StoreError, match="Connection refused"):
        open_store("s3://bucket/x").exists("a")


@pytest.mark.s3
def test_wrong_keys_are_refused_and_not_shown(
    seaweedfs_server: Server, new_bucket: NewBucket, point_at: Callable[..., None]
) -> None:
    url = new_bucket(seaweedfs_server)
    point_at({**seaweedfs_server.env, "AWS_SECRET_ACCESS_KEY": "WRONG-SECRET-1", "AWS_SESSION_TOKEN": "WRONG-TOKEN-1"})
    for use in (
        lambda store: store.exists("a"),
        lambda store: list(store.list()),
        lambda store: store.check_create_only(),
    ):
        with pytest.raises(UserError, match=rf"{url}.*refused.*AWS_SECRET_ACCESS_KEY") as caught:
            use(open_store(url))
        assert "WRONG-" not in "".join(traceback.format_exception(caught.value))


def test_secrets_are_cut_out_of_whatever_is_said() -> None:
    environment = {
        "AWS_SECRET_ACCESS_KEY": "s3cr3t/key+",
        "AWS_ACCESS_KEY_ID": "AKIDNOTSECRET",
        "AZURE_STORAGE_SAS_TOKEN": "sv=1&sig=abcd",
        "HF_TOKEN": "hf_abc",
    }
    text = "GET https://me:pw@host/x?X-Amz-Signature=1&sig=2: s3cr3t/key+ sv=1&sig=abcd hf_abc AKIDNOTSECRET"
    assert places.without_secrets(text, environment) == "GET https://***@host/x?*** *** *** *** AKIDNOTSECRET"


# --- create-only


def test_a_store_that_ignores_conditions_is_refused_but_for_a_single_writer(
    rclone_server: Server, new_bucket: NewBucket
) -> None:
    store = open_store(f"{new_bucket(rclone_server)}/out")
    assert store.check_create_only() is False
    with pytest.raises(UserError, match=r"/out: this store overwrites.*--only-writer"):
        check_writable(store, only_writer=False)
    check_writable(store, only_writer=True)


def test_a_store_that_knows_no_conditions_is_refused(bucket: tuple[ObjectStore, FaultProxy]) -> None:
    store, proxy = bucket
    proxy.inject("^PUT ", Answer(501, code="NotImplemented"))
    assert store.check_create_only() is False


def test_a_bucket_that_can_only_be_read_is_no_output(bucket: tuple[ObjectStore, FaultProxy]) -> None:
    store, proxy = bucket
    proxy.inject("^PUT ", Answer(403))
    with pytest.raises(UserError, match=r"refused.*Writing and deleting must be allowed"):
        store.check_create_only()


def test_the_probe_survives_lost_replies(bucket: tuple[ObjectStore, FaultProxy]) -> None:
    store, proxy = bucket
    proxy.inject("^PUT .*probe", LoseReply(), times=1)
    assert store.check_create_only() is True


def test_a_probe_of_a_process_that_died_is_removed_when_it_is_old(
    bucket: tuple[ObjectStore, FaultProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = bucket
    store.put(".tmp/probe-0123", b"1", step="data")
    store.remove_unpublished()
    assert store.exists(".tmp/probe-0123")  # another process may be at it
    monkeypatch.setattr("streamprep.storage.objects._LONGEST_PROBE", timedelta(0))
    store.remove_unpublished()
    assert [entry.path for entry in store.list(".tmp")] == []
    assert store.exists("there")


# --- the spool


def test_a_spool_that_is_full_is_named(bucket: tuple[ObjectStore, FaultProxy], monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = bucket
    monkeypatch.setattr("streamprep.storage.objects._SPOOL_RESERVE_BYTES", 2**62)
    with pytest.raises(OSError, match=r"--spool-dir.*streamprep-spool") as caught:
        store.new_file().__enter__()
    assert caught.value.errno == errno.ENOSPC


def test_the_spool_is_where_it_was_asked_for(bucket: tuple[ObjectStore, FaultProxy], tmp_path: Path) -> None:
    store = open_store(bucket[0].url, spool_dir=str(tmp_path / "scratch"))
    for one in (store, pickle.loads(pickle.dumps(store))):
        with one.new_file() as file:
            assert file.path.is_relative_to(tmp_path / "scratch")


# --- processes


def read_in_a_fork(url: str, results: multiprocessing.Queue[str]) -> None:
    try:
        open_store(url).read("there")
    except RuntimeError as error:
        results.put(str(error))


def test_use_after_a_fork_is_refused_where_it_would_hang(bucket: tuple[ObjectStore, FaultProxy]) -> None:
    store, _ = bucket
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[str] = context.Queue()  # type: ignore[assignment]
    process = context.Process(target=read_in_a_fork, args=(store.url, results))
    process.start()
    assert 'Start processes by "spawn"' in results.get(timeout=30)
    process.join(30)
    assert process.exitcode == 0


def test_nothing_is_asked_before_something_is_wanted(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    script = (
        "import sys; from streamprep.storage import open_store; open_store('s3://bucket/x'); "
        "assert not [name for name in sys.modules if name.startswith(('boto', 'requests'))]"
    )
    result = run_python("-c", script)
    assert result.returncode == 0, result.stderr


def test_requests_and_bytes_are_counted(bucket: tuple[ObjectStore, FaultProxy]) -> None:
    store, proxy = bucket
    before = len(proxy.requests)
    store.stats.requests.clear()
    store.stats.bytes_read = store.stats.bytes_written = 0
    publish(store, "large", LARGE)
    assert store.read_range("large", 0, len(LARGE)) == LARGE
    store.exists("there")
    list(store.list())
    store.delete("large", step="delete")
    assert store.stats.bytes_written == store.stats.bytes_read == len(LARGE)
    assert store.stats.requests.total() == len(proxy.requests) - before
    assert store.stats.requests == {"put": 5, "get": 2, "head": 2, "list": 1, "delete": 1}
    assert os.getpid() == places._first_used_by


def test_a_web_server_lists_nothing() -> None:
    store = open_store("https://127.0.0.1:9/shards")
    for listing in (store.list, store.walk):
        with pytest.raises(UserError, match="a web server lists no files"):
            listing()
