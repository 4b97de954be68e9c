"""Every writer of the package as a program that may be killed and started again: ``kills``."""

import functools
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import PIL.Image
import pyarrow
from safetensors.torch import load_file

import gemma_tuner as gt
from gemma_tuner.checkpoints.mlx import from_mlx
from gemma_tuner.checkpoints.packing import pack
from gemma_tuner.collators.multimodal import MultimodalCollator
from gemma_tuner.doctor.report import Report as Examination
from gemma_tuner.evaluation.report import Report
from gemma_tuner.evaluation.report_files import write_report
from gemma_tuner.evaluation.samples import SampleGenerations
from gemma_tuner.export.adapter import export_adapter
from gemma_tuner.export.deltas import read_adapter
from gemma_tuner.export.gguf import export_gguf, export_gguf_adapter
from gemma_tuner.export.merged import export_merged
from gemma_tuner.export.mlx import export_mlx, import_mlx
from gemma_tuner.models.adapter_files import save_adapter
from gemma_tuner.records import StoredObject
from gemma_tuner.settings import parse_file, save_settings
from gemma_tuner.sources.bigquery.parts import Column, PartFolder, ReadSession
from gemma_tuner.storage.cache import MediaCache
from gemma_tuner.streaming.quarantine import BadExample, Budget, Quarantine
from gemma_tuner.training.checkpoint import list_checkpoints, read_state
from gemma_tuner.training.config import TrainConfig
from gemma_tuner.training.reporting.metrics import EvalRecord
from gemma_tuner.training.trainer import Trainer
from tests.examples import example, picture
from tests.export_parts import add_trained_lora, save_base

STEPS, SAVE_EVERY, KEEP = 4, 2, 1


@dataclass(frozen=True, slots=True)
class Writer:
    """What is killed while it writes below ``folder``.

    Args:
        write: As a program does, and as it does when it is started again after a kill.
        read: What a reader makes of what is there, as JSON; raises where it is a mix.
        prepare: Makes what is there before.
        between: What may be read besides the old and the new; None where ``read`` judges alone.
    """

    write: Callable[[Path], object]
    read: Callable[[Path], Any]
    prepare: Callable[[Path], object] = lambda folder: None
    between: tuple[Any, ...] | None = ()


def digest(path):
    """Names and contents of a file or a folder, hidden ones left out; None without either."""
    if not path.exists():
        return None
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    names = {file: str(file.relative_to(path)) for file in files}
    return {
        name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file, name in names.items()
        if not any(part.startswith(".") and part != "." for part in name.split("/"))
    }


# --- what is made once, before any child --------------------------------------------------------


@functools.cache
def tiny():
    return gt.testing.tiny_model("gemma4-e2b")


@functools.cache
def adapted(seed):
    model, _ = gt.testing.tiny_model("gemma4-e2b")
    return add_trained_lora(model, seed=seed, targets=("language",))


@functools.cache
def base():
    """A base, and an adapter of it in both forms, beside what is killed."""
    folder = Path(os.environ["KILLS_BASE"]) / "base"
    if not folder.exists():
        model, _ = save_base("gemma4-e2b", folder / "model")
        export_adapter(add_trained_lora(model, targets=("language",)), folder / "adapter")
        export_mlx(folder / "adapter", folder / "mlx", base=folder / "model")
    return folder


def warm():
    """Make all of that: a child begins with it."""
    for make in (tiny, lambda: adapted(1), lambda: adapted(2), base):
        make()


# --- a run --------------------------------------------------------------------------------------


def write_rows(folder):
    data = folder / "data"
    data.mkdir()
    rows = []
    for number in range(8):
        PIL.Image.new("RGB", (20, 20), (number * 30, 80, 99)).save(data / f"{number}.png")
        row = {"id": f"r{number}", "prompt": "Which colour?", "response": f"Colour {number}"}
        rows.append(json.dumps({**row, "image": f"{number}.png"}) + "\n")
    (data / "5.png").write_bytes((data / "5.png").read_bytes()[:40])
    (data / "rows.jsonl").write_text("".join(rows))


def train(folder):
    """Settings, manifest, quarantine, checkpoints, best adapter, log, samples, two adapters."""
    model, processor = tiny()
    model = gt.add_lora(model, gt.LoraConfig(rank=2, targets=("language",)))
    run = folder / "run"
    save_settings(run, {"data": "rows", "max_steps": STEPS})
    stream = gt.stream_local(
        folder / "data" / "rows.jsonl", cache_dir=folder / "cache", max_bad_fraction=0.3
    )
    config = TrainConfig(
        max_steps=STEPS,
        batch_size=2,
        gradient_accumulation=1,
        learning_rate=1e-2,
        log_every_steps=1,
        eval_every_steps=1,
        save_every_steps=SAVE_EVERY,
        keep_checkpoints=KEEP,
        progress=False,
        output_dir=run,
    )
    collator = MultimodalCollator(processor)
    samples = SampleGenerations(collator, [stream[0]], every_steps=2, max_new_tokens=2)
    held_out = gt.stream_rows([{"prompt": "Say", "response": "yes"}], cache_dir=folder / "cache")
    trainer = Trainer(model, stream, collator, config, eval_stream=held_out, samples=samples)
    trainer.fit(resume=True)
    trainer.save(folder / "adapter")
    if not (folder / "export").exists():
        export_adapter(trainer.model, folder / "export")


