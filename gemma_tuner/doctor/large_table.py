"""Rows of an embedding table that lie beyond 2^31 elements: E2B's table, 4.4 GiB.

Apart from the other kernels, and last of all: it needs that much memory, and where Metal takes
fewer bytes in one array it ends the process instead of raising (pytorch#131865).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gemma_tuner.device import empty_cache
from gemma_tuner.doctor.checks import Check, Finding, find_difference, judge, run_check
from gemma_tuner.doctor.machine import find_available_bytes, is_pretend

NAME = "embedding rows past 2^31 elements"
# E2B's per-layer embeddings. Source: its config.json (35 layers of 256).
_NUM_ROWS, _WIDTH = 262_144, 35 * 256
# The first, those around 2^31 elements, Gemma 4's image and audio delimiters, the last.
_ROWS = (0, 1, 239_674, 239_675, 255_999, 256_000, 258_882, 258_883, 262_143)
"""E2B's first bad row was 239,675. Source: pytorch#188756."""
_MARGIN_BYTES = 2 * 2**30


def check_large_table(device: torch.device) -> Check:
    """Write a few rows of a table of E2B's size and look them up."""
    return run_check(
        "large_table",
        NAME,
        lambda: _measure(device),
        source="pytorch#188756 (fixed in 2.14 by pytorch#187109)",
    )


def _measure(device: torch.device) -> Finding:
    if is_pretend(device):
        return "skipped", "a pretend device looks rows up on the CPU", {}
    needed = _NUM_ROWS * _WIDTH * 2
    available = find_available_bytes(device)
    if available < needed + _MARGIN_BYTES:
        reason = (
            f"the table takes {needed / 2**30:.1f} GiB and 2.0 GiB must stay free, but "
            f"{available / 2**30:.1f} GiB are available"
        )
        return "skipped", reason, {"available_bytes": available}
    try:
        table = torch.empty(_NUM_ROWS, _WIDTH, dtype=torch.bfloat16, device=device)
        found = look_up(table)
    finally:
        empty_cache(device)
    rows = make_rows(_WIDTH).float()
    expected = dict.fromkeys(found, rows)
    return judge(find_difference(found, expected), 0.0)


def make_rows(width: int) -> torch.Tensor:
    """The rows that are written: ``[rows, width]`` bfloat16, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(_ROWS), width, generator=generator).bfloat16()


def look_up(table: torch.Tensor) -> dict[str, torch.Tensor]:
    """Write the rows one by one, then read them in three ways."""
    # table: ``[262144, width]`` bfloat16, of any content.
    # Returns: What each way read, ``[rows, width]`` on the CPU.
    for row, values in zip(_ROWS, make_rows(table.shape[1]), strict=True):
        table[row].copy_(values)
    ids = torch.tensor(_ROWS, device=table.device)
    found = {
        "embedding": F.embedding(ids, table),
        "index_select": table.index_select(0, ids),
        "slices": torch.stack([table[row] for row in _ROWS]),
    }
    return {name: rows.cpu() for name, rows in found.items()}
