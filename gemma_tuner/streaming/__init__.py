"""A resumable, shuffled stream of examples over a local manifest of rows."""
