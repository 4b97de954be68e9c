"""Every layout of docs/data-formats.md, as its publishers write it: what is trained, or said.

Each sample is written by the libraries that people use, and read through the public functions; the
text that carries loss is decoded from the collator's labels, and media are measured as they come
from the decoder.
"""

import base64
import gc
import gzip
import io
import json
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pytest
import soundfile

import gemma_tuner as gt
from gemma_tuner.testing.cloud.gcs.server import GcsServer
from gemma_tuner.testing.models.processor import tiny_processor
from tests.examples import picture, sound

SIZE = (48, 32)
SECONDS = 0.5
DESCRIBE, TRANSCRIBE = "Describe this image.", "Transcribe this audio."

Expected = tuple[str, str, tuple[Any, ...]]  # what is asked, what is trained, the media


@dataclass(frozen=True)
class Layout:
    name: str  # as the table of docs/data-formats.md calls it
    write: Callable[[Path], Any]  # returns what is read, or nothing: the folder itself
    expected: tuple[Expected, ...] = ()
    refused: str = ""  # what the error must name
    how: dict[str, Any] = field(default_factory=dict)
    hub: bool = False  # read as datasets reads it


# ---- writing --------------------------------------------------------------------------------


def media_in(folder, *names):
    """Write a picture or a clip under each name; returns the folder."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in {".png", ".jpg"}:
            picture(1, SIZE).save(path)
        else:
            soundfile.write(path, sound(8_000), 16_000)
    return folder


def png() -> bytes:
    stream = io.BytesIO()
    picture(1, SIZE).save(stream, "PNG")
    return stream.getvalue()


def wav() -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, sound(8_000), 16_000, format="WAV")
    return stream.getvalue()


def lines(*rows, name="train.jsonl", media=()):
    def write(folder):
        media_in(folder, *media)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def file(name, content, *media):
    """Write one file, of text or of bytes, and the media beside it; the file is read."""

    def write(folder):
        media_in(folder, *media)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def tree(files, *media):
    """Write files by name and media; the folder is read."""

    def write(folder):
        for name, content in files.items():
            file(name, content)(folder)
        return media_in(folder, *media)

    return write


def parquet(*rows, features=None):
    def write(folder):
        table = datasets.Dataset.from_list(list(rows), features=features)
        table.to_parquet(str(folder / "train-00000-of-00001.parquet"))
        return folder

    return write


def tar(**members):
    def write(folder):
        with tarfile.open(folder / "000000.tar", "w") as archive:
            for name, content in members.items():
                header = tarfile.TarInfo(name.replace("__", "."))
                header.size = len(content)
                archive.addfile(header, io.BytesIO(content))
        return folder / "000000.tar"

    return write


def save_to_disk(*, in_splits):
    def write(folder):
        rows = datasets.Dataset.from_list([QA])
        if in_splits:
            other = datasets.Dataset.from_list([{"prompt": "held out", "response": "no"}])
            rows = datasets.DatasetDict({"train": rows, "test": other})
        rows.save_to_disk(str(folder / "saved"))
        return folder / "saved"

    return write


def arrow_file(folder):
    table = pyarrow.table({"prompt": ["Q"], "response": ["A"]})
    with pyarrow.ipc.new_file(str(folder / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    return folder / "rows.arrow"


def zstd(text):
    stream = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(stream, "zstd") as writer:
        writer.write(text.encode())
    return stream.getvalue().to_pybytes()


def excel(folder):
    """An .xlsx is a zip of XML: its signature and first member's name are enough here."""
    import zipfile

    with zipfile.ZipFile(folder / "rows.xlsx", "w") as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
    return folder / "rows.xlsx"


def pickled(folder):
    pandas.DataFrame([QA]).to_pickle(folder / "rows.pkl")
    return folder / "rows.pkl"


def chat(*turns, **more):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]


def two(*texts):
    names = ("human", "gpt")
    return [{"from": names[i % 2], "value": text} for i, text in enumerate(texts)]


