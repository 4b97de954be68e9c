"""``gemma-tuner check``: all that train would meet, told at once."""

import json

from typer.testing import CliRunner

from gemma_tuner.cli.main import app


def invoke(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def write(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_bad_row_is_told_at_once_with_its_reason(tmp_path):
    rows = [{"prompt": f"p{i}", "response": "CANARY " * (i % 5 + 1)} for i in range(30)]
    rows[3]["response"] = rows[8]["response"] = ""
    rows[5]["response"] = rows[9]["response"] = "CANARY " * 200
    path = write(tmp_path, rows)
    flags = ["--cache-dir", tmp_path / "cache", "--held-out", 0, "--max-tokens", 256]
    done = invoke("check", path, *flags)
    assert done.exit_code == 1
    for key in (4, 9):
        assert f"cannot be read: rows.jsonl:{key}: empty answer" in done.stdout
    for key in (6, 10):
        assert f"  rows.jsonl:{key}: " in done.stdout
    assert "checked 28 of 28 rows" in done.stdout
    assert "longer than max_tokens=256: 2" in done.stdout
    assert "columns: prompt = 'prompt', response = 'response'" in done.stdout
    assert "CANARY" not in done.stdout + done.stderr
    # It ends as train would.
    assert "example 'rows.jsonl:4': empty answer" in done.stderr


def test_what_is_right_is_summed_up_and_takes_what_train_takes(tmp_path):
    path = write(tmp_path, [{"prompt": f"p{i}", "response": "yes"} for i in range(40)])
    flags = ["--cache-dir", tmp_path / "cache", "--rank", 4, "--iters", 9, "--report-to", "wandb"]
    done = invoke("check", path, *flags)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("trained on: ")
    assert "held out: " in done.stdout
    assert invoke("check", path, "--data", path, *flags).exit_code == 0
    twice = invoke("check", path, "--data", "other.jsonl", *flags)
    assert "data is given twice" in twice.stderr
