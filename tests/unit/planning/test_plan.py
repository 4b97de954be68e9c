import gc
from dataclasses import replace

import pytest
import torch

import gemma_tuner as gt
from benchmarks.live_bytes import LiveBytes
from gemma_tuner.checkpoints.loading import read_config
from gemma_tuner.errors import ConfigError, MemoryPlanError
from gemma_tuner.models.embeddings import choose_placement, find_mapped_embedding
from gemma_tuner.models.few_bits.grids import Grid
from gemma_tuner.models.lora import LoraConfig, add_lora, find_adapters, wrap_peft
from gemma_tuner.models.loss import target_loss_sum
from gemma_tuner.models.meta import build_meta_copy, build_meta_model
from gemma_tuner.models.modes import begin_training
from gemma_tuner.planning.choice import widen
from gemma_tuner.planning.loaded import plan_without_trace
from gemma_tuner.planning.plan import margin_bytes, plan
from gemma_tuner.planning.trace import StepTracer
from gemma_tuner.planning.worst_case import make_worst_case
from gemma_tuner.testing import sample_data, save_tiny_model, tiny_model
from gemma_tuner.training.step import request_plan
from tests.runs import build_trainer

GIB = 2**30
CPU = torch.device("cpu")
MPS = torch.device("mps")


def measure_live(model, batch, layers, chunk):
    """The most that a real step holds over what stays between steps."""
    begin_training(model, checkpointed_layers=layers)
    gc.collect()
    with LiveBytes() as counted:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        names = ("labels", "target_rows", "target_slots", "target_ids")
        moved = replace(
            batch,
            inputs={name: tensor.clone() for name, tensor in batch.inputs.items()},
            **{name: getattr(batch, name).clone() for name in names},
        )
        loss = target_loss_sum(model, moved, chunk_tokens=chunk)
        (loss / batch.num_target_tokens).backward()
    model.zero_grad(set_to_none=True)
    return counted.peak_bytes


def make_example(family, modality):
    model, processor = tiny_model(family)
    collator = gt.MultimodalCollator(processor, max_tokens=512)
    example = collator([gt.stream_local(sample_data(modality))[0]])
    return add_lora(model, LoraConfig(rank=4)), example


SHAPES = ((2, 192, 0.25, 64), (1, 256, 1.0, 32))


