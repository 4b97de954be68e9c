"""Media features at their placeholders, as transformers lays them in."""

import pytest
import torch

from gemma_tuner.collators.multimodal import MultimodalCollator
from gemma_tuner.models.target_only import _lay_out, merged_media_embeddings
from gemma_tuner.testing import tiny_model
from tests.examples import example, picture, sound


@pytest.fixture(scope="module", params=["gemma4-e2b", "gemma4-12b", "gemma3n"])
def model_and_inputs(request):
    model, processor = tiny_model(request.param)
    rows = [
        example(picture(1), sound(), picture(2, (90, 40)), "Both?", key="both"),
        example(sound(4_000), "Sound?", key="sound"),
        example("Text?", key="text"),
    ]
    return model, MultimodalCollator(processor)(rows).inputs


@torch.no_grad()
def test_what_arrives_is_what_transformers_lays_in(model_and_inputs):
    model, inputs = model_and_inputs
    expected = model.model(**inputs, use_cache=False).last_hidden_state
    with merged_media_embeddings(model, inputs) as rest:
        found = model.model(**rest, use_cache=False).last_hidden_state
    assert torch.equal(found, expected)
    assert ("pixel_values" in rest) == (model.config.model_type == "gemma3n")
    assert not model.get_input_embeddings()._forward_hooks


@torch.no_grad()
def test_another_number_of_features_makes_the_loss_undefined(model_and_inputs):
    model, inputs = model_and_inputs
    if model.config.model_type == "gemma3n":
        pytest.skip("its own forward refuses")
    for token in (model.config.image_token_id, model.config.audio_token_id):
        ids = inputs["input_ids"].clone()
        ids[0, (ids[0] == token).nonzero()[0]] = 10
        with merged_media_embeddings(model, {**inputs, "input_ids": ids}) as rest:
            hidden = model.model(**rest, use_cache=False).last_hidden_state
        assert hidden[0].isnan().any()


def test_a_forward_that_looks_ids_up_in_another_way_is_an_error(model_and_inputs):
    model, inputs = model_and_inputs
    if model.config.model_type == "gemma3n":
        pytest.skip("its own forward does it")
    with (
        pytest.raises(RuntimeError, match="looked its ids up 0 times"),
        torch.no_grad(),
        merged_media_embeddings(model, inputs),
    ):
        pass
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("valid", [None, [True, False, True, True, False]])
def test_gradients_reach_the_features_that_are_used(valid):
    features = torch.randn(5, 2, requires_grad=True)
    used = torch.tensor(valid or [True] * 5)
    places = torch.zeros(2, 6, dtype=torch.bool)
    places.view(-1)[torch.tensor([1, 2, 7, 8, 10])[: used.sum()]] = True
    laid, mask = _lay_out(features, used if valid else None, places)
    assert torch.equal(laid[places], features[used])
    weights = torch.randn(2, 6, 2)
    (torch.where(mask, laid, 0.0) * weights).sum().backward()
    assert torch.equal(features.grad[used], weights[places])
    assert not features.grad[~used].any()
