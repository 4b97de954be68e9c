"""Hostile media, weights, adapters and settings, for ``tests.fuzz``."""

from __future__ import annotations

import copy
import functools
import io
import json
import math
import random
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import soundfile
import torch

import gemma_tuner as gt
from gemma_tuner.checkpoints.loading import _explained
from gemma_tuner.checkpoints.weights import list_tensors
from gemma_tuner.cli.settings import RunSettings
from gemma_tuner.errors import CheckpointError
from gemma_tuner.media.audio import decode_audio
from gemma_tuner.models.adapter_files import (
    CONFIG,
    FINGERPRINT,
    TEMPLATE,
    WEIGHTS,
    hash_text,
    save_adapter,
)
from gemma_tuner.models.embeddings import MappedEmbedding
from gemma_tuner.records import Example, Image, Text, Turn
from gemma_tuner.settings import read_settings
from gemma_tuner.testing import tiny_model
from gemma_tuner.training.adapters import load_adapter
from tests.fuzz import Reader, mutate

_HUGE = (0, 1, 2, 255, 65_535, 65_536, 2**24, 2**31 - 1, 2**31, 2**32 - 1)


def _write(folder, name, content):
    (folder / name).write_bytes(content)


def _one(folder):
    return next(folder.iterdir())


# --- images -------------------------------------------------------------------------------------


def make_chunk(name: bytes, content: bytes) -> bytes:
    """A chunk of a PNG with its checksum."""
    return (
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
    )


def make_png(
    width,
    height,
    *,
    depth=8,
    colour=2,
    pixels=b"",
    lines=(0, 0),
    palette=False,
    extra=b"",
    frames=0,
):
    """A PNG whose header says what it likes; ``lines`` of so many zeros, so many times."""
    packer = zlib.compressobj(9)
    packed = packer.compress(pixels) + b"".join(
        packer.compress(bytes(lines[0])) for _ in range(lines[1])
    )
    extra += make_chunk(b"PLTE", bytes(768)) if palette else b""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + make_chunk(b"IHDR", head)
    if frames:
        content += make_chunk(b"acTL", struct.pack(">II", frames, 0))
    content += extra + make_chunk(b"IDAT", packed + packer.flush())
    return content + make_chunk(b"IEND", b"")


@functools.cache
def _pictures() -> tuple[bytes, ...]:
    noise = np.random.default_rng(0).integers(0, 255, (24, 40, 4), np.uint8)
    whole = PIL.Image.fromarray(noise)
    made = []
    for mode, kind, options in (
        *(("RGB", kind, {}) for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM")),
        *(("RGB", kind, {}) for kind in ("JPEG2000", "AVIF", "ICO")),
        *(("RGB", "TIFF", {"compression": c}) for c in ("tiff_lzw", "tiff_deflate", "jpeg")),
        *((mode, "TIFF", {}) for mode in ("CMYK", "I;16", "F", "1", "P", "LAB")),
        *((mode, "PNG", {}) for mode in ("1", "L", "LA", "P", "RGBA", "I;16")),
        *(("CMYK", "JPEG", {}), ("L", "JPEG", {"progressive": True})),
        *(("RGB", "TIFF", {"big_tiff": True}), ("RGBA", "WEBP", {"lossless": True})),
    ):
        exif = PIL.Image.Exif()
        exif[0x0112], exif[0x010E] = 6, "a camera"
        more = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}
        stream = io.BytesIO()
        image = (
            whole.convert("RGB").convert("L").convert(mode)
            if mode in ("I;16", "F")
            else (
                whole
                if mode == "RGBA"
                else whole.convert("RGB").convert(mode)
                if mode != "LAB"
                else PIL.Image.new("LAB", (40, 24))
            )
        )
        image.save(stream, kind, icc_profile=b"\0" * 200, **more, **options)
        made.append(stream.getvalue())
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        stream = io.BytesIO()
        whole.save(stream, kind, save_all=True, append_images=[whole.rotate(90), whole])
        made.append(stream.getvalue())
    return tuple(made)


