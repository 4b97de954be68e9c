"""The feature cache on the towers alone: what is kept, within which budget, and when it is off."""

import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tuner.batch import Row, pad_rows
from gemma_tuner.models.families import family_of
from gemma_tuner.models.features import FeatureCache
from gemma_tuner.models.lora import LoraConfig, add_lora, unwrap_peft
from gemma_tuner.testing import tiny_model

ROOM = 10**9
PATCHES = 36  # of which 9 make a feature


@pytest.fixture(scope="module", params=["gemma4-e2b", "gemma4-31b", "gemma3n"])
def gemma(request):
    return tiny_model(request.param)[0]


@pytest.fixture(scope="module")
def e2b():
    return tiny_model("gemma4-e2b")[0]


def make_picture(gemma, seed):
    """A picture as the family's processor gives it."""
    generator = torch.Generator().manual_seed(seed)
    if gemma.config.model_type == "gemma3n":
        return {"pixel_values": torch.rand(1, 3, 64, 64, generator=generator)}
    width, height = ((3, 3), (6, 3), (3, 9), (6, 6))[seed % 4]
    x, y = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
    positions = torch.full((1, PATCHES, 2), -1)
    positions[0, : width * height] = torch.stack([x.flatten(), y.flatten()], -1)
    pixels = torch.rand(1, PATCHES, 48, generator=generator) * (positions[..., :1] >= 0)
    return {"pixel_values": pixels, "image_position_ids": positions}


def make_clip(seed):
    generator = torch.Generator().manual_seed(seed)
    frames = (33, 20, 60, 47)[seed % 4]
    features = torch.randn(1, frames, 128, generator=generator)
    return {
        "input_features": features,
        "input_features_mask": torch.ones(1, frames, dtype=torch.bool),
    }


def make_batch(gemma, *media):
    """A batch whose rows have one item each; only its media matter here."""
    ids = torch.arange(5)
    rows = [
        Row(str(index), ids, torch.zeros_like(ids), ids > 2, media=tensors)
        for index, tensors in enumerate(media)
    ]
    name = family_of(gemma.config).token_type_name
    return pad_rows(rows, max_tokens=64, pad_token_id=0, token_type_name=name)


def ask(gemma, inputs):
    """Ask for features as the forward does, and take from the answers what it takes."""
    taken = {}
    if "pixel_values" in inputs:
        media = [inputs[n] for n in ("pixel_values", "image_position_ids") if n in inputs]
        pooled = gemma.model.get_image_features(*media, return_dict=True).pooler_output
        taken["image"] = torch.cat(pooled) if isinstance(pooled, tuple) else pooled
    if "input_features" in inputs:
        mask = inputs["input_features_mask"]
        is_3n = gemma.config.model_type == "gemma3n"
        outputs = gemma.model.get_audio_features(
            inputs["input_features"], ~mask if is_3n else mask, return_dict=True
        )
        valid = ~outputs.audio_mel_mask if is_3n else outputs.attention_mask
        taken["audio"] = outputs.pooler_output[valid]
        taken["audio mask"] = valid
    return taken


def ask_cached(gemma, cache, batch):
    with cache.serve(batch.inputs, batch.media_hashes) as inputs:
        return ask(gemma, inputs)


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **tolerance, equal_nan=True)


EXACTLY = {"rtol": 0, "atol": 0}
ROUNDED = {"rtol": 1e-5, "atol": 1e-5}


def has_ears(gemma):
    return gemma.model.audio_tower is not None


def test_used_again_bit_for_bit_and_mixed_in_order(gemma):
    """Pictures and clips of several sizes: all new, all kept, and each mixture of both."""
    media = [make_picture(gemma, seed) for seed in range(4)]
    if has_ears(gemma):
        media += [make_clip(seed) for seed in range(4)]
    batch = make_batch(gemma, *media)
    plain = ask(gemma, batch.inputs)
    cache = FeatureCache(gemma, ROOM)
    for _ in range(2):
        assert_same(ask_cached(gemma, cache, batch), plain, **EXACTLY)
    assert cache.counts == {"misses": len(media), "hits": len(media)}

    cache = FeatureCache(gemma, ROOM)
    shuffled = random.Random(0)
    for size in (3, 5, len(media)):
        batch = make_batch(gemma, *shuffled.sample(media, min(size, len(media))))
        assert_same(ask_cached(gemma, cache, batch), ask(gemma, batch.inputs), **ROUNDED)
    assert cache.counts["misses"] == len(media)
    assert not {"get_image_features", "get_audio_features"} & gemma.model.__dict__.keys()


def test_the_tower_is_not_called_for_what_is_kept(gemma, monkeypatch):
    batch = make_batch(gemma, make_picture(gemma, 1), make_picture(gemma, 2))
    cache = FeatureCache(gemma, ROOM)
    plain = ask_cached(gemma, cache, batch)

    def fail(*_, **__):
        raise AssertionError("the tower was called")

    monkeypatch.setattr(type(gemma.model.vision_tower), "forward", fail)
    with cache.serve(batch.inputs, batch.media_hashes) as inputs:
        assert inputs["pixel_values"].numel() == 0
        assert_same(ask(gemma, inputs), plain, **EXACTLY)


