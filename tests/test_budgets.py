"""Budgets: the factor of a row, what comes of it, and the way through JSON."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seerattention.policies import Budget, Budgets, Dense, RelativeThreshold
from seerattention.policies.budget import check_densities, floor_of, least_blocks

CURVES = (
    Budget(0.1, (1, 64, 200), (0.05, 4.0, 1.5), min_blocks=2),
    Budget(0.2, (1, 64, 128, 300), (0.02, 2.0, 1.0, 0.5), min_blocks=4),
    Budget(0.4, (1, 64), (0.01, 1.0), min_blocks=4),
)
BUDGETS = Budgets(CURVES, default=0.2, tokens=16384, block_size=64)


def make_logits(num_rows, num_keys, batch=1, heads=2, seed=0):
    return torch.randn(batch, heads, num_rows, num_keys, generator=torch.Generator().manual_seed(seed)) * 2


def test_the_factor_is_interpolated_in_logarithms():
    budget = CURVES[1]
    assert [budget.factor(n) for n in (1, 64, 128, 300)] == pytest.approx([0.02, 2.0, 1.0, 0.5])
    assert budget.factor(1000) == 0.5
    assert budget.factor(8) == pytest.approx(0.02 * 100 ** (math.log(8) / math.log(64)))
    halfway = math.sqrt(64 * 128)
    assert budget.factor(halfway) == pytest.approx(math.sqrt(2))


@given(seed=st.integers(0, 99), num_keys=st.integers(1, 90))
@settings(max_examples=15, deadline=None)
def test_each_row_is_that_of_a_relative_threshold(seed, num_keys):
    """With the factor of the row, whichever rows of a sequence are asked for."""
    budget, logits = CURVES[0], make_logits(num_keys, num_keys, seed=seed)
    mask = budget.select(logits, block_size=64).to_mask()
    for row in {0, num_keys // 2, num_keys - 1}:
        policy = RelativeThreshold(budget.factor(row + 1), min_blocks=2, dense_rows=0)
        alone = policy.select(logits[:, :, : row + 1, : row + 1], block_size=64).to_mask()
        assert torch.equal(mask[:, :, row, : row + 1], alone[:, :, row])
    last = budget.select(logits[:, :, num_keys // 2 :], block_size=64).to_mask()
    assert torch.equal(last, mask[:, :, num_keys // 2 :])


def test_rows_behind_the_first_table():
    """Tables grow with the number of blocks, and hold the same for the rows before."""
    budget = CURVES[1]
    logits = make_logits(4, 1500)
    long = budget.select(logits, block_size=64).to_mask()
    short = budget.select(logits[:, :, :1, :1497], block_size=64).to_mask()
    assert torch.equal(long[:, :, :1, :1497], short)


def test_json_round_trip():
    assert Budgets.from_dict(json.loads(json.dumps(BUDGETS.to_dict()))) == BUDGETS
    with pytest.raises(ValueError, match="policies of kind 'budget'"):
        Budgets.from_dict({**BUDGETS.to_dict(), "curves": [{"kind": "top_k", "density": 0.1}]})


def test_policies_of_densities():
    assert BUDGETS.policy() == BUDGETS.policy(0.2) == CURVES[1]
    assert BUDGETS.policy(1) == Dense()
    between = BUDGETS.policy(0.14)
    assert isinstance(between, Budget)
    assert between.min_blocks == 2
    for n in (3, 64, 100, 128, 250, 600):
        share = math.log(1.4) / math.log(2)
        expected = CURVES[0].factor(n) ** (1 - share) * CURVES[1].factor(n) ** share
        assert between.factor(n) == pytest.approx(expected, rel=0.02)
    logits = make_logits(200, 200)
    found = [BUDGETS.policy(d).select(logits, block_size=64).density() for d in (0.1, 0.14, 0.2, 0.3, 0.4)]
    assert found == sorted(found)
    assert len(set(found)) == 5
    for wrong in (0.05, 0.41, 2):
        with pytest.raises(ValueError, match=r"from 0.1 to 0.4 .*, got .*seerattention.calibrate\("):
            BUDGETS.policy(wrong)


def test_the_shortest_prompts():
    """At least 4,096 tokens; at 6.4 blocks a row the floor and the sink leave some."""
    assert [least_blocks(d, 64) for d in (0.5, 0.2, 0.1, 0.05)] == [64, 64, 64, 128]
    assert least_blocks(0.2, 32) == 128
    assert BUDGETS.holds_from(0.05) == 8192
    assert [least_blocks(d, 64, 16384) for d in (0.5, 0.1, 0.02)] == [256, 256, 320]
    assert [floor_of(d, 64, 16384) for d in (0.5, 0.1, 0.05)] == [4, 4, 4]
    long = dataclasses.replace(BUDGETS, shortest=16384)
    assert long.holds_from(0.1) == 16384
    assert Budgets.from_dict(json.loads(json.dumps(long.to_dict()))) == long
    assert "shortest" not in BUDGETS.to_dict()  # as files were written before it could be said
    assert [floor_of(d, 64) for d in (0.5, 0.2, 0.14, 0.1, 0.05)] == [4, 4, 3, 2, 2]
    for density in (0.03, 0.05, 0.1, 0.2, 0.5):
        rows = least_blocks(density, 64)
        kept = (floor_of(density, 64) + 1) * rows  # with the sink
        assert kept < density * rows * (rows + 1) / 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"density": 1.0}, "between 0 and 1"),
        ({"density": float("nan")}, "finite"),
        ({"blocks": (1, 64)}, "a factor for each"),
        ({"blocks": (1, 64, 64)}, "must ascend"),
        ({"blocks": (0.5, 64, 200)}, "from 1 or more"),
        ({"factors": (1.0, 0.0, 1.0)}, "above 0"),
        ({"min_blocks": -1}, "min_blocks"),
    ],
)
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CURVES[0], **change)


def test_wrong_budgets_and_densities():
    with pytest.raises(ValueError, match="must ascend"):
        Budgets(CURVES[::-1], 0.2, 16384, 64)
    with pytest.raises(ValueError, match=r"from 0\.1 to 0\.4"):
        Budgets(CURVES, 0.5, 16384, 64)
    with pytest.raises(TypeError, match="sequence of numbers"):
        dataclasses.replace(CURVES[0], blocks="123")
    assert check_densities([0.2, 0.1]) == (0.1, 0.2)
    for wrong, kind in ((0.1, TypeError), ((), TypeError), ((0.1, 0.1), ValueError), ((0.0,), ValueError)):
        with pytest.raises(kind):
            check_densities(wrong)
