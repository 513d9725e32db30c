"""What a client's error means, in words: refused, a wrong region, no bucket, or trouble that may pass."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import obstore.exceptions

from streamprep.errors import first_line
from streamprep.storage.places import Place, advice, without_secrets

ERRORS = (obstore.exceptions.BaseError, OSError, ValueError)
"""What obstore raises."""

Kind = Literal["refused", "region", "no bucket", "missing", "too short", "unsupported", "passing", "other"]

_REFUSED_CODES = (
    *(
        "AccessDenied",
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "ExpiredToken",
        "InvalidToken",
        "TokenRefreshRequired",
    ),
    *("AuthenticationFailed", "AuthorizationFailure", "AuthorizationPermissionMismatch", "RequestTimeTooSkewed"),
)
_REGION_CODES = ("AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException")
_BUCKET_CODES = ("NoSuchBucket", "ContainerNotFound")
_PASSING_CODES = ("RequestTimeout", "SlowDown", "Throttling", "ServerBusy", "OperationAborted", "IncompleteBody")
_STATUS = re.compile(r"status code: (\d{3})( [A-Z][A-Za-z ]*)?")
_CODE = re.compile(r"<Code>(.*?)</Code>", re.DOTALL)
_MESSAGE = re.compile(r"<Message>(.*?)</Message>", re.DOTALL)
_EXPECTED_REGION = re.compile(r"expecting '([a-z0-9-]+)'|<Region>([a-z0-9-]+)</Region>")
_CAUSE = re.compile(r"(HTTP error: .*)")
_OF_REQUESTS = re.compile(r"Error performing (?:\w+ )?\S+ in \S+?(?:, after .*?)? - ")


@dataclass(frozen=True, slots=True)
class Trouble:
    """What went wrong with a request."""

    kind: Kind
    what: str
    """In words, without secrets; and what to check."""
    answered: bool = False
    """Whether the store has said so: then it is there, and somebody listens."""


def understand(error: Exception, place: Place) -> Trouble:
    """Classify an error of obstore's."""
    kind, what = _classify(error, place)
    return Trouble(kind, what, answered=_STATUS.search(str(error)) is not None)


def _classify(error: Exception, place: Place) -> tuple[Kind, str]:
    text = str(error)
    status = match[1] if (match := _STATUS.search(text)) else ""
    code = match[1].strip() if (match := _CODE.search(text)) else ""
    said = without_secrets(_said(text, error))
    if code in _BUCKET_CODES:
        return "no bucket", f"there is no such {'container' if place.scheme == 'az' else 'bucket'} ({said})"
    if code in _REGION_CODES or "incorrectly configured region" in text:
        match = _EXPECTED_REGION.search(text)
        region = (match[1] or match[2]) if match else None
        name = f"AWS_REGION={region}" if region else "AWS_REGION to the region of the bucket"
        return "region", f"the region is wrong ({said}). Set {name}"
    if (
        isinstance(error, (obstore.exceptions.PermissionDeniedError, obstore.exceptions.UnauthenticatedError))
        or code in _REFUSED_CODES
        or status in ("401", "403")
    ):
        return "refused", f"it was refused ({said}). {advice(place)}"
    if status == "404" or isinstance(error, FileNotFoundError):
        return "missing", f"there is no such object ({said})"
    if status == "416" or "Wanted range starting at" in text:
        return "too short", said
    if "credential" in text.lower() or "instance metadata" in text.lower() or "169.254.169.254" in text:
        return "refused", f"there are no credentials ({said}). {advice(place)}"
    if isinstance(error, obstore.exceptions.NotSupportedError) or status == "501":
        return "unsupported", f"it cannot do that ({said})"
    may_pass = status.startswith("5") or status in ("408", "409", "425", "429") or code in _PASSING_CODES
    if may_pass or _CAUSE.search(text) or "timed out" in text:
        return "passing", f"it did not answer as it should, nor when asked again ({said})"
    return "other" if status else "passing", said


def _said(text: str, error: Exception) -> str:
    """The heart of a message that fills a page."""
    status = match[0].removeprefix("status code: ") if (match := _STATUS.search(text)) else ""
    code = match[1].strip() if (match := _CODE.search(text)) else ""
    message = match[1].strip() if (match := _MESSAGE.search(text)) else ""
    if status or code:
        return ", ".join(part for part in (status.strip(), code, message) if part)[:500]
    if match := _CAUSE.search(text):
        cause = re.search(
            r"(Connection \w+|timed out|dns error[^\n\"]*|failed to lookup[^\n\"]*|certificate[^\n\"]*)", text
        )
        return f"{match[1]}{f', {cause[1]}' if cause else ''}"[:500]
    return _OF_REQUESTS.sub("", first_line(error))
