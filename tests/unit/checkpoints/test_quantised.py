"""Files that other programs quantised are packed as they are: every number, scale and bias."""

import json
import shutil

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

import gemma_tuner as gt
from gemma_tuner.checkpoints.gguf_names import Names
from gemma_tuner.checkpoints.mlx import from_mlx
from gemma_tuner.checkpoints.weights import UnpackedTensor, list_tensors
from gemma_tuner.errors import CheckpointError, ConfigError
from gemma_tuner.models.few_bits.grids import Grid, Packed
from gemma_tuner.models.few_bits.layers import PackedLinear
from gemma_tuner.testing import tiny_model


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module", params=["gemma4-e2b", "gemma4-26b-a4b"])
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "base"
    model, processor = tiny_model(request.param)
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def read(folder):
    tensors = load_file(folder / "model.safetensors")
    return tensors, json.loads((folder / "config.json").read_text())


def write(folder, base, tensors, config):
    shutil.copytree(base, folder)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_stream(numbers, bits):
    """MLX's words: numbers in a row, the first in the lowest bits."""
    each = (numbers.long()[..., None] >> torch.arange(bits)) & 1
    in_bytes = each.flatten(-2).unflatten(-1, (-1, 8)) << torch.arange(8)
    return in_bytes.sum(-1).to(torch.uint8).contiguous().view(torch.uint32)


def quantise_mlx(weight, bits, group):
    packed = Grid(8, group, is_affine=True).pack(weight)
    return write_stream(packed.numbers >> (8 - bits), bits), packed.scales, packed.biases


