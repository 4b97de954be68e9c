"""Run the decoder's last layers only where a hidden state is asked for.

Axes: ``B`` rows, ``S`` positions, ``M`` wanted positions of a row (padded), ``N`` wanted positions
of the batch, ``H`` hidden size, ``F`` media features.

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

from gemma_tuner.device import is_out_of_memory
from gemma_tuner.log import announce
from gemma_tuner.modalities import IMAGE, MEDIA
from gemma_tuner.models.attention import ATTENTION
from gemma_tuner.models.families import family_of
from gemma_tuner.models.restricted_layers import (
    CACHED,
    SHARED,
    Rows,
    can_share,
    run_owner,
    run_sharer,
    shares_keys,
)

if TYPE_CHECKING:
    from torch.nn import Module

MAX_SHARE = 0.875
"""Above this share of the sequence the plain forward is used: the gain would not pay for explicit
masks."""

_ATTENTIONS = (ATTENTION, "sdpa", "eager")  # whose masks can be cut to queries
_LAYER_ARGUMENTS = ("hidden_states", "position_embeddings", "attention_mask")
_IMAGES = (IMAGE.inputs[0], "mm_encoder_outputs")  # inputs that bring images along
_OWNER_ATTRIBUTES = ("head_dim", "k_proj", "v_proj", "k_norm")
# How far both ways may lie apart on the probe, relative to its norm. Another number of rows is
# another order of summation; a wrong row or mask is an error of about 1.
_PROBE_TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 0.1}


class TargetOnly:
    """How far a model's decoder can be restricted to wanted positions.

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
        wrapped = self._restricted_to(Rows(rows, length)) if restrict else nullcontext()
        with merged_media_embeddings(self._gemma, inputs) as inputs, wrapped:
            hidden = self._gemma.model(**inputs, **known, use_cache=False).last_hidden_state
        if not restrict:
            slots = Rows(rows, length).flat.index_select(0, slots)
        return hidden.flatten(0, 1).index_select(0, slots)

    @contextmanager
    def _restricted_to(self, rows: Rows) -> Iterator[None]:
        """Wrap the layers' forward; what backward recomputes needs no wrapping."""
        layers = self._layers[self.first_layer :]
        try:
            for layer in layers:
                run = run_sharer if shares_keys(layer) else run_owner
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
            given = SHARED if can_share(attention) else CACHED
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
        wanted = Rows(rows, plain.shape[1]).flat.index_select(0, slots)
        theirs = plain.flatten(0, 1).index_select(0, wanted).float()
        difference = float((ours - theirs).norm() / theirs.norm())
        if not difference <= _PROBE_TOLERANCES.get(plain.dtype, 0.1):
            return f"a trial differed from the plain forward by {difference:.2g} of its norm"
        return None


def target_only_of(gemma: Module) -> TargetOnly:
    """Find or make what is known of a model; the trial runs once a model and attention."""
    known = _KNOWN.get(gemma)
    attention = gemma.config.get_text_config()._attn_implementation  # pyright: ignore  # noqa: SLF001
    if known is None or known.attention != attention:
        known = _KNOWN[gemma] = TargetOnly(gemma)
    return known


_KNOWN: weakref.WeakKeyDictionary[Module, TargetOnly] = weakref.WeakKeyDictionary()


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


# Media features are laid in without asking the device how many there are. transformers' forward
# waits for it three times for each modality: it counts placeholders, writes the count into a
# message, and scatters by a mask. Here the model's own methods make the features, a hook on the
# input embeddings lays them in, and the forward is given no media: the same numbers arrive at the
# same places. Relied on in transformers 5.23: the forward of Gemma 4 looks its ids up once, by
# calling ``get_input_embeddings()``, and lays features of media over the result before anything
# reads it. Gemma 3n lays embeddings of its media tokens over it, too, so that there the forward
# does all.


@contextmanager
def merged_media_embeddings(
    gemma: Any, inputs: Mapping[str, Tensor]
) -> Iterator[Mapping[str, Tensor]]:
    """Compute the features of a batch's media and lay them in during one forward of the model."""
    # Where they are not as many as their placeholders, they become NaN, and so does the loss: to
    # compare the two on the host would mean to wait for the device.
    media = [medium for medium in MEDIA if medium.inputs[0] in inputs]
    if not media or not family_of(gemma.config).lays_features_only:
        yield inputs
        return
    laid = []
    for medium in media:
        make_features = getattr(gemma.model, medium.method)
        outputs = make_features(*(inputs[name] for name in medium.inputs), return_dict=True)
        features, valid = outputs.pooler_output, None
        if isinstance(features, Tensor):  # of clips, padded to one length
            features, valid = features.flatten(0, 1), outputs.attention_mask.flatten()
        else:
            features = torch.cat(features)
        places = inputs["input_ids"] == getattr(gemma.config, medium.token_id)
        laid.append(_lay_out(features, valid, places))
    num_lookups = 0

    def lay_in(_module: Any, _args: Any, embeddings: Tensor) -> Tensor:
        nonlocal num_lookups
        num_lookups += 1
        for features, places in laid:
            embeddings = torch.where(places, features.to(embeddings.dtype), embeddings)
        return embeddings

    handle = gemma.get_input_embeddings().register_forward_hook(lay_in)
    try:
        read = {name for medium in media for name in medium.inputs}
        yield {name: tensor for name, tensor in inputs.items() if name not in read}
    finally:
        handle.remove()
    if num_lookups != 1:
        raise RuntimeError(
            f"the model looked its ids up {num_lookups} times in one forward, not once (another "
            "transformers?), so that media were not laid in as they should be"
        )


def _lay_out(features: Tensor, valid: Tensor | None, places: Tensor) -> tuple[Tensor, Tensor]:
    """Give each placeholder its feature, in reading order."""
    # features: ``[F, H]``.
    # valid: ``[F]`` bool: which of them are some; None for all.
    # places: ``[B, S]`` bool: the placeholders.
    # Returns: ``[B, S, H]``, whose values count at placeholders only, and ``[B, S, 1]`` bool.
    rank = places.flatten().cumsum(0) - 1
    if valid is None:
        num_valid: Tensor | int = len(features)
        index = rank.clamp(0, max(len(features) - 1, 0))
    else:
        num_valid = valid.sum()
        numbers = torch.arange(len(valid), device=valid.device)
        slots = torch.where(valid, valid.cumsum(0) - 1, len(valid))  # the last one is never read
        order = numbers.new_zeros(len(valid) + 1).scatter(0, slots, numbers)
        index = order.index_select(0, rank.clamp(0, len(valid) - 1))
    features = features.index_select(0, index).view(*places.shape, -1)
    return features.masked_fill(places.sum() != num_valid, torch.nan), places.unsqueeze(-1)
