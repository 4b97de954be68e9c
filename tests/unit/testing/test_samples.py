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

COUNTS = {"text": (192, 48), "image": (128, 32), "audio": (120, 40)}


def read_rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def test_finds_every_set_and_names_them_when_asked_for_another():
    for modality in COUNTS:
        assert (sample_data(modality) / "manifest.jsonl").is_file()
    with pytest.raises(ConfigError, match="'video'; it may be text, image, audio"):
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
    # Imported here: coverage of the maker is this test's alone.
    from gemma_tuner.testing.make_samples import write_samples

    write_samples(tmp_path)
    for modality in COUNTS:
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
