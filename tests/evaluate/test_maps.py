"""Maps must show what attention really read and really was."""

import numpy as np
import pytest
import torch

import seerattention as seer
from seerattention.evaluate.maps import draw_maps, draw_recall, inspect_attention
from seerattention.measure import block_recall


@pytest.fixture
def ids():
    return torch.randint(2, 300, (1, 300), generator=torch.Generator().manual_seed(0))


def brute_force(model, ids, layer):
    """Attention probabilities ``[Hq, T, T]`` of the dense model."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        probabilities = model(ids, output_attentions=True).attentions[layer][0]
    model.set_attn_implementation("sdpa")
    return probabilities.numpy()


def test_maps_equal_brute_force(model, ids):
    probabilities = brute_force(model, ids, 0)  # the first layer sees the same whatever is sparse
    seer.attach(model, seer.GateConfig(), prefill=seer.TopK(0.5), min_context=0)
    inspection = inspect_attention(model, ids, layers=[0], heads=[1, 3])
    assert [(item.layer, item.head) for item in inspection.maps] == [(0, 1), (0, 3)]
    padded = np.zeros((4, 320, 320))
    padded[:, :300, :300] = probabilities
    tiles = padded.reshape(4, 5, 64, 5, 64)
    for item in inspection.maps:
        maxima = tiles[item.head].max((1, 3))
        np.testing.assert_allclose(item.target, maxima / maxima.sum(-1, keepdims=True), atol=1e-4)
        np.testing.assert_allclose(item.prediction.sum(-1), 1.0, atol=1e-5)
        mass = tiles[item.head].sum((1, 3))
        mass /= mass.sum(-1, keepdims=True)
        assert item.recall == pytest.approx((mass * item.selected).sum() / 5, abs=1e-4)
        assert item.selected.sum(-1).tolist() == [1, 1, 2, 2, 3]
        assert item.density == pytest.approx(9 / 15)
        assert item.recall == pytest.approx(inspection.recall[0, item.head])
    seer.detach(model)


def test_recall_agrees_with_block_recall(model, ids):
    seer.attach(model, seer.GateConfig(), prefill=seer.TopK(0.4), min_context=0)
    inspection = inspect_attention(model, ids, layers=[], heads=[])
    expected = block_recall(model, [{"input_ids": ids}])
    assert inspection.maps == []
    np.testing.assert_allclose(inspection.recall.mean(-1), [expected[0], expected[1]], atol=1e-5)


def test_a_selector_shows_its_scores_if_it_has_any(model, ids):
    with_scores = seer.baselines.Oracle(seer.TopK(0.5)), seer.baselines.XAttention(tau=0.5)
    for selector in with_scores:
        seer.attach(model, selector=selector, min_context=0)
        (found,) = inspect_attention(model, ids, layers=[1], heads=[0]).maps
        seer.detach(model)
        np.testing.assert_allclose(found.prediction.sum(-1), 1, rtol=1e-5)
        exact = np.abs(found.prediction - found.target).max() < 1e-5
        assert exact == (selector is with_scores[0])
    seer.attach(model, selector=seer.baselines.Streaming(), min_context=0)
    inspection = inspect_attention(model, ids, layers=[1], heads=[0])
    assert inspection.maps[0].prediction is None
    assert len(draw_maps(inspection.maps, 64).axes) == 3  # two maps and the colour bar
    assert draw_recall(inspection.recall).axes


def test_unknown_layers_and_heads_are_refused(model, ids):
    seer.attach(model, seer.GateConfig(), min_context=0)
    with pytest.raises(ValueError, match="layers 0 to 1"):
        inspect_attention(model, ids, layers=[2])
    with pytest.raises(ValueError, match="heads 0 to 3"):
        inspect_attention(model, ids, heads=[-1])
    with pytest.raises(ValueError, match="one prompt"):
        inspect_attention(model, ids.expand(2, -1))
