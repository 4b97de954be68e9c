"""Our generation against ``generate`` of plain transformers, token for token."""

import peft
import pytest
import torch
from transformers import set_seed

from gemma_tuner.checkpoints.loading import load_model
from gemma_tuner.evaluation.generation import generate, generate_stream
from gemma_tuner.models.lora import LoraConfig, add_lora
from gemma_tuner.models.modes import begin_training
from gemma_tuner.records import Audio
from gemma_tuner.testing import FAMILIES, save_tiny_model, tiny_model
from tests.examples import picture, sound
from tests.stock import stock_parts

WITH_AUDIO = {"gemma4-e2b", "gemma4-12b", "gemma3n"}
NEW_TOKENS = 6


def randomize_adapters(model, scale=1.0):
    """Far enough from zero that an adapter that is left out changes every answer."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


# The other families' structures are compared by the slow tests.
@pytest.fixture(
    scope="module",
    params=[
        family if family == "gemma4-e2b" else pytest.param(family, marks=pytest.mark.slow)
        for family in FAMILIES
    ],
)
def setup(request):
    model, processor = tiny_model(request.param)
    model = add_lora(model, LoraConfig(rank=4))
    randomize_adapters(model)
    return request.param, model, processor


def make_prompts(family):
    """Prompts of different lengths, as (text, picture, samples)."""
    prompts = [
        ("How many dogs are there?", None, None),
        ("Hi", None, None),
        ("What is it?", picture(1), None),
    ]
    if family in WITH_AUDIO:
        prompts += [("Say it", None, sound()), ("Both?", picture(2), sound(4_800, seed=1))]
    return prompts


def ask(model, processor, prompts, **options):
    return generate(
        model,
        processor,
        [text for text, _, _ in prompts],
        image=[image for _, image, _ in prompts],
        audio=[None if samples is None else Audio(samples, 16_000) for _, _, samples in prompts],
        max_new_tokens=NEW_TOKENS,
        **options,
    )


def ask_transformers(model, processor, text, image, samples, **options):
    """The documented way: chat template, processor, generate; nothing of ours."""
    parts = [{"type": "image"}] if image is not None else []
    parts += [{"type": "audio"}] if samples is not None else []
    parts.append({"type": "text", "text": text})
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True
    )
    inputs = processor(
        text=[prompt],
        images=None if image is None else [[image]],
        audio=None if samples is None else [samples],
        add_special_tokens=False,
        return_tensors="pt",
    )
    turn_close = getattr(processor.tokenizer, "eot_token", None) or "<end_of_turn>"
    stops = [1, processor.tokenizer.convert_tokens_to_ids(turn_close)]
    with stock_parts(model):
        output = model.generate(
            **inputs, max_new_tokens=NEW_TOKENS, eos_token_id=stops, pad_token_id=0, **options
        )
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def test_greedy_tokens_equal_transformers_single_and_batched(setup):
    family, model, processor = setup
    prompts = make_prompts(family)
    theirs = [ask_transformers(model, processor, *prompt, do_sample=False) for prompt in prompts]
    singles = [ask(model, processor, [prompt])[0] for prompt in prompts]
    batched = ask(model, processor, prompts)
    assert [list(answer.token_ids) for answer in singles] == theirs
    assert [list(answer.token_ids) for answer in batched] == theirs
    assert len({tuple(ids) for ids in theirs}) > 1
    with model.disable_adapter():
        base = ask(model, processor, prompts)
    assert [list(answer.token_ids) for answer in base] != theirs


def test_sampling_equals_transformers_with_the_same_seed():
    model, processor = tiny_model("gemma4-12b")
    (text, _, _) = prompt = ("Hello", None, None)
    options = {"do_sample": True, "temperature": 2.0, "top_k": 20, "top_p": 0.9}
    set_seed(7)
    theirs = ask_transformers(model, processor, *prompt, **options)
    state = torch.get_rng_state()
    ours = generate(model, processor, text, max_new_tokens=NEW_TOKENS, seed=7, **options)
    assert list(ours.token_ids) == theirs
    assert torch.equal(torch.get_rng_state(), state)
    other = generate(model, processor, text, max_new_tokens=NEW_TOKENS, seed=8, **options)
    assert other.token_ids != ours.token_ids


def read_modes(model):
    return {
        name: (module.training, getattr(module, "gradient_checkpointing", None))
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("checkpointed_layers", [None, 0])
def test_between_two_steps_of_training_nothing_is_changed(checkpointed_layers):
    model, processor = tiny_model("gemma4-e2b")
    model = add_lora(model, LoraConfig(rank=4, dropout=0.5))
    randomize_adapters(model)
    expected = generate(model, processor, "Hello", max_new_tokens=NEW_TOKENS)
    begin_training(model, checkpointed_layers=checkpointed_layers)
    modes = read_modes(model)
    assert any(trains for trains, _ in modes.values())
    during = generate(model, processor, "Hello", max_new_tokens=NEW_TOKENS)
    streamed = "".join(generate_stream(model, processor, "Hello", max_new_tokens=NEW_TOKENS))
    assert during == expected
    assert streamed == expected.text
    assert read_modes(model) == modes
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)


def test_a_saved_adapter_on_a_table_that_stays_on_disk_answers_the_same(tmp_path):
    model, processor = save_tiny_model("gemma4-e2b", tmp_path / "base")
    model = add_lora(model, LoraConfig(rank=4))
    randomize_adapters(model)
    model.save_pretrained(tmp_path / "adapter")
    expected = generate(model, processor, ["Hello", "How are you?"], max_new_tokens=NEW_TOKENS)
    base, processor = load_model(
        tmp_path / "base", device="cpu", dtype="float32", per_layer_embeddings="disk"
    )
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    answers = generate(loaded, processor, ["Hello", "How are you?"], max_new_tokens=NEW_TOKENS)
    assert answers == expected
