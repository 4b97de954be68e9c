"""Loss, answers and scores of adapter and base, the report, and what is refused."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from gemma_tuner.collators.multimodal import MultimodalCollator
from gemma_tuner.collators.text import TextCollator
from gemma_tuner.errors import CheckpointError, ConfigError, DataError
from gemma_tuner.evaluation.evaluate import evaluate
from gemma_tuner.evaluation.generation import generate
from gemma_tuner.evaluation.samples import SampleGenerations
from gemma_tuner.evaluation.scores import word_error_rate
from gemma_tuner.evaluation.subset import Subset
from gemma_tuner.models.lora import LoraConfig, add_lora
from gemma_tuner.models.modes import begin_training
from gemma_tuner.records import Audio, Example, Text, Turn
from gemma_tuner.streaming.opening import stream_local
from gemma_tuner.testing import tiny_model
from gemma_tuner.training.config import TrainConfig
from gemma_tuner.training.trainer import Trainer
from tests.limits import files_limited_to

NASTY = "a|b *c* <script>alert(1)</script> [x](y)\n| `z` |"


@pytest.fixture(scope="module")
def setup():
    """A model whose adapter changes every answer, and its collator."""
    model, processor = tiny_model("gemma4-12b")
    model = add_lora(model, LoraConfig(rank=4))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model, processor, MultimodalCollator(processor)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four good rows, one with a damaged picture, and one that is far too long."""
    root = tmp_path_factory.mktemp("data")
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    PILImage.fromarray(pixels).save(file, "PNG")
    (root / "good.png").write_bytes(file.getvalue())
    (root / "bad.png").write_bytes(file.getvalue()[:40])
    rows = [
        ("Hello", "yes", None),
        (NASTY, NASTY, "good.png"),
        ("See", "no", "bad.png"),
        ("long " * 200, "no", None),
        ("How are you?", "Fine", None),
        ("2 + 2", "four", None),
    ]
    lines = [json.dumps(make_row(f"row {n}", *row)) + "\n" for n, row in enumerate(rows)]
    (root / "data.jsonl").write_text("".join(lines))
    return root


def make_row(key, prompt, response, image):
    picture = [{"type": "image", "image": image}] if image else []
    content = [*picture, {"type": "text", "text": prompt}]
    answer = {"role": "assistant", "content": response}
    return {"id": key, "messages": [{"role": "user", "content": content}, answer]}


def open_stream(folder, tmp_path, **options):
    options = {"max_bad_fraction": 0.5, **options}
    return stream_local(folder / "data.jsonl", cache_dir=tmp_path / "cache", **options)


def run(setup, stream, **options):
    model, _, collator = setup
    options = {"max_new_tokens": 3, "progress": False, **options}
    options.setdefault("scores", ["wer", "exact_match"])
    collator = options.pop("collator", collator)
    return evaluate(model, stream, collator, **options)


def short(setup):
    return MultimodalCollator(setup[1], max_tokens=400)


