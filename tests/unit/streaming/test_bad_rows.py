"""Bad examples cost one example each: passed over, noted, counted, within a budget."""

import io
import json
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image as PILImage

from gemma_tuner.errors import ConfigError, DataError, GemmaTunerError
from gemma_tuner.streaming.mixing import mix
from gemma_tuner.streaming.opening import stream_gcs, stream_hub, stream_local
from gemma_tuner.testing import GcsServer


@pytest.fixture
def folder(tmp_path):
    """200 small pictures, of which 17 and 101 are damaged, and row 50 has no answer."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(200):
        file = io.BytesIO()
        pixels = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        PILImage.fromarray(pixels).save(file, "PNG")
        content = file.getvalue()
        (tmp_path / f"{number}.png").write_bytes(content[:30] if number in (17, 101) else content)
        answer = "" if number == 50 else f"A{number}"
        rows.append(
            {"id": f"k{number}", "image": f"{number}.png", "prompt": "Q", "response": answer}
        )
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "data.jsonl").write_text(text)
    return tmp_path


def open_stream(folder, **options):
    options = {"cache_dir": folder / "cache", "max_bad_fraction": 0.02, **options}
    return stream_local(folder / "data.jsonl", **options)


GOOD = {f"k{number}" for number in range(200)} - {"k17", "k50", "k101"}


def test_good_examples_come_once_and_bad_ones_are_noted(folder):
    stream = open_stream(folder)
    assert len(stream) == 199  # what cannot be made an example is no row
    for _ in range(2):
        assert sorted(e.key for e in stream) == sorted(GOOD)
    report = stream.report()
    assert (report.bad_rows, report.passed_over, report.handed_out) == (1, 4, 394)
    assert "passed over, in quarantine: 4" in str(report)
    records = {record.key: record for record in stream.inspect_quarantine()}
    assert {key: record.stage for key, record in records.items()} == {
        "k17": "decode",
        "k50": "row",
        "k101": "decode",
    }
    assert records["k50"].origin == "data.jsonl:51"
    assert "empty answer" in records["k50"].reason
    assert str(folder) not in json.dumps([record.reason for record in records.values()])


def test_holes_keep_every_later_slot_where_it_was(folder):
    slots = [e and e.key for e in open_stream(folder).read_slots()]
    assert len(slots) == 199
    assert slots.count(None) == 2
    for name in ("17", "101"):  # mended
        (folder / f"{name}.png").write_bytes((folder / "0.png").read_bytes())
    state = open_stream(folder).state_dict()
    mended = open_stream(folder, refresh=True)
    mended.load_state_dict(state)  # whoever mends a file goes on with the run
    mended = [e and e.key for e in mended.read_slots()]
    assert [m for m, s in zip(mended, slots, strict=True) if s is not None] == [
        s for s in slots if s
    ]
    assert None not in mended


def test_every_stop_resumes_exactly_with_bad_rows_on_the_way(folder):
    expected = [e.key for e in open_stream(folder)]
    stream = open_stream(folder)
    iterator, states = iter(stream), [json.dumps(stream.state_dict())]
    for _ in expected:
        next(iterator)
        states.append(json.dumps(stream.state_dict()))
    for k in (0, 1, 50, 99, 100, 150, len(expected)):
        resumed = open_stream(folder)
        resumed.load_state_dict(json.loads(states[k]))
        rest = [e.key for e in resumed]
        assert (expected[:k] + rest)[: len(expected)] == expected


def test_the_budget_of_an_epoch_goes_on_after_a_resume(folder):
    stream = open_stream(folder, max_bad_fraction=0.0051)  # one of 200 rows and of 199
    keys = []
    with pytest.raises(DataError, match=r"bad row 2 .*allows 1"):
        keys.extend(example.key for example in stream)
    state = stream.state_dict()
    assert state["bad"] == [1]
    again = open_stream(folder, max_bad_fraction=0.0051)
    again.load_state_dict(state)
    with pytest.raises(DataError, match="bad row 2"):
        next(iter(again))
    more = open_stream(folder)
    more.load_state_dict(state)
    assert sorted([*keys, *(e.key for e in more)]) == sorted(GOOD)


def test_without_a_budget_the_first_bad_row_is_an_error_even_if_a_manifest_lacks_it(folder):
    open_stream(folder)
    with pytest.raises(DataError, match=r"empty answer.*\(50 rows were fine\)") as caught:
        open_stream(folder, max_bad_fraction=0.0)
    assert caught.value.key == "k50"


def test_many_bad_rows_in_a_row_end_the_reading(folder):
    rows = [json.dumps({"prompt": "Q", "response": "" if i > 40 else "A"}) for i in range(1000)]
    (folder / "rotten.jsonl").write_text("\n".join(rows))
    with pytest.raises(DataError, match=r"bad row 31 \(31 in a row\)") as caught:
        stream_local(
            folder / "rotten.jsonl",
            cache_dir=folder / "cache",
            max_bad_fraction=0.9,
            max_consecutive_bad=30,
        )
    assert caught.value.key == "rotten.jsonl:72"
    with pytest.raises(DataError, match=r"max_bad_fraction=0.5 of 1,000 rows allows 500"):
        stream_local(
            folder / "rotten.jsonl",
            cache_dir=folder / "cache",
            max_bad_fraction=0.5,
            max_consecutive_bad=10_000,
        )


def test_retry_takes_out_what_was_mended(folder):
    stream = open_stream(folder)
    (folder / "3.png").rename(folder / "elsewhere.png")
    list(stream)
    assert stream.retry_quarantine() == (0, 4)
    (folder / "elsewhere.png").rename(folder / "3.png")
    (folder / "17.png").write_bytes((folder / "0.png").read_bytes())  # needs refresh=True
    assert stream.retry_quarantine() == (1, 3)
    reasons = {record.key: record.reason for record in stream.inspect_quarantine()}
    assert reasons.keys() == {"k17", "k50", "k101"}
    assert "refresh=True" in reasons["k17"]


def test_reading_by_rows_passes_over_as_well(folder):
    stream = open_stream(folder)
    keys = [e and e.key for e in stream.read_rows(range(len(stream)))]
    assert keys.count(None) == 2
    assert keys[:3] == ["k0", "k1", "k2"]
    assert stream.state_dict()["position"] == 0
    with pytest.raises(DataError):
        stream[17]


def test_streams_that_were_opened_apart_note_each_fault_once(folder):
    train, held_out = open_stream(folder), open_stream(folder)
    assert len(list(train)) == len(list(held_out)) == len(GOOD)
    noted = sorted(record.key for record in train.inspect_quarantine())
    assert noted == ["k101", "k17", "k50"]
    both = mix({train.split(0.5)[0]: 1, held_out.split(0.5)[1]: 1})
    assert len(both.inspect_quarantine()) == 3
    assert both.retry_quarantine() == (0, 3)


def test_what_a_collator_refuses_is_noted_against_the_same_budget(folder):
    stream = open_stream(folder, max_bad_fraction=0.011)
    keys = [example.key for example, _ in zip(stream, range(3), strict=False)]
    stream.pass_over(DataError("too long", key=keys[0]))
    stream.pass_over(DataError("too long", key=keys[1]))
    assert stream.state_dict()["bad"][0] >= 2
    with pytest.raises(DataError, match="too long"):
        stream.pass_over(DataError("too long", key=keys[2]))
    with pytest.raises(DataError):
        stream.pass_over(DataError("of another stream", key="unknown"))
    assert {r.key for r in stream.inspect_quarantine() if r.stage == "collate"} >= set(keys[:2])


def test_an_example_that_came_again_is_remembered_as_the_latest(folder, monkeypatch):
    monkeypatch.setattr("gemma_tuner.streaming.stream._REMEMBERED_SLOTS", 2)
    stream = open_stream(folder)
    list(stream.read_rows([0, 1, 0, 2]))
    stream.pass_over(DataError("too long", key="k0"))
    with pytest.raises(DataError, match="too long"):
        stream.pass_over(DataError("too long", key="k1"))


def test_no_budget_passes_over_rows_without_media_before_the_first_with(folder):
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    for row in rows[:5]:
        row["image"] = None
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="nothing in 'image', and other rows have") as caught:
        open_stream(folder, max_bad_fraction=0.5)
    assert caught.value.key == "k0"
    assert not list((folder / "cache" / "manifests").iterdir())


def test_misspelt_keywords_are_named(folder):
    wrong: Any
    for wrong, hint in (({"answer": "x"}, "it takes"), ({"promt": "x"}, "did you mean prompt=")):
        with pytest.raises(ConfigError, match=hint):
            stream_local(folder / "data.jsonl", **wrong)


# --- nothing but bad rows ---------------------------------------------------------------------


@pytest.mark.parametrize("max_bad_fraction", [0.01, 1.0])
@pytest.mark.parametrize("form", ["jsonl", "parquet", "csv", "bucket", "hub"])
def test_data_of_bad_rows_alone_end_with_the_reasons_by_count(tmp_path, form, max_bad_fraction):
    rows = [{"prompt": "q", "response": "", "image": ""} for _ in range(3)]
    rows += [{"prompt": "q", "response": "a", "image": f"missing {n}.png"} for n in range(40)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    given = {"max_bad_fraction": max_bad_fraction, "cache_dir": tmp_path / "cache"}
    folder = tmp_path / "data"
    folder.mkdir()
    with GcsServer() as server:
        if form == "bucket":
            server.put("bucket", "data/train.jsonl", lines.encode())
        elif form == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
        elif form == "csv":
            text = "prompt,response,image\n" + "".join(f"{','.join(r.values())}\n" for r in rows)
            (folder / "a.csv").write_text(text)
        else:
            (folder / "train.jsonl").write_text(lines)
        opened = {
            "bucket": lambda: stream_gcs("gs://bucket/data/", gcs_client=server.client(), **given),
            "hub": lambda: stream_hub(str(folder), **given),
        }
        with pytest.raises(GemmaTunerError) as raised:
            opened.get(form, lambda: stream_local(folder, **given))()
    said = str(raised.value)
    assert "none of the 43 rows can be used: 40 × row: " in said
    assert "3 × row: empty answer" in said
    assert said.count("(first '") == 2
