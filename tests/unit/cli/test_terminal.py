"""What comes from rows, files, runs, checkpoints and servers never commands the terminal."""

import json
import re
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from gemma_tuner.cli.main import app
from gemma_tuner.collators.preview import Preview, Segment
from gemma_tuner.display import is_blank, quote_line, quote_text
from gemma_tuner.errors import CheckpointError, DataError, SourceError
from gemma_tuner.evaluation import generation
from gemma_tuner.log import announce, logger
from gemma_tuner.models.adapter_files import CONFIG as ADAPTER_CONFIG
from gemma_tuner.testing import tiny_model
from gemma_tuner.training.reporting.progress import Progress

# The screen cleared, a title and a clipboard set, a link, a bell, C1's CSI, lines written over,
# the direction turned.
ATTACK = (
    "\x1b[2J\x1b]0;t\x07\x1b]52;c;QQ==\x07\x1b]8;;http://x\x1b\\y\x9b31m\b\r\x7f\x85"
    "\u202ea\u202d\u2066b\u2069\u2028"
)
COMMANDS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
FORGED = "\ngemma_tuner: all is well"


def invoke(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def check_quiet(done, *, quoted=True):
    """Nothing of it commands a terminal, and what would have is shown."""
    shown = done.stdout + done.stderr
    assert not COMMANDS.search(shown), COMMANDS.search(shown)
    assert ("\\x1b[2J" in shown) == quoted, shown
    assert not any(line.startswith(FORGED[1:]) for line in shown.splitlines())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file whose name, columns, splits and texts are attacks, and one of its rows is bad."""
    folder = tmp_path_factory.mktemp("data")
    path = folder / f"a{ATTACK.replace('/', '')}{FORGED}.jsonl"
    rows = [
        {
            "prompt": f"p{i}{ATTACK}",
            "response": f"r{ATTACK}",  # of which preview shows the lines
            f"c{ATTACK}{FORGED}": i,
            "split": "train" if i % 2 else f"s{ATTACK}{FORGED}",
        }
        for i in range(40)
    ]
    rows[3]["response"] = ""
    rows[5]["response"] = f"{ATTACK}<|turn>{ATTACK}"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder whose name, settings and log are attacks."""
    folder = tmp_path_factory.mktemp("runs") / f"r{ATTACK.replace('/', '')}{FORGED}"
    folder.mkdir()
    message = f"DataError: {ATTACK}{FORGED}"
    lines = [
        {"kind": "eval", "step": 0, "loss": 1.5},
        {"kind": "event", "step": 1, "name": f"n{ATTACK}{FORGED}"},
        {"kind": "event", "step": 1, "name": "failed", "message": message},
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "settings.yaml").write_text(json.dumps({"model": "tiny", "data": [ATTACK + FORGED]}))
    return folder


@pytest.mark.parametrize("command", ["check", "preview", "train", "quarantine"])
def test_rows_files_and_columns_are_quoted(data, tmp_path, command):
    flags = ["--held-out", 0, "--max-bad-fraction", 0.5, "--cache-dir", tmp_path / "cache"]
    if command == "train":
        flags += ["--max-steps", 1, "--max-tokens", 512, "--out", tmp_path / "run"]
    place = ["--data", data] if command == "quarantine" else [data]
    done = invoke(command, *place, *flags)
    check_quiet(done)


def test_runs_are_quoted(run):
    other = shutil.copytree(run, run.parent / "other")
    (other / "settings.yaml").write_text(json.dumps({"model": FORGED, f"m{ATTACK}{FORGED}": 1}))
    for arguments in (["list", run.parent], ["show", run], ["compare", run, other]):
        check_quiet(invoke("runs", *arguments))


def test_answers_are_quoted_as_they_come(monkeypatch):
    class Answer:
        def __enter__(self):
            return iter(["one\n\ttwo", *ATTACK, "three"])

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(generation, "generate_stream", lambda *given, **options: Answer())
    done = invoke("generate", "--prompt", "x")
    check_quiet(done)
    assert done.stdout.startswith("one\n\ttwo\\x1b[2J")


@pytest.mark.parametrize(
    "command", [["plan"], ["generate", "-p", "x"], ["preview"], ["export", "mlx"]]
)
def test_what_checkpoints_say_is_quoted(command, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    tiny_model("gemma4-e2b")[1].save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": ATTACK, "architectures": []}))
    if command[0] == "export":
        (folder / ADAPTER_CONFIG).write_text(json.dumps({"peft_type": ATTACK}))
        done = invoke(*command, folder, "--out", tmp_path / "out")
    else:
        done = invoke(*command, "--model", folder)
    check_quiet(done, quoted="\\x1b[2J" in done.stderr)


@pytest.mark.parametrize("kind", [SourceError, CheckpointError])
def test_errors_are_quoted_wherever_they_are_shown(kind):
    said = str(kind(f"the server says {ATTACK}"))
    assert not COMMANDS.search(said)
    assert "the server says \\x1b[2J" in said
    assert not COMMANDS.search(str(DataError(ATTACK, key=ATTACK)))


def test_debug_quotes_the_errors_of_others(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise ValueError(ATTACK)

    monkeypatch.setattr("gemma_tuner.watch.run.open_runs", fail)
    (tmp_path / "log.jsonl").write_text("")
    for flags in ([], ["--debug"]):
        done = invoke("runs", "show", tmp_path, *flags)
        assert done.exit_code == 1
        check_quiet(done)


def test_log_records_are_one_quoted_line_for_every_handler(capsys, caplog):
    announce(f"{ATTACK}{FORGED}")
    logger.warning("the server says %s", ATTACK + FORGED)
    shown = capsys.readouterr().err
    assert len(shown.splitlines()) == 2
    assert not COMMANDS.search(shown + caplog.text)


def test_progress_is_quoted(capsys):
    with Progress(1) as progress:
        progress.message(ATTACK)
    assert not COMMANDS.search(capsys.readouterr().err)


def test_a_preview_is_quoted():
    shown = str(
        Preview(ATTACK + FORGED, (Segment(f"line\n{ATTACK}", trained=True, num_tokens=1),))
    )
    assert not COMMANDS.search(shown)
    assert "⟦line\n\\x1b[2J" in shown
    assert shown.count("\n") == 2


def test_every_command_of_a_terminal_is_quoted_and_all_else_stays():
    for code in np.r_[0:0x300, 0x2000:0x2070, 0xD800, 0xDFFF, 0xFB00, 0x1F600]:
        text = chr(code)
        is_command = bool(COMMANDS.match(text)) or 0xD800 <= code < 0xE000
        shown = quote_text(f"a{text}b")
        assert (shown != f"a{text}b") == is_command, hex(code)
        assert shown.encode()
        assert len(quote_line(f"a{text}b").splitlines()) == 1
    assert quote_text("a\tb\nc") == "a\tb\nc"
    assert quote_line("a\tb\nc") == r"a\tb\nc"


@pytest.mark.parametrize(
    "text",
    ["", " \n", "\u200b", "\u200b\u200d \ufeff", "\xad", "\u2800", "\u3164\xa0", "\0", "\ufe0f"],
)
def test_what_cannot_be_seen_is_no_answer(text, tmp_path):
    assert is_blank(text)
    rows = [{"prompt": "p", "response": "r"}, {"prompt": "p", "response": text}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = invoke("check", tmp_path / "a.jsonl", "--held-out", 0, "--cache-dir", tmp_path / "c")
    assert "cannot be read: a.jsonl:2: empty answer" in done.stdout


@pytest.mark.parametrize("text", [".", "\u200bx", "👨\u200d👩", "ा", "\ufffc", "־"])
def test_what_can_be_seen_is_an_answer(text):
    assert not is_blank(text)