def test_losses_answers_and_scores_of_adapter_and_base(setup, folder, tmp_path):
    model, processor, _ = setup
    begin_training(model)
    modes = {name: module.training for name, module in model.named_modules()}
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    model.get_parameter(next(n for n in trainable if "lora_A" in n)).requires_grad_(False)
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    stream = open_stream(folder, tmp_path)
    state = stream.state_dict()

    report = run(setup, stream, collator=short(setup), batch_size=3)

    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    assert stream.state_dict()["position"] == state["position"]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    model.eval()

    good = ["row 0", "row 1", "row 4", "row 5"]
    assert [example.key for example in report.examples] == good
    assert report.systems == ("adapter", "base")
    counts = report.counts
    assert (counts["rows_read"], counts["passed_over"], counts["answered"]) == (6, 2, 4)
    assert counts["examples_with_loss"] == 4

    examples = [stream[index] for index in (0, 1, 4, 5)]
    media = [[part.source for part in example.media] for example in examples]
    asked = [example.turns[0].text for example in examples]
    ours = generate(model, processor, asked, image=media, max_new_tokens=3, do_sample=False)
    with model.disable_adapter():
        base = generate(model, processor, asked, image=media, max_new_tokens=3, do_sample=False)
    assert [example.answers["adapter"] for example in report.examples] == ours
    assert [example.answers["base"] for example in report.examples] == base
    assert ours != base
    references = [example.turns[-1].text for example in examples]
    assert [example.references for example in report.examples] == [(r,) for r in references]
    for system, answers in (("adapter", ours), ("base", base)):
        texts = [answer.text for answer in answers]
        wer = word_error_rate().measure(texts, references)
        assert report["wer"].values[system] == wer > 0.5
        assert report["exact_match"].values[system] == 0.0
    difference = report["wer"].values["adapter"] - report["wer"].values["base"]
    assert report["wer"].difference == difference

    # The loss is the trainer's own.
    config = TrainConfig(max_steps=1, output_dir=tmp_path / "run", progress=False)
    trainer = Trainer(model, stream, short(setup), config, eval_stream=stream)
    held_out = report.held_out
    assert held_out["adapter"].loss == pytest.approx(trainer.evaluate().loss, rel=1e-6)
    with model.disable_adapter():
        assert held_out["base"].loss == pytest.approx(trainer.evaluate().loss, rel=1e-6)


def test_a_model_that_is_always_right_is_perfect(setup, folder, tmp_path):
    stream = open_stream(folder, tmp_path)
    first = run(setup, stream, collator=short(setup), max_examples=3, compare_base=False)
    said = {example.key: example.answers["adapter"].text for example in first.examples}
    assert set(said) == {"row 0", "row 4"}  # rows spread over the data, of which one is bad
    report = run(
        setup,
        stream,
        collator=short(setup),
        max_examples=3,
        compare_base=False,
        scores=["wer", "cer", "exact_match", "anls"],
        references=lambda example: ["something else", said[example.key]],
    )
    values = {score.name: score.values["adapter"] for score in report.scores}
    assert values["exact_match"] == values["anls"] == 1.0
    assert all(value == 0.0 or np.isnan(value) for value in (values["wer"], values["cer"]))
    assert report.systems == ("adapter",)
    assert report["wer"].difference is None


def test_a_bare_model_is_evaluated_by_itself_and_loss_alone_generates_nothing(folder, tmp_path):
    model, processor = tiny_model("gemma4-12b")
    stream = open_stream(folder, tmp_path).take(1)
    report = evaluate(model, stream, TextCollator(processor), scores=(), progress=False)
    assert (report.systems, report.examples, report.scores) == (("model",), (), ())
    assert report.held_out["model"].loss > 0


def test_the_report_in_a_folder(setup, folder, tmp_path):
    stream = open_stream(folder, tmp_path).take(2)
    output = tmp_path / "reports" / "first"
    report = run(setup, stream, output=output, scores=["exact_match", "wer"])
    assert sorted(path.name for path in output.iterdir()) == ["media", "report.json", "report.md"]
    assert (output / "report.json").read_text() == report.to_json()

    document = json.loads(report.to_json())
    assert document["scores"][0]["values"] == {"adapter": 0.0, "base": 0.0}
    row = document["examples"][1]
    assert row["references"] == [NASTY]
    assert row["tallies"]["wer"]["adapter"]["out_of"] > 0
    with PILImage.open(output / row["media"][0]) as saved:
        assert np.array_equal(np.asarray(saved), np.asarray(next(iter(stream[1].media)).source))

    text = (output / "report.md").read_text()
    assert f"![{row['media'][0]}]({row['media'][0]})" in text
    for shown in (text, report._repr_html_()):
        assert "<script>" not in shown
        assert "&lt;script&gt;" in shown
    assert r"a\|b \*c\*" in text
    assert r"\[x\](y)<br>\| \`z\` \|" in text

    again = run(setup, stream, output=output, scores=["exact_match", "wer"])  # takes its place
    assert again.to_json() == report.to_json()
    assert [path.name for path in output.parent.iterdir()] == ["first"]


