"""What BigQuery's clients raise, as errors that name the table and the remedy.

Messages of BigQuery are passed on only where they cannot hold contents of rows: those of a dry run
and of a session that was not opened.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from gemma_tuner.errors import GemmaTunerError, SourceError
from gemma_tuner.storage.objects import OTHER_FORM, AccessDeniedError

_PERMISSION = re.compile(r"\bbigquery\.[A-Za-z]+\.[A-Za-z]+\b")
_DENIED = re.compile(r"Access Denied: (Table|View|Dataset|Project|Routine) ([\w:.\-$]+?):? ")
_QUOTA_REASONS = ("quotaExceeded", "rateLimitExceeded")
_PERMISSION_REASONS = ("", "accessDenied", "forbidden")  # none over gRPC
LOG_IN = (
    "run `gcloud auth application-default login`, or give bigquery_client= and "
    "bigquery_read_client="
)


@contextmanager
def explain_errors(
    action: str, table: str, permission: str, *, remedy: str = ""
) -> Iterator[None]:
    """Turn what the official clients raise into errors of this library."""
    import google.api_core.exceptions as api
    import google.auth.exceptions as auth
    import requests

    try:
        yield
    except GemmaTunerError:
        raise
    except (auth.RefreshError, auth.DefaultCredentialsError, api.Unauthorized):
        raise AccessDeniedError(
            f"Google Cloud does not accept the credentials, or there are none; {LOG_IN}"
        ) from None
    except api.Forbidden as error:
        _refuse(error, table, permission)
    except api.NotFound:
        raise SourceError(
            f"{table} does not exist; check its name (project.dataset.table) and, of a query's "
            "result, whether it was deleted"
        ) from None
    except (api.ClientError, api.MethodNotImplemented) as error:
        said = f"{quote(error)}); {remedy}" if remedy else f"{name(error)}); see its job's page"
        raise SourceError(f"{action} {table} was refused ({said}") from None
    except (
        api.GoogleAPIError,
        auth.GoogleAuthError,
        requests.RequestException,
        TimeoutError,
        *OTHER_FORM,
    ) as error:
        raise SourceError(
            f"{action} {table} failed ({name(error)}); start again: what is read already is kept"
        ) from None


def name(error: Exception) -> str:
    """Return what kind of error it is, with BigQuery's reason where it gave one."""
    return read_reason(error) or type(error).__name__


def quote(error: Exception) -> str:
    """Return BigQuery's own words, one short line of them."""
    errors = getattr(error, "errors", None) or [{}]
    first = errors[0] if isinstance(errors[0], dict) else {}
    message = str(first.get("message") or getattr(error, "message", ""))
    return " ".join(message.split())[:300]


def read_reason(error: Exception) -> str:
    """Return the reason that REST errors carry, such as ``quotaExceeded``, or an empty text."""
    errors = getattr(error, "errors", None) or [{}]
    return errors[0].get("reason", "") if isinstance(errors[0], dict) else ""


def refuse_lasting(error: Exception) -> None:
    """Refuse what looks as if it could pass, and never does."""
    said = quote(error)
    if "RefreshError" in said:
        raise AccessDeniedError(f"the Google Cloud credentials have expired; {LOG_IN}") from None
    if "larger than max" in said:
        raise SourceError(
            "the channel of bigquery_read_client= is limited to messages smaller than BigQuery's; "
            'make it with options=[("grpc.max_receive_message_length", -1)]'
        ) from None


def _refuse(error: Exception, table: str, permission: str) -> NoReturn:
    if read_reason(error) in _QUOTA_REASONS:
        raise SourceError(
            f"the project's quota for {table} is used up ({read_reason(error)}); wait, or ask for "
            "more; what is read already is kept"
        ) from None
    if read_reason(error) not in _PERMISSION_REASONS:
        raise AccessDeniedError(
            f"BigQuery does not let the project read {table} ({read_reason(error)}); mend that in "
            "the Google Cloud console"
        ) from None
    message = f"{quote(error)} "
    named = ", ".join(dict.fromkeys(_PERMISSION.findall(message)))
    denied = _DENIED.search(message)
    where = f"the {denied[1].lower()} {denied[2]}" if denied else table
    raise AccessDeniedError(
        f"{where} cannot be read without the permission {named or permission}; have it granted, "
        "or use other credentials"
    ) from None
