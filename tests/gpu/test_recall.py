"""Numbers of what is kept of the true map: on a GPU what they are on the CPU, and what distillation shows there."""

from __future__ import annotations

import copy

import pytest
import torch

import seerattention as seer
from seerattention.baselines import Oracle, Random
from seerattention.measure import compare_recall, measure_recall
from seerattention.measure.kept import RECALLS, count_kept
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


def test_counts_as_on_the_cpu():
    """Of one map the same is counted on every device. Ties are drawn on purpose: sharp heads have many rows in which
    several blocks hold a probability of 1."""
    rows, columns = 40, 40
    own = torch.arange(rows)
    peaks = (torch.rand(2, 4, rows, columns) * 8).round() / 8
    masses = torch.rand(2, 4, rows, columns) * (torch.arange(columns) <= own[:, None])
    masses = masses / masses.sum(-1, keepdim=True)
    valid = own < torch.tensor([[40], [25]])
    there = [x.cuda() for x in (masses, peaks, torch.rand(2, 4, rows, columns) < 0.3, own, valid)]
    heads, bins = count_kept(*(x.cpu() for x in there), 64)
    found, found_bins = count_kept(*there, 64)
    torch.testing.assert_close(found.cpu(), heads, rtol=1e-6, atol=1e-6)
    assert (found_bins.cpu() - bins).abs().sum() <= 4  # shares at the border of two bins
    assert (heads[:, :, 1] > 0).all()


def test_a_model_as_on_the_cpu():
    """What is drawn is the same on every device, so that only the maps differ, by rounding. Shares of mass bear that;
    which block of a row is the highest, where several hold nearly everything, does not: nor what the oracle picks."""
    model, batches = model_of(torch.float32), [{"input_ids": make_ids(1000)}, {"input_ids": make_ids(640)}]
    choices = {"drawn": Random(0.3), "true": Oracle(seer.TopK(0.3)), "all": seer.Dense()}
    here = compare_recall(model, batches, choices)
    there = compare_recall(copy.deepcopy(model).cuda(), batches, choices)
    for name in choices:
        assert len(known(here[name])) > 10
        for number in ("block", "far", "far_mass", "worst_heads") if name != "true" else ():
            assert known(there[name])[number] == pytest.approx(known(here[name])[number], abs=0.02), (name, number)


def test_while_distilling():
    model, batch = model_of(torch.bfloat16).cuda(), {"input_ids": make_ids(2048)}
    history = seer.distill(model, [batch] * 3, seer.DistillConfig(steps=3), eval_batches=[batch])
    assert set(history.numbers) == set(RECALLS)
    expected = measure_recall(model, [batch], seer.TopK(0.1))
    latest = {name: value for name, value in history.latest_numbers().items() if value is not None}
    assert latest == pytest.approx(known(expected), abs=1e-3)
