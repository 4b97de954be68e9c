"""Local stand-ins for Cloud Storage and BigQuery."""
