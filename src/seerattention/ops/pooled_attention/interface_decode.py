"""Public function of 1-D pooled attention: argument checks and the choice of an implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ..custom_op import custom_op
from ..span import Span
from .arguments import Wanted, check_arguments, check_range

__all__ = ["pooled_attention_decode"]

OP = "pooled_attention_decode"
IMPLEMENTATIONS = {name: dispatch.Implementation(f"{name}_decode") for name in ("triton", "cpu", "reference")}
# A decode gate scores one query token against the blocks, and can afford finer ones than a prefill gate.
BLOCK_SIZES = (16, *dispatch.BLOCK_SIZES)


def pooled_attention_decode(
    q: Tensor, k: Tensor, *, block_size: int = 64, scale: float | None = None, rows: Tensor | None = None,
    lengths: Tensor | None = None, reduce: str = "max", normalize: bool = True, lse: Tensor | None = None,
    implementation: str | None = None, span: Span | None = None,
) -> Tensor:  # fmt: skip
    """The causal attention map, reduced to one value per (query token, key block) for each KV head.

    ``reduce="max"`` with ``normalize=True`` is the distillation target of decode gates (SeerAttention-R, arXiv
    2506.08889, section 2): queries are not pooled, and a KV head's group of query heads shares one row, which holds the
    largest attention probability of any of these heads on any visible key of each block, divided by its sum.
    ``reduce="sum"`` is the attention mass of each block, mean over the group, from which block recall of decoding is
    computed. ``reduce="row_sum"`` is the largest mass that one head of the group gives to each block: the maximum over
    the heads of the sum over the keys of the probabilities. That target is not in the paper;
    :func:`~.interface.pooled_attention` says what it is for.

    The block of the query itself is a block like the others. The official training leaves it out, as decoding reads it
    always: to follow it, set these entries to 0 and divide by the sum again.

    Nothing but the result is stored. Q K^T is computed twice, for the log-sum-exp of each query and for the reduction;
    given the ``lse`` of a dense forward, once. Only the query tokens in ``rows`` are computed; neighbours in ``rows``
    share their work with the keys, so that ascending rows are fastest. There is no gradient: the target is a constant.

    Args:
        q: ``[B, Hq, Tq, D]``, after RoPE; float32, float16 or bfloat16, last dimension contiguous. Queries are the last
            Tq of the Tk positions.
        k: ``[B, Hkv, Tk, D]``, after RoPE; Hq is a multiple of Hkv, Tq <= Tk.
        block_size: tokens a block of keys: 16, 32, 64 or 128.
        scale: positive scale of the logits; None is 1 / sqrt(D).
        rows: int64 ``[R]``, absolute positions of query tokens in any order, each in ``[Tk - Tq, Tk)``, or with a span
            counted from the first query of each batch row; None: all Tq, ascending. Values on a CUDA device are not
            checked (that would synchronise it): keep them in range.
        lengths: int64 ``[B]``, valid tokens of each right-padded row (None: all). Rows of padded queries are 0.
        reduce: ``"max"``, ``"sum"`` or ``"row_sum"``.
        normalize: divide ``max`` and ``row_sum`` rows by their sum, and ``sum`` rows by the Hq / Hkv heads of a group;
            rows then sum to 1.
        lse: float32 ``[B, Hq, Tq]``, natural logarithm of the sum of exp of the scaled causal logits of each query, as
            attention kernels return it; None: computed here. Only values at valid queries in ``rows`` are used.
        implementation: ``"reference"``, ``"cpu"``, ``"triton"`` or None (automatic).
        span: as of :func:`~.interface.pooled_attention`.

    Returns:
        float32 ``[B, Hkv, R, Nk]``, 0 in blocks after that of the query.

    Raises:
        ValueError: shapes that do not fit, an unknown block size or reduction, rows out of range, a scale of 0 or less.
        TypeError: unsupported dtypes.
    """
    dispatch.check_block_size(OP, block_size, BLOCK_SIZES)
    wanted = Wanted(block_size, dispatch.default_scale(q.shape[-1], scale), reduce, normalize, lse)
    k, rows, wanted = check_arguments(OP, q, k, rows, lengths, span, wanted)
    first = wanted.span.keys - wanted.span.queries if span is None else 0
    rows = torch.arange(wanted.span.queries, device=q.device) if rows is None else rows - first
    return _pooled_attention_decode(q.detach(), k.detach(), rows, wanted._replace(first_row=first), implementation)


def _fake(k: Tensor, rows: Tensor, wanted: Wanted) -> Tensor:
    columns = wanted.span.num_key_blocks(wanted.block_size)
    return k.new_empty(wanted.span.batch, k.shape[1], rows.shape[0], columns, dtype=torch.float32)


@custom_op(_fake)
def _pooled_attention_decode(q: Tensor, k: Tensor, rows: Tensor, wanted: Wanted, implementation: str | None) -> Tensor:
    check_range(OP, rows, wanted.span.queries, wanted.first_row, "the positions of the queries")
    name = dispatch.choose_implementation(OP, implementation, q.device, IMPLEMENTATIONS)
    return dispatch.load(__package__, IMPLEMENTATIONS[name].module, OP)(q, k, rows, wanted)
