"""Public function of block pooling: argument checks and the choice of an implementation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import dispatch
from ..custom_op import custom_op
from ..span import Span, num_blocks
from .reference import Grid

__all__ = ["BLOCK_SIZES", "block_pooling"]

OP = "block_pooling"
IMPLEMENTATIONS = {name: dispatch.Implementation(name) for name in ("triton", "reference")}
KINDS = ("max", "min", "avg")
# A gate may pool more finely than its mask.
BLOCK_SIZES = range(4, 129, 4)


@torch.no_grad()
def block_pooling(
    x: Tensor,
    kinds: Sequence[str],
    *,
    block_size: int = 64,
    lengths: Tensor | None = None,
    implementation: str | None = None,
    span: Span | None = None,
    align: int | None = None,
) -> Tensor:
    """Pool each block of tokens per channel (SeerAttention paper, arXiv 2410.13276, section 3.1: the P of the gate).

    There is no gradient: queries and keys come from the frozen model.

    Args:
        x: ``[B, H, T, D]``, queries or keys before RoPE; float32, float16 or bfloat16, last dimension contiguous.
        kinds: some of ``"max"``, ``"min"``, ``"avg"`` without repeats; results are concatenated in this order.
        block_size: tokens a block: a multiple of 4 from 4 to 128.
        lengths: int64 ``[B]``, valid tokens of each right-padded row (None: all). Partial blocks pool their valid
            tokens only (the average divides by their number); blocks without a valid token give 0.
        implementation: ``"reference"``, ``"triton"`` or None (automatic).
        span: where the tokens of x lie, which are its queries (a chunk of a prompt, packed rows); instead of
            ``lengths``. Blocks are cut from the content: result n of a row is block ``start // block_size + n``,
            pooled over those of its tokens that x holds. None: whole prompts.
        align: with a span, results begin at the block of ``align`` tokens that holds a row's first token; a multiple
            of ``block_size``, which is the default.

    Returns:
        ``[B, H, N, len(kinds) * D]``, dtype of x (averages are taken in float32), N = ceil(T / block_size); with a span
        N = ``span.num_rows(align) * (align // block_size)``.

    Raises:
        ValueError: x that is not 4-D, unknown or repeated kinds, an unknown block size, lengths of another shape, a
            span that does not fit.
        TypeError: an unsupported dtype.
    """
    dispatch.check_floating(OP, x=x)
    kinds = check_pooling(kinds, block_size)
    if x.dim() != 4 or x.shape[2] == 0:
        raise ValueError(f"{OP}: x must be [B, H, T, D] with at least one token, got {tuple(x.shape)}")
    if lengths is not None:
        if lengths.shape != x.shape[:1] or lengths.is_floating_point():
            raise ValueError(
                f"{OP}: lengths must be integers [{x.shape[0]}], got {lengths.dtype} {tuple(lengths.shape)}"
            )
        lengths = lengths.to(x.device, torch.int64)
    if span is None:
        if align is not None:
            raise ValueError(f"{OP}: align={align} needs a span; blocks of whole prompts begin at their first token")
        batch, tokens = x.shape[0], x.shape[2]
        span = Span.of_padded(batch, tokens, tokens, None if lengths is None else lengths.clamp(max=tokens))
        grid = Grid(num_blocks(tokens, block_size), 0, 0, span.table)
        return _block_pooling(x, ",".join(kinds), block_size, grid, implementation)
    if lengths is not None:
        raise ValueError(f"{OP}: pass lengths or a span, not both; a span holds the lengths of its rows")
    align = block_size if align is None else align
    if align <= 0 or align % block_size:
        raise ValueError(f"{OP}: align must be a multiple of block_size ({block_size}), got {align}")
    span.check(OP, q=x)
    num = span.num_rows(align) * (align // block_size)
    offset = (span.keys - span.queries) % align if span.plain else 0
    return _block_pooling(x, ",".join(kinds), block_size, Grid(num, offset, align, span.table), implementation)


def check_pooling(kinds: Sequence[str], block_size: int) -> tuple[str, ...]:
    """The kinds; raises ValueError where they, or the size of blocks, are not known."""
    kinds = tuple(kinds)
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"{OP}: block_size must be a multiple of 4 from 4 to 128, got {block_size}")
    if not kinds or len(set(kinds)) != len(kinds) or not set(kinds) <= set(KINDS):
        raise ValueError(f"{OP}: kinds must be a non-empty choice of {KINDS} without repeats, got {kinds}")
    return kinds


def _fake(x: Tensor, kinds: str, grid: Grid) -> Tensor:
    batch, heads, _, head_dim = x.shape
    batch = batch if grid.table is None else grid.table.shape[0]
    return x.new_empty(batch, heads, grid.num, len(kinds.split(",")) * head_dim)


@custom_op(_fake)
def _block_pooling(x: Tensor, kinds: str, block_size: int, grid: Grid, implementation: str | None) -> Tensor:
    """``kinds`` is joined by commas."""
    name = dispatch.choose_implementation(OP, implementation, x.device, IMPLEMENTATIONS)
    return dispatch.load(__package__, IMPLEMENTATIONS[name].module, OP)(x, kinds.split(","), block_size, grid)
