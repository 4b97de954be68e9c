"""Settings from files: what they give, no flag needs to."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from gemma_tuner.cli.commands import errors_explained
from gemma_tuner.cli.opening import was_given
from gemma_tuner.cli.settings import (
    ALIASES,
    AdapterSettings,
    DataSettings,
    ModelSettings,
    RowSettings,
    RunSettings,
)
from gemma_tuner.errors import ConfigError
from gemma_tuner.settings import (
    FILE_NAME,
    Setting,
    is_of_recipe,
    pin_paths,
    read_settings,
)

_GROUPS = (ModelSettings, DataSettings, RowSettings, AdapterSettings, RunSettings)


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Let a settings file give what no flag gives; the callback of ``--config``."""
    if path is not None:
        with errors_explained(debug=False):
            _use_as_defaults(context, path)
    return path


def from_run(*groups: type[Any]) -> Callable[[typer.Context, Path | None], Path | None]:
    """Let a run's settings give what no flag gives."""

    def read_run(context: typer.Context, path: Path | None) -> Path | None:
        if path is not None:
            with errors_explained(debug=False):
                if file := find_settings(path):
                    _use_as_defaults(context, file, groups)
        return path

    return read_run


Config = Annotated[
    Path | None,
    typer.Option(
        is_eager=True,
        callback=read_config,
        metavar="FILE",
        help="Settings as YAML or JSON, by these names; flags win over it.",
    ),
]
Run = Annotated[
    Path | None,
    typer.Argument(
        is_eager=True,
        callback=from_run(ModelSettings, DataSettings, RowSettings),
        metavar="RUN",
        help="The folder of a run, or of an adapter.",
        show_default=False,
    ),
]


def find_settings(run: Path) -> Path | None:
    """Find the settings of a run by its folder, its adapter's or a checkpoint's."""
    folder = run.resolve()
    # What lies above any other folder is not the run's: it may be another's.
    if folder.name == "adapter" and not (folder / FILE_NAME).is_file():
        folder = folder.parent
    elif folder.parent.name == "checkpoints":
        folder = folder.parent.parent
    file = folder / FILE_NAME
    return None if not file.is_file() or is_of_recipe(file) else file


def list_settings(context: typer.Context) -> dict[str, Setting]:
    """List what a command runs with, as its settings file has it."""
    names = [name for group in _GROUPS for name in group.__annotations__ if name != "resume"]
    values = {name: context.params[name] for name in names if name in context.params}
    values = {name: value for name, value in values.items() if value not in (None, ())}
    return pin_paths({name: _as_setting(value) for name, value in values.items()})


def list_forgotten(
    context: typer.Context, file: Path, settings: Mapping[str, Setting]
) -> list[str]:
    """List the settings that a file has otherwise, and that no flag has asked to be so."""
    names = [name for group in _GROUPS for name in group.__annotations__]
    saved = read_settings(file, names)
    return [
        name
        for name in names
        if not was_given(context, name) and saved.get(name) != settings.get(name)
    ]


def _as_setting(value: Any) -> Setting:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def _use_as_defaults(
    context: typer.Context, file: Path, groups: tuple[type[Any], ...] = _GROUPS
) -> None:
    """Make a settings file the defaults of a command, or of some groups of its options."""
    names = _list_names()
    options = {option.name: option for option in context.command.params if option.name in names}
    wanted = {name for group in groups for name in group.__annotations__}
    defaults: dict[str, Any] = {}
    for given, value in read_settings(file, names).items():
        name = names[given]
        if name in defaults:
            raise ConfigError(
                f"the settings file {file.name!r} has {name!r} under two names; keep one"
            )
        defaults[name] = value
        if name in wanted and name in options and value is not None:
            option = options[name]
            defaults[name] = [value] if option.multiple and not isinstance(value, list) else value
            _check(context, option, given, defaults[name], file)
    context.default_map = {name: value for name, value in defaults.items() if name in wanted}


def _list_names() -> dict[str, str]:
    """Every name that a settings file may use, those of options that a command lacks too."""
    hints = {name: hint for group in _GROUPS for name, hint in group.__annotations__.items()}
    names = {name: name for name in hints}
    for name, hint in hints.items():
        for flag in hint.__metadata__[0].param_decls:  # --grad-checkpoint/--no-grad-checkpoint
            names[flag.partition("/")[0].lstrip("-").replace("-", "_")] = name
    aliases = {alias.replace("-", "_"): name.replace("-", "_") for alias, name in ALIASES.items()}
    return names | {alias: names[name] for alias, name in aliases.items() if name in names}


def _check(context: typer.Context, option: Any, name: str, value: object, file: Path) -> None:
    """Convert a value as Typer will, so that what is said of a wrong one names the file."""
    try:
        option.process_value(context, value)
    except typer.BadParameter as error:
        raise ConfigError(
            f"the setting {name!r} in {file.name!r} is {value!r}: "
            f"{error.message.removeprefix('Value error, ').rstrip('.')}"
        ) from None
