"""One collated row as a person reads it, with the trained tokens marked."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

from gemma_tuner.batch import IGNORED, Batch
from gemma_tuner.display import ACCENT, QUIET, element, escape, make_card, quote_line, quote_text

_TRAINED = f"background:{ACCENT}44;border-bottom:2px solid {ACCENT};color:inherit"


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens: its text, whether it is trained on, and how many tokens it has."""

    text: str
    trained: bool
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Preview:
    """One row of a batch.

    Args:
        key: The example's key.
        segments: The row without padding, in reading order.
    """

    key: str
    segments: tuple[Segment, ...]

    @property
    def trained_text(self) -> str:
        """What the row teaches, control tokens included."""
        return "".join(segment.text for segment in self.segments if segment.trained)

    @property
    def _summary(self) -> str:
        num_tokens = sum(segment.num_tokens for segment in self.segments)
        num_trained = sum(segment.num_tokens for segment in self.segments if segment.trained)
        return f"{num_tokens} tokens, {num_trained} trained"

    def __str__(self) -> str:
        text = "".join(
            f"⟦{segment.text}⟧" if segment.trained else segment.text for segment in self.segments
        )
        title = f"{quote_line(self.key)}: {self._summary} (between ⟦ and ⟧)"
        return f"{title}\n{quote_text(text.rstrip())}"

    def _repr_html_(self) -> str:
        """The row as notebooks show it, with the trained tokens marked by their background."""
        text = "".join(
            element("mark", escape(segment.text), _TRAINED)
            if segment.trained
            else element("span", escape(segment.text), QUIET)
            for segment in self.segments
        )
        style = "white-space:pre-wrap;background:none;padding:4px 0;margin:0;font-size:90%"
        return make_card(self.key, f"{self._summary} (marked)", element("pre", text, style))


def preview_row(batch: Batch, tokenizer: Any, row: int = 0) -> Preview:
    """Decode one row of a batch."""
    length = int(batch.inputs["attention_mask"][row].sum())
    ids = batch.inputs["input_ids"][row, :length].tolist()
    trained = (batch.labels[row, :length] != IGNORED).tolist()
    special = set(tokenizer.all_special_ids)
    segments = []
    for flag, group in groupby(zip(ids, trained, strict=True), key=lambda pair: pair[1]):
        tokens = [token for token, _ in group]
        text = "".join(
            _decode_run(tokenizer, run, special)
            for run in (list(items) for _, items in groupby(tokens, key=lambda t: t in special))
        )
        segments.append(Segment(text=text, trained=flag, num_tokens=len(tokens)))
    return Preview(key=batch.keys[row], segments=tuple(segments))


def _decode_run(tokenizer: Any, ids: list[int], special: set[int]) -> str:
    """Decode ids that are all plain text, or all control tokens (repeats counted)."""
    if ids[0] not in special:
        return tokenizer.decode(ids)
    text = ""
    for token, repeats in groupby(ids):
        count = len(list(repeats))
        text += tokenizer.convert_ids_to_tokens(token) + (f"×{count}" if count > 2 else "")
    return text
