"""A local stand-in for Cloud Storage."""
