"""Checks of settings: bounds beside the fields, and names that are found when misspelt."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import types
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeGuard, TypeVar, Union, get_args, get_origin, get_type_hints

from gemma_tuner.errors import ConfigError
from gemma_tuner.habits import find_meaning

T = TypeVar("T")

_LARGEST = sys.float_info.max  # a whole number may be larger
_LONGEST_SHOWN = 200
IS = "{name} is {value}; it must be {allowed}"
MUST_BE = "{name} must be {allowed}; got {value} ({kind})"

FREE_ON_RESUME: dict[str, Any] = {"free_on_resume": True}
"""Metadata of a field that a resumed run may have otherwise."""


def bounds(
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> dict[str, Any]:
    """Make the metadata of a field that is a number: which it may be."""
    given = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    return {"bounds": {name: limit for name, limit in given.items() if limit is not None}}


# What torch.Generator.manual_seed takes on every device.
_LARGEST_SEED = 2**63 - 1
SEED = bounds(at_least=0, at_most=_LARGEST_SEED)


def check_fields(config: Any, form: str = IS) -> None:
    """Refuse a dataclass whose values are not of their fields' types, or out of bounds."""
    for name, (hint, limits) in _read_fields(type(config)).items():
        _check(name, getattr(config, name), hint, limits, form)


def check_value(name: str, value: object, hint: Any, **limits: float) -> None:
    """Refuse an argument that is not of a type, such as ``int | None``, or out of bounds."""
    _check(name, value, hint, limits, IS)


def refuse(name: str, value: object, allowed: str, form: str = IS) -> ConfigError:
    """Make the error that says what a setting may be."""
    kind = type(value).__name__
    shown = repr(value)
    is_plain = isinstance(value, str | int | float)
    if not is_plain and (len(shown) > _LONGEST_SHOWN or "\n" in shown):  # a model, say
        shown = f"a {kind}"
    return ConfigError(form.format(name=name, value=shown, allowed=allowed, kind=kind))


def check_path(name: str, value: object) -> None:
    """Refuse an argument that is neither text nor a path."""
    if not isinstance(value, str | Path):
        raise ConfigError(f"{name} is a {type(value).__name__}; give a path or a name, as text")


def suggest(
    name: str, known: Iterable[str], form: str = " (did you mean {!r}?)", *, cutoff: float = 0.6
) -> str:
    """Name the nearest of those that are known; empty where none is near."""
    import difflib  # noqa: PLC0415 - only where there is a mistake

    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return form.format(nearest[0]) if nearest else ""


def explain_unknown(name: str, known: Collection[str], form: str = "did you mean {!r}?") -> str:
    """Say what an unknown setting is here, by its meaning first; empty where nothing is near."""
    return find_meaning(name, known, form) or suggest(name, known, form, cutoff=0.75)


def name_nearest(kind: type[T]) -> type[T]:
    """Make a dataclass answer an unknown setting with the one that was meant."""
    # A decorator, to stand above ``@dataclass``. The class is the same one; its signature, fields
    # and ``repr`` stay as they are.
    create = kind.__init__
    known = [field.name for field in dataclasses.fields(kind) if field.init]  # pyright: ignore[reportArgumentType]

    @functools.wraps(create)
    def create_from_known(self: T, *args: Any, **settings: Any) -> None:
        for name in settings:
            if name not in known:
                hint = explain_unknown(name, known, "did you mean {!r}?")
                end = "? It" if hint.endswith("?") else ". It" if hint else "it"
                raise ConfigError(
                    f"{kind.__name__} has no setting {name!r}; {hint.removesuffix('?')}{end} has "
                    f"{', '.join(known)}"
                )
        create(self, *args, **settings)

    kind.__init__ = create_from_known
    return kind


def is_whole_number(value: object) -> TypeGuard[int]:
    """Whether a value is an int; True and False, which Python counts as such, are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is an int or a float, True and False excepted."""
    return isinstance(value, float) or is_whole_number(value)


def split_union(hint: Any) -> tuple[Any, ...]:
    """List the members of a union; of another type, that type."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


@functools.cache
def _read_fields(kind: type[Any]) -> dict[str, tuple[Any, Mapping[str, float]]]:
    hints = get_type_hints(kind)
    return {
        f.name: (hints[f.name], f.metadata.get("bounds", {})) for f in dataclasses.fields(kind)
    }


def _check(name: str, value: object, hint: Any, limits: Mapping[str, float], form: str) -> None:
    members = split_union(hint)
    if Any in members or any(_accepts(member, value, limits) for member in members):
        return
    named = [member for member in members if member is not str or Path not in members]
    allowed = " or ".join(_describe(member, value, limits) for member in named)
    choices = [c for member in members for c in get_args(member) if isinstance(c, str)]
    hint = suggest(value, choices) if isinstance(value, str) else ""
    raise refuse(name, value, allowed + hint, form)


def _accepts(kind: Any, value: object, limits: Mapping[str, float]) -> bool:
    if get_origin(kind) is Literal:
        return any(isinstance(value, type(c)) and value == c for c in get_args(kind))
    if kind is int:
        return is_whole_number(value) and _is_within(value, limits)
    if kind is float:
        return is_number(value) and abs(value) <= _LARGEST and _is_within(value, limits)
    if get_origin(kind):  # of sequences, what takes them knows more
        return True
    return isinstance(value, kind) and value != ""


def _is_within(value: float, limits: Mapping[str, float]) -> bool:
    return (
        limits.get("at_least", -math.inf) <= value <= limits.get("at_most", math.inf)
        and value > limits.get("above", -math.inf)
        and value < limits.get("below", math.inf)
    )


def _describe(kind: Any, value: object, limits: Mapping[str, float]) -> str:
    if kind is type(None):
        return "None"
    if kind is bool:
        return "True or False"
    if get_origin(kind) is Literal:
        choices = ", ".join(map(str, get_args(kind)))
        return f"one of {choices}" if len(get_args(kind)) > 1 else choices
    if kind in (int, float):
        what = "a whole number" if kind is int else "a finite number"
        return what + _describe_limits(value, limits)
    return {str: "text", Path: "a folder's path, str or Path"}.get(kind, f"a {kind.__name__}")


def _describe_limits(value: object, limits: Mapping[str, float]) -> str:
    at_most = limits.get("at_most")
    if at_most == _LARGEST_SEED and not (is_number(value) and value > at_most):
        at_most = None  # so large that it is said only where it matters
    texts = []
    if "at_least" in limits:
        end = " up" if at_most is None else f" to {at_most}"
        texts.append(f"from {limits['at_least']}{end}")
    texts += [f"{name} {limits[name]}" for name in ("above", "below") if name in limits]
    if at_most is not None and "at_least" not in limits:
        texts.append(f"at most {at_most}")
    return f" {' and '.join(texts)}" if texts else ""
