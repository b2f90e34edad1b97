"""Settings: checked values, JSON, the learning-rate schedule, and the verdict on layers that do not learn."""

from __future__ import annotations

import json

import pytest

from seerattention.distillation import DistillConfig, DistillHistory


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0.0),
        ("steps", 0),
        ("warmup", -1),
        ("weight_decay", -0.1),
        ("betas", (0.9, 1.0)),
        ("clip_norm", 0.0),
        ("rows", 0),
        ("rows", 1.5),
        ("rows", True),
        ("skip_rows", 1.0),
        ("last_rows", -1),
        ("reduction", "mean"),
        ("target", "mass"),
        ("target", ["max"]),
        ("accumulation", 0),
        ("eval_every", 0),
        ("eval_density", 0.0),
        ("min_improvement", 1.0),
        # Wrong types, and numbers that are none.
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("learning_rate", "1e-3"),
        pytest.param("learning_rate", 10**400, id="learning_rate-huge"),
        ("steps", True),
        ("steps", 2.0),
        ("steps", 1 << 70),
        ("warmup", 2.5),
        ("weight_decay", None),
        ("betas", 0.9),
        ("betas", "ab"),
        ("betas", (0.9, float("nan"))),
        ("clip_norm", "1"),
        ("rows", "0.5"),
        ("rows", float("nan")),
        ("skip_rows", False),
        ("reduction", ["row"]),
        ("accumulation", 1.0),
        ("seed", 0.5),
        ("eval_every", "2"),
        ("eval_density", True),
        ("min_improvement", None),
    ],
)
def test_wrong_values_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        DistillConfig(**{field: value})


def test_json_round_trip():
    config = DistillConfig(steps=7, rows=0.5, betas=(0.9, 0.95), clip_norm=None)
    assert DistillConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="batchsize"):
        DistillConfig.from_dict({"batchsize": 3})


def test_schedule_warms_up_and_decays_to_zero():
    config = DistillConfig(learning_rate=1.0, warmup=4)
    rates = [config.learning_rate_at(step, 20) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[12] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.02
    assert config.learning_rate_at(1000, None) == 1.0
    # A short run does not spend itself on the warm-up.
    assert DistillConfig(learning_rate=1.0, warmup=20).learning_rate_at(2, 4) == 1.0


def test_layers_that_do_not_learn_are_named():
    history = DistillHistory()
    for step in range(40):
        history.add_step({"layers.0": 1.0 / (1 + step), "layers.1": 1.0, "layers.2": 1.0 / (1 + step)}, 1e-3, 10)
    history.add_recall(0, {"layers.0": 0.5, "layers.1": 0.5, "layers.2": 0.5})
    history.add_recall(40, {"layers.0": 0.9, "layers.1": 0.6, "layers.2": 0.4})
    found = history.find_not_learning(min_improvement=0.02, warmup=20)
    assert set(found) == {"layers.1", "layers.2"}
    assert "loss" in found["layers.1"]
    assert "recall" in found["layers.2"]
    assert history.mean_recall() == pytest.approx((0.9 + 0.6 + 0.4) / 3)
    assert history.loss[0] == 1.0
    assert history.latest_numbers() == {}
    history.add_recall(50, {"layers.0": 0.9, "layers.1": 0.6, "layers.2": 0.4}, {"look_up": 0.5, "far": None})
    assert history.numbers == {"look_up": [None, None, 0.5], "far": [None, None, None]}  # one for each of recall_steps
    assert history.latest_numbers() == {"look_up": 0.5, "far": None}
    assert DistillHistory.from_dict(json.loads(json.dumps(history.to_dict()))) == history


@pytest.mark.parametrize(("last", "recall", "named"), [(0.01, 0.495, False), (0.01, 0.48, True), (0.8, 0.495, True)])
def test_a_layer_that_was_good_from_the_start_is_not_named(last, recall, named):
    history = DistillHistory()
    for step in range(40):
        history.add_step({"layers.0": 1.0 if step < 3 else last}, 1e-3, 10)
    history.add_recall(0, {"layers.0": 0.5})
    history.add_recall(40, {"layers.0": recall})
    assert bool(history.find_not_learning(min_improvement=0.02, warmup=20)) == named


def test_what_is_newer_than_a_state_is_not_in_its_settings():
    assert not {"phase", "last_rows", "target"} & DistillConfig().to_dict().keys()
    config = DistillConfig(last_rows=3, phase="decode", target="row_mass")
    assert config.to_dict()["last_rows"] == 3
    assert config.to_dict()["target"] == "row_mass"
    assert DistillConfig.from_dict(config.to_dict()) == config
