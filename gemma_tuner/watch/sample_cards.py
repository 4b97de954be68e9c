"""Samples on the page: the prompt and its media, the right answer, and the model's."""

from __future__ import annotations

from pathlib import PurePath
from urllib.parse import quote

from nicegui import ui

from gemma_tuner.watch.elements import Section, block, heading, text
from gemma_tuner.watch.run import Run
from gemma_tuner.watch.samples import MEDIA_TYPES, Sample

SHOWN_MEDIA = 16
SHOWN_TOKENS = 1000
SHOWN_SAMPLES = 24
"""Samples of one step on the page; those beyond are counted."""


class SampleCards:
    """The samples of a run at one of its steps, the newest unless somebody has gone back."""

    def __init__(self, run: Run, index: int) -> None:
        self._run = run
        self._index = index  # among the runs of the page; the addresses of media hold it
        self._step: int | None = None  # None follows the newest
        with block("card"):
            with heading("Samples", "what the model answers as it learns"):
                block("grow")
                self._label = text("", "quiet")
                self._slider = ui.slider(min=0, max=0, value=0, on_change=self._move)
                self._slider.props("dense aria-label='step of the samples'").classes("steps")
            self._section = Section(self._read, self._show, "samples")
        self._set_slider()

    def select(self, run: Run, index: int) -> None:
        """Show another run's samples."""
        self._run, self._index, self._step = run, index, None
        self.follow()

    def follow(self) -> None:
        """Show what there is now."""
        self._set_slider()
        self._section.follow()

    def _steps(self) -> list[int]:
        return sorted(self._run.samples)

    def _move(self) -> None:
        steps = self._steps()
        place = int(self._slider.value or 0)
        if not 0 <= place < len(steps):
            return
        self._step = None if place == len(steps) - 1 else steps[place]
        self.follow()

    def _set_slider(self) -> None:
        steps = self._steps()
        self._slider.set_visibility(len(steps) > 1)
        self._label.set_visibility(bool(steps))
        if not steps:
            return
        place = steps.index(self._step) if self._step in steps else len(steps) - 1
        self._slider.props["max"] = len(steps) - 1
        self._slider.value = place
        newest = " (newest)" if place == len(steps) - 1 else ""
        self._label.set_text(f"after step {steps[place]:,}{newest}")

    def _read(self) -> tuple[int, int, list[Sample]]:
        """The run's index, the step that is shown, and its samples."""
        steps = self._steps()
        if not steps:
            return self._index, 0, []
        step = self._step if self._step in steps else steps[-1]
        return self._index, step, list(self._run.samples[step].values())

    def _show(self, content: tuple[int, int, list[Sample]]) -> None:
        index, _, samples = content
        if not samples:
            text(
                "No samples yet: a run that is given held-out examples to answer writes them.",
                "empty",
            )
        for sample in samples[:SHOWN_SAMPLES]:
            with block("sample"):
                _show_sample(sample, index)
        if len(samples) > SHOWN_SAMPLES:
            text(f"{len(samples) - SHOWN_SAMPLES:,} more are in samples.jsonl.", "empty")


def _show_sample(sample: Sample, index: int) -> None:
    with block("sample-asked"):
        text(sample.key, "sample-key")
        for name in sample.media[:SHOWN_MEDIA]:
            _show_media(name, index)
        if len(sample.media) > SHOWN_MEDIA:
            text(f"{len(sample.media) - SHOWN_MEDIA:,} more files", "quiet")
        text(sample.prompt, "sample-prompt")
    with block("sample-answers"):
        text("model", "sample-who")
        text(sample.prediction or "(an empty answer)", "sample-prediction")
        text("reference", "sample-who")
        text(sample.reference, "sample-reference")
        if sample.tokens:
            _show_confidence(sample)


def _show_media(name: str, index: int) -> None:
    kind = MEDIA_TYPES.get(PurePath(name).suffix.lower(), "") if len(name) < 256 else ""
    address = f"/media/{index}/{quote(name, safe='')}"
    if kind.startswith("image/"):
        image = ui.element("img").classes("sample-image")
        image.props.update({"src": address, "alt": name, "loading": "lazy"})
    elif kind.startswith("audio/"):
        player = ui.element("audio").classes("sample-audio")
        player.props.update({"src": address, "controls": True, "preload": "metadata"})
    else:
        text(f"{name}: this kind of file is not shown", "quiet")


def _show_confidence(sample: Sample) -> None:
    """Show the reference's tokens, each coloured by the probability that the model gave to it."""
    with block("sample-who"):
        text("confidence, token by token")
        text(f"mean {sample.confidence or 0:.1%}", "figure")
    with block("tokens"):
        for token, probability in sample.tokens[:SHOWN_TOKENS]:
            element = text(token.replace("\n", "⏎") or "∅", "token")
            element.style(f"background: {confidence_color(probability)}")
            element.props["title"] = f"{probability:.1%}"
        if len(sample.tokens) > SHOWN_TOKENS:
            text(f" … {len(sample.tokens) - SHOWN_TOKENS:,} more tokens", "quiet")


def confidence_color(probability: float) -> str:
    """The colour of a probability: from red over yellow to green, readable on light and dark."""
    return f"hsl({130 * probability:.0f} 65% 50% / {0.42 - 0.14 * probability:.2f})"
