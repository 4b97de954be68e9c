"""Query jobs of the local BigQuery server: estimate, budget, run, keep the result in a table."""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow

from gemma_tuner.testing.cloud.bigquery.tables import (
    LOCATION,
    Catalogue,
    RefusedError,
    TableName,
    now,
    refusing_sql_without_packages,
)
from gemma_tuner.testing.cloud.bigquery.values import describe

if TYPE_CHECKING:
    from gemma_tuner.testing.cloud.bigquery.query import Estimate

# BigQuery hides results that got no destination in a dataset of this kind, for about a day.
_ANONYMOUS_DATASET = "_anonymous_results"


@dataclass(slots=True)
class Job:
    """A finished query job."""

    project: str
    id: str
    configuration: dict[str, Any]  # ``JobConfiguration`` as REST has it, with the destination
    created: datetime.datetime
    estimate: Estimate | None = None  # None where it failed before that was known
    result: pyarrow.Table | None = None  # whatever becomes of the destination
    error: RefusedError | None = None
    bytes_billed: int = 0

    def describe(self) -> dict[str, Any]:
        """Return the REST form, ``Job``."""
        milliseconds = str(round(self.created.timestamp() * 1000))
        query: dict[str, Any] = {"statementType": "SELECT", "cacheHit": False}
        statistics: dict[str, Any] = {
            "creationTime": milliseconds,
            "startTime": milliseconds,
            "endTime": milliseconds,
            "query": query,
        }
        if self.estimate is not None:
            processed = str(self.estimate.bytes_processed)
            statistics["totalBytesProcessed"] = processed
            query |= {
                "totalBytesProcessed": processed,
                "totalBytesBilled": str(self.bytes_billed),
                "schema": {"fields": describe(self.estimate.schema)},
            }
        status: dict[str, Any] = {"state": "DONE"}
        if self.error is not None:
            status["errorResult"] = describe_error(self.error)
            status["errors"] = [describe_error(self.error)]
        return {
            "kind": "bigquery#job",
            "id": f"{self.project}:{LOCATION}.{self.id}",
            "jobReference": {"projectId": self.project, "jobId": self.id, "location": LOCATION},
            "configuration": self.configuration,
            "statistics": statistics,
            "status": status,
        }


def describe_error(error: RefusedError) -> dict[str, str]:
    """Return the REST form, ``ErrorProto``."""
    location = {"location": "query"} if error.reason == "invalidQuery" else {}
    return {"reason": error.reason, "message": str(error), **location}


def run_job(
    catalogue: Catalogue,
    project: str,
    configuration: Mapping[str, Any],
    job_id: str | None = None,
) -> Job:
    """Run a query job; whatever goes wrong is in the job that it returns."""
    query = dict(configuration.get("query", {}))
    job = Job(
        project, job_id or str(uuid.uuid4()), {**configuration, "query": query}, created=now()
    )
    job.configuration["jobType"] = "QUERY"
    try:
        _run(catalogue, job, query)
    except RefusedError as error:
        # Without its traceback, which would keep DuckDB's connection alive as long as the job.
        job.error = RefusedError(error.reason, str(error))
    return job


def _run(catalogue: Catalogue, job: Job, query: dict[str, Any]) -> None:
    if not query:
        raise RefusedError("notImplemented", "this server runs query jobs, and no others")
    if query.get("useLegacySql", True):
        raise RefusedError("notImplemented", "this server does not know legacy SQL")
    with refusing_sql_without_packages():
        from gemma_tuner.testing.cloud.bigquery.query import Query  # noqa: PLC0415
    with Query(
        catalogue,
        query["query"],
        project=job.project,
        default_dataset=query.get("defaultDataset"),
        parameters=query.get("queryParameters", ()),
    ) as bound:
        job.estimate = bound.estimate()
        if job.configuration.get("dryRun"):
            return
        _check_budget(job.estimate, query.get("maximumBytesBilled"))
        job.result = bound.run()
    job.bytes_billed = job.estimate.bytes_billed
    _store(catalogue, job.project, job.result, query)


def _check_budget(estimate: Estimate, budget: str | None) -> None:
    if budget is not None and estimate.bytes_billed > int(budget):
        raise RefusedError(
            "bytesBilledLimitExceeded",
            f"Query exceeded limit for bytes billed: {budget}. "
            f"{estimate.bytes_billed} or higher required.",
        )


def _store(
    catalogue: Catalogue, project: str, result: pyarrow.Table, query: dict[str, Any]
) -> None:
    """Keep the result in its destination, which is written into ``query`` if it names none."""
    reference = query.get("destinationTable")
    if reference is None:
        name = TableName(project, _ANONYMOUS_DATASET, f"anon_{uuid.uuid4().hex}")
        query["destinationTable"] = name.reference
        catalogue.put(name, result)
        return
    name = TableName(reference["projectId"], reference["datasetId"], reference["tableId"])
    with catalogue.lock:
        if (name.project, name.dataset) not in catalogue.datasets:
            catalogue.find(name)  # raises: there is no such dataset
        stored = catalogue.tables.get(name)
        disposition = query.get("writeDisposition", "WRITE_EMPTY")
        if stored is not None and stored.latest.content.num_rows:
            if disposition == "WRITE_EMPTY":
                raise RefusedError("duplicate", f"Already Exists: Table {name.legacy}")
            if disposition == "WRITE_APPEND":
                if stored.latest.content.schema != result.schema:
                    raise RefusedError(
                        "invalid", f"Provided Schema does not match Table {name.legacy}."
                    )
                result = pyarrow.concat_tables([stored.latest.content, result])
        if stored is None and query.get("createDisposition") == "CREATE_NEVER":
            catalogue.find(name)  # raises: there is no such table
        catalogue.put(name, result)
