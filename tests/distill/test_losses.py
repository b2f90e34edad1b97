"""The KL loss against its definition, its gradient, and the choice of rows."""

from __future__ import annotations

import math

import pytest
import torch

from seerattention.blocks import causal_block_mask
from seerattention.distillation.losses import draw_rows, kl_count, kl_sum


def _case(batch=2, heads=3, blocks=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    causal = causal_block_mask(blocks, blocks)
    logits = torch.randn(batch, heads, blocks, blocks, generator=generator).masked_fill(~causal, float("-inf"))
    target = torch.rand(batch, heads, blocks, blocks, generator=generator) * causal
    return logits, target / target.sum(-1, keepdim=True)


def test_value_is_the_sum_over_rows_of_the_kl_divergence():
    logits, target = _case()
    expected = 0.0
    for b in range(2):
        for h in range(3):
            for i in range(5):
                p = target[b, h, i, : i + 1].double()
                q = logits[b, h, i, : i + 1].double().softmax(-1)
                expected += float((p * (p / q).log()).sum())
    assert kl_sum(logits, target).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("masked", [float("-inf"), torch.finfo(torch.float32).min])
def test_gradient_is_softmax_minus_target(masked):
    logits, target = _case()
    causal = causal_block_mask(5, 5)
    logits = logits.masked_fill(~causal, masked).requires_grad_()
    kl_sum(logits, target).backward()
    expected = torch.where(causal, logits.detach().softmax(-1) - target, torch.zeros(()))
    torch.testing.assert_close(logits.grad, expected, rtol=1e-5, atol=1e-6)


def test_invalid_rows_do_not_count_even_when_not_finite():
    logits, target = _case()
    valid = torch.ones(2, 5, dtype=torch.bool)
    valid[1, 3:] = False
    expected = kl_sum(logits[:1], target[:1]) + kl_sum(logits[1:, :, :3], target[1:, :, :3])
    target[1, :, 3:] = 0.0
    assert kl_sum(logits, target, valid).item() == pytest.approx(expected.item(), rel=1e-6)
    target[1, :, 3:] = float("nan")
    assert kl_sum(logits, target, valid).item() == pytest.approx(expected.item(), rel=1e-6)


def test_nan_is_not_hidden():
    logits, target = _case()
    for bad in ("logits", "target"):
        values = {"logits": logits.clone(), "target": target.clone()}
        values[bad][0, 0, 2, 1] = float("nan")
        assert math.isnan(kl_sum(**values).item())


def test_shapes_must_agree():
    logits, target = _case()
    with pytest.raises(ValueError, match="same shape"):
        kl_sum(logits, target[:, :1])


def test_counts():
    assert kl_count(6, 4, 10, "row") == 24
    assert kl_count(6, 4, 10, "official") == 240


def test_rows_are_drawn_from_what_is_not_skipped():
    assert draw_rows(8, None, 0.25, 0, 0).tolist() == [2, 3, 4, 5, 6, 7]
    assert draw_rows(5, None, 0.25, 0, 0).tolist() == [1, 2, 3, 4]
    assert draw_rows(1, 0.1, 0.25, 0, 0).tolist() == [0]
    seen = set()
    for draw in range(60):
        rows = draw_rows(16, 0.25, 0.25, 3, draw).tolist()
        assert len(rows) == 3
        assert rows == sorted(set(rows))
        assert min(rows) >= 4
        assert max(rows) < 16
        seen.update(rows)
    assert seen == set(range(4, 16))
    assert draw_rows(16, 100, 0.0, 0, 0).tolist() == list(range(16))


def test_the_last_rows_are_always_among_them():
    others = set()
    for draw in range(40):
        rows = draw_rows(16, 6, 0.25, 3, draw, last_rows=2).tolist()
        assert rows == sorted(set(rows))
        assert len(rows) == 6
        assert rows[-2:] == [14, 15]
        others.update(rows[:-2])
    assert others == set(range(4, 14))
    assert draw_rows(16, 2, 0.25, 3, 0, last_rows=5).tolist() == [14, 15]
    assert draw_rows(16, None, 0.5, 3, 0, last_rows=5).tolist() == list(range(8, 16))


def test_rows_depend_on_seed_and_draw_only():
    first = draw_rows(64, 8, 0.0, 7, 11)
    torch.manual_seed(123)
    assert torch.equal(draw_rows(64, 8, 0.0, 7, 11), first)
    assert not torch.equal(draw_rows(64, 8, 0.0, 7, 12), first)
    assert not torch.equal(draw_rows(64, 8, 0.0, 8, 11), first)
