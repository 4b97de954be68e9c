"""Prompts in every form, answers and thoughts apart, streaming, and what is refused."""

import dataclasses
import threading

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from gemma_tuner.collators.multimodal import MultimodalCollator
from gemma_tuner.errors import ConfigError, DataError
from gemma_tuner.evaluation.answers import AnswerReader
from gemma_tuner.evaluation.decoding import Decoding, build_config, pad_left
from gemma_tuner.evaluation.generation import generate, generate_stream
from gemma_tuner.evaluation.prompts import (
    add_placeholder,
    encode_prompt,
    end_with_answer,
    read_prompts,
)
from gemma_tuner.models.families import family_of_processor
from gemma_tuner.records import Audio, Example, Image, Text, Turn
from gemma_tuner.testing import FAMILIES, tiny_model
from gemma_tuner.testing.models.processor import tiny_processor
from tests.examples import example, picture, sound


@pytest.fixture(scope="module")
def tiny():
    return tiny_model("gemma4-e2b")


def make_collator(family):
    return MultimodalCollator(tiny_processor(family), train_on="last")


def show(found):
    return [[type(part).__name__ for part in turn.parts] for turn in found.turns]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_is_what_the_chat_template_writes_for_generation(family):
    collator = make_collator(family)
    processor = collator.processor
    conversations = [
        [{"role": "user", "content": "How are you?"}],
        [
            {"role": "system", "content": "Be brief"},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Bye"},
        ],
    ]
    for messages in conversations:
        (prompt,), is_single = read_prompts(messages)
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        expected = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        row = encode_prompt(collator, add_placeholder(prompt)).row
        assert is_single
        assert row.input_ids.tolist() == expected
        assert not row.targets.any()


@pytest.mark.slow  # its tokenizer takes seconds to load
def test_a_prompt_with_the_released_template(shared_data):
    processor = AutoProcessor.from_pretrained(shared_data / "models/gemma-4-E2B-it")
    tools = [{"type": "function", "function": {"name": "now", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "now", "arguments": {"zone": "utc"}}}
    plain = [{"role": "user", "content": "Hi"}]
    called = [
        *plain,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "name": "now", "content": "noon"},
    ]
    for messages, enable_thinking in ((plain, False), (plain, True), (called, False)):
        collator = MultimodalCollator(
            processor, train_on="last", enable_thinking=enable_thinking, max_tokens=4096
        )
        (prompt,), _ = read_prompts(messages)
        prompt = dataclasses.replace(prompt, tools=tools)
        text = processor.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, enable_thinking=enable_thinking
        )
        row = encode_prompt(collator, add_placeholder(prompt)).row
        assert processor.tokenizer.decode(row.input_ids) == text


@pytest.mark.parametrize("family", ["gemma4-e2b", "gemma3n"])
def test_an_example_is_cut_where_its_last_answer_begins(family):
    collator = make_collator(family)
    whole = example("Hello", answer="Hi", more=[("Bye", "See you")])
    prompt = encode_prompt(collator, whole)
    ids = [*prompt.row.input_ids.tolist(), *prompt.answer_ids]
    assert collator.encode(whole).input_ids.tolist()[: len(ids)] == ids
    reader = AnswerReader(collator.processor.tokenizer, collator.family)
    assert reader.read(prompt.answer_ids) == ("See you", None)
    assert prompt.answer_ids[-1] in reader.stop_ids

    waits = Example("waits", (*whole.turns, Turn("user", (Text("And?"),))))
    assert end_with_answer(waits) == dataclasses.replace(whole, key="waits")
    assert end_with_answer(Example("document", document="text")) is None