def test_the_worst_come_first(setup, folder, tmp_path):
    def length(prediction, references):
        return float(len(references[0]))

    report = run(setup, open_stream(folder, tmp_path).take(2), scores=[length])
    assert [example.key for example in report.find_worst(5)] == ["row 0", "row 1"]
    assert report["length"].values["adapter"] == (3 + len(NASTY)) / 2
    with pytest.raises(KeyError, match="the report has length"):
        report["wer"]


def test_a_folder_that_cannot_take_a_report(setup, folder, tmp_path):
    stream = open_stream(folder, tmp_path).take(2)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds something other than a report"):
        run(setup, stream, output=other)
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]

    with pytest.raises(CheckpointError, match=r"cannot be written to 'report'"):
        run(setup, stream, output=other / "thesis.txt" / "report")

    output = tmp_path / "report"
    run(setup, stream, output=output)
    before = (output / "report.json").read_text()
    with (
        files_limited_to(1000),
        pytest.raises(CheckpointError, match="what was there is untouched") as raised,
    ):
        run(setup, stream, output=output)
    assert str(tmp_path) not in str(raised.value)
    assert (output / "report.json").read_text() == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


class EmptyStream:
    num_passed_over = 0

    def __len__(self):
        return 0

    def read_rows(self, indices):
        return iter(())

    def pass_over(self, error):
        raise error


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"scores": ["exact"]}, ConfigError, "did you mean 'exact_match'"),
        ({"stream": EmptyStream()}, ConfigError, "stream has no examples"),
        ({"stream": [1]}, ConfigError, "the stream is a list"),
        ({"max_examples": 0}, ConfigError, "max_examples is 0"),
        ({"max_new_tokens": 0}, ConfigError, "max_new_tokens is 0"),
        ({"batch_size": 0}, ConfigError, "batch_size is 0"),
        ({"language": 3}, ConfigError, "language is 3"),
        ({"references": lambda example: []}, DataError, "at least one text"),
    ],
)
def test_bad_settings_are_refused(setup, folder, tmp_path, options, error, words):
    stream = options.get("stream", open_stream(folder, tmp_path).take(1))
    with pytest.raises(error, match=words):
        run(setup, stream, **{k: v for k, v in options.items() if k != "stream"})


def test_a_stream_of_which_nothing_can_be_used(setup, folder, tmp_path):
    collator = MultimodalCollator(setup[1], max_tokens=16)
    stream = open_stream(folder, tmp_path, max_bad_fraction=1.0)
    with pytest.raises(ConfigError, match="no example of the held-out stream can be used"):
        run(setup, stream, collator=collator)
    with pytest.raises(DataError, match="row 2"):  # the first that cannot even be decoded
        run(setup, open_stream(folder, tmp_path, max_bad_fraction=0.0), collator=collator)


def test_pictures_without_a_tower(setup, folder, tmp_path):
    model, processor = tiny_model("gemma4-12b")
    model.model.embed_vision = None
    stream = open_stream(folder, tmp_path).take(2)
    with pytest.raises(ConfigError, match=r"'row 1'|row 1 holds image.*modalities=\('text', 'im"):
        evaluate(model, stream, MultimodalCollator(processor), progress=False)


def test_a_subset_is_spread_over_the_stream_and_reads_bad_rows_once(folder, tmp_path):
    stream = open_stream(folder, tmp_path)
    subset = Subset(stream, 3)
    for _ in range(2):
        read = [example and example.key for example in subset.read_rows(range(3))]
        assert read == ["row 0", None, "row 4"]
    assert (len(subset), subset.num_bad, stream.num_passed_over) == (3, 1, 1)
    assert len(Subset(stream, 100)) == 6


