"""The watch page: a run's files as a local page that follows them."""
