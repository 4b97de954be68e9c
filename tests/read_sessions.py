"""Sessions of the BigQuery Storage Read API, opened with Google's client."""

from google.cloud.bigquery_storage_v1 import types


def open_session(read_client, table, streams=1, snapshot=None, codec=0, **options):
    project, dataset, name = table.split(".")
    read_options = types.ReadSession.TableReadOptions(**options)
    if codec:
        read_options.arrow_serialization_options = types.ArrowSerializationOptions(
            buffer_compression=codec
        )
    session = types.ReadSession(
        table=f"projects/{project}/datasets/{dataset}/tables/{name}",
        data_format=types.DataFormat.ARROW,
        read_options=read_options,
    )
    if snapshot:
        session.table_modifiers = types.ReadSession.TableModifiers(snapshot_time=snapshot)
    return read_client.create_read_session(
        parent=f"projects/{project}", read_session=session, max_stream_count=streams
    )
