"""Which URL means what, and whose credentials are used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import boto3
import pytest
from object_stores import NewBucket
from servers import Server

from streamprep.errors import UserError
from streamprep.storage import LocalStore, open_store
from streamprep.storage.places import Place, parse_place

pytest_plugins = ["object_stores"]

PointAt = Callable[[Mapping[str, str]], None]


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("s3://bucket", Place("s3", "bucket", "")),
        ("s3://bucket/", Place("s3", "bucket", "")),
        ("s3a://bucket/a/b/", Place("s3", "bucket", "a/b")),
        ("gs://bucket/a b", Place("gs", "bucket", "a b")),
        ("abfs://container/a", Place("az", "container", "a")),
        ("https://host:8080/a", Place("https", "host:8080", "a")),
    ],
)
def test_urls_of_buckets_name_a_place(url: str, place: Place) -> None:
    assert parse_place(url) == place
    assert open_store(url).url == place.url
    assert open_store(url).local_path() is None
    assert open_store(url).same_place(open_store(place.url))
    assert not open_store(url).same_place(open_store(f"{place.url}/x"))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("hf://a/b", "only repositories of datasets"),
        ("memory://", "no store is known"),
        ("ftp://host/x", r"no store is known.*s3://BUCKET"),
        ("http://[x", "Invalid IPv6"),
        ("s3://", "names no bucket"),
        ("s3:///x", "names no bucket"),
        ("s3://bucket/a//b", "no empty parts"),
        ("s3://bucket/../b", "no empty parts"),
        ("file://host/x", "file:///absolute/path"),
        ("file://", "file:///absolute/path"),
        ("file://x", "file:///absolute/path"),
        ("file:///a#b", "file:///absolute/path"),
        ("", "an empty path names no folder"),
    ],
)
def test_urls_of_no_store_are_refused(url: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        open_store(url)


@pytest.mark.parametrize(
    "url", ["https://me:PASSWORD@host/x", "https://host/x?sig=PASSWORD", "s3://K:PASSWORD@bucket/x"]
)
def test_secrets_in_urls_are_refused_without_repeating_them(url: str) -> None:
    with pytest.raises(UserError, match="credentials come from the environment") as caught:
        open_store(url)
    assert "PASSWORD" not in str(caught.value)


def test_file_urls_and_relative_paths_name_local_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_store(f"file://{tmp_path}/a%20b").local_path() == tmp_path / "a b"
    assert open_store(f"file://localhost{tmp_path}/a").local_path() == tmp_path / "a"
    assert open_store("x/../a").url == str(tmp_path / "a")
    assert open_store("a").same_place(LocalStore(tmp_path / "a"))
    assert not open_store("a").same_place(open_store("s3://a"))
    assert not open_store("s3://a").same_place(open_store("a"))


def without_keys(server: Server) -> dict[str, str]:
    return {name: value for name, value in server.env.items() if "KEY" not in name}


def test_no_credentials_are_said_to_be_missing(moto_server: Server, point_at: PointAt) -> None:
    point_at(without_keys(moto_server))
    with pytest.raises(UserError, match=r"s3://bucket/x: there are no credentials.*AWS_SKIP_SIGNATURE=true"):
        open_store("s3://bucket/x").exists("a")


def test_public_buckets_need_no_credentials(moto_server: Server, new_bucket: NewBucket, point_at: PointAt) -> None:
    url = new_bucket(moto_server)
    open_store(url).put("file", b"1", step="data")
    boto3.client("s3").put_object_acl(Bucket=url.removeprefix("s3://"), Key="file", ACL="public-read")
    point_at({**without_keys(moto_server), "AWS_SKIP_SIGNATURE": "true"})
    assert open_store(url).read("file") == b"1"


@pytest.fixture
def profiles(tmp_path: Path, seaweedfs_server: Server, point_at: PointAt, monkeypatch: pytest.MonkeyPatch) -> str:
    """A server that checks keys, found through ``~/.aws`` alone; the URL of a bucket."""
    url = seaweedfs_server.new_bucket()
    point_at({})
    (tmp_path / "credentials").write_text(
        "[good]\naws_access_key_id = test\naws_secret_access_key = testsecret\n"
        "[bad]\naws_access_key_id = test\naws_secret_access_key = othersecret\n"
    )
    (tmp_path / "config").write_text(
        "".join(
            f"[profile {name}]\nregion = us-east-1\nendpoint_url = {seaweedfs_server.url}\n"
            for name in ("good", "bad", "empty")
        )
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return url


@pytest.mark.s3
def test_a_profile_brings_keys_region_and_endpoint(profiles: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "good")
    store = open_store(profiles)
    store.put("file", b"1", step="data")
    assert store.read("file") == b"1"


@pytest.mark.s3
@pytest.mark.parametrize(
    ("profile", "said"),
    [("bad", "refused"), ("empty", "the profile empty has no credentials"), ("none", "none.*could not be found")],
)
def test_a_profile_that_is_of_no_use_is_named(
    profiles: str, profile: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_PROFILE", profile)
    with pytest.raises(UserError, match=rf"{profiles}.*{said}") as caught:
        open_store(profiles).exists("a")
    assert "othersecret" not in str(caught.value)


@pytest.mark.s3
def test_a_profile_without_boto3_says_what_to_install(profiles: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "good")
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(UserError, match=r'AWS_PROFILE=good needs boto3: pip install "streamprep\[s3\]"'):
        open_store(profiles).exists("a")


def test_azure_without_an_account_says_what_to_set(point_at: PointAt) -> None:
    point_at({})
    with pytest.raises(UserError, match=r"az://container/x.*AZURE_STORAGE_ACCOUNT_NAME"):
        open_store("az://container/x").exists("a")


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9000", "minio.example.com", "htp://minio"])
def test_an_endpoint_without_its_scheme_is_refused(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ENDPOINT_URL": endpoint, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    with pytest.raises(UserError, match="AWS_ENDPOINT_URL must begin with http:// or https://"):
        open_store("s3://bucket/place").exists("file")
