"""XAttention: mass of antidiagonals, and the rule that keeps a share of it."""

from __future__ import annotations

import pytest
import torch

import baseline_cases as cases
from seerattention import TopK, TopP
from seerattention.baselines import XAttention
from seerattention.baselines.prompt import Prompt


def brute_mass(stride, block):
    """Token pairs one by one, then a softmax over small tiles, then sums."""

    def mass(q, k, start):
        length = len(k)
        blocks, first = -(-length // block), start // block
        pairs = torch.zeros(blocks * block, blocks * block, dtype=torch.float64)
        pairs[start:length, :length] = q @ k.T
        tiles = blocks * block // stride
        z = torch.zeros(tiles, tiles, dtype=torch.float64)
        for u in range(stride):
            z += pairs[stride - 1 - u :: stride, u::stride]
        z /= stride
        found = torch.zeros(blocks - first, blocks, dtype=torch.float64)
        for a in range(tiles):
            if any(start <= t < length for t in range(a * stride, (a + 1) * stride)):
                shares = z[a, : a + 1].softmax(-1)
                for b in range(a + 1):
                    found[a * stride // block - first, b * stride // block] += shares[b]
        return found

    return mass


def brute_rule(stride, tau, block):
    def mask(q, k, start):
        mass, first = brute_mass(stride, block)(q, k, start), start // block
        kept = torch.zeros_like(mass, dtype=torch.bool)
        for row in range(len(mass)):
            own = first + row
            forced = {0, own}
            others = sorted(set(range(own)) - forced, key=lambda j: (-float(mass[row, j]), j))
            sum_kept = sum(float(mass[row, j]) for j in forced)
            kept[row, list(forced)] = True
            for j in others:
                if sum_kept >= tau * float(mass[row].sum()):
                    break
                kept[row, j] = True
                sum_kept += float(mass[row, j])
        return kept

    return mask


@pytest.mark.parametrize(("stride", "tau", "block"), [(8, 0.9, 64), (16, 0.7, 32), (4, 0.5, 32)])
def test_definition(stride, tau, block):
    cases.assert_definition(XAttention(stride, tau, block_size=block), brute_rule(stride, tau, block), sharp=2.0)


@pytest.mark.parametrize("stride", [4, 8, 16])
def test_mass(stride):
    cases.assert_scores(XAttention(stride, block_size=32), lambda *a: brute_mass(stride, 32)(*a).log(), sharp=2.0)


@pytest.mark.parametrize("policy", [TopK(0.4), TopP(0.8, last_blocks_dense=1)])
def test_policies(policy):
    selector = XAttention(8, policy=policy, block_size=32)
    cases.assert_every_case(selector, cases.brute_policy(lambda *a: brute_mass(8, 32)(*a).log(), policy))
    cases.assert_rowwise(selector)


def test_ends_of_tau():
    inputs = cases.make_inputs([300])
    assert XAttention(tau=1, block_size=32).select(inputs).density() == 1.0
    assert XAttention(tau=0, block_size=32).select(inputs).counts[0, 0].tolist() == [1] + [2] * 9


def test_a_row_sums_to_its_tiles():
    inputs = cases.make_inputs([300])
    mass = XAttention(8).mass(Prompt(0, inputs.q[0], inputs.k[0], 0.3, 64))
    torch.testing.assert_close(mass.sum(-1), torch.tensor([8.0, 8, 8, 8, 6]).expand(4, -1))


def test_few_scores_at_a_time(monkeypatch):
    cases.assert_few_at_a_time(monkeypatch, XAttention(tau=0.6))


def test_names():
    cases.assert_goes_round("xattention:stride=16:tau=0.95", XAttention(16, 0.95))
    cases.assert_goes_round("xattention:policy=top_k(0.1):block_size=128", XAttention(policy=TopK(0.1), block_size=128))


@pytest.mark.parametrize("options", [{"stride": 0}, {"stride": 24}, {"tau": 1.1}, {"tau": True}, {"block_size": 4}])
def test_bad_arguments(options):
    with pytest.raises(ValueError, match=f"XAttention: .*{next(iter(options))}"):
        XAttention(**options)


def test_bad_policy():
    with pytest.raises(TypeError, match="XAttention: policy must be a policy"):
        XAttention(policy="top_k")
