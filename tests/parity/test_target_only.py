"""The decoder at target positions only against plain transformers: the same numbers, less work."""

import copy
import gc
import weakref
from dataclasses import replace
from functools import wraps

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad
from torch.utils.flop_counter import FlopCounterMode

from gemma_tuner.batch import IGNORED, Row, pad_rows
from gemma_tuner.collators.multimodal import MultimodalCollator
from gemma_tuner.models.attention import use_attention
from gemma_tuner.models.families import family_of
from gemma_tuner.models.lora import LoraConfig, add_lora, unwrap_peft
from gemma_tuner.models.loss import target_loss_sum
from gemma_tuner.models.modes import begin_training, end_training
from gemma_tuner.models.target_only import MAX_SHARE, TargetOnly, target_only_of
from gemma_tuner.testing import FAMILIES, tiny_model
from tests.examples import example, picture, sound
from tests.stock import stock_parts

TOLERANCE = 1e-5
TARGETS = {
    "gemma4-e2b": ("language", "vision", "audio", "projectors"),
    "gemma4-12b": ("language", "projectors"),
    "gemma4-26b-a4b": ("language", "vision", "projectors", "experts"),
    "gemma4-31b": ("language", "vision", "projectors"),
    "gemma3n": ("language", "audio", "projectors"),
}
FIRST_RESTRICTED = {
    "gemma4-e2b": 3,
    "gemma4-12b": 5,
    "gemma4-26b-a4b": 5,
    "gemma4-31b": 5,
    "gemma3n": 3,
}
# Each row: its length and the spans of its targets. The window of the tiny models is 32 tokens.
LAYOUTS = {
    "one row": [(70, [(60, 70)])],
    "a single target": [(70, [(40, 41)])],
    "the first that can be": [(40, [(1, 2)]), (40, [(39, 40)])],
    "several turns": [(90, [(5, 9), (30, 38), (80, 90)])],
    "ragged": [(90, [(70, 90)]), (35, [(33, 35)]), (60, [(10, 14), (50, 60)])],
    "a row without any": [(80, [(70, 80)]), (50, [])],
    "all": [(48, [(1, 48)]), (30, [(1, 30)])],
    "most": [(64, [(1, 50)])],
}


BARE = tiny_model("gemma4-31b")[0]


