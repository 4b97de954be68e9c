"""Merged checkpoints answer from a real `transformers serve` as the unmerged adapter does."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from gemma_tuner.export.merged import export_merged
from gemma_tuner.models.adapter_files import save_adapter
from gemma_tuner.testing import FAMILIES
from tests.export_parts import TARGETS, add_trained_lora, save_base

PACKAGES = Path(__file__).resolve().parents[2] / ".venv-serve"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (PACKAGES / ".installed").exists(),
        reason="`transformers serve` IS NOT TESTED: install what it needs with "
        "`make .venv-serve/.installed`",
    ),
]
NUM_SAID = 24
RATE_HZ = 16_000
NEVER = -1000.0  # what is added to the logits of special tokens, which the server would parse


def make_questions(family):
    """Contents of messages: text, and what else the family takes."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (48, 96, 3), dtype=np.uint8)
    media = [{"type": "image", "image": Image.fromarray(pixels)}]
    if family not in ("gemma4-26b-a4b", "gemma4-31b"):  # they do not hear
        samples = rng.integers(-5_000, 5_000, 9_000) / 2**15  # as 16 bits hold
        media.append({"type": "audio", "audio": samples.astype(np.float32)})
    texts = ("Where is my invoice?", "Two apples and three pears.")
    questions = [[{"type": "text", "text": text}] for text in texts]
    return questions + [[part, {"type": "text", "text": "What is this?"}] for part in media]


def encode(part):
    """A part as the server takes it: media as data URLs."""
    if part["type"] == "text":
        return part
    buffer = io.BytesIO()
    if part["type"] == "image":
        part["image"].save(buffer, format="PNG")
    else:
        soundfile.write(buffer, part["audio"], RATE_HZ, format="WAV")
    content = base64.b64encode(buffer.getvalue()).decode()
    kind = "image/png" if part["type"] == "image" else "audio/wav"
    name = f"{part['type']}_url"
    return {"type": name, name: {"url": f"data:{kind};base64,{content}"}}


def say(model, processor, content):
    """What transformers says, greedily: its text and the number of its tokens."""
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        ids = model.generate(
            **inputs,
            max_new_tokens=NUM_SAID,
            do_sample=False,
            repetition_penalty=2.0,
            sequence_bias={(token,): NEVER for token in processor.tokenizer.all_special_ids},
        )
    said = ids[0, inputs["input_ids"].shape[1] :]
    return processor.decode(said), len(said)


@contextmanager
def serving(log):
    """`transformers serve` over loopback; yields its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "transformers.cli.transformers", "serve", "--device", "cpu"]
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, *command, "--host", "127.0.0.1", "--port", str(port)],
            env=os.environ | {"PYTHONPATH": str(PACKAGES), "HF_HUB_OFFLINE": "1"},
            stdout=output,
            stderr=output,
        )
    try:
        wait_until_ready(server, port, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


def wait_until_ready(server, port, log):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(log.read_text()[-3000:])


def ask(url, folder, content, special_ids):
    """What the server says to the same."""
    body = {
        "model": str(folder),
        "messages": [{"role": "user", "content": [encode(part) for part in content]}],
        "max_tokens": NUM_SAID,
        "temperature": 0,
        "frequency_penalty": 1.0,  # becomes repetition_penalty 2
        "logit_bias": dict.fromkeys(special_ids, NEVER),
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        answer = json.load(response)
    return answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]


def test_greedy_answers_are_those_of_the_adapter(tmp_path):
    folders, questions, expected, special_ids = {}, {}, {}, {}
    for family in FAMILIES:
        folder = folders[family] = tmp_path / family
        model, processor = save_base(family, folder / "base")
        model = add_trained_lora(model, targets=TARGETS[family])
        save_adapter(model, folder / "adapter")
        export_merged(folder / "adapter", folder / "merged", base=folder / "base")
        questions[family] = make_questions(family)
        expected[family] = [say(model, processor, each) for each in questions[family]]
        with model.disable_adapter():
            assert say(model, processor, questions[family][0]) != expected[family][0]
        special_ids[family] = processor.tokenizer.all_special_ids

    with serving(tmp_path / "log.txt") as url:
        for family in FAMILIES:
            got = [
                ask(url, folders[family] / "merged", each, special_ids[family])
                for each in questions[family]
            ]
            assert got == expected[family], family
