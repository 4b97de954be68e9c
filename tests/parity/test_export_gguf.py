"""GGUF files run in real llama.cpp, with the logits and greedy tokens of transformers and PEFT."""

import json
import subprocess
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gemma_tuner.export.gguf import export_gguf, export_gguf_adapter
from gemma_tuner.export.gguf_metadata import add_tokenizer
from gemma_tuner.models.adapter_files import save_adapter
from gemma_tuner.testing import tiny_model
from gemma_tuner.testing.models.tiny import _spread_weights
from tests.export_parts import add_trained_lora, logits, save_base, text_inputs

ENVIRONMENT = Path(__file__).resolve().parents[2] / ".venv-llama"
PYTHON = ENVIRONMENT / "bin" / "python"
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (ENVIRONMENT / ".installed").exists(),
        reason="LLAMA.CPP IS NOT TESTED: make its environment with `make .venv-llama/.installed`",
    ),
]
NUM_TOKENS = 60  # the tiny models' window is 32
NUM_SAID = 24


def run_llama(tmp_path, cases):
    outputs = [tmp_path / f"output-{index}.json" for index in range(len(cases))]
    cases = [
        {name: str(value) if isinstance(value, Path) else value for name, value in case.items()}
        | {"output": str(output)}
        for case, output in zip(cases, outputs, strict=True)
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    script = Path(__file__).with_name("llama_run.py")
    done = subprocess.run(
        [PYTHON, script, tmp_path / "cases.json"],
        check=False,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(output.read_text()) for output in outputs]


class HalfGelu(torch.nn.Module):
    """llama.cpp looks GELU up in a table of float16."""

    def forward(self, x):
        y = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, y))


def use_half_gelu(model, monkeypatch):
    for name, module in model.named_modules():
        if "language_model" in name and hasattr(module, "act_fn"):
            monkeypatch.setattr(module, "act_fn", HalfGelu())


def sparsify_as_llama(monkeypatch):
    """llama.cpp's standard deviation has n - 1: 3e-5 more at 3n's released width, 0.4 % here."""

    def sparsify(self, inputs):
        cutoff = inputs.mean(dim=-1, keepdim=True)
        cutoff = cutoff + 1.6448533535003662 * inputs.std(dim=-1, keepdim=True)
        return torch.relu(inputs - cutoff)

    kind = transformers.models.gemma3n.modeling_gemma3n.Gemma3nTextMLP
    monkeypatch.setattr(kind, "_gaussian_topk", sparsify)


def save_gemma3n(folder):
    """A 3n as small as llama.cpp lets it be: it has the released ones' structure built in."""
    small, processor = tiny_model("gemma3n")
    config = small.config.to_dict()
    config["text_config"] |= {
        "num_hidden_layers": 22,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 256,
        "laurel_rank": 64,
        "layer_types": ([*["sliding_attention"] * 4, "full_attention"] * 5)[:22],
        "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 12,
        "intermediate_size": [128] * 22,
    }
    del config["architectures"]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = transformers.Gemma3nForConditionalGeneration(transformers.Gemma3nConfig(**config))
        _spread_weights(model)
    model.eval().requires_grad_(requires_grad=False)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    prefix = "model.language_model.layers"
    for layer in (20, 21):
        for name in ("k_proj.weight", "v_proj.weight", "k_norm.weight"):
            tensors[f"{prefix}.{layer}.self_attn.{name}"] = tensors[
                f"{prefix}.0.self_attn.{name}"
            ].clone()
    save_file(tensors, weights, metadata={"format": "pt"})
    return model


