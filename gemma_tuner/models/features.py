"""Features that frozen towers make of images and clips, kept for later epochs.

A tower without adapters gives the same features for the same image at every step. They are kept
where its projector reads them, as the projector may be trained: ``[features, width]`` of each
image or clip, on the CPU, in the dtype in which the tower gave them, found again by a hash of
the tensors that the tower read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma_tuner.modalities import MEDIA, Modality
from gemma_tuner.models.lora import unwrap_peft
from gemma_tuner.models.towers import CachedFeatures, Tower

if TYPE_CHECKING:
    from torch.nn import Module


class FeatureCache:
    """Features of images and clips, for one model whose towers do not change.

    When there is no room for another, it is not kept, and none is given up for it: in an order
    that is shuffled again each epoch, a cache that drops what was used longest ago forgets most
    things just before their turn, while one that keeps what came first finds as large a share as
    fits of the data.

    A feature used again is, bit for bit, what the tower gave the first time. Within float rounding
    that depends on how many items it was given at one time, as without a cache.

    Args:
        max_bytes: What all features together may take, 0 for none. Half a kilobyte each for
            finding them comes on top.

    Attributes:
        num_bytes: What the kept features take.
        counts: ``hits``, ``misses`` and, of the latter, ``refused`` for want of room; each counts
            every time that a image or clip was asked for.
    """

    def __init__(self, model: Module, max_bytes: int) -> None:
        gemma = unwrap_peft(model)
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.counts: Counter[str] = Counter()
        self._kept: dict[bytes, Tensor] = {}
        self._towers = tuple(Tower(gemma, spec) for spec in MEDIA)
        if max_bytes > 0:
            for tower in self._towers:
                tower.announce_reason()

    @property
    def reasons(self) -> dict[Modality, str]:
        """Why features are not kept, for each modality of which none are."""
        if self.max_bytes <= 0:
            return {tower.spec.modality: "its budget is 0 bytes" for tower in self._towers}
        return {t.spec.modality: t.reason for t in self._towers if t.reason is not None}

    @contextmanager
    def serve(
        self, inputs: Mapping[str, Tensor], hashes: Mapping[str, Sequence[bytes]]
    ) -> Iterator[Mapping[str, Tensor]]:
        """Let one forward within the context use kept features, and keep new ones."""
        # inputs: Keyword arguments of the model, on the CPU.
        # hashes: For ``image`` and ``audio``, one hash for each item of the media tensors.
        # Yields: The arguments for that forward, to be moved to the model's device: media tensors
        # hold only the items whose features are not kept, and none where all are.
        with ExitStack() as stack:
            for tower in self._towers:
                wanted = hashes.get(tower.spec.modality, ())
                if wanted and self.max_bytes > 0 and tower.can_be_replaced():
                    inputs = stack.enter_context(self._serve_tower(tower, inputs, wanted))
            yield inputs

    @contextmanager
    def _serve_tower(
        self, tower: Tower, inputs: Mapping[str, Tensor], hashes: Sequence[bytes]
    ) -> Iterator[Mapping[str, Tensor]]:
        """Replace the method of one tower, and cut its inputs to what is missing."""
        features = [self._kept.get(name) for name in hashes]
        missing = [item for item, feature in enumerate(features) if feature is None]
        self.counts.update(hits=len(features) - len(missing), misses=len(missing))
        names = [name for name in tower.spec.inputs if name in inputs]
        input_length = inputs[names[0]].shape[1]
        if len(missing) < len(features):
            inputs = {**inputs, **{name: inputs[name][missing] for name in names}}

        def keep(found: Sequence[Tensor]) -> None:
            self._keep([hashes[item] for item in missing], found)

        with tower.replaced_by(CachedFeatures(tower, features, inputs, input_length, keep)):
            yield inputs

    def _keep(self, hashes: Sequence[bytes], features: Sequence[Tensor]) -> None:
        """Keep what there is room for, in one transfer from the device."""
        chosen: dict[bytes, Tensor] = {}
        for name, feature in zip(hashes, features, strict=True):
            if name in self._kept or name in chosen:  # a batch may hold an image twice
                continue
            if self.num_bytes + feature.nbytes > self.max_bytes:
                self.counts["refused"] += 1
                continue
            chosen[name] = feature
            self.num_bytes += feature.nbytes
        if chosen:
            # One storage, and every byte of it is kept.
            joined = torch.cat(list(chosen.values())).cpu()
            lengths = [len(feature) for feature in chosen.values()]
            self._kept.update(zip(chosen, joined.split(lengths), strict=True))

    def report(self) -> str:
        """Say in one line what is kept, how often it served, and what is off."""
        used, room = (count / 1e6 for count in (self.num_bytes, self.max_bytes))
        parts = [
            f"features of {len(self._kept)} images and clips kept, {used:.1f} of {room:.1f} MB",
            f"{self.counts['hits']} found",
            f"{self.counts['misses']} computed",
        ]
        if self.counts["refused"]:
            parts.append(f"{self.counts['refused']} of them not kept for want of room")
        parts += [
            f"{tower.spec.modality} off: {self.reasons[tower.spec.modality]}"
            for tower in self._towers
            if tower.exists and tower.spec.modality in self.reasons
        ]
        return "; ".join(parts)
