"""Mean correction against its definition, query by query in float64; blocks that hold one key; layouts; precision."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from helpers import (
    LIST_KINDS,
    assert_as_accurate_as,
    assert_lse_close,
    make_blocks,
    make_qkv,
    sdpa_with_means,
    token_mask,
)
from layouts import LAYOUTS, lay_out
from seerattention.ops import block_sparse_attention, mean_corrected_attention
from seerattention.ops.block_sparse_attention import mean_correction
from seerattention.ops.indices import BlockIndices

LENGTHS = [(1, 1), (31, 31), (64, 64), (65, 65), (200, 200), (1, 65), (37, 200), (130, 161)]


def brute(q, k, v, blocks, scale):
    """Each query by itself: its keys, and one more for each whole block before it that is not listed."""
    (batch, heads, queries, dim), (kv_heads, keys), size = q.shape, k.shape[1:3], blocks.block_size
    q, k, v = q.double(), k.double(), v.double()
    read = token_mask(blocks, queries, keys)
    out = torch.zeros(batch, heads, queries, dim, dtype=torch.float64)
    lse = torch.full((batch, heads, queries), -math.inf, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            mine_k, mine_v = k[b, h // (heads // kv_heads)], v[b, h // (heads // kv_heads)]
            mask = read[b, h // (heads // read.shape[1])]
            k_means, v_means = (x[: keys // size * size].unflatten(0, (-1, size)).mean(1) for x in (mine_k, mine_v))
            for i in range(queries):
                whole = (keys - queries + i + 1) // size
                unread = ~mask[i, : whole * size].unflatten(0, (whole, size)).any(-1)
                values = torch.cat([mine_v[mask[i]], v_means[:whole][unread]])
                logits = torch.cat([mine_k[mask[i]], k_means[:whole][unread]]) @ q[b, h, i] * scale
                logits[int(mask[i].sum()) :] += math.log(size)
                if len(logits):
                    out[b, h, i] = logits.softmax(0) @ values
                    lse[b, h, i] = logits.logsumexp(0)
    return out, lse


@pytest.mark.parametrize("kind", LIST_KINDS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_definition(lengths, kind, nan_filled_empty):
    q, k, v = make_qkv(*lengths, head_dim=16, seed=1)
    blocks = make_blocks(kind, q, k, 32)
    out, lse = mean_corrected_attention(q, k, v, blocks, scale=0.37, return_lse=True)
    exact, exact_lse = brute(q, k, v, blocks, 0.37)
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5)
    assert_lse_close(lse, exact_lse)
    assert torch.equal(mean_corrected_attention(q, k, v, blocks, scale=0.37), out)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 64), (4, 1, 64), (6, 2, 32), (2, 1, 128)])
def test_groups_and_block_sizes(heads, kv_heads, size, nan_filled_empty):
    q, k, v = make_qkv(150, 290, heads=heads, kv_heads=kv_heads, head_dim=16, batch=2)
    blocks = make_blocks("random", q, k, size)
    exact, _ = brute(q, k, v, blocks, 0.25)
    out = mean_corrected_attention(q, k, v, blocks)
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5)


def test_nothing_is_lost_where_the_keys_of_a_block_are_the_same():
    """Whatever is listed, it is dense attention then; without the correction it is not."""
    q, k, v = make_qkv(320, 320, head_dim=16)
    k = k[:, :, ::32].repeat_interleave(32, 2)
    own = BlockIndices.from_mask(torch.eye(10, dtype=torch.bool).expand(1, 4, 10, 10), 32)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(mean_corrected_attention(q, k, v, own), dense, rtol=1e-4, atol=1e-5)
    assert (block_sparse_attention(q, k, v, own) - dense).abs().max() > 0.1


def test_nothing_changes_where_everything_is_listed():
    q, k, v = make_qkv(200, 200)
    blocks = make_blocks("all", q, k)
    expected = block_sparse_attention(q, k, v, blocks)
    torch.testing.assert_close(mean_corrected_attention(q, k, v, blocks), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_precision(dtype, nan_filled_empty):
    q, k, v = make_qkv(130, 260, dtype=dtype)
    blocks = make_blocks("random", q, k)
    exact, _ = brute(q, k, v, blocks, 64**-0.5)
    out = mean_corrected_attention(q, k, v, blocks)
    assert_as_accurate_as(out, sdpa_with_means(q, k, v, blocks), exact)


def test_in_chunks_is_the_same(monkeypatch):
    q, k, v = make_qkv(130, 260, batch=2)
    blocks = make_blocks("random", q, k, 32)
    whole = mean_corrected_attention(q, k, v, blocks, return_lse=True)
    monkeypatch.setattr(mean_correction, "MAX_SCORES", 1)
    for a, b in zip(mean_corrected_attention(q, k, v, blocks, return_lse=True), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_a_batch_are_what_each_is_alone(layout, nan_filled_empty):
    lengths = [(130, 260), (33, 33), (1, 129), (64, 70)]
    rows = [tuple(x[0] for x in make_qkv(*pair, head_dim=16, seed=i)) for i, pair in enumerate(lengths)]
    made = lay_out(rows, layout)
    size = 32
    num_rows, num_keys = made.span.num_rows(size), made.span.num_key_blocks(size)
    mask = torch.zeros(len(rows), 4, num_rows, num_keys, dtype=torch.bool)
    alone = []
    for b, (q, k, v) in enumerate(rows):
        blocks = make_blocks("random", q[None], k[None], size, seed=b)
        here = blocks.to_mask()[0]
        mask[b, :, : here.shape[1], : here.shape[2]] = here
        alone.append(mean_corrected_attention(q[None], k[None], v[None], blocks, return_lse=True))
    blocks = BlockIndices.from_mask(mask, size, span=made.span)
    out, lse = mean_corrected_attention(made.q, made.k, made.v, blocks, return_lse=True)
    for b, (found, found_lse) in enumerate(zip(made.take(out), made.take(lse), strict=True)):
        torch.testing.assert_close(found, alone[b][0][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found_lse, alone[b][1][0], rtol=1e-4, atol=1e-5)
    assert (made.rest(out) == 0).all()
    assert (made.rest(lse) == -math.inf).all()


def test_inputs_are_checked_and_left_alone():
    q, k, v = make_qkv(100, 100)
    blocks = make_blocks("random", q, k)
    copies = [x.clone() for x in (q, k, v)]
    mean_corrected_attention(q, k, v, blocks)
    assert all(torch.equal(x, copy) for x, copy in zip((q, k, v), copies, strict=True))
    with pytest.raises(TypeError, match="BlockIndices"):
        mean_corrected_attention(q, k, v, blocks.to_mask())
    with pytest.raises(ValueError, match="implementation"):
        mean_corrected_attention(q, k, v, blocks, implementation="nothing")
    with pytest.raises(NotImplementedError):
        mean_corrected_attention(q.requires_grad_(), k, v, blocks)
