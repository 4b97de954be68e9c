"""The Cloud Storage client's errors as those of a store, with the remedy.

Its own messages hold addresses, which may be signed, and bodies; nothing of them is passed on but
the name of a permission.
"""

from __future__ import annotations

import http.client
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime

from gemma_tuner.errors import GemmaTunerError, SourceError, quote_name
from gemma_tuner.storage.objects import (
    OTHER_FORM,
    AccessDeniedError,
    CorruptReadError,
    ObjectChangedError,
    TransientReadError,
)

LOG_IN = (
    "run `gcloud auth application-default login`, or give a client of your own (for public data "
    "storage.Client.create_anonymous_client())"
)
_TRANSIENT_STATUSES = (408, 429, *range(500, 600))
_RATE_REASONS = ("rateLimitExceeded", "userRateLimitExceeded")
_PERMISSION = re.compile(r"\bstorage\.[A-Za-z]+\.[A-Za-z]+\b")


@contextmanager
def explain_errors(bucket: str, name: str = "") -> Iterator[None]:
    """Turn what the official client raises into errors of a store."""
    import google.api_core.exceptions as api
    import google.auth.exceptions as auth
    import urllib3.exceptions
    from google.cloud.storage.exceptions import DataCorruption

    try:
        yield
    except GemmaTunerError:
        raise
    except (
        api.GoogleAPIError,
        auth.GoogleAuthError,
        DataCorruption,
        OSError,  # of which requests' errors are
        http.client.HTTPException,
        urllib3.exceptions.HTTPError,
        *OTHER_FORM,
    ) as error:
        explained = explain(error, bucket, name)
        raise explained from None


def explain(error: Exception, bucket: str, name: str = "") -> SourceError:
    """Return the error of a store for one of the official client."""
    import google.api_core.exceptions as api
    import google.auth.exceptions as auth
    from google.cloud.storage.exceptions import DataCorruption

    what = describe(bucket, name)
    if isinstance(error, api.RetryError):
        cause = error.cause
        if isinstance(cause, Exception):
            return explain(cause, bucket, name)
    if isinstance(error, api.GoogleAPICallError):
        return _explain_status(error, bucket, name)
    if isinstance(error, DataCorruption):
        return CorruptReadError(f"{what} came with another checksum than it is stored with")
    if isinstance(error, auth.GoogleAuthError):
        if isinstance(error, auth.TransportError) or error.retryable:
            return TransientReadError(
                f"{what} could not be read: the credentials could not be renewed "
                f"({type(error).__name__})"
            )
        return _explain_login(what)
    return TransientReadError(f"{what} could not be read ({type(error).__name__})")


def describe(bucket: str, name: str = "") -> str:
    """Name an object by the last part of its name, or a bucket, in a message."""
    last = name.partition("?")[0].rstrip("/").rpartition("/")[2]  # what follows may be signed
    return f"{quote_name(last)} in the bucket {bucket!r}" if last else f"the bucket {bucket!r}"


def is_transient(error: Exception) -> bool:
    """Tell whether a request may succeed when it is repeated."""
    return isinstance(error, Exception) and isinstance(explain(error, ""), TransientReadError)


def _explain_status(error: Exception, bucket: str, name: str) -> SourceError:
    what = describe(bucket, name)
    status = int(getattr(error, "code", None) or 0)
    reason = _read_reason(error)
    if status in _TRANSIENT_STATUSES or reason in _RATE_REASONS:
        return TransientReadError(
            f"{what} could not be read (status {status})",
            retry_after_seconds=_read_retry_after(error),
        )
    if status == 401:
        return _explain_login(what)
    if status == 403:
        permission = "storage.objects.get" if name else "storage.objects.list"
        named = _PERMISSION.search(str(error))
        return AccessDeniedError(
            f"{what} may not be read: the permission {named[0] if named else permission} is "
            f"missing on the bucket {bucket!r}{f' ({reason})' if reason else ''}; have it granted "
            "(the role Storage Object Viewer holds it), or use other credentials"
        )
    if status == 404 and (not name or "bucket does not exist" in str(error)):
        return ObjectChangedError(f"there is no bucket {bucket!r}; check its name")
    if status in (404, 412):
        return ObjectChangedError(f"{what} does not exist")
    if status == 416:
        return CorruptReadError(f"{what} ends before the bytes that were asked for")
    return SourceError(f"{what} cannot be read (status {status} {reason}); check its name")


def _explain_login(what: str) -> AccessDeniedError:
    return AccessDeniedError(
        f"{what} may not be read: Google Cloud does not accept the credentials, or there are "
        f"none; {LOG_IN}"
    )


def _read_reason(error: Exception) -> str:
    errors = getattr(error, "errors", None) or [{}]
    return str(errors[0].get("reason", ""))[:40] if isinstance(errors[0], dict) else ""


def _read_retry_after(error: Exception) -> float | None:
    """Read the header, which holds seconds or a date."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    value = headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return None
