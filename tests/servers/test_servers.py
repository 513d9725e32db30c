"""The servers do what the tests of streamprep's stores rely on, asked by the client that streamprep uses."""

from __future__ import annotations

import io
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import obstore
import pytest
from obstore.exceptions import AlreadyExistsError, GenericError, PermissionDeniedError, PreconditionError
from obstore.store import from_url

from servers.faults import Answer, CutReply, DropHeaders, Flip, LoseReply, Reset, StallReply
from servers.http_files import http_files
from servers.s3_buckets import s3_client, unfinished_uploads

if TYPE_CHECKING:
    from object_stores import Faulty, NewBucket

    from servers import Server

pytest_plugins = ["object_stores"]

RETRIES: Any = {
    "max_retries": 5,
    "retry_timeout": timedelta(seconds=20),
    "backoff": {"init_backoff": timedelta(milliseconds=10), "max_backoff": timedelta(milliseconds=50), "base": 2},
}
CONTENT = Random(0).randbytes(5_000_000)


def open_store(url: str, *, seconds: float = 30) -> Any:
    """obstore's client, which gives up waiting for a reply after so long."""
    # Options here replace those of the environment, AWS_ALLOW_HTTP among them.
    options: Any = {"allow_http": True, "timeout": timedelta(seconds=seconds)}
    return from_url(url, client_options=options, retry_config=RETRIES)


def num_winners(url: str) -> int:
    """How many of 16 that create the same object at once are told that they did."""
    stores = [open_store(url) for _ in range(16)]

    def create(number: int) -> bool:
        try:
            stores[number].put("race", b"%d" % number, mode="create")
        except AlreadyExistsError:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        return sum(pool.map(create, range(16)))


def keys(store: Any, prefix: str | None = None) -> list[str]:
    return [entry["path"] for page in store.list(prefix) for entry in page]


# Each server that can hold a job


def test_what_is_put_is_got_listed_and_deleted(any_server: Server, new_bucket: NewBucket) -> None:
    store = open_store(new_bucket(any_server))
    names = ["a/b c#1+%ü", "a/d", "e"]
    for name in names:
        store.put(name, CONTENT[:1000])
    assert bytes(store.get(names[0]).bytes()) == CONTENT[:1000]
    assert store.head(names[0])["size"] == 1000
    assert keys(store) == names
    assert keys(store, "a") == names[:2]
    listing = store.list_with_delimiter()
    assert ([entry["path"] for entry in listing["objects"]], listing["common_prefixes"]) == (["e"], ["a"])
    store.delete(names[0])
    with pytest.raises(FileNotFoundError):
        store.head(names[0])
    assert keys(store) == names[1:]


def test_ranges_are_bytes_of_the_object(any_server: Server, new_bucket: NewBucket) -> None:
    store = open_store(new_bucket(any_server))
    store.put("k", CONTENT)
    assert bytes(store.get_range("k", start=10, length=5)) == CONTENT[10:15]
    assert bytes(store.get_range("k", start=4_999_990, length=100)) == CONTENT[4_999_990:]
    assert bytes(store.get("k", options={"range": {"offset": 4_999_000}}).bytes()) == CONTENT[4_999_000:]
    several = store.get_ranges("k", starts=[0, 2_000_000, 4_999_999], lengths=[1, 10, 1])
    assert list(map(bytes, several)) == [CONTENT[:1], CONTENT[2_000_000:2_000_010], CONTENT[-1:]]


def test_one_of_sixteen_creates_an_object(any_server: Server, new_bucket: NewBucket) -> None:
    assert num_winners(new_bucket(any_server)) == 1


def test_an_object_is_replaced_only_as_it_was_read(any_server: Server, new_bucket: NewBucket) -> None:
    store = open_store(new_bucket(any_server))
    first = {name: value for name, value in store.put("k", b"first").items() if value is not None}
    store.put("k", b"second", mode=first)
    with pytest.raises(PreconditionError):
        store.put("k", b"third", mode=first)
    assert bytes(store.get("k").bytes()) == b"second"


