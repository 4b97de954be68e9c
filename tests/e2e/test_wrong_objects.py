"""Whatever object is passed to a public function by habit, the answer is the library's own error.

Each argument of each function is replaced by things of other kinds: names, folders, models of
other families, settings of other libraries. None may end in an AttributeError or a TypeError.
"""

import peft
import pytest
import transformers

import gemma_tuner as gt
from gemma_tuner.models.adapter_files import save_adapter
from gemma_tuner.testing import save_tiny_model, tiny_model


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """Good arguments by name, and wrong ones."""
    root = tmp_path_factory.mktemp("things")
    save_tiny_model("gemma4-e2b", root / "base")
    adapted = gt.add_lora(tiny_model("gemma4-e2b")[0], gt.LoraConfig(rank=1, layers=1))
    save_adapter(adapted, root / "adapter")
    (root / "rows.jsonl").write_text('{"prompt": "q", "response": "a"}\n')
    model, processor = tiny_model("gemma4-e2b")
    stream = gt.stream_local(root / "rows.jsonl", cache_dir=root / "cache")
    collator = gt.TextCollator(processor)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    llama = transformers.LlamaConfig(**sizes, num_attention_heads=2, vocab_size=64)
    good = {
        "model": model,
        "adapted": adapted,
        "processor": processor,
        "collator": collator,
        "stream": stream,
        "config": gt.TrainConfig(max_steps=1, output_dir=root / "run", progress=False),
        "base": root / "base",
        "adapter": root / "adapter",
        "rows": root / "rows.jsonl",
        "new": root / "new",
        "gguf": root / "new.gguf",
        "examples": [stream[0]],
    }
    wrong = {
        "None": None,
        "a number": 3,
        "a name": "runs/tickets/adapter",
        "a folder": root,
        "an adapter's folder": root / "adapter",
        "a dict": {"a": 1},
        "a list": ["a"],
        "bytes": b"a",
        "a class": dict,
        "a model": model,
        "an adapted model": adapted,
        "another family": transformers.LlamaForCausalLM(llama),
        "PEFT's settings": peft.LoraConfig(r=4),
        "transformers' settings": transformers.GenerationConfig(),
        "settings of a run": good["config"],
        "settings of adapters": gt.LoraConfig(),
        "a processor": processor,
        "a tokenizer": processor.tokenizer,
        "a collator": collator,
        "a stream": stream,
    }
    return good, wrong


# function -> the names of good arguments, in order; with ``name=`` by keyword
CALLS = {
    gt.add_lora: ("model", "lora"),
    gt.load_model: ("base",),
    gt.load_adapter: ("model", "adapter"),
    gt.plan: ("base",),
    gt.generate: ("model", "processor", "prompt"),
    gt.generate_stream: ("model", "processor", "prompt"),
    gt.evaluate: ("model", "stream", "collator"),
    gt.Trainer: ("adapted", "stream", "collator", "config", "stream"),
    gt.TextCollator: ("processor",),
    gt.ImageCollator: ("processor",),
    gt.AudioCollator: ("processor",),
    gt.MultimodalCollator: ("processor",),
    gt.SampleGenerations: ("collator", "examples", "one"),
    gt.export_adapter: ("adapted", "new"),
    gt.export_merged: ("adapter", "new"),
    gt.export_mlx: ("adapter", "new"),
    gt.export_gguf: ("adapter", "gguf"),
    gt.export_gguf_adapter: ("adapter", "gguf"),
    gt.import_mlx: ("adapter", "new"),
    gt.from_mlx: ("base", "new"),
    gt.pack: ("base", "new"),
    gt.push_to_hub: ("adapter", "repository"),
}
BRIEFLY = {
    gt.generate: {"max_new_tokens": 1},
    gt.evaluate: {"scores": (), "progress": False},
}
PLACES = [(call, place) for call, names in CALLS.items() for place in range(len(names))]


@pytest.mark.parametrize(
    ("call", "place"), PLACES, ids=[f"{call.__name__}-{CALLS[call][n]}" for call, n in PLACES]
)
def test_a_wrong_object_is_refused_in_the_librarys_words(call, place, things):
    good, wrong = things
    good = {**good, "lora": gt.LoraConfig(rank=1), "prompt": "hi", "one": 1, "repository": "a/b"}
    faults = []
    for name, thing in wrong.items():
        given = [good[argument] for argument in CALLS[call]]
        given[place] = thing
        try:
            call(*given, **BRIEFLY.get(call, {}))
        except gt.GemmaTunerError as error:
            if len(str(error)) > 1000 or "\n" in str(error):
                faults.append(f"{name}: {len(str(error))} characters: {str(error)[:80]}")
        except (AttributeError, TypeError, KeyError, OSError, ValueError) as error:
            faults.append(f"{name}: {type(error).__name__}: {str(error)[:80]}")
    assert not faults, "\n".join(faults)
