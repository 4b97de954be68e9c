"""What recipes share: flags from a file and the command line, what they mean, and guessing."""

import argparse
import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_tuner.errors import ConfigError
from gemma_tuner.records import Example, Text, Turn
from gemma_tuner.settings import expand_home, read_settings, save_settings
from gemma_tuner.training.script import (
    add_answer_flags,
    fit,
    make_config,
    open_splits,
    parse_arguments,
    rate_guessing,
)


def make_parser():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data")
    parser.add_argument("--long-audio", choices=("error", "split"), default="error")
    add_answer_flags(parser)
    return parser


def parse(*flags):
    return parse_arguments(make_parser(), list(flags), out="runs/here")


def write(folder, text):
    path = folder / "given.yaml"
    path.write_text(text)
    return str(path)


def test_the_rate_follows_the_model_and_the_folder_the_script():
    args = parse()
    assert (args.out, args.batch_size) == ("runs/here", 4)
    assert (args.learning_rate, parse("--model", "some/model").learning_rate) == (5e-3, 2e-4)


def test_a_file_gives_flags_and_the_command_line_wins(tmp_path):
    path = write(tmp_path, "steps: 7\nlearning-rate: 1e-4\nlong_audio: split\nmodel: null\n")
    args = parse("--config", path)
    assert (args.steps, args.learning_rate, args.long_audio) == (7, 1e-4, "split")
    assert args.model is None
    for flags in (["--steps", "9", "--config", path], ["--config", path, "--steps", "9"]):
        args = parse(*flags)
        assert (args.steps, args.learning_rate) == (9, 1e-4)


def test_a_file_may_be_json(tmp_path):
    assert parse("--config", write(tmp_path, json.dumps({"steps": 3, "out": "a b"}))).out == "a b"


def test_the_command_line_is_sys_argv_where_none_is_given(tmp_path, monkeypatch):
    path = write(tmp_path, "steps: 7\nout: there\n")
    monkeypatch.setattr("sys.argv", ["recipe.py", "--config", path, "--steps", "8"])
    args = parse_arguments(make_parser(), None, out="runs/here")
    assert (args.steps, args.out) == (8, "there")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", "unknown setting 'stepz'; did you mean 'steps'?"),
        ("resume: true", "unknown setting 'resume'"),
        ("config: other.yaml", "unknown setting 'config'"),
        ("steps: true", "'steps' in 'given.yaml' is True; it takes one number or text"),
        ("data: [a, b]", "'data' in 'given.yaml' is .*; it takes one number or text"),
    ],
)
def test_what_no_flag_takes_is_an_error_that_names_it(text, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        parse("--config", write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: ten", "argument --steps: invalid int value: 'ten'"),
        ("long_audio: cut", "argument --long-audio: invalid choice: 'cut'"),
    ],
)
def test_values_of_a_file_are_checked_as_those_of_flags(text, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse("--config", write(tmp_path, text))
    assert message in capsys.readouterr().err


def test_a_home_folder_is_meant_in_a_file_and_after_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = parse("--config", write(tmp_path, "data: ~/d.jsonl\nmodel: ~/m\n"), "--out=~/x")
    assert (args.data, args.model) == (f"{tmp_path}/d.jsonl", f"{tmp_path}/m")
    assert args.out == f"{tmp_path}/x"


@pytest.mark.parametrize("is_main", [True, False])
def test_one_process_alone_writes_the_settings(tmp_path, is_main):
    trainer = SimpleNamespace(
        processes=SimpleNamespace(is_main=is_main),
        fit=lambda *, resume: SimpleNamespace(stopped_by=None),
    )
    fit(trainer, parse("--out", str(tmp_path / "run")), "recipe.py", [])
    assert (tmp_path / "run/settings.yaml").exists() == is_main


texts = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\u2028\u2029"), min_size=1
)


@given(data=texts, out=texts, steps=st.integers(1, 10**6), rate=st.floats(1e-9, 1))
def test_saved_settings_are_read_back(data, out, steps, rate, tmp_path_factory):
    flags = [f"--data={data}", f"--out={out}", f"--steps={steps}", f"--learning-rate={rate!r}"]
    args = parse(*flags)
    settings = {name: value for name, value in vars(args).items() if name != "resume"}
    path = save_settings(tmp_path_factory.getbasetemp() / "saved", settings)
    assert parse("--config", str(path)) == argparse.Namespace(**vars(args) | {"config": str(path)})
    assert read_settings(path, vars(args))["data"] == expand_home({"data": data})["data"]


def test_flags_make_the_settings_of_training():
    config = make_config(parse("--steps", "200", "--gradient-accumulation", "3", "--out", "x"))
    assert (config.max_steps, config.batch_size, config.gradient_accumulation) == (200, 4, 3)
    assert (config.warmup_steps, config.eval_every_steps, config.output_dir) == (10, 50, "x")
    assert make_config(parse("--steps", "1")).warmup_steps == 0


def test_splits_are_by_name_or_a_tenth():
    from gemma_tuner.streaming.opening import stream_local
    from gemma_tuner.testing.samples import sample_data

    def open_stream(**keywords):
        return stream_local(sample_data("chat"), **keywords)

    train, held_out = open_splits(open_stream, "test")
    assert (len(train), len(held_out)) == (66, 22)
    train, held_out = open_splits(open_stream, None)
    assert len(train) + len(held_out) == 88
    assert 0 < len(held_out) < 22


def ask(question, answer):
    turns = (Turn("user", (Text(question),)), Turn("assistant", (Text(answer),)))
    return Example(f"{question}/{answer}", turns)


def test_guessing_is_the_commonest_answer_to_the_same_question():
    train = [ask("a", "x"), ask("a", "y"), ask("a", "y"), *[ask("b", "z")] * 4]
    assert (
        rate_guessing(train, [ask("a", "y"), ask("a", "x"), ask("b", "z"), ask("b", "y")]) == 0.5
    )
    assert rate_guessing(train, [ask("new", "z")]) == 1  # the commonest of all
