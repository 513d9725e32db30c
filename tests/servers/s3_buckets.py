"""What obstore has no call for, in servers that speak S3."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from uuid import uuid4

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
    client = s3_client(env)
    return lambda name: client.create_bucket(Bucket=name)


def takes_an_object(env: Mapping[str, str]) -> bool:
    """Whether all of a server works, and not only what answers requests."""
    import botocore.exceptions

    client, bucket = s3_client(env), f"is-it-ready-{uuid4().hex[:12]}"
    try:
        client.create_bucket(Bucket=bucket)
        client.put_object(Bucket=bucket, Key="k", Body=b"1")
        client.delete_object(Bucket=bucket, Key="k")
        client.delete_bucket(Bucket=bucket)
    except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError):
        return False
    return True


def unfinished_uploads(env: Mapping[str, str], bucket_url: str) -> list[str]:
    """The keys of the multipart uploads in a bucket that are neither complete nor aborted."""
    reply = s3_client(env).list_multipart_uploads(Bucket=bucket_url.removeprefix("s3://").partition("/")[0])
    return sorted(upload["Key"] for upload in reply.get("Uploads", []))


def s3_client(env: Mapping[str, str]) -> Any:
    """boto3's, for the server of these variables."""
    import boto3

    return boto3.session.Session().client(
        "s3",
        endpoint_url=env["AWS_ENDPOINT_URL"],
        region_name=env["AWS_REGION"],
        aws_access_key_id=env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
    )
