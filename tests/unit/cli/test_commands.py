"""What commands share: errors as a paragraph, and settings from files under the flags."""

import dataclasses
import errno
import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from gemma_tuner.cli.commands import command, errors_explained
from gemma_tuner.cli.defaults import Config, Run, from_run, list_settings
from gemma_tuner.cli.main import app
from gemma_tuner.cli.settings import (
    ALIASES,
    DataSettings,
    ModelSettings,
    RowSettings,
    RunSettings,
    normalize_flag,
)
from gemma_tuner.errors import ConfigError
from gemma_tuner.models.lora_config import LoraConfig
from gemma_tuner.streaming.options import StreamOptions
from gemma_tuner.training.config import TrainConfig

# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ConfigError("rank is\n  0; give 1"), 1, "ConfigError: rank is 0; give 1\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/d/x"),
            1,
            "OSError: No space left on device (/d/x); free disk space there, or choose another "
            "folder\n",
        ),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "x"),
            1,
            "FileNotFoundError: No such file or directory (x); check the path\n",
        ),
        (RuntimeError("odd"), 1, "RuntimeError: odd. This is a fault of gemma_tuner"),
    ],
)
@pytest.mark.parametrize("debug", [False, True])
def test_an_error_is_one_paragraph_and_its_traceback_is_for_debug(
    error, status, said, debug, capsys
):
    with pytest.raises(SystemExit) as ended, errors_explained(debug=debug):
        raise error
    assert ended.value.code == status
    heard = capsys.readouterr()
    assert heard.out == ""
    assert said in heard.err
    assert heard.err.splitlines()[-1].startswith(said.splitlines()[0])
    assert ("Traceback" in heard.err) == debug
    assert debug or heard.err.count("\n") == 1


def test_a_reader_that_left_is_no_error():
    with pytest.raises(BrokenPipeError), errors_explained(debug=False):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


@pytest.mark.parametrize(
    ("message", "options", "flags"),
    [
        ("raise max_tokens, or set too_long='cut'", {"max_tokens", "too_long"}, None),
        ("give either max_steps=1 or epochs=2", {"max_steps", "epochs"}, "--max-steps, --epochs"),
        ("use ImageCollator", {"modality"}, "--modality"),
        ("the model has 8 layers; its text is long", {"layers", "text"}, ""),
        ("raise max_tokens", {"out"}, ""),
    ],
)
def test_errors_name_the_flags_of_the_command_that_failed(message, options, flags, capsys):
    flags = "--max-tokens, --too-long" if flags is None else flags
    with pytest.raises(SystemExit), errors_explained(debug=False, options=options):
        raise ConfigError(message)
    ending = f" [as flags: {flags}]" if flags else ""
    assert capsys.readouterr().err == f"ConfigError: {message}{ending}\n"


# --- settings ---------------------------------------------------------------------------------


def make_app():
    """An app whose command says what it was given."""
    probe = typer.Typer(context_settings={"token_normalize_func": normalize_flag})

    @probe.command()
    @command
    def show(context: typer.Context, data: DataSettings, run: RunSettings, config: Config = None):
        typer.echo(json.dumps([data.data, run.max_steps, run.learning_rate, run.resume]))
        typer.echo(json.dumps(list_settings(context)))

    @probe.command()
    @command
    def look(model: ModelSettings, rows: RowSettings, run: Run = None, batch_size: int = 8):
        typer.echo(json.dumps([model.model, rows.max_tokens, batch_size]))

    @probe.command()
    @command
    def gauge(model: ModelSettings, rows: RowSettings, config: Config = None):
        typer.echo(json.dumps([model.model, rows.max_tokens]))

    return probe


def invoke(*arguments):
    return CliRunner().invoke(make_app(), list(map(str, arguments)))


@pytest.fixture
def write(tmp_path):
    def write(text, name="settings.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


@pytest.mark.parametrize(
    ("text", "flags", "given"),
    [
        ("", [], None),
        ("max_steps: 5\nlearning-rate: 1e-3\n", [], [None, 5, 1e-3, False]),
        ("iters: 5\ndata: a.jsonl\n", ["--iters", 7], [["a.jsonl"], 7, None, False]),
        ("steps: 5\ndata: [a.jsonl, b.jsonl]", [], [["a.jsonl", "b.jsonl"], 5, None, False]),
        ('{"iters": 5, "learning_rate": "2e-4"}', ["--data", "c"], [["c"], 5, 2e-4, False]),
        ("iters:\nlearning_rate: 1.0e-5", [], [None, None, 1e-5, False]),
        ("gradient-checkpointing: true", ["--lr", 3e-4], [None, None, 3e-4, False]),
        ("grad_checkpoint: true", ["--no-gradient-checkpointing"], [None, None, None, False]),
    ],
)
def test_a_settings_file_gives_what_no_flag_gives(write, text, flags, given):
    done = invoke("show", "--config", write(text or "{}\n"), *flags)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[0]) == (given or [None, None, None, False])


