"""SpargeAttention's rule: cosines pair by pair, and blocks one after the other."""

from __future__ import annotations

import pytest
import torch

import baseline_cases as cases
from seerattention.baselines import MeanPool, Sparge

BLOCK = 32


def cosines(x):
    """Mean over all pairs of tokens."""
    norms = x.norm(dim=-1)
    return min(float((x @ x.T / (norms[:, None] * norms)).mean()), 1.0)


def brute(tau, theta):
    def mask(q, k, start):
        length, first, blocks = len(k), start // BLOCK, -(-len(k) // BLOCK)
        mean = torch.stack([block.mean(0) for block in k.split(BLOCK)])
        smooth = (k - k.mean(0)).split(BLOCK)
        doubted = [cosines(block) <= theta for block in smooth]
        kept = torch.zeros(blocks - first, blocks, dtype=torch.bool)
        for i in range(first, blocks):
            here = q[max(i * BLOCK, start) - start : min((i + 1) * BLOCK, length) - start]
            if cosines(here) <= theta:
                kept[i - first] = True
                continue
            trusted = [j for j in range(i + 1) if not doubted[j]]
            kept[i - first] = torch.tensor(doubted)
            if trusted:
                shares = torch.stack([here.mean(0) @ mean[j] for j in trusted]).softmax(0).tolist()
                total, pairs = 0.0, zip(shares, trusted, strict=True)
                ranked = sorted(pairs, key=lambda pair: (-pair[0], pair[1]))
                for rank, (share, j) in enumerate(ranked):
                    total += share
                    if total <= tau or rank == 0:
                        kept[i - first, j] = True
        return kept

    return mask


@pytest.mark.parametrize(("tau", "theta"), [(0.9, -1.0), (0.5, 0.04), (0.0, 0.05)])
def test_definition(tau, theta):
    """Blocks of 32 directions that have nothing in common have a similarity of 1 / 32, those here a little more."""
    selector = Sparge(tau, theta, block_size=BLOCK)
    cases.assert_every_case(selector, brute(tau, theta), sharp=0.7, alike=0.3)
    cases.assert_padded_chunks(selector)


@pytest.mark.parametrize(("tau", "theta"), [(0.8, -1.0), (0.3, 0.033)])
def test_whether_it_looks_at_the_whole_prompt(tau, theta):
    cases.assert_rowwise(Sparge(tau, theta, block_size=BLOCK))


def test_where_all_are_trusted_it_is_mean_pooling():
    """The best blocks of mean pooling, as many as the rule takes of each row."""
    inputs = cases.make_inputs([320], sharp=0.7)
    mine = Sparge(0.6, -1.0, block_size=BLOCK).select(inputs).to_mask()
    scores = MeanPool(block_size=BLOCK).scores(inputs)
    own = torch.eye(10, dtype=torch.bool)
    scores = scores.masked_fill(~torch.ones(10, 10, dtype=torch.bool).tril(), -torch.inf)
    least = scores.masked_fill(~mine | own, torch.inf).amin(-1, keepdim=True)  # of what is kept beside the diagonal
    assert not (~mine & (scores > least)).any()
    assert mine.sum() < 0.9 * 4 * 55


def test_a_block_of_different_keys_is_read_by_all_and_one_of_different_queries_reads_all():
    inputs = cases.make_inputs([320], heads=2, kv_heads=1)
    generator = torch.Generator().manual_seed(3)
    directions = torch.randn(10, 16, generator=generator)
    k = directions.repeat_interleave(32, 0).add(0.01 * torch.randn(320, 16, generator=generator))[None, None].clone()
    q = k.repeat(1, 2, 1, 1)
    k[:, :, 96:128] = torch.randn(32, 16, generator=generator)
    q[:, 1, 256:288] = torch.randn(32, 16, generator=generator)
    mask = (
        Sparge(0.0, 0.6, block_size=BLOCK).select(cases.LayerInputs(**dict(vars(inputs), q=q, k=k, v=k))).to_mask()[0]
    )
    assert mask[:, 3:, 3].all()
    assert mask[1, 8, :9].all()
    others = mask.clone()
    others[:, :, 3], others[1, 8] = False, False
    assert others.sum(-1).max() <= 2  # the best, and the diagonal


def test_names():
    cases.assert_goes_round("sparge:tau=0.9:theta=0.5", Sparge(0.9, 0.5))


@pytest.mark.parametrize("options", [{"tau": 1.1}, {"theta": -2}, {"block_size": 48}])
def test_bad_arguments(options):
    with pytest.raises(ValueError, match=f"Sparge: {next(iter(options))} must be"):
        Sparge(**options)
