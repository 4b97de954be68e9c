"""A few small tensors tell one release of a model from another of the same shapes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from gemma_tuner.export.weights import StoredTensor

# In every family, loaded with towers or without, and trained by no adapter.
_NORMS = re.compile(r"(model\.)?language_model\.(model\.)?(layers\.\d+\.\w*layernorm\.weight)")


def hash_model_norms(model: nn.Module) -> str:
    """Fingerprint the decoder of a loaded model.

    Args:
        model: Not wrapped by PEFT.

    Returns:
        SHA-256, the same for a checkpoint in bfloat16 and in float32.
    """
    return _hash((name, p.detach().cpu()) for name, p in model.named_parameters())


def hash_stored_norms(tensors: Mapping[str, StoredTensor]) -> str:
    """Fingerprint the decoder of a checkpoint; equals that of its loaded model.

    Args:
        tensors: The checkpoint's.

    Returns:
        SHA-256.
    """
    return _hash(
        (name, stored.read()) for name, stored in tensors.items() if _NORMS.fullmatch(name)
    )


def _hash(named: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    norms = {match[3]: t for name, t in named if (match := _NORMS.fullmatch(name))}
    for name, tensor in sorted(norms.items()):
        digest.update(name.encode())
        digest.update(tensor.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
