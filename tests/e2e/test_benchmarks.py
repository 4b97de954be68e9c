"""The comparison of steps runs small from end to end, and measures nothing that disagrees."""

import csv
import importlib.util
import json
from dataclasses import replace

import pytest
import torch
import transformers

from benchmarks.compare_steps import agreement, models, modes
from benchmarks.compare_steps.__main__ import TINY_ROWS, main
from benchmarks.compare_steps.measure import COLUMNS, measure_shape
from gemma_tuner.models.lora import unwrap_peft
from gemma_tuner.testing.models.processor import tiny_processor
from gemma_tuner.testing.models.tiny import tiny_model

OURS = [name for name in modes.NAMES if name.startswith("ours")]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    models.save(*tiny_model("gemma4-e2b"), folder)
    return folder


@pytest.fixture(scope="module")
def tiny(checkpoint):
    base, processor, _ = models.load_timed(checkpoint, CPU, torch.float32, "device")
    built = modes.build_modes(
        base, processor, checkpoint, rank=4, chunk_tokens=16, names=[modes.PLAIN_KEPT, "ours"]
    )
    return {mode.name: mode for mode in built}


@pytest.fixture(scope="module")
def batches(tiny):
    base = unwrap_peft(tiny["ours"].model)
    return [models.make_batch(TINY_ROWS, base, seed=seed) for seed in range(2)]


def scaled(mode):
    def step(batch):
        loss = mode.step(batch)
        for parameter in mode.trainable.values():
            parameter.grad.mul_(1.01)
        return loss

    return replace(mode, name="scaled", step=step)


def other_targets(mode):
    def step(batch):
        return mode.step(replace(batch, labels=batch.inputs["input_ids"]))

    return replace(mode, name="other targets", step=step)


def reentrant(mode):
    """A fault that transformers had: the gradients of shared keys and values are lost."""

    def begin():
        mode.begin()
        unwrap_peft(mode.model).activation_checkpointing_enable({"use_reentrant": True})
        unwrap_peft(mode.model).enable_input_require_grads()

    return replace(mode, name="reentrant", begin=begin)


def frozen(mode):
    def step(batch):
        loss = mode.step(batch)
        next(iter(mode.trainable.values())).grad = None
        return loss

    return replace(mode, name="frozen", step=step)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (scaled, "the gradient is off by 0.01 of the norm of plain's"),
        (other_targets, "loss off by|the gradient is off by"),
        (reentrant, "cosine|the gradient is off by"),
        (frozen, "has gradients of 95 tensors, plain of 96"),
    ],
)
def test_a_mode_that_computes_something_else_is_refused(tiny, batches, spoil, words):
    plain = tiny[modes.PLAIN_KEPT]
    with pytest.raises(agreement.Disagreement, match=words) as raised:
        agreement.check_training([spoil(plain)], plain, batches)
    plain.begin()
    unwrap_peft(plain.model).disable_input_require_grads()
    assert raised.value.code not in (None, 0)  # the process fails


@pytest.mark.slow
@pytest.mark.parametrize("is_chaotic", [False, True])
def test_bfloat16_is_held_to_the_spread_of_plain(checkpoint, is_chaotic, tmp_path):
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    base = models.build_random(config, CPU, torch.bfloat16)
    if is_chaotic:  # attention takes a maximum, and rounding decides which
        for name, parameter in base.named_parameters():
            if name.endswith("q_norm.weight"):
                parameter.data.fill_(30.0)
    models.save(base, tiny_processor("gemma4-e2b"), tmp_path)
    base, processor, _ = models.load_timed(tmp_path, CPU, torch.bfloat16, "device")
    names = [modes.PLAIN, "ours"]
    plain, rounded, ours = modes.build_modes(
        base, processor, tmp_path, rank=4, chunk_tokens=16, names=[*names, modes.PLAIN_ROUNDED]
    )
    batches = [models.make_batch(TINY_ROWS, base, seed=seed) for seed in range(3)]
    if is_chaotic:
        with pytest.raises(agreement.Disagreement, match="nothing can be compared"):
            agreement.check_rounding([ours], plain, batches, print)
        return
    # as the comparison does it: ours rounds adapters, and so does this variant of plain
    found = agreement.check_rounding([rounded, ours], plain, batches, print)
    assert [each.mode for each in found][-1] == "ours"

    def step(batch):
        labels = batch.labels.clone()
        labels[0, 10:14] = -100
        return plain.step(replace(batch, labels=labels))

    with pytest.raises(agreement.Disagreement, match="an answer less: in bfloat16, loss off by"):
        agreement.check_rounding(
            [replace(plain, name="an answer less", step=step)], plain, batches, print
        )


