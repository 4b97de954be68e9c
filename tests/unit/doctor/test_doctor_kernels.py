"""Each kernel's check passes on the CPU and finds a fault that is planted."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from gemma_tuner.doctor import kernels_indexing, memory
from gemma_tuner.doctor.checks import find_difference, judge
from gemma_tuner.doctor.kernels import KERNELS, answer, check_kernel, expect
from gemma_tuner.doctor.memory import check_large_table, look_up, make_rows

CPU = torch.device("cpu")
BY_NAME = {kernel.name: kernel for kernel in KERNELS}


def change(output, position=-1):
    """One number of one answer is another by a tenth of the largest."""

    def plant(kernel, inputs):
        found = {name: x.detach().clone() for name, x in kernel.compute(inputs).items()}
        values = found[output].view(-1) if found[output].is_contiguous() else None
        if values is None:
            values = found[output] = found[output].contiguous().view(-1)
        found[output] = found[output].double()
        found[output].view(-1)[position] += max(1.0, 0.1 * float(found[output].abs().max()))
        return found

    return plant


def lose_tail(kernel, inputs):
    """A product sums the first 32,768 terms, as if there were no more."""
    left = inputs["left"].clone()
    left[:, 32_768:] = 0
    return kernel.compute({**inputs, "left": left})


def read_beyond(kernel, inputs):
    """A product of more than 32,768 terms sums numbers that lie behind its operands."""
    return {
        name: x if name.endswith("K=32767") else x + 64.0 * 64.0
        for name, x in kernel.compute(inputs).items()
    }


def forget_mask(kernel, inputs):
    return kernel.compute({**inputs, "mask": torch.ones_like(inputs["mask"])})


def swap_mask(kernel, inputs):
    """The mask of the first row for all."""
    return kernel.compute({**inputs, "mask": inputs["mask"][:1].expand_as(inputs["mask"])})


def keep_last_write(kernel, inputs):
    """Rows that have the same id overwrite each other instead of adding up."""
    found = dict(kernel.compute(inputs))
    found["index_put"] = torch.zeros_like(inputs["table"]).index_put(
        (inputs["ids"],), inputs["values"]
    )
    return found


def write_as_if_contiguous(kernel, inputs):
    """In-place results land in the order of memory."""
    found = dict(kernel.compute(inputs))
    x = found["addcmul"]
    found["addcmul"] = x.T.reshape(-1)[: x.numel()].view(x.shape)
    return found


def round_ids(kernel, inputs):
    """Integers pass through float32."""
    return kernel.compute({"ids": inputs["ids"].float().long()})


def stop_at_a_quarter(kernel, inputs):
    """A reduction over the vocabulary stops early."""
    logits = inputs["logits"].clone()
    logits[:, 65_536:] = -1e9
    return {
        **kernel.compute(inputs),
        "normalizer": kernel.compute({"logits": logits})["normalizer"],
    }


def take_bytes_for_floats(kernel, inputs):
    """bfloat16 is read as if it were float16."""
    return kernel.compute({**inputs, "narrow": inputs["narrow"].view(torch.float16)})


def step_anyway(kernel, inputs):
    """The optimizer does not look at ``found_inf``."""
    parameter = torch.nn.Parameter(inputs["parameter"].clone())
    optimizer = torch.optim.AdamW([parameter], lr=0.01, weight_decay=0.1, fused=True)
    for gradient in (inputs["gradient"], torch.full_like(inputs["gradient"], torch.nan)):
        parameter.grad = gradient
        optimizer.step()
    return {"parameter": parameter.data, **optimizer.state[parameter]}


def draw_anew(kernel, inputs):
    """The second time, dropout drops others."""
    options = {"use_reentrant": False, "preserve_rng_state": False}
    with patch.object(kernels_indexing, "checkpointing_options", lambda _: options):
        return kernel.compute(inputs)


def forget_adapter(kernel, inputs):
    """What is added to a product in place is lost."""
    return kernel.compute({**inputs, "lora_b": torch.zeros_like(inputs["lora_b"])})


def clip_each(kernel, inputs):
    """Every gradient is clipped by its own norm."""
    found = dict(kernel.compute(inputs))
    return {**found, **{name: x / x.norm() for name, x in inputs.items()}}


FAULTS = {
    "embedding and index_put, backward too": [keep_last_write, change("embedding, backward")],
    "addcmul, addcdiv and lerp into transposed tensors": [write_as_if_contiguous],
    "convolutions of the towers": [change("conv2d, backward"), change("conv1d")],
    "conv2d with a weight that is not contiguous": [change("permuted")],
    "unique of integers over 2^24": [round_ids, change("inverse")],
    "bfloat16 with float32, elementwise": [take_bytes_for_floats, change("add in place")],
    "gather and scatter_add in rows of 262,144": [change("gather"), change("scatter_add")],
    "fused AdamW that skips a step": [step_anyway],
    "dropout that is computed twice": [draw_anew],
    "tanh, logsumexp and softmax over 262,144": [stop_at_a_quarter],
    "clip_grad_norm_": [clip_each],
    **{
        f"attention with a mask, head size {size}, {dtype}": [
            forget_mask,
            swap_mask,
            change("dk"),
        ]
        for size in (256, 512)
        for dtype in ("float32", "bfloat16")
    },
    **{
        f"{form}, K up to 262,144, {dtype}": [lose_tail, read_beyond]
        for form in ("matmul", "matmul, transposed", "matmul, batched", "linear, backward")
        for dtype in ("float32", "bfloat16")
    },
    **{
        f"the library's norm and adapter, {dtype}": [forget_adapter, change("dhidden")]
        for dtype in ("float32", "bfloat16")
    },
    **{
        f"the library's loss over 262,144, {dtype}": [change("loss"), change("gradient")]
        for dtype in ("float32", "bfloat16")
    },
}
# Seconds each, for the size of the vocabulary.
SLOW = {
    name
    for name in FAULTS
    if name.startswith(("matmul", "tanh", "the library's loss", "gather"))
    or name == "linear, backward, K up to 262,144, float32"
}


def mark(name):
    return pytest.param(name, marks=pytest.mark.slow if name in SLOW else (), id=name)


def test_a_fault_is_planted_for_every_kernel():
    assert len(BY_NAME) == len(KERNELS), "names are unique"
    assert set(FAULTS) == set(BY_NAME)


@pytest.mark.parametrize("name", [mark(name) for name in FAULTS])
def test_a_kernel_is_right_on_the_cpu_and_a_planted_fault_is_found(name):
    kernel = BY_NAME[name]
    inputs, expected = expect(kernel)
    right = find_difference(answer(kernel.compute, inputs, CPU), expected)
    assert judge(right, kernel.tolerance)[0] == "ok", right
    for fault in FAULTS[name]:
        found = find_difference(fault(kernel, inputs), expected)
        assert judge(found, kernel.tolerance)[0] == "wrong", fault
        # not by a hair: on another device rounding may be ten times as large
        assert right[1] <= kernel.tolerance / 2


def test_inputs_are_the_same_every_time():
    kernel = BY_NAME["clip_grad_norm_"]
    first, second = expect(kernel)[0], expect(kernel)[0]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_check_says_what_is_wrong_and_whether_training_minds():
    kernel = BY_NAME["unique of integers over 2^24"]
    check = check_kernel(kernel, CPU)
    assert (check.part, check.result, check.source) == ("kernels", "ok", "pytorch#195595")

    def find_too_few(inputs):
        return kernel.compute({"ids": inputs["ids"].float().long()})

    wrong = check_kernel(replace(kernel, compute=find_too_few, reference=kernel.compute), CPU)
    assert wrong.result == "wrong"
    assert "Training avoids it: it looks for distinct ids on the CPU" in (wrong.reason or "")


def test_a_refusal_is_a_fault_only_where_training_needs_the_kernel():
    def refuse(inputs):
        raise NotImplementedError("the operator has no kernel")

    kernel = BY_NAME["unique of integers over 2^24"]
    kernel = replace(kernel, compute=refuse, reference=kernel.compute)
    assert check_kernel(kernel, CPU).result == "skipped"
    needed = check_kernel(replace(kernel, avoided=None), CPU)
    assert needed.result == "wrong"
    assert "has no kernel" in (needed.reason or "")


class Forgetful(torch.Tensor):
    """A table that reads zeros from row 239,675 on."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        if function is torch.Tensor.index_select:
            result = result * (args[2] < 239_675).unsqueeze(1)
        return result


def test_rows_that_read_zeros_are_found():
    table = torch.zeros(262_144, 8, dtype=torch.bfloat16)
    expected = make_rows(8).float()
    found = look_up(table)
    assert find_difference(found, dict.fromkeys(found, expected)) == ("embedding", 0.0)
    found = look_up(table.as_subclass(Forgetful))
    found = {name: x.as_subclass(torch.Tensor) for name, x in found.items()}
    worst, difference = find_difference(found, dict.fromkeys(found, expected))
    assert worst == "index_select"
    assert difference > 0.1


def test_a_table_that_does_not_fit_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.setattr(memory, "find_available_bytes", lambda device: 5_000_000_000)
    check = check_large_table(CPU)
    assert check.result == "skipped"
    assert (
        check.reason
        == "the table takes 4.4 GiB and 2.0 GiB must stay free, but 4.7 GiB are available"
    )