def test_a_command_takes_the_spellings_of_options_that_it_lacks(write):
    text = "grad_checkpoint: true\nadapter_path: runs/x\nlr: 1e-3\nmax_seq_length: 64\n"
    done = invoke("gauge", "--config", write(text))
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout) == ["tiny", 64]


def test_a_home_folder_is_meant_in_a_file_and_after_an_equals_sign(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = write("cache_dir: ~/big\ndata: [~/d/*.jsonl, gs://b/~/c.jsonl]\n")
    done = invoke("show", "--config", file, "--out=~/x")
    given, saved = map(json.loads, done.stdout.splitlines())
    assert given[0] == saved["data"] == [f"{tmp_path}/d/*.jsonl", "gs://b/~/c.jsonl"]
    assert (saved["cache_dir"], saved["out"]) == (f"{tmp_path}/big", f"{tmp_path}/x")


def test_every_alias_is_of_an_option_and_is_none_itself():
    train = typer.main.get_command(app).commands["train"]
    flags = {
        flag[2:] for option in train.params for flag in (*option.opts, *option.secondary_opts)
    }
    assert set(ALIASES.values()) <= flags
    assert not ALIASES.keys() & flags


@pytest.mark.parametrize(
    ("kind", "elsewhere"),
    [
        (TrainConfig, {"output_dir": "out"}),
        (LoraConfig, {}),
        (StreamOptions, {"fetch": None, "gcs_client": None}),
    ],
)
def test_every_setting_of_a_public_class_is_an_option_of_train(kind, elsewhere):
    train = typer.main.get_command(app).commands["train"]
    helps = {option.name: option.help for option in train.params}
    said = " ".join(kind.__doc__.replace("``", "").split())
    for field in dataclasses.fields(kind):
        name = elsewhere.get(field.name, field.name)
        if name is not None:
            assert name in helps
            told = helps[name].removesuffix(" May be given several times.")
            assert name in ("out", "seed") or told in said


def test_settings_that_are_saved_are_those_that_were_used(write, tmp_path):
    file = write("steps: 5\nseed: 3\nadapter_path: runs/x\n")
    done = invoke("show", "--config", file, "--seed", 4, "--resume")
    saved = json.loads(done.stdout.splitlines()[1])
    assert saved["max_steps"] == 5
    assert saved["seed"] == 4
    assert saved["out"] == str(Path("runs/x").absolute())
    assert not saved.keys() & {"config", "resume", "debug", "data"}
    again = write("".join(f"{k}: {json.dumps(v)}\n" for k, v in saved.items()), "again.yaml")
    assert json.loads(invoke("show", "--config", again).stdout.splitlines()[1]) == saved


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("iters: many", "the setting 'iters' in 'settings.yaml' is 'many': "),
        ("schedule: slow", "'slow' is not one of 'constant', 'cosine', 'linear'"),
        ("iters: 1\nsteps: 2", "has 'max_steps' under two names"),
        ("learning_rat: 1", "did you mean 'learning_rate'?"),
        ("config: x", "unknown setting 'config'"),
        ("debug: true", "unknown setting 'debug'"),
    ],
)
def test_a_setting_that_cannot_work_names_the_file_and_the_value(write, text, message):
    done = invoke("show", "--config", write(text))
    assert done.exit_code == 1
    assert message in done.stderr
    assert done.stderr.startswith("ConfigError: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("place", ["", "adapter", "checkpoints/step-00000001"])
def test_a_run_gives_its_settings_to_later_commands(write, tmp_path, place):
    # batch_size is another setting of a command that does not train.
    write("model: base\nmax_seq_length: 64\nbatch_size: 2\niters: 9\n")
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    assert json.loads(invoke("look", tmp_path / place).stdout) == ["base", 64, 8]
    done = invoke("look", tmp_path / place, "--model", "other")
    assert json.loads(done.stdout) == ["other", 64, 8]


@pytest.mark.parametrize("place", ["runs", "runs/scripted", "runs/scripted/adapter"])
def test_settings_of_another_above_a_run_are_not_its_own(write, tmp_path, place):
    write("model: stranger\n")
    (tmp_path / place).mkdir(parents=True)
    assert json.loads(invoke("look", tmp_path / place).stdout)[0] == "tiny"


def test_only_the_groups_that_were_asked_for_come_from_a_run(tmp_path, write):
    write("model: base\nprompt: question\n")
    assert from_run.__doc__
    done = CliRunner().invoke(app, ["generate", "--adapter", str(tmp_path)])
    assert done.exit_code == 2, "the column `prompt` of the run is not what is asked"
    assert "--prompt" in done.stderr