def test_prompts_in_every_form():
    photo, clip = picture(), Audio(sound(), 16_000)
    (asked,), is_single = read_prompts("What?", image=photo, audio=[clip])
    assert (show(asked), is_single) == ([["Image", "Audio", "Text"]], True)
    assert asked.key == "prompt 1"

    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": photo},
                {"type": "text", "text": "and"},
                {"type": "image"},
            ],
        }
    ]
    other = Image(b"other")
    (asked,), _ = read_prompts(messages, image=other)
    assert show(asked) == [["Image", "Text", "Image"]]
    assert [part.source for part in asked.media] == [photo, b"other"]

    several, is_single = read_prompts(["a", messages, asked], image=[None, other, None])
    assert not is_single
    assert [found.key for found in several] == ["prompt 1", "prompt 2", "prompt 1"]
    assert [len(list(found.media)) for found in several] == [0, 2, 2]


@pytest.mark.parametrize(
    ("prompts", "media", "error", "words"),
    [
        (3, {}, ConfigError, "give text, messages"),
        ([], {}, ConfigError, "empty"),
        (["a", 3], {}, ConfigError, "prompt 2 is a int"),
        (["a", "b"], {"image": [None]}, ConfigError, "image is 1 for 2 prompts"),
        (["a", "b"], {"audio": b"x"}, ConfigError, "audio is bytes for 2 prompts"),
        ("", {}, DataError, "it is empty"),
        ("a", {"image": 3}, DataError, "its image is a number"),
        ("a", {"image": np.zeros((4, 4, 3))}, DataError, "PIL.Image.fromarray"),
        ("a", {"audio": sound()}, DataError, "an array without its rate"),
        ([{"role": "king", "content": "a"}], {}, DataError, "unknown role"),
        ([{"role": "user", "content": "a", "mood": "b"}], {}, DataError, "nothing reads: mood"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            {},
            DataError,
            "ends with an answer",
        ),
        (Example("d", document="text"), {}, DataError, "a document asks nothing"),
    ],
)
def test_what_is_no_prompt_is_refused(prompts, media, error, words):
    with pytest.raises(error, match=words):
        read_prompts(prompts, **media)


def test_padding_on_the_left_moves_and_changes_nothing():
    collator = make_collator("gemma4-e2b")
    rows = [
        encode_prompt(collator, add_placeholder(read_prompts(text)[0][0])).row
        for text in ("Hi", "How are you all today?")
    ]
    inputs = pad_left(collator, rows)
    for index, row in enumerate(rows):
        length = len(row.input_ids)
        assert inputs["input_ids"][index, -length:].equal(row.input_ids)
        assert inputs["attention_mask"][index].tolist()[-length:] == [1] * length
        assert int(inputs["attention_mask"][index].sum()) == length
        assert not inputs["input_ids"][index, :-length].any()


def test_thoughts_and_tool_calls_are_told_from_answers():
    processor = tiny_processor("gemma4-e2b")
    reader = AnswerReader(processor.tokenizer, family_of_processor(processor))

    def ids(text):
        return processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    thought = "<|channel>thought\nhm\nso<channel|>"
    assert reader.read(ids(f"{thought}Yes.<turn|>")) == ("Yes.", "hm\nso")
    assert reader.read(ids("Yes<turn|>")) == ("Yes", None)
    assert reader.read(ids("<|channel>thought\nhm")) == ("", "hm")
    # The prompt may have opened the thought, or have put an empty one there.
    assert reader.read(ids("hm<channel|>Yes"), ids("<|channel>thought\n")) == ("Yes", "hm")
    assert reader.read(ids("Yes"), ids("<|channel>thought\n<channel|>")) == ("Yes", None)
    call = '<|tool_call>call:now{zone:<|"|>utc<|"|>}<tool_call|>'
    assert reader.read(ids(f"{call}<|tool_response>")) == (call, None)
    prompt = ids("<bos><|turn>user\nHi<turn|>\n<|turn>model\n<|channel>thought\n")
    assert reader.find_opening(prompt) == tuple(ids("<|channel>thought\n"))