def make_mlx(folder, base, choose):
    """Quantise as mlx-vlm lays it out, each module with the bits and group that it is given."""
    tensors, config = read(base)
    found, own = {}, {}
    for full, tensor in tensors.items():
        name = full.removeprefix("model.").replace("language_model.", "language_model.model.")
        matrices = {name: tensor}
        if name.endswith("experts.gate_up_proj"):
            stem = name.replace("gate_up_proj", "switch_glu")
            gate, up = tensor.chunk(2, dim=1)
            matrices = {f"{stem}.gate_proj.weight": gate, f"{stem}.up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            matrices = {name.replace("down_proj", "switch_glu.down_proj.weight"): tensor}
        for key, matrix in matrices.items():
            module = key.removesuffix(".weight")
            wanted = choose(module, matrix)
            if wanted is None:
                found[key] = matrix if matrix.ndim < 4 else matrix.permute(0, 2, 3, 1)
                if "conv1d" in key and matrix.ndim == 3:
                    found[key] = matrix.transpose(1, 2)
                continue
            own[module] = dict(zip(("bits", "group_size"), wanted, strict=True))
            names = [f"{module}.{part}" for part in ("weight", "scales", "biases")]
            found |= dict(zip(names, quantise_mlx(matrix, *wanted), strict=True))
    settings = {"bits": 4, "group_size": 64, **own}
    return write(folder, base, found, config | {"quantization": settings})


def is_quantised(module, matrix):
    named = module.endswith(("_proj", "per_layer_input_gate", "per_layer_projection", "tokens"))
    return named and "language_model" in module and matrix.ndim in (2, 3)


def uniform(module, matrix):
    return (4, 32) if is_quantised(module, matrix) and matrix.shape[-1] % 32 == 0 else None


def mixed(module, matrix):
    """Every number of bits; within one pile of experts, several."""
    if uniform(module, matrix) is None:
        return None
    number = sum(map(ord, module))
    group = 64 if matrix.shape[-1] % 64 == 0 and number % 2 else 32
    return (2, 3, 4, 5, 6, 8)[number % 6], group


@pytest.mark.parametrize("choose", [pytest.param(uniform, marks=pytest.mark.slow), mixed])
def test_mlx_is_packed_without_rounding(base, tmp_path, choose):
    folder = make_mlx(tmp_path / "mlx", base, choose)
    packed = list_tensors(gt.pack(folder, tmp_path / "packed"))
    dense = list_tensors(from_mlx(folder, tmp_path / "dense"))
    assert packed.keys() == dense.keys()
    for name, tensor in dense.items():
        assert torch.equal(packed[name].read(), tensor.read()), name
    num_packed = sum(isinstance(tensor, UnpackedTensor) for tensor in packed.values())
    assert num_packed > 40
    if choose is uniform:  # as many bytes as the file has
        name = next(name for name, x in packed.items() if isinstance(x, UnpackedTensor))
        assert sum(part.num_bytes for part in packed[name].parts) * 8 == 5 * len(
            packed[name].read().flatten()
        )
    one, _ = gt.load_model(folder, device="cpu", dtype="bfloat16")
    other, _ = gt.load_model(tmp_path / "dense", device="cpu", dtype="bfloat16")
    other.set_experts_implementation("eager")
    ids = torch.arange(5, 25)[None]
    if "26b" not in base.parent.name:  # experts' tokens are summed in another order
        assert torch.equal(one(input_ids=ids).logits, other(input_ids=ids).logits)


def test_what_is_wrong_with_a_quantised_file_is_named(base, tmp_path):
    folder = make_mlx(tmp_path / "mlx", base, uniform)
    for wish in ({"bits": 4}, {"grid": "affine"}, {"group": 32}):
        with pytest.raises(ConfigError, match="keeps its numbers"):
            gt.pack(folder, tmp_path / "packed", **wish)
    with pytest.raises(ConfigError, match="bits is 8, and the weights of mlx are packed in 4"):
        gt.load_model(folder, device="cpu", bits=8)
    with pytest.raises(CheckpointError, match=r"quantised by MLX.* plan for that folder"):
        gt.plan(folder, device="cpu", memory_gib=4)
    tensors, config = read(folder)
    name = next(name for name in tensors if name.endswith("layers.0.self_attn.q_proj.weight"))
    module = name.removesuffix(".weight")
    for edit, message in (
        (lambda t: t.pop(name), "1 missing .*q_proj.weight"),
        (lambda t: t.update({f"{module}.scales": t[f"{module}.scales"][:, :1]}), "does not fit"),
        (lambda t: t.update({name: t[name][:-1]}), "does not fit"),
        (lambda t: t.update({f"{module}x.weight": t[name].float()}), "1 unexpected .*q_projx"),
    ):
        changed = dict(tensors)
        edit(changed)
        wrong = write(tmp_path / message[:3], base, changed, config)
        with pytest.raises(CheckpointError, match=message):
            gt.pack(wrong, tmp_path / "packed")
        shutil.rmtree(wrong)
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"quantization": {"mode": "mxfp4", "bits": 4, "group_size": 32}}, "mxfp4"),
        ({"quantization": {"mode": "nvfp4", "bits": 4, "group_size": 16}}, "nvfp4"),
        (
            {"quantization_config": {
                "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"
            }},
            "bitsandbytes nf4",
        ),
        *(
            ({"quantization_config": {"quant_method": method, "bits": 4}}, method)
            for method in ("gemma", "torchao", "gptq", "awq", "hqq", "mxfp4")
        ),
        (
            {"quantization_config": {
                "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"
            }},
            "compressed-tensors nvfp4-pack-quantized",
        ),
    ],
)  # fmt: skip
def test_what_is_not_taken_is_refused_with_what_to_use(base, tmp_path, settings, what):
    tensors, config = read(base)
    folder = write(tmp_path / "gemma-4-E4B-it-small", base, tensors, config | settings)
    for call in (gt.load_model, lambda path: gt.pack(path, tmp_path / "packed")):
        with pytest.raises(CheckpointError) as error:
            call(folder)
        assert f"'{what}'" in str(error.value)
        assert "google/gemma-4-E4B-it-qat-q4_0-unquantized" in str(error.value)


def make_compressed(folder, base, choose):
    """As ``pack_to_int32`` packs: the same stream, of numbers from 0."""
    tensors, config = read(base)
    found = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        wanted = choose(module, tensor)
        if wanted is None or ".layers." not in name or tensor.ndim != 2:
            found[name] = tensor
            continue
        bits, group = wanted
        columns = tensor.shape[-1]
        numbers = torch.randint(0, 2**bits, tensor.shape, dtype=torch.uint8)
        found[f"{module}.weight_packed"] = write_stream(numbers, bits).view(torch.int32)
        scales = torch.rand(len(tensor), columns // (group or columns))
        found[f"{module}.weight_scale"] = scales.to(torch.bfloat16)
        found[f"{module}.weight_shape"] = torch.tensor(tensor.shape)
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {"weights": {"num_bits": 4, "group_size": 32}},
            "group_1": {"weights": {"num_bits": 8, "strategy": "channel"}},
        },
    }
    return write(folder, base, found, config | {"quantization_config": settings})


