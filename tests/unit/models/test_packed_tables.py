"""A packed table is read by rows and blocks, computes what the dense one does, is not trained."""

import copy

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import gemma_tuner as gt
from gemma_tuner.collators.multimodal import MultimodalCollator
from gemma_tuner.errors import CheckpointError, ConfigError
from gemma_tuner.evaluation.samples import target_probabilities
from gemma_tuner.models.few_bits import tables as packed_tables
from gemma_tuner.models.few_bits.grids import Grid
from gemma_tuner.models.few_bits.layers import replace_packed
from gemma_tuner.models.few_bits.tables import PackedHead, name_table, replace_table
from gemma_tuner.models.lora import LoraConfig, add_lora
from gemma_tuner.models.loss import target_loss_sum
from gemma_tuner.testing import FAMILIES, tiny_model
from tests.examples import example, picture
from tests.parity.test_exactness import gradients, randomize_adapters

GRID = Grid(8, 64, is_affine=True)
ON_ONE = pytest.mark.parametrize("pair", ["gemma4-e2b"], indirect=True)
BLOCK = 100  # six blocks of the tiny vocabularies, the last one short


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    """A tiny model with a packed table, and the dense model of the same values."""
    packed, processor = tiny_model(request.param)
    dense = copy.deepcopy(packed)
    assert replace_table(packed, {name_table(packed.config.model_type): GRID, "other": GRID}) == {
        "other": GRID
    }
    unpack_table(packed, dense)
    return packed, dense, MultimodalCollator(processor)


def unpack_table(packed, dense):
    dense.get_input_embeddings().weight.data = packed.get_input_embeddings().weight[:]
    dense.tie_weights()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(packed_tables, "MAX_REDUCTION", BLOCK)


class LargestTable(TorchDispatchMode):
    """Remembers the most rows of a table that were made at once."""

    def __init__(self, width):
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point() and out.ndim == 2:
            rows, width = sorted(out.shape, reverse=True)
            if width == self.width:
                self.rows = max(self.rows, rows)
        return out


def make_batch(collator):
    return collator([example("Hello", answer="Yes"), example(picture(1), "What?", answer="A dog")])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_reads_blocks_and_equals_that_of_the_dense_table(pair, dtype):
    batch = make_batch(pair[2])
    found = []
    packed, dense = (copy.deepcopy(model).to(dtype) for model in pair[:2])
    unpack_table(packed, dense)
    for base in (packed, dense):
        model = add_lora(base, LoraConfig(rank=4))
        randomize_adapters(model)
        with LargestTable(64) as largest:
            loss = target_loss_sum(model, batch, chunk_tokens=5)
            loss.backward()
        found.append((loss.detach(), gradients(model), largest.rows))
    (packed_loss, packed_gradients, rows), (dense_loss, dense_gradients, _) = found
    assert 0 < rows < pair[0].get_input_embeddings().num_embeddings
    assert torch.equal(packed_loss, dense_loss)
    assert dense_gradients
    for name, expected in dense_gradients.items():
        assert torch.equal(packed_gradients[name], expected)


def test_answers_and_probabilities_are_those_of_the_dense_table(pair):
    packed, dense, collator = pair
    batch = make_batch(collator)
    assert target_probabilities(packed, batch) == target_probabilities(dense, batch)

    answers = [
        gt.generate(model, collator.processor, "Hello", max_new_tokens=6)
        for model in (packed, dense)
    ]
    assert answers[0] == answers[1]


def test_the_gradient_by_the_heads_input_is_summed_over_blocks(pair):
    packed, dense, _ = pair
    states = torch.randn(2, 3, 64, requires_grad=True)
    weights = torch.randn(2, 3, dense.lm_head.out_features)
    found = [
        torch.autograd.grad((model.lm_head(states) * weights).sum(), states)[0]
        for model in (packed, dense)
    ]
    torch.testing.assert_close(*found)


