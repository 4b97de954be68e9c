"""Common mistakes, through the command line: each is told in one paragraph with a remedy."""

import json
import re
import resource
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
import pytest
from typer.testing import CliRunner

from gemma_tuner.cli.main import app
from gemma_tuner.testing import save_tiny_model

TRAIN = ("train", "--cache-dir", "cache", "--max-steps", "1", "--held-out", "0", "--data")
GOOD = (*TRAIN, "good.jsonl")


@dataclass(frozen=True)
class Mistake:
    """What a user types, and what the answer must say.

    Args:
        name: What went wrong.
        command: The arguments.
        wrong: A pattern that names what is wrong.
        remedy: A pattern that says what to do.
        status: The exit status.
    """

    name: str
    command: tuple[str, ...]
    wrong: str
    remedy: str
    status: int = 1


# Told before any weight is read.
QUICK = [
    Mistake(
        "misspelt command", ("trian",), "No such command 'trian'", "Did you mean 'train'", status=2
    ),
    Mistake(
        "misspelt flag",
        ("train", "--learning-rat", "1"),
        "No such option: --learning-rat",
        "--learning-rate",
        status=2,
    ),
    Mistake(
        "unknown kind of tuning",
        ("train", "--variant", "qlora"),
        "'qlora' is not one of",
        "'dora'",
        status=2,
    ),
    Mistake(
        "misspelt key in a settings file",
        ("train", "--config", "misspelt.yaml"),
        "unknown setting 'learning_rat'",
        "did you mean 'learning_rate'",
    ),
    Mistake(
        "a settings file that is none",
        ("train", "--config", "broken.yaml"),
        "neither YAML nor JSON at line 2",
        "expected ',' or ']'",
    ),
    Mistake(
        "a value of another type in a settings file",
        ("train", "--config", "typed.yaml"),
        "the setting 'iters' in 'typed.yaml' is 'many'",
        "valid integer",
    ),
    Mistake(
        "no such settings file",
        ("train", "--config", "none.yaml"),
        "'none.yaml' cannot be read",
        "give the path of a YAML or JSON file",
    ),
    Mistake(
        "wrong path of the data",
        (*TRAIN, "trian.jsonl"),
        "no file, folder or match of 'trian.jsonl'",
        "check the path",
    ),
    Mistake(
        "data that is no Hub name either",
        (*TRAIN, "dta/train"),
        "'dta/train' is neither a folder nor kept on this machine",
        "unset it, or read the data set once while online",
    ),
    Mistake(
        "storage that is not supported",
        (*TRAIN, "s3://bucket/rows.jsonl"),
        "data begins with s3://",
        "give a path, gs://",
    ),
    Mistake(
        "data of two kinds",
        (*GOOD, "--data", "gs://bucket/rows.jsonl"),
        "of several kinds",
        "give one kind",
    ),
    Mistake(
        "empty data", (*TRAIN, "empty.jsonl"), "'empty.jsonl' holds no rows", "write one example"
    ),
    Mistake(
        "columns of other names",
        (*TRAIN, "columns.jsonl"),
        "no response was recognised: the columns are 'answer_text', 'q'",
        r"by response=.*--response",
    ),
    Mistake(
        "a column that is not there",
        (*GOOD, "--prompt", "question"),
        "the column 'question', which is not there",
        "the columns are 'prompt', 'response': give one of them",
    ),
    Mistake(
        "a modality that the data has not",
        (*GOOD, "--modality", "image"),
        "modality is 'image', and the data is read without image: as prompt = 'prompt'",
        r"name the column with image=.*--image, --modality",
    ),
    Mistake(
        "a missing picture",
        (*TRAIN, "missing.jsonl", "--modality", "image"),
        "example 'missing.jsonl:1': image 'gone.png' does not exist",
        "paths are relative to the folder of the data file",
    ),
    Mistake(
        "an empty answer",
        (*TRAIN, "unanswered.jsonl"),
        "example 'unanswered.jsonl:2': ",
        "response",
    ),
    Mistake(
        "no such split",
        ("train", "--cache-dir", "cache", "--data", "good.jsonl", "--held-out", "tset"),
        "there is no split",
        r"hold out a fraction.*--split",
    ),
    Mistake(
        "everything held out",
        ("train", "--cache-dir", "cache", "--data", "good.jsonl", "--held-out", "1.5"),
        r"split\(1.5\)",
        "between 0 and 1",
    ),
    Mistake(
        "steps and epochs",
        (*GOOD, "--epochs", "2"),
        "a run needs an end",
        r"give either.*--max-steps, --epochs",
    ),
    Mistake(
        "a rate of nothing",
        ("train", "--learning-rate", "0"),
        "learning_rate must be a finite number above 0; got 0.0",
        "as flags: --learning-rate",
    ),
    Mistake(
        "a folder that holds a run",
        (*GOOD, "--out", "held"),
        "output_dir 'held' already holds a run",
        r"continue it.*choose another folder.*--resume",
    ),
    Mistake(
        "an index beyond the data",
        ("preview", "--cache-dir", "cache", "--data", "good.jsonl", "--index", "99"),
        "index is 99",
        "from 0",
    ),
    Mistake("a run that is none", ("runs", "show", "empty"), "not the folder of a run", "give a"),
    Mistake("no runs", ("runs", "list", "empty"), "no run in 'empty'", "gemma-tuner train"),
    Mistake("one run to compare", ("runs", "compare", "held"), "there is one run", "give two"),
    Mistake("nothing to watch", ("watch", "gone"), "no folder 'gone'", "give a run"),
    Mistake(
        "an adapter that is none",
        ("evaluate", "empty", "--data", "good.jsonl", "--cache-dir", "cache"),
        "'empty' holds no adapter",
        "give the folder of a run or of an adapter",
    ),
    Mistake(
        "no such adapter",
        ("generate", "-p", "Hello", "--adapter", "gone"),
        "there is no folder 'gone'",
        "give the folder of a run or of an adapter",
    ),
    Mistake(
        "a model that was never downloaded",
        (*GOOD, "--model", "google/gemma-4-E2B-it"),
        "google/gemma-4-E2B-it cannot be loaded: it is not in the local cache",
        "connect once.*accept the licence.*hf auth login",
    ),
    Mistake(
        "a model's path that is wrong",
        (*GOOD, "--model", "no/such/folder"),
        "there is no such folder",
        "no name of a model on the Hub",
    ),
    Mistake(
        "a folder without weights",
        (*GOOD, "--model", "weightless"),
        "the folder has no weights",
        "download the checkpoint again",
    ),
    Mistake(
        "a device that is not here",
        (*GOOD, "--device", "cuda:7"),
        "'cuda:7' is not available here",
        r"device='cpu'.*--device",
    ),
]

