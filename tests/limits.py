"""What a full disk is like, without one."""

import resource
from contextlib import contextmanager


@contextmanager
def files_limited_to(num_bytes):
    """No file of this process may grow beyond so many bytes; pytest's own output neither."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
