"""The adapter as a standard PEFT folder with its model card, and its way to the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx, validate_repo_id
from peft import PeftModel

from gemma_tuner.checkpoints.folders import new_folder
from gemma_tuner.checkpoints.weights import read_json
from gemma_tuner.checkpoints.writing import list_own_files
from gemma_tuner.checks import check_path, check_value
from gemma_tuner.errors import CheckpointError, ConfigError
from gemma_tuner.export.cards import Scores, write_adapter_card
from gemma_tuner.log import announce
from gemma_tuner.models.adapter_files import (
    CONFIG,
    adapter_tensors,
    trained_with,
    write_adapter,
    write_json,
)
from gemma_tuner.models.identity import find_commit
from gemma_tuner.models.lora import check_adapted

# Nothing else of an export is meant for others; a training folder's log and states never are.
_UPLOADED = {".gguf", ".json", ".jinja", ".md", ".model", ".safetensors", ".txt"}
_NOT_UPLOADED = {"optimizer.safetensors", "trainer_state.json"}


def export_adapter(
    model: PeftModel,
    path: str | Path,
    *,
    processor: Any = None,
    data: Mapping[str, Any] | None = None,
    scores: Scores | None = None,
    training: Mapping[str, Any] | None = None,
    plan: str | None = None,
) -> Path:
    """Write an adapter that stock transformers and PEFT load, with a model card.

    The folder also says which weights the adapter was trained on, so that merging it into another
    release of the same shapes is refused. No file holds a path of the user's machine.

    Args:
        model: From ``add_lora``.
        path: The new folder.
        processor: The model's; the card then names the chat template's hash.
        data: ``stream.state_dict()``; the card names the data's fingerprint, not its contents.
        scores: Score names to numbers, or to numbers by model
            (``{"wer": {"base": 0.4, "adapter": 0.1}}``).
        training: ``train_config.to_dict()``.
        plan: ``str(trainer.plan())``.

    Returns:
        The folder.

    Raises:
        ConfigError: A score that is no number.
        CheckpointError: The folder exists already or cannot be written.
    """
    check_adapted(model)
    base: Any = model.get_base_model()
    known = trained_with(model)
    num_bytes = sum(tensor.nbytes for tensor in adapter_tensors(model).values())
    with new_folder(path, num_bytes) as temporary:
        write_adapter(model, temporary)
        config = read_json(temporary / CONFIG)
        config["revision"] = config.get("revision") or _find_revision(base)
        write_json(temporary / CONFIG, config)
        write_adapter_card(
            temporary,
            config,
            template=known.chat_template if known else getattr(processor, "chat_template", None),
            data=data,
            scores=scores,
            training=training,
            plan=plan,
        )
    return Path(path)


def _find_revision(base: Any) -> str | None:
    """Find the commit of a model that came from the Hub."""
    if commit := getattr(base.config, "_commit_hash", None):
        return commit
    return find_commit(Path(base.config.name_or_path or ""))


def push_to_hub(
    folder: str | Path,
    repository: str,
    *,
    confirm: bool = False,
    dry_run: bool = False,
    private: bool = True,
) -> dict[str, int]:
    """Upload an exported folder to the Hugging Face Hub.

    Args:
        folder: From ``export_adapter``, ``export_merged`` or ``export_mlx``.
        repository: ``user/name``; made if it is not there.
        confirm: Must be True for anything to be uploaded.
        dry_run: Only say what would be uploaded; no network is used.
        private: Whether a new repository is seen by its owner alone.

    Returns:
        The files that were, or with ``dry_run`` would be, uploaded, and their bytes.

    Raises:
        ConfigError: Neither ``confirm`` nor ``dry_run``, or a name that the Hub does not take.
        CheckpointError: The folder is no export, or the Hub refuses.
    """
    check_path("folder", folder)
    check_value("repository", repository, str)
    source = Path(folder)
    name = source.resolve().name
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"{repository!r} is no name for a repository: {error}") from None
    files = _list_uploads(source)
    if dry_run:
        return files
    seen = "private" if private else "PUBLIC"
    if not confirm:
        raise ConfigError(
            f"nothing was uploaded: pass confirm=True to send {len(files)} files "
            f"({sum(files.values()) / 1e6:.1f} MB) of {name} to {repository} ({seen}, if it is "
            "new), or dry_run=True to see which"
        )
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=source,
            allow_patterns=list(files),
            commit_message="Upload with gemma_tuner",
        )
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, httpx.HTTPError) as error:
        raise CheckpointError(
            f"{name} could not be uploaded to {repository} ({type(error).__name__}); log in with "
            "`hf auth login` with a token that may write, check the network, unset "
            "HF_HUB_OFFLINE, and try again"
        ) from error
    announce(f"uploaded {len(files)} files of {name} to https://huggingface.co/{repository}")
    return files


def _list_uploads(folder: Path) -> dict[str, int]:
    files = {
        file.name: file.stat().st_size
        for file in (list_own_files(folder) if folder.is_dir() else ())
        if file.suffix in _UPLOADED
        and file.name not in _NOT_UPLOADED
        and not file.name.startswith(".")
    }
    if not any(name.endswith(".safetensors") for name in files):
        raise CheckpointError(
            f"{folder.resolve().name} holds no exported weights; give the folder that "
            "export_adapter, export_merged or export_mlx wrote"
        )
    return files
