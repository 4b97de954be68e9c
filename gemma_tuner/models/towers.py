"""One tower's features in place of the tower, for a forward: what :mod:`features` stands on.

Axes: ``N`` images or clips of a batch, ``T`` features of one (padded), ``D`` the tower's width.

The model's own forward runs, with ``get_image_features`` and ``get_audio_features`` replaced for
its duration. Relied on in transformers 5.23: ``model.model`` calls these once each, with media
tensors whose items are independent of each other; each hands what its tower made to the projector
as ``inputs_embeds`` (``[tokens of all items, D]`` or ``[N, T, D]``) and returns what the projector
made of it, split by item or not, as ``pooler_output``, for clips with a mask of the features that
are valid. A batch of which nothing is kept runs as without a cache, and is watched: what differs
from this switches the tower's part of the cache off before anything was used again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gemma_tuner.errors import ConfigError
from gemma_tuner.log import announce
from gemma_tuner.modalities import Medium
from gemma_tuner.models.families import family_of

# Of the outputs that mask features: what a mask holds where a feature is valid.
_MASKS = {"attention_mask": True, "audio_mel_mask": False}


class Tower:
    """One tower, its projector, and the method of the model that runs both."""

    def __init__(self, gemma: Any, spec: Medium) -> None:
        self.spec = spec
        self.family = family_of(gemma.config)
        self._model = gemma.model
        self._form = self.family.media.get(spec.modality)
        self.exists = (
            self._form is not None
            and spec.tower in self._form.modules
            and getattr(self._model, spec.tower, None) is not None
        )
        # What the first run shows:
        self.is_split = False
        self.is_flat = False
        self.is_transposed = False
        self.mask_name: str | None = None
        self.lengths: dict[int, int] = {}  # T by the length of the input
        self.reason = self._find_reason()

    @property
    def projector(self) -> Any:
        """What is between the tower and the decoder."""
        return getattr(self._model, self.spec.projector)

    def _find_reason(self) -> str | None:
        spec, model = self.spec, self._model
        if not self.exists:
            return f"this {self.family.name} has no {spec.modality} tower"
        if any(p.requires_grad for p in getattr(model, spec.tower).parameters()):
            return f"its {spec.modality} tower is trained"
        projector = getattr(model, spec.projector, None)
        if projector is None or not hasattr(type(model), spec.method):
            return f"the model has no {spec.projector} or {spec.method} (another transformers?)"
        if "inputs_embeds" not in inspect.signature(type(projector).forward).parameters:
            return f"{spec.projector} takes no inputs_embeds (is it wrapped?)"
        return self._find_replaced()

    def _find_replaced(self) -> str | None:
        if self.spec.method in self._model.__dict__ or "forward" in self.projector.__dict__:
            names = f"{self.spec.method} or the forward of {self.spec.projector}"
            return f"{names} is replaced (offloading hooks?)"
        return None

    def can_be_replaced(self) -> bool:
        """Whether the method is as it was when this was made; if not, switch off."""
        if self.reason is None and (reason := self._find_replaced()):
            self.switch_off(reason)
        return self.reason is None

    def switch_off(self, reason: str) -> None:
        """Keep and use no feature of this tower any more."""
        self.reason = reason
        self.announce_reason()

    def announce_reason(self) -> None:
        """Say why nothing is kept, if so; where there is no tower, nothing is lost."""
        if self.reason is not None and self.exists:
            announce(
                f"features of the {self.spec.modality} tower are not kept: {self.reason}. "
                "Results are the same; the tower runs at every step"
            )

    @contextmanager
    def replaced_by(self, answer: CachedFeatures) -> Iterator[None]:
        """Let the model's forward ask ``answer`` in place of the method."""
        setattr(self._model, self.spec.method, answer)
        try:
            yield
        finally:
            del self._model.__dict__[self.spec.method]
        if not answer.was_asked:
            self.switch_off(f"the model's forward does not call {self.spec.method}")

    def run(self, *args: Any, project: bool, **kwargs: Any) -> tuple[Any, list[Tensor]]:
        """Call the model's method."""
        seen: list[Tensor] = []
        forward = self.projector.forward

        def watch(inputs_embeds: Tensor) -> Tensor:
            made = forward(inputs_embeds=inputs_embeds) if project else inputs_embeds
            seen.extend((inputs_embeds, made))
            return made

        self.projector.forward = watch
        try:
            method = getattr(type(self._model), self.spec.method)
            return method(self._model, *args, **kwargs), seen
        finally:
            del self.projector.__dict__["forward"]

    def learn(self, outputs: Any, seen: Sequence[Tensor]) -> str | None:
        """Note the form of the outputs, or say what is not as this module knows it."""
        pooled: Any = getattr(outputs, "pooler_output", None)
        parts: tuple[Any, ...] = pooled if isinstance(pooled, tuple) else (pooled,)
        if len(seen) != 2 or not all(isinstance(part, Tensor) for part in parts):
            return f"{self.spec.method} does not project features once (another transformers?)"
        given, made = seen
        is_made = parts[0].data_ptr() == made.data_ptr() and sum(map(len, parts)) == len(made)
        if not is_made or given.dim() not in {2, 3}:
            return f"{self.spec.method} returns something else than the projector made"
        self.is_split = isinstance(pooled, tuple)
        self.is_flat = given.dim() == 2
        self.is_transposed = given.stride(-1) != 1  # in memory; sums are taken in another order
        self.mask_name = next((m for m in _MASKS if getattr(outputs, m, None) is not None), None)
        if self.spec.modality == "audio" and (self.is_flat or self.mask_name is None):
            return f"{self.spec.method} returns no mask of its features"
        return None

    def separate(
        self, outputs: Any, given: Tensor, inputs: Mapping[str, Tensor]
    ) -> list[Tensor] | None:
        """Take a run's features apart, ``[T, D]`` each, or None where they are not ordered."""
        # outputs: What the method returned.
        # given: What the projector was given; the features are views of it.
        # inputs: What the run was of, on the CPU.
        if self.spec.modality == "image":
            counts = self.family.count_tokens("image", inputs)
        else:
            frames = inputs[self.spec.inputs[1]]
            if not torch.equal(frames, frames.cummin(1).values):
                return None  # padded on the left
            if (
                self._form and self._form.fixed_tokens
            ):  # of which the tower makes fewer; waits for it
                valid = getattr(outputs, str(self.mask_name)) == _MASKS[str(self.mask_name)]
                counts = valid.sum(1).tolist()
            else:
                counts = self.family.count_tokens("audio", inputs)
        if self.is_flat:
            return list(given.split(counts)) if sum(counts) == len(given) else None
        if len(counts) != len(given) or max(counts) > given.shape[1]:
            return None
        return [item[:count] for item, count in zip(given, counts, strict=True)]

    def lay_out(self, features: Sequence[Tensor], length: int) -> Tensor:
        """Put features of all items together as the projector is given them."""
        # features: ``[T, D]`` each, all on one device.
        # Returns: ``[tokens, D]`` or ``[N, T, D]``, on their device.
        if self.is_flat:
            return torch.cat(list(features))
        laid = features[0].new_zeros(len(features), length, features[0].shape[1])
        for row, feature in zip(laid, features, strict=True):
            row[: len(feature)] = feature
        return laid.mT.contiguous().mT if self.is_transposed else laid

    def make_masks(self, counts: Sequence[int], laid: Tensor) -> dict[str, Tensor]:
        """Make the mask that goes with features that are laid out, where there is one."""
        if self.mask_name is None:
            return {}
        valid = torch.arange(laid.shape[1]) < torch.tensor(counts).unsqueeze(1)
        return {self.mask_name: (valid == _MASKS[self.mask_name]).to(laid.device)}


