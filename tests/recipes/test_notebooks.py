"""Every notebook in notebooks/ runs from top to bottom in a fresh kernel, and is counted."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
NAMES = ("audio", "image", "memory", "streaming", "text")


def read(name):
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    return notebook


def run(name, folder):
    """Run a notebook in a folder, in which it may run again, and return it with its outputs."""
    notebook = read(name)
    client = NotebookClient(
        notebook, timeout=280, kernel_name="python3", resources={"metadata": {"path": folder}}
    )
    client.execute()
    return notebook


def list_outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def join_html(notebook):
    shown = [output.get("data", {}) for output in list_outputs(notebook)]
    return "\n".join(data.get("text/html", "") for data in shown)


def join_text(notebook):
    """What was printed, and what of it to stderr."""
    streams = [output for output in list_outputs(notebook) if output.output_type == "stream"]
    return "".join(output.text for output in streams)


def count_plots(notebook):
    return sum("image/png" in output.get("data", {}) for output in list_outputs(notebook))


def read_number(pattern, text):
    return float(re.search(pattern, text).group(1).replace(",", ""))


def check_clean(notebook):
    """No output tells of a warning or an error."""
    for output in list_outputs(notebook):
        assert output.output_type != "error"
    said = join_text(notebook) + join_html(notebook)
    assert "Warning" not in said
    assert "Traceback" not in said


def test_every_notebook_is_run_by_a_test():
    assert sorted(path.stem for path in NOTEBOOKS.rglob("*.ipynb")) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_short_and_stripped(name):
    notebook = read(name)
    assert 10 <= len(notebook.cells) <= 15
    assert notebook.cells[0].cell_type == "markdown"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
    assert not {"widgets", "signature"} & set(notebook.metadata)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_says_what_to_change_for_the_real_thing(name):
    code = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "code")
    marked = [line for line in code.splitlines() if line.startswith("# The one line to change: ")]
    assert len(marked) == 1
    names = marked[0].removeprefix("# The one line to change: ").split(" = ")[0]
    assert f"\n{marked[0]}\n{names} = " in code  # it stands above the line that it replaces


# --- run: slow ------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_notebook_of_text(tmp_path):
    notebook = run("text", tmp_path)
    check_clean(notebook)
    html, said = join_html(notebook), join_text(notebook)
    assert html.count("<mark") == 2  # both answers of the conversation in the preview
    assert "predicted peak" in html
    assert count_plots(notebook) == 1
    assert (
        read_number(r"exact_match \(higher is better\)</td><td[^>]*>([\d.]+)", html)
        > read_number(r"would be right in ([\d.]+)%", said) / 100 + 0.2
    )
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert any(
        "## Use" in o.get("data", {}).get("text/markdown", "") for o in list_outputs(notebook)
    )


@pytest.mark.slow
def test_the_notebook_of_pictures(tmp_path):
    notebook = run("image", tmp_path)
    check_clean(notebook)
    html, said = join_html(notebook), join_text(notebook)
    assert html.count('<img src="data:image/png;base64,') == 3
    assert "<mark" in html
    assert count_plots(notebook) == 2
    check_better_than_guessing(html, said)
    answers = re.search(r"answers '(.*)'; the adapter answered '(.*)', and '", said)
    assert answers.group(1) == answers.group(2)


@pytest.mark.slow
def test_the_notebook_of_sound(tmp_path):
    notebook = run("audio", tmp_path)
    check_clean(notebook)
    html, said = join_html(notebook), join_text(notebook)
    assert html.count('src="data:audio/wav;base64,') == 7
    assert "<mark" in html
    assert count_plots(notebook) == 2
    check_better_than_guessing(html, said)


def check_better_than_guessing(html, said):
    """The adapter is more often right than who gives the commonest answer, and than its base."""
    adapter, base = map(
        float,
        re.search(
            r"exact_match \(higher is better\)</td><td[^>]*>([\d.]+)</td><td[^>]*>([\d.]+)", html
        ).groups(),
    )
    assert adapter > 2 * read_number(r"would be right in ([\d.]+)%", said) / 100
    assert adapter > base


@pytest.mark.slow
def test_the_notebook_of_streams_and_that_it_runs_again_beside_its_first_run(tmp_path):
    check_clean(run("streaming", tmp_path))
    notebook = run("streaming", tmp_path)
    check_clean(notebook)
    assert len(list((tmp_path / "runs").iterdir())) == 2
    html, said = join_html(notebook), join_text(notebook)
    assert "media in buckets: " in html
    assert '<img src="data:image/png;base64,' in html
    assert "50 before, 78 after: the same 128, in the same order" in said
    assert read_number(r"([\d,]+) retries", said) > 0
    assert "127 of 128 rows could be used" in said
    assert "read again: 128 of 128 rows can be used" in said
    assert "25 optimizer steps done" in html
    assert count_plots(notebook) == 1


@pytest.mark.slow
def test_the_notebook_of_memory(tmp_path):
    notebook = run("memory", tmp_path)
    check_clean(notebook)
    html, said = join_html(notebook), join_text(notebook)
    assert "the first 15 of 35 layers" in html
    assert count_plots(notebook) == 1
    ample, tight = re.search(r"at most (\d+) MiB against (\d+) MiB", said).groups()
    assert int(tight) < 0.8 * int(ample)
    assert "What would " in said  # the error's remedy
