"""Pins the media of examples, of whatever source, to what is there now."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from gemma_tuner.disk import is_within
from gemma_tuner.errors import DataError, SourceError, quote_name
from gemma_tuner.media.encoded import name_reason
from gemma_tuner.media.pinned import pin_file, pin_part
from gemma_tuner.modalities import kind_of
from gemma_tuner.records import Audio, Example, Image, StoredObject
from gemma_tuner.sources.examples import Outcome, Source
from gemma_tuner.storage.objects import ObjectStore
from gemma_tuner.storage.stores import Stores, is_stored

_BATCH_EXAMPLES = 1000  # as many as a page of a listing holds


def pin_media(
    outcomes: Iterable[tuple[str, Outcome]], stores: Stores
) -> Iterator[tuple[str, Outcome]]:
    """Give every image and clip in a bucket its version, size and checksum."""
    # Missing, empty or overwritten media are what is wrong with their example, and end nothing.
    waiting: list[tuple[str, Outcome]] = []
    uris: dict[str, None] = {}

    def pin_waiting() -> Iterator[tuple[str, Outcome]]:
        if uris:
            by_store: dict[ObjectStore, list[str]] = {}
            for uri in uris:
                by_store.setdefault(stores.find(uri), []).append(uri)
            pins: dict[str, StoredObject | SourceError] = {}
            for store, its in by_store.items():
                pins |= zip(its, store.pin_objects(its), strict=True)
            for origin, outcome in waiting:
                yield origin, _pin(outcome, pins)
        waiting.clear()
        uris.clear()

    for origin, outcome in outcomes:
        wanted = [uri for uri in map(_read_uri, _list_media(outcome)) if uri is not None]
        if not wanted and not waiting:
            yield origin, outcome
            continue
        waiting.append((origin, outcome))
        uris.update(dict.fromkeys(wanted))
        if len(waiting) == _BATCH_EXAMPLES or len(uris) >= _BATCH_EXAMPLES:
            yield from pin_waiting()
    yield from pin_waiting()


def pin_files(
    source: Source,
) -> Iterator[tuple[str, Outcome]]:
    """Give every image and clip on the local disk its size and checksum: each is read once."""
    # Whatever the source, no row has a file read that lies out of its reach.
    root = source.root

    def pin(part: Image | Audio, key: str) -> Image | Audio:
        found = part.source
        if isinstance(found, str) and not is_stored(found):
            if not is_within(root / found, source.reach):
                raise DataError(
                    f"{kind_of(part)} {quote_name(Path(found).name)} lies outside of the folders "
                    "in which these rows may name files; if they may, say where by media_root= "
                    '("/" is anywhere)',
                    key=key,
                )
            return replace(part, source=pin_file(root / found, found))
        if (
            isinstance(found, StoredObject)
            and found.start is not None
            and not is_stored(found.uri)
        ):
            return replace(part, source=pin_part(root / found.uri, found))
        return part

    for origin, outcome in source:
        try:
            if isinstance(outcome, Example):
                outcome = outcome.replace_media(partial(pin, key=outcome.key))  # noqa: PLW2901
            yield origin, outcome
        except DataError as error:
            yield origin, error
        except OSError as error:
            reason = name_reason(error)
            unread = f"a file that holds its media cannot be read ({reason}); check it"
            yield origin, DataError(unread, key=outcome.key)


def _list_media(outcome: Outcome) -> Iterable[Image | Audio]:
    return outcome.media if isinstance(outcome, Example) else ()


def _read_uri(part: Image | Audio) -> str | None:
    """Return the URI of media that are in a bucket and of which something is not known."""
    source = part.source
    if isinstance(source, str):
        return source if is_stored(source) else None
    if not isinstance(source, StoredObject) or source.start is not None:
        return None
    is_known = None not in (source.generation, source.num_bytes, source.crc32c)
    return None if is_known or not is_stored(source.uri) else source.uri


def _pin(outcome: Outcome, pins: Mapping[str, StoredObject | SourceError]) -> Outcome:
    if isinstance(outcome, DataError):
        return outcome
    key = outcome.key

    def pin(part: Image | Audio) -> Image | Audio:
        uri = _read_uri(part)
        if uri is None:
            return part
        kind = kind_of(part)
        found = pins[uri]
        if isinstance(found, SourceError):
            raise DataError(
                f"its {kind}: {found}; put it there, or take the row out", key=key
            ) from found
        # What follows the question mark may be a signature.
        name = quote_name(uri.partition("?")[0].rpartition("/")[2])
        if found.num_bytes == 0:
            raise DataError(f"its {kind} {name} is empty (0 bytes); upload it again", key=key)
        if isinstance(part.source, StoredObject) and part.source.generation not in (
            None,
            found.generation,
        ):
            raise DataError(
                f"its {kind} {name} was overwritten: the row names generation "
                f"{part.source.generation}, and {found.generation} is there; write the row's "
                "reference anew",
                key=key,
            )
        return replace(part, source=found)

    try:
        return outcome.replace_media(pin)
    except DataError as error:
        return error
