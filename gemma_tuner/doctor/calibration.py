"""Speeds of the device at Gemma's shapes, from which the time of a run can be estimated.

Each is the median of repetitions within a fraction of a second: it tells the order of a chip, not
its steady state under heat.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from gemma_tuner.device import choose_dtype, empty_cache, is_out_of_memory, synchronize
from gemma_tuner.doctor.checks import REFUSALS, describe_error
from gemma_tuner.models.few_bits.grids import Grid
from gemma_tuner.models.few_bits.unpacking import unpack, unpack_plainly
from gemma_tuner.models.lora import LoraConfig, add_lora
from gemma_tuner.models.modes import begin_training

# E2B's: queries, the MLP's two, the double-wide MLP of layers that share keys. (inner, columns)
# Source: its config.json.
_MATMULS = ((1_536, 2_048), (1_536, 6_144), (6_144, 1_536), (1_536, 12_288))
_E2B_WIDEST = (12_288, 1_536)  # of its weights, ``[out, in]``
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_E2B_LAYER = {
    "hidden_size": 1_536,
    "intermediate_size": 6_144,
    "num_hidden_layers": 1,
    "layer_types": ["full_attention"],
    "num_kv_shared_layers": 0,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "global_head_dim": 512,
    "hidden_size_per_layer_input": 256,
    "vocab_size": 256,
    "vocab_size_per_layer_input": 256,
    "max_position_embeddings": 8_192,
}
# 1e9 operations a token of a checkpointed step of E2B, text, LoRA of rank 16, by torch's flop
# counter on its released config.json: rows of 512 and of 2,048 tokens, of which all or the last
# tenth are targets.
_E2B_GFLOP_PER_TOKEN = {"all": (13.74, 15.86), "tenth": (4.64, 5.50)}
_COPIED_BYTES = 256 * 2**20
_NUM_SMALL_OPS = 500
_REPEAT_SECONDS = 0.3
_MAX_REPEATS = 50


def calibrate(device: torch.device) -> dict[str, Any]:
    """Measure a device's speeds, by names with units; ``refused`` says what it could not do."""
    rows = 64 if device.type == "cpu" else 512
    tokens = 128 if device.type == "cpu" else 1_024
    measured: dict[str, Any] = {"refused": {}}
    for name, measure in (
        ("matmuls", lambda: list(_measure_matmuls(device, rows))),
        ("copy_gb_per_second", lambda: _measure_copy(device)),
        ("small_op_seconds", lambda: _measure_small_op(device)),
        ("unpacking", lambda: _measure_unpacking(device)),
        ("layer", lambda: _measure_layer(device, tokens)),
    ):
        try:
            measured[name] = measure()
        except REFUSALS as error:
            measured[name] = None
            measured["refused"][name] = describe_error(error)
            if is_out_of_memory(error):
                empty_cache(device)
    layer = measured["layer"]
    measured["e2b_tokens_per_second"] = None if layer is None else estimate_speed(layer)
    return measured


def estimate_speed(layer: dict[str, Any]) -> dict[str, Any]:
    """Estimate E2B's tokens a second, if all of it computes as fast as one layer."""
    rate = layer["flop"] / layer["seconds"]
    estimate: dict[str, Any] = {
        f"{share}_targets_{side}": round(rate / (gflop * 1e9), 1)
        for share, (least, most) in _E2B_GFLOP_PER_TOKEN.items()
        for side, gflop in (("low", most), ("high", least))
    }
    estimate["basis"] = (
        "operations a second of one layer over those of a checkpointed step, rows of 512 to 2,048 "
        "tokens; an estimate from one layer, not a measured run"
    )
    return estimate


def _measure_matmuls(device: torch.device, rows: int) -> Iterator[dict[str, Any]]:
    for dtype in _DTYPES:
        for inner, columns in _MATMULS:
            a = torch.randn(rows, inner, device=device).to(dtype)
            b = torch.randn(inner, columns, device=device).to(dtype)
            seconds = _time(lambda a=a, b=b: a @ b, device)
            yield {
                "rows": rows,
                "inner": inner,
                "columns": columns,
                "dtype": str(dtype).removeprefix("torch."),
                "seconds": seconds,
                "tflop_per_second": round(2e-12 * rows * inner * columns / seconds, 4),
            }


def _measure_copy(device: torch.device) -> float:
    """1e9 bytes a second, those read and those written together."""
    source = torch.zeros(_COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return round(2e-9 * _COPIED_BYTES / _time(lambda: target.copy_(source), device), 2)


def _measure_small_op(device: torch.device) -> float:
    """Seconds for each of many additions to one tensor of 64 numbers, enqueued and done."""
    x = torch.zeros(64, device=device)

    def add_often() -> None:
        for _ in range(_NUM_SMALL_OPS):
            x.add_(1.0)

    return _time(add_often, device) / _NUM_SMALL_OPS


def _measure_unpacking(device: torch.device) -> dict[str, Any]:
    """E2B's widest matrix out of four bits, as training does it and by torch's operators."""
    dtype, _ = choose_dtype(device)
    rows, columns = _E2B_WIDEST
    grid = Grid(4, 32)
    packed = grid.empty(rows, columns, dtype=dtype, device=device)
    packed.numbers.random_()
    packed.scales.fill_(0.02)
    return {
        "rows": rows,
        "columns": columns,
        "grid": str(grid),
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": _time(lambda: unpack(packed, grid.bits), device),
        "plain_seconds": _time(lambda: unpack_plainly(packed, grid.bits), device),
    }


def _measure_layer(device: torch.device, tokens: int) -> dict[str, Any]:
    """Forward and backward of one decoder layer of E2B's size with LoRA, without checkpointing."""
    dtype, _ = choose_dtype(device)
    config = transformers.Gemma4Config(
        text_config=dict(_E2B_LAYER), vision_config=None, audio_config=None
    )
    with torch.device("meta"):
        model: Any = transformers.Gemma4ForConditionalGeneration(config)
    model = model.to(dtype).to_empty(device=device).requires_grad_(requires_grad=False)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.normal_(std=0.02)  # constants would be computed faster
    model = add_lora(model.eval(), LoraConfig(rank=16))
    begin_training(model, checkpointed_layers=0)
    decoder = model.get_base_model().model
    ids = torch.arange(tokens, device=device).remainder(256).unsqueeze(0)

    def step() -> None:
        decoder(input_ids=ids, use_cache=False).last_hidden_state.float().sum().backward()
        model.zero_grad(set_to_none=True)

    with FlopCounterMode(display=False) as counter:
        step()
    seconds = _time(step, device)
    return {
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": seconds,
        "flop": counter.get_total_flops(),
        "tflop_per_second": round(1e-12 * counter.get_total_flops() / seconds, 4),
    }


def _time(run: Callable[[], object], device: torch.device) -> float:
    """The median seconds of a call, its work on the device included."""

    def time_once() -> float:
        started = time.perf_counter()
        run()
        synchronize(device)
        return time.perf_counter() - started

    synchronize(device)
    first = time_once()  # compiles, and fills caches
    repeats = max(1, min(_MAX_REPEATS, int(_REPEAT_SECONDS / first)))
    return statistics.median(time_once() for _ in range(repeats))
