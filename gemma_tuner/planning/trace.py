"""Predict the peak memory of one training step from a configuration, without weights.

The step itself runs, on fake tensors: the same model code, attention, checkpointing, loss and
backward pass as in training, so the prediction follows whatever these do. Every storage is counted
from when an operator makes it until nothing refers to it.

Operators whose result's size depends on values (masks that pick media tokens, sizes that Python
reads) need those values: what follows from the batch's integers and masks alone is computed for
real beside the fakes, which costs little, as the large tensors follow from weights.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from gemma_tuner.batch import Batch
from gemma_tuner.device import is_available
from gemma_tuner.modalities import MEDIA
from gemma_tuner.models.attention import set_query_chunk
from gemma_tuner.models.families import family_of
from gemma_tuner.models.lora import unwrap_peft
from gemma_tuner.models.loss import Loss, target_loss_sum
from gemma_tuner.models.meta import make_fake
from gemma_tuner.models.modes import begin_training

_ROUND_BYTES = 512  # CUDA's allocator rounds to it, Metal's heaps to 256
_PARTS = {  # of a model, by the beginning of its parameters' names
    "per-layer embeddings": "{decoder}.embed_tokens_per_layer",
    "embeddings": "{decoder}.embed_tokens",
    "vision tower": "model.vision_tower",
    "audio tower": "model.audio_tower",
    "projectors": "model.embed_",
    "decoder": "{decoder}",
}
_aten = torch.ops.aten
_READ_BY_PYTHON = _aten._local_scalar_dense.default  # noqa: SLF001


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a training step holds at its peak.

    Args:
        resident: Bytes held between steps, by part: weights, adapters and moments.
        step: Bytes on top of that at the peak, by what made them.
    """

    resident: Mapping[str, int]
    step: Mapping[str, int]

    @property
    def resident_bytes(self) -> int:
        """Bytes held between steps."""
        return sum(self.resident.values())

    @property
    def step_bytes(self) -> int:
        """Bytes on top of that at the peak."""
        return sum(self.step.values())

    @property
    def peak_bytes(self) -> int:
        """Bytes held at the peak."""
        return self.resident_bytes + self.step_bytes


