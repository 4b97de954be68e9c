"""Features that are used again against towers that run each time: the same numbers, less work."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from gemma_tuner.collators.multimodal import MultimodalCollator
from gemma_tuner.models.features import FeatureCache
from gemma_tuner.models.lora import LoraConfig, add_lora, unwrap_peft
from gemma_tuner.models.loss import target_loss_sum
from gemma_tuner.models.modes import begin_training, end_training
from gemma_tuner.testing import tiny_model
from tests.examples import example, picture, sound
from tests.runs import build_trainer, read_trace

ROOM = 10**9
FAMILIES = (
    "gemma4-e2b",
    pytest.param("gemma4-31b", marks=pytest.mark.slow),
    pytest.param("gemma4-26b-a4b", marks=pytest.mark.slow),
    pytest.param("gemma3n", marks=pytest.mark.slow),
)


def make_model(family, targets=("language", "projectors"), **settings):
    model, processor = tiny_model(family)
    model = add_lora(model, LoraConfig(rank=4, targets=targets, **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, which would hide lora_A's gradients
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model, MultimodalCollator(processor)


def make_examples(model):
    rows = [
        example(picture(1), "What is it?", answer="A dog", key="image"),
        example("Hello", answer="Hi", key="text"),
        example(picture(2), "Before.", picture(3, (90, 30)), "After?", answer="Two", key="images"),
    ]
    if unwrap_peft(model).model.audio_tower is not None:
        rows += [
            example(sound(8_000, seed=1), "And?", answer="A word", key="sound"),
            example(picture(4), "Both?", sound(30_000, seed=2), answer="Yes, both", key="both"),
            example(sound(4_000, seed=3), sound(15_000, seed=4), "Or?", answer="No", key="sounds"),
        ]
    return rows


def plain_step(model, batch):
    loss = target_loss_sum(model, batch, chunk_tokens=32)
    loss.backward()
    return loss.detach(), take_gradients(model)


def cached_step(cache, model, batch):
    with cache.serve(batch.inputs, batch.media_hashes) as inputs:
        loss = target_loss_sum(model, replace(batch, inputs=inputs), chunk_tokens=32)
    loss.backward()
    return loss.detach(), take_gradients(model)


def take_gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_bits(ours, plain):
    assert torch.equal(ours[0], plain[0])
    assert ours[1].keys() == plain[1].keys()
    assert all(torch.equal(ours[1][name], gradient) for name, gradient in plain[1].items())


def assert_close(ours, plain):
    assert float(ours[0]) == pytest.approx(float(plain[0]), rel=1e-6)
    assert ours[1].keys() == plain[1].keys()
    norm = torch.cat([gradient.flatten() for gradient in plain[1].values()]).norm()
    off = torch.cat([(ours[1][n] - gradient).flatten() for n, gradient in plain[1].items()]).norm()
    assert off <= 1e-4 * norm  # other shapes, other rounding, which Gemma 3n's top-k widens


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def setup(family):
    model, collator = make_model(family)
    return model, collator, make_examples(model)


@pytest.fixture
def tower_items(setup):
    """How many pictures and clips the towers have run on."""
    counts = Counter()
    handles = []
    for name in ("vision_tower", "audio_tower"):
        tower = getattr(unwrap_peft(setup[0]).model, name)

        def count(_, args, kwargs, name=name):
            counts[name] += len(args[0] if args else kwargs["pixel_values"])

        if tower is not None:
            handles.append(tower.register_forward_pre_hook(count, with_kwargs=True))
    yield counts
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_second_pass_runs_no_tower_and_changes_no_bit(setup, tower_items, checkpointing):
    model, collator, examples = setup
    begin_training(model, checkpointed_layers=None if checkpointing else 0)
    batch = collator(examples[-3:])
    plain = plain_step(model, batch)
    assert any("embed_vision" in name for name in plain[1])  # its gradient is compared too

    cache = FeatureCache(model, ROOM)
    num_items = sum(map(len, batch.media_hashes.values()))
    for epoch in range(2):
        tower_items.clear()
        assert_same_bits(cached_step(cache, model, batch), plain)
        assert sum(tower_items.values()) == (0 if epoch else num_items)
    assert cache.counts == {"misses": num_items, "hits": num_items}
    end_training(model)


@pytest.mark.slow
def test_other_batches_of_the_same_items(setup, tower_items):
    model, collator, examples = setup
    cache = FeatureCache(model, ROOM)
    for row in examples:
        cached_step(cache, model, collator([row]))
    tower_items.clear()
    for rows in (examples, examples[::-1], examples[1:3]):
        batch = collator(rows)
        assert_close(cached_step(cache, model, batch), plain_step(model, batch))
        assert sum(tower_items.values()) == sum(map(len, batch.media_hashes.values()))  # plain's
        tower_items.clear()


@pytest.mark.slow
def test_only_what_is_missing_runs_and_takes_its_place(setup, tower_items):
    model, collator, examples = setup
    cache = FeatureCache(model, ROOM)
    cached_step(cache, model, collator(examples))
    unseen = [example(picture(8), "New?", answer="Yes", key="new image")]
    expected = {"vision_tower": 2}
    if len(examples) > 3:
        unseen.append(example(sound(19_000, seed=9), "New?", answer="No", key="new sound"))
        expected["audio_tower"] = 1
    rows = [examples[0], unseen[0], *examples[1:], *unseen[1:]]
    rows.append(example(picture(9), "At the end?", picture(1), answer="Yes", key="end"))
    batch = collator(rows)
    plain = plain_step(model, batch)
    tower_items.clear()
    assert_close(cached_step(cache, model, batch), plain)
    assert tower_items == expected
    assert_close(cached_step(cache, model, batch), plain)
    assert tower_items == expected


@pytest.mark.slow
def test_pixels_of_what_is_kept_do_not_travel(setup):
    model, collator, examples = setup
    cache = FeatureCache(model, ROOM)
    batch = collator(examples)
    cached_step(cache, model, batch)
    with cache.serve(batch.inputs, batch.media_hashes) as inputs:
        media = [name for name in inputs if name.startswith(("pixel", "image", "input_features"))]
        assert len(media) >= 1
        assert all(inputs[name].numel() == 0 for name in media)
        with torch.no_grad():
            target_loss_sum(model, replace(batch, inputs=inputs), chunk_tokens=32)


@pytest.mark.slow
def test_evaluation_and_training_share_features(setup, tower_items):
    model, collator, examples = setup
    cache = FeatureCache(model, ROOM)
    batch = collator(examples)
    end_training(model)
    with (
        torch.no_grad(),
        cache.serve(batch.inputs, batch.media_hashes) as inputs,
    ):
        evaluated = target_loss_sum(model, replace(batch, inputs=inputs), chunk_tokens=32)
    tower_items.clear()
    begin_training(model)
    trained = cached_step(cache, model, batch)
    assert not tower_items
    assert_same_bits(trained, plain_step(model, batch))
    assert torch.equal(trained[0], evaluated)
    end_training(model)


@pytest.mark.slow
def test_a_step_that_is_halved_for_want_of_memory(setup):
    """Memory runs out in the middle of a forward; the model is whole, the gradient the same."""
    model, collator, examples = setup
    cache = FeatureCache(model, ROOM)
    batch = collator(examples)
    plain = plain_step(model, batch)
    gemma = unwrap_peft(model)

    def refuse(*_):
        raise torch.OutOfMemoryError("no room")

    handle = gemma.model.language_model.register_forward_pre_hook(refuse)
    with pytest.raises(torch.OutOfMemoryError):
        cached_step(cache, model, batch)
    handle.remove()
    assert not {"get_image_features", "get_audio_features"} & gemma.model.__dict__.keys()

    loss = torch.zeros(())
    for half in (collator(examples[::2]), collator(examples[1::2])):
        with cache.serve(half.inputs, half.media_hashes) as inputs:
            micro_loss = target_loss_sum(model, replace(half, inputs=inputs), chunk_tokens=32)
        micro_loss.backward()
        loss += micro_loss.detach()
    assert_close((loss, take_gradients(model)), plain)
    assert cache.counts["hits"] == cache.counts["misses"]  # the first try's features served


@pytest.mark.slow
def test_what_finds_no_room_is_computed_each_time(setup, tower_items):
    model, collator, examples = setup
    batches = [collator([row]) for row in examples]
    cache = FeatureCache(model, ROOM)
    for batch in batches:
        cached_step(cache, model, batch)
    needed = cache.num_bytes
    plain = [plain_step(model, batch) for batch in batches]
    for room in (needed, needed // 2):
        cache = FeatureCache(model, room)
        for _ in range(2):
            tower_items.clear()
            for batch, expected in zip(batches, plain, strict=True):
                assert_close(cached_step(cache, model, batch), expected)
                assert cache.num_bytes <= room
        kept = {feature.untyped_storage().data_ptr(): feature for feature in cache._kept.values()}
        assert sum(f.untyped_storage().nbytes() for f in kept.values()) == cache.num_bytes
        assert sum(tower_items.values()) == cache.counts["refused"] // 2
        assert (cache.counts["refused"] == 0) == (room == needed)


@pytest.mark.slow
def test_bfloat16_and_dropout(setup, family):
    """Features have the model's dtype; the projector's adapters draw the same dropout."""
    bare = make_model(family, dropout=0.5)[0]
    unwrap_peft(bare).to(torch.bfloat16)
    begin_training(bare)
    batch = setup[1](setup[2])
    torch.manual_seed(3)
    plain = plain_step(bare, batch)
    cache = FeatureCache(bare, ROOM)
    for _ in range(2):
        torch.manual_seed(3)
        assert_same_bits(cached_step(cache, bare, batch), plain)
    assert {feature.dtype for feature in cache._kept.values()} == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma4-e2b", "gemma3n"])
def test_ten_optimizer_steps(family):
    """Shuffled epochs, too little room, batches cut anew each time, and weights that move."""
    losses = []
    for room in (None, 3_000, ROOM):
        model, collator = make_model(family)
        begin_training(model)
        examples = make_examples(model)
        cache = FeatureCache(model, room or 0)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
        generator = torch.Generator().manual_seed(0)
        losses.append([])
        for _ in range(10):
            order = torch.randperm(len(examples), generator=generator).tolist()[:4]
            batch = collator([examples[index] for index in order])
            with cache.serve(batch.inputs, batch.media_hashes) as inputs:
                loss = target_loss_sum(model, replace(batch, inputs=inputs), chunk_tokens=32)
            (loss / batch.num_target_tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)
    num_items = sum(len(found) for found in collator(examples).media_hashes.values())
    assert cache.counts["misses"] == num_items


@pytest.mark.slow
@pytest.mark.parametrize("modality", ["image", "audio"])
def test_the_trainer_uses_them(tmp_path, modality):
    """Two epochs and a half, with evaluation on the same data, against a run without a cache."""
    traces = {}
    for gib in (0.0, 1.0):
        trainer = build_trainer(
            tmp_path / str(gib), modality=modality, feature_cache_gib=gib, eval_every_steps=2
        )
        trainer.fit()
        traces[gib] = [
            [record[name] for record in read_trace(tmp_path / str(gib), kind)]
            for kind, name in (("step", "loss"), ("eval", "loss"))
        ]
    num_items = 10  # as many rows as the trainer takes, with one each
    assert traces[1.0][0] == pytest.approx(traces[0.0][0], rel=1e-5)
    assert traces[1.0][1] == pytest.approx(traces[0.0][1], rel=1e-5)
    assert trainer.stepper.features.counts["misses"] == num_items
    assert trainer.stepper.features.counts["hits"] >= 2 * num_items


@pytest.fixture(scope="module")
def gemma3n():
    return make_model("gemma3n", targets=("language",))


class TestClipsOfGemma3n:
    """What its tower makes of a clip's end depends on what is behind it."""

    @pytest.mark.parametrize(
        ("num_samples", "num_frames"), [(15_712, 96), (16_000, 97), (20_832, 128)]
    )
    def test_a_clip_is_the_same_in_any_batch(self, gemma3n, num_samples, num_frames):
        model, collator = gemma3n
        row = example(sound(num_samples), "x", key="clip")
        longer = example(sound(40_000, seed=7), "x", key="longer")
        alone, together = collator([row]), collator([row, longer])
        assert int(alone.inputs["input_features_mask"].sum()) == num_frames
        tower = unwrap_peft(model).model.audio_tower
        made = [
            tower(b.inputs["input_features"], ~b.inputs["input_features_mask"])
            for b in (alone, together)
        ]
        valid = ~made[0].audio_mel_mask[0]
        first, second = (m.last_hidden_state[0, : int(valid.sum())] for m in made)
        assert torch.allclose(first, second, atol=2e-5)

    def test_the_longest_clip(self, gemma3n):
        model, collator = gemma3n
        batch = collator([example(sound(480_000), "x", key="half a minute")])
        with torch.no_grad():
            assert torch.isfinite(target_loss_sum(model, batch, chunk_tokens=32))
