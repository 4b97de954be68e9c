"""A model of a checkpoint's configuration without its weights, to try a step's memory on.

Real configurations are built in a second and hold nothing: every tensor is a fake one of torch's
(``FakeTensorMode``), which has a shape, a dtype and a device, and no values.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gemma_tuner.modalities import Modality
from gemma_tuner.models import embeddings
from gemma_tuner.models.building import choose_left_out, finish_model, make_partial_class
from gemma_tuner.models.families import family_of, loaded_modalities
from gemma_tuner.models.few_bits.grids import PACKED, Grid
from gemma_tuner.models.few_bits.layers import PackedLayer, list_packable, replace_packed
from gemma_tuner.models.identity import active_adapter
from gemma_tuner.models.lora import unwrap_peft, wrap_peft

if TYPE_CHECKING:
    from peft import PeftModel
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import PreTrainedConfig


class MetaEmbedding(embeddings.MappedEmbedding):
    """A mapped table without its file: rows of the right size."""

    def __init__(self, columns: int, *, scale: float, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self._columns = columns
        self._stored_dtype = self._dtype = dtype
        self._scale = scale

    def _gather(self, input_ids: Tensor) -> Tensor:
        return torch.empty(*input_ids.shape, self._columns, dtype=self._dtype)


def build_meta_model(
    config: PreTrainedConfig,
    *,
    modalities: Sequence[Modality],
    dtype: torch.dtype,
    per_layer_embeddings: embeddings.Placement | None,
    grid: Grid | None = None,
) -> Any:
    """Build what ``load_model`` would return, on torch's meta device, or that packed on a grid."""
    config = copy.deepcopy(config)
    family = family_of(config)
    left_out = choose_left_out("the checkpoint", family, config, modalities, per_layer_embeddings)
    model_class = make_partial_class(family, config, left_out)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model: Any = model_class(config)
    finally:
        torch.set_default_dtype(before)
    if grid is not None:
        grids = list_packable(model, grid)
        replace_packed(model, grids, is_filled=False)
        setattr(model.config, PACKED, {name: str(grid) for name in grids})
    if per_layer_embeddings == "disk":
        text = config.get_text_config()
        size = text.hidden_size_per_layer_input
        table = MetaEmbedding(text.num_hidden_layers * size, scale=size**0.5, dtype=dtype)
        setattr(model.get_decoder(), embeddings.NAME, table)
    return finish_model(model)


def build_meta_copy(model: PeftModel, grid: Grid | None = None) -> PeftModel:
    """Build a model as another one is, adapters included, without its weights."""
    gemma: Any = unwrap_peft(model)
    is_mapped = embeddings.find_mapped_embedding(model) is not None
    meta_model = build_meta_model(
        gemma.config,
        modalities=loaded_modalities(gemma),
        dtype=gemma.dtype,
        per_layer_embeddings="disk" if is_mapped else None,
        grid=grid,
    )
    return wrap_peft(meta_model, copy.deepcopy(model.peft_config[active_adapter(model)]))


def make_fake(model: nn.Module, mode: FakeTensorMode, device: torch.device) -> None:
    """Replace a model's meta tensors by fake ones on a device; tied ones stay tied."""
    fakes: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in fakes:
            fakes[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        return fakes[id(tensor)]

    kept = []  # or a new tensor might get an old one's id
    with mode:
        for module in model.modules():
            if isinstance(module, PackedLayer):
                module.is_traced = True
            for name, parameter in list(module.named_parameters(recurse=False)):
                kept.append(parameter)
                if id(parameter) not in fakes:
                    fakes[id(parameter)] = nn.Parameter(
                        torch.empty(parameter.shape, dtype=parameter.dtype, device=device),
                        requires_grad=parameter.requires_grad,
                    )
                module.register_parameter(name, fakes[id(parameter)])  # pyright: ignore
            for name, buffer in list(module.named_buffers(recurse=False)):
                kept.append(buffer)
                setattr(module, name, fake(buffer))
