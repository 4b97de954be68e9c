"""Exports open in real mlx-lm and mlx-vlm, with the logits of transformers and PEFT."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import gemma_tuner as gt
from gemma_tuner.checkpoints.mlx import dequantise, from_mlx, read_numbers, to_mlx
from gemma_tuner.checkpoints.weights import list_tensors
from gemma_tuner.export.merged import export_merged
from gemma_tuner.export.mlx import export_mlx, import_mlx
from gemma_tuner.models.adapter_files import save_adapter
from gemma_tuner.models.few_bits.grids import Grid, Packed
from tests.export_parts import TARGETS, add_trained_lora, logits, save_base, text_inputs

ENVIRONMENT = Path(__file__).resolve().parents[2] / ".venv-mlx"
PYTHON = ENVIRONMENT / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (ENVIRONMENT / ".installed").exists(),
        reason="MLX IS NOT TESTED: make its environment with `make .venv-mlx/.installed`",
    ),
]
ADAPTERS = [
    ("gemma4-e2b", ("language",), "lora", "mlx-lm", 48),
    ("gemma4-e2b", ("language",), "dora", "mlx-lm", 48),
    ("gemma4-e2b", TARGETS["gemma4-e2b"], "lora", "mlx-vlm", 84),
    ("gemma4-e2b", TARGETS["gemma4-e2b"], "dora", "mlx-vlm", 84),
    ("gemma4-12b", TARGETS["gemma4-12b"], "rslora", "mlx-vlm", 42),
    ("gemma4-12b", ("language",), "rslora", "mlx-lm", 40),
    # experts: gate and up are two modules in MLX
    ("gemma4-26b-a4b", ("language", "experts"), "lora", "mlx-lm", 40 + 6 * 3),
    ("gemma3n", ("language",), "lora", "mlx-lm", 48),
    ("gemma3n", ("language",), "dora", "mlx-lm", 48),
]


def run_mlx(cases, tmp_path):
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    script = Path(__file__).with_name("mlx_run.py")
    done = subprocess.run(
        [PYTHON, script, tmp_path / "cases.json"],
        check=False,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def run_case(tmp_path, inputs, **case):
    """Logits ``[1, tokens, vocabulary]``, how many adapters are bound, the decoder's input."""
    given = {name: value.numpy() for name, value in inputs.items()}
    if case["program"] == "mlx-lm":
        given = {"input_ids": given["input_ids"]}
    np.savez(tmp_path / "inputs.npz", **given)
    paths = {name: str(value) for name, value in case.items() if isinstance(value, Path)}
    files = {"inputs": str(tmp_path / "inputs.npz"), "output": str(tmp_path / "output.npz")}
    run_mlx([case | paths | files], tmp_path)
    output = np.load(tmp_path / "output.npz")
    logits, embedded = (torch.from_numpy(output[name]) for name in ("logits", "embedded"))
    return logits, int(output["bound"]), embedded