class StepTracer:
    """One micro-batch's forward and backward pass, on a model without weights."""

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        *,
        accumulates: bool,
        state_bytes: float = 2.0,
        loss: Loss = target_loss_sum,
    ) -> None:
        self._model = model
        self._state_bytes = state_bytes
        self._loss = loss
        self._is_mps = device.type == "mps"
        self._accumulates = accumulates
        self._mode = FakeTensorMode()
        # A machine without the device plans for it with the CPU's operators.
        is_here = device.type == "cuda" and is_available(device)
        self._device = device if is_here else torch.device("cpu")
        # Where gradients are needed, Metal has attention only in its plain form.
        plain = partial(sdpa_kernel, SDPBackend.MATH)
        is_plain = not is_here and device.type != "cpu"
        self._attention: Callable[[], Any] = plain if is_plain else nullcontext
        make_fake(model, self._mode, self._device)
        self.resident = self._count_resident()
        self._known: dict[object, Footprint] = {}

    def measure(
        self,
        batch: Batch,
        *,
        checkpointed_layers: int,
        loss_chunk_tokens: int,
        query_chunk_tokens: int | None,
    ) -> Footprint:
        """Run a micro-batch, unless the same one was run before, and return what it held."""
        model = self._model
        trained = tuple(parameter.requires_grad for parameter in model.parameters())
        settings = (checkpointed_layers, loss_chunk_tokens, query_chunk_tokens, trained)
        if found := self._known.get(key := (settings, _describe(batch))):
            return found
        batch = batch.with_bucketed_targets() if self._is_mps else batch
        begin_training(model, checkpointed_layers=checkpointed_layers)
        set_query_chunk(unwrap_peft(model), query_chunk_tokens)
        trace = _Trace("gradients")
        with self._mode, self._attention(), trace.following(model):
            for buffer in model.buffers():
                trace.ignore(buffer)
            for parameter in model.parameters():
                trace.ignore(parameter)
                parameter.grad = None
                if parameter.requires_grad and self._accumulates:
                    parameter.grad = torch.empty_like(parameter)
            fake = self._fake(batch, trace)
            loss_sum = self._loss(model, fake, chunk_tokens=loss_chunk_tokens)
            trace.region = "backward pass"
            (loss_sum / batch.num_target_tokens).backward()
            model.zero_grad(set_to_none=True)
        self._known[key] = Footprint(self.resident, trace.peak)
        return self._known[key]

    def measure_least(self, batch: Batch, *, frozen_layers: int = 0) -> int:
        """The peak bytes of a micro-batch when nothing is spared in time."""
        layers = unwrap_peft(self._model).get_decoder().layers
        frozen = [p for p in layers[:frozen_layers].parameters() if p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad = False
        found = self.measure(
            batch, checkpointed_layers=len(layers), loss_chunk_tokens=64, query_chunk_tokens=256
        )
        for parameter in frozen:
            parameter.requires_grad = True
        # an adapter that is not there has no moments either
        left_out = sum(_rounded(p.nbytes) for p in frozen)
        return found.peak_bytes - left_out - int(self._state_bytes * left_out)

    @property
    def resident_bytes(self) -> int:
        """Bytes that stay between steps."""
        return sum(self.resident.values())

    def _fake(self, batch: Batch, trace: _Trace) -> Batch:
        """Put a batch on the device, as fakes that know their integers."""
        trace.region = "inputs"
        fake = partial(trace.fake, mode=self._mode, device=self._device)
        found = replace(
            batch,
            inputs={name: fake(tensor) for name, tensor in batch.inputs.items()},
            labels=fake(batch.labels),
            target_rows=fake(batch.target_rows),
            target_slots=fake(batch.target_slots),
            target_ids=fake(batch.target_ids),
        )
        trace.region = "rest of the forward pass"
        return found

    def _count_resident(self) -> dict[str, int]:
        parts: Counter[str] = Counter()
        gemma = unwrap_peft(self._model)
        decoder = family_of(gemma.config).decoder
        starts = {part: start.format(decoder=decoder) for part, start in _PARTS.items()}
        tensors = {id(t): (n, t) for n, t in gemma.named_parameters()}
        tensors |= {id(t): (n, t) for n, t in gemma.named_buffers()}
        for name, tensor in tensors.values():
            num_bytes = _rounded(tensor.nbytes)
            if tensor.requires_grad:
                parts["adapters"] += num_bytes
                parts["moments"] += int(self._state_bytes * num_bytes)
                continue
            part = next((part for part, start in starts.items() if name.startswith(start)), "rest")
            parts[part] += num_bytes
        return dict(parts)


def _describe(batch: Batch) -> tuple[object, ...]:
    """What of a batch decides its trace: shapes, and the values of integers and masks."""
    # The targets' places follow from the labels.
    given = {**batch.inputs, "labels": batch.labels}.items()
    return tuple((n, x.shape, x.is_floating_point() or x.numpy().tobytes()) for n, x in given)


class _Trace(TorchDispatchMode):
    """Counts storages while they live, by the region of the step that made them.

    Attributes:
        region: What storages made from now on are counted under.
        peak: Bytes by region when they were most.
    """

    def __init__(self, region: str) -> None:
        super().__init__()
        self.region = region
        self.peak: dict[str, int] = {}
        self._peak_bytes = 0
        self._live: Counter[str] = Counter()
        self._live_bytes = 0
        self._seen: dict[int, tuple[str, int]] = {}
        self._hooks: list[Any] = []

    # --- regions -----------------------------------------------------------------------------

    def following(self, model: nn.Module) -> _Trace:
        """Name regions after the modules that run, until the context is left."""
        gemma = unwrap_peft(model)
        inner = gemma.model
        for name in (name for medium in MEDIA for name in (medium.tower, medium.projector)):
            if (tower := getattr(inner, name, None)) is not None:
                self._follow(tower, "media tower")
        for layer in gemma.get_decoder().layers:
            self._follow(layer, "decoder layers")
            self._follow(layer.self_attn, "attention")
        after = inner.register_forward_hook(lambda *_: setattr(self, "region", "loss"))
        self._hooks.append(after)
        return self

    def _follow(self, module: nn.Module, region: str) -> None:
        outside: list[str] = []

        def enter(*_: object) -> None:
            outside.append(self.region)
            self.region = region

        def leave(*_: object) -> None:
            self.region = outside.pop() if outside else self.region

        self._hooks.append(module.register_forward_pre_hook(enter))
        # always: what is recomputed for the backward pass stops halfway by an exception
        self._hooks.append(module.register_forward_hook(leave, always_call=True))

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

    # --- bytes -------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator, and count what it makes."""
        if func.namespace == "prim":  # asks for a device or a size
            return func(*args, **(kwargs or {}))
        out = _run_with_known_values(func, args, kwargs or {})
        for made in _tensors(out):
            self._count(made)
        return out

    def fake(self, tensor: Tensor, *, mode: FakeTensorMode, device: torch.device) -> Tensor:
        """Make a counted fake of a real tensor; integers and booleans stay known."""
        with mode:
            made = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if not tensor.is_floating_point():
            _know(made, tensor)
        self._count(made)
        return made

    def ignore(self, tensor: Tensor) -> None:
        """Do not count a tensor that lies there in any case."""
        self._seen[_key(tensor.untyped_storage())] = ("", 0)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = _key(storage)
        if key in self._seen:
            return
        num_bytes = _rounded(storage.nbytes())
        self._seen[key] = (self.region, num_bytes)
        self._live[self.region] += num_bytes
        self._live_bytes += num_bytes
        weakref.finalize(storage, self._release, key)
        if self._live_bytes > self._peak_bytes:
            self._peak_bytes = self._live_bytes
            self.peak = {region: held for region, held in self._live.items() if held}

    def _release(self, key: int) -> None:
        region, num_bytes = self._seen.pop(key)
        self._live[region] -= num_bytes
        self._live_bytes -= num_bytes


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors among an operator's arguments or results, which may be lists."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def _key(storage: torch.UntypedStorage) -> int:
    return storage._cdata  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]


