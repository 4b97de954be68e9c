"""From settings to what the API takes: which source, which model, which collator."""

import json
from functools import partial

import PIL.Image
import pytest

from gemma_tuner.cli.opening import (
    find_modality,
    make_collator,
    make_lora,
    open_stream,
    open_streams,
)
from gemma_tuner.cli.settings import AdapterSettings, DataSettings, ModelSettings, RowSettings
from gemma_tuner.errors import ConfigError, SourceError
from gemma_tuner.streaming import opening
from gemma_tuner.testing import LocalCloud, sample_data
from gemma_tuner.testing.models.processor import tiny_processor


def settings(tmp_path, *data, **more):
    return DataSettings(data=list(data) or None, cache_dir=tmp_path / "cache", **more)


def keys(stream):
    return {stream[index].key for index in range(len(stream))}


def write_rows(path, count=40):
    rows = [{"q": f"{i}?", "a": f"{i}", "id": f"{path.stem} {i}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_tenth_is_held_out_and_columns_are_those_that_were_named(tmp_path):
    write_rows(tmp_path / "rows.jsonl")
    given = settings(tmp_path, str(tmp_path / "rows.jsonl"), prompt="q", response="a", seed=3)
    train, held_out = open_streams(given, "text")
    assert len(train) + len(held_out) == 40
    assert 0 < len(held_out) < 12
    assert not keys(train) & keys(held_out)
    assert train.report().seed == 3
    assert train[0].turns[0].text.endswith("?")


@pytest.mark.parametrize("held_out", ["0", "0.0"])
def test_nothing_is_held_out_where_nothing_shall_be(tmp_path, held_out):
    write_rows(tmp_path / "rows.jsonl")
    given = settings(
        tmp_path, str(tmp_path / "rows.jsonl"), prompt="q", response="a", held_out=held_out
    )
    train, nothing = open_streams(given, "text")
    assert (len(train), nothing) == (40, None)


@pytest.mark.parametrize("held_out", ["valid", None])
def test_files_named_as_mlx_names_them_are_splits(tmp_path, held_out):
    for name in ("train", "valid"):
        write_rows(tmp_path / f"{name}.jsonl", 10)
    given = settings(tmp_path, str(tmp_path), prompt="q", response="a", held_out=held_out)
    train, rest = open_streams(given, "text")
    assert {key.split()[0] for key in keys(train)} == {"train"}
    assert {key.split()[0] for key in keys(rest)} == {"valid"}


def test_several_files_are_one_stream(tmp_path):
    for name in ("one", "two"):
        write_rows(tmp_path / f"{name}.jsonl", 5)
    files = [str(tmp_path / f"{name}.jsonl") for name in ("one", "two")]
    given = settings(tmp_path, *files, prompt="q", response="a")
    assert len(open_stream(given, "text", None)) == 10


@pytest.mark.parametrize("modality", ["text", "image", "audio", "multimodal"])
def test_every_modality_has_samples(tmp_path, modality):
    train, held_out = open_streams(settings(tmp_path), modality)
    assert len(train) > len(held_out) > 0


@pytest.mark.parametrize("kind", ["text", "image", "audio", "multimodal"])
def test_the_modality_is_that_of_the_data(tmp_path, kind):
    given = settings(tmp_path, str(sample_data(kind)))
    streams = open_streams(given, None)
    model = find_modality(ModelSettings(), *streams)
    assert model.modality == kind
    assert len(model.modalities) == {"text": 1, "multimodal": 3}.get(kind, 2)


def write_seen(folder):
    for i in range(20):
        PIL.Image.new("RGB", (48, 48)).save(folder / f"{i}.png")
    rows = [{"prompt": f"{i}?", "response": "yes", "image": f"{i}.png"} for i in range(20)]
    (folder / "seen.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = [{"type": "image", "image": "0.png"}, {"type": "text", "text": "?"}]
    turns = [{"role": "user", "content": shown}, {"role": "assistant", "content": "!"}]
    (folder / "chat.jsonl").write_text(
        "".join(json.dumps({"messages": turns}) + "\n" * 1 for _ in range(9))
    )


@pytest.mark.parametrize(
    ("modality", "kinds", "says"),
    [
        (None, {"image"}, None),
        ("image", {"image"}, None),
        ("multimodal", {"image"}, None),
        ("text", set(), None),
        ("audio", None, "read without audio"),
    ],
)
def test_a_modality_only_narrows_what_the_data_holds(tmp_path, modality, kinds, says):
    write_seen(tmp_path)
    given = settings(tmp_path, str(tmp_path / "seen.jsonl"))
    if says:
        with pytest.raises(ConfigError, match=says):
            open_stream(given, modality, None)
    else:
        stream = open_stream(given, modality, None)
        assert stream.media_kinds == kinds
        assert find_modality(ModelSettings(modality=modality), stream).modality == (
            "image" if kinds else "text"
        )


def test_media_in_messages_cannot_be_narrowed_away(tmp_path):
    write_seen(tmp_path)
    with pytest.raises(ConfigError, match=r"modality is 'text', and rows hold image too"):
        open_stream(settings(tmp_path, str(tmp_path / "chat.jsonl")), "text", None)


@pytest.mark.slow
def test_tables_and_buckets_are_read_by_their_names(tmp_path, monkeypatch):
    with LocalCloud() as cloud:
        clients = cloud.clients()
        lines = (sample_data("image") / "manifest.jsonl").read_bytes()
        cloud.gcs.put("samples", "image/manifest.jsonl", lines)
        for name, function, own in (
            ("stream_bigquery", opening.stream_bigquery, clients),
            ("stream_gcs", opening.stream_gcs, {"gcs_client": clients["gcs_client"]}),
        ):
            monkeypatch.setattr(opening, name, partial(function, **own))
        table = open_stream(settings(tmp_path, f"bq://{cloud.tables['text']}"), "text", "test")
        assert keys(table) == keys(open_stream(settings(tmp_path), "text", "test"))
        bucket = open_stream(settings(tmp_path, "gs://samples/image/"), "image", "test")
        assert keys(bucket) == keys(open_stream(settings(tmp_path), "image", "test"))


@pytest.mark.parametrize("place", ["hf://owner/rows", "owner/rows"])
def test_a_name_of_the_hub_is_asked_for_there(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=r"'owner/rows'.* the Hub"):
        open_stream(settings(tmp_path, place), "text", None)


def test_one_table_at_a_time(tmp_path):
    with pytest.raises(ConfigError, match="takes one name, and there are 2"):
        open_stream(settings(tmp_path, "bq://p.d.t", "bq://p.d.u"), "text", None)


@pytest.mark.parametrize(
    ("given", "modality", "made"),
    [
        ({}, "text", {"layers": None, "variant": "lora", "targets": ["language"]}),
        ({"layers": 4}, "image", {"layers": 4, "targets": ["language", "vision"]}),
        ({"variant": "dora"}, "multimodal", {"variant": "dora"}),
        ({"variant": "full"}, "text", {"variant": "full"}),
        ({"targets": ["projectors"]}, "audio", {"targets": ["projectors"]}),
        ({"rank": 4, "alpha": 8.0, "dropout": 0.5}, "text", {"rank": 4, "alpha": 8.0}),
    ],
)
def test_what_is_trained(given, modality, made):
    config = make_lora(AdapterSettings(**given), ModelSettings(modality=modality), seed=5)
    assert {name: getattr(config, name) for name in made} == made
    assert config.seed == 5


@pytest.mark.parametrize(
    ("modality", "kind"),
    [
        ("text", "TextCollator"),
        ("image", "ImageCollator"),
        ("audio", "AudioCollator"),
        ("multimodal", "MultimodalCollator"),
    ],
)
def test_how_rows_are_made(modality, kind):
    rows = RowSettings(
        max_tokens=99, mask_prompt=False, too_long="cut", image_tokens=70, max_seconds=5.0
    )
    processor = tiny_processor("gemma4-e2b")
    collator = make_collator(ModelSettings(modality=modality), rows, processor)
    assert type(collator).__name__ == kind
    assert (collator.max_tokens, collator.train_on, collator.too_long) == (99, "all", "cut")
    assert getattr(collator, "image_tokens", 70) == 70
    assert getattr(collator, "max_seconds", 5.0) == 5.0
