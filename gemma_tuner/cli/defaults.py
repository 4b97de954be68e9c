"""Settings from files: what they give, no flag needs to."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import fields
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
    RECIPE,
    Setting,
    is_of_recipe,
    pin_paths,
    read_settings,
)

GROUPS = (ModelSettings, DataSettings, RowSettings, AdapterSettings, RunSettings)


def config_option(groups: Iterable[type[Any]], *, is_explained: bool = True) -> Any:
    """Make the option ``--config``: a settings file that gives what no flag gives."""

    def read_config(context: typer.Context, path: Path | None) -> Path | None:
        if path is not None:
            with errors_explained(debug=False) if is_explained else nullcontext():
                use_as_defaults(context, path, groups, is_strict=not is_explained)
        return path

    text = "Settings as YAML or JSON, by these names or mlx-lm's; flags win over it."
    return typer.Option(
        "--config", "-c", is_eager=True, callback=read_config, metavar="FILE", help=text
    )


def from_run(*groups: type[Any]) -> Callable[[typer.Context, Path | None], Path | None]:
    """Let a run's settings give what no flag gives."""

    def read_run(context: typer.Context, path: Path | None) -> Path | None:
        if path is not None:
            with errors_explained(debug=False):
                if file := find_settings(path):
                    use_as_defaults(context, file, groups)
                elif RowSettings in groups:
                    context.default_map = _read_trained(path)
        return path

    return read_run


def _read_trained(path: Path) -> dict[str, Any]:
    """The settings of rows that lie beside an adapter."""
    from gemma_tuner.models.adapter_files import read_trained_with

    known = read_trained_with(path)
    settings = dict(known.collator) if known else {}
    if settings.pop("train_on", None) == "all":
        settings["mask_prompt"] = False
    return {name: value for name, value in settings.items() if value is not None}


def use_places(context: typer.Context, places: list[str] | None) -> list[str] | None:
    """Let what stands on the command line without a flag be ``--data``, above a file's."""
    if places:
        context.default_map = {**(context.default_map or {}), "data": places}
    return places


Places = Annotated[
    list[str] | None,
    typer.Argument(
        is_eager=True,
        callback=use_places,
        metavar="[DATA]...",
        help="The same as --data.",
        show_default=False,
    ),
]
Config = Annotated[Path | None, config_option(GROUPS)]
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


def list_settings(
    context: typer.Context, groups: Iterable[type[Any]] = GROUPS
) -> dict[str, Setting]:
    """List what a command runs with, as its settings file has it."""
    values = {name: context.params.get(name) for name in _read_hints(groups) if name != "resume"}
    values = {name: value for name, value in values.items() if value not in (None, ())}
    return pin_paths({name: _as_setting(value) for name, value in values.items()})


def list_forgotten(
    context: typer.Context, file: Path, settings: Mapping[str, Setting]
) -> list[str]:
    """List the settings that a file has otherwise, and that no flag has asked to be so."""
    names = _read_hints(GROUPS)
    return [
        name
        for name, saved in read_settings(file, names).items()
        if not was_given(context, name) and saved != settings.get(name)
    ]


def _as_setting(value: Any) -> Setting:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def use_as_defaults(
    context: typer.Context,
    file: Path,
    groups: Iterable[type[Any]] = GROUPS,
    *,
    is_strict: bool = False,
) -> None:
    """Make a settings file the defaults of a command, or of some groups of its options."""
    # Strict refuses what the command has no option for, which would be passed over.
    wanted = _read_hints(groups)
    names = _list_names(_read_hints(GROUPS) | wanted)
    options = {option.name: option for option in context.command.params if option.name in names}
    defaults: dict[str, Any] = {}
    for given, value in read_settings(file, names).items():
        name = names[given]
        if is_strict and name not in options and name != RECIPE:
            raise ConfigError(
                f"the settings file {file.name!r} has {given!r}, which this recipe does not take; "
                f"it takes {', '.join(sorted(options))}"
            )
        if name in defaults:
            raise ConfigError(
                f"the settings file {file.name!r} has {name!r} under two names; keep one"
            )
        defaults[name] = value
        if name in wanted and name in options and value is not None:
            option = options[name]
            defaults[name] = [value] if option.multiple and not isinstance(value, list) else value
            _check(context, option, given, defaults[name], file)
    given = context.default_map or {}  # DATA without a flag, if it was read before
    context.default_map = {**{n: v for n, v in defaults.items() if n in wanted}, **given}


def _read_hints(groups: Iterable[type[Any]]) -> dict[str, Any]:
    return {field.name: field.type for group in groups for field in fields(group)}


def _list_names(hints: Mapping[str, Any]) -> dict[str, str]:
    """Every name that a settings file may use, those of options that a command lacks too."""
    names = {name: name for name in hints}
    for name, hint in hints.items():
        for flag in hint.__metadata__[0].param_decls:  # --grad-checkpoint/--no-grad-checkpoint
            names[flag.partition("/")[0].lstrip("-").replace("-", "_")] = name
    aliases = {alias.replace("-", "_"): name.replace("-", "_") for alias, name in ALIASES.items()}
    return names | {alias: names[name] for alias, name in aliases.items() if name in names}


def _check(context: typer.Context, option: Any, name: str, value: object, file: Path) -> None:
    """Convert a value as Typer will, so that what is said of a wrong one names the file."""
    about = f"the setting {name!r} in {file.name!r} is {value!r}"
    is_list = isinstance(value, list) and not option.multiple and option.nargs == 1
    if is_list or (isinstance(value, bool) and not option.is_flag):
        raise ConfigError(f"{about}; it takes one number or text")
    try:
        option.process_value(context, value)
    except typer.BadParameter as error:
        said = error.message.removeprefix("Value error, ").rstrip(".")
        raise ConfigError(f"{about}: {said}") from None
