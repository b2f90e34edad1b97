"""A setting must leave the model as it found it."""

import pytest
import torch

import seerattention as seer
from seerattention.evaluate.settings import Setting


@pytest.fixture
def ids():
    return torch.randint(2, 300, (1, 512), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def gates(model, tmp_path):
    seer.attach(model, seer.GateConfig(), min_context=0)
    seer.save_gates(model, tmp_path / "gates")
    seer.detach(model)
    return tmp_path / "gates"


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("kind", ["dense", "gates", "selector"])
def test_the_model_is_untouched_afterwards(model, gates, ids, kind):
    setting = {
        "dense": Setting.dense(),
        "gates": Setting("gate", gates=gates, policy=seer.TopK(0.3)),
        "selector": Setting("oracle", selector=seer.baselines.Oracle(seer.TopK(0.3))),
    }[kind]
    before = logits(model, ids)
    with setting.applied(model) as measurement:
        inside = logits(model, ids)
    assert torch.equal(before, logits(model, ids))
    assert not seer.hf.is_attached(model)
    if kind == "dense":
        assert torch.equal(inside, before)
        assert measurement.density == 1.0
    else:
        assert not torch.allclose(inside, before, atol=1e-3)
        assert measurement.density == pytest.approx(sum(-(-3 * i // 10) for i in range(1, 9)) / 36)


def test_attached_gates_take_a_policy_and_keep_their_own(model, gates, ids):
    seer.attach(model, gates, prefill=seer.TopK(0.9), min_context=0)
    before = logits(model, ids)
    with Setting("sparse", policy=seer.TopK(0.2)).applied(model) as measurement:
        inside = logits(model, ids)
    assert measurement.density < 0.4
    assert not torch.allclose(inside, before, atol=1e-3)
    assert torch.equal(before, logits(model, ids))
    with Setting.dense().applied(model) as measurement:
        dense = logits(model, ids)
    assert measurement.density == 1.0
    seer.detach(model)
    assert torch.allclose(dense, logits(model, ids), atol=1e-4)


def test_an_error_inside_detaches_too(model, gates):
    with pytest.raises(RuntimeError, match="inside"), Setting("gate", gates=gates).applied(model):
        raise RuntimeError("inside")
    assert not seer.hf.is_attached(model)


def test_contradictions_are_refused(model, gates):
    with pytest.raises(ValueError, match="dense and cannot"):
        Setting("x", gates=gates, sparse=False)
    with pytest.raises(ValueError, match="one or the other"):
        Setting("x", gates=gates, selector=seer.baselines.Oracle(seer.TopK(0.3)))
    with (
        pytest.raises(ValueError, match="neither gates nor a selector"),
        Setting("x", policy=seer.TopK(0.3)).applied(model),
    ):
        pass
    seer.attach(model, gates, min_context=0)
    with pytest.raises(ValueError, match="already has gates"), Setting("x", gates=gates).applied(model):
        pass