def read_run(folder):
    """What the resumed run, the page and stock PEFT find; whatever can be opened is whole."""
    run = folder / "run"
    found = {"settings": digest(run / "settings.yaml")}
    for checkpoint in list_checkpoints(run):
        assert read_state(checkpoint).step == int(checkpoint.name[5:])
        for name in ("adapter_model.safetensors", "optimizer.safetensors"):
            load_file(checkpoint / name)
        read_adapter(checkpoint)
    found["checkpoints"] = digest(run / "checkpoints")
    for name in ("adapter", "export", *sorted(str(p) for p in run.glob("best/step-*"))):
        if (folder / name / "adapter_config.json").exists():
            read_adapter(folder / name)
            found[name] = digest(folder / name)
    if (run / "log.jsonl").exists():
        lines = (run / "log.jsonl").read_text().split("\n")[:-1]
        records = [json.loads(line) for line in lines]
        steps = [record["step"] for record in records if record["kind"] == "step"]
        assert steps == list(range(1, len(steps) + 1)), steps
        losses = [record["step"] for record in records if record["kind"] == "eval"]
        assert losses == list(range(len(losses))), losses
        found["steps"] = [
            {k: v for k, v in record.items() if k in ("step", "kind", "loss", "grad_norm")}
            for record in records
            if record["kind"] in ("step", "eval")
        ]
    if (run / "samples.jsonl").exists():
        lines = (run / "samples.jsonl").read_text().split("\n")[:-1]
        found["samples"] = [json.loads(line)["prediction"] for line in lines]
        for line in lines:
            for name in json.loads(line)["media"]:
                with PIL.Image.open(run / "samples" / name) as image:
                    image.load()
    found["bad"] = [str(one) for one in Quarantine(run / "quarantine.jsonl", Budget()).inspect()]
    return found


# --- adapters, and what is made of them ---------------------------------------------------------


def read_peft(folder):
    """What stock PEFT makes of a folder: the adapter, by a hash; None where it refuses."""
    path = folder / "adapter"
    if not (path / "adapter_config.json").exists():
        return "refused"
    model = peft.PeftModel.from_pretrained(gt.testing.tiny_model("gemma4-e2b")[0], str(path))
    tensors = peft.get_peft_model_state_dict(model)
    content = b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))
    read_adapter(path)
    return [hashlib.sha256(content).hexdigest(), digest(path)]


def save_changed(folder, seed):
    """An adapter that differs from the other one in all of its files."""
    model = adapted(seed)
    rank = model.peft_config["default"]
    rank.lora_alpha = 8 * seed
    save_adapter(model, folder / "adapter", step=seed)


def save_among_others(folder):
    folder.joinpath("adapter", "notes").mkdir(parents=True, exist_ok=True)
    folder.joinpath("adapter", "notes", "mine.txt").write_text("mine")
    save_changed(folder, 1)


def new(name, export):
    """A writer of a folder or file that is whole or not there."""

    def write(folder):
        if not (folder / name).exists():
            export(base(), folder / name)

    def read(folder):
        assert {p.name for p in folder.iterdir() if not p.name.startswith(".")} <= {name}
        return digest(folder / name)

    return Writer(write, read)


# --- streams ------------------------------------------------------------------------------------


def write_texts(folder):
    rows = [{"prompt": "q", "response": f"a{number}"} for number in range(6)]
    rows[3]["response"] = ""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.utime(folder / "rows.jsonl", (1, 1))


def open_texts(folder, **options):
    return gt.stream_local(
        folder / "rows.jsonl", cache_dir=folder / "cache", max_bad_fraction=0.5, **options
    )


def read_texts(folder):
    """The rows of a stream that is opened now, and what it says of those that are bad."""
    stream = open_texts(folder)
    bad = [f"{one.key} {one.reason}" for one in stream.inspect_quarantine()]
    return [sorted(one.turns[-1].text for one in stream), bad]


def prepare_refresh(folder):
    write_texts(folder)
    open_texts(folder)
    text = (folder / "rows.jsonl").read_text()
    (folder / "rows.jsonl").write_text(text.replace('"a5"', '""  '))
    os.utime(folder / "rows.jsonl", (1, 1))  # a manifest of the same name


BAD = [
    BadExample.explain(gt.DataError(f"reason {number}", key=f"k{number}"), f"f:{number}", "decode")
    for number in range(4)
]


def add_bad(folder):
    quarantine = Quarantine(folder / "bad.jsonl", Budget())
    for record in BAD:
        quarantine.add(record)


def replace_bad(folder):
    Quarantine(folder / "bad.jsonl", Budget()).replace(BAD[2:])


