"""Scores against jiwer, and against reference implementations of the papers that define them."""

import random
import re

import jiwer
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tuner.errors import ConfigError
from gemma_tuner.evaluation.normalizers import normalizer_for
from gemma_tuner.evaluation.scores import (
    SCORES,
    Tally,
    anls,
    character_error_rate,
    compare,
    exact_match,
    find_scores,
    visual_question_accuracy,
    word_error_rate,
)
from gemma_tuner.evaluation.vqa import normalize_answer, vqa_accuracy

WORDS = ["the", "a", "cat", "dog", "two", "2", "don't", "dont", "red", "Red.", "1,000", "x-ray"]


def make_pairs(count, seed=0, least_words=1):
    """References and predictions that are the same, edited, or have nothing in common."""
    rng = random.Random(seed)
    references, predictions = [], []
    for _ in range(count):
        words = rng.choices(WORDS, k=rng.randint(least_words, 8))
        edited = [rng.choice(WORDS) if rng.random() < 0.3 else word for word in words]
        edited = [word for word in edited if rng.random() > 0.1]
        references.append(" ".join(words))
        predictions.append(" ".join(edited + rng.choices(WORDS, k=rng.choice([0, 0, 1, 2]))))
    return references, predictions


def keep(text):
    return text


@pytest.mark.parametrize(
    ("score", "theirs"), [(word_error_rate, jiwer.wer), (character_error_rate, jiwer.cer)]
)
def test_error_rates_equal_jiwer_on_a_thousand_pairs(score, theirs):
    references, predictions = make_pairs(1000)
    ours = score(keep)
    for reference, prediction in zip(references, predictions, strict=True):
        assert ours.measure([prediction], [reference]) == theirs(reference, prediction)
    assert ours.measure(predictions, references) == pytest.approx(theirs(references, predictions))
    normalized = score()
    normalize = normalizer_for(None)
    assert normalized.measure(predictions, references) == pytest.approx(
        theirs(list(map(normalize, references)), list(map(normalize, predictions)))
    )


def edit_distance(left, right):
    row = list(range(len(right) + 1))
    for i, one in enumerate(left, 1):
        previous, row[0] = row[0], i
        for j, other in enumerate(right, 1):
            cost = previous + (one != other)
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, cost)
    return row[-1]


@settings(max_examples=50)
@given(st.lists(st.sampled_from("ab "), max_size=9), st.lists(st.sampled_from("ab "), max_size=9))
def test_error_rates_equal_the_textbook(left, right):
    reference, prediction = "".join(left).split(), "".join(right).split()
    tally = word_error_rate(keep).tally(" ".join(prediction), [" ".join(reference)])
    assert tally == Tally(edit_distance(reference, prediction), len(reference))


def test_words_end_at_any_whitespace_whatever_the_normalizer():
    tally = word_error_rate(str.lower).tally("A b  c", ["a\nb\tc\u3000"])
    assert tally == Tally(0, 3)


def test_a_corpus_weighs_words_and_not_rows():
    score = word_error_rate()
    references = ["one two three four five six seven eight nine ten", "one"]
    assert score.measure([references[0], "two"], references) == pytest.approx(1 / 11)


def test_perfect_is_perfect_and_empty_is_not():
    references, _ = make_pairs(50)
    nothing = [""] * len(references)
    for name in SCORES:
        (score,) = find_scores([name])
        best, worst = (1.0, 0.0) if score.higher_is_better else (0.0, 1.0)
        assert score.measure(references, references) == best, name
        if name != "vqa_accuracy":  # for which "the" is an empty answer
            assert score.measure(nothing, references) == worst, name
    assert visual_question_accuracy().measure([""], ["dog"]) == 0.0


def test_rows_without_words_in_their_reference_count_what_was_made_up():
    score = word_error_rate()
    assert score.measure(["", "a b"], ["", "a b"]) == 0.0
    assert score.measure(["x y", "a b"], ["", "a b"]) == 1.0  # as jiwer: two insertions
    assert jiwer.wer(["", "a b"], ["x y", "a b"]) == 1.0
    assert str(score.measure(["x"], [""])) == "nan"
    assert score.tally("", [""]).value == 0.0
    assert score.tally("x", [""]).value == float("inf")


def test_the_nearest_of_several_references_counts():
    assert exact_match().measure(["two"], [["2", "two "]]) == 1.0
    assert word_error_rate().measure(["two dogs"], [["a b c", "two dogs run"]]) == pytest.approx(
        1 / 3
    )
    assert anls().measure(["hello"], [["xyz", "hallo"]]) == pytest.approx(0.8)


def reference_anls(prediction, references):
    best = 0.0
    for text in references:
        left, right = (" ".join(x.strip().lower().split()) for x in (prediction, text))
        longest = max(len(left), len(right))
        distance = edit_distance(left, right) / longest if longest else 0.0
        best = max(best, 1 - distance if distance < 0.5 else 0.0)
    return best


def test_anls_equals_the_papers_definition_on_a_thousand_pairs():
    score = anls()
    references, predictions = make_pairs(1000, seed=1, least_words=0)
    others, _ = make_pairs(1000, seed=2)
    for prediction, rows in zip(predictions, zip(references, others, strict=True), strict=True):
        assert score.measure([prediction], [rows]) == pytest.approx(
            reference_anls(prediction, rows)
        )


