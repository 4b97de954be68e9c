"""Accuracy of short answers about images, as the VQA challenge counts it.

Source: VQA v2, Goyal et al. 2017, and its evaluation program (GT-Vision-Lab/VQA, vqaEval.py). The
program compares without normalising where all people gave the same answer; here, as on the
challenge's own server, answers are always normalised.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = {
    "none": "0",
    **{
        word: str(number)
        for number, word in enumerate(
            ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
        )
    },
}
# Whoever leaves one apostrophe out of these means the same.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't
    mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've
    should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't
    what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's
    who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd
    you'd've you'll you're you've
"""
_SPELLINGS = {
    word[: match.start()] + word[match.end() :]: word
    for word in re.findall(r"\S+", _CONTRACTIONS)
    for match in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}


def normalize_answer(text: str) -> str:
    """Bring an answer into the form that the challenge compares: "The two dogs" is "2 dogs"."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    stripped = text
    has_number = _COMMA_IN_NUMBER.search(text) is not None
    for mark in _PUNCTUATION:
        at_border = f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if at_border or has_number else " ")
    words = [_NUMBERS.get(word, word) for word in _PERIOD.sub("", stripped).lower().split()]
    return " ".join(_SPELLINGS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """Score an answer by how many people gave it."""
    # Three who agree make an answer right, on the average over leaving each of the people out.
    # With fewer than four people, all but the one left out must agree; a single reference is equal
    # or it is not.
    answer = normalize_answer(prediction)
    matches = [normalize_answer(reference) == answer for reference in references]
    num_others = len(matches) - 1
    if num_others == 0:
        return float(matches[0])
    enough = min(3, num_others)
    return sum(min(1.0, (sum(matches) - match) / enough) for match in matches) / len(matches)
