"""Which bucket a URL means, and a client for it: credentials and endpoints as each provider's own tools find them.

obstore reads the providers' environment variables by itself, but no profiles: for those (``AWS_PROFILE``, ``~/.aws``,
SSO) boto3 is asked, where it is installed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from streamprep.errors import UserError, first_line

if TYPE_CHECKING:
    from obstore.store import AzureStore, ClientConfig, GCSStore, HTTPStore, RetryConfig, S3Store

    Client = S3Store | GCSStore | AzureStore | HTTPStore

S3, GS, AZ, WEB = ("s3", "s3a"), ("gs", "gcs"), ("az", "azure", "abfs", "abfss"), ("https", "http")
_OTHER_NAMES = {"s3a": "s3", "gcs": "gs", "azure": "az", "abfs": "az", "abfss": "az"}

REQUEST_SECONDS = 60.0
"""A request that takes longer, its body included, is given up and sent again: so a stalled one costs no more."""
CONNECT_SECONDS = 10.0
MAX_RETRIES, RETRY_SECONDS = 3, 10.0
"""What the client does by itself, within a second or two; `streamprep.storage.patience` is how long it is made to."""


@dataclass(frozen=True, slots=True)
class Place:
    """A place in a bucket, or on a web server."""

    scheme: str
    """``s3``, ``gs``, ``az``, ``https`` or ``http``."""
    bucket: str
    """Or container, or host."""
    prefix: str
    """Without slashes at its ends; may be empty."""

    @property
    def url(self) -> str:
        """As a user would write it."""
        return f"{self.scheme}://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")


def parse_place(url: str) -> Place | None:
    """What a URL means; None if its scheme is not known.

    Raises:
        UserError: if the URL holds what it should not. What may be a secret is not repeated.
    """
    scheme, _, rest = url.partition("://")
    if scheme not in (*S3, *GS, *AZ, *WEB):
        return None
    bucket, _, path = rest.partition("/")
    if "@" in bucket:
        raise UserError(
            f"{scheme}://...@{bucket.rpartition('@')[2]}: no names or passwords in URLs; credentials come from the "
            "environment (see Buckets in the README)"
        )
    if "?" in rest or "#" in rest:
        raise UserError(
            f"{scheme}://{re.split('[?#]', rest)[0]}?...: a URL of a folder has no ? or #; credentials come from the "
            "environment (see Buckets in the README)"
        )
    if not bucket:
        raise UserError(f"{url} names no bucket: {scheme}://BUCKET/PREFIX is needed")
    if scheme in WEB:
        try:
            urlsplit(url)
        except ValueError as error:
            raise UserError(f"{url}: {error}") from error
    prefix = path.rstrip("/")
    if any(part in ("", ".", "..") for part in prefix.split("/")) and prefix:
        raise UserError(f"{url}: a place in a bucket has no empty parts, '.' or '..'")
    return Place(_OTHER_NAMES.get(scheme, scheme), bucket, prefix)


# --- one process, one client


_first_used_by: int | None = None


def check_not_forked() -> None:
    """Refuse to use the client in a fork of a process that has used it, where it would wait for ever.

    Raises:
        RuntimeError: in such a fork.
    """
    global _first_used_by
    if _first_used_by is None:
        _first_used_by = os.getpid()
    if _first_used_by != os.getpid():
        raise RuntimeError(
            f"process {os.getpid()} was forked from {_first_used_by}, which had read or written a bucket: that would "
            'hang. Start processes by "spawn" or "forkserver" (DataLoader: multiprocessing_context="spawn")'
        )


def connect(place: Place, *, retry_seconds: float | None = None) -> Client:
    """A client for a place; no request is made, unless a profile's credentials must be fetched.

    Args:
        place: Which.
        retry_seconds: How long it sends a request again by itself; by default `MAX_RETRIES` times.

    Raises:
        UserError: if the settings of the environment cannot be used, or a profile is asked for that cannot be had.
    """
    check_not_forked()
    import obstore.exceptions
    from obstore.store import AzureStore, GCSStore, HTTPStore

    client_options, retry_config = _client_options(place, os.environ), _retry_config(retry_seconds)
    try:
        if place.scheme == "s3":
            return _connect_s3(place, client_options, retry_config)
        if place.scheme == "gs":
            return GCSStore(
                place.bucket, prefix=place.prefix or None, client_options=client_options, retry_config=retry_config
            )
        if place.scheme == "az":
            return AzureStore(
                place.bucket, prefix=place.prefix or None, client_options=client_options, retry_config=retry_config
            )
        return HTTPStore.from_url(place.url, client_options=client_options, retry_config=retry_config)
    except (obstore.exceptions.BaseError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{place.url}: {without_secrets(first_line(error))}. {advice(place)}") from None


def _connect_s3(place: Place, client_options: ClientConfig, retry_config: RetryConfig) -> S3Store:
    from obstore.store import S3Store

    config: Any = {}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        if not endpoint.startswith(("http://", "https://")):
            raise UserError(f"{place.url}: AWS_ENDPOINT_URL must begin with http:// or https://")
        config["endpoint"] = endpoint
    provider = None
    if not _has_own_credentials(os.environ):
        provider, of_profile = _profile(place)
        config = {**of_profile, **config}
        if provider is None and config.get("endpoint"):
            raise UserError(f"{place.url}: there are no credentials. {advice(place)}")
    if str(config.get("endpoint", "")).startswith("http://"):
        client_options = {**client_options, "allow_http": True}
    return S3Store(
        place.bucket,
        prefix=place.prefix or None,
        config=config,
        client_options=client_options,
        retry_config=retry_config,
        credential_provider=provider,
    )


def _has_own_credentials(environment: Mapping[str, str]) -> bool:
    """Whether obstore finds what it needs in the environment."""
    if environment.get("AWS_SKIP_SIGNATURE", "").lower() in ("true", "1", "yes", "on", "y"):
        return True
    return any(
        environment.get(name)
        for name in (
            "AWS_ACCESS_KEY_ID",
            "AWS_WEB_IDENTITY_TOKEN_FILE",
            "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
            "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        )
    )


def _profile(place: Place) -> tuple[Any, dict[str, str]]:
    """(credentials, further settings) of the user's profile; (None, {}) if there is none."""
    name = os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE")
    if name is None and not _has_aws_files(os.environ):
        return None, {}
    try:
        import boto3
        import botocore.exceptions
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        if name is None:
            return None, {}  # perhaps there is only a region in ~/.aws, and the machine has a role
        raise UserError(
            f'{place.url}: AWS_PROFILE={name} needs boto3: pip install "streamprep[s3]", or set AWS_ACCESS_KEY_ID and '
            "AWS_SECRET_ACCESS_KEY"
        ) from None
    try:
        session = boto3.Session()
        if session.get_credentials() is None:
            if name is None:
                return None, {}
            raise UserError(f"{place.url}: the profile {name} has no credentials")
        provider = Boto3CredentialProvider(session)
        provider()  # an expired SSO session shows here, not in the first request
        endpoint = session._session.get_scoped_config().get("endpoint_url")
    except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
        whose = f"the profile {name}" if name else "~/.aws"
        raise UserError(
            f"{place.url}: the credentials of {whose} cannot be had: {without_secrets(first_line(error))}"
        ) from None
    region = {} if _has_region(os.environ) else dict(provider.config)
    return provider, {**({"endpoint": endpoint} if endpoint else {}), **region}