def make_model(family, **settings):
    settings = {"rank": 4, "targets": TARGETS[family], **settings}
    model = add_lora(tiny_model(family)[0], LoraConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, which would hide lora_A's gradients
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def make_batch(model, layout, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index, (length, spans) in enumerate(layout):
        ids = torch.randint(10, 200, (length,), generator=generator)
        targets = torch.zeros(length, dtype=torch.bool)
        for start, stop in spans:
            targets[start:stop] = True
        rows.append(Row(str(index), ids, torch.zeros_like(ids), targets))
    name = family_of(unwrap_peft(model).config).token_type_name
    return pad_rows(
        rows, max_tokens=max(256, len(rows[0].input_ids)), pad_token_id=0, token_type_name=name
    )


def hidden_states(model, batch):
    """The states that predict a batch's targets."""
    known = target_only_of(unwrap_peft(model))
    return known.hidden_states(batch.inputs, batch.target_rows, batch.target_slots)


def is_restricted(batch):
    return batch.target_rows.shape[1] <= MAX_SHARE * batch.labels.shape[1]


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def plain_step(model, batch):
    with stock_parts(model):
        loss = model(**batch.inputs, labels=batch.labels, use_cache=False).loss
        loss.backward()
    return float(loss.detach()), gradients(model)


def our_step(model, batch):
    loss = target_loss_sum(model, batch, chunk_tokens=7) / batch.num_target_tokens
    loss.backward()
    return float(loss.detach()), gradients(model)


def assert_equal_steps(ours, plain, *, of_norm=TOLERANCE):
    assert ours[0] == pytest.approx(plain[0], rel=TOLERANCE)
    assert ours[1].keys() == plain[1].keys()
    norm = torch.cat([gradient.flatten() for gradient in plain[1].values()]).norm()
    off = torch.cat([(ours[1][n] - gradient).flatten() for n, gradient in plain[1].items()]).norm()
    assert norm > 0
    assert off <= of_norm * norm
    for name, gradient in plain[1].items():
        if gradient.norm() > 1e-4 * norm:  # below that, fp32 rounding decides the direction
            cosine = torch.cosine_similarity(ours[1][name].flatten(), gradient.flatten(), dim=0)
            assert cosine >= 0.99999, (name, float(cosine))


def compare(model, batch, *, checkpointing):
    end_training(model)
    plain = plain_step(model, batch)
    begin_training(model, checkpointed_layers=None if checkpointing else 0)
    assert_equal_steps(our_step(model, batch), plain)
    end_training(model)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return make_model(family)


# Checkpointed layers: ragged rows, and rows of which nothing is left out; the others are slow.
CHECKPOINTED = ("ragged", "all")


@pytest.mark.parametrize(
    ("layout", "checkpointing"),
    [
        *((layout, False) for layout in LAYOUTS),
        *(
            pytest.param(layout, True, marks=() if layout in CHECKPOINTED else pytest.mark.slow)
            for layout in LAYOUTS
        ),
    ],
)
def test_loss_and_gradients_equal_plain_transformers(model, layout, checkpointing):
    batch = make_batch(model, LAYOUTS[layout])
    compare(model, batch, checkpointing=checkpointing)
    assert is_restricted(batch) == (layout != "all")
    assert target_only_of(unwrap_peft(model)).reason is None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_media_and_several_turns(family, model, checkpointing):
    collator = MultimodalCollator(tiny_model(family)[1])
    rows = [
        example(picture(1), "What is it?", answer="A dog", key="image"),
        example("Hello", answer="Hi", key="turns", more=[("Bye", "See you tomorrow")]),
        example(picture(3), "Before.", picture(4), "After?", answer="Two", key="pictures"),
    ]
    if family not in {"gemma4-26b-a4b", "gemma4-31b"}:
        rows.append(example(sound(), picture(2), "Both?", answer="Yes, both", key="both"))
    batch = collator(rows)
    assert is_restricted(batch)
    compare(model, batch, checkpointing=checkpointing)


def test_rows_padded_on_the_left_and_no_padding(model):
    batch = make_batch(model, [(64, [(50, 64)]), (64, [(40, 42), (60, 63)])])
    mask = batch.inputs["attention_mask"].clone()
    assert mask.all()  # transformers then leaves the mask out
    mask[1, :20] = 0
    compare(model, batch, checkpointing=False)
    compare(
        model,
        replace(batch, inputs={**batch.inputs, "attention_mask": mask}),
        checkpointing=True,
    )


ADAPTERS = (
    {"variant": "dora"},
    {"variant": "rslora"},
    {"variant": "full"},
    {"layers": 1},
    {"layers": (0, 2)},
    {"layers": (3, 3)},
)
# Places matter where later layers share keys and values, kinds of adapter where there are experts.
FAST_FAMILY = {False: "gemma4-e2b", True: "gemma4-26b-a4b"}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        pytest.param(
            family,
            settings,
            id=f"{family}-{settings}",
            marks=() if family == FAST_FAMILY["variant" in settings] else pytest.mark.slow,
        )
        for family in FAMILIES
        for settings in ADAPTERS
    ],
    indirect=["family"],
)
def test_every_kind_and_place_of_adapter(family, settings):
    no_experts = settings.get("variant") in ("dora", "full")
    targets = [t for t in TARGETS[family] if t != "experts" or not no_experts]
    model = make_model(family, targets=targets, **settings)
    batch = make_batch(model, LAYOUTS["ragged"])
    for checkpointing in (False, True):
        compare(model, batch, checkpointing=checkpointing)


def test_eager_attention_too(family):
    model = make_model(family)
    gemma = unwrap_peft(model)
    before = target_only_of(gemma)
    gemma.set_attn_implementation("eager")
    compare(model, make_batch(model, LAYOUTS["ragged"]), checkpointing=True)
    assert target_only_of(gemma) is not before
    assert target_only_of(gemma).reason is None


def test_layers_may_be_checkpointed_apart(family):
    model = make_model(family)
    batch = make_batch(model, LAYOUTS["ragged"])
    plain = plain_step(model, batch)
    gemma = unwrap_peft(model)
    for checkpointed in (slice(0, 2), slice(2, None, 2), slice(1, None, 2)):
        begin_training(model)
        for layer in gemma.model.language_model.layers:
            layer.gradient_checkpointing = False
        for layer in gemma.model.language_model.layers[checkpointed]:
            layer.gradient_checkpointing = True
        assert_equal_steps(our_step(model, batch), plain)


