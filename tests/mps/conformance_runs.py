"""Runs on the pretend MPS device, for test_conformance.py: a process of its own, as JSON.

Its arguments: where results go, where the device is kept, and which part to run.
"""

import gc
import json
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F

from gemma_tuner.collators.multimodal import MultimodalCollator
from gemma_tuner.collators.text import TextCollator
from gemma_tuner.device import compile_shader, is_out_of_memory
from gemma_tuner.errors import ConfigError, MemoryPlanError
from gemma_tuner.models.attention import set_query_chunk
from gemma_tuner.models.few_bits import unpacking
from gemma_tuner.models.few_bits.grids import Grid
from gemma_tuner.models.few_bits.layers import list_packable, replace_packed
from gemma_tuner.models.few_bits.tables import name_table, replace_table
from gemma_tuner.models.lora import LoraConfig, add_lora
from gemma_tuner.models.loss import FrozenHeadCrossEntropy, target_loss_sum
from gemma_tuner.models.modes import begin_training, checkpoint_layers
from gemma_tuner.planning.choice import widen
from gemma_tuner.planning.loaded import plan_training
from gemma_tuner.records import Example, Text, Turn
from gemma_tuner.streaming.opening import stream_local
from gemma_tuner.testing import FAMILIES, sample_data, tiny_model
from gemma_tuner.testing.models import tiny
from gemma_tuner.testing.mps.pretend_device import PretendMps, Recording, pretend_mps
from gemma_tuner.training.config import TrainConfig
from gemma_tuner.training.micro_batches import free
from gemma_tuner.training.step import Stepper, request_plan
from gemma_tuner.training.trainer import Trainer
from tests.long_runs import run_long
from tests.metal_shader import Library

BUDGET_SCALE = 6 / 1024  # GiB of the shrunken model for each of the real one

DEVICE: PretendMps  # of this process, once main() has asked for it

MODALITIES = {
    "gemma4-e2b": ("text", "image", "audio"),
    "gemma4-12b": ("text", "image", "audio"),
    "gemma4-26b-a4b": ("text", "image"),
    "gemma4-31b": ("text", "image"),
    "gemma3n": ("text", "image", "audio"),
}
# What a Mac trains in, each family with what runs through most of it; the rest is slow.
CASES = {
    "fast": [
        ("gemma4-e2b", "text", "bfloat16"),
        ("gemma4-e2b", "audio", "bfloat16"),
        *((family, "image", "bfloat16") for family in FAMILIES),
        ("gemma3n", "audio", "bfloat16"),
        ("gemma4-e2b packed", "image", "bfloat16"),
    ]
}
CASES["slow"] = [
    case
    for dtype in ("bfloat16", "float32")
    for family in FAMILIES
    for modality in MODALITIES[family]
    if (case := (family, modality, dtype)) not in CASES["fast"]
]

PACKED = [Grid(4, 32), Grid(4, 32, is_affine=True), Grid(8, 32, is_affine=True)]


class RecordingStepper(Stepper):
    """Records how many examples were on the device at one time."""

    rows: list[int]

    def loss_sum(self, batch):
        self.rows.append(len(batch))
        return super().loss_sum(batch)