def _rounded(num_bytes: int) -> int:
    return -(-num_bytes // _ROUND_BYTES) * _ROUND_BYTES


# --- known values ----------------------------------------------------------------------------

_KNOWN = "_gemma_tuner_known"


def _know(fake: Tensor, value: Tensor) -> None:
    setattr(fake, _KNOWN, value)


def _run_with_known_values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator on fakes, and on their known values where it has nothing else."""
    tensors = [*_tensors(args), *_tensors(tuple(kwargs.values()))]
    if func is _READ_BY_PYTHON and hasattr(tensors[0], _KNOWN):
        with unset_fake_temporarily():
            return getattr(tensors[0], _KNOWN).item()
    if func is _aten.nonzero.default and hasattr(tensors[0], _KNOWN):
        with unset_fake_temporarily():
            positions = getattr(tensors[0], _KNOWN).nonzero()
        return _like_known(positions, tensors[0])
    if func in {_aten.index.Tensor, _aten.index_put_.default}:
        args = (args[0], _without_masks(args[1]), *args[2:])
    if func is _aten._grouped_mm.default and args[0].dtype == torch.float32:  # noqa: SLF001
        # The experts' product: its kernels take float32, torch's rule for its shape does not.
        halves = [operand.to(torch.bfloat16) for operand in args[:2]]
        return func(*halves, *args[2:], **kwargs).to(torch.float32)
    out = func(*args, **kwargs)
    made = [*_tensors(out)]
    if not all(hasattr(tensor, _KNOWN) for tensor in tensors):
        if func._schema.is_mutable and hasattr(args[0], _KNOWN):  # noqa: SLF001
            delattr(args[0], _KNOWN)
    elif made and (tensors or not any(tensor.is_floating_point() for tensor in made)):
        _follow_values(func, args, kwargs, made)
    return out


def _follow_values(func: Any, args: Any, kwargs: dict[str, Any], made: list[Tensor]) -> None:
    """Compute for real what follows from known values alone."""
    known_args, known_kwargs = tree_map_only(
        Tensor, lambda tensor: getattr(tensor, _KNOWN), (args, kwargs)
    )
    if known_kwargs.get("device") is not None:
        known_kwargs["device"] = torch.device("cpu")
    with unset_fake_temporarily():
        values = _tensors(func(*known_args, **known_kwargs))
    for fake, value in zip(made, values, strict=True):
        _know(fake, value)


def _without_masks(indices: Any) -> list[Any]:
    """Replace masks of known values in an index by the positions that they pick."""
    positions: list[Any] = []
    for index in indices:
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            positions.append(index)
        else:
            value = getattr(index, _KNOWN, None)
            if value is None:  # of floats: torch says that it cannot know
                return list(indices)
            with unset_fake_temporarily():
                values = value.nonzero(as_tuple=True)
            positions += [_like_known(x, index) for x in values]
    return positions


def _like_known(value: Tensor, fake: Tensor) -> Tensor:
    made = torch.empty(value.shape, dtype=value.dtype, device=fake.device)
    _know(made, value)
    return made