USES = {
    r"functional\.embedding": lambda weight, ids: F.embedding(ids, weight),
    r"Tensor\.eq": lambda weight, ids: ids == weight,
    r"Tensor\.matmul": lambda weight, ids: torch.ones(2, 64) @ weight,
    r"weight\.T ": lambda weight, ids: weight.T,
    r"weight\.data ": lambda weight, ids: weight.data,
    r"weight\[None, None, ": lambda weight, ids: weight[None, None, :, :],
    r"weight\[Tensor\]": lambda weight, ids: weight[ids],
    r"weight\[3, 5\]": lambda weight, ids: weight[3, 5],
}


@ON_ONE
@pytest.mark.parametrize("use", USES)
def test_what_would_unpack_the_whole_table_is_refused_by_name(pair, use):
    weight = pair[0].get_input_embeddings().weight
    with pytest.raises(ConfigError, match=use):
        USES[use](weight, torch.tensor([1, 2]))
    assert not hasattr(weight, "quant_state")  # who asks politely is told


def test_single_rows_are_read(pair):
    packed, dense, _ = pair
    weight, expected = packed.get_input_embeddings().weight, dense.get_input_embeddings().weight
    assert weight.shape == expected.shape
    assert (weight.dtype, weight.device) == (expected.dtype, expected.device)
    for index in (0, -1, (3, slice(None)), slice(5, 9), (slice(5, None), slice(None))):
        assert torch.equal(weight[index], expected[index])


def test_the_head_has_no_buffers_of_its_own_and_follows_its_embedding(pair):
    model = copy.deepcopy(pair[0])
    assert isinstance(model.lm_head, PackedHead)
    assert not any(name.startswith("lm_head") for name in model.state_dict())
    model.to(torch.bfloat16).tie_weights()
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight[:9], model.get_input_embeddings().weight[:9])


NEVER_TRAINED = {
    "lm_head": {"target_modules": ["lm_head"]},
    "embed_tokens": {"target_modules": ["embed_tokens"]},
    "embed_tokens is to be trained": {
        "target_modules": r".*language_model.*v_proj",
        "modules_to_save": ["embed_tokens"],
    },
    "q_proj is to be trained": {
        "target_modules": r".*language_model.*v_proj",
        "modules_to_save": ["self_attn.q_proj"],
    },
}


@ON_ONE
@pytest.mark.parametrize("named", NEVER_TRAINED)
def test_packed_tables_are_not_trained(pair, named):
    model = copy.deepcopy(pair[0])
    name = "model.language_model.layers.0.self_attn.q_proj"
    replace_packed(model, {name: Grid(4, 32)})
    with pytest.raises(ConfigError, match=named):
        add_lora(model, peft.LoraConfig(**NEVER_TRAINED[named]))
    with pytest.raises(ConfigError, match=r"lm_head"):
        add_lora(model, LoraConfig(targets=("lm_head",)))


@ON_ONE
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_an_adapter_that_trained_the_embedding_is_refused(pair, tmp_path):
    packed, dense, _ = pair
    wrapped = peft.get_peft_model(
        copy.deepcopy(dense),
        peft.LoraConfig(
            target_modules=r".*language_model.*v_proj", modules_to_save=["embed_tokens"]
        ),
    )
    wrapped.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="embed_tokens"):
        gt.load_adapter(copy.deepcopy(packed), tmp_path / "adapter")


@ON_ONE
def test_all_linear_leaves_the_head_out(pair):
    model = add_lora(copy.deepcopy(pair[0]), peft.LoraConfig(target_modules="all-linear"))
    assert not any("lm_head" in name for name, p in model.named_parameters() if p.requires_grad)


def test_the_per_layer_table_is_never_packed():
    model, _ = tiny_model("gemma4-e2b")
    name = f"{name_table('gemma4')}_per_layer"
    with pytest.raises(CheckpointError, match="embed_tokens_per_layer"):
        replace_packed(model, replace_table(model, {name: GRID}))
    assert isinstance(model.get_submodule(name), nn.Embedding)
