"""Block-sparse attention on the CPU in plain torch: gather the listed blocks of each row, then batched matmul.

Needs no C++ compiler, has no warm-up and returns LSE. Rows are worked through in buckets of about equal list lengths,
small enough that what one op writes is still in the L2 cache when the next one reads it. What makes it fast:

* every bucket writes over the same two buffers, and results over their queries: fresh memory costs page faults;
* the scores are passed over once for the softmax, in place, and twice more only where the LSE is asked for;
* the causal mask is applied to the diagonal tiles alone, and rows of one list length need no other mask;
* rows are sorted by list length once for all buckets, so that queries and results of a bucket are slices.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..indices import BlockIndices, read_lists, span_of
from ..span import Span

# Elements of gathered keys and of scores in one bucket, for each thread: 2 MiB of float32. From 2^18 to 2^20 all are
# within 10 % of each other on a 2-core Ice Lake with 1.25 MiB of L2 a core; below, the overhead of the ops shows.
BUCKET_ELEMENTS = 1 << 19


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockIndices, scale: float, return_lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Arguments as checked by the interface; computes in float32 whatever the dtype (faster than bf16 without AMX).

    Returns:
        ``out`` like q and the natural-log ``lse``, float32, q's shape without the last dimension, or None.
    """
    span = span_of(blocks, q, k)
    batch, (num_heads, head_dim), num_kv_heads = span.batch, (q.shape[1], q.shape[3]), k.shape[1]
    block_size, num_rows, num_key_blocks = blocks.block_size, blocks.num_rows, blocks.num_key_blocks
    indices, counts = read_lists(blocks)
    list_heads = counts.shape[1]
    shared = num_heads // list_heads  # query heads that read one list, stacked into one matmul

    # Lists from the shortest to the longest, packed to the right: the diagonal block, which is always the last of a
    # list, is then the last column, and a row that is shorter than others of its bucket is padded on the left.
    counts, order = counts.reshape(-1).sort(stable=True)
    lengths = counts.tolist()
    slots = counts[:, None] + torch.arange(-lengths[-1], 0, device=q.device)
    key_blocks = indices.flatten(0, 2)[order].long().gather(1, slots.clamp(min=0))
    diagonal = span.row_blocks(block_size, q.device)[:, None].expand(batch, list_heads, num_rows).reshape(-1)[order]
    has_diagonal = key_blocks[:, -1:] == diagonal[:, None]
    # Where the KV head of each list begins among all blocks of keys.
    key_blocks += (order // (list_heads // num_kv_heads * num_rows) * num_key_blocks)[:, None]

    # Whole blocks. Keys beside the content lie after every real query, in its diagonal block at most: causality hides
    # them.
    q_blocks = span.gather_query_blocks(q, block_size)
    q_blocks = q_blocks.view(batch, list_heads, shared, num_rows, block_size, head_dim)
    # Rows in the order of the lists; the result of a row will overwrite its queries.
    out = q_blocks.transpose(2, 3).reshape(-1, shared * block_size, head_dim).index_select(0, order).float()
    k_blocks = _key_blocks(k, span, block_size)
    v_blocks = _key_blocks(v, span, block_size)

    empty = lengths.count(0)
    out[:empty] = 0.0
    lse = out.new_full(out.shape[:2], float("-inf")) if return_lse else None
    future = torch.ones(block_size, block_size, dtype=torch.bool, device=q.device).triu(1).repeat(shared, 1)

    key_elements, score_elements = block_size * head_dim, shared * block_size * block_size
    buckets = _buckets(lengths, empty, key_elements + score_elements)
    most_tiles = max(((end - start) * lengths[end - 1] for start, end in buckets), default=0)
    gathered_buffer = out.new_empty(most_tiles, key_elements)
    scores_buffer = out.new_empty(most_tiles * score_elements)
    for start, end in buckets:
        rows, width = end - start, lengths[end - 1]
        listed = key_blocks[start:end, -width:].reshape(-1)
        gathered = gathered_buffer[: rows * width]  # the keys, then the values
        tokens = gathered.view(rows, width * block_size, head_dim)
        scores = scores_buffer[: rows * width * score_elements].view(rows, shared * block_size, width * block_size)

        torch.index_select(k_blocks, 0, listed, out=gathered)
        scores.baddbmm_(out[start:end], tokens.transpose(1, 2), beta=0, alpha=scale)
        hidden = future & has_diagonal[start:end, :, None]
        scores[:, :, -block_size:].masked_fill_(hidden, float("-inf"))
        if padding := width - lengths[start]:
            unlisted = (slots[start:end, -width:] < 0)[:, :padding].repeat_interleave(block_size, 1)
            scores[:, :, : padding * block_size].masked_fill_(unlisted[:, None], float("-inf"))
        largest = scores.amax(-1) if lse is not None else None
        torch.softmax(scores, -1, out=scores)
        if lse is not None and largest is not None:
            # The probability of the largest score is exp(0) over the sum of exponentials.
            torch.sub(largest, scores.amax(-1).log_(), out=lse[start:end])
        torch.index_select(v_blocks, 0, listed, out=gathered)
        torch.bmm(scores, tokens, out=out[start:end])

    original = order.argsort()
    shape = batch, list_heads, num_rows, shared, block_size
    out = out.to(q.dtype).index_select(0, original).view(*shape, head_dim).transpose(2, 3)
    out = out.reshape(batch, num_heads, -1, head_dim)
    make = torch.empty_like if span.plain else torch.zeros_like  # slots without a query are not written
    if lse is not None:
        lse = lse.index_select(0, original).view(shape).transpose(2, 3).reshape(batch, num_heads, -1)
        lse = span.scatter_query_blocks(lse, lse.new_full(q.shape[:3], float("-inf")), block_size)
    return span.scatter_query_blocks(out, make(q), block_size), lse


def _key_blocks(x: Tensor, span: Span, block_size: int) -> Tensor:
    """Blocks of the keys or values, row by row and head by head, float32 ``[B * Hkv * Nk, block * D]``."""
    x = span.gather_keys(x)
    if not span.plain:  # what lies behind a row's last key may be NaN, and 0 * NaN is no 0
        beyond = torch.arange(span.keys, device=x.device) >= span.ends()[:, None]
        x = x.masked_fill(beyond[:, None, :, None], 0.0)
    back = span.num_key_blocks(block_size) * block_size - span.keys
    x = F.pad(x, (0, 0, 0, back)) if back else x  # padding by nothing would copy
    return x.reshape(-1, block_size * x.shape[3]).float()


def _buckets(sorted_counts: list[int], start: int, tile_elements: int) -> list[tuple[int, int]]:
    """Cut rows sorted by list length into runs of similar length (padding at most 1/8) and bounded size."""
    limit = BUCKET_ELEMENTS * torch.get_num_threads()
    buckets = []
    while start < len(sorted_counts):
        longest_allowed = sorted_counts[start] + sorted_counts[start] // 8
        end = start + 1
        while (
            end < len(sorted_counts)
            and sorted_counts[end] <= longest_allowed
            and (end + 1 - start) * sorted_counts[end] * tile_elements <= limit
        ):
            end += 1
        buckets.append((start, end))
        start = end
    return buckets