@st.composite
def layouts(draw):
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        length = draw(st.integers(2, 90))
        places = draw(st.sets(st.integers(1, length - 1), max_size=12))
        rows.append((length, [(place, place + 1) for place in places]))
    return rows


@settings(deadline=None)
@given(layout=layouts())
def test_rows_and_slots_are_the_target_positions(layout):
    made = make_batch(BARE, layout)
    for batch in (made, made.with_bucketed_targets()):
        num_rows, length = batch.labels.shape
        flat = batch.target_rows + torch.arange(num_rows).unsqueeze(1) * length
        found = flat.flatten()[batch.target_slots]
        count = batch.num_target_tokens
        is_target = batch.labels.flatten() != IGNORED
        assert torch.equal(found[:count], is_target.nonzero()[:, 0] - 1)
        assert len(batch.target_slots) == len(batch.target_ids)
        assert batch.target_rows.shape[1] <= length


@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@given(layout=layouts(), bucketed=st.booleans())
def test_a_few_layouts(model, layout, bucketed):
    compare_layout(model, layout, bucketed)


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(layout=layouts(), bucketed=st.booleans())
def test_any_layout(model, layout, bucketed):
    compare_layout(model, layout, bucketed)


def compare_layout(model, layout, bucketed):
    batch = make_batch(model, [(90, [(89, 90)]), *layout])
    compare(model, batch.with_bucketed_targets() if bucketed else batch, checkpointing=bucketed)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_twenty_optimizer_steps(family, checkpointing):
    ours = make_model(family)
    plain = copy.deepcopy(ours)
    begin_training(ours, checkpointed_layers=None if checkpointing else 0)
    end_training(plain)
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=2e-4)
        for m in (ours, plain)
    ]
    for step in range(20):
        batch = make_batch(ours, LAYOUTS["ragged"], seed=step)
        found, expected = our_step(ours, batch), plain_step(plain, batch)
        # each step's rounding lives on in the weights: a norm's 1e-5 becomes some 1e-4
        assert_equal_steps(found, expected, of_norm=1e-3)
        for wrapped, optimizer, result in zip(
            (ours, plain), optimizers, (found, expected), strict=True
        ):
            for name, parameter in wrapped.named_parameters():
                parameter.grad = result[1].get(name)
            optimizer.step()
            optimizer.zero_grad()


def test_the_model_is_left_as_it_was(model):
    gemma = unwrap_peft(model)
    batch = make_batch(model, LAYOUTS["one row"])
    before = gemma.model(**batch.inputs, use_cache=False).last_hidden_state
    hidden_states(model, batch).sum().backward()
    model.zero_grad(set_to_none=True)
    for layer in gemma.model.language_model.layers:
        assert "forward" not in layer.__dict__
    assert torch.equal(gemma.model(**batch.inputs, use_cache=False).last_hidden_state, before)


def test_what_is_known_does_not_keep_a_model_alive():
    model = tiny_model("gemma4-31b")[0]
    hidden_states(model, make_batch(model, LAYOUTS["one row"]))
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_layers_see_target_rows_only(family, model):
    gemma = unwrap_peft(model)
    batch = make_batch(model, LAYOUTS["several turns"])
    wanted, length = batch.target_rows.shape[1], batch.labels.shape[1]
    seen = {}
    handles = [
        layer.mlp.register_forward_hook(
            lambda _, args, __, index=index: seen.update({index: args[0].shape[1]})
        )
        for index, layer in enumerate(gemma.model.language_model.layers)
    ]
    hidden_states(model, batch)
    for handle in handles:
        handle.remove()
    first = FIRST_RESTRICTED[family]
    assert seen == {i: wanted if i >= first else length for i in range(len(handles))}


