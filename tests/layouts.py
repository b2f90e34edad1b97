"""Rows of several lengths in one call: beside each other with padding, packed, or with keys and values in pages.

What lies beside the content of a row is NaN: whatever reads it shows.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import assert_as_accurate_as, assert_lse_close, exact_attention, masked_sdpa
from seerattention.ops import block_sparse_attention
from seerattention.ops.indices import BlockIndices
from seerattention.ops.span import Pages, Span, cumulative, num_blocks

LAYOUTS = ("left", "right", "packed", "pages")


class Rows(NamedTuple):
    """Tensors and span of one call, and where the queries of each row lie."""

    q: Tensor
    k: Tensor
    v: Tensor
    span: Span
    places: list[tuple[int, slice]]

    def take(self, x: Tensor) -> list[Tensor]:
        """What a result ``[B, H, T, ...]`` holds for the queries of each row."""
        return [x[row, :, slots] for row, slots in self.places]

    def rest(self, x: Tensor) -> Tensor:
        """What it holds in slots without a query."""
        free = torch.ones(x.shape[0], x.shape[2], dtype=torch.bool)
        for row, slots in self.places:
            free[row, slots] = False
        return x.transpose(1, 2)[free.to(x.device)]


def lay_out(rows: list[tuple[Tensor, Tensor, Tensor]], layout: str, page_size: int = 64, extra: int = 5) -> Rows:
    """Put rows ``(q [Hq, Tq, D], k [Hkv, Tk, D], v)``, the queries the last of the keys, into one call.

    Args:
        rows: the content of each row.
        layout: one of LAYOUTS.
        page_size: tokens a page.
        extra: slots that no row fills, as those of a static cache; the span knows no more than the longest row.
    """
    length = torch.tensor([row[0].shape[1] for row in rows])
    total = torch.tensor([row[1].shape[1] for row in rows])
    queries, keys = int(length.max()) + extra, int(total.max()) + extra
    keys = max(keys, queries)
    if layout == "packed":
        q, k, v = (torch.cat([row[i] for row in rows], 1)[None] for i in range(3))
        ends = cumulative(length)
        places = [(0, slice(start, end)) for start, end in itertools.pairwise(ends.tolist())]
        return Rows(q, k, v, Span.of_packed(ends, cumulative(total)), places)

    def pad(x: Tensor, slots: int) -> Tensor:
        left = slots - x.shape[1] if layout == "left" else 0
        return F.pad(x, (0, 0, left, slots - x.shape[1] - left), value=float("nan"))

    columns = {"start": total - length, "length": length}
    places = [(b, slice(0, int(n))) for b, n in enumerate(length)]
    q = torch.stack([pad(row[0], queries) for row in rows])
    if layout == "pages":
        number = num_blocks(keys, page_size)
        generator = torch.Generator().manual_seed(0)
        table = torch.randperm(len(rows) * number + 1, generator=generator)[:-1].view(len(rows), number).int()
        shape = (len(rows) * number + 1, rows[0][1].shape[0], page_size, rows[0][1].shape[2])
        k, v = (torch.full(shape, float("nan"), dtype=q.dtype) for _ in range(2))
        for b, row in enumerate(rows):
            for pages, x in ((k, row[1]), (v, row[2])):
                pages[table[b].long()] = pad(x, number * page_size).unflatten(1, (number, page_size)).transpose(0, 1)
            used = num_blocks(int(total[b]), page_size)
            table[b, used:] = -(1 << 20) if b % 2 else 1 << 20  # no page: not to be read
        return Rows(q, k, v, Span.of_rows(queries, keys, **columns, pages=Pages(table, page_size)), places)
    k, v = (torch.stack([pad(row[i], keys) for row in rows]) for i in (1, 2))
    if layout == "left":
        columns |= {"query_slot": queries - length, "key_slot": keys - total}
        places = [(b, slice(queries - int(n), queries)) for b, n in enumerate(length)]
    return Rows(q, k, v, Span.of_rows(queries, keys, **columns), places)


def draw_prompts(sizes, *, heads=4, kv_heads=2, head_dim=32, block_size=32, shared=False, dtype=torch.float32, seed=0):
    """Whole prompts ``(q, k, v, mask)`` of the lengths of ``sizes``, entries ``(queries, keys)``.

    The masks, bool ``[Hq or Hkv, N, N]``, leave the diagonal out at times, and some rows have no block at all.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts = []
    for _, keys in sizes:
        q, k, v = (torch.randn(h, keys, head_dim, generator=generator).to(dtype) for h in (heads, kv_heads, kv_heads))
        number = num_blocks(keys, block_size)
        noise = torch.rand(kv_heads if shared else heads, number, number, generator=generator)
        mask = (noise < 0.5) & (torch.rand(*noise.shape[:2], 1, generator=generator) < 0.9)
        prompts.append((q, k, v, mask.tril()))
    return prompts