def _has_region(environment: Mapping[str, str]) -> bool:
    return any(environment.get(name) for name in ("AWS_REGION", "AWS_DEFAULT_REGION"))


def _has_aws_files(environment: Mapping[str, str]) -> bool:
    return any(
        Path(environment.get(variable, default)).expanduser().is_file()
        for variable, default in (
            ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"),
            ("AWS_CONFIG_FILE", "~/.aws/config"),
        )
    )


def _client_options(place: Place, environment: Mapping[str, str]) -> ClientConfig:
    options: ClientConfig = {
        "timeout": timedelta(seconds=REQUEST_SECONDS),
        "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
        "user_agent": "streamprep",
    }
    family = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}.get(place.scheme)
    # An endpoint without TLS was asked for by name; it may stand in a service account's key, too.
    plain = family is not None and any(
        name.startswith(family) and ("http://" in value or name.endswith("_ALLOW_HTTP"))
        for name, value in environment.items()
    )
    if plain or place.scheme == "http":
        options["allow_http"] = True
    return options


def _retry_config(seconds: float | None) -> RetryConfig:
    return {
        "max_retries": MAX_RETRIES if seconds is None else 10_000,
        "retry_timeout": timedelta(seconds=RETRY_SECONDS if seconds is None else seconds),
        "backoff": {
            "init_backoff": timedelta(seconds=0.1),
            "max_backoff": timedelta(seconds=5),
            "base": 3,
        },
    }


# --- what to say when it goes wrong

_ADVICE = {
    "s3": "Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_SESSION_TOKEN), or AWS_PROFILE; a public bucket "
    "needs AWS_SKIP_SIGNATURE=true; another service than AWS needs AWS_ENDPOINT_URL",
    "gs": "Check GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_SERVICE_ACCOUNT; a public bucket needs "
    "GOOGLE_SKIP_SIGNATURE=true",
    "az": "Check AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY (or AZURE_STORAGE_SAS_TOKEN, "
    "AZURE_CLIENT_ID, ...); a public container needs AZURE_SKIP_SIGNATURE=true",
}


def advice(place: Place) -> str:
    """What to check where credentials are refused or missing."""
    text = _ADVICE.get(place.scheme, "Check the URL")
    if (
        place.scheme == "s3"
        and not _has_own_credentials(os.environ)
        and _has_aws_files(os.environ)
        and not _has_boto3()
    ):
        text += '; the credentials in ~/.aws need boto3: pip install "streamprep[s3]"'
    return text


def _has_boto3() -> bool:
    import importlib.util

    return importlib.util.find_spec("boto3") is not None


_SECRET_NAME = re.compile(r"(AWS|AZURE|GOOGLE|HF)_.*(SECRET|TOKEN|KEY|SAS|PASSWORD|CONNECTION_STRING)")
_QUERY = re.compile(r"(https?://[^\s?\"'<>]*)\?[^\s\"'<>]*")
_USER = re.compile(r"(https?://)[^\s/@]*@")


def without_secrets(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """A message without the queries of its URLs, which may be signatures, and without the environment's secrets."""
    text = _USER.sub(r"\1***@", _QUERY.sub(r"\1?***", text))
    for name, value in environment.items():
        if len(value) > 3 and _SECRET_NAME.fullmatch(name):
            text = text.replace(value, "***")
    return text
