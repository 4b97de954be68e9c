"""The rules that keep the house as it is: sizes, single homes, docstrings, layers, names of tests.

``make check`` runs this file. Each message says what to do. What breaks a rule today stands in a
list beside the rule, which may only shrink: an entry that breaks nothing any more fails too.
"""

import ast
import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from docstring_parser import parse

import gemma_tuner
from gemma_tuner import testing

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "gemma_tuner"
MODULES = sorted(PACKAGE.rglob("*.py"))
TEST_FILES = sorted((ROOT / "tests").rglob("test_*.py"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# ---- sizes ----------------------------------------------------------------------------------

# 34,000 with what there was; what people's data, files and habits need came to it (see CHANGELOG),
# then servers that lie or stall, files that are hostile or damaged, and bases in few bits: packed,
# planned, kept, of other programs, merged without leaving them.
MAX_PACKAGE_LINES = 43_400
MAX_FOLDER_LINES = 4_000
MAX_FOLDER_MODULES = 25
# Folders that may be larger -> why.
LARGER_FOLDERS: dict[str, str] = {}


def count_lines(paths: Iterable[Path]) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


def test_the_package_stays_small():
    num_lines = count_lines(MODULES)
    assert num_lines <= MAX_PACKAGE_LINES, (
        f"{num_lines:,} lines: take out what no user needs or fold what says the same; a larger "
        f"package is a decision, written into MAX_PACKAGE_LINES with its reason"
    )


def test_a_folder_can_be_taken_in_at_a_glance():
    for folder in sorted({path.parent for path in MODULES}):
        name = str(folder.relative_to(ROOT))
        modules = list(folder.glob("*.py"))
        num_lines = count_lines(modules)
        large = num_lines > MAX_FOLDER_LINES or len(modules) > MAX_FOLDER_MODULES
        assert large == (name in LARGER_FOLDERS), (
            f"{name} has {len(modules)} modules of {num_lines:,} lines in all (at most "
            f"{MAX_FOLDER_MODULES} and {MAX_FOLDER_LINES:,}): find the second room in it, or say "
            f"in LARGER_FOLDERS why it is one; take it off that list once it is small"
        )


# ---- single homes ---------------------------------------------------------------------------

MEDIA_TENSORS = {"pixel_values", "input_features", "image_position_ids", "input_features_mask"}
# The table of media kinds: the only module that spells their tensors' names.
MEDIA_TABLE = "modalities.py"


def words_of_code(tree: ast.AST) -> Iterator[str]:
    """Every name and every string that is one word, as code uses them."""
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(word)) | ast.Name(id=word) | ast.Attribute(attr=word):
                yield word
            case ast.arg(arg=word) | ast.keyword(arg=str(word)):
                yield word


def test_media_tensors_are_named_in_one_table():
    spelling = {
        str(path.relative_to(PACKAGE))
        for path in MODULES
        if MEDIA_TENSORS.intersection(words_of_code(ast.parse(path.read_text())))
    }
    others = spelling - {MEDIA_TABLE}
    assert not others, f"{sorted(others)}: ask {MEDIA_TABLE} for the names"


# ---- docstrings -----------------------------------------------------------------------------

# Public beside the contracts of ``gemma_tuner`` and ``gemma_tuner.testing``: docs/reference.md.
ALSO_PUBLIC = {"evaluation.decoding.Decoding", "streaming.options.StreamOptions"}
BLOCK = re.compile(r"^\s*(Args|Returns|Yields):$", re.MULTILINE)

Function = ast.FunctionDef | ast.AsyncFunctionDef


def public_names() -> set[str]:
    """The names of the contracts with their modules, as ``records.Example``."""
    ours = {f"{module}.{name}" for name, module in gemma_tuner._HOME.items()}
    for_tests = {f"testing.{module}.{name}" for name, module in testing._HOME.items()}
    return ours | for_tests | ALSO_PUBLIC


def find_definitions() -> dict[str, Function | ast.ClassDef]:
    """Each class, function and method that is no overload, by its name as above."""
    found: dict[str, Function | ast.ClassDef] = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if not isinstance(node, Function | ast.ClassDef):
                continue
            if "overload" not in [ast.unparse(each) for each in node.decorator_list]:
                found[f"{prefix}.{node.name}"] = node
                visit(node.body, f"{prefix}.{node.name}")

    for path in MODULES:
        visit(
            ast.parse(path.read_text()).body,
            ".".join(path.relative_to(PACKAGE).with_suffix("").parts),
        )
    return found


def find_parameters(node: Function | ast.ClassDef) -> set[str]:
    """What a caller passes: to a class, to its __init__ or, in a dataclass, its fields."""
    if isinstance(node, ast.ClassDef):
        for each in node.body:
            if isinstance(each, Function) and each.name == "__init__":
                return find_parameters(each)
        if not any("dataclass" in ast.unparse(each) for each in node.decorator_list):
            return set()
        return {
            ast.unparse(each.target)
            for each in node.body
            if isinstance(each, ast.AnnAssign)
            and not re.search(r"\bClassVar\b|\binit=False\b|\bKW_ONLY\b", ast.unparse(each))
        }
    taken = node.args
    every = [*taken.posonlyargs, *taken.args, taken.vararg, *taken.kwonlyargs, taken.kwarg]
    return {each.arg for each in every if each is not None} - {"self", "cls"}


def test_only_public_functions_have_blocks_in_their_docstrings():
    public = public_names()
    having = {
        name
        for name, node in find_definitions().items()
        if isinstance(node, Function)  # a record's block says the units of its fields
        and BLOCK.search(ast.get_docstring(node) or "")
        and not name.startswith("cli.")  # a command's block is the help of its options
        and not public & {name, name.rpartition(".")[0]}
    }
    assert not having, (
        f"{sorted(having)}: one line, and a comment for a shape, a unit or a surprise; blocks are "
        f"for what gemma_tuner, gemma_tuner.testing and docs/reference.md offer"
    )


def test_public_names_document_every_parameter():
    definitions = find_definitions()
    public = public_names()
    for name, node in definitions.items():
        if not public & {name, name.rpartition(".")[0]} or node.name.startswith("_"):
            continue
        text = ast.get_docstring(node) or ""
        parameters = find_parameters(node)
        # One line is enough for a record of one field; a method may leave out the whole block.
        is_brief = "\n" not in text and len(parameters) < 2
        if is_brief or (name not in public and "Args:" not in text):
            continue
        documented = {
            word.strip(" *") for each in parse(text).params for word in each.arg_name.split(",")
        }
        missing = parameters - documented
        assert not missing, f"{name}: its Args say nothing of {sorted(missing)}"


# ---- CONTRIBUTING ---------------------------------------------------------------------------


def test_contributing_shows_the_layers_of_pyproject():
    layers = PYPROJECT["tool"]["importlinter"]["contracts"][0]["layers"]
    line = " > ".join(re.sub(r"[()]", "", layer) for layer in layers)
    shown = " ".join((ROOT / "CONTRIBUTING.md").read_text().split())
    assert line in shown, f"CONTRIBUTING.md shows other layers; write:\n{line}"


# ---- tests ----------------------------------------------------------------------------------

# Words that tell when or why a test was written, not what of.
NO_SUBJECT = {
    "again", "bug", "bugs", "daily", "extra", "fix", "fixes", "issue", "issues", "misc", "more",
    "new", "old", "other", "others", "regression", "regressions", "review", "told", "various",
}  # fmt: skip
KINDS_OF_TESTS = {"cloud", "e2e", "mps", "parity", "property", "recipes", "unit"}


@pytest.mark.parametrize("path", TEST_FILES, ids=lambda path: path.stem)
def test_test_files_are_named_for_a_subject_and_lie_with_their_room(path):
    words = set(path.stem.split("_"))
    assert not words & NO_SUBJECT, f"{path.name}: name it for what it tests"
    kind, *room = path.relative_to(ROOT / "tests").parts[:-1] or [""]
    assert kind in {"", *KINDS_OF_TESTS}, f"{path}: CONTRIBUTING.md says which tests lie where"
    if kind == "unit":
        assert PACKAGE.joinpath(*room).is_dir(), f"{path.name}: there is no room {'/'.join(room)}"
        place = ".".join(room) or path.stem.removeprefix("test_")
        assert re.search(rf"gemma_tuner(\.| import ){place}\b", path.read_text()), (
            f"{path.name} uses nothing of gemma_tuner.{place}: which room is it of?"
        )
    elif kind:
        assert not room, f"{path}: tests/{kind} has no folders"


def test_every_room_has_tests():
    rooms = [path.parent.name for path in PACKAGE.glob("*/__init__.py")]
    without = [name for name in rooms if not list((ROOT / "tests/unit" / name).rglob("test_*.py"))]
    assert not without, f"tests/unit/<room>/test_<subject>.py is missing for {without}"
