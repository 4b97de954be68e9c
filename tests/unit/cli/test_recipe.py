"""What recipes share: flags from a file and the command line, what they mean, and guessing."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_tuner.cli.recipe import ANSWERS, fit, open_splits, rate_guessing, read_arguments
from gemma_tuner.errors import ConfigError
from gemma_tuner.records import Example, Text, Turn
from gemma_tuner.settings import expand_home, save_settings

SCRIPT = str(Path(__file__).parents[3] / "recipes/audio_transcribe.py")


def parse(*flags):
    return read_arguments(SCRIPT, list(flags), "long_audio", *ANSWERS, data="audio")


def write(folder, text):
    path = folder / "given.yaml"
    path.write_text(text)
    return str(path)


def test_the_rate_follows_the_model_and_the_folder_the_script():
    args = parse()
    assert (args.out, args.batch_size) == (Path("runs/audio_transcribe"), 4)
    rates = [parse(*flags).config.learning_rate for flags in ((), ("--model", "some/model"))]
    assert rates == [5e-3, 2e-4]


def test_a_file_gives_flags_and_the_command_line_wins(tmp_path):
    path = write(tmp_path, "steps: 7\nlearning-rate: 1e-4\nlong_audio: split\nmodel: null\n")
    args = parse("--config", path)
    assert (args.max_steps, args.learning_rate, args.long_audio) == (7, 1e-4, "split")
    assert args.model == "tiny"
    for flags in (["--steps", "9", "--config", path], ["--config", path, "--steps", "9"]):
        args = parse(*flags)
        assert (args.max_steps, args.learning_rate) == (9, 1e-4)


def test_a_file_may_be_json(tmp_path):
    path = write(tmp_path, json.dumps({"steps": 3, "out": "a b"}))
    assert parse("--config", path).out == Path("a b")


def test_the_command_line_is_sys_argv_where_none_is_given(tmp_path, monkeypatch):
    path = write(tmp_path, "steps: 7\nout: there\n")
    monkeypatch.setattr("sys.argv", ["recipe.py", "--config", path, "--steps", "8"])
    args = read_arguments(SCRIPT, None)
    assert (args.max_steps, args.out) == (8, Path("there"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", "unknown setting 'stepz'; did you mean 'steps'?"),
        ("config: other.yaml", "unknown setting 'config'"),
        ("steps: true", "'steps' in 'given.yaml' is True; it takes one number or text"),
        ("model: [a, b]", "'model' in 'given.yaml' is .*; it takes one number or text"),
        ("steps: ten", "'steps' in 'given.yaml' is 'ten': .*valid integer"),
        ("long_audio: cut", "'long_audio' in 'given.yaml' is 'cut': 'cut' is not one of 'error'"),
    ],
)
def test_what_no_flag_takes_is_an_error_that_names_it(text, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        parse("--config", write(tmp_path, text))


def test_flags_are_checked(capsys):
    with pytest.raises(SystemExit) as ended:
        parse("--steps", "ten")
    assert ended.value.code == 2
    assert "--max-steps" in capsys.readouterr().err


def test_a_home_folder_is_meant_in_a_file_and_after_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = parse("--config", write(tmp_path, "data: ~/d.jsonl\nmodel: ~/m\n"), "--out=~/x")
    assert (args.data, args.model) == ([f"{tmp_path}/d.jsonl"], f"{tmp_path}/m")
    assert args.out == tmp_path / "x"


@pytest.mark.parametrize("is_main", [True, False])
def test_one_process_alone_writes_the_settings(tmp_path, is_main):
    trainer = SimpleNamespace(
        processes=SimpleNamespace(is_main=is_main),
        fit=lambda *, resume: SimpleNamespace(stopped_by=None),
        config=SimpleNamespace(output_dir=tmp_path / "run"),
    )
    fit(trainer, parse("--out", str(tmp_path / "run")))
    assert (tmp_path / "run/settings.yaml").exists() == is_main


texts = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\u2028\u2029"), min_size=1
)


@given(data=texts, out=texts, steps=st.integers(1, 10**6), rate=st.floats(1e-9, 1))
def test_saved_settings_are_read_back(data, out, steps, rate, tmp_path_factory):
    flags = [f"--data={data}", f"--out={out}", f"--steps={steps}", f"--learning-rate={rate!r}"]
    args = parse(*flags)
    path = save_settings(tmp_path_factory.getbasetemp() / "saved", args.settings)
    again = parse("--config", str(path))
    assert again.settings == args.settings
    assert again.config == args.config or again.out.is_absolute() > args.out.is_absolute()
    assert args.data == expand_home({"data": [data]})["data"]


def test_flags_make_the_settings_of_training():
    config = parse("--steps", "200", "--gradient-accumulation", "3", "--out", "x").config
    assert (config.max_steps, config.batch_size, config.gradient_accumulation) == (200, 4, 3)
    assert (config.warmup_steps, config.eval_every_steps, config.output_dir) == (10, 50, Path("x"))
    assert parse("--steps", "1").config.warmup_steps == 0


def test_splits_are_by_name_or_a_tenth():
    from gemma_tuner.streaming.opening import stream_local
    from gemma_tuner.testing.samples import sample_data

    def open_stream(**keywords):
        return stream_local(sample_data("chat"), **keywords)

    train, held_out = open_splits(open_stream, "test")
    assert (len(train), len(held_out)) == (66, 22)
    train, held_out = open_splits(open_stream, None)
    assert len(train) + len(held_out) == 66
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


def test_a_setting_that_a_recipe_lacks_is_refused(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("rank: 64\n")
    with pytest.raises(ConfigError, match="'rank', which this recipe does not take"):
        parse("--config", str(path))