QA = {"prompt": "Q", "response": "A"}
QA_LINE = json.dumps(QA) + "\n"
ASKED = (("Q", "A", ()),)
SUMMARISED = (("Long.", "Short.", ()),)
IMAGE, CLIP = (SIZE,), (SECONDS,)
CAPTIONED = ((DESCRIBE, "a dog", IMAGE),)
HEARD = ((TRANSCRIBE, "hello there", CLIP),)
SPEC = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
}
TOOL_TURNS = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "4 degrees"},
    {"role": "assistant", "content": "Cold."},
]
CALLED = (
    ("Weather?|4 degrees", '<|tool_call>call:weather{city:<|"|>Oslo<|"|>}<tool_call|>|Cold.', ()),
)
SQUAD = {
    "version": "1.1",
    "data": [
        {
            "title": "T",
            "paragraphs": [
                {
                    "context": "It is in Oslo.",
                    "qas": [
                        {
                            "id": "q1",
                            "question": "Where?",
                            "answers": [{"text": "Oslo", "answer_start": 9}],
                        }
                    ],
                }
            ],
        }
    ],
}
COCO = {
    "info": {"year": 2017},
    "licenses": [],
    "images": [{"id": 7, "file_name": "000007.jpg", "height": 32, "width": 48}],
    "annotations": [
        {"id": 1, "image_id": 7, "caption": "a dog"},
        {"id": 2, "image_id": 7, "caption": "one dog"},
    ],
}
COMMON_VOICE = (
    "client_id\tpath\tsentence_id\tsentence\tsentence_domain\tup_votes\tdown_votes\tlocale\n"
    'c\tcv_1.wav\ts\t"Hello," he said.\t\t2\t0\ten\n'
)
KALDI = {
    "data/wav.scp": "utt1 ../wav/rec1.wav\n",
    "data/text": "utt1 hello there\n",
    "data/utt2spk": "utt1 spk1\n",
}
AUDIO_FEATURE = datasets.Audio(sampling_rate=16_000)


