"""GGUF files hold the merged decoder or the adapter; parity/test_export_gguf.py runs them."""

import json
import re
import shutil
from pathlib import Path

import gguf
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import gemma_tuner as gt
from gemma_tuner.checkpoints.writing import complete_config
from gemma_tuner.errors import CheckpointError, ConfigError
from gemma_tuner.export.adapter import export_adapter
from gemma_tuner.export.gguf import export_gguf, export_gguf_adapter
from gemma_tuner.export.gguf_names import check_runs
from gemma_tuner.export.merged import export_merged
from gemma_tuner.models.adapter_files import save_adapter
from tests.export_parts import add_trained_lora, save_base
from tests.limits import files_limited_to

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
# Within a layer, and beside the layers: what llama.cpp's loader asks for.
IN_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "layer_scalar": "layer_output_scale.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "per_layer_input_gate.weight": "inp_gate.weight",
    "per_layer_projection.weight": "proj.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    "post_feedforward_layernorm_1.weight": "post_ffw_norm_1.weight",
    "post_feedforward_layernorm_2.weight": "post_ffw_norm_2.weight",
    "post_per_layer_input_norm.weight": "post_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "pre_feedforward_layernorm_2.weight": "pre_ffw_norm_2.weight",
    "experts.down_proj": "ffn_down_exps.weight",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "router.proj.weight": "ffn_gate_inp.weight",
    "router.scale": "ffn_gate_inp.scale",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
}
BESIDE = {
    "embed_tokens.weight": "token_embd.weight",
    "embed_tokens_per_layer.weight": "per_layer_token_embd.weight",
    "norm.weight": "output_norm.weight",
    "per_layer_model_projection.weight": "per_layer_model_proj.weight",
    "per_layer_projection_norm.weight": "per_layer_proj_norm.weight",
}


@pytest.fixture(scope="module")
def e2b(tmp_path_factory):
    """A base in float32, an adapter on its decoder, and both merged."""
    folder = tmp_path_factory.mktemp("e2b")
    model, _ = save_base("gemma4-e2b", folder / "base")
    export_adapter(add_trained_lora(model), folder / "adapter")
    export_merged(folder / "adapter", folder / "merged", base=folder / "base")
    return folder


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe")
    model, _ = save_base("gemma4-26b-a4b", folder / "base")
    model = add_trained_lora(model, targets=("language", "experts"))
    save_adapter(model, folder / "adapter")
    return folder


def expected_name(name):
    rest = name.removeprefix("model.language_model.")
    if match := re.fullmatch(r"layers\.(\d+)\.(.+)", rest):
        return f"blk.{match[1]}.{IN_LAYER[match[2]]}"
    return BESIDE[rest]


def read_decoder(folder):
    """The decoder's tensors by the names that they should have in llama.cpp."""
    return {
        expected_name(name): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
        if name.startswith("model.language_model.")
    }


def read_gguf(path):
    """Tensors as float32 with their kinds, and metadata."""
    reader = gguf.GGUFReader(path)
    tensors = {
        t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy())
        for t in reader.tensors
    }
    for t in reader.tensors:
        assert tensors[t.name].shape == tuple(reversed(t.shape.tolist()))
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    return tensors, kinds, {key: field.contents() for key, field in reader.fields.items()}


def assert_same_file(path, merged, file_type):
    """Every tensor of the merged decoder is in the file under its name, rounded as asked."""
    tensors, kinds, _ = read_gguf(path)
    assert tensors.keys() - {"rope_freqs.weight"} == merged.keys()
    for name, tensor in merged.items():
        is_vector = tensor.ndim == 1 or name.endswith(("_norm.weight", "ffn_gate_inp.weight"))
        kind = "F32" if is_vector else file_type.upper()
        if kind == "Q8_0" and tensor.shape[-1] % 32:
            kind = "F16"
        assert kinds[name] == kind, name
        if kind == "Q8_0":
            largest = tensor.reshape(-1, 32).abs().amax(1)
            quantum = (largest / 127).repeat_interleave(32).reshape(tensor.shape)
            # half a quantum, and what rounding the quantum itself to float16 moves
            assert ((tensors[name] - tensor).abs() <= quantum * 0.57 + 1e-8).all(), name
        else:
            dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
            assert torch.equal(tensors[name], tensor.to(dtype).float()), name


