"""Numbers of what is kept of the true map: on a GPU what they are on the CPU, and what distillation shows there."""

from __future__ import annotations

import copy

import pytest
import torch

import seerattention as seer
from seerattention.baselines import Oracle, Random
from seerattention.measure import compare_recall, measure_recall
from seerattention.measure.kept import RECALLS
from tiny_models import make_ids, make_model


def model_of(dtype):
    torch.manual_seed(0)
    model = make_model("llama", dtype=dtype, head_dim=64)
    with torch.no_grad():
        for layer in model.model.layers:  # so that some queries look at single tokens
            layer.self_attn.q_proj.weight.mul_(12)
            layer.self_attn.k_proj.weight.mul_(12)
    return seer.attach(model, seer.GateConfig(), min_context=0)


def known(recall):
    return {name: value for name, value in recall.numbers().items() if value is not None}


def test_as_on_the_cpu():
    """What is drawn is the same on every device, so that only the maps differ, by rounding: of rows that are counted
    because a probability is above a limit, two a head may fall on its other side."""
    model, batches = model_of(torch.float32), [{"input_ids": make_ids(1000)}, {"input_ids": make_ids(640)}]
    choices = {"drawn": Random(0.3), "true": Oracle(seer.TopK(0.3)), "all": seer.Dense()}
    here = compare_recall(model, batches, choices)
    there = compare_recall(copy.deepcopy(model).cuda(), batches, choices)
    for name in choices:
        assert len(known(here[name])) > 10
        for layer, sums in here[name].heads.items():
            torch.testing.assert_close(there[name].heads[layer].cpu(), sums, rtol=0.02, atol=2.0)


def test_while_distilling():
    model, batch = model_of(torch.bfloat16).cuda(), {"input_ids": make_ids(2048)}
    history = seer.distill(model, [batch] * 3, seer.DistillConfig(steps=3), eval_batches=[batch])
    assert set(history.numbers) == set(RECALLS)
    expected = measure_recall(model, [batch], seer.TopK(0.1))
    latest = {name: value for name, value in history.latest_numbers().items() if value is not None}
    assert latest == pytest.approx(known(expected), abs=1e-3)