@pytest.mark.parametrize(("family", "targets", "variant", "program", "num_bound"), ADAPTERS)
def test_adapter_and_merged_checkpoint(family, targets, variant, program, num_bound, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model, _ = save_base(family, base)
    model = add_trained_lora(model, targets=targets, variant=variant)
    save_adapter(model, adapter)
    inputs = text_inputs()
    expected = logits(model, inputs)
    with model.disable_adapter():
        assert (logits(model, inputs) - expected).abs().max() > 0.5

    export_mlx(adapter, tmp_path / "mlx", program=program, base=base)
    got, bound, _ = run_case(
        tmp_path, inputs, program=program, model=base, adapter=tmp_path / "mlx"
    )
    assert bound == num_bound
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)

    import_mlx(tmp_path / "mlx", tmp_path / "back", base=base)
    before, after = (
        load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "back")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    export_merged(adapter, tmp_path / "merged", base=base)
    got, _, _ = run_case(tmp_path, inputs, program=program, model=tmp_path / "merged")
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize(("modality", "num_bound"), [("vision", 15), ("audio", 21)])
def test_media_through_adapted_towers(modality, num_bound, variant, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model, processor = save_base("gemma4-e2b", base)
    targets = (modality, rf"model\.embed_{modality}\.embedding_projection")
    model = add_trained_lora(model, targets=targets, variant=variant)
    save_adapter(model, adapter)
    inputs = media_inputs(processor, modality)
    given, expected = see_decoder_input(model, inputs), logits(model, inputs)
    with model.disable_adapter():
        assert (logits(model, inputs) - expected).abs().max() > 0.1

    export_mlx(adapter, tmp_path / "mlx", program="mlx-vlm", base=base)
    export_merged(adapter, tmp_path / "merged", base=base)
    for parts in (
        {"model": base, "adapter": tmp_path / "mlx"},
        {"model": tmp_path / "merged"},
    ):
        got, bound, embedded = run_case(tmp_path, inputs, program="mlx-vlm", **parts)
        assert bound == (num_bound if "adapter" in parts else 0)
        # The adapters are all in front of the decoder, so this is what they do.
        torch.testing.assert_close(embedded, given, rtol=0, atol=1e-5)
        # The random decoder magnifies the rounding of what it is given fifty times, in float64
        # too. The logits of transformers in float32 are 1.0e-4 from its own in float64 without
        # adapters and 0.5e-4 with them; those of MLX 0.8e-4 and 1.7e-4.
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-4)
        assert (got - expected).abs().mean() < 2e-5


def test_gemma3n_in_mlx_vlm(tmp_path, capsys):
    """The decoder, the audio tower and the projector of an mlx-vlm that is mended (mlx_run.py)."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model, processor = save_base("gemma3n", base)
    targets = ("language", "audio", r"model\.embed_audio\.embedding_projection")
    model = add_trained_lora(model, targets=targets)
    save_adapter(model, adapter)
    export_mlx(adapter, tmp_path / "mlx", program="mlx-vlm", base=base)
    assert "mlx-vlm 0.7.10 computes Gemma 3n wrongly" in capsys.readouterr().err
    parts = {"program": "mlx-vlm", "model": base, "adapter": tmp_path / "mlx"}
    inputs = text_inputs()
    got, bound, _ = run_case(tmp_path, {"input_ids": inputs["input_ids"]}, **parts)
    assert bound == 48 + 20 + 1
    torch.testing.assert_close(got, logits(model, inputs), rtol=0, atol=1e-4)

    inputs = media_inputs(processor, "audio")
    is_sound = inputs["input_ids"] == processor.tokenizer.audio_token_id
    given = see_decoder_input(model, inputs)[is_sound]
    with model.disable_adapter():
        assert (see_decoder_input(model, inputs)[is_sound] - given).abs().max() > 0.1
    _, _, embedded = run_case(tmp_path, inputs, **parts)
    torch.testing.assert_close(embedded[is_sound], given, rtol=0, atol=1e-5)


def see_decoder_input(model, inputs):
    """What the decoder is given, ``[1, tokens, hidden]``."""
    seen = []
    hook = model.get_base_model().model.language_model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["inputs_embeds"]), with_kwargs=True
    )
    logits(model, inputs)
    hook.remove()
    return seen[0]


def media_inputs(processor, modality):
    """The processor's tensors for a question about a picture or a sound."""
    rng = np.random.default_rng(0)
    if modality == "audio":
        media = {"audio": [rng.normal(scale=0.1, size=9_000)]}
    else:
        pixels = rng.integers(0, 255, (100, 160, 3), dtype=np.uint8)
        media = {"images": [[Image.fromarray(pixels)]]}
    placeholder = processor.audio_token if modality == "audio" else processor.image_token
    inputs = processor(text=[f"{placeholder} what"], return_tensors="pt", **media)
    inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
    if modality == "vision":
        # mlx-vlm wants the patches that are there, without padding
        valid = (inputs["image_position_ids"][0] != -1).all(-1)
        for name in ("pixel_values", "image_position_ids"):
            inputs[name] = inputs[name][:, valid]
    return inputs