def test_a_multipart_upload_is_whole(any_server: Server, new_bucket: NewBucket) -> None:
    store = open_store(new_bucket(any_server))
    data = CONTENT * 5
    store.put("k", data, chunk_size=5 << 20, use_multipart=True)
    assert bytes(store.get("k").bytes()) == data


def test_a_missing_bucket_and_object_are_not_found(any_server: Server, new_bucket: NewBucket) -> None:
    url = new_bucket(any_server)
    with pytest.raises(FileNotFoundError):
        open_store(url).get("missing")
    with pytest.raises(FileNotFoundError):
        open_store(f"{url}-missing").get("missing")


@pytest.mark.parametrize("num_keys", [2500])
def test_a_listing_of_many_pages_has_each_key_once(any_server: Server, new_bucket: NewBucket, num_keys: int) -> None:
    store = open_store(new_bucket(any_server))
    names = [f"many/{number:05d}" for number in range(num_keys)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: store.put(name, b"1"), names))
    assert keys(store, "many") == names


# Each S3 server


@pytest.mark.slow
def test_a_hundred_megabytes_go_there_and_back(s3_server: Server, new_bucket: NewBucket) -> None:
    store = open_store(new_bucket(s3_server))
    data = CONTENT * 20
    store.put("k", data, chunk_size=8 << 20, max_concurrency=4)
    assert bytes(store.get("k").bytes()) == data


def test_an_upload_that_is_not_complete_is_not_seen_as_an_object(s3_server: Server, new_bucket: NewBucket) -> None:
    url = new_bucket(s3_server)
    store = open_store(url)
    with pytest.raises(ValueError, match="stopped"):
        with obstore.open_writer(store, "k", buffer_size=5 << 20) as writer:
            writer.write(CONTENT * 3)
            assert unfinished_uploads(s3_server.env, url) == ["k"]
            assert keys(store) == []
            raise ValueError("stopped")
    assert unfinished_uploads(s3_server.env, url) == []


@pytest.mark.s3
def test_a_wrong_key_is_refused(
    seaweedfs_server: Server, new_bucket: NewBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = new_bucket(seaweedfs_server)
    open_store(url).put("k", b"1")
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "wrong")
            with pytest.raises(PermissionDeniedError):
                open_store(url).get("k")


def test_rclone_tells_all_of_sixteen_that_they_created_an_object(rclone_server: Server, new_bucket: NewBucket) -> None:
    assert num_winners(new_bucket(rclone_server)) == 16


def test_a_proxy_makes_a_store_that_ignores_conditions(
    moto_server: Server, new_bucket: NewBucket, faulty: Faulty
) -> None:
    url = new_bucket(moto_server)
    _, proxy = faulty(moto_server)
    proxy.inject("^PUT", DropHeaders())
    assert num_winners(url) == 16


# Behind the proxy


@pytest.fixture
def behind(any_server: Server, new_bucket: NewBucket, faulty: Faulty) -> tuple[Any, Any]:
    """A store that is reached through the proxy, and the proxy."""
    url = new_bucket(any_server)
    _, proxy = faulty(any_server)
    return open_store(url, seconds=2), proxy


def test_all_goes_through_the_proxy_as_it_is(behind: tuple[Any, Any]) -> None:
    store, proxy = behind
    data = CONTENT * 5
    store.put("k", data, chunk_size=5 << 20, use_multipart=True)
    assert bytes(store.get("k").bytes()) == data
    assert bytes(store.get_range("k", start=3, length=4)) == data[3:7]
    assert keys(store) == ["k"]
    kinds = proxy.kinds()
    assert (kinds["put part"], kinds["complete multipart"], kinds["get"], kinds["list"]) == (5, 1, 1, 1)
    assert sum(request.sent_bytes for request in proxy.requests if request.kind == "put part") == len(data)


