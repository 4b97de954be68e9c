"""What lies in a media cache: every entry read and compared with its checksum."""

import pathlib
from typing import NamedTuple

from gemma_tuner.storage.cache_folder import CacheFolder, read_entry


class CacheCheck(NamedTuple):
    """How many entries are whole, the bytes of media in them, and how many are damaged."""

    entries: int
    num_bytes: int
    damaged: int


def check_cache(folder):
    """Read every entry of a cache's folder; nothing is changed."""
    contents = []
    for entry in CacheFolder(folder).list_entries():
        with pathlib.Path(entry.path).open("rb", buffering=0) as file:
            contents.append(read_entry(file))
    whole = [content for content in contents if content is not None]
    return CacheCheck(len(whole), sum(map(len, whole)), len(contents) - len(whole))
