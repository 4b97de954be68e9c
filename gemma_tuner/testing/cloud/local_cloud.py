"""The bundled samples on local servers: rows as BigQuery tables, media as objects of a bucket."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import Any, Self

import pyarrow

from gemma_tuner.testing.cloud.bigquery.server import BigQueryServer
from gemma_tuner.testing.cloud.gcs.server import GcsServer
from gemma_tuner.testing.samples import Modality, sample_data

PROJECT = "local-project"
_MODALITIES: tuple[Modality, ...] = ("text", "image", "audio")
_COLUMNS: tuple[str, ...] = ("id", "split", "prompt", "response")


class LocalCloud:
    """Stand-ins for BigQuery and Cloud Storage on 127.0.0.1, filled with the bundled samples.

    Started again they hold the same rows and the same versions of objects, so that a run can be
    stopped and resumed in another process.

    Example::

        with LocalCloud() as cloud:
            stream = gt.stream_bigquery(cloud.tables["image"], **cloud.clients())

    Attributes:
        tables: The table of each modality: ``id split prompt response``, and ``image`` or
            ``audio`` with ``gs://`` URIs.
        gcs: The server that holds their media.
        bigquery: The server that holds the tables.
    """

    def __init__(self) -> None:
        self.tables = {name: f"{PROJECT}.samples.{name}" for name in _MODALITIES}
        self.gcs = GcsServer()
        self.bigquery = BigQueryServer()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(self.bigquery)
        self._stack.enter_context(self.gcs)
        for modality in _MODALITIES:
            self._upload(modality)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def clients(self) -> dict[str, Any]:
        """Return the keywords by which ``stream_bigquery`` speaks to these servers."""
        return {
            "gcs_client": self.gcs.client(),
            "bigquery_client": self.bigquery.client(PROJECT),
            "bigquery_read_client": self.bigquery.read_client(),
        }

    def _upload(self, modality: Modality) -> None:
        folder = sample_data(modality)
        lines = (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        columns = {name: [row[name] for row in rows] for name in _COLUMNS}
        if modality != "text":
            for number, row in enumerate(rows, 1):
                name = row[modality]
                content = (folder / name).read_bytes()
                self.gcs.put("samples", f"{modality}/{name}", content, generation=number)
            columns[modality] = [f"gs://samples/{modality}/{row[modality]}" for row in rows]
        self.bigquery.put_table(self.tables[modality], pyarrow.table(columns))
