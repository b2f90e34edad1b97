"""Arbitrary block lists, as somebody outside of the package might make them, and what attention over them must be."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import strategies as st

from helpers import assert_lse_close, make_qkv
from seerattention.ops import block_sparse_attention
from seerattention.ops.indices import BlockIndices


class ListCase(NamedTuple):
    """Shapes of a call, and ``lists[b][h][row]``: key blocks in any order, some more than once, some of the future."""

    query_length: int
    key_length: int
    heads: int
    kv_heads: int
    block_size: int
    capacity: int
    lists: list[list[list[list[int]]]]

    def blocks(self, device="cpu"):
        """As BlockIndices; what lies past the counts is garbage."""
        batch, heads, rows = len(self.lists), len(self.lists[0]), len(self.lists[0][0])
        indices = torch.full((batch, heads, rows, self.capacity), -(1 << 20), dtype=torch.int32)
        indices[..., ::2] = 1 << 20
        counts = torch.zeros(batch, heads, rows, dtype=torch.int32)
        for b in range(batch):
            for h in range(heads):
                for row, entries in enumerate(self.lists[b][h]):
                    indices[b, h, row, : len(entries)] = torch.tensor(entries, dtype=torch.int32)
                    counts[b, h, row] = len(entries)
        num_key_blocks = -(-self.key_length // self.block_size)
        return BlockIndices(indices.to(device), counts.to(device), num_key_blocks, self.block_size)

    def sets(self):
        """The causal blocks on each list, ``[b][h][row]``."""
        first = (self.key_length - self.query_length) // self.block_size
        return [
            [[{block for block in entries if block <= first + row} for row, entries in enumerate(head)] for head in one]
            for one in self.lists
        ]

    def density(self):
        """Over the causal blocks of all rows."""
        first = (self.key_length - self.query_length) // self.block_size
        heads = [head for one in self.sets() for head in one]
        return sum(len(row) for head in heads for row in head) / sum(
            first + row + 1 for head in heads for row in range(len(head))
        )


@st.composite
def list_cases(draw, block_sizes=(32, 64), most_keys=200):
    """Cases small enough for interpreted kernels: odd lengths, queries that are a part of the keys, groups of heads,
    lists of KV heads, empty rows, lists without room."""
    block_size = draw(st.sampled_from(block_sizes))
    key_length = draw(st.integers(1, most_keys))
    query_length = draw(st.integers(1, key_length))
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 1), (2, 2)]))
    shared = draw(st.booleans())
    num_keys = -(-key_length // block_size)
    rows = num_keys - (key_length - query_length) // block_size
    capacity = draw(st.integers(0, num_keys + 2))
    one = st.lists(st.integers(0, num_keys - 1), max_size=capacity)
    lists = [
        [[draw(one) for _ in range(rows)] for _ in range(kv_heads if shared else heads)]
        for _ in range(draw(st.integers(1, 2)))
    ]
    return ListCase(query_length, key_length, heads, kv_heads, block_size, capacity, lists)


def brute_force(case, q, k, v):
    """Attention in float64, one query at a time, over exactly the keys that it may see; and its log-sum-exp."""
    sets, offset = case.sets(), case.key_length - case.query_length
    first, size = offset // case.block_size, case.block_size
    out = torch.zeros(q.shape, dtype=torch.float64)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=torch.float64)
    q, k, v = (x.cpu().double() for x in (q, k, v))
    for b, one in enumerate(sets):
        for h in range(case.heads):
            kv, lists = h * case.kv_heads // case.heads, one[h * len(one) // case.heads]
            for i in range(case.query_length):
                seen = [key for key in range(offset + i + 1) if key // size in lists[(offset + i) // size - first]]
                if seen:
                    scores = k[b, kv, seen] @ q[b, h, i] * q.shape[-1] ** -0.5
                    lse[b, h, i] = scores.logsumexp(0)
                    out[b, h, i] = scores.softmax(0) @ v[b, kv, seen]
    return out, lse


# Largest error of out, of values of about 1: a product with half-precision probabilities, or float32 throughout.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def check_lists(implementation, case, *, head_dim=16, dtype=torch.float32, device="cpu", with_lse=True):
    """One implementation on one case against :func:`brute_force`; what the lists say of themselves, too."""
    q, k, v = make_qkv(
        case.query_length,
        case.key_length,
        heads=case.heads,
        kv_heads=case.kv_heads,
        head_dim=head_dim,
        batch=len(case.lists),
        dtype=dtype,
        device=device,
    )
    blocks = case.blocks(device)
    before = blocks.indices.clone(), blocks.counts.clone()
    result = block_sparse_attention(q, k, v, blocks, return_lse=with_lse, implementation=implementation)
    out = result[0] if with_lse else result
    expected, expected_lse = brute_force(case, q, k, v)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=0, atol=TOLERANCE[dtype])
    if with_lse:
        assert_lse_close(result[1].cpu(), expected_lse)
    assert torch.equal(blocks.indices, before[0])
    assert torch.equal(blocks.counts, before[1])


def check_what_lists_say(case, device="cpu"):
    """Mask, density and checked lists are those of the sets."""
    blocks = case.blocks(device)
    num_keys, sets = blocks.num_key_blocks, case.sets()
    mask = [[[[block in row for block in range(num_keys)] for row in head] for head in one] for one in sets]
    assert blocks.to_mask().tolist() == mask
    assert abs(blocks.density() - case.density()) < 1e-12
    checked = blocks.checked()
    assert checked.checked() is checked
    indices, counts = checked.indices.tolist(), checked.counts.tolist()
    for b, one in enumerate(sets):
        for h, head in enumerate(one):
            for row, found in enumerate(head):
                assert indices[b][h][row][: counts[b][h][row]] == sorted(found)
