"""What obstore has no call for, in servers that speak S3."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

REGION = "us-east-1"


def s3_env(url: str, *, key: str = "test", secret: str = "testsecret") -> dict[str, str]:
    """The variables by which obstore finds a server of ours."""
    return {
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_REGION": REGION,
        "AWS_ENDPOINT_URL": url,
        "AWS_ALLOW_HTTP": "true",
    }


def bucket_maker(env: Mapping[str, str]) -> Callable[[str], None]:
    """``create(name)`` for the server of these variables."""
    client = _client(env)
    return lambda name: client.create_bucket(Bucket=name)


def unfinished_uploads(env: Mapping[str, str], bucket_url: str) -> list[str]:
    """The keys of the multipart uploads in a bucket that are neither complete nor aborted."""
    reply = _client(env).list_multipart_uploads(Bucket=bucket_url.removeprefix("s3://").partition("/")[0])
    return sorted(upload["Key"] for upload in reply.get("Uploads", []))


def _client(env: Mapping[str, str]) -> Any:
    import boto3

    return boto3.session.Session().client(
        "s3",
        endpoint_url=env["AWS_ENDPOINT_URL"],
        region_name=env["AWS_REGION"],
        aws_access_key_id=env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
    )