LAYOUTS = [
    # ---- questions and answers ----
    Layout(
        "Alpaca",
        lines({"instruction": "Add.", "input": "1 and 2", "output": "3"}, name="alpaca_data.json"),
        (("Add.\n\n1 and 2", "3", ()),),
    ),
    Layout(
        "Dolly",
        lines({"instruction": "Who?", "context": "Ann.", "response": "Ann", "category": "qa"}),
        (("Who?\n\nAnn.", "Ann", ()),),
    ),
    Layout(
        "GSM8K",
        lines({"question": "1+1?", "answer": "1+1=2\n#### 2"}),
        (("1+1?", "1+1=2\n#### 2", ()),),
    ),
    Layout("TRL prompt and completion", lines({"prompt": "Q", "completion": "A"}), ASKED),
    Layout(
        "TRL prompt and completion, conversational",
        lines({"prompt": chat("Q"), "completion": [{"role": "assistant", "content": "A"}]}),
        ASKED,
    ),
    Layout(
        "TRL preference",
        lines({"prompt": "Q", "chosen": "A", "rejected": "B"}),
        refused="'chosen'|'rejected'",
    ),
    Layout(
        "TRL unpaired preference (KTO)",
        lines({"prompt": "Q", "completion": "A", "label": False}),
        refused="'label'",
    ),
    Layout(
        "UltraFeedback binarized",
        parquet(
            {"prompt": "Q", "prompt_id": "1", "chosen": chat("Q", "A"), "rejected": chat("Q", "B")}
        ),
        refused="'chosen'|'rejected'",
    ),
    Layout(
        "LLaMA-Factory alpaca with history",
        lines(
            {
                "instruction": "Q2",
                "input": "",
                "output": "A2",
                "system": "S",
                "history": [["Q1", "A1"]],
            }
        ),
        (("S|Q1|Q2", "A1|A2", ()),),
    ),
    Layout("mlx-lm completions", lines({"prompt": "Q", "completion": "A"}), ASKED),
    Layout(
        "SQuAD 1.1 and 2.0, the JSON file",
        file("train-v1.1.json", json.dumps(SQUAD)),
        (("Where?\n\nIt is in Oslo.", "Oslo", ()),),
    ),
    Layout(
        "SQuAD on the Hub",
        parquet(
            {
                "id": "q1",
                "title": "T",
                "context": "It is in Oslo.",
                "question": "Where?",
                "answers": {"text": ["Oslo"], "answer_start": [9]},
            }
        ),
        (("Where?\n\nIt is in Oslo.", "Oslo", ()),),
    ),
    Layout(
        "BoolQ",
        lines({"question": "Is it?", "passage": "It is.", "answer": True}),
        refused="'answer'|'passage'",
    ),
    Layout(
        "XSum",
        parquet({"document": "Long.", "summary": "Short.", "id": "1"}),
        SUMMARISED,
    ),
    Layout(
        "CNN/DailyMail",
        parquet({"article": "Long.", "highlights": "Short.", "id": "1"}),
        SUMMARISED,
    ),
    Layout(
        "SAMSum, DialogSum",
        lines({"id": "1", "dialogue": "A: hi", "summary": "A greets."}),
        (("A: hi", "A greets.", ()),),
    ),
    Layout("text with summary", lines({"text": "Long.", "summary": "Short."}), SUMMARISED),
    Layout(
        "WMT translation",
        parquet({"translation": {"de": "Hund", "en": "dog"}}),
        refused="'translation'",
    ),
    Layout("IMDB, AG News", parquet({"text": "Good.", "label": 1}), refused="'label'"),
    Layout(
        "IMDB, by keyword from the Hub",
        parquet(
            {"text": "Good.", "label": 1},
            features=datasets.Features(
                {
                    "text": datasets.Value("string"),
                    "label": datasets.ClassLabel(names=["neg", "pos"]),
                }
            ),
        ),
        (("Good.", "pos", ()),),
        how={"prompt": "text", "response": "label", "text": False},
        hub=True,
    ),
    Layout("SNLI", lines({"premise": "P", "hypothesis": "H", "label": 0}), refused="response="),
    Layout(
        "ms-swift query and response",
        lines({"query": "Q", "response": "A"}),
        ASKED,
    ),
    Layout(
        "Gemini and Vertex tuning",
        lines(
            {
                "contents": [
                    {"role": "user", "parts": [{"text": "Q"}]},
                    {"role": "model", "parts": [{"text": "A"}]},
                ]
            }
        ),
        refused="'contents'",
    ),
    # ---- conversations ----
    Layout(
        "OpenAI chat", lines({"messages": chat("Q", "A", "Q2", "A2")}), (("Q|Q2", "A|A2", ()),)
    ),
    Layout(
        "OpenAI chat with weights",
        lines(
            {
                "messages": [
                    {"role": "user", "content": "Q"},
                    {"role": "assistant", "content": "A", "weight": 0},
                    {"role": "user", "content": "Q2"},
                    {"role": "assistant", "content": "A2", "weight": 1},
                ]
            }
        ),
        (("Q|Q2", "A2", ()),),
    ),
    Layout("OpenAI tools", lines({"messages": TOOL_TURNS, "tools": [SPEC]}), CALLED),
    Layout(
        "OpenAI functions (the older form)",
        lines(
            {
                "messages": [
                    {"role": "user", "content": "Weather?"},
                    {"role": "assistant", "content": None, "function_call": CALL["function"]},
                    {"role": "function", "name": "weather", "content": "4 degrees"},
                    {"role": "assistant", "content": "Cold."},
                ],
                "functions": [SPEC["function"]],
            }
        ),
        CALLED,
    ),
    Layout(
        "Anthropic messages with system",
        lines({"system": "S", "messages": chat("Q", "A")}),
        (("S|Q", "A", ()),),
    ),
    Layout("HF messages in Parquet", parquet({"messages": chat("Q", "A"), "source": "x"}), ASKED),
    Layout(
        "HF messages in Parquet with tools",
        parquet({"messages": TOOL_TURNS, "tools": [SPEC]}),
        CALLED,
    ),
    Layout(
        "UltraChat",
        parquet({"prompt": "Q", "prompt_id": "1", "messages": chat("Q", "A")}),
        ASKED,
    ),
    Layout("ShareGPT", lines({"id": "x", "conversations": two("Q", "A")}), ASKED),
    Layout(
        "OpenHermes, SlimOrca",
        lines(
            {
                "conversations": [
                    {"from": "system", "value": "S", "weight": 0},
                    {"from": "human", "value": "Q", "weight": 0},
                    {"from": "gpt", "value": "A", "weight": 1},
                ],
                "source": "x",
            }
        ),
        (("S|Q", "A", ()),),
    ),
    Layout(
        "LLaMA-Factory sharegpt with tools",
        lines(
            {
                "conversations": [
                    {"from": "human", "value": "Weather?"},
                    {
                        "from": "function_call",
                        "value": json.dumps({"name": "weather", "arguments": {"city": "Oslo"}}),
                    },
                    {"from": "observation", "value": "4 degrees"},
                    {"from": "gpt", "value": "Cold."},
                ],
                "tools": json.dumps([SPEC["function"]]),
            }
        ),
        CALLED,
    ),
    Layout(
        "OASST messages, one turn a row",
        parquet(
            {
                "message_id": "1",
                "parent_id": None,
                "text": "Q",
                "role": "prompter",
                "message_tree_id": "1",
            },
            {
                "message_id": "2",
                "parent_id": "1",
                "text": "A",
                "role": "assistant",
                "message_tree_id": "1",
            },
        ),
        refused="'role' says that each row is one turn",
    ),
    Layout(
        "mlx-lm chat",
        tree(
            {
                "train.jsonl": json.dumps({"messages": chat("Q", "A")}),
                "valid.jsonl": json.dumps({"messages": chat("x", "y")}),
            }
        ),
        ASKED,
    ),
    Layout("mlx-lm tools", lines({"messages": TOOL_TURNS, "tools": [SPEC]}), CALLED),
    Layout(
        "Unsloth conversations in Parquet",
        parquet({"conversations": chat("Q", "A"), "score": 5.0}),
        ASKED,
    ),
    Layout(
        "Unsloth text that has been through a template",
        lines(
            {"text": "<start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>"}
        ),
        refused="template",
    ),
    Layout(
        "datasets, conversations in columns (a dictionary of lists)",
        lines({"messages": {"role": ["user", "assistant"], "content": ["Q", "A"]}}),
        refused="its messages are an object",
    ),
    # ---- documents ----
    Layout("mlx-lm text", lines({"text": "A whole document."}), (("", "A whole document.", ()),)),
    Layout(
        "C4, FineWeb",
        lines(
            {"text": "A whole document.", "timestamp": "2020", "url": "http://x"},
            name="c4-train.00000-of-01024.json",
        ),
        (("", "A whole document.", ()),),
    ),
    Layout(
        "text files",
        tree({"a.txt": "First.\n\nStill first.", "b.txt": "Second."}),
        (("", "First.\n\nStill first.", ()), ("", "Second.", ())),
    ),
    Layout(
        "Markdown files",
        tree({"notes/a.md": "# A\n\nText.", "README.md": "Not data."}),
        (("", "# A\n\nText.", ()),),
    ),
    # ---- how rows are written ----
    Layout("CSV", file("a.csv", 'prompt,response\n"Q, then",A\n'), (("Q, then", "A", ()),)),
    Layout(
        "CSV with a byte order mark (Excel, UTF-8)",
        file("a.csv", "\ufeffprompt,response\r\nQ,A\r\n"),
        ASKED,
    ),
    Layout(
        "CSV with semicolons (Excel in Europe)",
        file("a.csv", "prompt;response\nQ, then;A\n"),
        (("Q, then", "A", ()),),
    ),
    Layout("CSV with bars", file("a.csv", "prompt|response\nQ|A\n"), ASKED),
    Layout("TSV", file("a.tsv", "prompt\tresponse\nQ\tA\n"), ASKED),
    Layout(
        "TSV as pandas quotes it",
        lambda folder: (
            pandas.DataFrame([{"prompt": 'Say "x"\nnow', "response": "A"}]).to_csv(
                folder / "a.tsv", sep="\t", index=False
            )
            or folder / "a.tsv"
        ),
        (('Say "x"\nnow', "A", ()),),
    ),
    Layout(
        "Unicode text of Excel (UTF-16, tabs)",
        file("a.csv", "prompt\tresponse\r\nQ\tÄ\r\n".encode("utf-16")),
        (("Q", "Ä", ()),),
    ),
    Layout(
        "CSV in Windows-1252",
        file("a.csv", "prompt,response\nQ,Ä\n".encode("cp1252")),
        refused="not UTF-8 at line 2",
    ),
    Layout("CSV, compressed", file("a.csv.gz", gzip.compress(b"prompt,response\nQ,A\n")), ASKED),
    Layout(
        "CSV without a header",
        file("a.csv", "what is it?,a dog\nand now?,a cat\n"),
        refused="header",
    ),
    Layout("JSON lines, gzip", file("a.jsonl.gz", gzip.compress(QA_LINE.encode())), ASKED),
    Layout("JSON lines, Zstandard", file("a.jsonl.zst", zstd(QA_LINE)), ASKED),
    Layout("JSON lines in UTF-16", file("a.jsonl", QA_LINE.encode("utf-16")), ASKED),
    Layout("JSON array", file("a.json", json.dumps([QA], indent=2)), ASKED),
    Layout("JSON array, gzip", file("a.json.gz", gzip.compress(json.dumps([QA]).encode())), ASKED),
    Layout(
        "JSON objects over several lines", file("a.json", json.dumps(QA, indent=2) * 2), ASKED * 2
    ),
    Layout(
        "JSON object with a list of rows",
        file("a.json", json.dumps({"version": 1, "data": [QA]})),
        ASKED,
    ),
    Layout(
        "JSON object of columns (pandas to_json)",
        lambda folder: pandas.DataFrame([QA, QA]).to_json(folder / "a.json") or folder / "a.json",
        ASKED * 2,
    ),
    Layout(
        "JSON object of lists",
        file("a.json", json.dumps({"prompt": ["Q"], "response": ["A"]})),
        ASKED,
    ),
    Layout("Parquet", parquet(QA), ASKED),
    Layout("Arrow file", arrow_file, ASKED),
    Layout("save_to_disk", save_to_disk(in_splits=False), ASKED),
    Layout("save_to_disk with splits", save_to_disk(in_splits=True), ASKED),
    Layout("save_to_disk, as datasets reads it", save_to_disk(in_splits=True), ASKED, hub=True),
    Layout("Excel workbook", excel, refused="xlsx.*CSV"),
    Layout("zip archive", file("a.zip", b"PK\x03\x04"), refused="zip.*unpack"),
    Layout("pickle", pickled, refused="pkl.*Parquet"),
    # ---- images ----
    Layout(
        "LLaVA",
        lines(
            {
                "id": "1",
                "image": "coco/1.jpg",
                "conversations": two("<image>\nWhat is it?", "a dog"),
            },
            media=["coco/1.jpg"],
        ),
        (("What is it?", "a dog", IMAGE),),
    ),
    Layout(
        "LLaVA with media elsewhere",
        lambda folder: lines(
            {"id": "1", "image": "coco/1.jpg", "conversations": two("<image>\nWhat?", "a dog")},
            name="json/llava.json",
        )(media_in(folder, "images/coco/1.jpg")),
        (("What?", "a dog", IMAGE),),
        how={"media_root": "images"},
    ),
    Layout(
        "LLaVA without its media",
        lines(
            {
                "id": "1",
                "image": "coco/1.jpg",
                "conversations": two("<image>\nWhat is it?", "a dog"),
            }
        ),
        refused="example '1'.*media_root=",
    ),
    Layout(
        "LLaMA-Factory mllm",
        lines(
            {"messages": chat("<image>What is it?", "a dog"), "images": ["1.jpg"]}, media=["1.jpg"]
        ),
        (("What is it?", "a dog", IMAGE),),
    ),
    Layout(
        "Qwen-VL messages",
        lines(
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image", "image": "1.jpg"},
                            {"type": "text", "text": "What?"},
                        ],
                    },
                    {"role": "assistant", "content": [{"type": "text", "text": "a dog"}]},
                ]
            },
            media=["1.jpg"],
        ),
        (("What?", "a dog", IMAGE),),
    ),
    Layout(
        "OpenAI vision",
        lines(
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "What?"},
                            {
                                "type": "image_url",
                                "image_url": {
                                    "url": "data:image/png;base64,"
                                    + base64.b64encode(png()).decode()
                                },
                            },
                        ],
                    },
                    {"role": "assistant", "content": "a dog"},
                ]
            }
        ),
        (("What?", "a dog", IMAGE),),
    ),
    Layout(
        "COCO captions, the JSON file",
        tree({"annotations/captions_val2017.json": json.dumps(COCO)}, "val2017/000007.jpg"),
        ((DESCRIBE, "a dog", IMAGE), (DESCRIBE, "one dog", IMAGE)),
    ),
    Layout(
        "COCO captions beside instances",
        tree(
            {
                "annotations/captions_train2017.json": json.dumps(COCO),
                "annotations/instances_train2017.json": json.dumps(
                    {**COCO, "annotations": [{"id": 1, "bbox": [0, 0, 1, 1]}]}
                ),
            },
            "train2017/000007.jpg",
        ),
        ((DESCRIBE, "a dog", IMAGE), (DESCRIBE, "one dog", IMAGE)),
    ),
    Layout(
        "COCO instances",
        file(
            "instances_train2017.json",
            json.dumps({**COCO, "annotations": [{"id": 1, "image_id": 7, "bbox": [0, 0, 1, 1]}]}),
        ),
        refused="caption",
    ),
    Layout(
        "Flickr8k",
        file("captions.txt", "image,caption\n1.jpg,a dog\n", "Images/1.jpg"),
        CAPTIONED,
        how={"format": "csv", "media_root": "Images"},
    ),
    Layout(
        "Flickr8k, its captions.txt alone",
        file("captions.txt", "image,caption\n1.jpg,a dog\n", "Images/1.jpg"),
        refused="format='csv'",
    ),
    Layout(
        "Flickr30k",
        tree(
            {"results.csv": "image_name| comment_number| comment\n1.jpg| 0| a dog\n"},
            "flickr30k_images/1.jpg",
        ),
        CAPTIONED,
        how={"image": "image_name", "response": "comment"},
    ),
    Layout(
        "TextCaps",
        file(
            "TextCaps_0.1_train.json",
            json.dumps(
                {
                    "dataset_name": "textcaps",
                    "data": [{"image_id": "1", "image_path": "1.jpg", "caption_str": "a dog"}],
                }
            ),
            "1.jpg",
        ),
        refused="response=|image=",
    ),
    Layout(
        "TextCaps, by keyword",
        file(
            "TextCaps_0.1_train.json",
            json.dumps(
                {
                    "dataset_name": "textcaps",
                    "data": [{"image_id": "1", "image_path": "1.jpg", "caption_str": "a dog"}],
                }
            ),
            "1.jpg",
        ),
        CAPTIONED,
        how={"image": "image_path", "response": "caption_str"},
    ),
    Layout(
        "VQAv2 questions",
        file(
            "v2_OpenEnded_mscoco_train2014_questions.json",
            json.dumps({"questions": [{"image_id": 1, "question": "What?", "question_id": 2}]}),
        ),
        refused="response=",
    ),
    Layout(
        "VQAv2 on the Hub",
        parquet(
            {
                "question_type": "what",
                "multiple_choice_answer": "dog",
                "answers": [
                    {"answer": answer, "answer_confidence": "yes", "answer_id": place}
                    for place, answer in enumerate(["a dog", "dog", "dog"])
                ],
                "image_id": 7,
                "question": "What?",
                "image": {"bytes": png(), "path": None},
            }
        ),
        (("What?", "dog", IMAGE),),
    ),
    Layout(
        "DocVQA on the Hub",
        parquet(
            {
                "questionId": "1",
                "question": "What?",
                "question_types": ["form"],
                "image": {"bytes": png(), "path": None},
                "answers": ["Dog", "dog"],
                "data_split": "val",
            }
        ),
        (("What?", "Dog", IMAGE),),
    ),
    Layout(
        "SROIE",
        tree({"key/001.json": json.dumps({"company": "X", "total": "9.00"})}, "img/001.jpg"),
        ((DESCRIBE, '{"company": "X", "total": "9.00"}', IMAGE),),
    ),
    Layout(
        "SROIE with entities and boxes",
        tree(
            {
                "entities/001.txt": json.dumps({"company": "X"}, indent=4),
                "box/001.txt": "72,25,326,25,X\n",
            },
            "img/001.jpg",
        ),
        ((DESCRIBE, '{\n    "company": "X"\n}', IMAGE),),
    ),
    Layout(
        "CORD",
        parquet(
            {
                "image": {"bytes": png(), "path": None},
                "ground_truth": '{"gt_parse": {"total": "9"}}',
            }
        ),
        refused="response=",
    ),
    Layout(
        "CORD, by keyword",
        parquet(
            {
                "image": {"bytes": png(), "path": None},
                "ground_truth": '{"gt_parse": {"total": "9"}}',
            }
        ),
        ((DESCRIBE, '{"gt_parse": {"total": "9"}}', IMAGE),),
        how={"response": "ground_truth"},
    ),
    Layout(
        "the Cauldron, Docmatix",
        parquet(
            {
                "images": [{"bytes": png(), "path": None}],
                "texts": [{"user": "What?", "assistant": "a dog", "source": "x"}],
            }
        ),
        refused="'texts'",
    ),
    Layout(
        "imagefolder with metadata.jsonl",
        tree({"metadata.jsonl": json.dumps({"file_name": "1.jpg", "text": "a dog"})}, "1.jpg"),
        CAPTIONED,
    ),
    Layout(
        "imagefolder with metadata.csv, from the Hub",
        tree({"train/metadata.csv": "file_name,text\n1.jpg,a dog\n"}, "train/1.jpg"),
        CAPTIONED,
        hub=True,
    ),
    Layout(
        "imagefolder of classes",
        media_in_classes := (lambda folder: media_in(folder, "cat/1.jpg", "dog/2.jpg")),
        refused="no text",
    ),
    Layout(
        "imagefolder of classes, from the Hub",
        media_in_classes,
        ((DESCRIBE, "cat", IMAGE), (DESCRIBE, "dog", IMAGE)),
        how={"response": "label"},
        hub=True,
    ),
    Layout("images with .txt beside (kohya)", tree({"1.txt": "a dog"}, "1.jpg"), CAPTIONED),
    Layout(
        "webdataset, images and texts", tar(**{"1__png": png(), "1__txt": b"a dog"}), CAPTIONED
    ),
    Layout(
        "images as base64 in TSV (OFA)",
        file(
            "a.tsv",
            "image\tcaption\n" + base64.b64encode(png()).decode() + "\ta dog\n",
        ),
        CAPTIONED,
    ),
    # ---- sound ----
    Layout(
        "LibriSpeech, MLS",
        tree(
            {"train-clean/84/121/84-121.trans.txt": "84-121-0000 hello there\n"},
            "train-clean/84/121/84-121-0000.flac",
        ),
        HEARD,
    ),
    Layout(
        "LJSpeech",
        tree({"metadata.csv": "LJ001-0001|hello 1|hello there\n"}, "wavs/LJ001-0001.wav"),
        HEARD,
    ),
    Layout(
        "VoxForge",
        tree(
            {"etc/prompts-original": "a0001 hello there\n", "etc/README": "Speaker: x"},
            "wav/a0001.wav",
        ),
        HEARD,
    ),
    Layout("Kaldi", tree(KALDI, "wav/rec1.wav"), HEARD),
    Layout(
        "Kaldi with segments",
        tree(
            {
                **KALDI,
                "data/wav.scp": "rec1 wav/rec1.wav\n",
                "data/segments": "utt1 rec1 0.1 0.35\n",
            },
            "wav/rec1.wav",
        ),
        ((TRANSCRIBE, "hello there", (0.25,)),),
    ),
    Layout(
        "Kaldi with commands",
        tree({**KALDI, "data/wav.scp": "utt1 sox x.wav -t wav - |\n"}),
        refused="command",
    ),
    Layout(
        "NeMo manifest",
        lines(
            {"audio_filepath": "1.wav", "duration": 0.5, "text": "hello there"},
            media=["1.wav"],
            name="manifest.json",
        ),
        HEARD,
    ),
    Layout(
        "NeMo manifest with offsets",
        lines(
            {"audio_filepath": "1.wav", "offset": 0.1, "duration": 0.25, "text": "hello there"},
            media=["1.wav"],
        ),
        ((TRANSCRIBE, "hello there", (0.25,)),),
    ),
    Layout(
        "Common Voice",
        tree(
            {"train.tsv": COMMON_VOICE, "test.tsv": COMMON_VOICE, "validated.tsv": COMMON_VOICE},
            "clips/cv_1.wav",
        ),
        ((TRANSCRIBE, '"Hello," he said.', CLIP),),
        how={"audio": "path"},
    ),
    Layout(
        "FLEURS, its TSV",
        file("train.tsv", "12\t1.wav\tHello there.\thello there\th e\t8000\tMALE\n", "1.wav"),
        refused="header",
    ),
    Layout(
        "FLEURS on the Hub",
        parquet(
            {
                "id": 1,
                "num_samples": 8000,
                "path": "1.wav",
                "audio": {"bytes": wav(), "path": "1.wav"},
                "transcription": "hello there",
                "raw_transcription": "Hello there.",
                "gender": 0,
                "lang_id": 2,
            }
        ),
        HEARD,
    ),
    Layout(
        "VoxPopuli",
        parquet(
            {
                "audio_id": "1",
                "audio": {"bytes": wav(), "path": "1.wav"},
                "raw_text": "Hello there.",
                "normalized_text": "hello there",
            }
        ),
        refused="response=",
    ),
    Layout(
        "VoxPopuli, by keyword",
        parquet(
            {
                "audio_id": "1",
                "audio": {"bytes": wav(), "path": "1.wav"},
                "raw_text": "Hello there.",
                "normalized_text": "hello there",
            }
        ),
        HEARD,
        how={"response": "normalized_text", "id": "audio_id"},
    ),
    Layout(
        "GigaSpeech",
        parquet(
            {
                "segment_id": "1",
                "text": "hello there",
                "audio": {"bytes": wav(), "path": "1.wav"},
                "begin_time": 2.0,
                "end_time": 2.5,
                "title": "x",
            }
        ),
        refused=r"means those from 2\.00 to 2\.50.*ignore=",
    ),
    Layout(
        "GigaSpeech, where its clips come from left out",
        parquet(
            {
                "segment_id": "1",
                "text": "hello there",
                "audio": {"bytes": wav(), "path": "1.wav"},
                "begin_time": 2.0,
                "end_time": 2.5,
                "title": "x",
            }
        ),
        HEARD,
        how={"ignore": ("begin_time", "end_time")},
    ),
    Layout(
        "audiofolder with metadata.csv",
        tree({"metadata.csv": "file_name,transcription\ndata/1.wav,hello there\n"}, "data/1.wav"),
        HEARD,
    ),
    Layout(
        "audiofolder, from the Hub",
        tree(
            {
                "train/metadata.jsonl": json.dumps(
                    {"file_name": "1.wav", "transcription": "hello there"}
                )
            },
            "train/1.wav",
        ),
        HEARD,
        how={"streaming": True},
        hub=True,
    ),
    Layout(
        "Clotho",
        tree({"captions.csv": "file_name,caption_1,caption_2\n1.wav,rain,rain falls\n"}, "1.wav"),
        refused="response=",
    ),
    Layout(
        "Whisper-Finetune",
        lines(
            {"audio": {"path": "1.wav"}, "sentence": "hello there", "language": "en"},
            media=["1.wav"],
        ),
        HEARD,
    ),
    Layout(
        "samples in JSON (datasets' array)",
        lines(
            {"audio": {"array": [0.0, 0.1] * 4000, "sampling_rate": 16_000}, "text": "hello there"}
        ),
        HEARD,
    ),
    Layout(
        "webdataset, sound and JSON",
        tar(**{"1__wav": wav(), "1__json": b'{"text": "hello there"}'}),
        HEARD,
    ),
    Layout(
        "a column of bytes under another name",
        parquet({"field_7": wav(), "text": "hello there"}),
        refused="'field_7'.*audio=",
    ),
    Layout(
        "a column of paths under another name",
        lines({"field_7": "1.wav", "text": "hello there"}, media=["1.wav"]),
        refused="'field_7'.*audio=",
    ),
]