def test_boto3_which_waits_for_100_continue_goes_through_the_proxy(
    s3_server: Server, new_bucket: NewBucket, faulty: Faulty
) -> None:
    bucket = new_bucket(s3_server).removeprefix("s3://")
    env, proxy = faulty(s3_server)
    rule = proxy.inject("^PUT", Answer(503), times=1)
    client = s3_client(env)
    client.put_object(Bucket=bucket, Key="k", Body=io.BytesIO(CONTENT))
    assert client.get_object(Bucket=bucket, Key="k")["Body"].read() == CONTENT
    first, *_ = (request for request in proxy.requests if request.kind == "put")
    assert rule.hits == 1
    assert first.headers["expect"] == "100-continue"


@pytest.mark.parametrize(
    "fault",
    [
        Answer(500),
        Answer(503),
        Answer(503, retry_after=1),
        Answer(429),
        Reset(),
        CutReply(),
        CutReply(reset=False),
        StallReply(1000),
    ],
    ids=str,
)
def test_obstore_reads_all_in_spite_of_two(behind: tuple[Any, Any], fault: Any) -> None:
    store, proxy = behind
    store.put("k", CONTENT)
    rule = proxy.inject("^GET .*k$", fault, times=2)
    assert bytes(store.get("k").bytes()) == CONTENT
    assert rule.hits == 2


def test_nothing_notices_a_flipped_byte(behind: tuple[Any, Any]) -> None:
    store, proxy = behind
    store.put("k", CONTENT)
    proxy.inject("^GET .*k$", Flip())
    got = bytes(store.get("k").bytes())
    assert len(got) == len(CONTENT)
    assert got != CONTENT


def test_a_create_whose_reply_is_lost_has_happened(behind: tuple[Any, Any]) -> None:
    store, proxy = behind
    proxy.inject("^PUT", LoseReply(), times=1)
    with pytest.raises((GenericError, AlreadyExistsError)):
        store.put("k", b"1", mode="create")
    assert bytes(store.get("k").bytes()) == b"1"


def test_a_part_that_fails_is_sent_again(behind: tuple[Any, Any]) -> None:
    store, proxy = behind
    part = "partNumber=2|comp=block&"
    rule = proxy.inject(f"^PUT .*({part})", Answer(500), times=2)
    store.put("k", CONTENT * 3, chunk_size=5 << 20, use_multipart=True)
    assert rule.hits == 2
    assert bytes(store.get("k").bytes()) == CONTENT * 3


def test_a_server_that_refuses_connections_for_a_while_is_tried_again(behind: tuple[Any, Any]) -> None:
    store, proxy = behind
    store.put("k", CONTENT)
    with ThreadPoolExecutor(1) as pool:
        with proxy.refusing():
            getting = pool.submit(lambda: bytes(store.get("k").bytes()))
        assert getting.result() == CONTENT


# The environment


def test_no_variable_of_another_cloud_is_left(
    moto_server: Server, new_bucket: NewBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_SESSION_TOKEN", "GOOGLE_BUCKET", "AZURE_STORAGE_ACCOUNT_NAME"):
        monkeypatch.setenv(name, "someone's")
    new_bucket(moto_server)
    assert {name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "AZURE_"))} == {
        *moto_server.env,
        "AWS_CONFIG_FILE",
        "AWS_SHARED_CREDENTIALS_FILE",
    }


# Plain files


def test_files_of_a_folder_are_read_over_http(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "k 1.tar").write_bytes(CONTENT)
    with http_files(tmp_path) as url:
        store = open_store(f"{url}/a")
        assert store.head("k 1.tar")["size"] == len(CONTENT)
        assert bytes(store.get("k 1.tar").bytes()) == CONTENT
        assert bytes(store.get_range("k 1.tar", start=4_999_990, length=100)) == CONTENT[4_999_990:]
        with pytest.raises(FileNotFoundError):
            store.head("missing")