class TestFallback:
    """Where a model is not as this module knows it, the plain forward runs and says why."""

    def check(self, model, reason, capsys):
        batch = make_batch(model, LAYOUTS["ragged"])
        capsys.readouterr()
        compare(model, batch, checkpointing=True)
        compare(model, batch, checkpointing=False)
        known = target_only_of(unwrap_peft(model))
        assert reason in known.reason
        said = capsys.readouterr().err
        assert said.count(known.reason) == 1  # once, not at every step

    def test_a_layer_that_does_something_else(self, family, capsys, monkeypatch):
        model = make_model(family)
        layers = unwrap_peft(model).model.language_model.layers
        cls = type(layers[-1])
        forward = cls.forward

        @wraps(forward)
        def shifted(*args, **kwargs):
            hidden = forward(*args, **kwargs)
            return hidden + pad(hidden[..., :-1, :], (0, 0, 1, 0))

        monkeypatch.setattr(cls, "forward", shifted)
        self.check(model, "differed from the plain forward by", capsys)

    def test_a_layer_of_another_signature(self, family, capsys, monkeypatch):
        model = make_model(family)
        cls = type(unwrap_peft(model).model.language_model.layers[-1])
        forward = cls.forward
        monkeypatch.setattr(cls, "forward", lambda self, *args, **kw: forward(self, *args, **kw))
        self.check(model, "has no hidden_states", capsys)

    def test_an_unknown_attribute(self, family, capsys):
        model = make_model(family)
        layer = unwrap_peft(model).model.language_model.layers[FIRST_RESTRICTED[family]]
        del layer.self_attn.head_dim
        known = TargetOnly(unwrap_peft(model))
        assert "has no head_dim" in str(known.reason)
        assert str(known.reason) in capsys.readouterr().err

    def test_a_replaced_forward(self, model, capsys):
        gemma = copy.deepcopy(unwrap_peft(model))
        layer = gemma.model.language_model.layers[-1]
        known = TargetOnly(gemma)
        assert known.reason is None
        replaced = layer.forward = layer.forward
        assert "is replaced" in str(TargetOnly(gemma).reason)
        batch = make_batch(gemma, LAYOUTS["ragged"])
        known.hidden_states(batch.inputs, batch.target_rows, batch.target_slots)
        assert "is replaced" in str(known.reason)
        assert layer.forward is replaced

    def test_an_attention_whose_masks_cannot_be_cut(self, model, capsys):
        gemma = copy.deepcopy(unwrap_peft(model))
        gemma.config.get_text_config()._attn_implementation = "flex_attention"
        assert "'flex_attention'" in str(TargetOnly(gemma).reason)


def real_e2b():
    """E2B's decoder as released, without storage."""
    layers = 35
    text = {
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "global_head_dim": 512,
        "num_kv_shared_layers": 20,
        "use_double_wide_mlp": True,
        "sliding_window": 512,
        "final_logit_softcapping": 30.0,
        "layer_types": [*["sliding_attention"] * 4, "full_attention"] * 7,
    }
    config = transformers.Gemma4Config(text_config=text, vision_config=None, audio_config=None)
    with torch.device("meta"):
        model = transformers.Gemma4ForConditionalGeneration(config)
        return add_lora(model.eval().requires_grad_(False), LoraConfig(rank=16))


def count_flops(loss):
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    return counter.get_total_flops()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("share", "most", "most_below", "most_without"),
    [(0.1, 0.33, 0.31, 0.23), (1.0, 0.98, 0.98, 0.7)],
)
def test_flops_at_real_size(share, most, most_below, most_without):
    model, length = real_e2b(), 840
    batch = make_batch(model, [(length, [(length - int(share * length) + (share == 1), length)])])
    batch = batch.to(torch.device("meta"))
    mask = torch.empty(1, 1, length, length, dtype=torch.bool, device="meta")
    masks = {"full_attention": mask, "sliding_attention": mask}  # it has no values to look at
    inputs = {**batch.inputs, "attention_mask": masks}
    begin_training(model)
    with stock_parts(model):
        plain = count_flops(lambda: model(**inputs, labels=batch.labels, use_cache=False).loss)
    use_attention(unwrap_peft(model))

    def ours():
        return target_loss_sum(model, batch, chunk_tokens=256)

    assert count_flops(ours) <= most * plain
    gemma = unwrap_peft(model)
    for layer in gemma.model.language_model.layers[target_only_of(gemma).first_layer + 1 :]:
        layer.gradient_checkpointing = False  # what only runs at targets
    assert count_flops(ours) <= most_below * plain
    begin_training(model, checkpointed_layers=0)
    assert count_flops(ours) <= most_without * plain