@pytest.fixture(scope="module")
def collator():
    return gt.MultimodalCollator(tiny_processor("gemma4-e2b"), max_tokens=4096)


def describe(example, collator) -> Expected:
    """What is asked, what is trained on (decoded from the labels), and the media's extents."""
    batch = collator([example])
    tokenizer = collator.processor.tokenizer
    trained = tokenizer.decode(batch.labels[batch.labels != -100])
    trained = re.sub(r"<turn\|>|<eos>|<\|tool_response>", "|", trained).strip("|\n")
    asked = "|".join(turn.text for turn in example.turns if turn.role != "assistant")
    media = tuple(
        part.source.size if isinstance(part, gt.Image) else len(part.source) / part.sample_rate_hz
        for part in example.media
    )
    return asked, trained, media


def stream(layout, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    place = layout.write(folder) or folder
    how = dict(layout.how)
    if "media_root" in how:
        how["media_root"] = folder / how["media_root"]
    read = gt.stream_hub if layout.hub else gt.stream_local
    return read(str(place), shuffle=False, cache_dir=tmp_path / "cache", **how)


def read(layout, tmp_path, collator):
    return [describe(example, collator) for example in stream(layout, tmp_path)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # of `datasets`, for the Hub
def test_a_public_layout_is_read_as_it_is_meant_or_refused_by_name(layout, tmp_path, collator):
    gc.collect()  # what the one before left open
    if layout.refused:
        with pytest.raises(gt.GemmaTunerError, match=f"(?s){layout.refused}"):
            read(layout, tmp_path, collator)
        return
    found = read(layout, tmp_path, collator)
    assert [(asked, trained) for asked, trained, _ in found] == [
        (asked, trained) for asked, trained, _ in layout.expected
    ]
    for (_, _, media), (_, _, expected) in zip(found, layout.expected, strict=True):
        assert [pytest.approx(extent, abs=0.02) for extent in expected] == list(media)


IN_BUCKETS = (
    *("mlx-lm chat", "COCO captions, the JSON file", "SROIE", "images with .txt beside (kohya)"),
    *("LibriSpeech, MLS", "LJSpeech", "VoxForge", "Kaldi", "Common Voice"),
    *("TSV", "JSON lines, Zstandard", "save_to_disk with splits", "LLaVA with media elsewhere"),
)


@pytest.mark.parametrize("name", IN_BUCKETS)
def test_a_folder_in_a_bucket_is_read_as_the_folder_here(name, tmp_path, collator):
    (layout,) = (layout for layout in LAYOUTS if layout.name == name)
    folder = tmp_path / "data"
    folder.mkdir()
    place = layout.write(folder) or folder
    how = dict(layout.how)
    if "media_root" in how:
        how["media_root"] = f"gs://b/{how['media_root']}"
    with GcsServer() as server:
        for path in folder.rglob("*"):
            if path.is_file():
                server.put("b", path.relative_to(folder).as_posix(), path.read_bytes())
        rows = gt.stream_gcs(
            f"gs://b/{place.relative_to(folder).as_posix()}".removesuffix("."),
            gcs_client=server.client(),
            cache_dir=tmp_path / "cache",
            shuffle=False,
            **how,
        )
        found = [describe(example, collator) for example in rows]
    assert found == list(layout.expected)


def test_the_page_lists_what_is_tested_and_nothing_else():
    page = (Path(__file__).parents[2] / "docs" / "data-formats.md").read_text()
    table = page.partition("## Public layouts")[2]
    listed = re.findall(r"^\| (.+?) \| .+ \|$", table, re.MULTILINE)
    assert listed[1:] == [layout.name for layout in LAYOUTS]
    assert len(set(listed)) == len(listed) > 60