def lists_of(prompts, span: Span, block_size: int, device="cpu") -> BlockIndices:
    """The lists of a call whose rows are the last queries of prompts; rows without a query ask for everything."""
    blocks, number = span.row_blocks(block_size).cpu(), span.num_key_blocks(block_size)
    mask = torch.ones(len(prompts), prompts[0][3].shape[0], blocks.shape[1], number, dtype=torch.bool)
    for row, (*_, one) in enumerate(prompts):
        for place, block in enumerate(blocks.expand(len(prompts), -1)[row].tolist()):
            if block < one.shape[1]:
                mask[row, :, place] = F.pad(one[:, block], (0, number - one.shape[2]))
    return BlockIndices.from_mask(mask.to(device), block_size, span=span)


def check_attention_layout(implementation, layout, sizes, *, device="cpu", block_size=32, page_size=128, **how):
    """Block-sparse attention of rows that are the last queries of prompts, as ``sizes`` says: each row equals those of
    the whole prompt alone; slots without a query hold 0, and a log-sum-exp of -inf."""
    prompts = draw_prompts(sizes, block_size=block_size, **how)
    rows = [(q[:, keys - queries :], k, v) for (q, k, v, _), (queries, keys) in zip(prompts, sizes, strict=True)]
    call = lay_out(rows, layout, page_size)
    span = call.span.to(device)
    blocks = lists_of(prompts, span, block_size, device)
    q, k, v = (x.to(device) for x in call[:3])
    out, lse = block_sparse_attention(q, k, v, blocks, return_lse=True, implementation=implementation)
    assert out.shape == q.shape
    assert (call.rest(out) == 0).all()
    assert (call.rest(lse) == float("-inf")).all()
    without = block_sparse_attention(q, k, v, blocks, implementation=implementation)
    assert torch.equal(without, out)
    wholes = []
    for mine, mine_lse, (*prompt, mask), (queries, _) in zip(
        call.take(out), call.take(lse), prompts, sizes, strict=True
    ):
        alone = [x[None].to(device) for x in prompt]
        lists = BlockIndices.from_mask(mask[None].to(device), block_size)
        exact, exact_lse = exact_attention(*alone, lists)
        baseline = masked_sdpa(*alone, lists)
        first = exact.shape[2] - queries
        assert_lse_close(mine_lse, exact_lse[0, :, first:])
        assert mine.dtype == baseline.dtype
        wholes.append((torch.cat((baseline[0, :, :first], mine), 1), baseline[0], exact[0]))
    # What is allowed is the error over all prompts: that of a query, or of a short prompt, is a matter of luck.
    assert_as_accurate_as(*(torch.cat(parts, 1) for parts in zip(*wholes, strict=True)))


def check_pooled_layout(op, implementation, layout, sizes, *, device="cpu", block_size=32, page_size=128, **how):
    """Pooled attention, 2-D or 1-D, of rows that are the last queries of prompts: each equals the row alone, and rows
    without a query are 0. With and without the log-sum-exp, maxima and sums."""
    reduce, given = how.pop("reduce", "max"), how.pop("given", False)
    prompts = [prompt[:2] for prompt in draw_prompts(sizes, block_size=block_size, **how)]
    rows = [(q[:, keys - queries :], k, k) for (q, k), (queries, keys) in zip(prompts, sizes, strict=True)]
    call = lay_out(rows, layout, page_size)
    lse = None
    if given:
        lse = [(_lse(q, k)[..., None], k.float(), k.float()) for q, k, _ in rows]
        lse = lay_out(lse, layout, page_size).q[..., 0].to(device)
    common = {"block_size": block_size, "reduce": reduce}
    span = call.span.to(device)
    q, k = call.q.to(device), call.k.to(device)
    found = op(q, k, span=span, lse=lse, implementation=implementation, **common)
    assert not found.isnan().any()
    for row, (queries, keys, _) in zip(found, rows, strict=True):
        alone = op(queries[None].to(device), keys[None].to(device), implementation="reference", **common)[0]
        torch.testing.assert_close(row[:, : alone.shape[1], : alone.shape[2]], alone, atol=1e-5, rtol=1e-4)
        assert (row[:, alone.shape[1] :] == 0).all()
        assert (row[:, :, alone.shape[2] :] == 0).all()
    some = torch.tensor([1, 0], device=device)
    again = op(q, k, span=span, lse=lse, rows=some, implementation=implementation, **common)
    torch.testing.assert_close(again, found[:, :, some], atol=1e-6, rtol=1e-5)


def _lse(q: Tensor, k: Tensor) -> Tensor:
    """float32 ``[Hq, Tq]``, natural logarithm, of the scaled causal logits of the last queries of the keys."""
    scores = q.double() @ k.double().repeat_interleave(q.shape[0] // k.shape[0], 0).mT * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + k.shape[1] - q.shape[1])
    return scores.masked_fill(hidden, float("-inf")).logsumexp(-1).float()
