"""What notebooks see of objects: texts stay texts, media are inside, and cuts are said."""

import base64
import io
import json
import sys
from html.parser import HTMLParser
from types import ModuleType

import numpy as np
import PIL.Image
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from gemma_tuner.collators.preview import Preview, Segment
from gemma_tuner.display import MAX_CHARACTERS, escape, make_player, make_thumbnail, show_bytes
from gemma_tuner.planning.plan import Plan
from gemma_tuner.planning.trace import Footprint
from gemma_tuner.records import Audio, Example, Image, StoredObject, Text, Turn
from gemma_tuner.streaming.opening import stream_local
from gemma_tuner.training.reporting.metrics import EvalRecord
from gemma_tuner.training.reporting.progress import Progress
from gemma_tuner.training.trainer import FitResult

HOSTILE = "<script>alert(1)</script><img src=x onerror='alert(2)'>\"&amp;</pre></td>"
VOID = {"img"}
KNOWN = {
    "b", "details", "div", "figcaption", "figure", "img", "audio", "li", "mark", "pre", "span",
    "summary", "table", "td", "th", "tr", "ul", "svg", "line", "polyline", "circle",
}  # fmt: skip


class Page(HTMLParser):
    """The tags, attributes and text of HTML whose elements must be closed in order."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(html):
    """Parse what an object shows, and see that none of it could do anything."""
    page = Page(html)
    assert set(page.tags) <= KNOWN
    for name, value in page.attributes:
        assert not name.startswith("on")
        assert name not in {"href", "srcdoc"}
        if name == "src":
            assert value.startswith(("data:image/png;base64,", "data:audio/wav;base64,"))
    return page


def embedded(page):
    return [
        base64.b64decode(value.split(",")[1]) for name, value in page.attributes if name == "src"
    ]


@given(st.text(max_size=MAX_CHARACTERS))
def test_escaped_text_is_the_text(text):
    assert Page(f"<div>{escape(text)}</div>").text == text
    assert "<" not in escape(text)


def test_a_long_text_is_cut_and_says_so():
    assert escape("a" * MAX_CHARACTERS) == "a" * MAX_CHARACTERS
    assert escape("<" * 3000).endswith("&lt;… (3,000 characters)")


def test_an_example_shows_its_turns_and_plays_its_media():
    picture = PIL.Image.new("RGB", (640, 320), (200, 10, 10))
    samples = np.linspace(-1, 1, 8000, dtype=np.float32)
    example = Example(
        HOSTILE,
        (
            Turn("system", (Text(HOSTILE),)),
            Turn("user", (Image(picture), Audio(samples, 16_000), Text("What is it?"))),
            Turn("assistant", (Text(HOSTILE),), {HOSTILE: HOSTILE}),
        ),
        tools=({"name": HOSTILE},),
    )
    page = read(example._repr_html_())
    assert page.text.count(HOSTILE) == 5
    for words in ("system", "user", "assistant", "What is it?", "640 × 320", "0.50 s"):
        assert words in page.text
    shown, heard = embedded(page)
    with PIL.Image.open(io.BytesIO(shown)) as thumbnail:
        assert thumbnail.size == (256, 128)
        assert thumbnail.convert("RGB").getpixel((9, 9)) == (200, 10, 10)
    played, rate = soundfile.read(io.BytesIO(heard))
    assert (rate, len(played)) == (16_000, 8000)
    assert np.abs(played - samples).max() < 1e-4
    assert picture.size == (640, 320)


def test_media_that_are_not_decoded_are_named_and_nothing_is_read():
    parts = (Image("/nowhere/a.png"), Audio(b"RIFF"), Image(StoredObject("gs://bucket/a")))
    page = read(Example("k", (Turn("user", parts),))._repr_html_())
    assert page.text.split("user")[1] == (
        "[image, not decoded] [audio, not decoded] [image, not decoded] "
    )
    assert "nowhere" not in page.text


def test_a_document_is_shown():
    assert "<p>" in read(Example("k", document="<p> word")._repr_html_()).text


def test_a_long_sound_is_cut_and_says_so():
    page = read(make_player(np.zeros((45 * 8000, 2), dtype=np.float32), 8000))
    assert "the first 30 s of 45.00 s" in page.text
    (heard,) = embedded(page)
    assert soundfile.info(io.BytesIO(heard)).frames == 30 * 8000
    assert soundfile.info(io.BytesIO(heard)).channels == 2


def test_a_small_picture_keeps_its_pixels():
    (shown,) = embedded(read(make_thumbnail(PIL.Image.new("RGB", (5, 7)))))
    with PIL.Image.open(io.BytesIO(shown)) as thumbnail:
        assert thumbnail.size == (5, 7)


def test_a_preview_marks_what_is_trained():
    preview = Preview(HOSTILE, (Segment("<bos>ask ", False, 3), Segment(HOSTILE, True, 5)))
    html = preview._repr_html_()
    page = read(html)
    assert "8 tokens, 5 trained" in page.text
    assert Page(html[html.index("<mark") : html.index("</mark>") + 7]).text == HOSTILE
    assert page.tags.count("mark") == 1


def test_a_stream_shows_its_report_and_its_preview_the_examples(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": HOSTILE, "response": "b", HOSTILE: 1} for _ in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream = stream_local(path, cache_dir=tmp_path / "cache")
    next(iter(stream))
    page = read(stream._repr_html_())
    assert HOSTILE in page.text.replace("\\", "")
    for line in str(stream.report()).splitlines():
        assert line in page.text
    assert ("aria-label", "1 of 4 rows") in page.attributes
    shown = read(stream.preview(2)._repr_html_()).text
    assert shown.count(HOSTILE) == 2
    assert stream.state_dict()["position"] == 1


def make_plan(footprint, budget_bytes):
    return Plan(
        name=HOSTILE, device="cpu", dtype="float32", modalities=("text",),
        per_layer_embeddings=None, bits=None, levels=(), loss_chunk_tokens=256,
        query_chunk_tokens=None, max_tokens=64, target_share=0.5, budget_bytes=budget_bytes,
        margin_bytes=10_000_000, footprint=footprint, reasons={"budget": HOSTILE},
    )  # fmt: skip


def read_widths(page):
    styles = [value for name, value in page.attributes if name == "style"]
    return [float(s.split("width:")[1].split("%")[0]) for s in styles if s.startswith("width:")]


def test_a_plan_is_a_bar_of_its_parts():
    footprint = Footprint({"decoder": 50_000_000, "unused": 0}, {"attention": 30_000_000})
    page = read(make_plan(footprint, 100_000_000)._repr_html_())
    assert read_widths(page) == [50, 30, 10]  # and the rest of the budget is free
    for words in (HOSTILE, "decoder50 MBstays", "attention30 MBat the peak", "peak80 MB"):
        assert words in page.text
    assert "unused" not in page.text


def test_a_plan_far_below_its_budget_is_drawn_larger_and_says_so():
    footprint = Footprint({"decoder": 75_000_000}, {"attention": 25_000_000})
    page = read(make_plan(footprint, 10_000_000_000)._repr_html_())
    assert read_widths(page) == [75, 25]
    assert "of the peak, which is 1.0% of the budget" in page.text


def test_a_plan_that_was_not_needed_shows_its_reasons():
    page = read(make_plan(None, 10)._repr_html_())
    assert HOSTILE in page.text
    assert "peak" not in page.text


def test_the_end_of_a_run_shows_its_losses():
    records = tuple(EvalRecord(s, loss, 2.0, 8, 4) for s, loss in ((0, 8.0), (5, 2.0), (10, 1.0)))
    page = read(FitResult(10, None, records)._repr_html_())
    assert "8.0000" in page.text
    assert page.tags.count("circle") == 3
    stopped = read(FitResult(3, "SIGINT", ())._repr_html_()).text
    assert "stopped by SIGINT; fit(resume=True) goes on; no held-out loss" in stopped
    assert read(FitResult(0, None, records[:1])._repr_html_()).tags.count("circle") == 0


class Handle:
    """What IPython gives for an output that can be drawn anew."""

    def __init__(self, shown):
        self.shown = shown

    def update(self, html):
        self.shown.append(html)


@pytest.fixture
def shown(monkeypatch):
    """Stand in for a kernel; a real one runs in the notebooks' tests."""
    shown = []

    def display(html, *, display_id):
        assert display_id
        shown.append(html)
        return Handle(shown)

    module = ModuleType("IPython.display")
    module.HTML, module.display = str, display
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return shown


def test_a_run_in_a_notebook_is_one_output_drawn_anew(shown):
    from rich.console import Console

    console = Console(force_jupyter=True)
    with Progress(10, console=console) as progress:
        progress.evaluation(EvalRecord(0, 8.0, 2981.0, 8, 4))
        for step in range(1, 11):
            progress.advance(step)
        progress.message(HOSTILE)
    assert 3 <= len(shown) <= 5  # drawn at most a few times a second
    page = read(shown[-1])
    assert "step 10 of 10" in page.text
    assert "held-out loss 8.0000" in page.text
    assert HOSTILE in page.text
    assert ("aria-label", "10 of 10 steps") in page.attributes


def test_a_run_that_shows_nothing_shows_nothing_in_a_notebook(shown):
    from rich.console import Console

    with Progress(10, enabled=False, console=Console(force_jupyter=True)) as progress:
        progress.advance(1)
        progress.message("word")
    assert shown == []


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1.5e6, "1.5 MB"), (3e16, "3e+04 TB")],
)
def test_sizes_have_units(num_bytes, text):
    assert show_bytes(num_bytes) == text


def test_sizes_that_are_billed_count_in_binary_units():
    assert show_bytes(4340, binary=True) == "4.238 KiB"
