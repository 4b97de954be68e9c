from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemma_tuner.checkpoints.loading import load_model
from gemma_tuner.errors import ConfigError
from gemma_tuner.models.lora import LoraConfig, add_lora
from gemma_tuner.models.lora_linear import use_lean_adapters
from gemma_tuner.testing import FAMILIES, tiny_model

LANGUAGE = {  # shared layers have no k and v, K=V layers no v
    "gemma4-e2b": 4 * 7 + 4 * 5,
    "gemma4-12b": 4 * 7 + 2 * 6,
    "gemma4-26b-a4b": 4 * 7 + 2 * 6,
    "gemma4-31b": 4 * 7 + 2 * 6,
    "gemma3n": 4 * 7 + 4 * 5,
}
PARTS = {  # family, target: number of modules and the prefix they lie under
    **{
        (family, "language"): (count, "language_model.layers")
        for family, count in LANGUAGE.items()
    },
    ("gemma4-e2b", "vision"): (14, "vision_tower"),
    ("gemma4-31b", "vision"): (14, "vision_tower"),
    ("gemma4-e2b", "audio"): (20, "audio_tower"),
    ("gemma3n", "audio"): (20, "audio_tower"),
    ("gemma4-e2b", "projectors"): (2, "embed_"),
    ("gemma4-12b", "projectors"): (2, "embed_"),
    ("gemma4-31b", "projectors"): (1, "embed_vision"),
    ("gemma3n", "projectors"): (2, "embed_"),
    ("gemma4-26b-a4b", "experts"): (12, "language_model.layers"),
}


def wrap(model: Any, **settings: Any) -> Any:
    return add_lora(model, LoraConfig(**settings))


def adapted(model):
    """Names of the modules that hold adapters, as the plain model calls them."""
    return {
        name.removeprefix("base_model.model.").partition(".lora_")[0]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def take_steps(model, batch, num_steps=3):
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


@pytest.mark.parametrize(("family", "target"), PARTS)
def test_adapters_change_nothing_then_learn_and_reload_in_stock_peft(
    family, target, make_batch, modalities, checkpoints, tmp_path
):
    model, processor = tiny_model(family)
    kinds = {"vision": ("image",), "audio": ("audio",), "projectors": modalities[family][1:]}
    batch = make_batch(processor, *kinds.get(target, ()))
    with torch.no_grad():
        before = model(**batch).logits
    frozen = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model = wrap(model, rank=2, targets=(target,))

    count, prefix = PARTS[family, target]
    names = adapted(model)
    assert all(name.startswith(f"model.{prefix}") for name in names), names
    assert len(names) == count
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, before)

    take_steps(model, batch)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trainable(model))
    with torch.no_grad():
        after = model(**batch).logits
    assert (after - before).abs().max() > 0.1
    for name, parameter in model.get_base_model().named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, frozen[name.replace(".base_layer", "")]), name

    model.save_pretrained(tmp_path)
    fresh, _ = load_model(checkpoints[family], modalities=modalities[family], device="cpu")
    reloaded: Any = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(reloaded(**batch).logits, after)
        inner = reloaded.base_model.model.model(
            **{key: value for key, value in batch.items() if key != "labels"}
        )
        logits = reloaded.base_model.model.lm_head(inner.last_hidden_state)
    torch.testing.assert_close(30 * torch.tanh(logits / 30), after)