# Told once a model is there.
SLOW = [
    Mistake(
        "pictures in messages for a text run",
        (*TRAIN, "seen.jsonl", "--modality", "text"),
        "modality is 'text', and rows hold image too",
        r"leave modality out, or turn their column off: image=False.*--image",
    ),
    Mistake(
        "a target that is not there",
        (*GOOD, "--targets", "vison"),
        "the target 'vison' matches no linear layer",
        "did you mean 'vision'",
    ),
    Mistake(
        "more layers than there are",
        (*GOOD, "--layers", "99"),
        "the model has 8 layers",
        "give at most so many",
    ),
    Mistake(
        "rows that are too long",
        (*GOOD, "--max-tokens", "16"),
        "16 more than max_tokens=16",
        r"raise max_tokens.*--max-tokens, --too-long",
    ),
    Mistake(
        "too little memory",
        ("plan", "--memory-gib", "0.001", "--device", "cpu", "--max-tokens", "64"),
        "tiny does not fit",
        "What would help: a smaller model",
    ),
    Mistake(
        "an interrupted download",
        (*GOOD, "--model", "cut"),
        "a weight file of cut is damaged or incomplete",
        "download it again",
    ),
    Mistake(
        "a shard that is missing",
        (*GOOD, "--model", "half"),
        "the weights of half are not those of its configuration: .* missing",
        "Download the checkpoint again",
    ),
    Mistake(
        "a resume with other settings",
        (*GOOD, "--out", "run", "--resume", "--learning-rate", "1e-3"),
        "learning_rate: 0.005 → 0.001",
        r"Use the same settings, or start a new run.*--learning-rate",
    ),
    Mistake(
        "a resume with another adapter",
        (*GOOD, "--out", "run", "--resume", "--rank", "4"),
        "lora.r: 16 → 4",
        "add the adapter as that run did, or start a new run",
    ),
    Mistake(
        "a resume with other data",
        (*TRAIN, "pictures.jsonl", "--modality", "image", "--out", "run", "--resume"),
        "does not continue this run|other",
        "start a new run|same",
    ),
    Mistake(
        "an adapter for another base",
        ("generate", "-p", "Hello", "--adapter", "run", "--model", "other"),
        "the adapter adapter is not for other, whose weights are others",
        "give the model that it was trained on",
    ),
    Mistake(
        "an adapter for a base of other shapes",
        ("export", "merged", "run", "target", "--model", "3n"),
        "for another model than 3n|has the same shapes but other weights",
        "give",
    ),
    Mistake(
        "an unknown score",
        ("evaluate", "run", "--data", "good.jsonl", "--score", "exactmatch"),
        "there is no score 'exactmatch'",
        "did you mean 'exact_match'",
    ),
    Mistake(
        "a report over something else",
        ("evaluate", "run", "--data", "good.jsonl", "--output", "weightless"),
        "holds something other than a report",
        "give a new folder",
    ),
    Mistake(
        "nothing held out",
        ("evaluate", "run"),
        "nothing was held out",
        "give data with --data, or --held-out",
    ),
    Mistake(
        "a picture that is not there",
        ("generate", "-p", "Hello", "--image", "gone.png"),
        "image 'gone.png' does not exist",
        "put it back, or check",
    ),
    Mistake(
        "an export over something else",
        ("export", "merged", "run", "weightless"),
        "'weightless' exists already",
        "delete it, or choose another",
    ),
    Mistake(
        "a GGUF file of another name",
        ("export", "gguf", "run", "model.bin"),
        "'model.bin' is no name for a GGUF file",
        "end it in .gguf",
    ),
]