def test_the_checkpoints_settings_hold_until_others_are_given(tiny):
    model, _ = tiny
    saved = model.generation_config.to_dict()
    model.generation_config.update(
        eos_token_id=[1, 9], do_sample=True, temperature=0.7, top_k=64, max_new_tokens=5
    )
    before = model.generation_config.to_dict()
    try:
        config = build_config(model, Decoding(), frozenset({7}))
        assert config.eos_token_id == [1, 7, 9]
        assert (config.do_sample, config.temperature, config.top_k) == (True, 0.7, 64)
        assert config.max_new_tokens == 5
        config = build_config(model, Decoding(max_new_tokens=3, top_k=2), frozenset())
        assert (config.max_new_tokens, config.temperature, config.top_k) == (3, 0.7, 2)
        config = build_config(model, Decoding(do_sample=False), frozenset())
        assert (config.do_sample, config.temperature) == (False, None)
        assert model.generation_config.to_dict() == before
    finally:
        model.generation_config = type(model.generation_config).from_dict(saved)
    config = build_config(model, Decoding(temperature=0.5), frozenset())
    assert (config.do_sample, config.temperature, config.max_new_tokens) == (True, 0.5, 256)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"temperature": 0}, "do_sample=False"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": 0}, "top_k is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"do_sample": False, "top_k": 5}, "top_k is given with do_sample=False"),
        ({"do_sample": "yes"}, "do_sample is 'yes'"),
        ({"max_tokens": 5}, "did you mean 'max_new_tokens'"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_settings_out_of_their_range_are_refused(tiny, options, words):
    model, processor = tiny
    with pytest.raises(ConfigError, match=words):
        generate(model, processor, "Hi", **options)


def test_what_the_model_cannot_take_is_refused(tiny):
    model, processor = tiny
    with pytest.raises(DataError, match=r"prompt 1.*longer than the model's context of 8,192"):
        generate(model, processor, "a" * 8200)
    with pytest.raises(DataError, match="lower max_new_tokens"):
        generate(model, processor, "a", max_new_tokens=8192)
    with pytest.raises(DataError, match=r"35\.0 seconds"):
        generate(model, processor, "a", audio=Audio(sound(35 * 16_000), 16_000))
    with pytest.raises(ConfigError, match="Gemma 4, but the processor is of Gemma 3n"):
        generate(model, tiny_processor("gemma3n"), "a")
    with pytest.raises(ConfigError, match="has no thinking"):
        generate(*tiny_model("gemma3n"), "a", enable_thinking=True)
    tower, model.model.audio_tower = model.model.audio_tower, None
    try:
        with pytest.raises(ConfigError, match=r"holds audio.*modalities=\('text', 'audio'\)"):
            generate(model, processor, "a", audio=Audio(sound(), 16_000))
    finally:
        model.model.audio_tower = tower


def test_a_stream_is_the_answer_in_pieces(tiny):
    model, processor = tiny
    whole = generate(model, processor, "Hello", max_new_tokens=12, temperature=3.0, seed=3)
    stream = generate_stream(model, processor, "Hello", max_new_tokens=12, temperature=3.0, seed=3)
    pieces = list(stream)
    assert len(pieces) > 3
    assert "".join(pieces) == whole.text
    assert stream.result == whole


def test_a_stream_that_is_left_frees_the_model(tiny):
    model, processor = tiny
    model.train()
    try:
        with generate_stream(
            model, processor, "Hello", max_new_tokens=4000, temperature=3.0, seed=1
        ) as stream:
            next(stream)
        assert stream.result is None
        assert model.training
    finally:
        model.eval()
    assert not [t for t in threading.enumerate() if t.name == "gemma-tuner-writer"]
    with pytest.raises(ConfigError, match="a stream answers one prompt"):
        generate_stream(model, processor, ["a", "b"])


def test_an_error_while_writing_reaches_the_reader(tiny):
    model, processor = tiny
    hook = model.model.language_model.layers[0].register_forward_hook(
        lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no room"))
    )
    try:
        with pytest.raises(torch.OutOfMemoryError, match="no room"):
            list(generate_stream(model, processor, "Hello", max_new_tokens=4))
    finally:
        hook.remove()
    assert not model.training
