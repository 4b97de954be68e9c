"""Data looked at before the first step: what is found, and that nothing moves by it."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image as PILImage

import gemma_tuner as gt
from gemma_tuner.testing import tiny_model
from gemma_tuner.training.data_check import check_rows
from tests.examples import sound

FAMILY = "gemma4-e2b"
MANY = 120
TARGETS = [("language",), *(("language", more) for more in ("vision", "audio", "projectors"))]


@pytest.fixture(scope="module")
def processor():
    return tiny_model(FAMILY)[1]


def write(folder, rows):
    folder.mkdir(exist_ok=True)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def open_rows(folder, rows, **options):
    return gt.stream_local(write(folder, rows), cache_dir=folder / "cache", **options)


def pictures(folder, count, sizes=((60, 48), (200, 90), (48, 300))):
    folder.mkdir(exist_ok=True)
    for number in range(count):
        PILImage.new("RGB", sizes[number % len(sizes)], "red").save(folder / f"{number}.png")
    return [
        {"image": f"{number}.png", "prompt": "What?", "response": "red " * (number + 1)}
        for number in range(count)
    ]


def sounds(folder, count):
    import soundfile

    folder.mkdir(exist_ok=True)
    for number in range(count):
        frames = sound(int(22_050 * (0.3 + number / 5)))
        soundfile.write(folder / f"{number}.flac", frames, 22_050)
    return [
        {"audio": f"{number}.flac", "prompt": "What?", "response": "a word"}
        for number in range(count)
    ]


def texts(folder, count):
    return [{"prompt": f"p{i}", "response": "word " * (i % 9 + 1)} for i in range(count)]


@pytest.mark.parametrize("make", [texts, pictures, sounds], ids=lambda make: make.__name__)
def test_lengths_are_those_of_training_though_media_are_not_decoded(tmp_path, processor, make):
    stream = open_rows(tmp_path, make(tmp_path, 12))
    collator = gt.MultimodalCollator(processor)
    found = check_rows(stream, collator, ("text", "image", "audio"))
    true = [len(collator.encode(stream[place]).input_ids) for place in range(12)]
    assert sorted(found.lengths.elements()) == sorted(true)
    assert (found.checked, found.rows, found.bad) == (12, 12, {})
    assert found.decoded == (0 if make is texts else 8)
    assert f"{min(true):,} to {max(true):,} tokens a row" in str(found)


def spoil(folder, rows, kind):
    """Make the row in the middle bad in one way; what its reason says."""
    row = rows[len(rows) // 2]
    name = row.get("image") or row.get("audio")
    match kind:
        case "too long":
            row["response"] = "word " * 900
            return "more than max_tokens=400"
        case "control token":
            row["prompt"] = "an end <turn|> too early"
            return "control token"
        case "missing":
            (folder / name).unlink()
            return "put it back"
        case "cut short":
            content = (folder / name).read_bytes()
            (folder / name).write_bytes(content[:20])
            return "damaged|cannot be decoded"
        case "too long a clip":
            import soundfile

            soundfile.write(folder / name, sound(31 * 16_000), 16_000)
            return "longer than max_seconds"
    raise ValueError(kind)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (texts, "too long"),
        (texts, "control token"),
        (pictures, "missing"),
        (pictures, "cut short"),
        (sounds, "missing"),
        (sounds, "cut short"),
        (sounds, "too long a clip"),
    ],
)
def test_a_bad_row_is_found_before_the_first_step(tmp_path, models, make, kind):
    rows = make(tmp_path, 12)
    says = "" if kind == "missing" else spoil(tmp_path, rows, kind)
    stream = open_rows(tmp_path, rows, shuffle=False)
    says = says or spoil(tmp_path, rows, kind)
    model, processor = models["language",]
    trainer = gt.Trainer(
        model,
        stream,
        gt.MultimodalCollator(processor, max_tokens=400),
        gt.TrainConfig(epochs=1, output_dir=tmp_path / "run", progress=False),
    )
    with pytest.raises(gt.DataError, match=says) as caught:
        trainer.fit()
    assert caught.value.key == "rows.jsonl:7"
    assert "of 12 rows checked before the first step 1 cannot be used" in str(caught.value)
    assert trainer.step == 0


def test_all_bad_rows_are_told_at_once_and_their_contents_by_none(tmp_path, processor):
    rows = texts(tmp_path, 12)
    for place in (2, 5, 9):
        rows[place] = {"prompt": "CANARY", "response": "CANARY " * 400}
    stream = open_rows(tmp_path, rows)
    found = check_rows(stream, gt.TextCollator(processor, max_tokens=256), ("text",))
    assert sorted(found.bad) == ["rows.jsonl:10", "rows.jsonl:3", "rows.jsonl:6"]
    with pytest.raises(gt.DataError) as caught:
        found.refuse_beyond_budget()
    for key, reason in found.bad.items():
        assert key in str(caught.value)
        assert reason in str(found)
    assert "longer than max_tokens=256: 3" in str(found)
    assert "CANARY" not in str(caught.value) + str(found)
    cut = check_rows(stream, gt.TextCollator(processor, max_tokens=256, too_long="cut"), ("text",))
    assert len(cut.bad) == 3  # answers are never cut


def test_what_would_be_cut_is_counted(tmp_path, processor):
    rows = [{"prompt": "word " * (200 if i == 3 else 1), "response": "yes"} for i in range(8)]
    collator = gt.TextCollator(processor, max_tokens=128, too_long="cut")
    found = check_rows(open_rows(tmp_path, rows), collator, ("text",))
    assert not found.bad
    assert found.counts["cut_rows"] == 1
    assert max(found.lengths) - 128 == found.counts["cut_tokens"]


def fit(folder, stream, *, stop_after=None, resume=False, **settings):
    model, processor = tiny_model(FAMILY)
    trainer = gt.Trainer(
        gt.add_lora(model, gt.LoraConfig(rank=2, dropout=0.1)),
        stream,
        gt.TextCollator(processor, max_tokens=128),
        gt.TrainConfig(
            max_steps=stop_after or 4,
            batch_size=2,
            gradient_accumulation=1,
            learning_rate=1e-2,
            schedule="constant",
            progress=False,
            output_dir=folder,
            **settings,
        ),
    )
    trainer.fit(resume=resume)
    return trainer, torch.cat([p.detach().flatten() for p in trainer.trainable])


def test_a_run_is_the_same_with_the_check_and_without_and_resumes(tmp_path):
    rows = texts(tmp_path, MANY)
    rows[0]["response"] = "word " * 300  # in the budget of a run, a hundredth
    checked, weights = fit(tmp_path / "with", open_rows(tmp_path, rows))
    _, others = fit(tmp_path / "without", open_rows(tmp_path, rows), check_seconds=0)
    assert torch.equal(weights, others)
    fit(tmp_path / "half", open_rows(tmp_path, rows), stop_after=2)
    resumed, resumed_weights = fit(tmp_path / "half", open_rows(tmp_path, rows), resume=True)
    assert torch.equal(weights, resumed_weights)
    assert resumed.stream.state_dict() == checked.stream.state_dict()
    (event,) = [
        record
        for record in map(json.loads, Path(tmp_path / "with/log.jsonl").read_text().splitlines())
        if record.get("name") == "checked"
    ]
    assert f"checked {MANY} of {MANY} rows" in event["message"]
    assert "1 cannot be used" in event["message"]


def test_a_bad_row_within_the_budget_costs_itself_and_beyond_it_says_what_resumes(tmp_path):
    rows = texts(tmp_path, MANY)
    rows[3]["response"] = rows[5]["response"] = "word " * 300
    settings = {"check_seconds": 0, "save_every_steps": 1}
    stream = open_rows(tmp_path, rows, shuffle=False)
    with pytest.raises(
        gt.DataError, match=r"up to step 2;.*max_bad_fraction \(above 0\.0084"
    ) as told:
        fit(tmp_path / "run", stream, **settings)
    assert told.value.key == "rows.jsonl:6"
    assert "rows.jsonl:4" in [record.key for record in stream.inspect_quarantine()]
    # What it says can be done.
    more = open_rows(tmp_path, rows, shuffle=False, max_bad_fraction=0.02)
    trainer, _ = fit(tmp_path / "run", more, resume=True, **settings)
    assert trainer.step == 4
    assert trainer.counts["passed_over"] == 2


@pytest.mark.parametrize("num_elsewhere", [0, 1, 9])
def test_bad_rows_of_all_processes_are_held_against_one_budget(tmp_path, processor, num_elsewhere):
    rows = texts(tmp_path, 100)
    rows[3]["response"] = "word " * 3000
    stream = open_rows(tmp_path, rows, max_bad_fraction=0.02)
    found = check_rows(stream, gt.TextCollator(processor, max_tokens=256), ("text",))
    found.bad_elsewhere = num_elsewhere
    assert len(found.bad) == 1
    if num_elsewhere < 2:  # of two that are allowed
        found.refuse_beyond_budget()
        return
    with pytest.raises(gt.DataError, match="10 cannot be used, and max_bad_fraction allows 2"):
        found.refuse_beyond_budget()
    found.bad.clear()
    found.refuse_beyond_budget()  # it hears of it from those that found some


def test_nothing_in_a_bucket_is_downloaded(tmp_path, processor):
    from gemma_tuner.testing import GcsServer

    with GcsServer() as server:
        picture = tmp_path / "a.png"
        PILImage.new("RGB", (60, 48)).save(picture)
        server.put("b", "a.png", picture.read_bytes())
        rows = [{"image": "gs://b/a.png", "prompt": "?", "response": "x"} for _ in range(3)]
        rows[1]["response"] = "word " * 900
        stream = open_rows(tmp_path, rows, gcs_client=server.client())
        found = check_rows(stream, gt.ImageCollator(processor, max_tokens=500), ("text", "image"))
        assert stream.report().fetched.requests == 0
    assert (found.unread, found.decoded) == (3, 0)
    assert list(found.bad) == ["rows.jsonl:2"]
    assert "3 media in buckets not looked at" in found.summary


# --- media that are not there, or are there and not meant ----------------------------------------


def columns_of(kind, folder):
    """Rows with a kind of media, or, for text, with none."""
    make = {"text": texts, "image": pictures, "audio": sounds}[kind]
    return make(folder, 4)


@pytest.mark.parametrize("held", ["text", "image", "audio"])
@pytest.mark.parametrize("collator", ["text", "image", "audio", "multimodal"])
@pytest.mark.parametrize("targets", TARGETS)
def test_collators_and_adapters_go_with_the_media_of_the_data(
    tmp_path, models, held, collator, targets, caplog
):
    model, processor = models[targets]
    stream = open_rows(tmp_path, columns_of(held, tmp_path))
    kind = getattr(gt, f"{collator.title()}Collator")
    config = gt.TrainConfig(max_steps=1, output_dir=tmp_path / "run", progress=False)
    trainer = gt.Trainer(model, stream, kind(processor), config)
    takes = {"text": set(), "multimodal": {"image", "audio"}}.get(collator, {collator})
    towers = {"vision": "image", "audio": "audio"}
    adapted = {towers[target] for target in targets if target in towers}
    held = {held} - {"text"}
    is_right = held <= takes and adapted <= held and (len(takes) != 1 or takes <= held)
    is_right &= "projectors" not in targets or bool(held)
    if is_right:
        assert not trainer.check().bad
        assert ("trained as text alone" in caplog.text) == (bool(takes) and not held)
    else:
        with pytest.raises(gt.ConfigError, match=r"does not take; use|name the column with"):
            trainer.check()


@pytest.fixture(scope="module")
def models():
    made = {}
    for targets in TARGETS:
        model, processor = tiny_model(FAMILY)
        made[targets] = gt.add_lora(model, gt.LoraConfig(rank=2, targets=targets)), processor
    return made


def test_words_that_look_like_media_in_a_manifest_are_none(tmp_path):
    rows = [
        {"prompt": '["image","a.png"]', "response": '["audio",{"inline":0}]'} for _ in range(3)
    ]
    schema = {"type": "object", "properties": {"k": {"enum": ["image", "x"]}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    assert open_rows(tmp_path, rows).media_kinds == frozenset()
    chat = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    ]
    stream = open_rows(tmp_path / "chat", [{**row, "tools": tools} for row in chat])
    assert stream.media_kinds == frozenset()