def test_answers_at_intervals_of_training(setup, folder, tmp_path):
    model, _, collator = setup
    examples = [open_stream(folder, tmp_path)[index] for index in (0, 1)]
    samples = SampleGenerations(collator, examples, every_steps=5, max_new_tokens=3)
    assert [step for step in range(13) if samples.is_due(step, 12)] == [0, 5, 10, 12]
    with pytest.raises(ConfigError, match="call begin"):
        samples.write(model, 0)
    samples.begin(tmp_path / "run", 0)
    begin_training(model)
    modes = [module.training for module in model.modules()]
    records = samples.write(model, 10)
    assert [module.training for module in model.modules()] == modes
    model.eval()
    assert [(r.step, r.key, r.reference) for r in records] == [
        (10, "row 0", "yes"),
        (10, "row 1", NASTY),
    ]
    assert records[1].prompt == f"user: [image] {NASTY}"
    assert all(record.prediction for record in records)
    assert not samples.is_due(10, 12)
    assert records[1].media == ("002-1.png",)
    with PILImage.open(tmp_path / "run/samples/002-1.png") as image:
        assert image.mode == "RGB"

    # Probabilities as plain logits have them.
    batch = collator([examples[0]])
    with torch.no_grad():
        logits = model(**batch.inputs).logits[0].float()
    positions = batch.target_rows.flatten()[batch.target_slots]
    chosen = torch.log_softmax(logits, -1)[positions, batch.target_ids].exp()
    texts, found = zip(*records[0].tokens, strict=True)
    torch.testing.assert_close(torch.tensor(found), chosen[: len(found)])
    assert "".join(texts).startswith("yes")

    lines = (tmp_path / "run/samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["prediction"] for line in lines] == [r.prediction for r in records]
    samples.write(model, 12)
    path = tmp_path / "run/samples.jsonl"
    with path.open("a") as file:
        file.write('{"step": 13, "cut')
    again = SampleGenerations(collator, examples, every_steps=5)
    again.begin(tmp_path / "run", 11)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 10]
    assert not again.is_due(10, 12)
    (tmp_path / "heard/samples/001-1.wav").mkdir(parents=True)
    sound = Audio(np.zeros(1600, np.float32), 16_000)
    turns = (Turn("user", (sound,)), Turn("assistant", (Text("x"),)))
    heard = Example("heard", turns=turns)
    with pytest.raises(CheckpointError, match=r"cannot be written \(Is a directory\)"):
        SampleGenerations(collator, [heard], every_steps=1).begin(tmp_path / "heard", 0)

    many = '{"step": 1}\n' * 10_000
    path.write_text(many)
    with (
        files_limited_to(50_000),
        pytest.raises(CheckpointError, match=r"written \(File too large\); free disk space"),
    ):
        again.begin(tmp_path / "run", 1)
    assert path.read_text() == many
    assert {each.name for each in path.parent.iterdir()} == {"samples", "samples.jsonl"}
    again.begin(tmp_path / "run", 0)
    assert path.read_text() == ""

    with pytest.raises(ConfigError, match="every_steps is 0"):
        SampleGenerations(collator, examples, every_steps=0)
    with pytest.raises(ConfigError, match="no examples"):
        SampleGenerations(collator, [], every_steps=1)
    with pytest.raises(DataError, match="has no answer"):
        SampleGenerations(collator, [Example("d", document="text")], every_steps=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        again.begin(tmp_path / "file", 0)


def test_unicodes_line_separators_end_no_record_of_samples(setup, folder, tmp_path):
    samples = SampleGenerations(setup[2], [open_stream(folder, tmp_path)[0]], every_steps=5)
    records = [{"step": step, "prediction": "a\u2028b\u2029c\x85d"} for step in (1, 2)]
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    samples.begin(tmp_path, 1)
    assert path.read_text(encoding="utf-8") == lines[0]


@pytest.mark.parametrize("damage", [b"\0" * 64, b"{", b"[1]", b'{"step": null}', b"\xff\xfe", b""])
def test_damaged_lines_of_samples_are_left_out_and_told(setup, folder, tmp_path, caplog, damage):
    samples = SampleGenerations(setup[2], [open_stream(folder, tmp_path)[0]], every_steps=5)
    whole = b'{"step": 1}\n'
    (tmp_path / "samples.jsonl").write_bytes(whole + damage + b"\n" + whole)
    samples.begin(tmp_path, 1)
    assert (tmp_path / "samples.jsonl").read_bytes() == whole * 2
    assert "1 damaged lines of samples.jsonl are left out" in caplog.text
    assert not samples.is_due(1, 9)
