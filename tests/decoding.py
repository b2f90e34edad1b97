"""What the CPU and GPU tests of block-sparse decoding share: rows, lists, layouts, and the definition in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from helpers import assert_as_accurate_as, assert_lse_close
from seerattention.ops import BlockIndices, Pages, Span, block_sparse_decode
from seerattention.ops.span import cumulative

LAYOUTS = ("left", "right", "packed", "pages")


def exact(q, k, v, lists, block_size, scale, dtype=torch.float64):
    """One row: q ``[Hq, Tq, D]``, the last of the keys ``[Hkv, T, D]``; lists: nested python lists [Hkv][Tq]."""
    group, queries, keys = q.shape[0] // k.shape[0], q.shape[1], k.shape[1]
    mask = torch.zeros(q.shape[0], queries, keys, dtype=torch.bool, device=q.device)
    for head in range(q.shape[0]):
        for token in range(queries):
            for block in set(lists[head // group][token]):
                mask[head, token, block * block_size : (block + 1) * block_size] = True
    positions = torch.arange(keys, device=q.device)
    mask &= positions <= positions[keys - queries :, None]
    q, k, v = q.to(dtype), k.to(dtype).repeat_interleave(group, 0), v.to(dtype).repeat_interleave(group, 0)
    out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask[None], scale=scale)[0]
    lse = (q @ k.mT * scale).masked_fill(~mask, float("-inf")).logsumexp(-1)
    return out.masked_fill(~mask.any(-1, keepdim=True), 0.0), lse


def draw(heads, kv_heads, queries, keys, head_dim, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = (heads, queries), (kv_heads, keys), (kv_heads, keys)
    return [torch.randn(*shape, head_dim, generator=generator).to(dtype) for shape in shapes]


def draw_lists(kv_heads, queries, keys, block_size, seed, capacity):
    """Shuffled lists without repeats, the block of the token not always among them, some empty."""
    generator = torch.Generator().manual_seed(seed)
    lists = []
    for _ in range(kv_heads):
        lists.append([])
        for token in range(queries):
            blocks = (keys - queries + token) // block_size + 1
            count = int(torch.randint(0, min(blocks, capacity) + 1, (), generator=generator))
            lists[-1].append(torch.randperm(blocks, generator=generator)[:count].tolist())
    return lists


def pack_lists(rows, num_key_blocks, block_size, capacity, queries):
    """Rows of nested lists -> BlockIndices; what lies past the counts must not be read."""
    kv_heads = len(rows[0])
    indices = torch.full((len(rows), kv_heads, queries, capacity), 1 << 20, dtype=torch.int32)
    counts = torch.zeros(len(rows), kv_heads, queries, dtype=torch.int32)
    for b, row in enumerate(rows):
        for h, head in enumerate(row):
            for t, entries in enumerate(head):
                counts[b, h, t] = len(entries)
                indices[b, h, t, : len(entries)] = torch.tensor(entries, dtype=torch.int32)
    return BlockIndices(indices, counts, num_key_blocks, block_size, by_token=True)


def check_rows(rows, lists, block_size, outs, lses, device="cpu"):
    for (q, k, v), entries, out, lse in zip(rows, lists, outs, lses, strict=True):
        scale = q.shape[-1] ** -0.5
        expected, expected_lse = exact(q, k, v, entries, block_size, scale)
        on_device = [x.to(device) for x in (q, k, v)]  # the error of dense attention there
        baseline = exact(*on_device, entries, block_size, scale, dtype=q.dtype)[0].cpu()
        assert_lse_close(lse, expected_lse)
        assert_as_accurate_as(out, baseline, expected)


def check_layout(implementation, layout, device="cpu", dtype=torch.float32, block_size=16):
    """Rows of several lengths in one call, in any layout, with NaN beside them: each equals the row alone."""
    heads, kv_heads, head_dim, num_key_blocks = 6, 2, 32, 96 // block_size
    sizes = [(1, 50), (2, 17), (1, 1), (3, 96)]  # queries and keys of each row
    rows = [draw(heads, kv_heads, *size, head_dim, dtype, seed) for seed, size in enumerate(sizes)]
    lists = [draw_lists(kv_heads, *size, block_size, seed, num_key_blocks) for seed, size in enumerate(sizes)]
    queries, keys = 3, 96
    padded = [[[*head, *[[]] * (queries - len(head))] for head in row] for row in lists]
    blocks = pack_lists(padded, num_key_blocks, block_size, num_key_blocks, queries)
    start = torch.tensor([total - count for count, total in sizes])
    length = torch.tensor([count for count, _ in sizes])

    def pad(x, slots):
        """Garbage beside the content: nothing may read it."""
        left = slots - x.shape[1] if layout == "left" else 0
        return F.pad(x, (0, 0, left, slots - x.shape[1] - left), value=float("nan"))

    if layout == "packed":
        q, k, v = (torch.cat([row[i] for row in rows], 1)[None] for i in range(3))
        span = Span.of_packed(cumulative(length), cumulative(start + length), queries=queries, keys=keys)
    elif layout == "pages":
        q = torch.stack([pad(row[0], queries) for row in rows])
        table = torch.randperm(13, generator=torch.Generator().manual_seed(0))[:12].view(4, 3).int()
        k, v = (torch.full((13, kv_heads, 32, head_dim), float("nan"), dtype=dtype) for _ in range(2))
        for b, row in enumerate(rows):
            for page in range(3):
                k[table[b, page]] = pad(row[1], keys)[:, page * 32 : page * 32 + 32]
                v[table[b, page]] = pad(row[2], keys)[:, page * 32 : page * 32 + 32]
        span = Span.of_rows(queries, keys, start=start, length=length, pages=Pages(table, 32))
    else:
        q = torch.stack([pad(row[0], queries) for row in rows])
        k, v = (torch.stack([pad(row[i], keys) for row in rows]) for i in (1, 2))
        slots = {}
        if layout == "left":
            slots = {"query_slot": queries - length, "key_slot": keys - start - length}
        span = Span.of_rows(queries, keys, start=start, length=length, **slots)
    q, k, v = (x.to(device) for x in (q, k, v))
    blocks = BlockIndices(
        blocks.indices.to(device), blocks.counts.to(device), num_key_blocks, block_size, by_token=True
    )
    out, lse = block_sparse_decode(
        q, k, v, blocks, return_lse=True, span=span.to(device), implementation=implementation
    )
    out, lse = out.cpu(), lse.cpu()
    assert not out.isnan().any()
    alone, alone_lse = [], []
    offset = 0
    for b, (count, _) in enumerate(sizes):
        first = offset if layout == "packed" else queries - count if layout == "left" else 0
        row = 0 if layout == "packed" else b
        alone.append(out[row, :, first : first + count])
        alone_lse.append(lse[row, :, first : first + count])
        if layout != "packed":
            rest = torch.ones(queries, dtype=torch.bool)
            rest[first : first + count] = False
            assert (out[b][:, rest] == 0).all()
            assert (lse[b][:, rest] == float("-inf")).all()
        offset += count
    check_rows(rows, lists, block_size, alone, alone_lse, device)