def test_what_agrees_passes_and_adapters_are_put_back(tiny, batches):
    before = {name: p.detach().clone() for name, p in tiny["ours"].trainable.items()}
    (found,) = agreement.check_training([tiny["ours"]], tiny[modes.PLAIN_KEPT], batches)
    assert found.mode == "ours"
    assert found.loss_difference <= 1e-5
    assert found.cosine >= 0.99999
    for name, parameter in tiny["ours"].trainable.items():
        assert torch.equal(parameter, before[name])


def test_modes_share_weights_and_nothing_else(tiny):
    plain, ours = tiny[modes.PLAIN_KEPT], tiny["ours"]
    pairs = zip(plain.model.parameters(), ours.model.parameters(), strict=True)
    for one, other in pairs:
        assert (one is other) == (not one.requires_grad)
        assert torch.equal(one, other)
    assert unwrap_peft(plain.model).config is not unwrap_peft(ours.model).config
    attention = unwrap_peft(plain.model).config.get_text_config()._attn_implementation
    assert attention == "sdpa"


def test_a_mode_without_memory_is_recorded_and_the_others_measured(tiny, batches):
    def run_out(batch):
        raise torch.OutOfMemoryError("no room")

    greedy = replace(tiny[modes.PLAIN_KEPT], name=modes.PLAIN, step=run_out)
    told = []
    records = measure_shape(
        "2x96x20",
        batches[0],
        [greedy, tiny["ours"]],
        [],
        rounds=1,
        peak_tflops=None,
        report=told.append,
    )
    assert [record.error for record in records] == ["out of memory", ""]
    assert [record.mode for record in told] == [modes.PLAIN, "ours"]
    assert records[0].seconds is None
    assert records[1].seconds is not None
    assert records[1].of_plain_seconds is None


@pytest.mark.slow
@pytest.mark.timeout(1200)  # half a minute on a machine that does nothing else
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_runs_from_configuration_to_report(dtype, tmp_path, capfd, checkpoint):
    shapes = ["--shape", "1x80x8", "--shape", "2x48x47"]
    settings = ["--dtype", dtype, "--device", "cpu", "--rank", "4", "--rounds", "1"]
    written = ["--name", "tiny", "--output", str(tmp_path), "--peak-tflops", "0.1"]
    main([str(checkpoint), *shapes, *settings, *written])
    said = [
        json.loads(line) for line in capfd.readouterr().out.splitlines() if line.startswith("{")
    ]
    (table,) = tmp_path.glob("compare_steps_tiny_cpu_*.csv")
    (page,) = tmp_path.glob("compare_steps_tiny_cpu_*.md")
    with table.open() as file:
        rows = list(csv.DictReader(file))
    expected = [modes.PLAIN, modes.PLAIN_KEPT, *OURS]
    expected[2:2] = [modes.PLAIN_ROUNDED] if dtype == "bfloat16" else []
    found = [row["mode"] for row in rows if row["mode"] != modes.TRL]
    assert found == [*expected, *expected]
    assert "written" in said[-1]
    empty = {"error"}
    without_rounded = {"of_rounded_plain_seconds"} if dtype == "float32" else set()
    for row in rows:
        assert {"date", "device", "torch", "transformers", "peft", "trl"} <= row.keys()
        for column in {*COLUMNS} - empty - without_rounded:
            assert row[column], column
    by_mode = {row["mode"]: row for row in rows if row["shape"] == "1x80x8"}
    assert float(by_mode["ours"]["of_plain_flops"]) < 0.6
    assert int(by_mode["ours"]["peak_bytes"]) < int(by_mode[modes.PLAIN]["peak_bytes"])
    on_disk = by_mode["ours, table on disk"]
    assert int(on_disk["resident_bytes"]) < int(by_mode["ours"]["resident_bytes"])
    text = page.read_text()
    for words in ("torch", "transformers", "Agreement", *expected, "1 × 80 × 8"):
        assert words in text
    assert str(tmp_path) not in text


@pytest.mark.slow
def test_says_aloud_that_trl_is_not_there(checkpoint, capfd):
    is_there = importlib.util.find_spec("trl") is not None
    base, processor, _ = models.load_timed(checkpoint, CPU, torch.float32, "device")
    built = modes.build_modes(
        base, processor, checkpoint, rank=4, chunk_tokens=16, names=[modes.TRL]
    )
    assert [mode.name for mode in built] == ([modes.TRL] if is_there else [])
    assert ("NOT COMPARED WITH TRL" in capfd.readouterr().err) != is_there


def test_unknown_shapes_are_refused(capsys):
    for shape in ("16x850", "1x10x11", "0x5x5"):
        with pytest.raises(SystemExit):
            main(["--shape", shape])
        assert shape in capsys.readouterr().err
