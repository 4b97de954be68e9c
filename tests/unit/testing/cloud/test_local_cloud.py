"""The bundled samples on local servers."""

import sys

import pytest

import gemma_tuner as gt
from gemma_tuner.errors import SourceError
from gemma_tuner.testing import LocalCloud


@pytest.fixture(scope="module")
def cloud():
    with LocalCloud() as cloud:
        yield cloud


@pytest.mark.parametrize("package", ["duckdb", "sqlglot"])
def test_without_its_packages_a_table_is_read_and_a_query_names_the_extra(
    cloud, tmp_path, monkeypatch, package
):
    for module in ("query", "dialect"):
        name = f"gemma_tuner.testing.cloud.bigquery.{module}"
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    clients, table = cloud.clients(), cloud.tables["text"]
    for split, count in {"train": 192, "test": 48}.items():
        stream = gt.stream_bigquery(table, split=split, cache_dir=tmp_path, **clients)
        assert len(stream) == count
    remedy = (
        rf"the package {package}, which is not installed; run `pip install 'gemma_tuner\[cloud\]'`"
    )
    with pytest.raises(SourceError, match=remedy):
        gt.stream_bigquery(
            query=f"SELECT * FROM `{table}`",
            max_bytes_billed=False,
            cache_dir=tmp_path,
            **clients,
        )
    with pytest.raises(SourceError, match=remedy):
        gt.stream_bigquery(table, row_restriction="id = '1'", cache_dir=tmp_path, **clients)
