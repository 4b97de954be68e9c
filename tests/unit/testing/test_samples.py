"""The bundled sets: where they are, what they hold, and that the script makes them."""

import collections
import itertools
import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import soundfile

from gemma_tuner.errors import ConfigError
from gemma_tuner.media.audio import decode_audio
from gemma_tuner.testing.samples import sample_data
from tests.make_samples import write_samples

COUNTS = {"text": (192, 48), "image": (128, 32), "audio": (120, 40)}
# These use the pictures and sounds of those above.
DERIVED = {
    "chat": (66, 22),
    "vqa": (128, 32),
    "translation": (120, 40),
    "multimodal": (128, 32),
}


def read_rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def test_finds_every_set_and_names_them_when_asked_for_another():
    for name in COUNTS | DERIVED:
        assert (sample_data(name) / "manifest.jsonl").is_file()
    with pytest.raises(ConfigError, match="'video'; it may be text, image, audio, chat"):
        sample_data("video")


@pytest.mark.parametrize("modality", COUNTS)
def test_manifests_keep_one_convention(modality):
    folder = sample_data(modality)
    rows = read_rows(folder)
    columns = {"id", "split", "prompt", "response"} | ({modality} - {"text"})
    assert all(set(row) == columns and all(row.values()) for row in rows)
    assert len({row["id"] for row in rows}) == len(rows)
    splits = collections.Counter(row["split"] for row in rows)
    assert (splits["train"], splits["test"]) == COUNTS[modality]
    assert all(len(row["response"].split()) <= 2 for row in rows)
    if modality != "text":
        named = {row[modality] for row in rows}
        assert len(named) == len(rows)
        assert named == {path.name for path in folder.iterdir()} - {"manifest.jsonl"}


def split_rows(name) -> tuple[list[dict], list[dict]]:
    rows = read_rows(sample_data(name))
    train, test = ([row for row in rows if row["split"] == split] for split in ("train", "test"))
    assert (len(train), len(test)) == DERIVED[name]
    assert len({row["id"] for row in rows}) == len(rows)
    return train, test


def test_a_chat_answers_in_the_language_that_its_system_turn_asks_for():
    train, test = split_rows("chat")
    roles = ["system", "user", "assistant", "user", "assistant"]
    assert all([turn["role"] for turn in row["messages"]] == roles for row in train + test)
    texts = [[turn["content"] for turn in row["messages"]] for row in train + test]
    assert len(set(map(tuple, texts))) == len(texts)
    words = [
        {answer for system, _, *rest in texts if system.endswith(f"{language}.")
         for answer in (rest[0], rest[2])}
        for language in ("English", "German")
    ]  # fmt: skip
    assert not words[0] & words[1]
    # The second question is the same for every word: its answer follows from the first one.
    followed = collections.defaultdict(set)
    for _, _, first, again, second in texts:
        followed[first, again].add(second)
    assert len({again for _, again in followed}) == 3
    assert all(len(answers) == 1 for answers in followed.values())
    assert {answer for *_, answer in texts[: len(train)]} >= {row[-1] for row in texts}


@pytest.mark.parametrize(("name", "kinds"), [
    ("vqa", ["image"]), ("translation", ["audio"]), ("multimodal", ["image", "audio"]),
])  # fmt: skip
def test_derived_sets_keep_the_split_of_their_media(name, kinds):
    splits = {
        kind: {row[kind]: row["split"] for row in read_rows(sample_data(kind))} for kind in kinds
    }
    for row in itertools.chain(*split_rows(name)):
        assert set(row) == {"id", "split", "prompt", "response", *kinds}
        for kind in kinds:
            assert (sample_data(name) / row[kind]).is_file()
            assert splits[kind][row[kind].removeprefix(f"../{kind}/")] == row["split"]


def test_questions_about_pictures_are_of_three_kinds_and_answered_rightly():
    drawn = {row["image"]: row["response"].split() for row in read_rows(sample_data("image"))}
    for rows in split_rows("vqa"):
        kinds = collections.Counter()
        for row in rows:
            colour, shape = drawn[Path(row["image"]).name]
            if row["prompt"].startswith("Is the shape"):
                asked = row["prompt"].removeprefix("Is the shape ").removesuffix("?")
                assert row["response"] == ("yes" if asked == colour else "no")
                kinds[row["response"]] += 1
            else:
                kind = "colour" if "colour" in row["prompt"] else "shape"
                assert row["response"] == {"colour": colour, "shape": shape}[kind]
                kinds[kind] += 1
        assert kinds["yes"] == kinds["no"]
        assert min(kinds["colour"], kinds["shape"], kinds["yes"] * 2) >= len(rows) // 3 - 4


def test_a_spoken_question_and_a_picture_are_both_needed():
    drawn = {row["image"]: row["response"].split() for row in read_rows(sample_data("image"))}
    spoken = {row["audio"]: row["response"] for row in read_rows(sample_data("audio"))}
    for rows in split_rows("multimodal"):
        counts = collections.Counter()
        for row in rows:
            word = spoken[Path(row["audio"]).name]
            pair = drawn[Path(row["image"]).name]
            assert row["response"] == pair[["ma", "ki"].index(word)]
            counts[word, row["response"]] += 1
        assert len(counts) == 12  # eight colours and four shapes
        assert len({counts[key] for key in counts if key[0] == "ma"}) == 1
        assert len({counts[key] for key in counts if key[0] == "ki"}) == 1


