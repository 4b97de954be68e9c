"""A local stand-in for BigQuery."""
