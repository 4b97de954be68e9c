"""Make the bundled sample sets: ``python -m tests.make_samples FOLDER``.

Everything is drawn or computed here from fixed seeds, so the sets belong to this project and can
be made again. Random numbers come from ``random.Random.random``, the one method whose sequence
Python promises to keep.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import soundfile

# --- text: facts of a small closed world, each in three phrasings ---------------------------

_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_COLOURS = (
    "banana yellow, grass green, snow white, coal black, sky blue, tomato red, carrot orange, "
    "lemon yellow, frog green, milk white, crow black, sea blue, cherry red, pumpkin orange, "
    "plum purple, violet purple"
)
_OPPOSITES = (
    "hot cold, big small, up down, day night, fast slow, old new, open shut, wet dry, full empty, "
    "hard soft"
)
_VOICES = (
    "cow moo, dog woof, cat meow, sheep baa, duck quack, pig oink, hen cluck, owl hoot, "
    "snake hiss, bee buzz"
)


def _list_facts() -> list[tuple[tuple[str, str, str], str, str]]:
    """List what there is to know: three phrasings, what fills them, and the answer."""

    def split(pairs: str) -> list[tuple[str, str]]:
        return [(pair.split()[0], pair.split()[1]) for pair in pairs.split(", ")]

    opposites = split(_OPPOSITES)
    after = ("What day comes after {}?", "Name the day after {}.", "{} is followed by")
    before = ("What day comes before {}?", "Name the day before {}.", "{} comes right after")
    colour = ("What colour is the {}?", "Name the colour of the {}.", "The colour of the {} is")
    opposite = ("What is the opposite of {}?", "Name the opposite of {}.", "Not {} but")
    voice = ("What does the {} say?", "Name the sound of the {}.", "The {} says")
    total = ("What is {}?", "Work out {}.", "{} =")
    return [
        *((after, day, _DAYS[(index + 1) % 7]) for index, day in enumerate(_DAYS)),
        *((before, day, _DAYS[index - 1]) for index, day in enumerate(_DAYS)),
        *((colour, thing, answer) for thing, answer in split(_COLOURS)),
        *((opposite, word, answer) for word, answer in opposites),
        *((opposite, word, answer) for answer, word in opposites),
        *((voice, animal, answer) for animal, answer in split(_VOICES)),
        *((total, f"{a} + {b}", str(a + b)) for a in range(1, 6) for b in range(1, 5)),
    ]


def list_text_rows() -> list[dict[str, str]]:
    """List the text examples."""
    # A test example asks for a fact in a phrasing that training shows only for other facts, and
    # training shows that fact in the two other phrasings: learnable, and not to be had by rote.
    rows = [
        # Three facts of five give one phrasing, each time another, to the test split: 48 of 240.
        (
            "test" if number % 5 < 3 and which == number % 3 else "train",
            phrasing.format(gap),
            answer,
        )
        for number, (phrasings, gap, answer) in enumerate(_list_facts())
        for which, phrasing in enumerate(phrasings)
    ]
    rng = random.Random(1)
    rows.sort(key=lambda _: rng.random())
    return [
        {"id": f"text/{index:03}", "split": split, "prompt": prompt, "response": response}
        for index, (split, prompt, response) in enumerate(rows)
    ]


# --- chat: the same kind of facts in two turns, in the language that the system turn asks for ----

_CHAT_DAYS = (
    "Monday Montag, Tuesday Dienstag, Wednesday Mittwoch, Thursday Donnerstag, Friday Freitag, "
    "Saturday Samstag, Sunday Sonntag"
)
_CHAT_NUMBERS = (
    "one eins, two zwei, three drei, four vier, five fünf, six sechs, seven sieben, eight acht, "
    "nine neun, ten zehn"
)
_SYSTEMS = ("You answer in English.", "You answer in German.")


def list_chat_rows() -> list[dict[str, Any]]:
    """List the conversations: a system turn, and two questions, one about the other's answer."""
    # A test conversation asks in a phrasing that training shows for other words, and training
    # shows the same answers in the other phrasing.
    days = [tuple(pair.split()) for pair in _CHAT_DAYS.split(", ")]
    numbers = [tuple(pair.split()) for pair in _CHAT_NUMBERS.split(", ")]
    after = (("What day comes after {}?", "Name the day after {}."), "And after that?", 1)
    before = (("What day comes before {}?", "Name the day before {}."), "And before that?", -1)
    more = (("What is {} and one?", "Add one to {}."), "And one more?", 1)
    # A fact is its phrasings, the follow-up, the word asked about, and the two answers.
    facts = [
        (phrasings, follow_up, days[at][0], days[(at + step) % 7], days[(at + 2 * step) % 7])
        for phrasings, follow_up, step in (after, before)
        for at in range(7)
    ] + [(*more[:2], numbers[at][0], numbers[at + 1], numbers[at + 2]) for at in range(8)]
    rows = []
    for number, (phrasings, follow_up, word, first, second) in enumerate(facts):
        for language, system in enumerate(_SYSTEMS):
            for which, phrasing in enumerate(phrasings):
                # Half of the facts give one phrasing in each language to the test split.
                is_test = number % 2 == 0 and which == (number // 2 + language) % 2
                texts = (phrasing.format(word), first[language], follow_up, second[language])
                turns = zip(("user", "assistant") * 2, texts, strict=True)
                messages = [{"role": "system", "content": system}]
                messages += [{"role": role, "content": text} for role, text in turns]
                rows.append(("test" if is_test else "train", messages))
    rng = random.Random(4)
    rows.sort(key=lambda _: rng.random())
    return [
        {"id": f"chat/{index:03}", "split": split, "messages": messages}
        for index, (split, messages) in enumerate(rows)
    ]


# --- image: one shape in one colour on a grey ground ----------------------------------------

_SHAPES = ("circle", "square", "triangle", "star")
_PAINTS = {
    "red": (215, 35, 35),
    "orange": (245, 140, 20),
    "yellow": (245, 225, 40),
    "green": (40, 150, 60),
    "blue": (40, 80, 205),
    "purple": (130, 50, 160),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
}
_OVERSAMPLING = 4  # drawn so much larger and averaged, for smooth edges


def draw_shape(shape: str, colour: str, rng: random.Random) -> PIL.Image.Image:
    """Draw one shape at a random size, place and tilt."""
    width, height = (48 + int(48 * rng.random()) for _ in range(2))
    # Greys between the black and the white paint, so that every colour stands out.
    grey = 120 + int(60 * rng.random())
    ground = tuple(grey + int(16 * rng.random()) - 8 for _ in range(3))
    paint = tuple(
        min(255, max(0, level + int(25 * rng.random()) - 12)) for level in _PAINTS[colour]
    )
    radius = min(width, height) * (0.28 + 0.14 * rng.random())
    centre = [radius + (side - 2 * radius) * rng.random() for side in (width, height)]
    tilt = math.radians(30 * rng.random() - 15)

    image = PIL.Image.new("RGB", (width * _OVERSAMPLING, height * _OVERSAMPLING), ground)
    corners = [
        tuple(
            round(_OVERSAMPLING * (middle + radius * reach * wave(angle + tilt)))
            for middle, wave in zip(centre, (math.sin, lambda turn: -math.cos(turn)), strict=True)
        )
        for angle, reach in _list_corners(shape)
    ]
    PIL.ImageDraw.Draw(image).polygon(corners, fill=paint)
    return image.reduce(_OVERSAMPLING)


def _list_corners(shape: str) -> list[tuple[float, float]]:
    """List a shape's corners: radians clockwise from the top, and distance from 0 to 1."""
    starts = {"circle": (0, 90), "square": (45, 4), "triangle": (0, 3), "star": (0, 10)}
    first, count = starts[shape]
    return [
        (
            math.radians(first + 360 / count * corner),
            0.4 if shape == "star" and corner % 2 else 1.0,
        )
        for corner in range(count)
    ]


# --- audio: words of an invented language, from a formant synthesiser -----------------------

SAMPLE_RATE_HZ = 8_000
_WORDS = ("ma", "mi", "su", "lo", "na", "ki", "masu", "kilo", "nami", "loma")
_MEANINGS = {
    "ma": "house", "mi": "bow", "su": "boat", "lo": "light", "na": "rain", "ki": "sun",
    "masu": "houseboat", "kilo": "sunlight", "nami": "rainbow", "loma": "lighthouse",
}  # fmt: skip
_QUESTION_WORDS = ("ma", "ki")  # as questions about a picture: which colour, and which shape


@dataclass(frozen=True)
class _Sound:
    """What a mouth does for a while.

    Args:
        seconds: How long.
        formants_hz: The three resonances.
        voice: The level of the vocal cords, 0 to 1.
        hiss: The level of noise, 0 to 1.
        hiss_hz: Where the noise is centred.
    """

    seconds: float
    formants_hz: tuple[float, float, float]
    voice: float = 0.0
    hiss: float = 0.0
    hiss_hz: float = 3_000.0


# Source of the vowels: Peterson and Barney (1952), "Control methods used in a study of the
# vowels", table II, men. The consonants are ours, set by their spectrograms.
_SOUNDS: dict[str, tuple[_Sound, ...]] = {
    "a": (_Sound(0.20, (730, 1090, 2440), voice=1.0),),
    "i": (_Sound(0.20, (270, 2290, 3010), voice=1.0),),
    "o": (_Sound(0.20, (570, 840, 2410), voice=1.0),),
    "u": (_Sound(0.20, (300, 870, 2240), voice=1.0),),
    "m": (_Sound(0.09, (250, 1000, 2200), voice=0.3),),
    "n": (_Sound(0.09, (250, 1700, 2600), voice=0.3),),
    "l": (_Sound(0.08, (360, 1200, 2700), voice=0.5),),
    "s": (_Sound(0.13, (300, 1600, 2500), hiss=0.35, hiss_hz=3_400),),
    "k": (
        _Sound(0.05, (300, 1900, 2400)),
        _Sound(0.03, (300, 1900, 2400), hiss=0.6, hiss_hz=1_900),
    ),
}


@dataclass(frozen=True)
class _Speaker:
    """A voice: how high, and how long its vocal tract is (a child's formants lie higher)."""

    pitch_hz: float
    formant_scale: float


_SPEAKERS = tuple(_Speaker(95 + 18 * number, 0.92 + 0.03 * number) for number in range(8))
_GLIDE_SHARE = 0.2  # of a sound, at each of its ends
_TEST_SPEAKERS = (2, 5)  # heard in no training clip, yet between voices that are


def speak(word: str, speaker_number: int, rng: random.Random) -> np.ndarray:
    """Synthesise one word."""
    # Returns: Samples ``[frames]`` int16 at 8 kHz.
    speaker = _SPEAKERS[speaker_number]
    pace = 0.85 + 0.3 * rng.random()
    scale = speaker.formant_scale * (0.98 + 0.04 * rng.random())
    pitch_hz = speaker.pitch_hz * (0.94 + 0.12 * rng.random())
    fall = 0.1 + 0.15 * rng.random()
    margins_seconds = [0.02 + 0.06 * rng.random() for _ in range(2)]
    peak = 0.4 + 0.4 * rng.random()

    sounds = [sound for letter in word for sound in _SOUNDS[letter]]
    edges = np.cumsum([margins_seconds[0], *(sound.seconds * pace for sound in sounds)])
    times = np.arange(int((edges[-1] + margins_seconds[1]) * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ

    # Each sound is held for its middle part; between, the mouth glides from one to the next.
    targets = [sound for sound in sounds for _ in range(2)]
    targets = [
        replace(targets[0], voice=0, hiss=0),
        *targets,
        replace(targets[-1], voice=0, hiss=0),
    ]
    glides = _GLIDE_SHARE * np.diff(edges)
    holds = np.stack([edges[:-1] + glides, edges[1:] - glides], axis=1)
    knots = [edges[0] - 0.005, *holds.flat, edges[-1] + 0.005]

    def follow(values: Iterable[float]) -> np.ndarray:
        return np.interp(times, knots, list(values))

    formants_hz = [scale * follow(target.formants_hz[n] for target in targets) for n in range(3)]
    progress = (times - edges[0]) / (edges[-1] - edges[0])
    voice = _hum(pitch_hz * (1 - fall * progress), [*formants_hz, np.full_like(times, 3_500)])
    voice *= follow(target.voice for target in targets)

    noise = np.array([2 * rng.random() - 1 for _ in times])
    hiss = sum(
        _filter_noise(noise, centre_hz)
        * follow(target.hiss * (target.hiss_hz == centre_hz) for target in targets)
        for centre_hz in sorted({sound.hiss_hz for sound in sounds if sound.hiss})
    )
    samples = voice / np.abs(voice).max() + hiss + 0.002 * noise
    return np.round(samples / np.abs(samples).max() * peak * 32_767).astype(np.int16)


def _hum(pitch_hz: np.ndarray, formants_hz: Sequence[np.ndarray]) -> np.ndarray:
    """Sum the harmonics of the vocal cords, as loud as the formants let them be ``[frames]``."""
    phase = 2 * np.pi * np.cumsum(pitch_hz) / SAMPLE_RATE_HZ
    hum = np.zeros_like(pitch_hz)
    for harmonic in range(1, int(0.48 * SAMPLE_RATE_HZ / pitch_hz.max()) + 1):
        hz = harmonic * pitch_hz
        # -6 dB an octave: -12 of the glottis, +6 of the lips' radiation.
        gain = 1.0 / harmonic
        for formant_hz, width_hz in zip(formants_hz, (80, 100, 140, 200), strict=True):
            gain = gain * formant_hz**2 / np.hypot(formant_hz**2 - hz**2, width_hz * hz)
        hum += gain * np.sin(harmonic * phase)
    return hum


def _filter_noise(noise: np.ndarray, centre_hz: float) -> np.ndarray:
    """Keep the noise about a frequency, at a peak of 1 ``[frames]``."""
    hz = np.fft.rfftfreq(len(noise), 1 / SAMPLE_RATE_HZ)
    band = np.fft.irfft(np.fft.rfft(noise) * np.exp(-(((hz - centre_hz) / 500) ** 2)), len(noise))
    return band / np.abs(band).max()


# --- writing --------------------------------------------------------------------------------


def write_samples(folder: Path) -> None:
    """Write each set into a folder of its name within ``folder``."""
    for name in ("text", "chat", "image", "vqa", "audio", "translation", "multimodal"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    _write_manifest(folder / "text", list_text_rows())
    _write_manifest(folder / "chat", list_chat_rows())
    pictures = _write_images(folder / "image")
    clips = _write_clips(folder / "audio")
    _write_manifest(folder / "image", pictures)
    _write_manifest(folder / "audio", clips)
    # These three have no media of their own.
    _write_manifest(folder / "vqa", list_vqa_rows(pictures))
    _write_manifest(folder / "translation", list_translation_rows(clips))
    _write_manifest(folder / "multimodal", list_multimodal_rows(pictures, clips))


def list_vqa_rows(pictures: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """List a question for each picture: its colour, its shape, or whether it is of a colour."""
    colours = list(_PAINTS)
    rows = []
    for number, picture in enumerate(pictures):
        colour, shape = picture["response"].split()
        # Thirds that every colour, shape and take meets.
        kind = (number + number // 32) % 3
        guess = colour if number // 3 % 2 else colours[(number // 4 + 3) % len(colours)]
        prompt, response = (
            ("What colour is the shape?", colour),
            ("Which shape is it?", shape),
            (f"Is the shape {guess}?", "yes" if guess == colour else "no"),
        )[kind]
        rows.append(
            {
                "id": f"vqa/{number:03}",
                "split": picture["split"],
                "image": f"../image/{picture['image']}",
                "prompt": prompt,
                "response": response,
            }
        )
    return rows


def list_translation_rows(clips: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """List what each spoken word means in English."""
    return [
        {
            "id": f"translation/{number:03}",
            "split": clip["split"],
            "audio": f"../audio/{clip['audio']}",
            "prompt": "Translate the word that is spoken into English.",
            "response": _MEANINGS[clip["response"]],
        }
        for number, clip in enumerate(clips)
    ]


def list_multimodal_rows(
    pictures: Sequence[Mapping[str, str]], clips: Sequence[Mapping[str, str]]
) -> list[dict[str, str]]:
    """List a spoken question for each picture, so that neither the one nor the other is enough."""
    voices = {
        (split, word): itertools.cycle(
            [clip["audio"] for clip in clips if (clip["split"], clip["response"]) == (split, word)]
        )
        for split in ("train", "test")
        for word in _QUESTION_WORDS
    }
    rows = []
    for number, picture in enumerate(pictures):
        # As on a chequered board of colours and shapes, and the other way round in the next take.
        which = (number + number // 4 + number // 32) % 2
        clip = next(voices[picture["split"], _QUESTION_WORDS[which]])
        rows.append(
            {
                "id": f"multimodal/{number:03}",
                "split": picture["split"],
                "image": f"../image/{picture['image']}",
                "audio": f"../audio/{clip}",
                "prompt": "Answer the spoken question about the picture.",
                "response": picture["response"].split()[which],
            }
        )
    return rows


def _write_images(folder: Path) -> list[dict[str, str]]:
    """Write each shape in each colour five times, the last for testing."""
    rng = random.Random(2)
    rows = []
    # The take is the outer loop, so that the first rows already show every kind.
    for take in range(5):
        for colour in _PAINTS:
            for shape in _SHAPES:
                name = f"{len(rows):03}.png"
                draw_shape(shape, colour, rng).save(folder / name, optimize=True)
                rows.append(
                    {
                        "id": f"image/{len(rows):03}",
                        "split": "test" if take == 4 else "train",
                        "image": name,
                        "prompt": "What shape and colour is drawn? Answer in two words.",
                        "response": f"{colour} {shape}",
                    }
                )
    return rows


def _write_clips(folder: Path) -> list[dict[str, str]]:
    """Write each word twice from each speaker, two speakers for testing."""
    rng = random.Random(3)
    rows = []
    for speaker_number in [*range(len(_SPEAKERS))] * 2:
        for word in _WORDS:
            name = f"{len(rows):03}.flac"
            samples = speak(word, speaker_number, rng)
            soundfile.write(folder / name, samples, SAMPLE_RATE_HZ, subtype="PCM_16")
            rows.append(
                {
                    "id": f"audio/{len(rows):03}",
                    "split": "test" if speaker_number in _TEST_SPEAKERS else "train",
                    "audio": name,
                    "prompt": "Write the word that is spoken.",
                    "response": word,
                }
            )
    return rows


def _write_manifest(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "manifest.jsonl").write_text(lines, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the bundled sample sets.")
    parser.add_argument("folder", type=Path, help="where to write them")
    write_samples(parser.parse_args().folder)
