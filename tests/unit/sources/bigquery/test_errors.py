"""What the official clients raise, and what becomes of it."""

import google.api_core.exceptions as api
import google.auth.exceptions as auth
import pytest
import requests

from gemma_tuner.errors import SourceError
from gemma_tuner.sources.bigquery.errors import explain_errors, refuse_lasting
from gemma_tuner.storage.objects import AccessDeniedError

SECRET = "the ring lies under the oak"


def forbid(reason: str, message: str = "") -> api.Forbidden:
    return api.Forbidden(message, errors=[{"reason": reason, "message": message}])


def explain(error: Exception, **options) -> SourceError:
    with (
        pytest.raises(SourceError) as caught,
        explain_errors("reading", "p.d.t", "bigquery.tables.getData", **options),
    ):
        raise error
    assert SECRET not in str(caught.value)
    assert caught.value.__suppress_context__
    return caught.value


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (forbid("accessDenied"), AccessDeniedError, "p.d.t cannot be read without the permission"),
        (
            forbid(
                "accessDenied",
                "Access Denied: Table q:e.u: User does not have permission to query table q:e.u, "
                "bigquery.tables.getData or bigquery.tables.get",
            ),
            AccessDeniedError,
            "the table q:e.u cannot be read without the permission bigquery.tables.getData, "
            "bigquery.tables.get",
        ),
        (
            api.PermissionDenied("the user does not have 'bigquery.readsessions.create'"),
            AccessDeniedError,
            "p.d.t cannot be read without the permission bigquery.readsessions.create;",
        ),
        (forbid("billingNotEnabled"), AccessDeniedError, "(billingNotEnabled)"),
        (forbid("quotaExceeded"), SourceError, "quota for p.d.t is used up (quotaExceeded); wait"),
        (
            api.Unauthenticated(SECRET),
            AccessDeniedError,
            "gcloud auth application-default login`, or give bigquery_client= and "
            "bigquery_read_client=",
        ),
        (auth.RefreshError(SECRET), AccessDeniedError, "gcloud auth application-default login"),
        (api.NotFound(SECRET), SourceError, "p.d.t does not exist; check its name"),
        (api.InvalidArgument(SECRET), SourceError, "reading p.d.t was refused (InvalidArgument)"),
        (api.RetryError(SECRET, cause=None), SourceError, "reading p.d.t failed (RetryError)"),
        (auth.TransportError(SECRET), SourceError, "failed (TransportError); start again"),
        (requests.ConnectionError(SECRET), SourceError, "failed (ConnectionError)"),
    ],
)
def test_errors_name_the_table_and_the_remedy(error, kind, message):
    found = explain(error)
    assert type(found) is kind
    assert message in str(found)


def test_bigquerys_words_are_passed_on_with_a_remedy_alone():
    error = api.BadRequest("", errors=[{"reason": "invalidQuery", "message": "no such column\na"}])
    assert "(invalidQuery)" in str(explain(error))
    assert "was refused (no such column a); mend it" in str(explain(error, remedy="mend it"))


def test_what_never_passes_is_not_repeated():
    refuse_lasting(api.ServiceUnavailable("connection reset"))
    with pytest.raises(AccessDeniedError, match="credentials have expired"):
        refuse_lasting(api.ServiceUnavailable("plugin failed with error: RefreshError(...)"))
    with pytest.raises(SourceError, match=r"bigquery_read_client=.*max_receive_message_length"):
        refuse_lasting(api.ResourceExhausted("CLIENT: Received message larger than max"))
