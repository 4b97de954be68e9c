"""The local BigQuery server's REST interface: datasets, tables, rows and query jobs over HTTP."""

from __future__ import annotations

import contextlib
import json
import re
import urllib.parse
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pyarrow

from gemma_tuner.errors import ConfigError
from gemma_tuner.testing.cloud.bigquery.jobs import Job, describe_error, run_job
from gemma_tuner.testing.cloud.bigquery.tables import (
    LOCATION,
    REASONS,
    Call,
    Catalogue,
    RefusedError,
    StoredTable,
    TableName,
    now,
)
from gemma_tuner.testing.cloud.bigquery.values import arrow_schema, describe, read_rows, write_rows

Answer = dict[str, Any]

_NAME = "([^/]+)"
_DATASETS = f"projects/{_NAME}/datasets"
_TABLES = f"{_DATASETS}/{_NAME}/tables"
_JOBS = f"projects/{_NAME}/jobs"
_QUERIES = f"projects/{_NAME}/queries"
# BigQuery ends a page at 10 MB; so many rows do the same for tests.
_MAX_PAGE_ROWS = 10_000


class RestService(ThreadingHTTPServer):
    """Serves on a free port of 127.0.0.1."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, catalogue: Catalogue) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.catalogue = catalogue
        self.jobs: dict[tuple[str, str], Job] = {}
        self._routes: tuple[tuple[str, str, str, Callable[..., Answer]], ...] = (
            ("POST", _DATASETS, "datasets.insert", self._insert_dataset),
            ("GET", f"{_DATASETS}/{_NAME}", "datasets.get", self._get_dataset),
            ("POST", _TABLES, "tables.insert", self._insert_table),
            ("GET", f"{_TABLES}/{_NAME}", "tables.get", self._get_table),
            ("PATCH", f"{_TABLES}/{_NAME}", "tables.patch", self._patch_table),
            ("DELETE", f"{_TABLES}/{_NAME}", "tables.delete", self._delete_table),
            ("POST", f"{_TABLES}/{_NAME}/insertAll", "tabledata.insertAll", self._insert_rows),
            ("GET", f"{_TABLES}/{_NAME}/data", "tabledata.list", self._list_rows),
            ("POST", _JOBS, "jobs.insert", self._insert_job),
            ("GET", f"{_JOBS}/{_NAME}", "jobs.get", self._get_job),
            ("POST", _QUERIES, "jobs.query", self._query),
            ("GET", f"{_QUERIES}/{_NAME}", "jobs.getQueryResults", self._get_results),
        )

    def answer(self, verb: str, target: str, body: bytes) -> Answer:
        """Answer one request."""
        url = urllib.parse.urlsplit(target)
        path = urllib.parse.unquote(url.path).removeprefix("/bigquery/v2/").strip("/")
        parameters = {
            name.removeprefix("formatOptions."): value
            for name, value in urllib.parse.parse_qsl(url.query)
        }
        content = json.loads(body) if body else {}
        for route_verb, pattern, method, handle in self._routes:
            match = re.fullmatch(pattern, path)
            if match and verb == route_verb:
                self.catalogue.enter(_describe_call(method, match, parameters, content))
                return handle(*match.groups(), parameters, content)
        raise RefusedError("notImplemented", f"this server does not know {verb} {path}")

    # --- datasets and tables ---

    def _insert_dataset(self, project: str, _: Answer, content: Answer) -> Answer:
        dataset = content["datasetReference"]["datasetId"]
        with self.catalogue.lock:
            if (project, dataset) in self.catalogue.datasets:
                raise RefusedError("duplicate", f"Already Exists: Dataset {project}:{dataset}")
            self.catalogue.datasets[project, dataset] = now()
        return self._get_dataset(project, dataset, {}, {})

    def _get_dataset(self, project: str, dataset: str, _: Answer, __: Answer) -> Answer:
        created = self.catalogue.datasets.get((project, dataset))
        if created is None:
            raise RefusedError("notFound", f"Not found: Dataset {project}:{dataset}")
        return {
            "kind": "bigquery#dataset",
            "id": f"{project}:{dataset}",
            "datasetReference": {"projectId": project, "datasetId": dataset},
            "location": LOCATION,
            "creationTime": str(round(created.timestamp() * 1000)),
        }

    def _insert_table(self, project: str, dataset: str, _: Answer, content: Answer) -> Answer:
        name = TableName(project, dataset, content["tableReference"]["tableId"])
        with self.catalogue.lock:
            if (project, dataset) not in self.catalogue.datasets:
                raise RefusedError("notFound", f"Not found: Dataset {project}:{dataset}")
            if name in self.catalogue.tables:
                raise RefusedError("duplicate", f"Already Exists: Table {name.legacy}")
            if "view" in content:
                return _describe_table(self.catalogue.put_view(name, content["view"]["query"]))
            fields = content.get("schema", {}).get("fields", [])
            stored = self.catalogue.put(name, arrow_schema(fields).empty_table())
            stored.properties |= _changeable(content)
            return _describe_table(stored)

    def _get_table(self, *names: Any) -> Answer:
        return _describe_table(self._find(TableName(*names[:3]), "bigquery.tables.get"))

    def _patch_table(self, project: str, dataset: str, table: str, *sent: Answer) -> Answer:
        stored = self._find(TableName(project, dataset, table), "bigquery.tables.update")
        stored.properties |= _changeable(sent[1])
        return _describe_table(stored)

    def _delete_table(self, project: str, dataset: str, table: str, *_: Answer) -> Answer:
        name = TableName(project, dataset, table)
        self._find(name, "bigquery.tables.delete")
        with self.catalogue.lock:
            del self.catalogue.tables[name]
        return {}

    def _find(self, name: TableName, permission: str) -> StoredTable:
        if self.catalogue.is_denied(name, permission):
            raise RefusedError(
                "accessDenied",
                f"Access Denied: Table {name.legacy}: Permission {permission} denied on table "
                f"{name.legacy} (or it may not exist).",
            )
        try:
            return self.catalogue.find(name)
        except RefusedError as error:  # only queries name the location
            raise RefusedError("notFound", str(error).partition(" was not found")[0]) from error

    # --- rows ---

    def _insert_rows(self, project: str, dataset: str, table: str, *sent: Answer) -> Answer:
        name = TableName(project, dataset, table)
        with self.catalogue.lock:
            stored = self._find(name, "bigquery.tables.updateData")
            old = stored.latest.content
            rows = [row["json"] for row in sent[1]["rows"]]
            errors = [
                {"index": index, "errors": [problem]}
                for index, row in enumerate(rows)
                if (problem := _check_row(row, old.schema)) is not None
            ]
            if errors:  # BigQuery takes all rows or none, unless told to skip the invalid ones
                return {"kind": "bigquery#tableDataInsertAllResponse", "insertErrors": errors}
            self.catalogue.put(name, pyarrow.concat_tables([old, read_rows(rows, old.schema)]))
        return {"kind": "bigquery#tableDataInsertAllResponse"}

    def _list_rows(
        self, project: str, dataset: str, table: str, parameters: Answer, _: Answer
    ) -> Answer:
        stored = self._find(TableName(project, dataset, table), "bigquery.tables.getData")
        if stored.view_sql is not None:
            raise RefusedError("invalid", "Cannot list a table of type VIEW.")
        content = stored.latest.content
        if parameters.get("selectedFields"):
            asked = [name.partition(".")[0] for name in parameters["selectedFields"].split(",")]
            missing = sorted(set(asked) - set(content.column_names))
            if missing:
                raise RefusedError("invalid", f"No such field: {', '.join(missing)}")
            content = content.select([name for name in content.column_names if name in asked])
        return {
            "kind": "bigquery#tableDataList",
            "etag": stored.etag,
            **_page(content, parameters),
        }

    # --- jobs ---

    def _insert_job(self, project: str, _: Answer, content: Answer) -> Answer:
        job_id = content.get("jobReference", {}).get("jobId")
        return self._run(project, content["configuration"], job_id).describe()

    def _run(self, project: str, configuration: Answer, job_id: str | None) -> Job:
        if self.catalogue.is_denied(project, "bigquery.jobs.create"):
            raise RefusedError(
                "accessDenied",
                f"Access Denied: Project {project}: User does not have bigquery.jobs.create "
                f"permission in project {project}.",
            )
        with self.catalogue.lock:
            if job_id and (project, job_id) in self.jobs:
                raise RefusedError(
                    "duplicate", f"Already Exists: Job {project}:{LOCATION}.{job_id}"
                )
            job = run_job(self.catalogue, project, configuration, job_id)
            if configuration.get("dryRun"):
                if job.error is not None:
                    raise job.error
            else:
                self.jobs[project, job.id] = job
        return job

    def _find_job(self, project: str, job_id: str) -> Job:
        if (project, job_id) not in self.jobs:
            raise RefusedError("notFound", f"Not found: Job {project}:{job_id}")
        return self.jobs[project, job_id]

    def _get_job(self, project: str, job_id: str, *_: Answer) -> Answer:
        return self._find_job(project, job_id).describe()

    def _query(self, project: str, _: Answer, content: Answer) -> Answer:
        keys = ("query", "useLegacySql", "queryParameters", "defaultDataset", "maximumBytesBilled")
        query = {key: content[key] for key in keys if key in content}
        configuration = {"query": query, "dryRun": content.get("dryRun", False)}
        job = self._run(project, configuration, None)
        return self._describe_results(
            job, {**content.get("formatOptions", {}), "maxResults": content.get("maxResults")}
        )

    def _get_results(self, project: str, job_id: str, parameters: Answer, _: Answer) -> Answer:
        return self._describe_results(self._find_job(project, job_id), parameters)

    def _describe_results(self, job: Job, parameters: Answer) -> Answer:
        if job.error is not None:  # BigQuery turns a job's failure into that of this call
            raise job.error
        answer = {
            "kind": "bigquery#queryResponse",
            "jobComplete": True,
            "cacheHit": False,
            "jobReference": job.describe()["jobReference"],
        }
        if job.estimate is not None:
            answer["schema"] = {"fields": describe(job.estimate.schema)}
            answer["totalBytesProcessed"] = str(job.estimate.bytes_processed)
            answer["totalBytesBilled"] = str(job.bytes_billed)
        if job.result is not None:
            answer |= _page(job.result, parameters)
        return answer


def _describe_call(
    method: str, match: re.Match[str], parameters: Mapping[str, str], content: Answer
) -> Call:
    names = match.groups()
    configuration = content.get("configuration", content)
    query = configuration.get("query")
    offset = parameters.get("startIndex")
    return Call(
        method,
        ".".join(names) if len(names) == 3 else None,
        selected_fields=tuple(filter(None, parameters.get("selectedFields", "").split(","))),
        offset=int(offset) if offset else None,
        query=query.get("query") if isinstance(query, dict) else query,
        dry_run=bool(configuration.get("dryRun", False)),
    )


def _check_row(row: dict[str, Any], schema: pyarrow.Schema) -> Answer | None:
    unknown = sorted(set(row) - set(schema.names))
    if unknown:
        return {
            "reason": "invalid",
            "location": unknown[0],
            "message": f"no such field: {unknown[0]}.",
        }
    try:
        read_rows([row], schema)
    except ValueError as error:
        return {"reason": "invalid", "message": str(error)}
    return None


def _page(content: pyarrow.Table, parameters: Mapping[str, Any]) -> Answer:
    """Return one page of rows, and the token of the next if there is one."""
    start = int(parameters.get("pageToken") or parameters.get("startIndex") or 0)
    asked = parameters.get("maxResults")
    size = _MAX_PAGE_ROWS if asked is None else min(int(asked), _MAX_PAGE_ROWS)
    int64 = str(parameters.get("useInt64Timestamp", "")).lower() == "true"
    rows = write_rows(content.slice(start, size), int64_timestamps=int64)
    page: Answer = {"totalRows": str(content.num_rows), "rows": rows}
    if start + len(rows) < content.num_rows:  # so too where no rows were asked for
        page["pageToken"] = str(start + len(rows))
    return page


def _changeable(content: Answer) -> Answer:
    keys = ("description", "friendlyName", "labels", "expirationTime")
    return {key: content[key] for key in keys if key in content}


def _describe_table(stored: StoredTable) -> Answer:
    name, content = stored.name, stored.latest.content
    view = {} if stored.view_sql is None else {"view": {"query": stored.view_sql}}
    return {
        "kind": "bigquery#table",
        "etag": stored.etag,
        "id": name.legacy,
        "tableReference": name.reference,
        "schema": {"fields": describe(content.schema)},
        "numRows": str(content.num_rows),
        "numBytes": str(content.nbytes),
        "creationTime": str(round(stored.created.timestamp() * 1000)),
        "lastModifiedTime": str(round(stored.latest.at.timestamp() * 1000)),
        "type": "TABLE" if stored.view_sql is None else "VIEW",
        "location": LOCATION,
        **view,
        **stored.properties,
    }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: RestService  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Write nothing: the server's own log of calls says more."""

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            status, answer = 200, self.server.answer(self.command, self.path, body)
        except (RefusedError, ConfigError) as error:
            if isinstance(error, ConfigError):
                error = RefusedError("invalid", str(error))
            status = REASONS[error.reason][0]
            detail = {**describe_error(error), "domain": "global"}
            answer = {"error": {"code": status, "message": str(error), "errors": [detail]}}
        encoded = json.dumps(answer).encode()
        with contextlib.suppress(ConnectionError):  # a client that gave up waiting
            self.send_response(status)
            self.send_header("Content-Type", "application/json; charset=UTF-8")
            self.send_header("Content-Length", str(len(encoded)))
            self.end_headers()
            self.wfile.write(encoded)

    do_GET = do_POST = do_PATCH = do_DELETE = _answer  # noqa: N815
