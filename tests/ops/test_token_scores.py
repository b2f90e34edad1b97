"""encode_tokens and token_scores: the kernels against the float32 reference, and the reference against loops."""

from __future__ import annotations

import math

import pytest
import torch

from seerattention.ops.dispatch import triton_importable, triton_interpreted
from seerattention.ops.token_scores import encode_tokens, token_scores

needs_interpreter = pytest.mark.skipif(
    not (triton_importable() and triton_interpreted()), reason="needs triton and TRITON_INTERPRET=1"
)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_query(batch=2, heads=4, groups=2, tokens=1, head_dim=12, width=16, rotary=16, tables=1, norm=True):
    q = draw(batch, tokens, heads, head_dim).transpose(1, 2)  # any strides with a contiguous last dimension
    linear = draw(heads // groups, groups * head_dim, width, seed=1) * (groups * head_dim) ** -0.5
    angles = 6 * draw(tables, tokens, rotary, seed=2)
    table = (angles.cos(), angles.sin()) if rotary else (None, None)
    return q, linear, 1 + draw(width, seed=3) if norm else None, *table


def encoded_by_hand(q, linear, norm, cos, sin):
    """float64, one vector at a time."""
    q, linear = q.double(), linear.double()
    batch, _, tokens, _ = q.shape
    heads, _, width = linear.shape
    group = q.shape[1] // heads
    out = torch.zeros(batch, heads, tokens, width, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for t in range(tokens):
                x = torch.cat([q[b, h * group + g, t] for g in range(group)]) @ linear[h]
                if norm is not None:
                    x = x / ((x * x).mean() + 1e-6).sqrt() * norm.double()
                if cos is not None:
                    row = min(b, len(cos) - 1)
                    step = max(1, cos.shape[-1] // width)
                    c, s = cos[row, t, ::step].double(), sin[row, t, ::step].double()
                    half = len(c) // 2
                    turned, other = x[: 2 * half].clone(), torch.cat((-x[half : 2 * half], x[:half]))
                    x[: 2 * half] = turned * c + other * s
                out[b, h, t] = x
    return out


QUERIES = {
    "published": {},
    "each_head": {"groups": 1},
    "without_norm": {"norm": False},
    "without_rope": {"rotary": 0},
    "partial": {"rotary": 8},
    "narrow": {"rotary": 32},
    "tables": {"tables": 2, "tokens": 5},
    "odd": {"heads": 6, "groups": 3, "head_dim": 20, "width": 24, "rotary": 24, "tokens": 3},
    "wide": {"head_dim": 128, "width": 128, "rotary": 128},
}


@pytest.mark.parametrize("options", QUERIES.values(), ids=QUERIES)
def test_the_reference_encodes_as_defined(options):
    inputs = make_query(**options)
    expected = encoded_by_hand(*inputs)
    torch.testing.assert_close(encode_tokens(*inputs).double(), expected, rtol=1e-5, atol=1e-5)


@needs_interpreter
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("options", QUERIES.values(), ids=QUERIES)
def test_the_kernel_encodes_as_defined(options, dtype, nan_filled_empty):
    inputs = make_query(**options)
    rounded = [None if x is None else x.to(dtype) for x in inputs[:3]]
    expected = encoded_by_hand(*rounded, *inputs[3:])
    found = encode_tokens(*rounded, *inputs[3:], implementation="triton")
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@needs_interpreter
def test_queries_are_rounded_to_the_dtype_of_the_gate(nan_filled_empty):
    q, linear, norm, cos, sin = make_query()
    found = encode_tokens(q, linear.half(), norm, cos, sin, implementation="triton")
    expected = encoded_by_hand(q.half(), linear.half(), norm, cos, sin)
    torch.testing.assert_close(found.double(), expected, rtol=4e-3, atol=4e-3)


def scores_by_hand(queries, keys, columns, parts, scale, together):
    """float64, one block at a time."""
    batch, heads, tokens, _ = queries.shape
    kv_heads, num = keys.shape[1], keys.shape[2] // parts
    out = torch.full((batch, kv_heads, 1, columns), -math.inf, dtype=torch.float64)
    group = heads // kv_heads
    for b in range(batch):
        for h in range(kv_heads):
            rows = []
            for t in range(tokens):
                vectors = queries[b, h * group : (h + 1) * group, t].double()
                rows.append([
                    float((vectors @ keys[b, h, n * parts : (n + 1) * parts].double().T).max()) * scale
                    for n in range(num)
                ])  # fmt: skip
            if together:
                rows = [[x - math.log(sum(math.exp(y) for y in row)) for x in row] for row in rows]
            for n in range(num):
                out[b, h, 0, n] = max(row[n] for row in rows)
    return out


ROWS = {
    "published": {},
    "none": {"count": 0, "columns": 1},
    "left_over": {"count": 37, "parts": 4, "columns": 10},
    "each_head": {"heads": 8, "kv_heads": 2, "count": 40, "parts": 8, "columns": 6},
    "groups_of_seven": {"heads": 7, "kv_heads": 1, "count": 130, "columns": 131},
    "window": {"tokens": 8, "together": True, "heads": 4, "kv_heads": 2, "count": 50, "parts": 2, "columns": 26},
    "long_window": {"tokens": 64, "together": True, "count": 70, "columns": 71},
    "window_of_one": {"tokens": 1, "together": True, "count": 9, "columns": 9},
    "window_none": {"tokens": 3, "together": True, "count": 1, "parts": 2, "columns": 2},
    "long": {"count": 600, "columns": 601, "tokens": 2, "together": True, "width": 64},
    "wide": {"width": 200, "count": 20, "columns": 20},
}


def make_row(heads=2, kv_heads=2, tokens=1, count=70, width=16, columns=70, parts=1, together=False, batch=2):
    queries = draw(batch, tokens, heads, width).transpose(1, 2)
    keys = draw(batch, kv_heads, count + 9, width, seed=1)[:, :, :count]  # a state has room to grow
    return queries, keys, {"columns": columns, "parts": parts, "scale": 0.3, "together": together}


@pytest.mark.parametrize("options", ROWS.values(), ids=ROWS)
def test_the_reference_scores_as_defined(options):
    queries, keys, how = make_row(**options)
    expected = scores_by_hand(queries, keys, **how)
    torch.testing.assert_close(token_scores(queries, keys, **how).double(), expected, rtol=1e-5, atol=1e-5)


@needs_interpreter
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("options", ROWS.values(), ids=ROWS)
def test_the_kernels_score_as_defined(options, dtype, nan_filled_empty):
    queries, keys, how = make_row(**options)
    queries, keys = queries.to(dtype), keys.to(dtype)
    expected = scores_by_hand(queries, keys, **how)
    found = token_scores(queries, keys, **how, implementation="triton")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)  # products are of exact 16-bit numbers


def test_wrong_arguments():
    q, linear, norm, cos, sin = make_query()
    with pytest.raises(ValueError, match=r"linear must be \[H, 4 / H \* 12, W\]"):
        encode_tokens(q, linear[:, :-1], norm, cos, sin)
    with pytest.raises(ValueError, match=r"norm must be \[16\]"):
        encode_tokens(q, linear, norm[:-1], cos, sin)
    with pytest.raises(ValueError, match="pass both cos and sin"):
        encode_tokens(q, linear, norm, cos)
    with pytest.raises(ValueError, match="fits no vectors of width 16"):
        encode_tokens(q, linear, norm, *2 * (torch.zeros(1, 1, 24),))
    with pytest.raises(TypeError, match="float64"):
        encode_tokens(q.double(), linear, norm, cos, sin)
    queries, keys, how = make_row()
    with pytest.raises(ValueError, match="do not fit into 69 columns"):
        token_scores(queries, keys, **{**how, "columns": 69})
    with pytest.raises(ValueError, match="several together"):
        token_scores(queries.repeat(1, 1, 2, 1), keys, **how)
    with pytest.raises(ValueError, match="not a multiple of 2 KV heads"):
        token_scores(queries[:, :1], keys, **how)
    with pytest.raises(TypeError, match="float16"):
        token_scores(queries.half(), keys, **how)
