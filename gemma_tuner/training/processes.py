"""Sums over the processes of a run, through accelerate; a single process pays nothing for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Parameter


class Processes:
    """The processes that ``accelerate launch`` started, or this one alone.

    Adapters are small and losses are sums, so gradients are added up once a step, in one
    transfer, instead of wrapping the model: the result is that of one process with all the data.

    Attributes:
        device: This process's device.
        index: This process's number.
        count: How many there are.
        is_main: Whether this is the one that writes.
    """

    def __init__(self, device: torch.device) -> None:
        self._accelerator = Accelerator(cpu=device.type == "cpu")
        self.device = device
        self.index = self._accelerator.process_index
        self.count = self._accelerator.num_processes
        self.is_main = self._accelerator.is_main_process

    def sum_counts(self, counts: Sequence[int]) -> list[int]:
        """Add up counts, each by itself, in one transfer."""
        if self.count == 1:
            return list(counts)
        return self.sum_tensor(torch.tensor(counts, device=self.device)).tolist()

    def sum_count(self, count: int) -> int:
        """Add up a count."""
        return self.sum_counts([count])[0]

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        """Add up a tensor."""
        if self.count == 1:
            return tensor
        return cast(Tensor, self._accelerator.reduce(tensor, reduction="sum"))

    def sum_gradients(self, parameters: Sequence[Parameter], loss: Tensor) -> None:
        """Add up gradients and loss, in place."""
        # loss: ``[]`` float32.
        if self.count == 1:
            return
        # A process without examples in this step has no gradient.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), loss.reshape(1)])
        *summed, loss_sum = self.sum_tensor(flat).split([*(g.numel() for g in gradients), 1])
        for parameter, total in zip(parameters, summed, strict=True):
            parameter.grad = total.view_as(parameter)
        loss.copy_(loss_sum[0])

    def wait(self) -> None:
        """Wait until every process is here."""
        self._accelerator.wait_for_everyone()
