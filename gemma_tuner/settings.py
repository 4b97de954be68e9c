"""A run's settings as one YAML or JSON file: flag names and their values, flat."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from gemma_tuner.checks import explain_unknown
from gemma_tuner.disk import disk_errors_explained, replaced
from gemma_tuner.errors import MALFORMED, ConfigError
from gemma_tuner.habits import translate_mlx

Scalar: TypeAlias = str | int | float | bool | None
Setting: TypeAlias = Scalar | list[Scalar]

FILE_NAME = "settings.yaml"
"""What :func:`save_settings` calls the file, in the run's folder."""

RECIPE = "recipe"
"""Under this name, the settings of a recipe have its path."""

TINY = "tiny"
"""The name of the model that is made up on the spot."""

_MAX_BYTES = 1 << 18  # YAML takes four seconds for so many
_MAX_DEPTH = 32  # and for brackets time as the square of their depth
_PATHS = {"cache_dir", "data", "from_adapter", "model", "out"}


def read_settings(path: str | Path, known: Collection[str]) -> dict[str, Setting]:
    """Read settings; JSON is read too, as it is YAML."""
    path = Path(path)
    content = translate_mlx(parse_file(path))
    if RECIPE in content and RECIPE not in known:
        command = shlex.join(["python", str(content[RECIPE]), "--config", str(path)])
        raise ConfigError(
            f"the settings file {path.name!r} is of a recipe, which goes its own way; start that "
            f"with: {command}"
        )
    settings: dict[str, Setting] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ConfigError(_unknown(name, known, path.name))
        if name in settings:
            raise ConfigError(f"the settings file {path.name!r} has {name!r} twice; keep one")
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str | int | float | bool | None) for item in values):
            raise ConfigError(
                f"the setting {name!r} in {path.name!r} must be a value or a list of values; got "
                f"{_name_type(value)}"
            )
        settings[name] = value
    return settings


def is_of_recipe(path: Path) -> bool:
    """Whether a settings file was saved by a recipe; raises what :func:`read_settings` does."""
    return RECIPE in parse_file(path)


def parse_file(path: Path) -> Mapping[Any, Any]:
    """Parse a settings file to a mapping, whatever its names."""
    import yaml  # noqa: PLC0415 - only where there is a file

    try:
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES + 1).decode()
        _check_plain(text)
        loader = yaml.SafeLoader(text)
        nodes = loader.get_single_node()
        content = None if nodes is None else loader.construct_document(nodes)
        repr(content)  # which no number of thousands of digits has
    except OSError as error:
        raise ConfigError(
            f"the settings file {path.name!r} cannot be read ({error.strerror}); give the path of "
            "a YAML or JSON file"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"the settings file {path.name!r} is not UTF-8 text") from None
    except MALFORMED:
        # A date that no calendar has, a number of thousands of digits, `!!bool x`.
        raise ConfigError(
            f"the settings file {path.name!r} has a value that YAML cannot read; put it in quotes"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"the settings file {path.name!r} is neither YAML nor JSON{place}: "
            f"{getattr(error, 'problem', None) or type(error).__name__}"
        ) from None
    if nodes is None or not isinstance(content, Mapping):
        raise ConfigError(
            f"the settings file {path.name!r} holds {_name_type(content)}; it must be a mapping, "
            "a line for each setting, such as `learning_rate: 2e-4`"
        )
    # Of one name twice, content has the last.
    written = Counter(key.value for key, _ in nodes.value if isinstance(key.value, str))
    for name in content:
        if written[name] > 1:
            raise ConfigError(f"the settings file {path.name!r} has {name!r} twice; keep one")
    return content


def _check_plain(text: str) -> None:
    import yaml  # noqa: PLC0415

    if len(text) > _MAX_BYTES:
        raise yaml.MarkedYAMLError(problem=f"it is larger than {_MAX_BYTES:,} bytes")
    depth, problem = 0, None
    for token in yaml.scan(text):
        name = type(token).__name__  # FlowSequenceStartToken, BlockEndToken
        depth += name.endswith("StartToken") - name.endswith("EndToken")
        if isinstance(token, yaml.AliasToken):  # a few can stand for more than fits in memory
            problem = "it uses an anchor; write the value out"
        elif depth > _MAX_DEPTH:
            problem = "it is nested too deeply"
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=token.start_mark)


def save_settings(folder: str | Path, settings: Mapping[str, Setting]) -> Path:
    """Write settings into a run's folder, so that they start the same run again."""
    import yaml  # noqa: PLC0415

    path = Path(folder) / FILE_NAME
    given = {name: value for name, value in settings.items() if value is not None}
    text = yaml.safe_dump(given, sort_keys=False, allow_unicode=True)
    with disk_errors_explained(
        lambda reason: ConfigError(
            f"{FILE_NAME} cannot be written in {path.parent.name!r} ({reason}); free disk space "
            "there, or choose another folder for the run"
        )
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return path


def pin_paths(settings: Mapping[str, Setting]) -> dict[str, Setting]:
    """Make paths absolute, so that settings mean the same wherever they are read."""
    return {name: _pin(name, value) for name, value in expand_home(settings).items()}


def expand_home(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Put the user's folder for ``~``, which shells do not in a file or after ``--out=``."""
    return {name: _expand(value) if name in _PATHS else value for name, value in settings.items()}


def _expand(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_expand(item) for item in value]
    if isinstance(value, str | Path):
        return type(value)(os.path.expanduser(value))  # noqa: PTH111 - a URI is no path
    return value


def _pin(name: str, value: Setting) -> Setting:
    if isinstance(value, list):
        return [item if not isinstance(item, str) else _pin_text(name, item) for item in value]
    return _pin_text(name, value) if isinstance(value, str) else value


def _pin_text(name: str, value: str) -> str:
    is_glob = "://" not in value and any(character in value for character in "*?[")
    exists = os.path.exists(value)  # noqa: PTH110 - Path's raises where a name is too long
    is_path = {
        "data": is_glob or exists,
        "model": value != TINY and exists,
        "from_adapter": True,
        "out": True,
        "cache_dir": True,
    }
    return str(Path(value).absolute()) if is_path.get(name) else value


def _unknown(name: str, known: Collection[str], file_name: str) -> str:
    hint = explain_unknown(name, known) or f"it can have {', '.join(sorted(known))}"
    return f"the settings file {file_name!r} has an unknown setting {name!r}; {hint}"


def _name_type(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
