"""The keywords that every ``stream_`` function takes, checked when they are given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar

from gemma_tuner.checks import check_fields, explain_unknown
from gemma_tuner.disk import CACHE
from gemma_tuner.errors import ConfigError
from gemma_tuner.sources.columns import KEYWORDS, Keywords, read_ignored
from gemma_tuner.storage.config import FetchConfig
from gemma_tuner.streaming.quarantine import Budget

if TYPE_CHECKING:
    from gemma_tuner.storage.gcs import storage
else:  # so that the types of fields can be read without the client
    storage = SimpleNamespace(Client=object)

Locality = Literal["shard"]
Column = str | Literal[False] | None
F = TypeVar("F", bound=Callable[..., Any])


class StreamKeywords(TypedDict, total=False):
    """The keywords of every ``stream_`` function; :class:`StreamOptions` says what they mean."""

    messages: Column
    prompt: Column
    response: Column
    text: Column
    context: Column
    history: Column
    system: Column
    tools: Column
    image: Column
    audio: Column
    id: Column
    ignore: Sequence[str]
    media_root: str | Path | None
    seed: int
    shuffle: bool
    locality: Locality | None
    max_bad_fraction: float | None
    max_consecutive_bad: int
    refresh: bool
    cache_dir: str | Path | None
    fetch: FetchConfig
    gcs_client: storage.Client | None


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamOptions:
    """What every ``stream_`` function takes, as keywords.

    Each of ``messages prompt response text context history system tools image audio id`` names the
    column that plays this part; None takes the one whose name says so
    (:mod:`gemma_tuner.sources.columns` lists them), False takes none.

    Args:
        messages: Conversations.
        prompt: What is asked; rows with media and no such column get a default prompt, which
            ``report()`` states.
        response: What the model shall learn to answer.
        text: Plain documents, trained on as a whole.
        context: What is asked about; it goes below the prompt.
        history: Earlier turns: pairs of a question and its answer, or messages.
        system: System turns.
        tools: Declarations of tools.
        image: An image, or a list of them: a path relative to the data file, a ``gs://`` URI,
            or bytes.
        audio: A clip, or a list of them.
        id: Keys of the rows. False numbers them (``train.jsonl:7``).
        ignore: Columns to leave out, whatever their names or values mean.
        media_root: The folder, or the ``gs://`` prefix, that relative paths of media start from.
            No path or link may lead out of it: ``"/"`` allows any file. None is the folder of
            their data file, or that which was given; rows of a bucket, BigQuery or the Hub then
            name none of this machine.
        seed: Decides the order, with the epoch.
        shuffle: Whether the order is another in each epoch, or that of the rows.
        locality: "shard" shuffles whole files, and the rows within each, instead of all rows.
        max_bad_fraction: How much of an epoch's rows may be unusable: they are skipped, noted in
            the quarantine and counted. 0 raises the first as DataError. None, for local files: 0
            while they are read, which are best mended, and 0.01 of what a run then meets.
        max_consecutive_bad: How many unusable rows may follow each other.
        refresh: Read the source again, even if there is a manifest of it, and take images and
            clips as they are now; a run that was begun with other rows does not continue.
        cache_dir: Where manifests, media and quarantines are kept, for this user alone; by
            default ``~/.cache/gemma_tuner``.
        fetch: How media are fetched and kept.
        gcs_client: A ``google.cloud.storage.Client``; None makes one with the application-default
            credentials when the first ``gs://`` is met.

    Raises:
        ConfigError: A value that cannot work.
    """

    messages: Column = None
    prompt: Column = None
    response: Column = None
    text: Column = None
    context: Column = None
    history: Column = None
    system: Column = None
    tools: Column = None
    image: Column = None
    audio: Column = None
    id: Column = None
    ignore: Sequence[str] = ()
    media_root: str | Path | None = None
    seed: int = 0
    shuffle: bool = True
    locality: Locality | None = None
    max_bad_fraction: float | None = 0.01  # how large both may be, says Budget
    max_consecutive_bad: int = 100
    refresh: bool = False
    cache_dir: str | Path | None = None
    fetch: FetchConfig = FetchConfig()  # noqa: RUF009 - it is frozen
    gcs_client: storage.Client | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if not all(isinstance(name, str) for name in self.ignore):
            raise ConfigError("ignore= holds what is no text; give names of columns")

    @property
    def budgets(self) -> tuple[Budget, Budget]:
        """How much may be bad as the source is read, and in a run."""
        given, most = self.max_bad_fraction, self.max_consecutive_bad
        if given is None:
            return Budget(0.0, most), Budget(0.01, most)
        return Budget(given, most), Budget(given, most)

    @classmethod
    def read(cls, function: Callable[..., Any], keywords: Mapping[str, Any]) -> StreamOptions:
        """Make options of a function's keywords.

        Args:
            function: Made by :func:`spell_out`; where its default is another, that holds.
            keywords: What the user gave.

        Returns:
            The options.

        Raises:
            ConfigError: A keyword that does not exist, or a value that cannot work.
        """
        parameters = inspect.signature(function).parameters
        known = [option.name for option in fields(cls)]
        for name in keywords:
            if name not in known:
                hint = explain_unknown(name, known, "did you mean {}=?")
                hint = hint or f"it takes {', '.join(known)}"
                raise ConfigError(f"{function.__name__}() takes no {name}=; {hint}")
        return cls(**{name: keywords.get(name, parameters[name].default) for name in known})

    @property
    def columns(self) -> Keywords:
        """The column by part."""
        return {
            **{part: getattr(self, part) for part in KEYWORDS},
            "ignore": read_ignored({"ignore": self.ignore}),
        }

    @property
    def folder(self) -> Path:
        """Where everything is kept."""
        if self.cache_dir is None:
            return Path.home() / CACHE
        return Path(self.cache_dir).expanduser()


def spell_out(**defaults: Any) -> Callable[[F], F]:
    """Show the keywords of a ``stream_`` function one by one, for help() and notebooks."""

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        options = [
            option.replace(default=defaults.get(option.name, option.default))
            for option in inspect.signature(StreamOptions).parameters.values()
        ]
        shown = signature.replace(parameters=[*named, *options])
        function.__signature__ = shown
        return function

    return decorate
