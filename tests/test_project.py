"""What holds of the project as a whole: its names, its size, its pinned versions."""

import ast
import os
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import gemma_tuner

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "gemma_tuner"
MODULES = sorted(PACKAGE.rglob("*.py"))
NAMES_THAT_SAY_NOTHING = {"utils", "util", "common", "base", "core", "helpers", "helper", "misc"}


def read_constraints() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    constraints = {str(canonicalize_name(each.name)): each for each in requirements}
    assert len(constraints) == len(requirements), "a package is constrained twice"
    return constraints


def needed_here() -> dict[str, str]:
    """Every package that the project needs on this machine, with the first that asks for it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [
        (Requirement(text), "pyproject.toml")
        for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    ]
    needed: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    while asked:
        requirement, asker = asked.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        for extra in ["", *requirement.extras]:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            needed.setdefault(name, asker)
            for text in metadata.requires(name) or []:
                inner = Requirement(text)
                if inner.marker is None or inner.marker.evaluate({"extra": extra}):
                    inner.marker = None
                    asked.append((inner, name))
    return needed


def test_the_package_is_where_this_test_looks():
    assert Path(gemma_tuner.__file__).parent == PACKAGE
    assert len(MODULES) > 20


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_are_named_for_what_they_do_and_raise_what_users_can_read(path):
    assert not NAMES_THAT_SAY_NOTHING & set(path.relative_to(PACKAGE).with_suffix("").parts)
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "a module opens with what it is for"
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: raise instead of assert"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: name what is caught"


def test_bundled_samples_exist_and_are_small():
    files = [path for path in (PACKAGE / "testing" / "samples").rglob("*") if path.is_file()]
    total_bytes = sum(path.stat().st_size for path in files)
    assert files
    assert total_bytes < 3_000_000


def test_constraints_pin_everything_that_is_needed_and_nothing_else():
    constraints = read_constraints()
    needed = needed_here()
    missing = {name: asker for name, asker in needed.items() if name not in constraints}
    assert not missing, f"pin these in constraints.txt (name: who needs it): {missing}"
    here = {
        name
        for name, requirement in constraints.items()
        if requirement.marker is None or requirement.marker.evaluate()
    }
    assert here == set(needed)


def test_what_is_installed_is_what_was_tested():
    for name, requirement in read_constraints().items():
        if requirement.marker is None or requirement.marker.evaluate():
            pins = list(requirement.specifier)
            assert [pin.operator for pin in pins] == ["=="], f"{requirement}: pin exactly"
            assert requirement.specifier.contains(metadata.version(name)), (
                f"{name} {metadata.version(name)} is installed, {requirement} was tested"
            )


def test_the_version_is_written_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert metadata.version("gemma_tuner") == gemma_tuner.__version__


def test_what_ci_runs_is_executable_and_what_users_run():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make check" in script.read_text()
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert "bash .ci/run" in workflow