class RecordingTrainer(Trainer):
    """Records each optimizer step and each held-out measurement."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.steps: list[Recording] = []
        self.evaluations: list[Recording] = []
        self.stepper.__class__ = RecordingStepper
        self.rows = self.stepper.rows = []  # of each micro-batch

    def train_step(self, step_input):
        with DEVICE.record() as recording:
            result = super().train_step(step_input)
        self.steps.append(recording)
        return result

    def evaluate(self):
        with DEVICE.record() as recording:
            result = super().evaluate()
        self.evaluations.append(recording)
        return result


def build_trainer(
    folder,
    family,
    modality,
    *,
    dtype="float32",
    device="mps",
    rows=4,
    targets=("language",),
    dropout=0.0,
    grid=None,
    **settings,
):
    kind = RecordingTrainer if device == "mps" else Trainer
    family, _, is_packed = family.partition(" ")
    model, processor = tiny_model(family)
    if is_packed:  # the decoder's matrices, embedding and head
        grids = list_packable(model, Grid(4, 32))
        grids[name_table(model.config.model_type)] = Grid(8, 64, is_affine=True)
        replace_packed(model, replace_table(model, grids))
    elif grid is not None:
        replace_packed(model, list_packable(model, grid))
    lora = LoraConfig(rank=4, targets=targets, dropout=dropout)
    model = add_lora(model.to(device, getattr(torch, dtype)), lora)
    stream = stream_local(sample_data(modality), cache_dir=Path(folder) / "cache").take(rows)
    settings = {
        "max_steps": 2,
        "batch_size": 2,
        "gradient_accumulation": 1,
        "learning_rate": 1e-2,
        "schedule": "constant",
        "log_every_steps": 1,
        "progress": False,
        "output_dir": Path(folder) / f"run-{device}",
        **settings,
    }
    config = TrainConfig(**settings)
    return kind(model, stream, MultimodalCollator(processor), config, eval_stream=stream.take(2))


def run_case(folder, family, modality, dtype):
    """Two steps, a checkpoint, and a third step by a new trainer that resumes."""
    begun = build_trainer(folder, family, modality, dtype=dtype)
    begun.fit()
    trainer = build_trainer(folder, family, modality, dtype=dtype, max_steps=3)
    trainer.fit(resume=True)
    recordings = [*begun.steps, *begun.evaluations, *trainer.steps, *trainer.evaluations]
    moments = [
        value
        for state in trainer.optimizer.state.values()
        for value in state.values()
        if value.dim()
    ]
    result = {
        "first_step": read_first_step(begun),
        # The first step of a model also checks the target-only decoder against the plain one.
        "syncs": [[*key, count] for key, count in begun.steps[1].syncs.items()],
        "blocking_uploads": begun.steps[1].uploads.get("blocking", 0),
        "operators": sorted({call.operator for r in recordings for call in r.calls}),
        "unsupported": sorted({name for r in recordings for name in r.unsupported}),
        "most_elements": max(r.most_elements for r in recordings),
        "largest_bytes": max(r.largest_bytes for r in recordings),
        "longest_reduction": max(r.longest_reduction for r in recordings),
        "dtypes": sorted(
            {
                o.dtype
                for r in recordings
                for c in r.calls
                for o in c.outputs
                if o.place == "device"
            }
        ),
        "mixed_dtypes": sorted({describe_mix(c) for r in recordings for c in r.mixed_dtypes}),
        "not_contiguous": [
            list(tensor.shape)
            for tensor in [*trainer.trainable, *moments]
            if not tensor.is_contiguous()
        ],
    }
    if dtype == "float32":
        on_cpu = build_trainer(folder, family, modality, device="cpu", max_steps=1)
        on_cpu.fit()
        result["first_step_on_cpu"] = read_first_step(on_cpu)
    return result


def read_first_step(trainer):
    lines = (Path(trainer.config.output_dir) / "log.jsonl").read_text().splitlines()
    return next(
        [record["loss"], record["grad_norm"]]
        for record in map(json.loads, lines)
        if record["kind"] == "step"
    )


def describe_mix(call):
    """Such as ``add Float+BFloat16[]``; brackets mark what has no axes."""
    floats = [o for o in call.inputs if o.place == "device" and "loat" in o.dtype]
    names = sorted({o.dtype + ("" if o.shape else "[]") for o in floats})
    return f"{call.operator.partition('.')[0].rstrip('_')} {'+'.join(names)}"


def run_dropout(folder):
    """A first step with dropout, in which layers are computed once or twice."""
    steps = []
    for is_twice in (False, True):
        trainer = build_trainer(
            folder / str(is_twice),
            "gemma4-e2b",
            "text",
            dropout=0.5,
            max_steps=1,
            gradient_checkpointing=is_twice,
        )
        trainer.fit()
        steps.append(read_first_step(trainer))
    return steps


def run_packed(folder, grid, compiler=compile_shader, num_steps=3):
    """Steps on a packed base of which each is recorded; what is held after each."""
    # 4,000 steps of eight layers have been run by hand on CUDA, and held no more at their end
    unpacking._choose.cache_clear()
    unpacking._compile_metal.cache_clear()
    with patch.object(unpacking, "compile_shader", compiler):
        trainer = build_trainer(
            folder, "gemma4-e2b", "text", dtype="bfloat16", grid=grid, learning_rate=1e-4
        )
        begin_training(trainer.model)
        step_input = next(iter(trainer._read_steps()))
        losses, held = [], []
        for _ in range(num_steps):
            trainer.steps.clear()
            losses.append(float(trainer.train_step(step_input)[0]))
            gc.collect()
            held.append(DEVICE.live_bytes)
    (last,) = trainer.steps
    return {
        "losses": losses,
        "held": held,
        "syncs": [[*key, count] for key, count in last.syncs.items()],
        "unsupported": list(last.unsupported),
        "operators": sorted({call.operator for call in last.calls}),
        "peak_bytes": last.peak_bytes,
    }


def run_packed_in_both_ways(folder, grid):
    return {
        "torch": run_packed(folder / "torch", grid),
        "shader": run_packed(folder / "shader", grid, lambda source: Library(source, folder)),
    }


def run_lengths(folder):
    """Examples of many lengths, over and over: how many graphs each step adds on a Mac."""
    trainer = build_trainer(
        folder, "gemma4-e2b", "text", rows=40, epochs=2, max_steps=None, learning_rate=1e-3
    )
    trainer.fit()
    seen, new = set(), []
    for recording in trainer.steps:
        graphs = recording.graphs()
        new.append(len(graphs - seen))
        seen |= graphs
    return {"steps": len(new), "new_graphs_by_step": new, "graphs": len(seen)}


def run_long_on_the_device(folder):
    """Hundreds of steps of many lengths: what is held after each, and shapes so far."""
    # 500 steps have been run by hand: they take six minutes
    trainer = run_long(folder, lambda step: DEVICE.live_bytes, device="mps", steps=160)
    return {"held": trainer.held, "shapes_by_step": trainer.shapes_by_step}


def run_vocabulary():
    """The loss over a vocabulary of full size."""
    hidden = torch.randn(40, 16).to("mps").requires_grad_()
    weight = torch.randn(262_144, 16).to("mps")
    targets = torch.randint(0, 262_144, (40,)).to("mps")
    with DEVICE.record() as recording:
        FrozenHeadCrossEntropy.apply(hidden, weight, targets, 30.0, 16).backward()
    return {
        "longest_reduction": recording.longest_reduction,
        "most_elements": recording.most_elements,
        "num_syncs": recording.num_syncs,
    }


# Of the kinds of layers of E2B one that makes keys and values and one that shares them, and three
# adapters: as many allocations as can all be tried.
SMALLEST_TEXT = {
    "num_hidden_layers": 2,
    "layer_types": ["full_attention"] * 2,
    "num_kv_shared_layers": 1,
}
FEW_ADAPTERS = (
    r"model\.language_model\.layers\.0\.self_attn\.[qk]_proj",
    r"model\.language_model\.layers\.1\.mlp\.down_proj",
)


def run_out_of_memory_everywhere(folder):
    """Let every allocation of a step fail, and many of an evaluation, in the smallest model."""
    with patch.dict(tiny._E2B_TEXT, SMALLEST_TEXT):
        return {
            "step": run_out_of_memory(folder / "step", 1, targets=FEW_ADAPTERS),
            "evaluation": run_out_of_memory_in_evaluation(folder / "held_out", 16),
        }


def run_out_of_memory(folder, stride, targets=("language",)):
    """Let every ``stride``-th allocation of a first step fail, ten times as many of the update's.

    A first step allocates the moments too.
    """
    trainer = build_trainer(
        folder,
        "gemma4-e2b",
        "text",
        targets=targets,
        learning_rate=1e-3,
        gradient_checkpointing=True,
    )
    begin_training(trainer.model)
    step_input = next(iter(trainer._read_steps()))
    Trainer.train_step(trainer, step_input)  # the decoder's own check, once a model
    gc.collect()
    gc.freeze()  # what is freed after each failure is looked for among younger objects
    micro, begin = trainer.stepper.micro_batches, [p.detach().clone() for p in trainer.trainable]
    (level,) = micro.levels

    def take(number, max_tokens=level.max_tokens):
        trainer.optimizer.state.clear()
        micro.levels, micro.num_retries = [replace(level, max_tokens=max_tokens)], 0
        with torch.no_grad():
            for parameter, value in zip(trainer.trainable, begin, strict=True):
                parameter.copy_(value)
        with DEVICE.fail_allocation(number):
            loss, _ = Trainer.train_step(trainer, step_input)
        moments = [v for state in trainer.optimizer.state.values() for v in state.values()]
        state = [tensor.detach().cpu() for tensor in [loss, *trainer.trainable, *moments]]
        return state, micro.num_retries

    with DEVICE.record() as recording:
        whole, _ = take(0)
    num_allocations = recording.num_allocations
    cut, _ = take(0, max_tokens=1)
    last = num_allocations - 6 * len(trainer.trainable)
    numbers = sorted(
        {*range(1, num_allocations, stride), *range(last, num_allocations, max(1, stride // 10))}
    )
    halvings = Counter()
    for number in [*numbers, num_allocations]:
        state, halved = take(number)
        expected = cut if halved else whole
        if not all(torch.equal(a, b) for a, b in zip(state, expected, strict=True)):
            halvings["wrong"] += 1
        halvings[str(halved)] += 1
    gc.unfreeze()
    gradients = [
        float((a - b).norm() / b.norm())
        for a, b in zip(first_moments(trainer, cut), first_moments(trainer, whole), strict=True)
    ]
    return {
        "allocations": num_allocations,
        "failed": len(numbers) + 1,
        "halvings": halvings,
        "skipped": trainer.run_state.guard.total.item(),
        "largest_gradient_difference": max(gradients),
        "messages": micro.take_messages()[:1],
    }


def run_out_of_memory_in_evaluation(folder, stride):
    """Let every ``stride``-th allocation of evaluating four examples fail, two at a time."""
    trainer = build_trainer(folder, "gemma4-e2b", "text")
    trainer.eval_stream = trainer.stream.take(4)
    Trainer.evaluate(trainer)  # the decoder's own check, once a model
    gc.collect()
    gc.freeze()

    with DEVICE.record() as recording:
        whole = Trainer.evaluate(trainer)
    live_bytes = DEVICE.live_bytes
    outcomes, losses = Counter(), []
    for number in range(1, recording.num_allocations + 1, stride):
        with DEVICE.fail_allocation(number):
            record = Trainer.evaluate(trainer)
        losses.append(record.loss)
        outcomes[str(record.counts.get("out_of_memory", 0))] += 1
        outcomes["leaked"] += DEVICE.live_bytes != live_bytes
        same = (record.target_tokens, record.examples) == (whole.target_tokens, whole.examples)
        outcomes["miscounted"] += not same
    gc.unfreeze()
    return {
        "allocations": recording.num_allocations,
        "failed": len(losses),
        "outcomes": +outcomes,
        "largest_loss_difference": max(abs(loss / whole.loss - 1) for loss in losses),
    }


def first_moments(trainer, state):
    """After one step from nothing: the gradient, scaled."""
    moments = state[1 + len(trainer.trainable) :]
    return [tensor for tensor in moments[1::3] if tensor.norm() > 0]


def run_too_small(folder):
    """Whole runs on less memory than was planned with: for fewer than four examples, or none."""
    settings = {"batch_size": 4, "gradient_checkpointing": True, "memory_gib": 8}
    trainer = build_trainer(folder / "free", "gemma4-e2b", "text", **settings)
    trainer.fit()
    needed = trainer.steps[1].peak_bytes - DEVICE.live_bytes  # over the model and the moments
    adapter = [p.detach().cpu() for p in trainer.trainable]
    del trainer
    results = {}
    for name, share in (("fewer", 0.7), ("none", 0.1)):
        trainer = build_trainer(folder / name, "gemma4-e2b", "text", **settings)
        budget = DEVICE.live_bytes + 3 * sum(p.nbytes for p in trainer.trainable)
        try:
            with DEVICE.limit(budget + int(share * needed)):
                trainer.fit()
        except MemoryPlanError as error:
            results[name] = str(error)
            continue
        log = (folder / name / "run-mps" / "log.jsonl").read_text()
        results[name] = {
            "rows": trainer.rows[-4:],
            "events": log.count('"name": "out_of_memory"'),
            "counted": trainer.counts["out_of_memory"],
            "difference": max(
                float((a.detach().cpu() - b).abs().max())
                for a, b in zip(trainer.trainable, adapter, strict=True)
            ),
        }
    return results


def run_faults():
    """Mistakes that fail on a Mac: what each is answered with here."""
    x = torch.randn(2, 4).to("mps")
    faults = {
        "a mask left on the CPU": lambda: x + torch.zeros(2, 4),
        "labels left on the CPU": lambda: F.cross_entropy(x, torch.tensor([0, 1])),
        "ids left on the CPU": lambda: F.embedding(torch.tensor([0]), x),
        "float64 by a tensor": lambda: x * torch.tensor(0.1, dtype=torch.float64).to("mps"),
        "float64 by numpy": lambda: torch.from_numpy(np.ones(3)).to("mps"),
        "float64 by a cast": lambda: x.double(),
        "complex128": lambda: x.to(torch.complex128),
        "float8": lambda: x.to(torch.float8_e4m3fn),
        "no kernel": lambda: F.fractional_max_pool2d(
            torch.randn(1, 1, 8, 8).to("mps"), 2, output_size=3
        ),
        "a turned convolution weight": lambda: F.conv2d(
            torch.randn(1, 3, 8, 8).to("mps"),
            torch.randn(2, 2, 3, 4).to("mps").permute(3, 2, 0, 1),
        ),
        "over the budget": lambda: torch.empty(2**21, dtype=torch.uint8, device="mps"),
    }
    answers = {}
    for name, fault in faults.items():
        try:
            if name == "over the budget":
                with DEVICE.limit(2**20):
                    fault()
            else:
                fault()
        except (RuntimeError, TypeError, NotImplementedError) as error:
            answers[name] = f"{type(error).__name__}: {error}"
        else:
            answers[name] = None
    return answers


def run_recorder():
    """What the recorder says about a few operators whose cost is known."""
    a = torch.randn(3, 5).to("mps")
    held = DEVICE.live_bytes
    with DEVICE.record() as recording:
        b = a @ torch.ones(5, 7).to("mps")
        b.sum().item()
        b.cpu()
        b[b > 0]
        (b.bfloat16() + b).tolist()
    failed = None
    with DEVICE.fail_allocation(2):
        torch.empty(1, device="mps")
        try:
            torch.empty(1, device="mps")
        except RuntimeError as error:
            failed = str(error)
        torch.empty(1, device="mps")
    del a, b
    return {
        "syncs": [[*key, count] for key, count in recording.syncs.items()],
        "uploads": dict(recording.uploads),
        "reduction": recording.longest_reduction,
        "mixes": [describe_mix(call) for call in recording.mixed_dtypes],
        "allocations": recording.num_allocations,
        "grown_bytes": recording.peak_bytes - held,
        "freed_bytes": held - DEVICE.live_bytes,
        "failed": failed,
    }


def run_budgets(_folder):
    """Plan for budgets in the proportion of 8 to 32 GiB; run what is chosen and the next plan up.

    A shrunken E2B stands for the real one, six mebibytes for a gibibyte. The device lets no more
    live bytes be than the plan may use; what an allocator needs beyond them it does not have.
    """
    text = tiny._E2B_TEXT | {"hidden_size": 192, "intermediate_size": 768}
    with patch.dict(tiny._E2B_TEXT, text):
        model, processor = tiny_model("gemma4-e2b")
    gemma = model.to("mps", torch.bfloat16)
    model = add_lora(gemma, LoraConfig(rank=8))
    collator = TextCollator(processor, max_tokens=512)
    words = Turn("user", (Text("word " * 40),)), Turn("assistant", (Text("yes " * 20),))
    row = collator([Example("row", words)])
    held = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    moments = torch.empty(3 * held // 4, device="mps")  # two moments and the gradient
    begin_training(model)

    def fits(layers, tokens, plan):
        """Whether a micro-batch of so many tokens fits into what the plan may use."""
        rows = max(1, tokens // 512)
        length = min(tokens, 512)
        batch = widen(row, rows=rows, tokens=length, target_share=plan.target_share)
        checkpoint_layers(model, layers)
        gc.collect()
        try:
            with DEVICE.limit(plan.usable_bytes):
                placed = batch.to(torch.device("mps"))
                target_loss_sum(model, placed, chunk_tokens=plan.loss_chunk_tokens).backward()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        else:
            return True
        finally:
            model.zero_grad(set_to_none=True)
        free(torch.device("mps"))
        return False

    fits_once = TrainConfig(max_steps=1, batch_size=1, memory_gib=1.0)
    with DEVICE.limit(2**30):
        fits(
            0, 512, plan_training(model, [row], request_plan([row], fits_once, 512))
        )  # the decoder's own check
    results = {}
    for gib in (8, 12, 16, 24, 32):
        config = TrainConfig(max_steps=1, batch_size=16, memory_gib=gib * BUDGET_SCALE)
        plan = plan_training(model, [row], request_plan([row], config, 512))
        set_query_chunk(gemma, plan.query_chunk_tokens)
        chosen = [level for level in plan.levels if level.max_tokens]
        next_up = [replace(each, max_tokens=each.max_tokens + 512) for each in chosen]
        results[gib] = {
            "levels": [(level.checkpointed_layers, level.max_tokens) for level in chosen],
            "chosen fit": [fits(x.checkpointed_layers, x.max_tokens, plan) for x in chosen],
            "next fit": [
                fits(x.checkpointed_layers, x.max_tokens, plan)
                for x in next_up
                if x.max_tokens <= 16 * 512
            ],
        }
    del moments
    return results


def main():
    global DEVICE  # noqa: PLW0603 - it is the process's
    DEVICE = pretend_mps(sys.argv[2])
    part = sys.argv[3]
    results = {}
    if part == "fast":
        results = {
            "faults": run_faults(),
            "recorder": run_recorder(),
            "vocabulary": run_vocabulary(),
        }
    with tempfile.TemporaryDirectory() as folder:
        if part == "everywhere":
            results = run_out_of_memory_everywhere(Path(folder))
        elif part == "budgets":
            results = run_budgets(Path(folder))
        elif part == "long":
            results = run_long_on_the_device(Path(folder))
        else:
            stride = {"fast": 400, "slow": 48}[part]
            results["out of memory"] = run_out_of_memory(Path(folder) / "memory", stride)
        if part == "fast":
            results["too small"] = run_too_small(Path(folder) / "small")
            results["lengths"] = run_lengths(Path(folder) / "lengths")
            results["dropout"] = run_dropout(Path(folder) / "dropout")
            for grid in PACKED:
                results[f"packed {grid}"] = run_packed_in_both_ways(Path(folder), grid)
        for case in CASES.get(part, []):
            name = " ".join(case)
            try:
                results[name] = run_case(Path(folder) / name, *case)
            except (RuntimeError, TypeError, NotImplementedError, ConfigError) as error:
                results[name] = {"error": f"{type(error).__name__}: {error}"}
    Path(sys.argv[1]).write_text(json.dumps(results))
