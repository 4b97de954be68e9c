"""Run the decoder's last layers only where a hidden state is asked for.

Axes: ``B`` rows, ``S`` positions, ``M`` wanted positions of a row (padded), ``N`` wanted positions
of the batch, ``H`` hidden size.

Gemma 4 E2B, E4B and Gemma 3n end in layers that make no keys and values: they read those of an
earlier layer. Nobody reads what such a layer computes at a position that predicts no target, so it
need not be computed; 20 of E2B's 35 layers, with 70 % of the decoder's weights, are of that kind.
The last layer that makes keys and values needs all positions for these alone; its queries, output
and MLP, too, are read by the layers above it and by the head. In families that share none, that is
the last layer. Nothing is approximated: the same numbers are computed at fewer positions.

The model's own forward runs, with the forward of those layers wrapped for its duration. Relied on
in transformers 5.23: the decoder's ``layers`` run in order, each called with what
:data:`_LAYER_ARGUMENTS` names; a layer whose attention has
``is_kv_shared_layer`` reads ``shared_kv_states[layer_type]``; nothing behind the layers depends on
the number of positions. :class:`TargetOnly` checks the names, then compares both ways on a probe.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.models.gemma4.modeling_gemma4 import apply_rotary_pos_emb

from gemma_tuner.device import is_out_of_memory
from gemma_tuner.log import announce
from gemma_tuner.modalities import IMAGE
from gemma_tuner.models.attention import ATTENTION
from gemma_tuner.models.families import family_of
from gemma_tuner.models.masks import AttentionMask
from gemma_tuner.models.placeholders import merged_media_embeddings

if TYPE_CHECKING:
    from torch.nn import Module

MAX_SHARE = 0.875
"""Above this share of the sequence the plain forward is used: the gain would not pay for explicit
masks."""

_ATTENTIONS = (ATTENTION, "sdpa", "eager")  # whose masks can be cut to queries
_LAYER_ARGUMENTS = ("hidden_states", "position_embeddings", "attention_mask")
# How a layer is given keys and values that it does not make: where the family's layers can share
# them, as shared ones, and else by a cache.
_SHARED, _CACHED = "shared_kv_states", "past_key_values"
_IMAGES = (IMAGE.inputs[0], "mm_encoder_outputs")  # inputs that bring images along
_OWNER_ATTRIBUTES = ("head_dim", "k_proj", "v_proj", "k_norm")
# How far both ways may lie apart on the probe, relative to its norm. Another number of rows is
# another order of summation; a wrong row or mask is an error of about 1.
_PROBE_TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 0.1}


class TargetOnly:
    """How far a model's decoder can be restricted to wanted positions.

    Args:
        gemma: A Gemma model, not wrapped by PEFT (its adapters stay active).

    Attributes:
        reason: Why it cannot be restricted, or None where it can; then every forward is plain.
        first_layer: The first layer that runs at wanted positions only.
    """

    def __init__(self, gemma: Module) -> None:
        self._gemma: Any = weakref.proxy(gemma)  # what is known of a model must not keep it alive
        self.attention: str = self._gemma.config.get_text_config()._attn_implementation  # noqa: SLF001
        self.first_layer = len(self._layers)
        self.reason = self._find_unknown_structure()
        weight = next(gemma.parameters()).data
        has_values = type(weight) is Tensor and not weight.is_meta  # what is planned with has none
        if self.reason is None and has_values:
            self.reason = self._find_difference()
        self._announce_reason()

    @property
    def _layers(self) -> Any:
        return self._gemma.get_decoder().layers

    def hidden_states(self, inputs: Mapping[str, Tensor], rows: Tensor, slots: Tensor) -> Tensor:
        """Compute the final hidden states (after the last norm) at wanted positions."""
        # rows: ``[B, M]`` int64: positions within each row, of which every one may see itself.
        # slots: ``[N]`` int64: indices into the flattened ``[B * M]``.
        # Returns: ``[N, H]``, differentiable.
        length = inputs["input_ids"].shape[1]
        if self.reason is None and (reason := self._find_replaced_forward()):
            self.reason = reason  # since the last call; wrapping it would undo that
            self._announce_reason()
        restrict = self.reason is None and rows.shape[1] <= MAX_SHARE * length
        known = {}
        if self.attention == ATTENTION:
            known["has_images"] = any(name in inputs for name in _IMAGES)
        wrapped = self._restricted_to(_Rows(rows, length)) if restrict else nullcontext()
        with merged_media_embeddings(self._gemma, inputs) as inputs, wrapped:
            hidden = self._gemma.model(**inputs, **known, use_cache=False).last_hidden_state
        if not restrict:
            slots = _Rows(rows, length).flat.index_select(0, slots)
        return hidden.flatten(0, 1).index_select(0, slots)

    @contextmanager
    def _restricted_to(self, rows: _Rows) -> Iterator[None]:
        """Wrap the layers' forward; what backward recomputes needs no wrapping."""
        layers = self._layers[self.first_layer :]
        try:
            for layer in layers:
                run = _run_sharer if shares_keys(layer) else _run_owner
                layer.forward = partial(run, layer, rows)
            yield
        finally:
            for layer in layers:
                layer.__dict__.pop("forward", None)

    def _find_unknown_structure(self) -> str | None:
        """Compare names and shapes with what this module knows, and set ``first_layer``."""
        if self.attention not in _ATTENTIONS:
            return f"attention is {self.attention!r}, whose masks cannot be cut to positions"
        for index, layer in enumerate(self._layers):
            arguments = inspect.signature(type(layer).forward).parameters
            attention = getattr(layer, "self_attn", None)
            given = _SHARED if _can_share(attention) else _CACHED
            missing = [name for name in (*_LAYER_ARGUMENTS, given) if name not in arguments]
            missing += [] if hasattr(attention, "layer_type") else ["layer_type"]
            if missing:
                return f"layer {index} has no {', '.join(missing)} (another transformers?)"
        sharing = [shares_keys(layer) for layer in self._layers]
        first_sharer = len(sharing) - sum(sharing)
        if first_sharer == 0 or not all(sharing[first_sharer:]):
            return "layers that share keys and values are not the last ones"
        owner = self._layers[first_sharer - 1]
        missing = [name for name in _OWNER_ATTRIBUTES if not hasattr(owner.self_attn, name)]
        if missing:
            return f"layer {first_sharer - 1} has no {', '.join(missing)} (another transformers?)"
        self.first_layer = first_sharer - 1
        return self._find_replaced_forward()

    def _find_replaced_forward(self) -> str | None:
        """Find a layer whose own forward is taken by something else."""
        for index, layer in enumerate(self._layers[self.first_layer :], self.first_layer):
            if "forward" in layer.__dict__:
                return f"the forward of layer {index} is replaced (offloading hooks?)"
        return None

    def _announce_reason(self) -> None:
        if self.reason is not None:
            announce(
                f"every decoder layer runs at every position, not at targets only: {self.reason}. "
                "Results are the same; training is slower"
            )

    @torch.no_grad()
    def _find_difference(self) -> str | None:
        """Compute a few positions both ways, in eval mode, and compare."""
        inputs, rows, slots = _make_probe(self._gemma)
        was_training = [module for module in self._gemma.modules() if module.training]
        self._gemma.eval()
        try:
            plain = self._gemma.model(**inputs, use_cache=False).last_hidden_state
            ours = self.hidden_states(inputs, rows, slots).float()
        except (
            AttributeError,
            IndexError,
            KeyError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            if is_out_of_memory(error):
                raise  # which says nothing of the model
            return f"a trial failed with {type(error).__name__}: {error}"
        finally:
            for module in was_training:
                module.training = True
        wanted = _Rows(rows, plain.shape[1]).flat.index_select(0, slots)
        theirs = plain.flatten(0, 1).index_select(0, wanted).float()
        difference = float((ours - theirs).norm() / theirs.norm())
        if not difference <= _PROBE_TOLERANCES.get(plain.dtype, 0.1):
            return f"a trial differed from the plain forward by {difference:.2g} of its norm"
        return None


def _can_share(attention: Any) -> bool:
    return hasattr(attention, "is_kv_shared_layer")


def shares_keys(layer: Any) -> bool:
    """Whether a decoder layer reads keys and values of an earlier one."""
    return getattr(layer.self_attn, "is_kv_shared_layer", False)


class _Rows:
    """The wanted positions, and cuts of tensors to them; each is made once a forward pass."""

    def __init__(self, rows: Tensor, length: int) -> None:
        self.shape = rows.shape
        starts = torch.arange(len(rows), device=rows.device) * length
        self.flat = (rows + starts.unsqueeze(1)).flatten()  # [B * M] into [B * S]
        self._rows = rows
        self._length = length
        self._cut: dict[tuple[str, str], Any] = {}

    def gather(self, tensor: Tensor) -> Tensor:
        """Cut ``[..., B, S, X]`` to ``[..., B, M, X]``."""
        cut = tensor.flatten(-3, -2).index_select(-2, self.flat)
        return cut.unflatten(-2, self.shape)

    def cut(self, attention: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        """Cut a layer's arguments but its hidden states; keys and values stay whole."""
        kind = attention.layer_type
        cut = dict(arguments)
        if arguments.get("per_layer_input") is not None:
            cut["per_layer_input"] = self.gather(arguments["per_layer_input"])
        if ("mask", kind) not in self._cut:
            self._cut["mask", kind] = self._cut_mask(arguments["attention_mask"])
            self._cut["rotary", kind] = tuple(
                self.gather(x.expand(len(self._rows), -1, -1))
                for x in arguments["position_embeddings"]
            )
        cut["attention_mask"] = self._cut["mask", kind]
        cut["position_embeddings"] = self._cut["rotary", kind]
        return cut

    def _cut_mask(self, mask: AttentionMask | Tensor | None) -> AttentionMask | Tensor:
        """Cut ``[B or 1, 1, S, keys]`` to ``[B, 1, M, keys]``."""
        if isinstance(mask, AttentionMask):
            return mask.at(self._rows)
        if mask is None:  # transformers leaves it to a causal kernel, which needs all queries
            keys = torch.arange(self._length, device=self._rows.device)
            return (keys <= self._rows.unsqueeze(2)).unsqueeze(1)
        if mask.dim() != 4 or mask.shape[1] != 1:
            raise ValueError(f"attention mask of shape {list(mask.shape)}")
        return self.gather(mask.squeeze(1).expand(len(self._rows), -1, -1)).unsqueeze(1)


def target_only_of(gemma: Module) -> TargetOnly:
    """Find or make what is known of a model; the trial runs once a model and attention."""
    known = _KNOWN.get(gemma)
    attention = gemma.config.get_text_config()._attn_implementation  # pyright: ignore  # noqa: SLF001
    if known is None or known.attention != attention:
        known = _KNOWN[gemma] = TargetOnly(gemma)
    return known


_KNOWN: weakref.WeakKeyDictionary[Module, TargetOnly] = weakref.WeakKeyDictionary()


def _run_sharer(layer: Any, rows: _Rows, *args: Any, **kwargs: Any) -> Tensor:
    """Run a layer that makes no keys; its input holds the wanted rows already."""
    hidden, arguments = _name_arguments(layer, args, kwargs)
    # the class's forward checkpoints itself
    return type(layer).forward(layer, hidden, **rows.cut(layer.self_attn, arguments))


def _run_owner(layer: Any, rows: _Rows, *args: Any, **kwargs: Any) -> Tensor:
    """Run the last layer that makes keys and values: these everywhere, all else at rows."""
    hidden, arguments = _name_arguments(layer, args, kwargs)
    run = partial(_keys_everywhere, layer, rows, arguments, rows.cut(layer.self_attn, arguments))
    if layer.gradient_checkpointing and layer.training:
        return layer._gradient_checkpointing_func(run, hidden)  # noqa: SLF001
    return run(hidden)


def _keys_everywhere(
    layer: Any, rows: _Rows, arguments: dict[str, Any], cut: dict[str, Any], hidden: Tensor
) -> Tensor:
    """What :func:`_run_owner` checkpoints."""
    attention = layer.self_attn
    # Gemma 3n: hidden is [streams, B, S, H], of which attention reads the predicted active one
    source = (
        layer.altup.predict(hidden)[layer.config.altup_active_idx]
        if hasattr(layer, "altup")
        else hidden
    )
    states = _keys_and_values(
        attention, layer.input_layernorm(source), arguments["position_embeddings"]
    )
    plain_forward = inspect.unwrap(type(layer).forward)  # without its own checkpointing
    if not _can_share(attention):
        cut = {**cut, _CACHED: _Cache(states)}
        return plain_forward(layer, rows.gather(hidden), **cut)
    if attention.store_full_length_kv:
        arguments["shared_kv_states"][attention.layer_type] = states
    cut = {**cut, "shared_kv_states": {attention.layer_type: states}}
    stores = attention.store_full_length_kv
    attention.is_kv_shared_layer, attention.store_full_length_kv = True, False
    try:
        return plain_forward(layer, rows.gather(hidden), **cut)
    finally:
        attention.is_kv_shared_layer, attention.store_full_length_kv = False, stores


class _Cache:
    """Gives an attention keys and values of all positions for those that it has made at some."""

    def __init__(self, states: tuple[Tensor, Tensor]) -> None:
        self._states = states

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """What an attention calls with its own."""
        return self._states


def _keys_and_values(
    attention: Any, normed: Tensor, rotary: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Project ``[B, S, H]`` as the attention does: two of ``[B, heads, S, head size]``."""
    keys = attention.k_proj(normed).unflatten(-1, (-1, attention.head_dim))
    if attention.v_proj is None:  # full layers of the large families use keys as values
        values = keys
    else:
        values = attention.v_proj(normed).unflatten(-1, (-1, attention.head_dim))
    keys = apply_rotary_pos_emb(attention.k_norm(keys), *rotary, unsqueeze_dim=2)
    values = attention.v_norm(values) if hasattr(attention, "v_norm") else values
    return keys.transpose(1, 2), values.transpose(1, 2)


def _name_arguments(
    layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """Tell hidden states from the other arguments, by name: families order them differently."""
    bound = inspect.signature(type(layer).forward).bind(layer, *args, **kwargs)
    named = dict(bound.arguments)
    named.update(named.pop("kwargs", {}))
    del named["self"]
    return named.pop("hidden_states"), named


def _make_probe(gemma: Any) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Two short rows of text, one padded, with positions asked for in no order."""
    device = next(gemma.parameters()).device
    ids = torch.arange(10, 34, device=device).view(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if type_name := family_of(gemma.config).token_type_name:
        inputs[type_name] = torch.zeros_like(ids)
    rows = torch.tensor([[3, 10], [7, 0]], device=device)
    return inputs, rows, torch.tensor([0, 1, 2, 3], device=device)