@pytest.mark.parametrize("file_type", ["f32", "f16", "bf16", "q8_0"])
def test_the_file_holds_the_merged_decoder(e2b, tmp_path, file_type, capsys):
    report = export_gguf(
        e2b / "adapter", tmp_path / "m.gguf", file_type=file_type, base=e2b / "base"
    )
    merged = read_decoder(e2b / "merged")
    assert_same_file(tmp_path / "m.gguf", merged, file_type)
    assert (report.num_merged, report.num_copied) == (48, len(merged) - 48)
    assert report.num_bytes < (tmp_path / "m.gguf").stat().st_size
    low, high = {
        "f32": (1e-8, 1e-6),
        "f16": (1e-4, 0.02),
        "bf16": (1e-3, 0.1),
        "q8_0": (1e-3, 0.3),
    }[file_type]
    assert low <= report.lost <= high
    assert "217 tensors of towers and projectors are not in it" in capsys.readouterr().err


def test_experts_routers_and_keys_used_as_values(moe, tmp_path):
    export_merged(moe / "adapter", tmp_path / "merged", base=moe / "base")
    export_gguf(moe / "adapter", tmp_path / "m.gguf", file_type="f32", base=moe / "base")
    assert_same_file(tmp_path / "m.gguf", read_decoder(tmp_path / "merged"), "f32")
    tensors, _, metadata = read_gguf(tmp_path / "m.gguf")
    assert tensors["blk.0.ffn_gate_up_exps.weight"].shape == (4, 64, 64)
    assert "blk.2.attn_v.weight" not in tensors
    assert metadata["gemma4.attention.head_count_kv"] == [2, 2, 1, 2, 2, 1]
    assert metadata["gemma4.feed_forward_length"] == 128
    assert metadata["gemma4.expert_count"] == 4
    assert metadata["gemma4.expert_used_count"] == 2
    assert metadata["gemma4.expert_feed_forward_length"] == 32
    assert metadata["gemma4.embedding_length_per_layer_input"] == 0