def test_tensors_of_every_kind_are_dequantised_bit_equal(tmp_path):
    run_mlx([{"dequantise": str(tmp_path / "tensors.safetensors")}], tmp_path)
    tensors = load_file(tmp_path / "tensors.safetensors")
    names = {name.rpartition(" ")[0] for name in tensors}
    assert len(names) == 3 * 6 * 3
    for name in names:
        _, bits, group_size = name.split()
        parts = [tensors[f"{name} {part}"] for part in ("packed", "scales", "biases")]
        weight = dequantise(*parts, bits=int(bits), group_size=int(group_size))
        assert torch.equal(weight, tensors[f"{name} weight"]), name
        if bits in ("4", "8") and not name.startswith("float16"):
            grid = Grid(int(bits), int(group_size), is_affine=True)
            laid_out = Packed(grid.join(read_numbers(parts[0], grid.bits)), *parts[1:])
            own = grid.pack(tensors[f"{name} original"])
            assert all(map(torch.equal, own, laid_out)), name
            assert torch.equal(grid.unpack(laid_out), weight), name


@pytest.mark.parametrize(
    ("family", "program"),
    [("gemma4-e2b", "mlx-vlm"), ("gemma4-26b-a4b", "mlx-lm")],
)
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_checkpoints_load(family, program, bits, tmp_path):
    save_base(family, tmp_path / "base")
    inputs = text_inputs()
    expected, _, _ = run_case(
        tmp_path,
        inputs,
        program=program,
        model=tmp_path / "base",
        quantise={"bits": bits, "group_size": 32},
        quantised=tmp_path / "mlx",
    )
    for file in (tmp_path / "base").iterdir():
        if not (tmp_path / "mlx" / file.name).exists():
            shutil.copy(file, tmp_path / "mlx")
    from_mlx(tmp_path / "mlx", tmp_path / "plain")
    packed = list_tensors(gt.pack(tmp_path / "mlx", tmp_path / "packed"))
    dense = list_tensors(tmp_path / "plain")
    assert packed.keys() == dense.keys()
    assert all(torch.equal(packed[name].read(), dense[name].read()) for name in dense)
    modalities = ("text", "image", "audio") if program == "mlx-vlm" else ("text",)
    model, _ = gt.load_model(tmp_path / "plain", modalities=modalities, device="cpu")
    torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=1e-4)
    if program == "mlx-vlm":
        stored = load_file(tmp_path / "base" / "model.safetensors")
        plain = load_file(tmp_path / "plain" / "model.safetensors")
        assert plain.keys() == stored.keys()
        assert all(plain[name].shape == stored[name].shape for name in stored)
        convolutions = [name for name in stored if "conv" in name and stored[name].ndim > 2]
        assert convolutions
        assert all(torch.equal(plain[name], stored[name]) for name in convolutions)


@pytest.mark.parametrize("family", ["gemma4-e2b", "gemma4-26b-a4b", "gemma3n"])
def test_a_qalora_in_four_bits_says_in_mlx_lm_what_its_adapter_said(family, tmp_path):
    save_base(family, tmp_path / "base")
    packed = gt.pack(tmp_path / "base", tmp_path / "packed", grid="affine", group=32)
    model, _ = gt.load_model(packed, device="cpu", dtype="float32", modalities=("text",))
    model = add_trained_lora(model, variant="qalora")
    save_adapter(model, tmp_path / "adapter")
    export_merged(tmp_path / "adapter", tmp_path / "merged", base=packed)
    to_mlx(tmp_path / "merged", tmp_path / "mlx")
    inputs = text_inputs()
    expected = logits(model, inputs)
    found, _, _ = run_case(tmp_path, inputs, program="mlx-lm", model=tmp_path / "mlx")
    assert (found - expected).abs().max() < 1e-3
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
