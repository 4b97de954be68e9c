"""Text made comparable before its words or characters are counted."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

from transformers.models.whisper.english_normalizer import (
    BasicTextNormalizer,
    EnglishTextNormalizer,
)

from gemma_tuner.errors import ConfigError

Normalizer = Callable[[str], str]

# Written without spaces between words: each letter counts as a word.
# Source: Radford et al. 2022 (Whisper), appendix C: Chinese, Japanese, Thai, Lao, Burmese; yue is
# the Chinese that Whisper names apart.
_WITHOUT_SPACES = frozenset({"zh", "yue", "ja", "th", "lo", "my"})
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[a-z0-9]+)*", re.IGNORECASE)


def normalizer_for(language: str | None) -> Normalizer:
    """Choose the normaliser of published speech recognition scores, Whisper's."""
    # English: lower case; contractions, numbers, currencies and titles in one spelling; fillers
    # (``um``), punctuation, diacritics and what stands in brackets left out. British and American
    # spellings stay apart, as Whisper's table of them is not part of transformers.
    # Other languages, and None: lower case; punctuation, symbols and what stands in brackets left
    # out; each letter a word where a language puts no spaces between words. Marks count as
    # symbols, so the vowel signs of Indic scripts part words, in both texts alike: for those
    # languages give the scores a normaliser of your own.
    if language is None:
        return _basic(split_letters=False)
    if not isinstance(language, str) or not _LANGUAGE.fullmatch(language):
        raise ConfigError(
            f"language is {language!r}; give a code such as 'en' or 'pt-BR', or None for text in "
            "several languages"
        )
    code = language.lower().partition("-")[0]
    return _english() if code == "en" else _basic(split_letters=code in _WITHOUT_SPACES)


@cache
def _english() -> Normalizer:
    return EnglishTextNormalizer({})


@cache
def _basic(*, split_letters: bool) -> Normalizer:
    return BasicTextNormalizer(split_letters=split_letters)
