"""Random draws uniformly, as many blocks as asked, and the same ones again."""

from __future__ import annotations

import math

import pytest
import torch

import baseline_cases as cases
from seerattention.baselines import Random


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_counts_diagonal_and_first_block(density):
    selector = Random(density, block_size=32)
    given = [cases.make_inputs(lengths, heads=6) for lengths in cases.WHOLE]
    given += [cases.make_inputs([length], heads=6, start=start) for length, start in cases.CHUNKS]
    for inputs in given:
        mask = selector.select(inputs).to_mask()
        for b in range(len(mask)):
            length = inputs.k.shape[2] if inputs.lengths is None else int(inputs.lengths[b])
            first = (inputs.k.shape[2] - inputs.q.shape[2]) // 32
            for i in range(first, -(-length // 32)):
                kept = mask[b, :, i - first]
                assert kept.sum(-1).tolist() == [max(1, math.ceil(density * (i + 1) - 1e-9))] * 6
                assert kept[:, i].all()
                assert kept[:, 0].all() or int(kept.sum()) == 6
            assert not mask[b, :, -(-length // 32) - first :].any()


def test_every_other_block_is_as_likely():
    drawn = torch.zeros(20)
    for layer in range(200):
        inputs = cases.make_inputs([20 * 32], heads=8, dim=1, layer=layer)
        drawn += Random(0.25, block_size=32).select(inputs).to_mask()[0, :, -1].float().sum(0)
    share = drawn[1:-1] / 1600
    assert drawn[0] == drawn[-1] == 1600
    # 3 of 18 others; four standard deviations of a share of 1600 draws
    torch.testing.assert_close(share, torch.full((18,), 3 / 18), rtol=0, atol=4 * math.sqrt(3 / 18 * 15 / 18 / 1600))


def test_what_the_draw_depends_on():
    def mask(seed=0, **options):
        return Random(0.4, seed, block_size=32).select(cases.make_inputs([600], **options)).to_mask()

    first = mask()
    assert torch.equal(first, mask(sharp=2.0))
    assert not torch.equal(first, mask(seed=1))
    assert not torch.equal(first, mask(layer=1))
    assert not torch.equal(first[:, 0], first[:, 1])
    chunk = Random(0.4, block_size=32).select(cases.make_inputs([600], start=320)).to_mask()
    assert torch.equal(chunk, first[:, :, 10:])
    cases.assert_rowwise(Random(0.4, block_size=32))
    cases.assert_padded_chunks(Random(0.4, block_size=32))


def test_names():
    cases.assert_goes_round("random:density=0.2:seed=7", Random(0.2, 7))


@pytest.mark.parametrize("options", [{"density": 1.5}, {"density": 0}, {"seed": -1}, {"block_size": 48}])
def test_bad_arguments(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Random(**options)
