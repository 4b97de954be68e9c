"""Our loss and gradients against plain transformers, for every family and every kind of input."""

import copy

import peft
import pytest
import torch

from gemma_tuner.collators.multimodal import MultimodalCollator
from gemma_tuner.models.lora import LoraConfig, add_lora, unwrap_peft
from gemma_tuner.models.loss import target_loss_sum
from gemma_tuner.testing import FAMILIES, tiny_model
from tests.examples import example, picture, sound
from tests.stock import Float64Everywhere, stock_parts

WITH_AUDIO = {"gemma4-e2b", "gemma4-12b", "gemma3n"}
WITH_TOWER_ADAPTERS = {
    "gemma4-e2b": ("language", "vision", "audio", "projectors"),
    "gemma4-12b": ("language", "projectors"),
    "gemma4-26b-a4b": ("language", "vision", "projectors", "experts"),
    "gemma4-31b": ("language", "vision", "projectors"),
    "gemma3n": ("language", "audio", "projectors"),
}
TOLERANCE = 1e-5


def make_examples(family):
    rows = [
        example("How many are there?", answer="Two", key="text", system="Be brief"),
        example(picture(1), "What is it?", answer="A dog", key="image"),
        example("Hello", answer="Hi", key="turns", more=[("Bye", "See you tomorrow")]),
    ]
    if family in WITH_AUDIO:
        return [*rows, example(sound(), picture(2), "Both?", answer="Yes, both", key="both")]
    return [*rows, example(picture(3), picture(4), "Two?", answer="Yes, two", key="pictures")]


@pytest.fixture(scope="module", params=FAMILIES)
def setup(request):
    """A model whose adapters do something, its collator and four examples."""
    family = request.param
    model, processor = tiny_model(family)
    model = add_lora(model, LoraConfig(rank=4, targets=WITH_TOWER_ADAPTERS[family]))
    randomize_adapters(model)
    return model, MultimodalCollator(processor), make_examples(family)