def reference_vqa(prediction, references):
    """The challenge's rules, written down once more, with its leave-one-out over ten people."""

    def normalize(text):
        marks = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-"]
        marks += [">", "<", "@", "`", ",", "?", "!"]
        text = text.replace("\n", " ").replace("\t", " ").strip()
        out = text
        for mark in marks:
            if mark + " " in text or " " + mark in text or re.search(r"\d,\d", text):
                out = out.replace(mark, "")
            else:
                out = out.replace(mark, " ")
        out = re.sub(r"(?!<=\d)(\.)(?!\d)", "", out)
        numbers = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3"}
        words = [numbers.get(word, word) for word in out.lower().split()]
        words = [word for word in words if word not in ("a", "an", "the")]
        return " ".join({"dont": "don't", "isnt": "isn't"}.get(word, word) for word in words)

    answer = normalize(prediction)
    people = list(map(normalize, references))
    shares = [min(1, (people[:i] + people[i + 1 :]).count(answer) / 3) for i in range(len(people))]
    return sum(shares) / len(shares)


def test_vqa_accuracy_equals_the_challenges_rules_on_a_thousand_rows():
    rng = random.Random(3)
    seen = set()
    for _ in range(1000):
        people = [" ".join(rng.choices(WORDS, k=rng.randint(1, 2))) for _ in range(3)]
        references = rng.choices(people, k=10)
        prediction = rng.choice([*people, people[0].upper() + " !", "nothing"])
        accuracy = vqa_accuracy(prediction, references)
        assert accuracy == pytest.approx(reference_vqa(prediction, references))
        seen.add(round(accuracy, 3))
    assert {0.0, 0.3, 0.6, 0.9, 1.0} <= seen


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The two dogs, dont!", "2 dogs don't"),
        ("1,000", "1000"),
        ("x-ray", "x ray"),
        ("3.5", "3.5"),
        ("u.s.", "us"),
        ("yall'd've", "y'all'd've"),
        ("\tAn apple\n", "apple"),
    ],
)
def test_answers_are_normalized_as_the_challenge_does(text, normalized):
    assert normalize_answer(text) == normalized


@pytest.mark.parametrize("count", [1, 2, 3, 4, 10])
def test_vqa_accuracy_of_any_number_of_people_is_perfect_when_all_agree(count):
    assert vqa_accuracy("Yes.", ["yes"] * count) == 1.0
    assert vqa_accuracy("no", ["yes"] * count) == 0.0


def test_normalizers():
    english = normalizer_for("en-US")
    assert english("Mr. Smith won't pay $20, um, twice") == english(
        "mister smith will not pay 20 dollars twice"
    )
    assert normalizer_for(None)("Straße, JETZT!").split() == ["straße", "jetzt"]
    assert normalizer_for("ja")("犬。").split() == normalizer_for("zh")("犬").split()
    (score,) = find_scores(["wer"], language="ja")
    assert score.measure(["犬と猫"], ["犬と鳥"]) == pytest.approx(1 / 3)
    with pytest.raises(ConfigError, match="code such as 'en'"):
        normalizer_for("English, please")


def test_a_function_of_ones_own_is_a_score():
    def shares_a_word(prediction, references):
        return float(any(set(prediction.split()) & set(text.split()) for text in references))

    (score,) = find_scores([shares_a_word])
    assert score.name == "shares_a_word"
    assert score.measure(["a b", "c"], ["b", ["d", "e"]]) == 0.5

    (wrong,) = find_scores([lambda prediction, references: "secret"])
    with pytest.raises(ConfigError, match="finite number") as raised:
        wrong.measure(["a"], ["b"])
    assert "secret" not in str(raised.value)


def test_bad_scores_are_refused():
    with pytest.raises(ConfigError, match="did you mean 'wer'"):
        find_scores(["WERR"])
    with pytest.raises(ConfigError, match=r"write \['wer'\]"):
        find_scores("wer")
    with pytest.raises(ConfigError, match="two scores are called 'wer'"):
        find_scores(["wer", word_error_rate()])
    with pytest.raises(ConfigError, match="a score is a int"):
        find_scores([3])
    with pytest.raises(ConfigError, match="as many"):
        exact_match().measure(["a"], [])
    with pytest.raises(ConfigError, match="no references"):
        exact_match().measure(["a"], [[]])


def test_the_interval_of_a_paired_bootstrap():
    rng = np.random.default_rng(0)
    right = rng.random(400) < 0.7
    base = right & (rng.random(400) < 0.8)
    tallies = {
        "adapter": [Tally(float(x), 1) for x in right],
        "base": [Tally(float(x), 1) for x in base],
    }
    result = compare(exact_match(), tallies)
    assert result.difference == right.mean() - base.mean()
    spread = 1.96 * np.std(right.astype(float) - base) / 20
    expected = (right.mean() - base.mean() - spread, right.mean() - base.mean() + spread)
    assert result.interval == pytest.approx(expected, abs=0.01)
    assert compare(exact_match(), tallies) == result
    same = compare(exact_match(), {"adapter": tallies["base"], "base": tallies["base"]})
    assert (same.difference, same.interval) == (0.0, (0.0, 0.0))
    assert compare(exact_match(), {n: rows[:1] for n, rows in tallies.items()}).interval is None
