"""From the scores of a decode gate to lists of key blocks: any policy, for each query token by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.indices import BlockIndices, is_ordered, ordered_lists, read_lists
from ..ops.replay import Replays
from ..ops.span import LENGTH, START, Span
from ..policies import REPLAYED, Policy

_LISTS = Replays()


def check_by_token(policy: Policy) -> None:
    """Raise ValueError for a policy that looks at a whole sequence: each token would be the end of one."""
    if getattr(policy, "layers", ()):
        raise ValueError(f"factors by layer are for prompts; a policy of decoding has none, got {policy}")
    if not policy.rowwise:
        raise ValueError(f"a policy of decoding must decide token by token, which {policy} does not")


@torch.no_grad()
def select_by_token(policy: Policy, logits: Tensor, *, block_size: int, span: Span) -> BlockIndices:
    """Choose the key blocks that each query token reads (SeerAttention-R, arXiv 2506.08889).

    A policy knows rows of query blocks. So each token is shown to it as a sequence of its own, whose last query block
    holds that one token: its diagonal is the token's own block, open or just completed, which every policy keeps.
    Blocks of score -inf (open ones) have probability 0, and count for a budget only as the diagonal does.

    Args:
        policy: decides row by row. A budget counts the token's own block, as it does for prompts.
        logits: ``[B, Hkv, T, N]`` of :meth:`DecodeGate.score`.
        block_size: tokens a block.
        span: the positions of the queries, as given to :meth:`DecodeGate.score`.

    Returns:
        Lists ``[B, Hkv, T, capacity]`` of query tokens, with the span, on the device of the logits; nothing waits for
        it. Slots without a query have count 0.

    Raises:
        ValueError: logits that are not those of the span, or a policy that looks at a whole sequence
            (``last_blocks_dense``, ``TopK(uniform=True)``): each token would be the end of one.
    """
    batch, heads, tokens, columns = logits.shape
    if (batch, tokens, columns) != (span.batch, span.queries, span.num_key_blocks(block_size)):
        raise ValueError(
            f"the span has {span.batch} rows of {span.queries} query tokens over {span.num_key_blocks(block_size)} "
            f"key blocks of {block_size} tokens, got logits {tuple(logits.shape)}"
        )
    check_by_token(policy)
    if span.plain and tokens == 1 and type(policy) in REPLAYED:

        def select() -> tuple[Tensor, Tensor]:
            return read_lists(policy.select(logits, block_size=block_size))

        # As many key blocks as in the step before, but where one has begun.
        indices, counts = _LISTS.call(select, (logits,), policy, block_size)
        return ordered_lists(indices, counts, columns, block_size, True, span)
    if span.plain and tokens == 1:
        chosen = policy.select(logits, block_size=block_size)
        indices, counts = read_lists(chosen)
    else:
        each = _each_token(span, columns * block_size, logits.device)
        rows = logits.transpose(1, 2).reshape(batch * tokens, heads, 1, columns)
        chosen = policy.select(rows, block_size=block_size, span=each)
        indices, counts = (x[:, :, 0].unflatten(0, (batch, tokens)).transpose(1, 2) for x in read_lists(chosen))
    make = ordered_lists if is_ordered(chosen) else BlockIndices  # a policy of somebody else's may order as it likes
    return make(indices, counts, columns, block_size, True, span)


def _each_token(span: Span, keys: int, device: torch.device) -> Span:
    """Rows of one query, one for each slot of ``span``, of which those without a token have length 0."""
    start, length = (span.column(column, device)[:, None] for column in (START, LENGTH))
    slots = torch.arange(span.queries, device=device)
    positions = (start + slots).clamp(max=keys - 1)  # of slots without a token, which may lie behind all keys
    return Span.of_rows(1, keys, start=positions.flatten(), length=(slots < length).long().flatten())
