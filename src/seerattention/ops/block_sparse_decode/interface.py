"""Checks and dispatch of block-sparse decoding."""

from __future__ import annotations

from torch import Tensor

from .. import dispatch
from ..attend import attend, empty_results
from ..custom_op import custom_op
from ..indices import BlockIndices, read_lists
from ..span import Span

OP = "block_sparse_decode"
IMPLEMENTATIONS = {name: dispatch.Implementation(name) for name in ("triton", "cpu", "reference")}


def block_sparse_decode(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockIndices, *, scale: float | None = None, return_lse: bool = False,
    span: Span | None = None, implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of one query token a row, or a few, that reads only the key blocks on its list (arXiv 2506.08889).

    Each token has a list of its own for each KV head, which the query heads of the group share. Query t of a row
    attends to the keys of the listed blocks up to its own position. There is no backward. The number of programs
    follows from shapes, nothing waits for the device, and the call can be captured in a CUDA graph.

    Args:
        q: ``[B, Hq, Tq, D]``, float32, float16 or bfloat16, D at most 256, last dimension contiguous.
        k: ``[B, Hkv, Tk, D]``, same dtype and device, Hq a multiple of Hkv; with pages ``[pages, Hkv, page_size, D]``.
        v: like k.
        blocks: lists ``[B, Hkv, Tq, capacity]`` with blocks of 16, 32, 64 or 128 tokens, ``by_token``: a row of lists
            is a query token, in any order. What is read is the set of its entries; blocks behind a token's own count
            for nothing. Lists that are not known to ascend are put in order first, which waits for the device:
            ``blocks.checked()`` does that once.
        scale: positive softmax scale; None is ``D ** -0.5``.
        return_lse: also return the log-sum-exp of the scaled scores.
        span: which positions the queries and keys are, and in which slots or pages they lie (cached batches with
            padding, packed rows, static caches); None: that of ``blocks``, or else the last Tq of Tk in every row.
        implementation: None chooses; ``"reference"``, ``"triton"`` or ``"cpu"``.

    Returns:
        ``out`` in shape and dtype of q; with ``return_lse`` also ``lse``, float32, q's shape without the last
        dimension, natural logarithm. A query that sees no key, and a slot without a query, has output 0 and lse -inf.

    Raises:
        ValueError: shapes, devices, block size or scale that do not fit, entries of lists that are no key block, or an
            implementation that cannot run here.
        TypeError: dtypes that differ or are not supported.
        NotImplementedError: an input requires grad while grad mode is on.
    """
    span = _check(q, k, v, blocks, scale, span)
    scale = dispatch.default_scale(q.shape[-1], scale)
    out, lse = _block_sparse_decode(q, k, v, blocks, span, scale, return_lse, implementation)
    return (out, lse) if return_lse else out


@custom_op(empty_results)
def _block_sparse_decode(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockIndices, span: Span, scale: float, return_lse: bool,
    implementation: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ``_block_sparse_attention``."""
    name = dispatch.choose_implementation(OP, implementation, q.device, IMPLEMENTATIONS)
    function = dispatch.load(__package__, IMPLEMENTATIONS[name].module, OP)
    return attend(function, (q, k, v), blocks, span, scale, return_lse)


def _check(q: Tensor, k: Tensor, v: Tensor, blocks: BlockIndices, scale: float | None, span: Span | None) -> Span:
    """Check the arguments; returns the span, the default one where none was given."""
    dispatch.check_attention(OP, q, k, v, scale, with_span=True)
    if not isinstance(blocks, BlockIndices):
        raise TypeError(f"{OP}: blocks must be BlockIndices, got {type(blocks).__name__}; see BlockIndices.from_mask")
    dispatch.check_block_size(OP, blocks.block_size, (16, *dispatch.BLOCK_SIZES))
    if span is not None and blocks.span is not None and span is not blocks.span:
        raise ValueError(f"{OP}: the lists have a span of their own; leave out span, or make the lists without one")
    span = blocks.span if span is None else span
    if span is None:
        if q.shape[0] != k.shape[0]:
            raise ValueError(f"{OP}: q has {q.shape[0]} rows and k {k.shape[0]}; packed rows and pages need a span")
        span = Span(q.shape[0], q.shape[2], k.shape[2])
    span.check(OP, q, k, blocks.block_size)
    indices, counts = read_lists(blocks)
    if indices.device != q.device or counts.device != q.device:
        raise ValueError(f"{OP}: q is on {q.device} but blocks are on {indices.device}; move one of them")
    expected = (span.batch, k.shape[1], span.queries)
    if not blocks.by_token:
        raise ValueError(f"{OP}: lists must be of query tokens: BlockIndices(..., by_token=True)")
    if counts.shape != expected or blocks.num_key_blocks != span.num_key_blocks(blocks.block_size):
        raise ValueError(
            f"{OP}: blocks must be lists of [{span.batch}, {k.shape[1]} KV heads, {span.queries} query tokens] over "
            f"{span.num_key_blocks(blocks.block_size)} key blocks, got {list(counts.shape)} over "
            f"{blocks.num_key_blocks}"
        )
    return span