@pytest.mark.parametrize("variant", ["dora", "rslora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_variants_begin_at_the_base_and_reload(variant, dtype, checkpoints, make_batch, tmp_path):
    def load():
        return load_model(
            checkpoints["gemma4-e2b"], modalities=("image", "audio"), device="cpu", dtype=dtype
        )

    model, processor = load()
    batch = make_batch(processor, "image", "audio")
    with torch.no_grad():
        before = model(**batch).logits
    targets = ("language", "vision", "audio", "projectors")
    model = wrap(model, rank=2, targets=targets, variant=variant)
    assert len(adapted(model)) == 48 + 14 + 20 + 2
    assert {parameter.dtype for parameter in trainable(model)} == {torch.float32}
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    magnitudes = [name for name, _ in model.named_parameters() if "magnitude" in name]
    assert bool(magnitudes) == (variant == "dora")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, before, atol=1e-4, rtol=0)
    take_steps(model, batch, num_steps=1)
    with torch.no_grad():
        after = model(**batch).logits
    model.save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(load()[0], tmp_path).eval()
    with torch.no_grad():
        stock = reloaded(**batch).logits
        use_lean_adapters(reloaded)
        torch.testing.assert_close(reloaded(**batch).logits, after, atol=0, rtol=0)
    # stock PEFT multiplies in float32 and sums in another order; random weights amplify it
    rounding = {"float32": 1e-5, "bfloat16": 0.1}[dtype]
    assert (stock - after).float().norm() <= rounding * after.float().norm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_trains_the_layers_themselves(dtype, checkpoints, make_batch, tmp_path):
    def load():
        return load_model(
            checkpoints["gemma4-e2b"], modalities=("image", "audio"), device="cpu", dtype=dtype
        )

    targets = ("language", "vision", "audio", "projectors")
    model, processor = load()
    batch = make_batch(processor, "image", "audio")
    plain = load()[0]
    for module in plain.modules():
        if isinstance(module, torch.nn.Linear):
            module.requires_grad_()
    plain(**batch).loss.backward()
    model = wrap(model, variant="full", targets=targets)
    assert {parameter.dtype for parameter in trainable(model)} == {torch.float32}
    loss = model(**batch).loss
    loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 48 + 14 + 20 + 2
    for name, parameter in trained.items():
        short = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        expected = plain.get_parameter(short).grad
        torch.testing.assert_close(parameter.grad.to(expected.dtype), expected)
    with torch.no_grad():
        before = model(**batch).logits
        for parameter in trained.values():
            parameter.sub_(0.1 * parameter.grad)
        after = model(**batch).logits
        assert not torch.equal(after, before)
        with model.disable_adapter():
            assert torch.equal(model(**batch).logits, before)
    model.save_pretrained(tmp_path)
    stock = peft.PeftModel.from_pretrained(load()[0], tmp_path).eval()
    use_lean_adapters(stock)
    with torch.no_grad():
        assert torch.equal(stock(**batch).logits, after)


def test_without_a_config_the_decoder_gets_rank_16():
    model = add_lora(tiny_model("gemma4-e2b")[0])
    assert {p.shape[0] for name, p in model.named_parameters() if "lora_A" in name} == {16}
    assert adapted(model) == adapted(wrap(tiny_model("gemma4-e2b")[0]))


def test_a_bfloat16_layer_multiplies_its_adapter_as_autocast_would():
    model = wrap(tiny_model("gemma4-e2b")[0].bfloat16(), rank=4)
    stock = peft.get_peft_model(
        tiny_model("gemma4-e2b")[0].bfloat16(),
        peft.LoraConfig(r=4, target_modules=r".*language_model.*q_proj"),
    )
    name = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    ours, theirs = model.get_submodule(name), stock.get_submodule(name)
    torch.nn.init.normal_(ours.lora_B["default"].weight)
    theirs.load_state_dict(ours.state_dict())
    theirs.scaling["default"] = ours.scaling["default"]
    x = torch.randn(2, 3, ours.in_features, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = theirs(x)
    found = ours(x)
    assert found.dtype == torch.bfloat16
    # autocast rounds the adapter's output before it is scaled, and again before it is added
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-7)
    found.float().square().sum().backward()
    gradient = ours.lora_A["default"].weight.grad
    assert gradient.dtype == torch.float32
    assert gradient.norm() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_run_reaches_no_tower_even_when_they_are_loaded(family, tmp_path):
    """The adapter's pattern, too, must not reach a tower that another model has."""
    model = wrap(tiny_model(family)[0], rank=2)
    assert not any("tower" in name or "embed" in name for name in adapted(model))
    model.save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(tiny_model(family)[0], tmp_path, is_trainable=True)
    assert adapted(reloaded) == adapted(model)


def test_an_adapter_of_a_text_model_fits_the_full_model(checkpoints, make_batch, tmp_path):
    model, processor = load_model(checkpoints["gemma4-e2b"], device="cpu")
    batch = make_batch(processor)
    model = wrap(model, rank=2)
    take_steps(model, batch, num_steps=1)
    model.save_pretrained(tmp_path)
    full = peft.PeftModel.from_pretrained(tiny_model("gemma4-e2b")[0], tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(full(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("family", ["gemma4-e2b", "gemma3n"])
def test_checkpointing_gives_the_same_gradients_to_the_bit(family, make_batch):
    gradients = []
    for checkpointing in (False, True):
        model, processor = tiny_model(family)
        model = wrap(model, rank=2)
        torch.manual_seed(0)
        for parameter in trainable(model):
            parameter.data.normal_(std=0.1)
        batch = make_batch(processor, "image", "audio")
        if checkpointing:
            base = model.get_base_model()
            base.gradient_checkpointing_enable({"use_reentrant": False})
            base.train()  # transformers checkpoints in train mode alone
        model(**batch).loss.backward()
        gradients.append([parameter.grad for parameter in trainable(model)])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        assert torch.equal(plain, recomputed)


@given(last=st.integers(1, 8))
def test_the_last_layers(last):
    model = wrap(tiny_model("gemma4-e2b")[0], rank=1, layers=last)
    layers = {int(name.split(".")[3]) for name in adapted(model)}
    assert layers == set(range(8 - last, 8))


def test_a_range_of_layers():
    config = LoraConfig(rank=1, layers=(2, 3), targets=("language", "experts", "vision"))
    names = adapted(add_lora(tiny_model("gemma4-26b-a4b")[0], config))
    language = {name for name in names if "language" in name}
    layers = {int(name.split(".")[3]) for name in language}
    assert layers == {2, 3}
    assert len(language) == 7 + 6 + 4
    assert len(names - language) == 14  # the tower's layers are another matter


def test_a_regular_expression():
    config = LoraConfig(rank=1, targets=(r".*layers\.[01]\.per_layer_(input_gate|projection)",))
    names = adapted(add_lora(tiny_model("gemma4-e2b")[0], config))
    assert len(names) == 4
    assert all("per_layer" in name for name in names)


def test_the_summary_is_announced(capsys):
    model = add_lora(
        tiny_model("gemma4-31b")[0], LoraConfig(rank=2, targets=("language", "vision"))
    )
    count = sum(parameter.numel() for parameter in trainable(model))
    line = capsys.readouterr().err.splitlines()[-1]
    assert "40 in language, 14 in vision" in line
    assert f"{count:,} trainable" in line


@pytest.mark.parametrize(
    ("family", "target", "message"),
    [
        ("gemma4-31b", "audio", r"'audio' is not in this model.*language, vision, projectors"),
        ("gemma4-12b", "vision", r"'vision' is not in this model.*language, projectors"),
        ("gemma3n", "vision", r"convolutional.*language, audio, projectors"),
        ("gemma4-e2b", "experts", r"'experts' is not in this model"),
        (
            "gemma4-e2b",
            "q_proj",
            r"write the regular expression r'\.\*language_model\.\*\\.q_proj'",
        ),
        ("gemma4-e2b", "all-linear", "PEFT's name for what 'language' means here"),
        ("gemma4-e2b", "langauge", r"matches no linear layer \(did you mean 'language'\?\)"),
        ("gemma4-e2b", "q_proj", r"matches no linear layer"),
        ("gemma4-e2b", ".*q_proj", r"Gemma4ClippableLinear"),
        ("gemma4-e2b", "lm_head", r"shares its weight"),
        ("gemma4-e2b", "(", r"no regular expression"),
    ],
)
def test_targets_that_are_not_there(family, target, message):
    with pytest.raises(ConfigError, match=message):
        wrap(tiny_model(family)[0], targets=(target,))


@pytest.mark.parametrize("family", ["gemma4-e2b", "gemma4-12b", "gemma3n"])
@pytest.mark.parametrize("target", ["vision", "audio", "projectors"])
def test_targets_of_towers_that_were_left_out(family, target, checkpoints):
    model, _ = load_model(checkpoints[family], device="cpu")
    with pytest.raises(ConfigError, match=r"It has language$"):
        wrap(model, targets=(target,))


def test_one_set_of_adapters_only():
    model = wrap(tiny_model("gemma4-31b")[0], rank=1)
    with pytest.raises(ConfigError, match="adapters already"):
        wrap(model, rank=1)
    with pytest.raises(ConfigError, match="adapters already"):
        wrap(model.get_base_model(), rank=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": "16"}, r"rank is '16'; it must be a whole number"),
        ({"rank": True}, "rank is True"),
        ({"alpha": "32"}, "alpha is '32'"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"dropout": None}, "dropout is None"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"seed": -1}, "seed is -1"),
        ({"targets": 3}, "targets is 3; it must be a tuple of strings"),
        ({"targets": ("language", 3)}, "it must be a tuple of strings"),
        ({"variant": ["lora"]}, r"variant is \['lora'\]"),
        ({"layers": True}, "layers is True"),
        ({"layers": "2"}, "layers is '2'"),
        ({"r": 16}, "no setting 'r'; did you mean 'rank'"),
        ({"lora_alpha": 16}, "no setting 'lora_alpha'; did you mean 'alpha'"),
        ({"lora_dropout": 0.1}, "no setting 'lora_dropout'; did you mean 'dropout'"),
        ({"target_modules": ["q_proj"]}, "'target_modules'; did you mean 'targets'"),
        ({"alpha": 0}, "alpha is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"targets": "language"}, r"\('language',\)"),
        ({"targets": ()}, "targets is empty"),
        ({"variant": "dorra"}, "did you mean 'dora'"),
        ({"layers": 0}, "layers is 0"),
        ({"layers": (3, 2)}, r"layers is \(3, 2\)"),
        ({"targets": ("experts",), "variant": "dora"}, "neither dora, qalora nor dropout"),
        ({"targets": ("experts",), "dropout": 0.1}, "neither dora, qalora nor dropout"),
        ({"targets": ("experts",), "variant": "full"}, "neither dropout nor 'experts'"),
        ({"variant": "full", "dropout": 0.1}, "neither dropout nor 'experts'"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**settings)


@pytest.mark.parametrize("layers", [9, (0, 8)])
def test_layers_beyond_the_model(layers):
    with pytest.raises(ConfigError, match="the model has 8 layers"):
        wrap(tiny_model("gemma4-e2b")[0], layers=layers)


def test_layers_without_a_target_that_has_them():
    with pytest.raises(ConfigError, match="no target has decoder layers"):
        wrap(tiny_model("gemma4-e2b")[0], layers=2, targets=("vision",))


def test_the_seed_decides_the_first_weights_and_leaves_the_random_state_alone():
    def first_weights(seed):
        model = add_lora(tiny_model("gemma4-e2b")[0], LoraConfig(rank=2, seed=seed))
        return torch.cat([p.flatten() for p in model.parameters() if p.requires_grad])

    state = torch.get_rng_state()
    weights = first_weights(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    assert torch.equal(first_weights(0), weights)
    assert not torch.equal(first_weights(1), weights)
