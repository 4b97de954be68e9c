"""The README's examples run as they are written, on a tiny model and small files."""

import json
import re
import shutil
from pathlib import Path

import pyarrow
import pytest

from gemma_tuner.testing import BigQueryServer, sample_data, save_tiny_model

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def read_samples(modality):
    manifest = sample_data(modality) / "manifest.jsonl"
    return [json.loads(line) for line in manifest.read_text().splitlines()][:30]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a model and with data under the names and columns that the README uses."""
    folder = tmp_path_factory.mktemp("readme")
    save_tiny_model("gemma4-e2b", folder / "model")
    rows = read_samples("text")
    (folder / "tickets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = ["scan,question,json"]
    for row in read_samples("image"):
        shutil.copy(sample_data("image") / row["image"], folder / Path(row["image"]).name)
        lines.append(f"{Path(row['image']).name},{row['prompt']},{row['response']}")
    (folder / "receipts.csv").write_text("\n".join(lines) + "\n")
    (folder / "calls").mkdir()
    with (folder / "calls/manifest.jsonl").open("w") as manifest:
        for row in read_samples("audio"):
            name = Path(row["audio"]).name
            shutil.copy(sample_data("audio") / row["audio"], folder / "calls" / name)
            manifest.write(json.dumps({"file": name, "transcript": row["response"]}) + "\n")
    return folder


def run_example(index, replaced=(), **namespace):
    """Run an example on the tiny model, for one step."""
    code = EXAMPLES[index]
    for old, new in (("google/gemma-4-E2B-it", "model"), ("=500", "=1"), *replaced):
        code = code.replace(old, new)
    exec("import gemma_tuner as gt\n" + code, namespace)
    return namespace


def test_there_is_an_example_for_each_modality_the_adapter_and_the_cloud():
    assert len(EXAMPLES) == 6
    assert all(len(example.strip().splitlines()) <= 9 for example in EXAMPLES[:3])


@pytest.mark.parametrize("index", range(3))
def test_an_example_runs(index, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    config = run_example(index)["config"]
    assert (Path(config.output_dir) / "adapter/adapter_model.safetensors").is_file()


def test_an_adapter_answers_without_this_library(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    if not Path("runs/tickets/adapter").exists():
        run_example(0)
    assert "gemma_tuner" not in EXAMPLES[3]
    namespace = run_example(3)
    assert any("lora_A" in name for name, _ in namespace["model"].named_parameters())
    answer = namespace["processor"].decode(namespace["answer"], skip_special_tokens=True)
    assert capsys.readouterr().out == answer + "\n"
    assert 1 <= len(namespace["answer"]) <= 200


def test_rows_in_bigquery(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    rows = read_samples("text")
    columns = {"question": "prompt", "answer": "response"}
    table = pyarrow.table({name: [row[old] for row in rows] for name, old in columns.items()})
    with BigQueryServer() as server:
        server.put_table("my-project.support.tickets", table)
        options = {
            "bigquery_client": server.client("my-project"),
            "bigquery_read_client": server.read_client(),
            "cache_dir": "cache",
        }
        added = [('"answer")', '"answer", **options)')]
        stream = run_example(4, added, options=options)["train"]
    assert len(stream) == len(rows)
    assert "30 rows (all)" in capsys.readouterr().out


def test_a_plan_is_printed(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    run_example(5, replaced=[("2048", "256")])
    assert "predicted peak" in capsys.readouterr().out
