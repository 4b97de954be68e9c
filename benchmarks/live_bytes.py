"""Count the bytes of live tensors, exactly and on any device, whatever its allocator does."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Count the bytes of storages that operators made and that are still alive.

    What an operator takes and frees within itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage.data_ptr() for storage in storages((args, kwargs))}
        for storage in storages(result):
            key = storage.data_ptr()
            if key in self._alive or key in given:
                continue
            self._alive.add(key)
            self.live_bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            weakref.finalize(storage, self._free, key, storage.nbytes())
        return result

    def _free(self, key: int, num_bytes: int) -> None:
        self._alive.discard(key)
        self.live_bytes -= num_bytes


def storages(tree: Any) -> list[torch.UntypedStorage]:
    return [x.untyped_storage() for x in tree_leaves(tree) if torch.is_tensor(x)]