def read_bad(folder):
    return sorted(one.key for one in Quarantine(folder / "bad.jsonl", Budget()).inspect())


OBJECTS = [StoredObject(f"gs://b/{number}", generation=number + 1) for number in range(6)]
MEDIA = [bytes([number]) * 3000 for number in range(6)]


def fill_cache(folder):
    """More than fits, so that the oldest go."""
    cache = MediaCache(folder / "media", max_bytes=10_000, min_free_bytes=0)
    for stored, content in zip(OBJECTS, MEDIA, strict=True):
        if cache.read(stored) is None:
            cache.write(stored, content)


def read_cache(folder):
    """What is found is what was kept, and the folder is within its budget."""
    cache = MediaCache(folder / "media", max_bytes=10_000, min_free_bytes=0)
    for stored, content in zip(OBJECTS, MEDIA, strict=True):
        assert cache.read(stored) in (None, content)
    path = folder / "media"
    held = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert held <= 10_000


SCHEMA = pyarrow.schema({"a": pyarrow.int64()})
BATCHES = [pyarrow.record_batch([[3 * n, 3 * n + 1, 3 * n + 2]], schema=SCHEMA) for n in range(3)]


def spool_table(folder):
    """A table of one stream, read on from where the part ends."""
    with PartFolder(folder / "rows", "id") as parts:
        record = parts.record
        if record.session is None:
            schema = SCHEMA.serialize().to_pybytes().hex()
            record.session = ReadSession(["s"], schema, "", 9, 100)
            record.table, record.columns = "p.d.t", [Column("a", "INT64", "NULLABLE")]
            parts.save_record()
        (part,) = parts.open_parts()
        for batch in BATCHES[part.num_rows // 3 :]:
            part.append(batch.serialize().to_pybytes(), 3)
            part.sync()
        record.session.whole["0"] = part.num_rows
        parts.save_record()
        part.close()


def read_table(folder):
    with PartFolder(folder / "rows", "id") as parts:
        rows = []
        for part in parts.open_parts():
            rows += [value for batch in part.read_batches() for value in batch["a"].to_pylist()]
            part.close()
        assert rows == list(range(len(rows)))
        return rows


# --- settings and reports -----------------------------------------------------------------------


def write_report_of(folder, seed):
    shown = example(picture(seed), "What?", key="k")
    held_out = {"model": EvalRecord(0, 1.0 * seed, 2.0, 3, 1)}
    report = Report("tiny", ("model",), held_out, (), (), {}, {})
    write_report(report, folder / "report", {"k": shown})


def examine(folder, number):
    Examination({"number": number}, {}, {}, ()).write(folder / "doctor.json")


WRITERS = {
    "run": Writer(train, read_run, write_rows, between=None),
    "adapter": Writer(lambda f: save_changed(f, 1), read_peft),
    "adapter over another": Writer(
        lambda f: save_changed(f, 2), read_peft, lambda f: save_changed(f, 1)
    ),
    "adapter over another, among other files": Writer(
        lambda f: save_changed(f, 2), read_peft, save_among_others, between=("refused",)
    ),
    "export": new("e", lambda made, path: export_adapter(adapted(1), path)),
    "merged": new(
        "e",
        lambda made, path: export_merged(
            made / "adapter", path, base=made / "model", shard_bytes=2**20
        ),
    ),
    "mlx": new("e", lambda made, path: export_mlx(made / "adapter", path, base=made / "model")),
    "from mlx": new("e", lambda made, path: import_mlx(made / "mlx", path, base=made / "model")),
    "gguf": new(
        "e.gguf", lambda made, path: export_gguf(made / "adapter", path, base=made / "model")
    ),
    "gguf adapter": new(
        "e.gguf",
        lambda made, path: export_gguf_adapter(made / "adapter", path, base=made / "model"),
    ),
    "from an MLX checkpoint": new("e", lambda made, path: from_mlx(made / "model", path)),
    "packed": new("e", lambda made, path: pack(made / "model", path)),
    "manifest": Writer(open_texts, read_texts, write_texts),
    "manifest, refreshed": Writer(
        lambda f: open_texts(f, refresh=True), read_texts, prepare_refresh
    ),
    "quarantine": Writer(add_bad, read_bad, between=None),
    "quarantine, replaced": Writer(replace_bad, read_bad, add_bad),
    "media cache": Writer(fill_cache, read_cache),
    "table": Writer(spool_table, read_table, between=None),
    "settings": Writer(
        lambda f: save_settings(f, {"max_steps": 2}),
        lambda f: dict(parse_file(f / "settings.yaml")),
        lambda f: save_settings(f, {"max_steps": 1}),
    ),
    "doctor's report": Writer(
        lambda f: examine(f, 2), lambda f: digest(f / "doctor.json"), lambda f: examine(f, 1)
    ),
    "report": Writer(
        lambda f: write_report_of(f, 2),
        lambda f: digest(f / "report"),
        lambda f: write_report_of(f, 1),
    ),
}