def _make_odd_png(rng):
    width, height = rng.choice((1, 40, *_HUGE)), rng.choice((1, 24, *_HUGE))
    sizes = b"\0" * min(rng.choice((0, 100, 100_000)), 1 << 20)
    extra = b""
    match rng.randrange(7):
        case 0:
            extra = make_chunk(
                b"iCCP", b"icc\0\0" + zlib.compress(bytes(rng.choice((9, 1 << 26))))
            )
        case 1:
            extra = make_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 26)))
        case 2:
            extra = make_chunk(b"eXIf", b"II*\0" + rng.randbytes(60))
        case 3:
            extra = make_chunk(b"tRNS", rng.randbytes(rng.randrange(9)))
        case 4:
            extra = make_chunk(b"PLTE", rng.randbytes(rng.choice((0, 1, 3, 768, 1000))))
        case 5:
            extra = make_chunk(
                rng.choice((b"iTXt", b"tEXt", b"acTL", b"fcTL", b"fdAT")), rng.randbytes(26)
            )
        case _:
            pass
    return make_png(
        width,
        height,
        depth=rng.choice((1, 2, 4, 8, 16, 3)),
        colour=rng.choice((0, 2, 3, 4, 6, 5)),
        pixels=sizes,
        extra=extra,
        frames=rng.choice((0, 0, 100_000, 2**32 - 1)),
    )


def _make_huge_field(data: bytes, rng: random.Random) -> bytes:
    """A number of two, four or eight bytes near the beginning made another."""
    content = bytearray(data)
    width = rng.choice((2, 4, 8))
    place = rng.randrange(max(1, min(len(content) - width, rng.choice((64, 512, 1 << 20)))))
    order = rng.choice(("little", "big"))
    value = rng.choice((*_HUGE, 2**63 - 1, 2**64 - 1)) % (1 << 8 * width)
    content[place : place + width] = value.to_bytes(width, order)
    return bytes(content)


def _write_image(rng, folder):
    pictures = _pictures()
    match rng.randrange(4):
        case 0:
            content = _make_odd_png(rng)
        case 1:
            content = _make_huge_field(rng.choice(pictures), rng)
        case _:
            content = mutate(rng.choice(pictures), rng, *pictures)
    _write(folder, "picture", content)


@functools.cache
def _image_collator():
    return gt.ImageCollator(tiny_model("gemma4-e2b")[1])


def read_image(folder):
    question = Turn("user", (Image(str(_one(folder))), Text("what is it?")))
    _image_collator()([Example("row", (question, Turn("assistant", (Text("a cat"),))))])


# --- sound --------------------------------------------------------------------------------------


