"""Factors by layer: what a policy of them chooses, how they are found, and that they hold a density."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

import seerattention as seer
from seerattention.hf.state import state_of
from seerattention.measure.calibrate import readings
from seerattention.measure.layers import _multipliers, fit_layers
from seerattention.measure.output import DenseOutput
from seerattention.policies import Budget, Budgets, RelativeThreshold, policy_from_dict
from tiny_models import attach, logits_of, make_ids, make_model

LENGTH = 4096
POLICIES = [
    RelativeThreshold(0.8, min_blocks=2, dense_rows=2, layers=(0.4, 2.5)),
    RelativeThreshold(0.3, min_blocks=2, dense_rows=2, exponent=0.5, layers=(0.4, 2.5)),
    Budget(0.3, blocks=(2.0, 9.0), factors=(0.5, 1.5), layers=(0.4, 2.5)),
]


def sharp_model(**options):
    """Whose gates tell blocks apart."""
    model = attach(make_model("llama", **options))
    for layer in state_of(model).layers:
        for parameter in layer.gate.parameters():
            parameter.data.mul_(6)
    return model


def alone(policy, layer):
    """The same in one layer, without numbers of layers."""
    times = policy.layers[layer]
    if isinstance(policy, Budget):
        return replace(policy, factors=tuple(factor * times for factor in policy.factors), layers=())
    return replace(policy, factor=policy.factor * times, layers=())


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_each_layer_is_as_with_a_policy_of_its_own(policy):
    model, ids = sharp_model(), make_ids(700)
    seer.set_policy(model, policy)
    with seer.record(model) as stats:
        found = logits_of(model, ids)
    assert stats.per_layer[0] > 1.3 * stats.per_layer[1]
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        parts = [model(input_ids=part, past_key_values=cache).logits for part in ids.split(256, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), found, rtol=1e-3, atol=5e-3)
    seer.set_policy(model, seer.TopK(0.5), layers={i: alone(policy, i) for i in range(2)})
    torch.testing.assert_close(logits_of(model, ids), found, rtol=0, atol=0)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_json_round_trip(policy):
    assert policy_from_dict(policy.to_dict()) == policy
    assert "layers" not in replace(policy, layers=()).to_dict()
    budgets = Budgets((Budget(0.1, (2.0, 9.0), (1.5, 3.0)), Budget(0.3, (2.0, 9.0), (0.5, 1.5))), 0.3, 4096, 32)
    assert "layers" not in budgets.to_dict()
    by_layer = replace(budgets, layers=(0.4, 2.5))
    assert Budgets.from_dict(by_layer.to_dict()) == by_layer
    for density in (0.1, 0.2, 0.3):
        assert by_layer.policy(density) == replace(budgets.policy(density), layers=(0.4, 2.5))


def test_what_is_wrong_with_layers():
    with pytest.raises(ValueError, match="layers must be above 0, got 0"):
        RelativeThreshold(1.0, layers=(1.0, 0.0))
    with pytest.raises(TypeError, match="layers must be a sequence"):
        RelativeThreshold(1.0, layers=2.0)
    with pytest.raises(ValueError, match="factor of 0 keeps everything"):
        RelativeThreshold(0.0, layers=(1.0, 2.0))
    policy = POLICIES[0]
    with pytest.raises(ValueError, match="not the same in all layers"):
        policy.select(torch.zeros(1, 1, 4, 4), block_size=32)
    with pytest.raises(ValueError, match="models of 2 layers, and this is layer 2"):
        policy.of_layer(2)
    wrong = replace(policy, layers=(1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match="numbers for 3 layers, and this model has 2"):
        seer.attach(make_model("llama"), seer.GateConfig(), prefill=wrong)
    with pytest.raises(ValueError, match="numbers for 3 layers, and this model has 2"):
        seer.set_policy(sharp_model(), wrong)
    decodes = seer.GateConfig(prefill=None, decode=seer.DecodeGateConfig())
    with pytest.raises(ValueError, match="factors by layer are for prompts"):
        seer.attach(make_model("llama"), decodes, decode=policy)


def test_the_numbers_follow_from_what_a_block_is_worth():
    assert _multipliers({0: 4.0, 1: 1.0}, 2) == pytest.approx((0.5**0.5, 2**0.5))
    assert _multipliers({1: 1.0, 2: 4.0}, 3) == pytest.approx((1.0, 2**0.5, 0.5**0.5))  # the first has no gate
    assert _multipliers({0: -1.0, 1: 0.0}, 2) == (1.0, 1.0)
    assert _multipliers({}, 2) == (1.0, 1.0)
    least = _multipliers({0: 1e9, 1: 1.0}, 2)  # bounded
    assert least[1] / least[0] == pytest.approx(math.exp(1.4))


def test_a_layer_that_says_nothing_gets_few_blocks():
    model = sharp_model(num_hidden_layers=3)
    model.model.layers[1].self_attn.o_proj.weight.data.zero_()
    prompts = [{"input_ids": make_ids(1000, seed=3)}]
    seer.set_policy(model, RelativeThreshold(1.2, min_blocks=2, dense_rows=2))
    found = fit_layers(model, prompts)
    assert found[1] == max(found)
    assert found[1] > 3 * min(found)
    assert state_of(model).policy == RelativeThreshold(1.2, min_blocks=2, dense_rows=2)


@torch.no_grad()
def test_dense_attention_changes_nothing():
    model = sharp_model()
    mask = torch.ones(2, 300, dtype=torch.int64)
    mask[1, 200:] = 0
    padded = {"input_ids": make_ids(300, seed=2, batch=2), "attention_mask": mask}
    output = DenseOutput(model, [{"input_ids": make_ids(300, seed=1)}, padded])
    seer.set_policy(model, seer.TopK(1.0))
    loss, seen = output.changed()
    assert seen.per_layer[1] == 1
    assert abs(loss) < 1e-6
    seer.set_policy(model, seer.TopK(0.2))
    loss, seen = output.changed()
    assert 0.2 < seen.per_layer[1] < 0.5
    assert loss > 1e-4


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("granite", {"logits_scaling": 8.0}), ("gemma3_text", {"final_logit_softcapping": 5.0})],
)
@torch.no_grad()
def test_what_is_compared_is_what_the_model_says(family, changes):
    model = attach(make_model(family))
    for name, value in changes.items():
        setattr(model.config, name, value)
        if hasattr(model, name):
            setattr(model, name, value)
    output = DenseOutput(model, [{"input_ids": make_ids(200)}])
    ((states, _),) = output.dense
    with seer.dense(model):
        said = model(input_ids=make_ids(200)).logits.float().log_softmax(-1)
    torch.testing.assert_close(output.head(states), said, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_what_was_in_force(error):
    """In the middle of the layers, and in the fit that follows: budgets for all layers alike are there to use."""
    policy, own = RelativeThreshold(1.2, min_blocks=2, dense_rows=2), seer.TopK(0.5)
    model, prompts = sharp_model(), [{"input_ids": make_ids(500)}]
    seer.set_policy(model, policy, layers={1: own})
    calls = []

    def fail(module, *_):
        calls.append(module)
        if len(calls) == 4:
            raise error("stop")

    hook = model.model.register_forward_hook(fail)
    with pytest.raises(error, match="stop"):
        fit_layers(model, prompts)
    assert state_of(model).policy == policy
    assert [layer.policy for layer in state_of(model).layers] == [None, own]
    calls.clear()
    with pytest.raises(error, match="stop"):
        seer.calibrate(model, [make_ids(LENGTH)], densities=(0.3,), by_layer=True)
    hook.remove()
    budgets = state_of(model).budgets
    assert budgets.layers == ()
    assert state_of(model).policy == budgets.policy()
    assert [layer.policy for layer in state_of(model).layers] == [None, None]


def test_prompts_that_are_dense_anyway_say_nothing_of_layers():
    model = seer.attach(make_model("llama"), seer.GateConfig(), min_context=10_000)
    seer.set_policy(model, RelativeThreshold(1.0))
    with pytest.warns(UserWarning, match="no factors by layer were fitted.*min_context=0"):
        assert fit_layers(model, [{"input_ids": make_ids(300)}]) == ()


def test_numbers_that_are_not_finite_are_an_error():
    model = sharp_model()
    seer.set_policy(model, RelativeThreshold(1.0))
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(ValueError, match="not finite on these prompts"):
        fit_layers(model, [{"input_ids": make_ids(300)}])


def test_budgets_by_layer_hold_the_density_and_are_kept(tmp_path):
    model = sharp_model()
    model.model.layers[0].self_attn.o_proj.weight.data.zero_()
    budgets = seer.calibrate(model, [make_ids(LENGTH, seed=7)], densities=(0.1, 0.3), by_layer=True)
    assert budgets.layers[0] > 1 > budgets.layers[1]
    assert state_of(model).policy == budgets.policy(0.3)
    for density in (0.1, 0.2, 0.3):
        seer.set_policy(model, density=density)
        with seer.record(model) as stats:
            logits_of(model, make_ids(LENGTH, seed=1))
        assert 0.88 * density < float(stats.total_density) < 1.05 * density
        assert stats.per_layer[0] < stats.per_layer[1]
    seer.save_gates(model, tmp_path)
    assert f"| {budgets.layers[0]:.2f}, {budgets.layers[1]:.2f} |" in (tmp_path / "README.md").read_text()
    other = seer.attach(make_model("llama"), tmp_path, density=0.2, min_context=0)
    assert state_of(other).policy == budgets.policy(0.2)


@pytest.mark.parametrize("by_layer", [False, True])
def test_each_reading_of_a_prompt_is_told(by_layer):
    model, told = sharp_model(), []
    prompts = [make_ids(LENGTH, seed=seed) for seed in (1, 2)]
    seer.calibrate(model, prompts, densities=(0.3,), by_layer=by_layer, advance=told.append)
    assert told == [1] * 2 * readings(model, by_layer=by_layer)
    assert len(told) == 2 * (2 + (3 + 2 * 2) * by_layer)


def test_a_single_factor_by_layer():
    model, ids = sharp_model(), [make_ids(2000, seed=7)]
    policy = RelativeThreshold(1.0, min_blocks=2, dense_rows=2)
    found = seer.calibrate(model, ids, density=0.2, policy=policy, by_layer=True)
    assert len(found.layers) == 2
    assert state_of(model).policy == found
    with seer.record(model) as stats:
        logits_of(model, ids[0])
    assert 0.19 < float(stats.total_density) < 0.21
    with pytest.raises(ValueError, match="a Threshold is the same in all layers"):
        seer.calibrate(model, ids, density=0.2, by_layer=True)


def test_what_layers_cannot_be_fitted_for():
    model = sharp_model()
    seer.set_policy(model, seer.TopK(0.3))
    with pytest.raises(ValueError, match="for a Budget or a RelativeThreshold"):
        fit_layers(model, [{"input_ids": make_ids(300)}])
    seer.set_policy(model, RelativeThreshold(1.0))
    with pytest.raises(ValueError, match="has no LM head"):
        fit_layers(model.model, [{"input_ids": make_ids(300)}])
