"""Banded and chunked attention against transformers' own, and what it makes on the way."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from gemma_tuner.batch import Row, pad_rows
from gemma_tuner.checkpoints.loading import load_model
from gemma_tuner.errors import ConfigError
from gemma_tuner.models.attention import (
    ATTENTION,
    attend,
    choose_blocks,
    set_query_chunk,
    use_attention,
)
from gemma_tuner.models.families import family_of
from gemma_tuner.models.lora import LoraConfig, add_lora
from gemma_tuner.models.loss import target_loss_sum
from gemma_tuner.models.masks import AttentionMask, make_mask
from gemma_tuner.models.modes import begin_training
from gemma_tuner.testing import FAMILIES, save_tiny_model, tiny_model
from tests.stock import stock_parts

WINDOW = 32  # of the tiny models


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return tiny_model(request.param)[0]


@pytest.fixture(scope="module")
def small():
    return tiny_model("gemma4-e2b")[0]


def make_layer(*, chunk=None, window=None, groups=2):
    config = SimpleNamespace(use_bidirectional_attention=None)
    return SimpleNamespace(
        config=config,
        is_causal=True,
        num_key_value_groups=groups,
        query_chunk_tokens=chunk,
        sliding_window=window,
    )


def make_masks(length, window, padding):
    function = (
        causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    )
    settings = {
        "batch_size": len(padding),
        "q_length": length,
        "kv_length": length,
        "mask_function": function,
        "attention_mask": padding,
        "device": "cpu",
    }
    return make_mask(**settings), sdpa_mask(**settings, allow_is_causal_skip=False)


@st.composite
def shapes(draw):
    length, window = draw(st.integers(1, 70)), draw(st.integers(1, 24))
    padding = torch.ones(2, length, dtype=torch.bool)
    padding[0, : draw(st.integers(0, length - 1))] = False
    padding[1, draw(st.integers(1, length)) :] = False
    return length, window, padding


@settings(deadline=None, max_examples=30)
@given(shapes(), st.data())
def test_the_band_is_the_dense_mask_and_holds_all_of_it(shape, data):
    length, window, padding = shape
    mask, expected = make_masks(length, window, padding)
    # what would see nothing sees itself
    expected = expected | torch.eye(length, dtype=torch.bool) & ~expected.any(-1, keepdim=True)
    assert torch.equal(mask.dense(), expected)

    block, width = choose_blocks(window)
    num_blocks = -(-length // block)
    first = data.draw(st.integers(0, num_blocks - 1))
    count = data.draw(st.integers(1, num_blocks - first))
    band = mask.band(first, count, block, width).view(2, count, block, width)
    found = torch.zeros(2, length, length, dtype=torch.bool)
    for number in range(count):
        start = (first + number) * block
        for offset in range(min(block, length - start)):
            keys = torch.arange(start + block - width, start + block)
            inside = (keys >= 0) & (keys < length)
            found[:, start + offset, keys[inside]] = band[:, number, offset, inside]
    queries = slice(first * block, min((first + count) * block, length))
    assert torch.equal(found[:, queries], expected[:, 0, queries])


@settings(deadline=None, max_examples=20)
@given(shapes(), st.sampled_from([None, 1, 7, 16, 200]), st.booleans())
def test_any_shape_gives_what_sdpa_gives(shape, chunk, is_sliding):
    length, window, padding = shape
    assert_like_sdpa(length, window if is_sliding else None, padding, chunk)


@pytest.mark.parametrize("window", [None, 400, 2000])
@pytest.mark.parametrize("length", [513, 1100])
def test_long_rows_in_parts_give_what_sdpa_gives(length, window):
    padding = torch.ones(2, length, dtype=torch.bool)
    padding[0, :77] = False
    padding[1, -77:] = False
    assert_like_sdpa(length, window, padding, None)


def assert_like_sdpa(length, window, padding, chunk):
    mask, dense = make_masks(length, window, padding)
    generator = torch.Generator().manual_seed(length)
    tensors = [
        torch.randn(2, heads, length, 8, generator=generator, dtype=torch.float64)
        for heads in (4, 2, 2)
    ]
    weights = torch.randn(2, length, 4, 8, generator=generator, dtype=torch.float64)
    weights *= padding[:, :, None, None]  # nobody reads what padding becomes
    results = []
    for function in (
        lambda layer, *qkv: attend(layer, *qkv, mask, sliding_window=window, scaling=0.5),
        lambda layer, *qkv: sdpa_attention_forward(layer, *qkv, dense, scaling=0.5),
    ):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        output = function(make_layer(chunk=chunk), *leaves)[0]
        (output * weights).sum().backward()
        results.append([(output * (weights != 0)).detach(), *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-11)


def make_inputs(model, length, seed=0):
    """Two rows, one padded on the left and one on the right, where they are long enough."""
    ids = torch.randint(10, 200, (2, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, : length // 4] = 0
    mask[1, length - length // 5 :] = 0
    name = family_of(model.config).token_type_name
    return {"input_ids": ids, "attention_mask": mask, name: torch.zeros_like(ids)}


@torch.no_grad()
def hidden_states(model, inputs, **kwargs):
    hidden = model.model(**inputs, use_cache=False, **kwargs).last_hidden_state
    return hidden[inputs["attention_mask"].bool()]


@pytest.mark.parametrize("length", [20, WINDOW, 75, WINDOW * 7 // 2])
def test_hidden_states_equal_those_of_transformers(model, length):
    inputs = make_inputs(model, length)
    with stock_parts(model):
        expected = hidden_states(model, inputs)
    for chunk, has_images in ((None, False), (None, True), (24, False)):
        set_query_chunk(model, chunk)
        found = hidden_states(model, inputs, has_images=has_images)
        set_query_chunk(model, None)
        assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_positions_of_a_picture_see_each_other(model):
    if model.config.get_text_config().to_dict().get("use_bidirectional_attention") is None:
        pytest.skip("pictures are causal in this family")
    inputs = make_inputs(model, 112)
    inputs["mm_token_type_ids"][:, 40:80] = 1  # longer than the window
    with stock_parts(model):
        expected = hidden_states(model, inputs)
    assert (hidden_states(model, inputs) - expected).norm() <= 1e-5 * expected.norm()
    set_query_chunk(model, 24)
    assert (hidden_states(model, inputs) - expected).norm() <= 1e-5 * expected.norm()
    set_query_chunk(model, None)
    wrong = hidden_states(model, inputs, has_images=False)
    assert (wrong - expected).norm() > 1e-3 * expected.norm()


def test_generation_gives_the_same_tokens(model):
    inputs = make_inputs(model, 45)
    inputs["attention_mask"][1] = 1
    settings = {
        "max_new_tokens": 4,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    found = model.generate(**inputs, **settings)
    with stock_parts(model):
        expected = model.generate(**inputs, **settings)
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.scores, expected.scores, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_no_query_meets_keys_that_a_whole_part_comes_before():
    length = 2048
    queries = torch.zeros(1, 2, length, 8, device="meta")
    keys = queries[:, :1]
    ids = torch.ones(1, length, dtype=torch.bool, device="meta")
    mask = make_mask(
        1,
        length,
        length,
        mask_function=causal_mask_function,
        attention_mask=ids,
        device="meta",
    )
    with FlopCounterMode(display=False) as counter:
        attend(make_layer(chunk=None), queries, keys, keys, mask, scaling=1.0)
    whole = 4 * 2 * length * length * 8
    assert counter.get_total_flops() == whole * 5 / 8  # (1 + 2 + 3 + 4) / 16


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor that an operator made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        for output in outputs if isinstance(outputs, tuple | list) else (outputs,):
            if isinstance(output, torch.Tensor):
                self.elements = max(self.elements, output.numel())
        return outputs


@pytest.mark.parametrize(
    ("window", "chunk", "limit"),
    [(16, None, 2 * 640 * 24), (16, 64, 2 * 640 * 8), (None, 40, 2 * 640 * 40)],
)
def test_no_tensor_is_as_large_as_the_sequence_squared(window, chunk, limit):
    length = 640
    mask, _ = make_masks(length, window, torch.ones(1, length, dtype=torch.bool))
    query = torch.randn(1, 2, length, 4, requires_grad=True)
    key, value = (torch.randn(1, 1, length, 4, requires_grad=True) for _ in range(2))
    with LargestTensor() as largest, sdpa_kernel(SDPBackend.MATH):  # whose scores can be seen
        layer = make_layer(chunk=chunk)
        output, _ = attend(layer, query, key, value, mask, sliding_window=window)
        output.sum().backward()
    assert largest.elements <= limit < length * length


@pytest.mark.parametrize(("window", "chunk"), [(16, None), (16, 32), (None, 32)])
def test_nothing_depends_on_a_value(window, chunk):
    """As the plan traces it: only shapes are known."""
    with FakeTensorMode():
        mask, _ = make_masks(80, window, torch.ones(1, 80, dtype=torch.bool))
        query = torch.empty(1, 2, 80, 4, requires_grad=True)
        key, value = (torch.empty(1, 1, 80, 4, requires_grad=True) for _ in range(2))
        layer = make_layer(chunk=chunk)
        output, _ = attend(layer, query, key, value, mask, sliding_window=window)
        output.sum().backward()
        assert query.grad.shape == query.shape


@pytest.mark.slow
@pytest.mark.parametrize(("checkpointing", "chunk"), [(False, None), (True, 32)])
def test_a_step_runs_without_values(checkpointing, chunk):
    model = add_lora(tiny_model("gemma4-e2b")[0], LoraConfig(rank=4))
    begin_training(model, checkpointed_layers=None if checkpointing else 0)
    set_query_chunk(model.get_base_model(), chunk)
    targets = torch.arange(96) >= 80
    row = Row("row", torch.arange(96), torch.zeros(96, dtype=torch.int64), targets)
    batch = pad_rows(
        [row, row], max_tokens=96, pad_token_id=0, token_type_name="mm_token_type_ids"
    )
    with FakeTensorMode():

        def fake(tensor):
            return torch.empty(tensor.shape, dtype=tensor.dtype)

        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                empty = nn.Parameter(fake(parameter), requires_grad=parameter.requires_grad)
                module.register_parameter(name, empty)
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, fake(buffer))
        batch = replace(
            batch,
            inputs={name: fake(tensor) for name, tensor in batch.inputs.items()},
            target_rows=fake(batch.target_rows),
            target_slots=fake(batch.target_slots),
            target_ids=fake(batch.target_ids),
        )
        target_loss_sum(model, batch, chunk_tokens=8).backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is not None for parameter in trained)


def test_padding_that_sees_nothing_stays_finite(small):
    inputs = make_inputs(small, 75)
    for kernel in (nullcontext(), sdpa_kernel(SDPBackend.MATH)):
        with kernel:
            assert small.model(**inputs, use_cache=False).last_hidden_state.isfinite().all()


def test_loaded_models_use_it_and_saved_ones_do_not_name_it(small, tmp_path):
    save_tiny_model("gemma4-e2b", tmp_path)
    assert ATTENTION not in (tmp_path / "config.json").read_text()
    loaded, _ = load_model(tmp_path, device="cpu", modalities=("text", "image"))
    for part in (loaded.config.get_text_config(), loaded.config.vision_config):
        assert part._attn_implementation == ATTENTION


def test_a_mask_is_cut_as_transformers_cuts_it():
    mask, dense = make_masks(12, 4, torch.ones(1, 12, dtype=torch.bool))
    assert mask[:, :, slice(0, None), :] is mask
    last = mask[:, :, -3:, :]
    assert isinstance(last, AttentionMask)
    assert torch.equal(last.dense(), dense[:, :, -3:])
    rows = torch.tensor([[7, 2, 2]])
    assert torch.equal(mask.at(rows).dense(), dense[:, :, rows[0]])


def test_a_chunk_is_at_least_a_token(small):
    with pytest.raises(ConfigError, match="query chunk of 0 tokens"):
        set_query_chunk(small, 0)


def test_ready_made_masks_are_taken(small):
    use_attention(small)
    inputs = make_inputs(small, 40)
    expected = hidden_states(small, inputs)
    _, full = make_masks(40, None, inputs["attention_mask"].bool())
    _, sliding = make_masks(40, WINDOW, inputs["attention_mask"].bool())
    masks = {"full_attention": full, "sliding_attention": sliding}
    ids = inputs["input_ids"]
    hidden = small.model(input_ids=ids, attention_mask=masks, use_cache=False).last_hidden_state
    found = hidden[inputs["attention_mask"].bool()]
    assert (found - expected).norm() <= 1e-5 * expected.norm()
