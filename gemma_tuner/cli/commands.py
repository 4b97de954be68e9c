"""What all commands share: groups of settings as options, and errors as one paragraph."""

from __future__ import annotations

import errno
import functools
import inspect
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Annotated, Any

import typer

from gemma_tuner.cli.settings import PANELS, make_option, read_help
from gemma_tuner.display import quote_text
from gemma_tuner.errors import ConfigError, GemmaTunerError
from gemma_tuner.settings import expand_home

_INTERRUPTED = 130  # 128 and SIGINT's number, as shells expect

# What arguments of Python are called on the command line, where it is something else.
_OPTION_OF = {
    "ImageCollator": "modality",
    "base": "model",
    "every_steps": "sample_every_steps",
    "modalities": "modality",
    "output_dir": "out",
    "scores": "score",
    "train_on": "mask_prompt",
}

_DEBUG = inspect.Parameter(
    "debug",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[
        bool, typer.Option("--debug", metavar="", help="Show the traceback of an error.")
    ],
)

_CONTEXT = "typer_context"  # whatever a command calls it: a column may be the context


def command(function: Callable[..., object]) -> Callable[..., None]:
    """Make a function a command: its settings become options, its errors a paragraph."""
    texts = read_help(function.__doc__)
    groups: dict[str, Any] = {}
    contexts: list[str] = []
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        if isinstance(parameter.annotation, type) and is_dataclass(parameter.annotation):
            groups[parameter.name] = parameter.annotation
            parameters += inspect.signature(parameter.annotation).parameters.values()
        elif parameter.annotation is typer.Context:
            contexts.append(parameter.name)
            parameters.append(parameter.replace(name=_CONTEXT))
        elif parameter.name in texts:
            hint, default = make_option(
                parameter.name, parameter.annotation, parameter.default, texts[parameter.name]
            )
            parameters.append(parameter.replace(annotation=hint, default=default))
        else:
            parameters.append(parameter)

    parameters.sort(key=place_panel)
    options = {parameter.name for parameter in parameters}

    @functools.wraps(function)
    def run(*, debug: bool, **values: Any) -> None:
        values = expand_home(values)
        for name, kind in groups.items():
            fields = inspect.signature(kind).parameters
            values[name] = kind(**{field: values.pop(field) for field in fields})
        for name in contexts:
            values[name] = values.pop(_CONTEXT)
        if not debug:  # what libraries tell their developers
            warnings.simplefilter("ignore", FutureWarning)
        with errors_explained(debug=debug, options=options):
            if values.get("places") and list(values["data"].data or ()) != values["places"]:
                raise ConfigError("data is given twice; give it once: DATA, or --data DATA")
            function(**values)

    keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    run.__signature__ = inspect.Signature([*keyword_only, _DEBUG])  # pyright: ignore[reportAttributeAccessIssue]
    # Typer asks for the hints of what is wrapped, which are not those of the signature.
    run.__annotations__ = {}
    del run.__wrapped__
    run.__doc__ = inspect.cleandoc(function.__doc__ or "").partition("\n\nArgs:\n")[0]
    return run


def place_panel(parameter: inspect.Parameter) -> int:
    """Where the panel of an option stands in the help."""
    about = getattr(parameter.annotation, "__metadata__", (None,))[0]
    return PANELS.index(getattr(about, "rich_help_panel", None))


@contextmanager
def errors_explained(*, debug: bool, options: Collection[str] = ()) -> Iterator[None]:
    """Turn an error into one paragraph on stderr and exit status 1; an interrupt into 130."""
    logging.setLogRecordFactory(_QuotedRecord)
    try:
        yield
    except KeyboardInterrupt:
        _show("interrupted", debug=debug)
        raise SystemExit(_INTERRUPTED) from None
    except GemmaTunerError as error:
        message = " ".join(str(error).split())
        flags = _list_flags(message, options)
        _show(f"{type(error).__name__}: {message}{flags}", debug=debug)
        raise SystemExit(1) from None
    except OSError as error:
        if error.errno == errno.EPIPE:  # nobody reads on; Typer knows how to end then
            raise
        _show(_explain(error), debug=debug)
        raise SystemExit(1) from None
    except Exception as error:  # noqa: BLE001 - whatever it was, its user gets a paragraph
        _show(
            f"{type(error).__name__}: {' '.join(str(error).split())}. This is a fault of "
            "gemma_tuner, not of yours: run the command again with --debug, and report what it "
            "shows together with `gemma-tuner doctor`",
            debug=debug,
        )
        raise SystemExit(1) from None


class _QuotedRecord(logging.LogRecord):
    """A record, of whatever library, that may repeat what a checkpoint or a server says."""

    def getMessage(self) -> str:  # noqa: N802 - logging's name
        return quote_text(super().getMessage())


def _show(message: str, *, debug: bool) -> None:
    if debug:
        message = traceback.format_exc() + message
    sys.stderr.write(f"{quote_text(message)}\n")


def _list_flags(message: str, options: Collection[str]) -> str:
    """Name the flags for what a message calls by its name in Python, as an ending of it."""
    # What is written as an argument (max_tokens=256) or has an underscore is no common word.
    words = re.findall(r"\b([a-z]+)=|\b([a-z]+(?:_[a-z]+)+)\b|\b(\w+Collator)\b", message)
    names = [_OPTION_OF.get(word) or str(word) for groups in words for word in groups if word]
    flags = [f"--{name.replace('_', '-')}" for name in dict.fromkeys(names) if name in options]
    return f" [as flags: {', '.join(flags)}]" if flags else ""


def _explain(error: OSError) -> str:
    """Name the file and the remedy, which the system's own words do not."""
    where = f" ({error.filename})" if error.filename else ""
    remedies = {
        errno.ENOSPC: "free disk space there, or choose another folder",
        errno.EACCES: "choose another folder, or change its permissions",
        errno.ENOENT: "check the path",
    }
    remedy = remedies.get(error.errno or 0, "run the command again with --debug to see where")
    return f"{type(error).__name__}: {error.strerror or error}{where}; {remedy}"