def invoke(*arguments):
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})


def write_rows(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_files():
    """What a user may have lying about, in the working directory."""
    answered = [{"prompt": f"Question {i}?", "response": f"Answer {i}"} for i in range(20)]
    write_rows("good.jsonl", answered)
    write_rows("empty.jsonl", [])
    write_rows("columns.jsonl", [{"q": "?", "answer_text": "!"}])
    write_rows("missing.jsonl", [{"prompt": "?", "response": "!", "image": "gone.png"}])
    write_rows("unanswered.jsonl", [*answered[:1], {"prompt": "?", "response": ""}])
    write_rows(
        "pictures.jsonl",
        [{"prompt": "?", "response": "!", "image": "a.png", "id": f"row {i}"} for i in range(8)],
    )
    shown = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "?"}]
    asked = {"role": "user", "content": shown}
    seen = {"messages": [asked, {"role": "assistant", "content": "!"}]}
    write_rows("seen.jsonl", [{**seen, "id": f"row {i}"} for i in range(20)])
    PIL.Image.new("RGB", (48, 48)).save("a.png")
    for name, text in (
        ("misspelt", "learning_rat: 1"),
        ("broken", "data: [a"),
        ("typed", "iters: many"),
    ):
        Path(f"{name}.yaml").write_text(f"{text}\n")
    for folder in ("empty", "weightless", "held/checkpoints/step-00000007"):
        Path(folder).mkdir(parents=True)
    Path("weightless/config.json").write_text('{"model_type": "gemma4"}')
    Path("held/log.jsonl").write_text("")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_files()
    return folder