class CachedFeatures:
    """Stands in for a model's method in one forward.

    Args:
        features: ``[T, D]`` on the CPU for each item of the batch, None where it is not kept.
    """

    def __init__(
        self,
        tower: Tower,
        features: Sequence[Tensor | None],
        inputs: Mapping[str, Tensor],
        input_length: int,
        keep: Callable[[Sequence[Tensor]], None],
    ) -> None:
        self.was_asked = False
        self._tower = tower
        self._inputs = inputs
        self._input_length = input_length
        self._keep = keep
        self._is_missing = [feature is None for feature in features]
        hits = [feature for feature in features if feature is not None]
        self._counts = [len(hit) for hit in hits]
        if not hits:
            return
        # Now, with the other inputs, and not amid the forward.
        device = next(tower.projector.parameters()).device
        if any(self._is_missing):
            self._hits = torch.cat(hits).to(device)
        else:
            length = tower.lengths.get(input_length, max(self._counts))
            self._laid = tower.lay_out(hits, length).to(device)
            self._masks = tower.make_masks(self._counts, self._laid)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the method does, with the features that are kept."""
        self.was_asked = True
        if all(self._is_missing):
            return self._watch(*args, **kwargs)
        if any(self._is_missing):
            self._fill(*args, **kwargs)
        tower = self._tower
        projected = tower.projector(inputs_embeds=self._laid)
        pooled = projected.split(self._counts) if tower.is_split else projected
        return SimpleNamespace(pooler_output=pooled, **self._masks)

    def _watch(self, *args: Any, **kwargs: Any) -> Any:
        """Run everything as without a cache."""
        tower = self._tower
        outputs, seen = tower.run(*args, project=True, **kwargs)
        reason = tower.learn(outputs, seen)
        found = None if reason else tower.separate(outputs, seen[0], self._inputs)
        if found is None:
            tower.switch_off(reason or "its features are not as many or not where they should be")
            return outputs
        self._note_length(seen[0])
        self._keep([feature.detach() for feature in found])
        return outputs

    @torch.no_grad()
    def _fill(self, *args: Any, **kwargs: Any) -> None:
        """Run the tower on what is missing, and put the batch's features together in its order."""
        tower = self._tower
        outputs, seen = tower.run(*args, project=False, **kwargs)
        given = seen[0]
        found = tower.separate(outputs, given, self._inputs)
        if found is None:
            raise ConfigError(
                f"the features of the {tower.spec.modality} tower cannot be kept: on a part of "
                "a batch it gave them in another form; leave the feature cache out"
            )
        self._note_length(given)
        self._keep(found)
        hits, misses = iter(self._hits.split(self._counts)), iter(found)
        del self._hits
        features = [next(misses) if missing else next(hits) for missing in self._is_missing]
        self._counts = [len(feature) for feature in features]
        self._laid = tower.lay_out(features, given.shape[1])
        self._masks = tower.make_masks(self._counts, self._laid)

    def _note_length(self, given: Tensor) -> None:
        if not self._tower.is_flat:
            self._tower.lengths[self._input_length] = given.shape[1]
