"""Load a checkpoint completely, or fail: no weight is ever left at random."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import safetensors
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from gemma_tuner.checkpoints.cache import pack_once
from gemma_tuner.checkpoints.formats import find_format
from gemma_tuner.checkpoints.sources import name_keys
from gemma_tuner.checkpoints.writing import COPIED
from gemma_tuner.checks import check_path
from gemma_tuner.device import choose_device, choose_dtype
from gemma_tuner.errors import MALFORMED, CheckpointError, ConfigError
from gemma_tuner.log import announce
from gemma_tuner.modalities import MEDIA, Modality
from gemma_tuner.models import embeddings
from gemma_tuner.models.adapter_files import read_trained_with, set_trained_with
from gemma_tuner.models.building import choose_left_out, finish_model, make_partial_class
from gemma_tuner.models.families import Family, family_of, tokenizer_of
from gemma_tuner.models.few_bits.grids import PACKED, choose_grid, name_grids
from gemma_tuner.models.identity import find_commit

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin


class Placing(Protocol):
    """What loading needs of a plan."""

    @property
    def modalities(self) -> Sequence[Modality]:
        """What was planned for."""
        ...

    @property
    def device(self) -> str:
        """Where to compute."""
        ...

    @property
    def dtype(self) -> str:
        """Of the weights."""
        ...

    @property
    def per_layer_embeddings(self) -> embeddings.Placement | None:
        """Where the per-layer table is."""
        ...

    @property
    def bits(self) -> int | None:
        """Of a packed weight."""
        ...


_EXPLAIN_ADAPTER = (
    "it holds an adapter, not a model alone; load the model that the adapter was trained on, and "
    "put the adapter on with load_adapter(model, FOLDER) as peft.PeftModel.from_pretrained would, "
    "and with trainable=True to go on training it"
)


def load_model(
    name_or_path: str | Path,
    *,
    modalities: Sequence[Modality] = ("text",),
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    per_layer_embeddings: embeddings.Placement | None = None,
    bits: int | None = None,
    plan: Placing | None = None,
    revision: str | None = None,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a Gemma model and its processor, and say on which device, in which dtype, and why.

    Module names stay those of the full multimodal class (``model.language_model...``), so that an
    adapter trained without towers fits the full model.

    Args:
        name_or_path: A folder, or a model's name on the Hugging Face Hub.
        modalities: What the data holds. Towers of other modalities are neither built nor read.
        device: Where to compute; by default MPS, CUDA or CPU, whichever is there.
        dtype: ``bfloat16`` or ``float32``; by default what suits device and checkpoint.
        per_layer_embeddings: Where the per-layer table of E2B, E4B and Gemma 3n is: mapped from
            the checkpoint's file, of which a step reads the rows it needs, or with the other
            weights. By default on disk for MPS, whose memory is the machine's.
        bits: 4 or 8, of the decoder's large matrices: a quarter of their memory, or half. The
            checkpoint is packed as ``pack`` does, once, and kept in ``~/.cache/gemma_tuner``;
            adapters name the checkpoint itself as their base. By default as they are stored.
        plan: From ``gemma_tuner.plan``; device, dtype, bits and the table's place are then its.
        revision: A branch, tag or commit on the Hub.

    Returns:
        ``(model, processor)``: the full ``ForConditionalGeneration`` class in eval mode with every
        parameter frozen, and its processor, padding on the right.

    Raises:
        ConfigError: A modality that is unknown or that the checkpoint lacks; a device or dtype
            that cannot work; other bits than those of a checkpoint that is packed.
        CheckpointError: Files that are missing, damaged, locked behind a licence, or whose weights
            are not exactly those of the model; no room to pack it.
    """
    if plan is not None:
        device, dtype, per_layer_embeddings, bits = _read_plan(
            plan, modalities, (device, dtype, per_layer_embeddings, bits)
        )
    check_path("name_or_path", name_or_path)
    source = str(name_or_path)
    name = name_without_path(source)
    device, device_reason = choose_device(device)
    config = read_config(source, revision)
    _refuse_adapter(source, revision)
    commit, weights = _find_commit(source, revision), source
    is_quantised = find_format(config.to_dict(), Path(source)) is not None
    grid = None if is_quantised else choose_grid(name, config, bits)
    if is_quantised or grid is not None:
        fetch = partial(_fetch, source, commit or revision)
        weights, revision = str(pack_once(source, commit, grid, fetch)), None
        config = read_config(weights, None)
        choose_grid(name, config, bits)  # refuses other bits than those of its file
    family = family_of(config)
    placement = embeddings.choose_placement(config, device, per_layer_embeddings)
    left_out = choose_left_out(name, family, config, modalities, placement)
    dtype, dtype_reason = choose_dtype(device, dtype, config.dtype)
    processor = read_processor(weights, revision)
    _check_processor(name, processor, family, modalities)
    _check_tokenizer(name, tokenizer_of(processor), family, config)
    tokenizer_of(processor).padding_side = "right"
    model = _read_weights(
        weights, make_partial_class(family, config, left_out), config, device, dtype, revision
    )
    if placement == "disk":
        with _explained(weights):
            table = embeddings.map_per_layer_embeddings(
                model, partial(_find_file, weights, revision), dtype
            )
        announce(f"{name}: {table.num_bytes / 2**30:.2f} GiB of per-layer embeddings stay on disk")
    # What is trained on a packed one names the checkpoint itself.
    model.name_or_path = model.config.name_or_path = source
    model.config._commit_hash = commit  # noqa: SLF001 - where transformers kept it before 5.23
    grids = name_grids(getattr(config, PACKED, None))
    packed = f", weights packed as {grids}" if grids else ""
    announce(
        f"{name}: {', '.join(modalities)} on {device} ({device_reason}), "
        f"{str(dtype).removeprefix('torch.')} ({dtype_reason}){packed}"
    )
    set_trained_with(model, read_trained_with(Path(weights)))  # of a merged one
    return finish_model(model), processor


