"""Lists of a selector in a model: order and repeats make no difference, and the future is not seen."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import seerattention as seer


def ordered(q, k, *, layer, scale, lengths):
    """Block 0, the diagonal and the block before it, one list per query head."""
    blocks = -(-q.shape[2] // 32)
    rows, columns = torch.arange(blocks)[:, None], torch.arange(blocks)
    mask = (columns == 0) | (columns == rows) | (columns == rows - 1)
    return seer.BlockIndices.from_mask(mask.expand(q.shape[0], q.shape[1], -1, -1), 32)


def untidy(q, k, **options):
    """The same sets: backward, with repeats, and with a block of the future."""
    blocks = ordered(q, k, **options)
    rows = torch.arange(blocks.num_rows, dtype=torch.int32).expand(blocks.counts.shape)[..., None]
    future = (rows + 1).clamp(max=blocks.num_key_blocks - 1)
    indices = torch.cat([future, rows, (rows - 1).clamp(min=0), rows * 0, rows, rows * 0], -1)
    return seer.BlockIndices(indices, torch.full_like(blocks.counts, 6), blocks.num_key_blocks, 32)


@torch.inference_mode()
def run(model, selector, ids, **inputs):
    seer.attach(model, selector=selector, min_context=0)
    found = []
    try:
        with seer.record(model) as stats, seer.observe(model, lambda inputs, blocks: found.append(blocks.density())):
            logits = model(ids, **inputs).logits
    finally:
        seer.detach(model)
    return logits, stats, found


@pytest.mark.parametrize("padded", [False, True])
def test_untidy_lists_give_what_tidy_ones_give(padded, model_of, ids_of):
    model, ids = model_of(), ids_of(200, batch=2)
    inputs = {}
    if padded:
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][0, :90] = 0
    expected, stats, densities = run(model, ordered, ids, **inputs)
    logits, untidy_stats, untidy_densities = run(model, untidy, ids, **inputs)
    torch.testing.assert_close(logits, expected)
    assert untidy_stats.density == pytest.approx(stats.density)
    assert untidy_stats.total_density == pytest.approx(stats.total_density)
    assert untidy_densities == pytest.approx(densities)
    assert 0 < stats.density < 1


def test_later_tokens_move_no_earlier_logits(model_of, ids_of):
    model, ids = model_of(), ids_of(200)
    other = ids.clone()
    other[:, 150:] = (other[:, 150:] + 1) % 10 + 3
    before, after = (run(model, untidy, x)[0] for x in (ids, other))
    torch.testing.assert_close(after[:, :150], before[:, :150])
    assert not torch.allclose(after[:, 150:], before[:, 150:])


def test_lists_of_a_selector_that_no_set_can_be_made_of(model_of, ids_of):
    def negative(q, k, **options):
        blocks = untidy(q, k, **options)
        blocks.indices[0, 0, 1, 2] = -1
        return blocks

    with pytest.raises(ValueError, match=r"indices\[0, 0, 1, 2\] is -1"):
        run(model_of(), negative, ids_of(200))


def test_a_policy_of_ones_own(model_of, ids_of):
    @dataclasses.dataclass(frozen=True)
    class Backward(seer.TopK):
        def select(self, logits, **options):
            blocks = super().select(logits, **options)
            blocks.indices.copy_(blocks.indices.flip(-1))
            blocks.counts.fill_(blocks.indices.shape[-1])
            blocks.indices.clamp_(0, blocks.num_key_blocks - 1)
            return blocks

    model, ids = model_of(), ids_of(200)
    torch.manual_seed(0)
    seer.attach(model, seer.GateConfig(block_size=32), prefill=Backward(0.4), min_context=0)
    with torch.inference_mode(), seer.record(model) as stats:
        found = []
        with seer.observe(model, lambda inputs, blocks: found.append(blocks.density())):
            model(ids)
    assert stats.density == pytest.approx(sum(found) / len(found))