def test_metadata_says_what_the_model_is(e2b, tmp_path):
    export_gguf(e2b / "adapter", tmp_path / "m.gguf", base=e2b / "base")
    tensors, _, metadata = read_gguf(tmp_path / "m.gguf")
    expected = {
        "general.architecture": "gemma4",
        "general.type": "model",
        "general.file_type": gguf.LlamaFileType.MOSTLY_BF16,
        "general.quantization_version": 2,
        "gemma4.attention.head_count": 4,
        "gemma4.attention.head_count_kv": [1] * 8,
        "gemma4.attention.key_length": 32,
        "gemma4.attention.key_length_swa": 16,
        "gemma4.attention.value_length": 32,
        "gemma4.attention.value_length_swa": 16,
        "gemma4.attention.shared_kv_layers": 4,
        "gemma4.attention.sliding_window": 32,
        "gemma4.attention.sliding_window_pattern": [True, True, True, False] * 2,
        "gemma4.block_count": 8,
        "gemma4.context_length": 8192,
        "gemma4.embedding_length": 64,
        "gemma4.embedding_length_per_layer_input": 8,
        "gemma4.feed_forward_length": [128] * 4 + [256] * 4,
        "gemma4.final_logit_softcapping": 30.0,
        "gemma4.rope.dimension_count": 32,
        "gemma4.rope.dimension_count_swa": 16,
        "gemma4.rope.freq_base": 1e6,
        "gemma4.rope.freq_base_swa": 1e4,
    }
    assert {key: metadata.get(key) for key in expected} == expected
    assert metadata["gemma4.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    # a quarter of the pairs turn, in full attention
    assert tensors["rope_freqs.weight"].tolist() == [1.0] * 4 + [pytest.approx(1e30)] * 12
    assert str(tmp_path) not in json.dumps({k: str(v) for k, v in metadata.items()})


def test_the_tokenizer_is_the_checkpoints_own(e2b, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(e2b / "base", base)
    generation = json.loads((base / "generation_config.json").read_text())
    generation["suppress_tokens"] = [6, 9]
    (base / "generation_config.json").write_text(json.dumps(generation))
    export_gguf(e2b / "adapter", tmp_path / "m.gguf", base=base)
    _, _, metadata = read_gguf(tmp_path / "m.gguf")
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert metadata["tokenizer.ggml.model"] == "gemma4"
    assert tokens == sorted(vocabulary, key=vocabulary.get)
    assert len(metadata["tokenizer.ggml.scores"]) == len(types) == 512
    assert metadata["tokenizer.ggml.merges"] == [
        " ".join(pair) for pair in tokenizer["model"]["merges"]
    ]
    kinds = {token: gguf.TokenType(kind).name for token, kind in zip(tokens, types, strict=True)}
    assert kinds["<0x0A>"] == "BYTE"
    assert kinds["model"] == kinds["<unused400>"] == "NORMAL"
    assert kinds["<turn|>"] == kinds["<bos>"] == kinds["<|image|>"] == "CONTROL"
    assert kinds["<|channel>"] == kinds['<|"|>'] == "USER_DEFINED"
    special = {"bos": 2, "eos": 1, "unknown": 3, "padding": 0, "mask": 4}
    for name, index in special.items():
        assert metadata[f"tokenizer.ggml.{name}_token_id"] == index
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.add_space_prefix"] is False
    assert metadata["tokenizer.ggml.suppress_tokens"] == [6, 9]
    assert metadata["tokenizer.chat_template"] == (base / "chat_template.jinja").read_text()


def test_the_adapter_alone(e2b, tmp_path):
    path = export_gguf_adapter(e2b / "adapter", tmp_path / "a.gguf", base=e2b / "base")
    tensors, kinds, metadata = read_gguf(path)
    stored = load_file(e2b / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == len(stored) == 96
    for name, tensor in stored.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_(A|B)\.weight", name)
        assert match
        got = f"{expected_name(match[1] + '.weight')}.lora_{match[2].lower()}"
        assert torch.equal(tensors[got], tensor), got
    assert set(kinds.values()) == {"F32"}
    expected = {
        "general.architecture": "gemma4",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 8.0,
    }
    assert {key: metadata.get(key) for key in expected} == expected


@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_and_alphas_of_their_own(e2b, tmp_path, use_rslora):
    """llama.cpp computes ``alpha / rank * b @ a`` with one alpha and each pair's own rank."""
    lora = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=use_rslora,
        target_modules=["q_proj", "o_proj"],
        exclude_modules=r".*(vision|audio)_tower.*",
        rank_pattern={"layers.0.self_attn.q_proj": 2},
        alpha_pattern={"layers.0.self_attn.o_proj": 16},
        init_lora_weights=False,
    )
    base = gt.testing.tiny_model("gemma4-e2b")[0]
    model = peft.get_peft_model(base, lora)
    model.save_pretrained(tmp_path / "adapter")
    path = export_gguf_adapter(tmp_path / "adapter", tmp_path / "a.gguf", base=e2b / "base")
    tensors, _, metadata = read_gguf(path)
    for layer, name, own in (
        (0, "q_proj", "attn_q"),
        (0, "o_proj", "attn_output"),
        (5, "q_proj", "attn_q"),
    ):
        a, b = (tensors[f"blk.{layer}.{own}.weight.lora_{end}"] for end in "ab")
        got = metadata["adapter.lora.alpha"] / len(a) * b @ a
        module = model.get_submodule(
            f"base_model.model.model.language_model.layers.{layer}.self_attn.{name}"
        )
        torch.testing.assert_close(got, module.get_delta_weight("default"), rtol=0, atol=1e-6)


def test_what_llama_cpp_would_not_use_is_refused(e2b, moe, tmp_path):
    """Each could be loaded there, and the answers would be others."""
    base = gt.testing.tiny_model("gemma4-e2b")[0]
    cases = {
        "DoRA": ({"variant": "dora"}, "is a DoRA"),
        "towers": ({"targets": ("language", "vision")}, "weights of towers and projectors"),
        "inputs": (
            {"targets": (r"model\.language_model\.per_layer_model_projection",)},
            "no adapter on model.language_model.per_layer_model_projection",
        ),
    }
    for name, (settings, message) in cases.items():
        model = add_trained_lora(base, **settings)
        save_adapter(model, tmp_path / name)
        base = model.unload()
        with pytest.raises(CheckpointError, match=message):
            export_gguf_adapter(tmp_path / name, tmp_path / "a.gguf", base=e2b / "base")
    with pytest.raises(CheckpointError, match="weights of towers and projectors"):
        export_gguf(tmp_path / "towers", tmp_path / "a.gguf", base=e2b / "base")
    with pytest.raises(CheckpointError, match="per_expert_scale"):
        export_gguf_adapter(moe / "adapter", tmp_path / "a.gguf", base=moe / "base")
    assert list(tmp_path.glob("*.gguf")) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_activation", "silu"),
        ("attention_bias", True),
        ("layer_types", ["sliding_attention"] * 7 + ["full_attention"]),
        ("rope_parameters", {"full_attention": {"rope_type": "yarn", "factor": 4.0}}),
    ],
)
def test_a_model_that_llama_cpp_would_compute_differently_is_refused(e2b, name, value):
    text = json.loads((e2b / "base" / "config.json").read_text())["text_config"]
    check_runs("gemma4", text)
    with pytest.raises(CheckpointError, match="as another model"):
        check_runs("gemma4", text | {name: value})


