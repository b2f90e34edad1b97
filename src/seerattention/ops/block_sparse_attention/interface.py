"""Checks and dispatch of block-sparse attention."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from .. import dispatch
from ..attend import attend, empty_results
from ..custom_op import custom_op, tracing
from ..indices import BlockIndices, is_ordered, read_lists, span_of
from ..replay import Replays
from ..span import Span

OP = "block_sparse_attention"
_ATTENTION = Replays()


def hopper_usable(q: Tensor, k: Tensor, v: Tensor, blocks: BlockIndices) -> str | None:
    """Why the Hopper kernel cannot run on these inputs, or None where it can; the one place that decides.

    It needs what all Hopper kernels need (``dispatch.hopper_refuses``) and blocks of 64 or 128.
    """
    if reason := dispatch.hopper_refuses(q=q, k=k, v=v):
        return reason
    if blocks.block_size not in (64, 128):
        return f"it needs blocks of 64 or 128 tokens, got {blocks.block_size}"
    return None


IMPLEMENTATIONS = {
    "hopper": dispatch.Implementation("hopper", hopper_usable),
    "triton": dispatch.Implementation("triton"),
    "cpu_gathered": dispatch.Implementation("cpu_gathered"),
    "reference": dispatch.Implementation("reference"),
}


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockIndices, *, scale: float | None = None, return_lse: bool = False,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Causal attention in which each query block reads only the key blocks on its list (arXiv 2410.13276, section 3.3).

    Query i (position ``Tk - Tq + i``, or as the span of the lists says) of head h attends to the keys of the listed
    blocks, causally inside the diagonal block. There is no backward.

    With ``blocks.span``, rows begin at different positions, lie in slots with padding beside them, follow each other in
    one row (packed), or have their keys and values in pages, whose size is a multiple of the block size. What lies
    beside the content of a row is not read, or makes no difference whatever it is.

    Args:
        q: ``[B, Hq, Tq, D]``, float32, float16 or bfloat16, D at most 256; queries are the last Tq of Tk positions
            where the lists have no span. Packed: ``[1, Hq, T, D]``. Any strides with a contiguous last dimension.
        k: ``[B, Hkv, Tk, D]``, same dtype and device, Hq a multiple of Hkv. Packed: ``[1, Hkv, T', D]``; with pages:
            ``[pages, Hkv, page_size, D]``.
        v: like k.
        blocks: lists ``[B, Hq or Hkv, Nq, capacity]`` with block size 32, 64 or 128, in any order: what is read is the
            set of the causal blocks on a list. Lists that are not known to ascend, as those of
            ``BlockIndices.from_mask`` and of the policies are, are looked at first, which waits for the device; see
            ``BlockIndices.checked``.
        scale: positive softmax scale; None is ``D ** -0.5``.
        return_lse: also return the log-sum-exp of the scaled scores.
        implementation: None chooses; ``"reference"``, ``"triton"``, ``"hopper"`` (where ``hopper_usable``) or
            ``"cpu_gathered"``.

    Returns:
        ``out`` in shape and dtype of q; with ``return_lse`` also ``lse``, float32, q's shape without the last
        dimension, natural logarithm. A query that sees no key, and a slot without a query, has output 0 and lse -inf.

    Raises:
        ValueError: shapes, devices, block size or scale that do not fit, an implementation that cannot run here,
            entries of lists that are no key block, or counts outside of their capacity.
        TypeError: dtypes that differ or are not supported.
        NotImplementedError: an input requires grad while grad mode is on.
    """

    def attend() -> tuple[Tensor, ...]:
        span = _check(q, k, v, blocks, scale)
        used = dispatch.default_scale(q.shape[-1], scale)
        results = _block_sparse_attention(q, k, v, blocks, span, used, return_lse, implementation)
        return results if return_lse else results[:1]

    results = _replayed(attend, q, k, v, blocks, (scale, return_lse, implementation))
    return results if return_lse else results[0]  # type: ignore[return-value]


def _replayed(
    attend: Callable[[], tuple[Tensor, ...]], q: Tensor, k: Tensor, v: Tensor, blocks: BlockIndices,
    settings: tuple[Hashable, ...],
) -> tuple[Tensor, ...]:  # fmt: skip
    """``attend()``; of lists that are in order and of rows that are alike, all launches follow from shapes."""
    if tracing() or not isinstance(blocks, BlockIndices) or blocks.by_token or not is_ordered(blocks):
        return attend()
    if blocks.span is not None and not blocks.span.plain:
        return attend()
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return attend()  # which raises
    tensors = (q, k, v, *read_lists(blocks))
    settings = (*settings, blocks.num_key_blocks, blocks.block_size, blocks.span, dispatch.hopper_automatic())
    return _ATTENTION.call(attend, tensors, *settings)


@custom_op(empty_results)
def _block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockIndices, span: Span, scale: float, return_lse: bool,
    implementation: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Choose an implementation and run it; without ``return_lse`` the second result is empty.

    Implementations get lists as ``ordered_lists`` makes them, with a span.
    """
    name = dispatch.choose_implementation(OP, implementation, q.device, IMPLEMENTATIONS, q, k, v, blocks)
    function = dispatch.load(__package__, IMPLEMENTATIONS[name].module, OP)
    return attend(function, (q, k, v), blocks, span, scale, return_lse)


def _check(q: Tensor, k: Tensor, v: Tensor, blocks: BlockIndices, scale: float | None) -> Span:
    """Check the arguments; returns the span of the lists, the default one where they have none."""
    if not isinstance(blocks, BlockIndices):
        raise TypeError(f"{OP}: blocks must be BlockIndices, got {type(blocks).__name__}; see BlockIndices.from_mask")
    dispatch.check_attention(OP, q, k, v, scale, with_span=blocks.span is not None)
    if blocks.by_token:
        raise ValueError(f"{OP}: lists must be of query blocks, got lists of query tokens; see block_sparse_decode")
    dispatch.check_block_size(OP, blocks.block_size)
    span = span_of(blocks, q, k)
    span.check(OP, q, k, blocks.block_size)
    indices, counts = read_lists(blocks)
    if indices.device != q.device or counts.device != q.device:
        elsewhere = counts.device if indices.device == q.device else indices.device
        raise ValueError(f"{OP}: q is on {q.device} but blocks are on {elsewhere}; move one of them")
    batch, heads, rows = counts.shape
    if batch != span.batch or heads not in (q.shape[1], k.shape[1]):
        raise ValueError(
            f"{OP}: blocks must hold lists for batch {span.batch} and {q.shape[1]} query heads or {k.shape[1]} KV "
            f"heads, got batch {batch} and {heads} heads"
        )
    num_rows, num_key_blocks = span.num_rows(blocks.block_size), span.num_key_blocks(blocks.block_size)
    if span.queries and (blocks.num_key_blocks, rows) != (num_key_blocks, num_rows):
        raise ValueError(
            f"{OP}: {span.queries} queries and {span.keys} keys have {num_rows} query blocks and {num_key_blocks} key "
            f"blocks of {blocks.block_size}, but blocks hold {rows} rows over {blocks.num_key_blocks} key blocks"
        )
    return span
