"""The state of a stream, as JSON: two numbers, and what they refer to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from gemma_tuner.errors import ResumeError

STATE_VERSION = 2
"""Raise it whenever a saved state would mean another order."""


def identify(portions: Sequence[Mapping[str, Any]], weights: Sequence[Fraction]) -> dict[str, Any]:
    """Return what the numbers of a state refer to.

    Args:
        portions: What each data set of the stream is, and how it is shuffled.
        weights: How much of each a mix takes.

    Returns:
        The only data set's description, or the weights and descriptions of a mix.
    """
    if len(portions) == 1:
        return {"version": STATE_VERSION, **portions[0]}
    streams = {f"stream {number}": portion for number, portion in enumerate(portions, 1)}
    return {"version": STATE_VERSION, "weights": list(map(str, weights)), **streams}


def read_state(
    state: Mapping[str, Any], identity: Mapping[str, Any], *, num_rows: int
) -> tuple[int, int, list[int]]:
    """Read the numbers of a state.

    Args:
        state: The identity, ``epoch position bad``.
        identity: Of the stream that shall continue, as :func:`identify`.
        num_rows: Its rows.

    Returns:
        Epoch, position, and the bad rows of each data set in this epoch.

    Raises:
        ResumeError: No state, or one of another stream; the message names what differs.
    """
    if not isinstance(state, Mapping):
        raise ResumeError(f"the stream's state is {type(state).__name__} and not a dictionary")
    missing = [name for name in (*identity, "epoch", "position", "bad") if name not in state]
    if missing:
        raise ResumeError(
            f"the stream's state lacks {', '.join(missing)}; it is not a state of such a stream"
        )
    if differing := _list_differences(state, identity):
        raise ResumeError(
            f"the saved state is of another stream: {'; '.join(differing)}; give the run the same "
            "data, seed, subset and mix, or start a new one"
        )
    epoch, position, bad = state["epoch"], state["position"], state["bad"]
    num_portions = len(identity.get("weights", [1]))
    is_right = isinstance(bad, list) and len(bad) == num_portions
    for value in (epoch, position, *(bad if is_right else ())):
        is_right &= isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if not is_right:
        raise ResumeError(
            f"the stream's state has epoch {epoch!r}, position {position!r}, bad {bad!r}"
        )
    if position > num_rows:
        raise ResumeError(f"the stream's state is at position {position} of {num_rows} rows")
    return epoch, position, list(bad)


def _list_differences(
    saved: Mapping[str, Any], here: Mapping[str, Any], of: str = ""
) -> list[str]:
    differing = []
    for name, value in here.items():
        if isinstance(value, Mapping) and isinstance(saved.get(name), Mapping):
            differing += _list_differences(saved[name], value, f" of {name}")
        elif saved.get(name) != value:
            differing.append(f"{name}{of} was {saved.get(name)!r} and is {value!r}")
    return differing