def _read_plan(
    plan: Placing, modalities: Sequence[Modality], given: Collection[Any]
) -> tuple[str, str, embeddings.Placement | None, int | None]:
    """Take all that a plan says of the weights from it; nothing given may contradict it."""
    planned = set(plan.modalities)
    if any(choice is not None for choice in given) or {"text", *modalities} != planned:
        raise ConfigError(
            f"plan was made for {', '.join(plan.modalities)} on {plan.device} in "
            f"{plan.dtype}; give the same modalities, and leave device, dtype, bits and "
            "per_layer_embeddings to it"
        )
    return plan.device, plan.dtype, plan.per_layer_embeddings, plan.bits


def _read_weights(
    source: str,
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    revision: str | None,
) -> Any:
    """Build a model and read every weight of it."""
    with _explained(source):
        loaded: Any = model_class.from_pretrained(
            source,
            config=config,
            revision=revision or "main",
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # so that they are reported, and refused below
            output_loading_info=True,
        )
    model, loading_info = loaded
    _check_loaded(name_without_path(source), loading_info)
    return model


def _refuse_adapter(source: str, revision: str | None) -> None:
    """Refuse a folder with an adapter, which transformers would put on without a word."""
    with _explained(source):
        if find_adapter_config_file(source, revision=revision) is not None:
            name = name_without_path(source)
            raise CheckpointError(f"{name} cannot be loaded: {_EXPLAIN_ADAPTER}")


def read_config(source: str, revision: str | None) -> PreTrainedConfig:
    """Read a checkpoint's configuration."""
    with _explained(source):
        return transformers.AutoConfig.from_pretrained(
            source, revision=revision, trust_remote_code=False
        )


def read_processor(source: str, revision: str | None) -> ProcessorMixin:
    """Read a checkpoint's processor; arguments and errors are those of :func:`read_config`."""
    with _explained(source):
        return transformers.AutoProcessor.from_pretrained(
            source, revision=revision, trust_remote_code=False
        )


def _find_commit(source: str, revision: str | None) -> str | None:
    with _explained(source):
        file = _find_file(source, revision, "config.json")
    return file and find_commit(file)


def _fetch(source: str, revision: str | None) -> Path:
    """Find a checkpoint's folder, and download what is not here."""
    if Path(source).is_dir():
        return Path(source)
    with _explained(source):
        wanted = [f"*{ending}" for ending in (*COPIED, ".safetensors")]
        return Path(
            snapshot_download(
                source, revision=revision, allow_patterns=wanted, ignore_patterns="*/*"
            )
        )


def _find_file(source: str, revision: str | None, name: str) -> Path | None:
    found = cached_file(
        source, name, revision=revision, _raise_exceptions_for_missing_entries=False
    )
    return None if found is None else Path(found)


