"""What settings have in common: kinds of values, and names that are found when misspelt."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from typing import Any, TypeGuard, TypeVar

from gemma_tuner.errors import ConfigError

T = TypeVar("T")


def name_nearest(kind: type[T]) -> type[T]:
    """Make a dataclass answer an unknown setting with the one that was meant."""
    # A decorator, to stand above ``@dataclass``. The class is the same one; its signature, fields
    # and ``repr`` stay as they are.
    create = kind.__init__
    known = [field.name for field in dataclasses.fields(kind) if field.init]  # pyright: ignore[reportArgumentType]
    # ``lr`` is learning_rate and ``bs`` batch_size, as far from them as their letters are.
    initials = {"".join(word[0] for word in name.split("_")): name for name in known}

    @functools.wraps(create)
    def create_from_known(self: T, *args: Any, **settings: Any) -> None:
        for name in settings:
            if name not in known:
                # Low enough for PEFT's ``r`` to find ``rank``.
                nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
                if len(name) > 1 and name in initials:
                    nearest = [initials[name]]
                hint = f"did you mean {nearest[0]!r}? It" if nearest else "it"
                raise ConfigError(
                    f"{kind.__name__} has no setting {name!r}; {hint} has {', '.join(known)}"
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
