"""Checks at the limits of memory: its end, and a table of more than 2^31 elements.

Training halves its batches when a device says that it is full, so the error must be recognised.
Nothing is filled up for that: a tensor that no machine holds is asked for, and must be refused.

The table is E2B's, 4.4 GiB. It comes last of all checks: it needs that much memory, and where
Metal takes fewer bytes in one array it ends the process instead of raising (pytorch#131865).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gemma_tuner.device import empty_cache, is_out_of_memory
from gemma_tuner.doctor.checks import (
    Check,
    Finding,
    describe_error,
    find_difference,
    judge,
    run_check,
)
from gemma_tuner.doctor.machine import find_available_bytes, is_pretend

_TOO_MANY_BYTES = 2**46  # 70 TB

TABLE = "embedding rows past 2^31 elements"
# E2B's per-layer embeddings. Source: its config.json (35 layers of 256).
_NUM_ROWS, _WIDTH = 262_144, 35 * 256
# The first, those around 2^31 elements, Gemma 4's image and audio delimiters, the last.
# E2B's first bad row was 239,675. Source: pytorch#188756.
_ROWS = (0, 1, 239_674, 239_675, 255_999, 256_000, 258_882, 258_883, 262_143)
_MARGIN_BYTES = 2 * 2**30


def check_memory(device: torch.device) -> Check:
    """Ask for more memory than there is, and then for a little."""
    return run_check("memory", "running out is recognised", lambda: _exceed_memory(device))


def _exceed_memory(device: torch.device) -> Finding:
    if device.type == "cpu":
        return "skipped", "a system may promise more memory than it has", {}
    try:
        torch.empty(_TOO_MANY_BYTES, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        return judge_refusal(error, device)
    return "wrong", f"the device gave {_TOO_MANY_BYTES / 1e12:.0f} TB", {}


def judge_refusal(error: RuntimeError, device: torch.device) -> Finding:
    """Decide whether an error is known as that of a full device, which works on afterwards."""
    said = describe_error(error)
    if not is_out_of_memory(error):
        return "wrong", f"a full device is not recognised by: {said}", {"error": said}
    empty_cache(device)
    if float(torch.ones(1_000, device=device).sum()) != 1_000.0:
        return "wrong", "the device computes wrongly after it has refused", {"error": said}
    return "ok", None, {"error": said}


def check_large_table(device: torch.device) -> Check:
    """Write a few rows of a table of E2B's size and look them up."""
    source = "pytorch#188756 (fixed in 2.14 by pytorch#187109)"
    return run_check("large_table", TABLE, lambda: _compare_rows(device), source=source)


def _compare_rows(device: torch.device) -> Finding:
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
        found = look_up(torch.empty(_NUM_ROWS, _WIDTH, dtype=torch.bfloat16, device=device))
    finally:
        empty_cache(device)
    return judge(find_difference(found, dict.fromkeys(found, make_rows(_WIDTH).float())), 0.0)


def make_rows(width: int) -> torch.Tensor:
    """The rows that are written: ``[rows, width]`` bfloat16, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(_ROWS), width, generator=generator).bfloat16()


def look_up(table: torch.Tensor) -> dict[str, torch.Tensor]:
    """Write the rows into a table ``[262144, width]``, and read them in three ways."""
    for row, values in zip(_ROWS, make_rows(table.shape[1]), strict=True):
        table[row].copy_(values)
    ids = torch.tensor(_ROWS, device=table.device)
    found = {
        "embedding": F.embedding(ids, table),
        "index_select": table.index_select(0, ids),
        "slices": torch.stack([table[row] for row in _ROWS]),
    }
    return {name: rows.cpu() for name, rows in found.items()}