def four_or_eight(module, matrix):
    if uniform(module, matrix) is None:
        return None
    return (8, None) if "mlp" in module else (4, 32)


def test_compressed_tensors_are_packed_without_rounding(base, tmp_path):
    folder = make_compressed(tmp_path / "ct", base, four_or_eight)
    packed = list_tensors(gt.pack(folder, tmp_path / "packed"))
    tensors, _ = read(folder)
    compared = set()
    for name in (name for name in tensors if name.endswith("weight_packed")):
        module = name.removesuffix(".weight_packed")
        scales, shape = (tensors[f"{module}.weight_{part}"] for part in ("scale", "shape"))
        bits = 32 * tensors[name].shape[-1] // int(shape[1])
        places = torch.arange(0, 32, bits)
        numbers = (tensors[name].long()[..., None] >> places) & (2**bits - 1)
        numbers = (numbers.flatten(-2) - 2 ** (bits - 1)).to(torch.bfloat16)
        expected = numbers * scales.repeat_interleave(int(shape[1]) // scales.shape[1], dim=-1)
        weight = packed[f"{module}.weight"]
        assert torch.equal(weight.read(), expected)
        compared.add(str(weight.grid)[:-2])
    assert compared >= {"symmetric-4-", "symmetric-8-"} or "symmetric-8-1" in compared
    gt.load_model(folder, device="cpu")

    name = next(name for name in tensors if name.endswith("weight_packed"))
    tensors[name] = tensors[name][:, :-1]
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match="does not fit"):
        gt.pack(write(tmp_path / "wrong", base, tensors, config), tmp_path / "again")


KINDS = [gguf.GGMLQuantizationType[name] for name in ("Q4_0", "Q8_0", "BF16", "F32", "Q4_1")]


def make_gguf(folder, base):
    """Kinds in turn, as in files that llama.cpp mixes; the configuration beside them."""
    tensors, config = read(base)
    names = Names(config["model_type"], config["text_config"]["num_hidden_layers"])
    shutil.copytree(base, folder)
    (folder / "model.safetensors").unlink()
    writer = gguf.GGUFWriter(folder / "model.gguf", names.architecture)
    expected = {}
    for index, (name, tensor) in enumerate(sorted(tensors.items())):
        if (own := names.translate(name)) is None:
            continue
        fits = is_quantised(name.removesuffix(".weight"), tensor) and tensor.shape[-1] % 32 == 0
        kind = KINDS[index % len(KINDS)] if fits else KINDS[3]
        data = gguf.quantize(tensor.float().numpy(), kind)
        writer.add_tensor(own, data, raw_dtype=kind)
        expected[name] = kind, torch.from_numpy(gguf.dequantize(data, kind).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder, expected


def test_gguf_is_packed_without_rounding(base, tmp_path, caplog):
    folder, expected = make_gguf(tmp_path / "file", base)
    caplog.clear()
    packed = list_tensors(gt.pack(folder, tmp_path / "packed"))
    others = [
        name
        for name, (kind, _) in expected.items()
        if kind not in KINDS[2:4] and not isinstance(packed[name], UnpackedTensor)
    ]
    assert f"; {len(others)} other quantised tensors" in caplog.text
    assert packed.keys() == expected.keys()
    num_packed = 0
    for name, (kind, weight) in expected.items():
        if isinstance(packed[name], UnpackedTensor):
            num_packed += 1
            numbers, steps = (part.read() for part in packed[name].parts)
            assert steps.dtype == torch.float16
            exact = packed[name].grid.unpack(Packed(numbers, steps.float(), None))
            assert torch.equal(exact, weight)
        elif kind in (KINDS[2], KINDS[3]):
            assert torch.equal(packed[name].read().float(), weight)
        else:
            assert torch.equal(packed[name].read(), weight.to(torch.bfloat16))
    assert num_packed > 10
    model, _ = gt.load_model(folder, device="cpu", dtype="float32")
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            assert torch.equal(module.weight, expected[f"{name}.weight"][1])
