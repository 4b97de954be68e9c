"""The documents say what is so: their code runs, their flags and messages exist, Sphinx builds."""

import ast
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import datasets
import pyarrow
import pytest
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import gemma_tuner as gt
from gemma_tuner.cli.main import app
from gemma_tuner.testing import BigQueryServer, sample_data, save_tiny_model

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
BLOCK = re.compile(r"^```(?:\{code-block\} )?(\w+)\n(?::caption: (\S+)\n)?(.*?)^```$", re.S | re.M)
# Names of the real thing, and what stands for it here.
STAND_INS = {
    '"google/gemma-4-E2B-it-4bit"': '"mlx-base"',
    '"google/gemma-4-E2B-it"': '"model"',
    '"owner/questions"': '"hub"',
    "max_steps=500": "max_steps=1",
    "epochs=3": "max_steps=1",
    "gt.stream_bigquery(query=": "stream_bigquery(query=",
    'gt.stream_bigquery("': 'stream_bigquery("',
}
SLOW = {"export", "getting-started", "judging", "memory", "reference"}


def blocks(page, *languages):
    """Yield the line, the language, the caption and the text of a page's blocks."""
    for match in BLOCK.finditer(PAGES[page]):
        language, caption, code = match.groups()
        if language in languages:
            yield PAGES[page].count("\n", 0, match.start(3)) + 1, language, caption, code


def read_samples(modality):
    manifest = sample_data(modality) / "manifest.jsonl"
    return [json.loads(line) for line in manifest.read_text().splitlines()][:30]


@pytest.fixture(scope="module")
def bigquery():
    """A server with the table that the documents name."""
    rows = read_samples("text")
    columns = {"question": "prompt", "answer": "response"}
    table = pyarrow.table({name: [row[old] for row in rows] for name, old in columns.items()})
    with BigQueryServer() as server:
        server.put_table("my-project.support.tickets", table)
        yield {
            "bigquery_client": server.client("my-project"),
            "bigquery_read_client": server.read_client(),
        }


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """What the documents take as given: models, and files under the names that they use."""
    folder = tmp_path_factory.mktemp("docs")
    _, processor = save_tiny_model("gemma4-e2b", folder / "model")
    processor.save_pretrained(folder / "mlx-base")
    write_as_mlx_lm(folder / "model", folder / "mlx-base")
    rows = read_samples("text")
    (folder / "tickets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    datasets.Dataset.from_list(rows).save_to_disk(folder / "hub")
    lines = ["scan,question,json"]
    for row in read_samples("image"):
        shutil.copy(sample_data("image") / row["image"], folder / Path(row["image"]).name)
        lines.append(f"{Path(row['image']).name},{row['prompt']},{row['response']}")
    (folder / "receipts.csv").write_text("\n".join(lines) + "\n")
    shutil.copy(folder / Path(read_samples("image")[0]["image"]).name, folder / "shape.png")
    sound = sample_data("audio") / read_samples("audio")[0]["audio"]
    shutil.copy(sound, folder / "word.flac")
    return folder


def write_as_mlx_lm(source, target):
    """Write a checkpoint's decoder under the names of mlx-lm, which has no towers."""
    prefix = "model.language_model."
    tensors = {
        f"language_model.model.{name.removeprefix(prefix)}": tensor
        for name, tensor in load_file(source / "model.safetensors").items()
        if name.startswith(prefix)
    }
    save_file(tensors, target / "model.safetensors", metadata={"format": "mlx"})
    shutil.copy(source / "config.json", target)


def run_page(page, folder, namespace):
    """Write the files that a page shows, then run its Python blocks one after the other."""
    for _, _, caption, code in blocks(page, "json", "yaml", "csv"):
        if caption:
            (folder / caption).unlink(missing_ok=True)  # else what the link leads to changes
            (folder / caption).write_text(code, encoding="utf-8")
    num_blocks = 0
    for line, _, _, code in blocks(page, "python"):
        # Empty lines before it, so that an error's traceback names the line of the page.
        runnable = "\n" * (line - 1) + code
        for old, new in STAND_INS.items():
            runnable = runnable.replace(old, new)
        exec(compile(runnable, DOCS / f"{page}.md", "exec"), namespace)
        num_blocks += 1
    return num_blocks


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] * (page in SLOW)) for page in PAGES]
)
def test_a_page_runs(page, shelf, bigquery, tmp_path, monkeypatch):
    for path in shelf.iterdir():
        if path.is_dir():
            (tmp_path / path.name).symlink_to(path)
        else:  # media of rows lie where their data do
            shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    namespace = {"stream_bigquery": partial(gt.stream_bigquery, **bigquery)}
    num_blocks = run_page(page, tmp_path, namespace)
    assert num_blocks == PAGES[page].count("```python\n")