@pytest.mark.parametrize("size", ["E2B", "E4B", "26B-A4B", "31B"])
def test_released_gemma4_is_what_llama_cpp_computes(size):
    folder = DATA / "models" / f"gemma-4-{size}-it"
    if not folder.is_dir():
        pytest.skip("RELEASED CONFIGURATIONS ARE NOT TESTED: ../shared/data is not there")
    config = transformers.AutoConfig.from_pretrained(folder).to_dict()
    check_runs("gemma4", complete_config(config)["text_config"])


@pytest.mark.parametrize("num_layers", [30, 35])
def test_released_gemma3n_is_what_llama_cpp_computes(num_layers):
    """transformers' defaults are the released ones'."""
    text = transformers.Gemma3nTextConfig(
        num_hidden_layers=num_layers,
        num_kv_shared_layers=num_layers - 20,
        activation_sparsity_pattern=[0.95] * 10 + [0.0] * (num_layers - 10),
    ).to_dict()
    check_runs("gemma3n", text)


def test_a_gemma3n_of_another_structure_is_refused(tmp_path):
    """llama.cpp has the released ones' structure built in: 20 layers with keys of their own."""
    model, _ = save_base("gemma3n", tmp_path / "base")
    save_adapter(add_trained_lora(model), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="laurel_rank is 4, there 64") as info:
        export_gguf(tmp_path / "adapter", tmp_path / "m.gguf", base=tmp_path / "base")
    assert "num_kv_shared_layers is 4, there -12" in str(info.value)


def test_bad_settings_name_what_may_be(e2b, tmp_path):
    with pytest.raises(ConfigError, match="file_type is 'q4_k'; it may be f32, f16, bf16, q8_0"):
        export_gguf(e2b / "adapter", tmp_path / "m.gguf", file_type="q4_k", base=e2b / "base")
    for export in (export_gguf, export_gguf_adapter):
        with pytest.raises(ConfigError, match=r"end it in \.gguf"):
            export(e2b / "adapter", tmp_path / "m", base=e2b / "base")


def test_an_adapter_for_another_base_is_refused(e2b, moe, tmp_path):
    other = tmp_path / "other"
    save_base("gemma4-e2b", other, seed=5)
    for export in (export_gguf, export_gguf_adapter):
        with pytest.raises(CheckpointError, match="for another model than base"):
            export(e2b / "adapter", tmp_path / "m.gguf", base=moe / "base")
        with pytest.raises(CheckpointError, match="the same shapes but other weights"):
            export(e2b / "adapter", tmp_path / "m.gguf", base=other)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_an_existing_file_is_left_alone(e2b, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"mine")
    for export in (export_gguf, export_gguf_adapter):
        with pytest.raises(CheckpointError, match=r"'m\.gguf' exists already"):
            export(e2b / "adapter", tmp_path / "m.gguf", base=e2b / "base")
    assert (tmp_path / "m.gguf").read_bytes() == b"mine"


def test_a_full_disk_leaves_nothing(e2b, tmp_path, monkeypatch):
    with files_limited_to(10**5):
        for export in (export_gguf, export_gguf_adapter):
            with pytest.raises(CheckpointError, match=r"cannot write 'm\.gguf': File too large"):
                export(e2b / "adapter", tmp_path / "m.gguf", base=e2b / "base")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match="MB are needed and 0 MB are free"):
        export_gguf(e2b / "adapter", tmp_path / "m.gguf", base=e2b / "base")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_export_are_removed(e2b, tmp_path):
    (tmp_path / ".m.gguf.tmp").write_bytes(b"half")
    export_gguf_adapter(e2b / "adapter", tmp_path / "m.gguf", base=e2b / "base")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize(
    ("value", "file_type", "message"),
    [
        (float("nan"), "bf16", "infinite or undefined"),
        (1e30, "f16", "beyond float16's range"),
    ],
)
def test_numbers_that_cannot_be_kept_are_refused(e2b, tmp_path, value, file_type, message):
    shutil.copytree(e2b / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name][0, 0] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        export_gguf(
            tmp_path / "adapter", tmp_path / "m.gguf", file_type=file_type, base=e2b / "base"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_tokenizer_that_does_not_belong_is_refused(e2b, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(e2b / "base", base)
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    (base / "tokenizer.json").unlink()
    cases = {
        "no readable tokenizer.json": None,
        "not of Gemma's kind": tokenizer | {"model": {"type": "WordPiece"}},
        "ids up to 512, and the model has 512": tokenizer
        | {"added_tokens": [{"id": 512, "content": "<new>", "special": True}]},
    }
    for message, content in cases.items():
        if content:
            (base / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=message):
            export_gguf(e2b / "adapter", tmp_path / "m.gguf", base=base)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
