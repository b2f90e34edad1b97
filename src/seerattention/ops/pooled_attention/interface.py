"""Public function of pooled attention: argument checks and the choice of an implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ..custom_op import custom_op
from ..span import Span
from .arguments import Wanted, check_arguments, check_range

__all__ = ["pooled_attention"]

OP = "pooled_attention"


def triton_refuses(q: Tensor, k: Tensor, wanted: Wanted) -> str | None:
    """Why the Triton kernels cannot run on these inputs, or None where they can."""
    block_size = wanted.block_size
    needed = block_size * 256 * 4  # a block of queries, float32, wide heads
    if q.dtype == torch.float32 and q.shape[3] > 128 and dispatch.shared_memory(q.device) < needed:
        return (
            f"a block of {block_size} float32 queries with head_dim {q.shape[3]} does not fit this GPU's shared memory"
        )
    return None


def hopper_usable(q: Tensor, k: Tensor, wanted: Wanted) -> str | None:
    """Why the Hopper kernel cannot run on these inputs, or None where it can; the one place that decides.

    It needs what all Hopper kernels need (``dispatch.hopper_refuses``), maxima over the queries of blocks of 64, and
    query heads of a KV head that make nearly whole fours.
    """
    if reason := dispatch.hopper_refuses(q=q, k=k):
        return reason
    if wanted.reduce == "sum" or wanted.block_size != 64:
        return (
            f"it needs reduce='max' or 'row_sum' and blocks of 64 tokens, got {wanted.reduce!r} and {wanted.block_size}"
        )
    group = q.shape[1] // k.shape[1]
    if 4 * (-group % 4) > group:
        return f"it takes four query heads at a time, of which too many would be idle with {group} a KV head"
    return None


IMPLEMENTATIONS = {
    "hopper": dispatch.Implementation("hopper", hopper_usable),
    "triton": dispatch.Implementation("triton", triton_refuses),
    "cpu": dispatch.Implementation("cpu"),
    "reference": dispatch.Implementation("reference"),
}


@torch.no_grad()
def pooled_attention(
    q: Tensor, k: Tensor, *, block_size: int = 64, scale: float | None = None, rows: Tensor | None = None,
    lengths: Tensor | None = None, reduce: str = "max", normalize: bool = True, lse: Tensor | None = None,
    implementation: str | None = None, span: Span | None = None,
) -> Tensor:  # fmt: skip
    """The causal attention map, reduced to one value per (query block, key block) tile.

    ``reduce="max"`` with ``normalize=True`` is the distillation target of the SeerAttention paper (arXiv 2410.13276,
    section 3.2): the largest attention probability in each tile, each row divided by its sum. ``reduce="sum"`` is the
    attention mass of each tile, from which block recall is computed. ``reduce="row_sum"`` is the largest mass that one
    query of the tile gives to its keys: the maximum over the queries of the sum over the keys of the probabilities. It
    is a target of distillation that is not in the paper (``DistillConfig.target``): what a query spreads over a block
    counts in full, where the maximum sees its largest part only, and what one query needs is not lost among the others,
    as it is in the mass of all.

    Two passes, neither of which stores more than the result: the log-sum-exp of each query, then Q K^T again, reduced
    tile by tile. A dense forward knows the first already: given its ``lse``, only the second is run. Only the query
    blocks in ``rows`` are computed. There is no gradient: the target is a constant.

    Args:
        q: ``[B, Hq, Tq, D]``, after RoPE; float32, float16 or bfloat16, last dimension contiguous. Queries are the last
            Tq of the Tk positions.
        k: ``[B, Hkv, Tk, D]``, after RoPE; Hq is a multiple of Hkv, Tq <= Tk.
        block_size: tokens a block: 32, 64 or 128.
        scale: positive scale of the logits; None is 1 / sqrt(D).
        rows: int64 ``[R]``, absolute query blocks in any order, each one of the blocks that hold queries, or with a
            span, rows of its lists: query blocks counted from the first one of each batch row. None: all of them,
            ascending. Values on a CUDA device are not checked (that would synchronise it): keep them in range.
        lengths: int64 ``[B]``, valid tokens of each right-padded row (None: all). Padded queries take no part in the
            reduction; rows of wholly padded blocks are 0.
        reduce: ``"max"``, ``"sum"`` or ``"row_sum"``.
        normalize: divide ``max`` and ``row_sum`` rows by their sum, and ``sum`` rows by their number of valid queries;
            rows then sum to 1.
        lse: float32 ``[B, Hq, Tq]``, natural logarithm of the sum of exp of the scaled causal logits of each query, as
            attention kernels return it; None: computed here. Values at padded queries are never used.
        implementation: ``"reference"``, ``"cpu"``, ``"triton"``, ``"hopper"`` (where ``hopper_usable``) or None
            (automatic).
        span: which positions the queries and keys are, and in which slots they lie, instead of ``lengths``. Keys in
            pages are put in order first.

    Returns:
        float32 ``[B, Hq, R, Nk]``, 0 above the block diagonal.

    Raises:
        ValueError: shapes that do not fit, an unknown block size or reduction, rows out of range, a scale of 0 or less.
        TypeError: unsupported dtypes.
    """
    dispatch.check_block_size(OP, block_size)
    wanted = Wanted(block_size, dispatch.default_scale(q.shape[-1], scale), reduce, normalize, lse)
    k, rows, wanted = check_arguments(OP, q, k, rows, lengths, span, wanted)
    first = 0
    if span is None:  # rows are absolute blocks, and all batch rows begin at the same one
        first = (wanted.span.keys - wanted.span.queries) // block_size
    if rows is None:
        rows = torch.arange(_num_rows(wanted._replace(first_row=first)), device=q.device)
    else:
        rows = rows - first
    return _pooled_attention(q, k, rows, wanted._replace(first_row=first), implementation)


def _num_rows(wanted: Wanted) -> int:
    """Rows from the first one on; those counted from block 0 end with the keys."""
    num_rows = wanted.span.num_rows(wanted.block_size)
    return min(num_rows, wanted.span.num_key_blocks(wanted.block_size) - wanted.first_row)


def _fake(q: Tensor, rows: Tensor, wanted: Wanted) -> Tensor:
    columns = wanted.span.num_key_blocks(wanted.block_size)
    return q.new_empty(wanted.span.batch, q.shape[1], rows.shape[0], columns, dtype=torch.float32)


@custom_op(_fake)
def _pooled_attention(q: Tensor, k: Tensor, rows: Tensor, wanted: Wanted, implementation: str | None) -> Tensor:
    check_range(OP, rows, _num_rows(wanted), wanted.first_row, "the blocks that hold queries")
    name = dispatch.choose_implementation(OP, implementation, q.device, IMPLEMENTATIONS, q, k, wanted)
    return dispatch.load(__package__, IMPLEMENTATIONS[name].module, OP)(q, k, rows, wanted)