@functools.cache
def _sounds() -> tuple[bytes, ...]:
    rng = np.random.default_rng(0)
    made = []
    for kind, subtype, rate_hz, channels in (
        *(
            ("WAV", s, 16_000, 1)
            for s in ("PCM_16", "PCM_24", "FLOAT", "ULAW", "PCM_U8", "DOUBLE")
        ),
        *(("WAV", s, 8_000, 1) for s in ("IMA_ADPCM", "MS_ADPCM", "GSM610")),
        *(("WAVEX", "PCM_16", 48_000, 6), ("WAV", "PCM_16", 44_099, 2)),
        *(("FLAC", "PCM_16", 44_100, 2), ("FLAC", "PCM_24", 48_000, 6)),
        *(("OGG", "VORBIS", 44_100, 2), ("OGG", "OPUS", 48_000, 1)),
        *(("MP3", "MPEG_LAYER_III", 44_100, 2), ("MP3", "MPEG_LAYER_III", 16_000, 1)),
        *((kind, "PCM_16", 22_050, 1) for kind in ("AIFF", "AU", "CAF", "W64", "RF64", "NIST")),
    ):
        stream = io.BytesIO()
        sound = rng.normal(0, 0.1, (rate_hz // 4, channels))
        soundfile.write(stream, sound, rate_hz, subtype, format=kind)
        made.append(stream.getvalue())
    return (*made, *_contained())


def _contained() -> list[bytes]:
    import av

    made = []
    for form, codec in (("mp4", "aac"), ("adts", "aac"), ("matroska", "aac")):
        stream = io.BytesIO()
        with av.open(stream, "w", format=form) as opened:
            track = opened.add_stream(codec, rate=16_000, layout="mono")
            noise = np.random.default_rng(0).normal(0, 0.1, (1, 4096)).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(noise, "fltp", "mono")
            frame.sample_rate = 16_000
            for packet in (*track.encode(frame), *track.encode(None)):
                opened.mux(packet)
        made.append(stream.getvalue())
    return made


def make_wav(rate_hz=16_000, channels=1, bits=16, *, data=b"\0" * 3200, claimed=None, form=1):
    """A WAV whose header says what it likes."""
    block = channels * bits // 8
    head = struct.pack(
        "<HHIIHH", form, channels, rate_hz, (rate_hz * block) % 2**32, block % 65_536, bits
    )
    claimed = len(data) if claimed is None else claimed
    body = b"WAVEfmt " + struct.pack("<I", len(head)) + head + b"data"
    body += struct.pack("<I", claimed % 2**32) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _write_audio(rng, folder):
    sounds = _sounds()
    match rng.randrange(5):
        case 0:
            content = make_wav(
                rng.choice((8000, 16_000, 44_099, 47_999, 767_999, *_HUGE)),
                rng.choice((0, 1, 2, 6, 1024, 65_535)),
                rng.choice((0, 1, 4, 8, 16, 24, 32, 64, 65_535)),
                data=rng.randbytes(rng.choice((0, 1, 3200, 100_000))),
                claimed=rng.choice((None, *_HUGE)),
                form=rng.choice((1, 2, 3, 6, 7, 17, 49, 0x55, 0xFFFE)),
            )
        case 1 | 2:
            content = _make_huge_field(rng.choice(sounds), rng)
        case _:
            content = mutate(rng.choice(sounds), rng, *sounds)
    _write(folder, "sound", content)


def read_audio(folder):
    decode_audio(_one(folder), key="row")


# --- safetensors --------------------------------------------------------------------------------


def make_safetensors(header: object, data: bytes = b"", *, num_bytes: int | None = None) -> bytes:
    """A safetensors file whose header says what it likes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if num_bytes is None else num_bytes).to_bytes(8, "little") + text + data


_DTYPES = ("F32", "BF16", "F16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "X", None, 3)
_SIZES = (0, 1, 4, 8, -1, -8, 2**31, 2**63, 2**64, 10**30, 1.5, None, "4", [], True)


def _make_weights(rng):
    dtype, size = rng.choice((("F32", 4), ("BF16", 2), ("F16", 2), ("F64", 8), ("F8_E4M3", 1)))
    shape = [rng.choice((1, 2, 4)) for _ in range(rng.choice((0, 1, 2, 2, 2, 2, 2, 9)))]
    data = bytes(size * math.prod(shape))
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}
    header = {"table": entry}
    match rng.randrange(9):
        case 0:
            entry["dtype"] = rng.choice(_DTYPES)
        case 1:
            shape[:1] = [rng.choice(_SIZES)]
        case 2:
            entry["data_offsets"][rng.randrange(2)] = rng.choice(_SIZES)
        case 3:
            entry[rng.choice([*entry])] = rng.choice(_SIZES)
        case 4:
            del entry[rng.choice([*entry])]
        case 5:
            return _make_odd_header(rng, header, data)
        case 6:
            return mutate(make_safetensors(header, data), rng)
        case _:
            pass
    return make_safetensors(header, data)


def _make_odd_header(rng, header, data):
    text = json.dumps(header).encode()
    more = ({}, {"a": 1}, [], None, {"a": "b" * 999})
    return rng.choice(
        (
            make_safetensors(text[:-1] + b"," + text[1:], data),  # one name twice
            make_safetensors(b"[" * rng.choice((10, 5000)), data),
            make_safetensors(header, data, num_bytes=rng.choice((*_HUGE, 2**63, 2**64 - 1))),
            make_safetensors(rng.choice(([], None, 3, "a", {"table": None}, {"": {}})), data),
            make_safetensors({**header, "__metadata__": rng.choice(more)}, data),
            make_safetensors({**header, "other": header["table"]}, data),
        )
    )


@functools.cache
def _index() -> bytes:
    return json.dumps({"weight_map": {"table": "model.safetensors"}}).encode()


def _write_safetensors(rng, folder):
    _write(folder, "model.safetensors", _make_weights(rng))
    _write(folder, "config.json", b'{"model_type": "gemma4"}')
    if not rng.randrange(4):
        odd = rng.choice(
            (
                {},
                [],
                {"weight_map": []},
                {"weight_map": {"a": 1}},
                {"weight_map": {"table": "../x"}},
                {"weight_map": None},
                {"weight_map": {"table": ["model.safetensors"]}},
            )
        )
        content = rng.choice((mutate(_index(), rng), json.dumps(odd).encode(), _index()))
        _write(folder, "model.safetensors.index.json", content)


def _read_safetensors(folder):
    def export():
        for tensor in list_tensors(folder).values():
            tensor.read()

    def map_table():
        with _explained(str(folder)):
            path = folder / "model.safetensors"
            MappedEmbedding(path, "table", scale=1.0, dtype=torch.float32)(torch.tensor([0]))

    refused = None
    for read in (export, map_table):
        try:
            read()
        except CheckpointError as error:
            refused = error
    if refused:
        raise refused


# --- adapters -----------------------------------------------------------------------------------


@functools.cache
def _tiny():
    return tiny_model("gemma4-e2b")


@functools.cache
def _adapter() -> dict[str, bytes]:
    """The files of a valid adapter."""
    model, processor = tiny_model("gemma4-e2b")
    wrapped = gt.add_lora(model, gt.LoraConfig(rank=2))
    from gemma_tuner.training.adapters import note_collator

    note_collator(wrapped, gt.TextCollator(processor))
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(wrapped, folder)
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


_ODD = (
    *(None, True, False, 0, -1, 1.5, 2**31, 2**70, 10**400, float("nan"), float("inf"), "", "a"),
    *("LORA", "BONE", "IA3", "(((.*)*)*)*!", "[", "(?P<a>.*", [], {}, [[]], [None], {"a": None}),
    *({"": 10**9}, {".*": "a"}, [0] * 1000, ["q_proj"], "all-linear", ["a" * 5000], {"a": {}}),
    *(r"(a|a)*b", r"(.*a){30}", r"(?:.?){60}.{60}x", r"^(\w+\s?)*$", ".*" * 30 + "!"),
    *(r"(?=(.*)*)x", r"(a|aa)+$", r"(.)(\1*)*x", "gaussian", "pissa", "cpu"),
)


TEMPLATES = (
    "{% for a in range(10**9) %}x{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    *("{{ messages.__class__ }}", "{{ 1 / 0 }}", "{% include '/etc/passwd' %}", "{{", ""),
)


def _write_adapter(rng, folder):
    files = dict(_adapter())
    match rng.randrange(5):
        case 0 | 1:
            config = json.loads(files[CONFIG])
            for _ in range(rng.choice((1, 1, 1, 2, 5))):
                name = rng.choice((*config, "r", "lora_alpha", "target_modules", "rank_pattern"))
                if rng.randrange(5):
                    config[name] = rng.choice(_ODD)
                else:
                    config.pop(name, None)
            files[CONFIG] = json.dumps(config).encode()
        case 2:
            known = json.loads(files[FINGERPRINT])
            place = rng.choice((known, known["collator"]))
            place[rng.choice((*place, "step", "x"))] = rng.choice(_ODD)
            files[FINGERPRINT] = json.dumps(known).encode()
        case 3:
            name = rng.choice((CONFIG, FINGERPRINT, TEMPLATE, WEIGHTS, WEIGHTS))
            files[name] = mutate(files[name], rng)
        case _:
            size = int.from_bytes(files[WEIGHTS][:8], "little")
            header = json.loads(files[WEIGHTS][8 : 8 + size])
            name = rng.choice([*header])
            entry = header.pop(name)
            if isinstance(entry, dict) and "shape" in entry:
                which = rng.choice(("dtype", "shape", "name", "gone"))
                if which == "dtype":
                    entry["dtype"] = rng.choice(("F16", "I32", "U32", "BF16", "I64"))
                elif which == "shape":
                    entry["shape"] = rng.choice(
                        ([], [0], entry["shape"][::-1], [1, *entry["shape"]])
                    )
                new = rng.choice(
                    (
                        "a",
                        "",
                        "x" * 999,
                        f"{name}.x",
                        name.replace(".0.", ".99999."),
                        name.replace("lora_A", "lora_C"),
                    )
                )
                header |= {} if which == "gone" else {new if which == "name" else name: entry}
            else:
                header["__metadata__"] = rng.choice(_ODD)
            files[WEIGHTS] = make_safetensors(header, files[WEIGHTS][8 + size :])
    if not rng.randrange(40):
        known = json.loads(_adapter()[FINGERPRINT])
        template = rng.choice(TEMPLATES)
        known["collator"]["chat_template_sha256"] = hash_text(template)
        files |= {TEMPLATE: template.encode(), FINGERPRINT: json.dumps(known).encode()}
    for name, content in files.items():
        if rng.randrange(100):
            _write(folder, name, content)


def _read_adapter(folder):
    from gemma_tuner.training.adapters import compare_collator, follow_training

    model, processor = copy.deepcopy(_tiny()[0]), _tiny()[1]
    wrapped = load_adapter(model, folder)
    processor = follow_training(wrapped, processor)
    collator = gt.TextCollator(processor)
    compare_collator(wrapped, collator, "this run")
    question = Turn("user", (Text("what is it?"),))
    collator([Example("row", (question, Turn("assistant", (Text("a cat"),))))])


# --- settings -----------------------------------------------------------------------------------

_SETTINGS = (
    b"data: [a.jsonl]\nmax_steps: 3\nlearning_rate: 0.0002\nbetas: [0.9, 0.99]\nout: runs/x\n",
    b'{"max_steps": 3, "batch_size": 2, "schedule": "cosine", "trackers": ["wandb"]}',
    b"model: a/b\ntrain: true\nlora_parameters: {rank: 8, scale: 20.0, dropout: 0.0}\n"
    b"lr_schedule: {name: cosine_decay, warmup: 10, arguments: [1e-5, 1000, 1e-7]}\n"
    b"optimizer: adamw\noptimizer_config: {adamw: {betas: [0.9, 0.98], eps: 1e-6}}\niters: 9\n",
)
_VALUES = (
    *(
        "9" * 5000,
        "1e999",
        ".inf",
        ".nan",
        "-.inf",
        "2026-13-45",
        "2026-02-30 25:61:61",
        "~",
        "''",
    ),
    *(
        "2026-01-01",
        "0x" + "f" * 4000,
        "0b1",
        "0o9",
        "1:2:3:4:5",
        "190:20:30",
        "!!binary aGk=",
        "*a",
    ),
    *(
        "!!set {a, b}",
        "!!omap [a: 1]",
        "!!python/object/apply:os.getcwd []",
        "!!int x",
        "!!float x",
    ),
    *("!!timestamp x", "!!bool x", "!!null x", "&a [*a]", "[" * 3000, "{" * 3000, "{a: {b: c}}"),
    *(
        "{? [a] : b}",
        "{{a: b}: c}",
        "? ? ?",
        "!!map [a]",
        "!!seq {a: b}",
        "!!binary '\xff'",
        "|\n x",
    ),
    *(
        "'\\ud800'",
        '"\\ud800"',
        '"\\0"',
        '"\\U0010FFFF"',
        '"\\UFFFFFFFF"',
        "<<",
        "=",
        "!",
        "%",
        "@",
        "`",
    ),
    *(
        "[1, [2]]",
        "1_000",
        "1__0",
        "+",
        "-",
        ".",
        "0.",
        "._",
        "1e",
        "-0x",
        "0x",
        "0b",
        "1" * 400 + ":1",
    ),
    *("!<tag:yaml.org,2002:int> 0x_", "2001-1-1 0:0:0 +99:99", "2026-01-01T00:00:00+24:00"),
)


def _write_settings(rng, folder):
    if not rng.randrange(3):
        content = mutate(rng.choice(_SETTINGS), rng, *_SETTINGS)
    elif rng.randrange(2):
        names = ("seed", "learning_rate", "output_dir", "keep_best", "rank", "alpha", "dropout")
        value = rng.choice((*_VALUES, "1", "1", "0.5", "true", "a", "[q_proj]", "-1", "1e-3"))
        content = f"max_steps: 3\n{rng.choice(names)}: {value}\n".encode("utf-8", "surrogatepass")
    else:
        lines = rng.choice(_SETTINGS[::2]).decode().splitlines()
        names = (
            "max_steps",
            "learning_rate",
            "betas",
            "out",
            "trackers",
            "lora_parameters",
            "seed",
        )
        names += (
            "lr_schedule",
            "optimizer_config",
            "optimizer",
            "<<",
            "? [a]",
            "train",
            "num_layers",
        )
        for _ in range(rng.choice((1, 1, 2, 4))):
            line = f"{rng.choice((*names, *_VALUES[:30]))}: {rng.choice(_VALUES)}"
            lines.insert(rng.randrange(len(lines) + 1), line)
        if not rng.randrange(3):
            inner = rng.choice(("rank", "scale", "dropout", "keys"))
            lines.append(f"lora_parameters: {{{inner}: {rng.choice(_VALUES)}}}")
        if not rng.randrange(3):
            lines.append(
                f"lr_schedule: {{name: cosine_decay, arguments: [{rng.choice(_VALUES)}]}}"
            )
        content = "\n".join(lines).encode("utf-8", "surrogatepass")
    _write(folder, "settings.yaml", content)


def _read_settings(folder):
    import dataclasses

    ours = [field.name for field in dataclasses.fields(gt.TrainConfig)]
    known = {field.name for field in dataclasses.fields(RunSettings)} | {*ours, "data", "model"}
    known |= {"out", "iters", "rank", "alpha", "dropout", "targets", "epsilon"}
    found = read_settings(_one(folder), known)
    gt.TrainConfig.from_dict({name: found[name] for name in ours if name in found})
    lora = {name: found[name] for name in ("rank", "alpha", "dropout", "targets") if name in found}
    gt.LoraConfig(**lora)


READERS = {
    "image": Reader(_write_image, read_image),
    "audio": Reader(_write_audio, read_audio),
    "safetensors": Reader(_write_safetensors, _read_safetensors),
    "adapter": Reader(_write_adapter, _read_adapter),
    "settings": Reader(_write_settings, _read_settings),
}