@pytest.fixture(scope="module")
def models(files):
    """A finished run, a checkpoint that was cut off, one that lacks a part, and two others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(files)
        done = invoke(*GOOD, "--out", "run")
        assert done.exit_code == 0, done.stderr
        save_tiny_model("gemma4-e2b", "other", seed=1)
        save_tiny_model("gemma3n", "3n")
        shutil.copytree("other", "cut")
        weights = Path("cut/model.safetensors")
        with weights.open("r+b") as file:
            file.truncate(weights.stat().st_size // 2)
        from safetensors.torch import load_file, save_file

        shutil.copytree("other", "half")
        tensors = load_file("half/model.safetensors")
        kept = sorted(tensors)[: len(tensors) // 2]
        save_file(
            {name: tensors[name] for name in kept}, "half/model.safetensors", {"format": "pt"}
        )
    return files


def check(done, wrong, remedy, status=1):
    """One paragraph on stderr, which names what is wrong and then what to do."""
    assert done.exit_code == status, f"{done.exit_code}: {done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr
    if status == 2:  # in a box, under the usage
        said = " ".join(done.stderr.split())
    else:
        said = done.stderr.splitlines()[-1]
        assert re.match(r"[A-Z]\w+Error: ", said), said
    assert re.search(wrong, said), said
    assert re.search(remedy, said[re.search(wrong, said).start() :]), said
    return said


def by_name(mistakes):
    return [pytest.param(mistake, id=mistake.name.replace(" ", "_")) for mistake in mistakes]


@pytest.mark.parametrize("mistake", by_name(QUICK))
def test_a_mistake_is_told_with_its_remedy(files, monkeypatch, mistake):
    monkeypatch.chdir(files)
    said = check(invoke(*mistake.command), mistake.wrong, mistake.remedy, mistake.status)
    assert str(files.parent) not in said


@pytest.mark.slow
@pytest.mark.parametrize("mistake", by_name(SLOW))
def test_a_mistake_that_needs_a_model_is_told_with_its_remedy(models, monkeypatch, mistake):
    monkeypatch.chdir(models)
    said = check(invoke(*mistake.command), mistake.wrong, mistake.remedy, mistake.status)
    assert str(models.parent) not in said


@pytest.mark.parametrize(
    ("name", "wrong", "remedy"),
    [
        ("gated/model", "behind a licence", "accept it at https://.*`hf auth login`"),
        ("absent/model", "no such model, or it is private", "check the name.*`hf auth login`"),
    ],
)
def test_no_access_to_a_model(files, monkeypatch, model_hub, name, wrong, remedy):
    monkeypatch.chdir(files)
    check(invoke(*GOOD, "--model", name), wrong, remedy)


@pytest.fixture
def small_files():
    """No file of this process may grow beyond so many bytes: what a full disk looks like."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_before_the_run(files, monkeypatch, tmp_path, small_files):
    monkeypatch.chdir(files)
    small_files(1000)
    done = invoke(*GOOD, "--cache-dir", str(tmp_path))
    small_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    check(done, "cannot be written|cannot write", "free")


@pytest.mark.slow
@pytest.mark.parametrize("size", [100, 100_000])
def test_a_full_disk_in_a_run(models, monkeypatch, small_files, size, tmp_path):
    monkeypatch.chdir(models)
    invoke("preview", *GOOD[1:3], *GOOD[5:])  # reads the data into its manifest
    small_files(size)
    done = invoke(*GOOD, "--out", str(tmp_path / "full"))
    small_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    check(done, "settings.yaml cannot be written|cannot save a checkpoint", "[Ff]ree disk space")
    assert not (tmp_path / "full/adapter").exists()


@pytest.mark.slow
def test_an_interrupt_while_a_model_answers(models, monkeypatch):
    monkeypatch.chdir(models)
    import gemma_tuner.training.adapters as adapters

    def interrupt(*arguments, **keywords):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(adapters, "load_adapter", interrupt)
    # which it is not in the background of a shell without job control
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = invoke("generate", "-p", "Hello", "--adapter", "run")
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.exit_code == 130, done.stderr
    assert done.stderr.splitlines()[-1] == "interrupted"


def test_the_traceback_is_there_for_those_who_ask(files, monkeypatch):
    monkeypatch.chdir(files)
    done = invoke(*TRAIN, "trian.jsonl", "--debug")
    assert done.exit_code == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("SourceError: ")


def test_there_are_enough_of_them():
    names = [mistake.name for mistake in QUICK + SLOW]
    assert len(set(names)) == len(names) >= 20