@pytest.mark.parametrize(
    ("family", "modality", "rows", "tokens", "share", "chunk"),
    [
        ("gemma4-e2b", "text", *SHAPES[0]),
        *(
            pytest.param(family, modality, *shape, marks=pytest.mark.slow)
            for family, modality, shapes in (
                ("gemma4-e2b", "text", SHAPES[1:]),
                ("gemma4-e2b", "image", SHAPES),
                ("gemma4-26b-a4b", "text", SHAPES),
                ("gemma4-31b", "text", SHAPES),
                ("gemma3n", "audio", SHAPES),
            )
            for shape in shapes
        ),
    ],
)
def test_predicted_bytes_are_those_of_a_real_step(family, modality, rows, tokens, share, chunk):
    model, example = make_example(family, modality)
    num_layers = len(model.get_base_model().model.language_model.layers)
    step = StepTracer(build_meta_copy(model), CPU, accumulates=True)
    batch = widen(example, rows=rows, tokens=tokens, target_share=share)
    for layers in (0, num_layers // 2, num_layers):
        predicted = step.measure(
            batch,
            checkpointed_layers=layers,
            loss_chunk_tokens=chunk,
            query_chunk_tokens=None,
        ).step_bytes
        measured = measure_live(model, batch, layers, chunk)
        assert predicted == pytest.approx(measured, rel=0.05), layers


def test_experts_in_float32_are_planned_and_no_step_is_tried_twice():
    model, example = make_example("gemma4-26b-a4b", "text")
    step = StepTracer(build_meta_copy(model), CPU, accumulates=True)
    batch = widen(example, rows=1, tokens=32, target_share=0.5)
    settings = {"checkpointed_layers": 0, "loss_chunk_tokens": 16, "query_chunk_tokens": None}
    found = step.measure(batch, **settings)
    assert step.measure(batch, **settings) is found
    next(p for p in step._model.parameters() if p.requires_grad).requires_grad = False
    assert step.measure(batch, **settings) is not found  # another step


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("e2b")
    save_tiny_model("gemma4-e2b", folder)
    return folder


@pytest.fixture(scope="module")
def peaks(checkpoint):
    """What 2 rows of 512 tokens hold, by the number of checkpointed layers."""
    found = plan(checkpoint, memory_gib=4, device="mps", max_tokens=512, batch_size=2)
    assert [level.checkpointed_layers for level in found.levels] == [0, 8]
    assert found.levels[0].max_tokens == 1024
    return found


def budget_for(num_bytes):
    """The budget of which so many bytes may be used on MPS."""
    return num_bytes / 0.8 / GIB


def test_a_plan_needs_no_weights_and_says_why(checkpoint, peaks):
    text = str(peaks)
    for word in ("decoder", "adapters", "moments", "predicted peak", "budget"):
        assert word in text
    assert "activation checkpointing  nothing up to" in text
    assert str(checkpoint.parent) not in text
    assert peaks.per_layer_embeddings == "disk"
    assert "per-layer embeddings" not in peaks.footprint.resident
    assert 0 < peaks.footprint.resident_bytes < peaks.peak_bytes <= peaks.usable_bytes


@pytest.mark.slow
def test_less_memory_computes_more_twice_in_smaller_pieces(checkpoint, peaks):
    found = []
    for share in (0.99, 0.3):
        usable = peaks.footprint.resident_bytes + share * peaks.footprint.step_bytes
        budget = budget_for(usable)
        tight = plan(checkpoint, memory_gib=budget, device="mps", max_tokens=512, batch_size=2)
        assert tight.peak_bytes <= tight.usable_bytes
        found.append(tight.levels)
    assert found[0][0].checkpointed_layers == 0
    assert 512 <= found[0][0].max_tokens < 1024
    assert found[1][0].checkpointed_layers > 0 or found[1][0].max_tokens < 512
    assert any(level.checkpointed_layers > 0 and level.max_tokens for level in found[1])


@pytest.mark.slow
def test_what_does_not_fit_names_the_nearest_plans(checkpoint, peaks):
    usable = peaks.footprint.resident_bytes + 0.12 * peaks.footprint.step_bytes
    with pytest.raises(MemoryPlanError, match=r"What would fit: .*max_tokens=\d+") as caught:
        plan(checkpoint, memory_gib=budget_for(usable), device="mps", max_tokens=512)
    tokens = int(str(caught.value).partition("max_tokens=")[2].partition(",")[0])
    plan(checkpoint, memory_gib=budget_for(usable), device="mps", max_tokens=tokens)
    with pytest.raises(MemoryPlanError, match="alone hold"):
        plan(checkpoint, memory_gib=1e-3, device="mps", max_tokens=512)


def test_a_plan_in_bits_is_that_of_the_packed_checkpoint_and_is_loaded(
    checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    asked = {"memory_gib": 4, "device": "mps", "max_tokens": 64}
    planned = {bits: plan(checkpoint, bits=bits, **asked) for bits in (None, 4)}
    assert [found.bits for found in planned.values()] == [None, 4]
    of_packed = plan(gt.pack(checkpoint, tmp_path / "packed"), **asked)
    assert of_packed.bits == 4
    assert planned[4].footprint == of_packed.footprint
    held = [found.footprint.resident["decoder"] for found in planned.values()]
    assert held == sorted(held, reverse=True)
    on_cpu = plan(checkpoint, bits=4, memory_gib=4, max_tokens=64, device="cpu")
    model, _ = gt.load_model(checkpoint, plan=on_cpu)
    assert set(model.config.packed.values()) == {"symmetric-4-32"}
    with pytest.raises(ConfigError, match="leave device, dtype, bits"):
        gt.load_model(checkpoint, plan=on_cpu, bits=4)
    with pytest.raises(ConfigError, match="packed in 4 already"):
        plan(tmp_path / "packed", bits=8, **asked)


def trace_in_bits(folder, bits, max_tokens):
    """The least that a row holds on a Mac, rank 16, a quarter of it targets."""
    config = read_config(str(folder), None)
    meta_model = build_meta_model(
        config,
        modalities=("text",),
        dtype=torch.bfloat16,
        per_layer_embeddings=choose_placement(config, MPS, None),
        grid=Grid.choose(bits) if bits else None,
    )
    meta_model = wrap_peft(meta_model, find_adapters(meta_model, LoraConfig())[0])
    step = StepTracer(meta_model, MPS, accumulates=True)
    example = make_worst_case(str(folder), config, ("text",), max_tokens, None, 30.0, None)
    row = widen(example, rows=1, tokens=max_tokens, target_share=0.25)
    return step.resident_bytes, step.measure_least(row)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_what_does_not_fit_names_the_bits_that_would(checkpoint, bits):
    _, least = trace_in_bits(checkpoint, bits, 64)
    with pytest.raises(MemoryPlanError, match=rf"What would fit: bits={bits}"):
        plan(checkpoint, device="mps", max_tokens=64, memory_gib=budget_for(least + 4096))


@pytest.mark.slow
def test_bits_are_not_named_where_weights_are_trained_themselves(checkpoint):
    with pytest.raises(MemoryPlanError) as caught:
        plan(checkpoint, lora=LoraConfig(variant="full"), memory_gib=1e-3, max_tokens=64)
    assert "bits=" not in str(caught.value)
    with pytest.raises(MemoryPlanError, match=r"bits=4 would need 0\.\d\d GiB"):
        plan(checkpoint, bits=8, memory_gib=1e-3, max_tokens=64)


@pytest.mark.slow
def test_e2b_in_4_bits_fits_a_mac_of_8_gib(shared_data):
    """As the README says; the rest of its table takes minutes, and was traced by hand."""
    resident, least = trace_in_bits(shared_data / "models" / "gemma-4-E2B-it", 4, 2048)
    assert resident <= 2.2e9
    budget = 8 * 2 // 3 * GIB
    assert least <= min(3.2e9, budget - margin_bytes(budget, MPS))


def test_a_model_is_loaded_as_planned(checkpoint):
    found = plan(checkpoint, memory_gib=4, device="cpu", per_layer_embeddings="disk")
    model, _ = gt.load_model(checkpoint, plan=found)
    assert find_mapped_embedding(model) is not None
    with pytest.raises(ConfigError, match="plan was made for text on cpu"):
        gt.load_model(checkpoint, modalities=("image",), plan=found)
    with pytest.raises(ConfigError, match="plan was made for text on cpu"):
        gt.load_model(checkpoint, device="cpu", plan=found)


@pytest.mark.parametrize("memory_gib", [0, -1, float("nan"), "16"])
def test_a_budget_is_a_number_of_gib(checkpoint, memory_gib):
    with pytest.raises(ConfigError, match="memory_gib is"):
        plan(checkpoint, memory_gib=memory_gib, device="cpu")


def test_a_trainer_plans_for_its_own_data_and_trains_by_it(checkpoint, tmp_path):
    model, processor = gt.load_model(checkpoint, device="cpu")
    model = add_lora(model, LoraConfig(rank=4))
    stream = gt.stream_local(sample_data("text"), cache_dir=tmp_path / "cache")

    def make_trainer(name, **settings):
        config = gt.TrainConfig(
            max_steps=1, batch_size=2, output_dir=tmp_path / name, progress=False, **settings
        )
        return gt.Trainer(model, stream, gt.TextCollator(processor, max_tokens=128), config)

    ample = make_trainer("ample").plan()
    usable = ample.footprint.resident_bytes + 0.6 * ample.footprint.step_bytes
    tight = make_trainer("tight", memory_gib=usable / 0.9 / GIB, gradient_checkpointing=False)
    found = tight.plan()
    assert found.peak_bytes <= found.usable_bytes < ample.peak_bytes
    assert tight.stepper.micro_batches.levels == list(found.levels)
    tight.fit()
    assert tight.stepper.micro_batches.num_retries == 0


def test_a_plan_for_media_is_taken_with_the_modalities_it_was_made_for(checkpoint):
    found = plan(checkpoint, memory_gib=4, device="cpu", modalities=("image",))
    model, _ = gt.load_model(checkpoint, modalities=("image",), plan=found)
    assert model.model.vision_tower is not None


@pytest.mark.slow
def test_what_was_asked_for_and_does_not_fit_is_named(tmp_path):
    def tell(memory_gib):
        trainer = build_trainer(tmp_path, gradient_checkpointing=False, memory_gib=memory_gib)
        trainer.collator.max_tokens = 256  # the longest row that is planned for
        return trainer.plan()

    least = tell(64)
    resident = least.footprint.resident_bytes
    budget = (resident + 0.2 * least.footprint.step_bytes) / 0.9 / GIB  # the CPU's margin
    says = (
        r"does not fit with gradient_checkpointing=False: .* None for these, .* needs 0\.\d\d GiB"
    )
    with pytest.raises(MemoryPlanError, match=says):
        tell(budget)


def tell_what_no_step_needs(trainer, chunk=256):
    """In GiB."""
    rows = [trainer.collator([trainer.stream[0]])]
    config = replace(trainer.config, loss_chunk_tokens=chunk, memory_gib=64)
    found = plan_without_trace(trainer.model, rows, request_plan(rows, config, 64))
    return float(found.reasons["activation checkpointing"].split()[2])


def test_a_large_loss_chunk_counts_in_what_no_step_needs(tmp_path):
    trainer = build_trainer(tmp_path)
    told = [tell_what_no_step_needs(trainer, chunk) for chunk in (256, 1_000_000)]
    assert told[0] + 9 < told[1]


def test_packed_weights_count_in_what_no_step_needs(tmp_path):
    trainer = build_trainer(tmp_path)
    before = tell_what_no_step_needs(trainer)
    decoder = trainer.model.get_base_model().get_decoder()
    decoder.register_buffer("numbers", torch.empty(9, 2**30, dtype=torch.int8, device="meta"))
    assert tell_what_no_step_needs(trainer) >= before + 9