def save_plain_experts(folder):
    """Experts without scales: on others llama.cpp's adapters are not those of the model."""
    model, processor = tiny_model("gemma4-26b-a4b")
    for name, parameter in model.named_parameters():
        if name.endswith("per_expert_scale"):
            parameter.fill_(1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


BASES = {
    "gemma4-e2b": lambda folder: save_base("gemma4-e2b", folder)[0],
    "gemma4-12b": lambda folder: save_base("gemma4-12b", folder)[0],
    "gemma4-31b": lambda folder: save_base("gemma4-31b", folder)[0],
    "gemma4-26b-a4b": lambda folder: save_base("gemma4-26b-a4b", folder)[0],
    "experts": save_plain_experts,
    "gemma3n": save_gemma3n,
}


@pytest.mark.parametrize("name", BASES)
def test_merged_and_adapter_alone(name, tmp_path, monkeypatch):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = BASES[name](base)
    targets = ("language", "experts") if name == "experts" else ("language",)
    variant = "rslora" if name == "gemma4-31b" else "lora"
    model = add_trained_lora(model, targets=targets, variant=variant)
    save_adapter(model, adapter)
    inputs = text_inputs(NUM_TOKENS)
    sparsify_as_llama(monkeypatch)
    said_with_gelu = say(model, inputs)
    use_half_gelu(model, monkeypatch)
    said = say(model, inputs)
    # 3n's twenty-two random layers magnify a step of the table to half a logit
    assert name == "gemma3n" or said_with_gelu == said
    expected = logits(model, inputs)[0]
    with model.disable_adapter():
        plain = logits(model, inputs)[0]
    assert (plain - expected).abs().max() > 3
    assert (plain.argmax(-1) != expected.argmax(-1)).sum() > 5

    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            parameter.data.zero_()
    save_adapter(model, tmp_path / "nothing")
    export_gguf(adapter, tmp_path / "merged.gguf", file_type="f32", base=base)
    export_gguf(tmp_path / "nothing", tmp_path / "base.gguf", file_type="f32", base=base)
    export_gguf_adapter(adapter, tmp_path / "lora.gguf", base=base)
    given = {"ids": inputs["input_ids"][0].tolist(), "generate": NUM_SAID}
    merged, alone, added = run_llama(
        tmp_path,
        [
            {"model": tmp_path / "merged.gguf"} | given,
            {"model": tmp_path / "base.gguf"} | given,
            {"model": tmp_path / "base.gguf", "lora": tmp_path / "lora.gguf"} | given,
        ],
    )
    for got, wanted in ((merged, expected), (alone, plain), (added, expected)):
        # One step of the GELU table is 5e-4 of a value, and which step it is may be another;
        # so may be which experts a token goes to.
        got_logits = torch.tensor(got["logits"])
        difference = (got_logits - wanted).abs()
        assert (difference > 0.06).float().mean() < 0.02
        assert difference.mean() < 6e-3
        assert (got_logits.argmax(-1) != wanted.argmax(-1)).sum() <= 1
    # after ten tokens two are as likely for 3n, whose random layers magnify every rounding
    num_alike = 10 if name == "gemma3n" else NUM_SAID
    for got in (merged, added):
        assert got["said"][:num_alike] == said[:num_alike]


def say(model, inputs):
    """What transformers says, greedily."""
    with torch.no_grad():
        ids = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=torch.ones_like(inputs["input_ids"]),
            max_new_tokens=NUM_SAID,
            min_new_tokens=NUM_SAID,
            do_sample=False,
        )
    return ids[0, NUM_TOKENS:].tolist()


@pytest.mark.parametrize(("file_type", "share"), [("f16", 0.01), ("bf16", 0.05), ("q8_0", 0.1)])
def test_smaller_files_lose_little(file_type, share, tmp_path):
    """llama.cpp rounds what it multiplies with these weights to their type, too."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = add_trained_lora(save_base("gemma4-e2b", base)[0])
    save_adapter(model, adapter)
    inputs = text_inputs(NUM_TOKENS)
    expected = logits(model, inputs)[0]
    export_gguf(adapter, tmp_path / "m.gguf", file_type=file_type, base=base)
    given = {"ids": inputs["input_ids"][0].tolist()}
    [got] = run_llama(tmp_path, [{"model": tmp_path / "m.gguf"} | given])
    difference = torch.tensor(got["logits"]) - expected
    assert difference.abs().mean() < share * expected.abs().mean()
    assert (torch.tensor(got["logits"]).argmax(-1) == expected.argmax(-1)).float().mean() > 0.9


TOKENIZER = DATA / "models" / "gemma-4-E2B-it"


@pytest.mark.skipif(
    not TOKENIZER.is_dir(), reason="THE REAL TOKENIZER IS NOT TESTED: ../shared/data is not there"
)
def test_the_released_tokenizer_gives_the_same_ids(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "vocabulary.gguf", "gemma4")
    add_tokenizer(writer, TOKENIZER, 262_144)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    texts = [
        "  two  spaces",
        "\n\nnew\n\n\n lines\t\ttabs",
        "naïve café ☕ 日本語テスト 한국어 عربى हिन्दी 👩‍👩‍👧‍👦 𝒳",
        "if (a<b) { return '<table>'; } <unused5> </s>",
        "<|turn>user\nHi<turn|>\n<|turn>model\n<|channel>thought\n<channel|>",
        "12345 67.89 ▁ \x01 \x7f",
    ]
    for name in ("gsm8k", "multiturn", "wikisql-mlx"):
        lines = (DATA / name / "manifest.jsonl").read_text().splitlines()
        texts += [line[:1500] for line in lines[:100]]
    [got] = run_llama(tmp_path, [{"model": tmp_path / "vocabulary.gguf", "texts": texts}])
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    expected = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert got["ids"] == expected