def randomize_adapters(model):
    """``lora_B`` begins at zero, which would hide every gradient of ``lora_A``."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_equal_gradients(ours, theirs, *, of_whole=TOLERANCE, of_each_tensor=TOLERANCE):
    """Equal to a tolerance as a whole, and to one in each tensor."""
    assert ours.keys() == theirs.keys()
    difference = torch.cat([(ours[n] - g).flatten() for n, g in theirs.items()]).norm()
    norm = torch.cat([g.flatten() for g in theirs.values()]).norm()
    assert float(difference) <= of_whole * float(norm)
    for name, reference in theirs.items():
        scale = max(float(reference.norm()), 1e-3 * float(norm))
        assert float((ours[name] - reference).norm()) <= of_each_tensor * scale, name


def our_step(model, collator, groups, num_targets):
    total = 0.0
    for group in groups:
        batch = collator(group)
        loss = target_loss_sum(model, batch, chunk_tokens=5) / num_targets
        loss.backward()
        total += float(loss.detach())
    return total, gradients(model)


def test_loss_and_gradients_equal_plain_transformers(setup):
    model, collator, rows = setup
    batch = collator(rows)
    model.eval()  # no dropout is configured: modes differ in nothing but checkpointing
    with stock_parts(model):
        output = model(**batch.inputs, labels=batch.labels)
        output.loss.backward()
    reference = gradients(model)
    loss, ours = our_step(model, collator, [rows], batch.num_target_tokens)
    assert loss == pytest.approx(float(output.loss.detach()), rel=TOLERANCE)
    # In float32 stock's own gradients are up to 6e-5 off float64's in single tensors of the towers
    # and projectors, ours no more; the two are within 1.01e-5 of each other.
    assert_equal_gradients(ours, reference, of_each_tensor=1.5e-5)
    assert any(float(gradient.norm()) > 0 for gradient in ours.values())


def test_without_rounding_nothing_is_left_of_the_difference(setup):
    model, collator, rows = setup
    model = copy.deepcopy(model).double().eval()
    batch = collator(rows)
    unwrap_peft(model).set_experts_implementation("eager")  # grouped products know no float64
    with stock_parts(model), Float64Everywhere():
        output = model(**batch.inputs, labels=batch.labels)
        output.loss.backward()
    reference = gradients(model)
    with Float64Everywhere():
        loss = target_loss_sum(model, batch, chunk_tokens=5) / batch.num_target_tokens
        loss.backward()
    ours = gradients(model)
    assert float(loss.detach()) == pytest.approx(float(output.loss.detach()), rel=1e-12)
    assert {gradient.dtype for gradient in ours.values()} == {torch.float64}
    assert_equal_gradients(ours, reference, of_whole=1e-10, of_each_tensor=1e-10)


def test_a_batch_of_four_equals_any_split(setup):
    model, collator, rows = setup
    model.eval()
    num_targets = collator(rows).num_target_tokens
    whole_loss, whole = our_step(model, collator, [rows], num_targets)
    one, two, three, four = rows
    for groups in (
        [[one], [two], [three], [four]],
        [[one, two], [three, four]],
        [[one], rows[1:]],
    ):
        loss, split = our_step(model, collator, groups, num_targets)
        assert loss == pytest.approx(whole_loss, rel=TOLERANCE)
        # Other shapes round differently in fp32: up to 1.5e-5 in single tensors of audio towers.
        assert_equal_gradients(split, whole, of_each_tensor=5e-5)


def test_checkpointing_on_equals_off(setup):
    model, collator, rows = setup
    num_targets = collator(rows).num_target_tokens
    model.train()
    gemma = unwrap_peft(model)
    gemma.activation_checkpointing_disable()
    plain_loss, plain = our_step(model, collator, [rows], num_targets)
    gemma.activation_checkpointing_enable({"use_reentrant": False})
    loss, checkpointed = our_step(model, collator, [rows], num_targets)
    gemma.activation_checkpointing_disable()
    assert loss == plain_loss
    for name, gradient in plain.items():
        assert torch.equal(checkpointed[name], gradient), name


def test_every_media_item_reaches_the_loss(setup):
    """A random tower would train as well; a tower that is not read would not change the loss."""
    model, collator, rows = setup
    model.eval()
    for name in ("pixel_values", "input_features"):
        batch = collator(rows)
        if name not in batch.inputs:
            continue
        before = target_loss_sum(model, batch, chunk_tokens=64)
        for item in range(len(batch.inputs[name])):
            inputs = dict(batch.inputs)
            inputs[name] = inputs[name].clone()
            inputs[name][item] = inputs[name][item].roll(1, -1)
            changed = type(batch)(
                **{**{f: getattr(batch, f) for f in batch.__slots__}, "inputs": inputs}
            )
            assert target_loss_sum(model, changed, chunk_tokens=64) != before, (name, item)


def test_leaving_out_token_types_would_change_the_loss_where_pictures_are_bidirectional(setup):
    model, collator, rows = setup
    model.eval()
    batch = collator(rows)
    if (
        unwrap_peft(model).config.get_text_config().to_dict().get("use_bidirectional_attention")
        is None
    ):
        pytest.skip("this family's pictures are causal")
    inputs = {name: x for name, x in batch.inputs.items() if name != "mm_token_type_ids"}
    with torch.no_grad():
        assert (
            model(**inputs, labels=batch.labels).loss
            != model(**batch.inputs, labels=batch.labels).loss
        )


def test_a_trainable_head_is_refused():
    from gemma_tuner.errors import ConfigError

    model, processor = tiny_model("gemma4-e2b")
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], exclude_modules=r".*tower.*")
    )
    unwrap_peft(model).get_output_embeddings().weight.requires_grad_(True)
    batch = MultimodalCollator(processor)([example("a")])
    with pytest.raises(ConfigError, match=r"head \(lm_head\) is trainable"):
        target_loss_sum(model, batch, chunk_tokens=8)
