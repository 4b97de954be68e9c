"""Model cards: all that a stranger needs to trust a fine-tune, and nothing about who made it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_tuner.errors import ConfigError
from gemma_tuner.models.adapter_files import hash_text
from gemma_tuner.models.identity import portable_name

if TYPE_CHECKING:
    from gemma_tuner.export.deltas import Adapter

Scores = Mapping[str, float | Mapping[str, float]]

_PACKAGES = ("gemma_tuner", "torch", "transformers", "peft", "safetensors")


_USE = (
    "```python",
    "import peft, transformers",
    "",
    'base = transformers.AutoModelForImageTextToText.from_pretrained("{base}")',
    'model = peft.PeftModel.from_pretrained(base, "THIS_FOLDER_OR_REPOSITORY")',
    "```",
)
_USE_QALORA = (
    "Stock PEFT does not open this adapter: it pools its inputs (QA-LoRA, arXiv 2309.14717).",
    "`export_merged` merges it into its packed base, which stays packed.",
    "",
    "```python",
    "import gemma_tuner",
    "",
    'model, processor = gemma_tuner.load_model("{base}")',
    'model = gemma_tuner.load_adapter(model, "THIS_FOLDER")',
    "```",
)


def write_adapter_card(
    folder: Path,
    config: Mapping[str, Any],
    *,
    template: str | None,
    data: Mapping[str, Any] | None,
    scores: Scores | None,
    training: Mapping[str, Any] | None,
    plan: str | None,
) -> None:
    """Write an adapter's ``README.md``."""
    base = config["base_model_name_or_path"]
    pooled = config.get("use_qalora")
    lines = [
        *_front_matter(base, "gemma_tuner" if pooled else "peft", "adapter", ["lora"]),
        f"# LoRA adapter for {base or 'a Gemma model'}",
        "",
        *_facts(
            {
                "Base model": base,
                "Base revision": config.get("revision"),
                "Chat template (SHA-256)": template and hash_text(template),
                **_describe_data(data),
                "Adapter": _describe_lora(config),
            }
        ),
        *_score_table(scores),
        *_json_section("Training settings", training),
        *(["## Memory plan", "", "```", plan.strip(), "```", ""] if plan else []),
        "## Use",
        "",
        *(line.replace("{base}", base or "BASE") for line in (_USE_QALORA if pooled else _USE)),
        "",
        *_versions(),
    ]
    _write(folder, lines)


def write_merged_card(
    folder: Path, adapter: Adapter, lost: float, dtypes: Sequence[str], base_is: str | None
) -> None:
    """Write the ``README.md`` of a merged checkpoint."""
    base = portable_name(adapter.base)
    lines = [
        *_front_matter(base, "transformers", "finetune", []),
        f"# {base or 'A Gemma model'} with a LoRA adapter merged in",
        "",
        *_facts(
            {
                "Base model": base,
                "Base revision": adapter.revision,
                "The base was": base_is,
                "Adapter": _describe_lora(adapter.config),
                "Merged weights": f"{len(adapter.deltas)}, in {', '.join(dtypes)}",
                "Adapter lost to rounding": f"{lost:.2%}",
            }
        ),
        *_versions(),
    ]
    _write(folder, lines)


def _front_matter(base: str | None, library: str, relation: str, tags: Sequence[str]) -> list[str]:
    lines = ["---", f"library_name: {library}", "tags:"]
    lines += [f"- {tag}" for tag in ("gemma_tuner", *tags)]
    if base and "/" in base:  # else it is no name on the Hub
        lines += [f"base_model: {base}", f"base_model_relation: {relation}"]
    return [*lines, "---", ""]


def _facts(facts: Mapping[str, Any]) -> list[str]:
    rows = [f"| {name} | {value} |" for name, value in facts.items() if value]
    return ["| | |", "|---|---|", *rows, ""]


def _describe_data(data: Mapping[str, Any] | None) -> dict[str, str]:
    if data is None:
        return {}
    names = {"fingerprint": "Data (SHA-256)", "rows": "Rows", "seed": "Data seed"}
    return {
        title: ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        for name, title in names.items()
        if (value := data.get(name)) is not None
    }


def _describe_lora(config: Mapping[str, Any]) -> str:
    if modules := config.get("modules_to_save"):
        return f"full, {len(modules)} layers"
    kinds = {"use_dora": "DoRA", "use_rslora": "rsLoRA", "use_qalora": "QA-LoRA"}
    kind = next((kind for key, kind in kinds.items() if config.get(key)), "LoRA")
    return f"{kind}, rank {config['r']}, alpha {config['lora_alpha']}"


def _score_table(scores: Scores | None) -> list[str]:
    if not scores:
        return []
    by_model = {
        name: value if isinstance(value, Mapping) else {"adapter": value}
        for name, value in scores.items()
    }
    models = list(dict.fromkeys(model for values in by_model.values() for model in values))
    rows = []
    for name, values in by_model.items():
        for value in values.values():
            if not isinstance(value, int | float):
                raise ConfigError(
                    f"the score {name!r} is a {type(value).__name__}; give numbers, or numbers by "
                    "model such as {'base': 0.4, 'adapter': 0.1}"
                )
        cells = [f"{values[model]:.4g}" if model in values else "" for model in models]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return [
        "## Scores",
        "",
        f"| | {' | '.join(models)} |",
        f"|---{'|---' * len(models)}|",
        *rows,
        "",
    ]


def _json_section(title: str, value: Mapping[str, Any] | None) -> list[str]:
    if value is None:
        return []
    # The run's folder is a path of the user's machine.
    kept = {name: v for name, v in value.items() if name != "output_dir"}
    return [f"## {title}", "", "```json", json.dumps(kept, indent=1), "```", ""]


def _versions() -> list[str]:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in _PACKAGES)
    return [f"Made with {versions}."]


def _write(folder: Path, lines: Sequence[str]) -> None:
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
