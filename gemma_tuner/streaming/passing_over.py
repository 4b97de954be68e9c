"""Rows that cannot be used: noted and counted against their budget, listed, tried again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gemma_tuner.errors import DataError
from gemma_tuner.streaming.manifest import list_stored
from gemma_tuner.streaming.quarantine import BadExample, Stage, read_reason
from gemma_tuner.streaming.slots import Slot
from gemma_tuner.streaming.view import DatasetView


def note_bad(
    slot: Slot, stage: Stage, error: DataError, *, bad: int, consecutive: int, rows: int
) -> None:
    """Note a row in the quarantine, and raise its error where the budget allows no more."""
    quarantine = slot.view.quarantine
    if quarantine.budget.max_bad_fraction:
        quarantine.add(
            BadExample(
                key=error.key,
                origin=slot.view.manifest.read_origin(slot.row),
                row=slot.row,
                stage=stage,
                error=type(error.__cause__ or error).__name__,
                reason=read_reason(error),
                objects=tuple(
                    f"{stored.uri}#{stored.generation}" for stored in list_stored(slot.read())
                ),
            )
        )
    quarantine.budget.check(
        error, bad=bad, consecutive=consecutive, rows=rows, read_records=quarantine.inspect
    )


def list_bad(views: Sequence[DatasetView]) -> list[BadExample]:
    """List what some data sets have in quarantine."""
    records = []
    for view in _by_file(views):
        records += view.quarantine.inspect()
    return records


def retry_bad(views: Sequence[DatasetView]) -> tuple[int, int]:
    """Load what is in quarantine again, and take out what can be used now."""
    num_mended = num_bad = 0
    for view in _by_file(views):
        mended = []
        for record in view.quarantine.inspect():
            if record.row is None or record.stage == "collate":
                num_bad += 1
                continue
            try:
                Slot(0, record.row, view).load()
            except DataError:
                num_bad += 1
            else:
                mended.append(record)
        remaining = [r for r in view.quarantine.inspect() if r not in mended]
        view.quarantine.replace(remaining)
        num_mended += len(mended)
    return num_mended, num_bad


def _by_file(views: Sequence[DatasetView]) -> Iterable[DatasetView]:
    """One data set for each quarantine; streams that were opened apart may share a file."""
    return {view.quarantine.path: view for view in views}.values()