def _check_processor(
    name: str, processor: Any, family: Family, modalities: Sequence[Modality]
) -> None:
    if type(processor).__name__ != family.processor_class:
        raise CheckpointError(
            f"{name} has no {family.processor_class} but a {type(processor).__name__}; add the "
            "processor_config.json and tokenizer files of the model that it was made from"
        )
    if "audio" in modalities and getattr(processor, "feature_extractor", None) is None:
        raise CheckpointError(
            f"the processor of {name} has no feature_extractor, so audio would be ignored; use "
            "the processor_config.json of the model that it was made from"
        )
    if not processor.chat_template:
        raise CheckpointError(
            f"{name} has no chat template; use the instruction-tuned checkpoint (its name ends "
            "in -it), or add its chat_template.jinja to the folder"
        )


def _check_tokenizer(name: str, tokenizer: Any, family: Family, config: PreTrainedConfig) -> None:
    """Refuse a tokenizer that is not the model's."""
    # Without a tokenizer.json transformers makes one that knows control tokens alone, and says
    # nothing.
    unknown = tokenizer.unk_token_id in tokenizer("model\n", add_special_tokens=False)["input_ids"]
    differing = any(
        tokenizer.convert_tokens_to_ids(family.media[medium.modality].token)
        != getattr(config, medium.token_id)
        for medium in MEDIA
        if medium.modality in family.media
    )
    if unknown or differing or len(tokenizer) > config.get_text_config().vocab_size:
        raise CheckpointError(
            f"the tokenizer of {name} is not its model's ({len(tokenizer)} tokens); add the "
            "tokenizer.json of the model that it was made from"
        )


def _check_loaded(name: str, info: Mapping[str, Collection[Any]]) -> None:
    """Refuse a checkpoint whose weights are not exactly the model's."""
    faults = [
        name_keys("missing", info["missing_keys"]),
        name_keys("unexpected", info["unexpected_keys"]),
        name_keys(
            "of another shape",
            [f"{key} {list(got)} for {list(want)}" for key, got, want in info["mismatched_keys"]],
        ),
    ]
    if any(faults):
        raise CheckpointError(
            f"the weights of {name} are not those of its configuration: "
            f"{'; '.join(filter(None, faults))}. Download the checkpoint again, or use the "
            "original if this one was converted by another tool"
        )


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """Turn what transformers, the Hub and safetensors raise into errors with a remedy."""
    name = name_without_path(source)
    try:
        yield
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"a weight file of {name} is damaged or incomplete ({error}); download it again"
        ) from error
    except ImportError:
        raise CheckpointError(
            f"{name} cannot be loaded: its configuration asks for a package that is not used here "
            "(of a quantisation such as bitsandbytes, or a kernel); give the checkpoint that it "
            "was made from"
        ) from None
    except (OSError, *MALFORMED) as error:
        remedy = _find_remedy(source, error).replace(source, name)
        # What transformers says of a folder holds its path.
        cause = None if Path(source).is_dir() else error
        raise CheckpointError(f"{name} cannot be loaded: {remedy}") from cause


def name_without_path(source: str) -> str:
    """Name a checkpoint: a Hub name as it is; a folder by its own name, as paths are private."""
    path = Path(source)
    return path.resolve().name if path.is_absolute() or path.exists() else source


def _find_remedy(source: str, error: BaseException) -> str:
    causes = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if caused_by(GatedRepoError):
        return (
            f"it is behind a licence; accept it at https://huggingface.co/{source} and log in "
            "with `hf auth login`"
        )
    if caused_by(RepositoryNotFoundError):
        return (
            "the Hub knows no such model, or it is private; check the name at "
            f"https://huggingface.co/{source} and log in with `hf auth login`"
        )
    if caused_by(LocalEntryNotFoundError, OfflineModeIsEnabled):
        return (
            "it is not in the local cache and the Hub cannot be reached; connect once (and unset "
            f"HF_HUB_OFFLINE), accept the licence at https://huggingface.co/{source}, log in with "
            "`hf auth login`, or give the path of a folder"
        )
    folder = Path(source)
    if caused_by(HFValidationError):
        return "there is no such folder, and it is no name of a model on the Hub"
    if find_adapter_config_file(source) is not None:
        return _EXPLAIN_ADAPTER
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        if any(folder.glob("*.bin")):
            return (
                "it has pickled weights (.bin), which can run code; convert them to safetensors "
                "with save_pretrained in a place that you trust"
            )
        if (folder / "config.json").is_file():
            return "the folder has no weights (*.safetensors); download the checkpoint again"
    if folder.is_dir() and not (folder / "config.json").is_file():
        return "the folder has no config.json; give the folder that holds the model's files"
    return f"{error}; download the checkpoint again"