def test_every_public_name_has_an_example_that_runs():
    code = "\n".join(code for _, _, _, code in blocks("reference", "python"))
    used = {
        node.attr
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "gt"
    }
    used |= {name for _, name in re.findall(r"from gemma_tuner(\.\w+)+ import (\w+)", code)}
    assert set(gt.__all__) <= used
    assert all(f"### {name}\n" in PAGES["reference"] for name in gt.__all__ if name != "testing")


def test_every_page_is_reached():
    contents = re.search(r"```{toctree}\n:hidden:\n\n(.*?)```", PAGES["index"], re.S)[1].split()
    assert {*contents, "index"} == PAGES.keys()


# --- commands -----------------------------------------------------------------------------------


def read_commands():
    """Yield the page, the line and the words of each of our commands."""
    for page in PAGES:
        for line, _, _, code in blocks(page, "console"):
            for number, text in enumerate(code.replace("\\\n", " ").splitlines(), line):
                if text.startswith("$ "):
                    yield pytest.param(shlex.split(text[2:]), id=f"{page}:{number}")


COMMANDS = [case for case in read_commands() if case.values[0][0] == "gemma-tuner"]
RECIPES = [case for case in read_commands() if any("recipes/" in word for word in case.values[0])]


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_has_these_flags(words):
    command = typer.main.get_command(app)
    words = words[1:]
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        command = command.commands[words.pop(0)]
    flags = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)}
    assert {word for word in words if word.startswith("-")} <= flags


@pytest.mark.parametrize("words", RECIPES)
def test_a_recipe_has_these_flags(words, monkeypatch, capsys):
    path = next(ROOT / word for word in words if word.startswith("recipes/"))
    flags = [word for word in words if word.startswith("--")]
    given = [word for flag in flags for word in (flag, "1")]
    monkeypatch.setattr(sys, "argv", [str(path), *given, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 0, capsys.readouterr().err


def test_all_commands_are_listed():
    assert len(COMMANDS) > 20
    listed = set(re.findall(r"^\| `(\w+)` \|", PAGES["command-line"], re.M))
    assert listed == typer.main.get_command(app).commands.keys()


def test_the_settings_file_is_one(tmp_path, monkeypatch):
    [(_, _, name, code)] = blocks("command-line", "yaml")
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(code)
    Path("tickets.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in read_samples("text"))
    )
    arguments = ["preview", "--config", name, "--model", "tiny", "--cache-dir", "cache"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "⟦" in done.output


# --- messages -----------------------------------------------------------------------------------

MESSAGES = [
    pytest.param(*code.strip().split(": ", 1), id=f"line {line}")
    for line, _, _, code in blocks("troubleshooting", "text")
]


RAISE_NOTHING_HERE = {"doctor", "testing", "watch"}


@cache
def list_texts():
    """The texts in the package's source; what is filled in is a NUL."""
    package = ROOT / "gemma_tuner"
    paths = [path for path in package.rglob("*.py") if path.parent.name not in RAISE_NOTHING_HERE]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    kinds = (ast.Constant, ast.JoinedStr)
    return {read_text(n) for n in nodes if isinstance(n, kinds) and id(n) not in docstrings}


def read_text(node):
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(read_text, node.values))
    return "\0"


@pytest.mark.parametrize(("kind", "message"), MESSAGES)
def test_a_message_is_in_the_source(kind, message):
    assert kind in {"AccessDeniedError", *gt.__all__}
    wanted = re.compile(".*".join(map(re.escape, re.split(" ?… ?", message))), re.S)
    assert any(wanted.search(text) for text in list_texts())


def test_the_troubles_are_many():
    assert len(MESSAGES) > 35


# --- the built pages ----------------------------------------------------------------------------


@pytest.mark.slow
def test_sphinx_builds_them_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", DOCS, tmp_path]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-5000:]
    built = {path.stem for path in tmp_path.glob("*.html")}
    assert PAGES.keys() <= built
    reference = (tmp_path / "reference.html").read_text(encoding="utf-8")
    missing = [n for n in gt.__all__ if f'id="gemma_tuner.{n}"' not in reference]
    assert missing == ["testing"]  # whose parts stand there one by one


def test_each_promise_is_held_by_a_test_that_is_there():
    page = (ROOT / "docs/promises.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and "held by" not in line]
    held = [re.search(r"`(tests/[\w/]+\.py)::(\w+)` \|$", row) for row in rows]
    assert len(rows) > 30
    assert all(held), [row for row, found in zip(rows, held, strict=True) if not found]
    for found in held:
        assert f"def {found[2]}(" in (ROOT / found[1]).read_text(), found[0]
