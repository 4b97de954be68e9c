"""Run GGUF files in real llama.cpp; started by test_export_gguf.py in an environment of its own.

    python llama_run.py CASES.json

Each case has ``model`` and ``output`` (.json), and may have ``lora``; ``ids``, whose logits it
gets ``[tokens, vocabulary]``; ``generate``, how many tokens it shall say after them, greedily;
``texts``, whose ids it gets.
"""

import faulthandler
import json
import sys
from pathlib import Path

from llama_cpp import Llama

F32 = 0  # the type of the cache


def run(case):
    model = Llama(
        case["model"],
        lora_path=case.get("lora"),
        vocab_only="texts" in case,
        n_ctx=256,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        swa_full=True,
        type_k=F32,
        type_v=F32,
        verbose=False,
    )
    if "texts" in case:
        ids = [
            model.tokenize(text.encode(), add_bos=False, special=True) for text in case["texts"]
        ]
        return {"ids": ids}
    model.eval(case["ids"])
    logits = model.scores[: len(case["ids"])].tolist()
    said = []
    for _ in range(case.get("generate", 0)):
        said.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(said[-1:])
    return {"logits": logits, "said": said}


faulthandler.enable()
for case in json.loads(Path(sys.argv[1]).read_text()):
    Path(case["output"]).write_text(json.dumps(run(case)))