def test_a_word_has_one_meaning():
    meanings = collections.defaultdict(set)
    spoken = {row["audio"]: row["response"] for row in read_rows(sample_data("audio"))}
    for row in itertools.chain(*split_rows("translation")):
        meanings[spoken[Path(row["audio"]).name]].add(row["response"])
    assert len(meanings) == 10
    assert all(len(meaning) == 1 for meaning in meanings.values())


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_media_classes_are_balanced_in_both_splits(modality):
    rows = read_rows(sample_data(modality))
    for split in ("train", "test"):
        counts = collections.Counter(row["response"] for row in rows if row["split"] == split)
        assert len(counts) == {"image": 32, "audio": 10}[modality]
        assert len(set(counts.values())) == 1


def test_held_out_text_can_be_learned_and_not_looked_up():
    rows = read_rows(sample_data("text"))
    assert len({row["prompt"] for row in rows}) == len(rows)
    train = [row for row in rows if row["split"] == "train"]
    test = [row for row in rows if row["split"] == "test"]
    for row in test:
        assert any(row["response"] == known["response"] for known in train)
    # The words of every test prompt are known from training: only their combination is new.
    known_words = {word.strip("?.") for row in train for word in row["prompt"].split()}
    assert all(word.strip("?.") in known_words for row in test for word in row["prompt"].split())


def test_no_two_clips_or_pictures_are_alike():
    for modality in ("image", "audio"):
        folder = sample_data(modality)
        contents = {(folder / row[modality]).read_bytes() for row in read_rows(folder)}
        assert len(contents) == len(read_rows(folder))


def test_pictures_show_their_colour():
    """The pixel most unlike the grey ground is of the colour that the answer names."""
    folder = sample_data("image")
    reference = {
        "red": (215, 35, 35), "orange": (245, 140, 20), "yellow": (245, 225, 40),
        "green": (40, 150, 60), "blue": (40, 80, 205), "purple": (130, 50, 160),
        "black": (20, 20, 20), "white": (250, 250, 250),
    }  # fmt: skip
    for row in read_rows(folder):
        pixels = np.asarray(PIL.Image.open(folder / row["image"])).reshape(-1, 3).astype(int)
        paint = pixels[np.abs(pixels - pixels[0]).sum(axis=1).argmax()]
        nearest = min(reference, key=lambda name: np.abs(paint - reference[name]).sum())
        assert nearest == row["response"].split()[0], row


def measure_spectrum(samples) -> np.ndarray:
    """Log power in 24 bands at 6 moments, over a clip's sounding part ``[144]``."""
    sounding = np.flatnonzero(np.abs(samples) > 0.05 * np.abs(samples).max())
    clip = samples[sounding[0] : sounding[-1]]
    moments = np.linspace(0, len(clip) - 512, 6).astype(int)
    power = [np.abs(np.fft.rfft(clip[at : at + 512] * np.hanning(512))) ** 2 for at in moments]
    bands = np.log(np.add.reduceat(np.array(power), np.arange(0, 132, 5)[:24], axis=1) + 1e-3)
    return (bands - bands.mean()).ravel()


def test_words_differ_in_their_spectra():
    """Unheard voices are recognised by the nearest training clip: the sounds carry the words."""
    folder = sample_data("audio")
    train, test = [], []
    for row in read_rows(folder):
        spectrum = measure_spectrum(decode_audio(folder / row["audio"], key=row["id"]))
        (train if row["split"] == "train" else test).append((spectrum, row["response"]))
    right = sum(
        min(train, key=lambda known: np.linalg.norm(known[0] - spectrum))[1] == word
        for spectrum, word in test
    )
    assert right / len(test) >= 0.9


def test_clips_are_short_telephone_band_and_not_clipped():
    folder = sample_data("audio")
    for row in read_rows(folder):
        samples, rate_hz = soundfile.read(folder / row["audio"], dtype="int16")
        assert rate_hz == 8_000
        assert 0.3 <= len(samples) / rate_hz <= 0.9
        assert 0.35 * 32_767 < np.abs(samples).max() < 0.85 * 32_767


def test_the_script_makes_the_same_sets_again(tmp_path):
    write_samples(tmp_path)
    for modality in COUNTS | DERIVED:
        bundled = sample_data(modality)
        manifest = (tmp_path / modality / "manifest.jsonl").read_bytes()
        assert manifest == (bundled / "manifest.jsonl").read_bytes()
        assert {path.name for path in (tmp_path / modality).iterdir()} == {
            path.name for path in bundled.iterdir()
        }
        # Encoders differ between machines, so what is compared is what they hold.
        for path in itertools.chain(bundled.glob("*.png"), bundled.glob("*.flac")):
            again = tmp_path / modality / path.name
            if modality == "image":
                np.testing.assert_array_equal(
                    np.asarray(PIL.Image.open(again)), np.asarray(PIL.Image.open(path))
                )
            else:
                new, old = (
                    soundfile.read(name, dtype="int16")[0].astype(int) for name in (again, path)
                )
                np.testing.assert_allclose(new, old, atol=1)  # sines differ in their last bit


def test_the_sets_are_small_and_say_what_they_are():
    root = sample_data("text").parent
    assert sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) < 1.5e6
    readme = (root / "README.md").read_text()
    assert "Apache-2.0" in readme
    assert "synthesised" in readme


def test_package_data_takes_the_samples_along():
    import tomllib

    project = Path(__file__).resolve().parents[3] / "pyproject.toml"
    included = tomllib.loads(project.read_text())["tool"]["setuptools"]["package-data"]
    assert "testing/samples/**" in included["gemma_tuner"]
