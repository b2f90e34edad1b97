"""Public function of pooled attention: argument checks and the choice of an implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ..indices import first_query_block, num_blocks
from . import cpu, reference
from .arguments import Wanted, as_op, check_arguments, check_range

__all__ = ["pooled_attention"]

OP = "pooled_attention"
IMPLEMENTATIONS = ("reference", "cpu", "triton", "hopper")


@torch.no_grad()
def pooled_attention(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int = 64,
    scale: float | None = None,
    rows: Tensor | None = None,
    lengths: Tensor | None = None,
    reduce: str = "max",
    normalize: bool = True,
    lse: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """The causal attention map, reduced to one value per (query block, key block) tile.

    ``reduce="max"`` with ``normalize=True`` is the distillation target of the SeerAttention paper (arXiv 2410.13276,
    section 3.2): the largest attention probability in each tile, each row divided by its sum. ``reduce="sum"`` is the
    attention mass of each tile, from which block recall is computed.

    Two passes, neither of which stores more than the result: the log-sum-exp of each query, then Q K^T again, reduced
    tile by tile. A dense forward knows the first already: given its ``lse``, only the second is run. Only the query
    blocks in ``rows`` are computed. There is no gradient: the target is a constant.

    Args:
        q: ``[B, Hq, Tq, D]``, after RoPE; float32, float16 or bfloat16, last dimension contiguous. Queries are the last
            Tq of the Tk positions.
        k: ``[B, Hkv, Tk, D]``, after RoPE; Hq is a multiple of Hkv, Tq <= Tk.
        block_size: tokens a block: 32, 64 or 128.
        scale: positive scale of the logits; None is 1 / sqrt(D).
        rows: int64 ``[R]``, absolute query blocks in any order, each one of the blocks that hold queries; None: all of
            them, ascending. Values on a CUDA device are not checked (that would synchronise it): keep them in range.
        lengths: int64 ``[B]``, valid tokens of each right-padded row (None: all). Padded queries take no part in the
            reduction; rows of wholly padded blocks are 0.
        reduce: ``"max"`` or ``"sum"``.
        normalize: divide ``max`` rows by their sum, and ``sum`` rows by their number of valid queries; rows then sum
            to 1.
        lse: float32 ``[B, Hq, Tq]``, natural logarithm of the sum of exp of the scaled causal logits of each query, as
            attention kernels return it; None: computed here. Values at padded queries are never used.
        implementation: ``"reference"``, ``"cpu"``, ``"triton"``, ``"hopper"`` (where ``hopper_usable``) or None
            (automatic).

    Returns:
        float32 ``[B, Hq, R, Nk]``, 0 above the block diagonal.

    Raises:
        ValueError: shapes that do not fit, an unknown block size or reduction, rows out of range, a scale of 0 or less.
        TypeError: unsupported dtypes.
    """
    dispatch.check_block_size(OP, block_size)
    scale, lengths = check_arguments(OP, q, k, scale=scale, rows=rows, lengths=lengths, reduce=reduce, lse=lse)
    if rows is None:
        first = first_query_block(q.shape[2], k.shape[2], block_size)
        rows = torch.arange(first, num_blocks(k.shape[2], block_size), device=q.device)
    return _pooled_attention(q, k, rows, block_size, scale, lengths, reduce, normalize, lse, implementation)


def _fake(q: Tensor, k: Tensor, rows: Tensor, block_size: int) -> Tensor:
    batch, heads = q.shape[:2]
    return q.new_empty(batch, heads, rows.shape[0], num_blocks(k.shape[2], block_size), dtype=torch.float32)


def _run(q: Tensor, k: Tensor, rows: Tensor, wanted: Wanted, implementation: str | None) -> Tensor:
    block_size = wanted.block_size
    first, end = first_query_block(q.shape[2], k.shape[2], block_size), num_blocks(k.shape[2], block_size)
    check_range(OP, rows, first, end, "the blocks that hold queries")
    function = reference.pooled_attention
    name = dispatch.choose_implementation(OP, implementation, q.device, names=IMPLEMENTATIONS, cpu="cpu")
    reason = hopper_usable(q, k, block_size, wanted.reduce) if name in ("triton", "hopper") else None
    if name == "triton" and (too_large := triton_refuses(q, block_size)):
        if implementation == "triton":
            raise ValueError(f"{OP}: implementation='triton' cannot run here: {too_large}; pass implementation=None")
        dispatch.warn_once(f"{OP}: the slow reference implementation runs, since of the Triton kernel {too_large}")
        name = "reference"
    if name == "hopper" and reason is not None:
        raise ValueError(f"{OP}: implementation='hopper' cannot run here: {reason}; pass implementation=None")
    if implementation is None and name == "triton" and reason is None and dispatch.hopper_automatic():
        name = "hopper"
    if name == "hopper":
        from . import hopper  # imported late: triton is an optional dependency

        function = hopper.pooled_attention
    elif name == "cpu":
        function = cpu.pooled_attention
    elif name == "triton":
        from . import triton

        function = triton.pooled_attention
    return function(q, k, rows.to(q.device), wanted)


_pooled_attention = as_op(OP, _fake, _run)


def triton_refuses(q: Tensor, block_size: int) -> str | None:
    """Why the Triton kernels cannot run on these inputs, or None where they can."""
    needed = block_size * 256 * 4  # a block of queries, float32, wide heads
    if q.dtype == torch.float32 and q.shape[3] > 128 and dispatch.shared_memory(q.device) < needed:
        return (
            f"a block of {block_size} float32 queries with head_dim {q.shape[3]} does not fit this GPU's shared memory"
        )
    return None


def hopper_usable(q: Tensor, k: Tensor, block_size: int, reduce: str) -> str | None:
    """Why the Hopper kernel cannot run on these inputs, or None where it can; the one place that decides.

    It needs what all Hopper kernels need (``dispatch.hopper_refuses``), tile maxima of blocks of 64, and query heads of
    a KV head that make nearly whole fours.
    """
    if reason := dispatch.hopper_refuses(q=q, k=k):
        return reason
    if reduce != "max" or block_size != 64:
        return f"it needs reduce='max' and blocks of 64 tokens, got {reduce!r} and {block_size}"
    group = q.shape[1] // k.shape[1]
    if 4 * (-group % 4) > group:
        return f"it takes four query heads at a time, of which too many would be idle with {group} a KV head"
    return None
