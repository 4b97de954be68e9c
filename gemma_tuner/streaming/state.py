"""The place of a stream, and its state as JSON: two numbers, and what they refer to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from gemma_tuner.checks import is_whole_number
from gemma_tuner.differences import list_differences, shorten_differences
from gemma_tuner.errors import ResumeError

STATE_VERSION = 2
"""Raise it whenever a saved state would mean another order."""


class Place:
    """Where a stream stands: a slot, numbered on over the epochs, and its epoch's bad rows."""

    def __init__(self, num_slots: int, num_views: int) -> None:
        self._num_slots = num_slots
        self.epoch = 0
        self.slot = 0  # the first that was not handed out, numbered on over the epochs
        self.bad = [0] * num_views  # rows of each data set that could not be used
        self.is_begun = False  # the latest iteration has handed out something
        self.is_finished = False

    @property
    def position(self) -> int:
        """Slots of the epoch that were handed out."""
        return self.slot - self.epoch * self._num_slots

    @property
    def end(self) -> int:
        """The first slot of the next epoch."""
        return (self.epoch + 1) * self._num_slots

    def begin_epoch(self) -> None:
        """Go on to the next epoch, unless this one has not been begun or was resumed."""
        if self.is_begun or self.slot == self.end:
            self.epoch += 1
            self.bad = [0] * len(self.bad)
            if not self.is_finished:
                self.slot = self.epoch * self._num_slots
        self.is_begun = self.is_finished = False

    def move(self, epoch: int, slot: int, bad: Sequence[int]) -> None:
        """Stand elsewhere, as where nothing of the epoch's rest was handed out."""
        self.epoch, self.slot, self.bad = epoch, slot, list(bad)
        self.is_begun = self.is_finished = False

    def follow(self, num_slots: int, bad: Sequence[int]) -> None:
        """Stand where shards have come to, over the ends of epochs."""
        slot = self.slot + num_slots
        self.move(max(self.epoch, (slot - 1) // self._num_slots), slot, bad)

    def to_state(self) -> dict[str, Any]:
        """Write it as the numbers of a state."""
        epoch, position, bad = self.epoch, self.position, self.bad
        if not 0 <= position <= self._num_slots:  # a shard that is done before others
            epoch, position = divmod(self.slot, self._num_slots)
            bad = self.bad if epoch == self.epoch else [0] * len(self.bad)
        return {"epoch": epoch, "position": position, "bad": list(bad)}


def identify(views: Sequence[Mapping[str, Any]], weights: Sequence[Fraction]) -> dict[str, Any]:
    """Return what the numbers of a state refer to."""
    if len(views) == 1:
        return {"version": STATE_VERSION, **views[0]}
    streams = {f"stream {number}": view for number, view in enumerate(views, 1)}
    return {"version": STATE_VERSION, "weights": list(map(str, weights)), **streams}


def read_state(
    state: Mapping[str, Any], identity: Mapping[str, Any], *, num_rows: int
) -> tuple[int, int, list[int]]:
    """Read the numbers of a state."""
    if not isinstance(state, Mapping):
        raise ResumeError(f"the stream's state is {type(state).__name__} and not a dictionary")
    missing = [name for name in (*identity, "epoch", "position", "bad") if name not in state]
    if missing:
        raise ResumeError(
            f"the stream's state lacks {', '.join(missing)}; it is not a state of such a stream"
        )
    saved = {name: state[name] for name in identity}
    if differences := list_differences(saved, identity):
        raise ResumeError(
            f"the saved state is of another stream (saved → here): "
            f"{shorten_differences(differences)}; give the run the same data, seed, subset and "
            "mix, or start a new one"
        )
    epoch, position, bad = state["epoch"], state["position"], state["bad"]
    num_views = len(identity.get("weights", [1]))
    is_right = isinstance(bad, list) and len(bad) == num_views
    for value in (epoch, position, *(bad if is_right else ())):
        is_right &= is_whole_number(value) and value >= 0
    if not is_right:
        raise ResumeError(
            f"the stream's state has epoch {epoch!r}, position {position!r}, bad {bad!r}"
        )
    if position > num_rows:
        raise ResumeError(f"the stream's state is at position {position} of {num_rows} rows")
    return epoch, position, list(bad)