def test_a_picture_twice_in_a_batch_is_kept_once(e2b):
    picture = make_picture(e2b, 3)
    batch = make_batch(e2b, picture, picture)
    cache = FeatureCache(e2b, ROOM)
    assert_same(ask_cached(e2b, cache, batch), ask(e2b, batch.inputs), **EXACTLY)
    assert cache.num_bytes == 4 * 32 * 4  # features, wide, float32
    assert_same(ask_cached(e2b, cache, batch), ask(e2b, batch.inputs), **EXACTLY)
    assert cache.counts == {"misses": 2, "hits": 2}


def test_the_budget_is_kept_to_the_byte(e2b):
    pictures = [make_picture(e2b, seed) for seed in range(8)]  # of 1, 2, 3 and 4 features
    a_feature = 32 * 4
    batches = [make_batch(e2b, picture) for picture in pictures]
    plain = [ask(e2b, batch.inputs) for batch in batches]
    for room in (20 * a_feature, 20 * a_feature - 1, 7 * a_feature, a_feature - 1):
        cache = FeatureCache(e2b, room)
        for _ in range(2):
            for batch, expected in zip(batches, plain, strict=True):
                assert_same(ask_cached(e2b, cache, batch), expected, **EXACTLY)
                assert cache.num_bytes <= room
        storages = {f.untyped_storage().data_ptr(): f for f in cache._kept.values()}
        held = sum(feature.untyped_storage().nbytes() for feature in storages.values())
        assert held == cache.num_bytes
        # What came first stays; 1 + 2 + 3 features fit in 7, then only another single one.
        kept = {20: 20, 19: 16, 7: 7, 0: 0}[room // a_feature]
        assert cache.num_bytes == kept * a_feature
        assert (f"{cache.counts['refused']} of them not kept" in cache.report()) == (kept < 20)


def test_undefined_pixels_are_kept_as_they_are_and_reach_no_other_picture(e2b):
    bad = make_picture(e2b, 1)
    bad["pixel_values"][0, 2, 5] = torch.nan
    good, other = make_picture(e2b, 2), make_picture(e2b, 3)
    cache = FeatureCache(e2b, ROOM)
    batch = make_batch(e2b, bad, good)
    plain = ask(e2b, batch.inputs)
    assert plain["image"].isnan().any()
    assert not plain["image"].isnan().all()
    for _ in range(2):
        assert_same(ask_cached(e2b, cache, batch), plain, **EXACTLY)
    mixed = make_batch(e2b, other, bad, good)
    assert_same(ask_cached(e2b, cache, mixed), ask(e2b, mixed.inputs), **ROUNDED)
    assert cache.counts["hits"] == 4


def test_what_is_kept_knows_nothing_of_the_graph(e2b):
    model = add_lora(tiny_model("gemma4-e2b")[0], LoraConfig(rank=2, targets=("projectors",)))
    cache = FeatureCache(model, ROOM)
    gemma = unwrap_peft(model)
    batch = make_batch(gemma, make_picture(gemma, 1), make_clip(1))
    for _ in range(2):
        found = ask_cached(gemma, cache, batch)
        assert found["image"].requires_grad
        assert found["audio"].requires_grad
    assert not any(feature.requires_grad for feature in cache._kept.values())


@settings(max_examples=25)
@given(
    place=st.integers(0, PATCHES * 48 - 1),
    bit=st.integers(0, 31),
    seed=st.integers(0, 3),
    shift=st.integers(1, PATCHES - 1),
)
def test_no_two_pictures_share_a_hash(e2b, place, bit, seed, shift):
    """One bit of one pixel, one position, another order, another shape: each is another one."""
    picture = make_picture(e2b, seed)
    pixels, positions = picture["pixel_values"], picture["image_position_ids"]
    flipped = pixels.clone().view(torch.int32)
    flipped.view(-1)[place] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
    moved = positions.clone()
    moved.view(-1)[place % moved.numel()] += 1
    rolled = {"pixel_values": pixels.roll(shift, 1), "image_position_ids": positions}
    cut = {"pixel_values": pixels[:, shift:], "image_position_ids": positions[:, shift:]}
    others = [
        {**picture, "pixel_values": flipped.view(torch.float32)},
        {**picture, "image_position_ids": moved},
        {**picture, "pixel_values": pixels.bfloat16()},
        {"pixel_values": pixels},
        rolled,
        cut,
    ]
    hashes = [hash_of(e2b, media) for media in (picture, *others)]
    assert len(set(hashes)) == len(hashes)
    assert hashes[0] == hash_of(e2b, {name: x.clone() for name, x in picture.items()})


@settings(max_examples=20)
@given(seed=st.integers(0, 3), partner=st.integers(0, 3))
def test_what_a_batch_pads_is_not_hashed(e2b, seed, partner):
    alone = make_batch(e2b, make_clip(seed))
    batch = make_batch(e2b, make_clip(partner), make_picture(e2b, 1), make_clip(seed))
    assert batch.media_hashes["audio"][1] == alone.media_hashes["audio"][0]
    assert (seed == partner) == (len(set(batch.media_hashes["audio"])) == 1)
    assert len(batch.media_hashes["image"]) == 1
    assert make_batch(e2b, {}).media_hashes == {}


def hash_of(gemma, media):
    return make_batch(gemma, media).media_hashes["image"][0]


class TestOff:
    """Where features cannot be kept, the towers run each time, and the reason is there."""

    def check(self, gemma, cache, reason, modality="image"):
        media = make_picture(gemma, 1) if modality == "image" else make_clip(1)
        batch = make_batch(gemma, media)
        plain = ask(gemma, batch.inputs)
        for _ in range(2):
            assert_same(ask_cached(gemma, cache, batch), plain, **EXACTLY)
        assert reason in cache.reasons[modality]
        assert cache.counts["hits"] == cache.num_bytes == 0

    @pytest.mark.parametrize(("target", "modality"), [("vision", "image"), ("audio", "audio")])
    def test_adapters_in_the_tower(self, target, modality, capsys):
        model = add_lora(
            tiny_model("gemma4-e2b")[0], LoraConfig(rank=2, targets=("language", target))
        )
        cache = FeatureCache(model, ROOM)
        self.check(unwrap_peft(model), cache, f"its {modality} tower is trained", modality)
        assert cache.reasons.keys() == {modality}
        said = capsys.readouterr().err
        assert said.count(f"features of the {modality} tower are not kept") == 1
        assert cache.reasons[modality] in cache.report()

    def test_no_budget(self, e2b, capsys):
        self.check(e2b, FeatureCache(e2b, 0), "its budget is 0 bytes")
        assert "not kept" not in capsys.readouterr().err

    def test_families_and_models_without_a_tower(self, capsys):
        unified = FeatureCache(tiny_model("gemma4-12b")[0], ROOM)
        assert unified.reasons.keys() == {"image", "audio"}
        assert "has no image tower" in unified.reasons["image"]
        deaf = FeatureCache(tiny_model("gemma4-31b")[0], ROOM)
        assert deaf.reasons.keys() == {"audio"}
        assert "off" not in unified.report() + deaf.report()  # where nothing is, nothing is off
        assert "not kept" not in capsys.readouterr().err

    def test_a_method_that_something_else_replaced(self, e2b, capsys):
        cache = FeatureCache(e2b, ROOM)
        replaced = e2b.model.get_image_features = e2b.model.get_image_features
        try:
            self.check(e2b, cache, "is replaced")
            assert e2b.model.get_image_features is replaced
        finally:
            del e2b.model.get_image_features
        assert capsys.readouterr().err.count("is replaced") == 1

    def test_a_wrapped_projector(self, e2b, monkeypatch):
        kind = type(e2b.model.embed_vision)
        forward = kind.forward
        monkeypatch.setattr(kind, "forward", lambda self, *args, **kw: forward(self, *args, **kw))
        self.check(e2b, FeatureCache(e2b, ROOM), "takes no inputs_embeds")

    def test_a_forward_that_asks_for_nothing(self, e2b, capsys):
        cache = FeatureCache(e2b, ROOM)
        batch = make_batch(e2b, make_picture(e2b, 1))
        with cache.serve(batch.inputs, batch.media_hashes):
            pass
        self.check(e2b, cache, "does not call get_image_features")
        assert "does not call get_image_features" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda pooled: tuple(part * 2 for part in pooled), "something else"),
            (lambda pooled: pooled[:1], "something else"),
            (lambda pooled: None, "does not project features once"),
        ],
    )
    def test_outputs_of_another_form(self, e2b, monkeypatch, change, reason):
        kind = type(e2b.model)
        method = kind.get_image_features

        def changed(*args, **kwargs):
            outputs = method(*args, **kwargs)
            return SimpleNamespace(pooler_output=change(outputs.pooler_output))

        monkeypatch.setattr(kind, "get_image_features", changed)
        cache = FeatureCache(e2b, ROOM)
        batch = make_batch(e2b, make_picture(e2b, 1), make_picture(e2b, 2))
        with cache.serve(batch.inputs, batch.media_hashes) as inputs:
            e2b.model.get_image_features(inputs["pixel_values"], inputs["image_position_ids"])
        assert reason in cache.reasons["image"]
        assert cache.num_bytes == 0

    def test_clips_that_are_padded_on_the_left(self, e2b):
        clip = make_clip(2)
        clip["input_features_mask"][0, :30] = False
        batch = make_batch(e2b, clip)
        cache = FeatureCache(e2b, ROOM)
        plain = ask(e2b, batch.inputs)
        for _ in range(2):
            assert_same(ask_cached(e2b, cache, batch), plain, **EXACTLY)
        assert "not where they should be" in cache.reasons["audio"]
