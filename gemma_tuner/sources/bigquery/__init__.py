"""Rows of BigQuery tables and queries."""
