"""Public functions of gate scores: argument checks and the choice of an implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ..custom_op import custom_op, tracing
from ..indices import num_blocks
from ..replay import Replays
from ..span import Span
from . import reference
from .reference import Tiles

__all__ = ["encode_blocks", "gate_scores"]

REDUCTIONS = ("max", "logsumexp", "mass")
_ENCODED = Replays()
# Rows of scores begin at multiples of this many elements, so that those who read them may load whole vectors.
ROW_ALIGNMENT = 16
# A Triton program holds whole encoded vectors.
MAX_TRITON_WIDTH = 256
# Tokens a tile, a query and a key sub-block that the Hopper kernels have, by reduction.
HOPPER_TILES = {"max": ((64, 8, 8),), "mass": ((64, 4, 4), (64, 8, 8))}


def hopper_usable(q: Tensor, k: Tensor, tiles: Tiles) -> str | None:
    """Why the Hopper kernel cannot run on these inputs, or None where it can; the one place that decides.

    It needs what all Hopper kernels need (``dispatch.hopper_refuses``), blocks of 64 tokens and of these maxima in
    sub-blocks of 8 on both sides, or mass in sub-blocks of 4 or 8 with an even number of query heads for each key head,
    vectors of 64 or 128 channels, and consecutive rows, the same ones in the whole batch, of which the first begins
    with a sub-block that holds a query and at least one lacks nothing.
    """
    if reason := dispatch.hopper_refuses(q=q, k=k):
        return reason
    if tiles[:3] not in HOPPER_TILES.get(tiles.reduce, ()):
        return (
            "it needs blocks of 64 tokens in sub-blocks of 8 (reduce='max'), or of 4 or 8 (reduce='mass') on both "
            f"sides, got {tiles.reduce!r}, {tiles.block_size}, {tiles.q_pitch} and {tiles.k_pitch}"
        )
    if tiles.reduce == "mass" and q.shape[1] // k.shape[1] % 2:
        return f"it needs an even number of query heads for each key head, got {q.shape[1]} for {k.shape[1]}"
    if q.shape[3] not in (64, 128) or q.stride(3) != 1 or k.stride(3) != 1:
        return (
            f"it needs contiguous vectors of 64 or 128 channels, got {q.shape[3]} with strides of {q.stride(3)} and "
            f"{k.stride(3)} elements"
        )
    if tiles.rows is not None or tiles.table is not None:
        return "it needs consecutive rows, the same ones in the whole batch"
    if tiles.start >= tiles.first_row * tiles.block_size + tiles.q_pitch:
        return (
            f"it needs queries from the first sub-block on, got rows from block {tiles.first_row} on and queries from "
            f"position {tiles.start} on"
        )
    if not tiles.whole_rows(q, k):
        return "it needs a row of tiles whose sub-blocks are all there"
    return None


IMPLEMENTATIONS = {
    "hopper": dispatch.Implementation("hopper", hopper_usable),
    "triton": dispatch.Implementation("triton"),
    "reference": dispatch.Implementation("reference"),
}
ENCODERS = {name: dispatch.Implementation(name) for name in ("triton", "reference")}


def encode_blocks(
    pooled: Tensor,
    linear: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    pitch: int = 1,
    offset: int = 0,
    implementation: str | None = None,
) -> Tensor:
    """Project pooled queries or keys and rotate them at the positions of their blocks.

    The gate of the SeerAttention paper (arXiv 2410.13276, section 3.1) between its pooling and its product.

    Args:
        pooled: ``[B, H', N, C]``; float32, float16 or bfloat16 (the reference takes float64, too).
        linear: ``[H, C, W]``, dtype of pooled, with H = H' or a multiple of it (a key projection for each query head);
            None: no projection, C is W.
        cos, sin: ``[B or 1, T, rotary_dim]`` with N = ceil(T / pitch), halves repeated as Hugging Face lays it out;
            block n is rotated by entry ``n * pitch``. A table wider than W is read at every (rotary_dim / W)-th
            channel. None: no rotation.
        pitch: entries of the table a block: 1 for a table of block starts, the tokens of a block for one of tokens.
        offset: entries of block 0 that come before the first of the table: block n is rotated by entry
            ``n * pitch - offset``, or by the nearest that there is. N may then be more than the table fills.
        implementation: ``"reference"``, ``"triton"`` or None (automatic: Triton on CUDA devices, in float16 and
            bfloat16, where no gradient is asked for).

    The reference projects in the dtype of its arguments and computes in float32 from there, differentiably. Triton
    multiplies on tensor cores: projections stay float32 through the rotation, then vectors are rounded to the dtype of
    the arguments, as the attention itself does with its own queries and keys after RoPE.

    Returns:
        ``[B, H, N, W]``: float32 from the reference, the dtype of pooled from Triton.

    Raises:
        ValueError: shapes that do not fit each other; ``"triton"`` asked for with W above 256.
        TypeError: dtypes that differ.
    """
    op = "encode_blocks"
    _check_encoding(op, pooled, linear, cos, sin, pitch, offset)
    if not may_launch(op, implementation, pooled, linear, cos, sin):
        return reference.encode_blocks(pooled, linear, cos, sin, pitch, offset)
    if linear is None and cos is None:
        return pooled
    given = pitch, offset, implementation
    if tracing():
        return _encode_blocks(pooled, linear, cos, sin, *given)
    tensors = [x for x in (pooled, linear, cos, sin) if x is not None]
    kind = (linear is None, cos is None, *given)
    return _ENCODED.call(lambda: (_encode_blocks(pooled, linear, cos, sin, *given),), tensors, *kind)[0]


def gate_scores(
    q: Tensor, k: Tensor, *, block_size: int = 64, q_pitch: int | None = None, k_pitch: int | None = None,
    scale: float = 1.0, reduce: str = "max", rows: Tensor | int | None = None, span: Span | None = None,
    masked: bool = True, implementation: str | None = None,
) -> Tensor:  # fmt: skip
    """Multiply encoded queries and keys, and reduce the products of each tile of ``block_size`` tokens to one score.

    Queries and keys may be cut into sub-blocks, shorter than a tile and not equally short. A pair of sub-blocks counts
    if the key sub-block does not begin behind the last token of the query sub-block, and both hold tokens. So pairs of
    the future do not count in the diagonal tile, and that tile always has a score in a row that holds a query. Products
    of sub-blocks are never written out.

    Args:
        q: ``[B, Hq, Nq, W]``, encoded queries: the sub-blocks of the rows asked for, ``block_size // q_pitch`` to a row
            (the last row may have fewer, as a prompt ends). float32, float16 or bfloat16.
        k: ``[B, Hk, Nk, W]``, encoded keys from position 0 on, dtype of q, Hq a multiple of Hk.
        block_size: tokens a tile.
        q_pitch, k_pitch: tokens a sub-block, which divide block_size; None: block_size, one product a tile.
        scale: positive factor of the products.
        reduce: ``"max"``; ``"logsumexp"`` (natural, of scaled products; nothing is subtracted for their number);
            ``"mass"``: each query sub-block normalises its products over all its keys, a tile's are added up, and the
            largest of these shares over the query sub-blocks counts, as its natural logarithm (at least that of
            2**-100). That is a row mass, as :func:`~seerattention.ops.pooled_attention` with ``reduce="row_sum"``
            makes it of attention. Triton makes products twice; Hopper's kernel once, with scratch
            memory: 66 MiB on an H200 at 32K tokens, as much again for each further 32K.
        rows: query blocks of the rows: int64 ``[R]`` or ``[B, R]`` in any order, or the first of consecutive ones.
            None: those of the span; without a span the last R of the N key blocks.
        span: the positions of queries and keys: sub-blocks that hold none of its queries, and keys behind a row's last
            one, do not count. None: whatever is given does.
        masked: False: what lies above the block diagonal may be left undefined, which saves writing it.
        implementation: ``"reference"``, ``"triton"``, ``"hopper"`` (of blocks of 64 tokens, maxima where both pitches
            are 8, mass where both are 8 or both 4 and query heads of a key head are even in number, vectors of 64 or
            128 channels, on GPUs of compute capability 9.0; rows that lack sub-blocks run in Triton) or None
            (automatic: of the two kernels, in float16 and bfloat16 and where no gradient is asked for, Hopper's where
            it can run and Triton on other CUDA devices; the reference elsewhere).

    Returns:
        float32 ``[B, Hq, R, N]``, R = ceil(Nq / (block_size / q_pitch)), N likewise; -inf above the block diagonal and
        in rows that hold no query of the span. Rows may be padded in memory.

    Raises:
        ValueError: shapes, pitches, rows or a span that do not fit each other; ``"triton"`` asked for with W above 256;
            ``"hopper"`` where it cannot run.
        TypeError: dtypes that differ.
    """
    asked = Tiles(block_size, q_pitch or block_size, k_pitch or block_size, scale, reduce, masked)
    tiles = _check_scores(q, k, rows, span, asked)
    if not may_launch("gate_scores", implementation, q, k):
        return reference.gate_scores(q, k, tiles)
    return _gate_scores(q, k, tiles, implementation)


def _fake_encoding(pooled: Tensor, linear: Tensor | None, implementation: str | None) -> Tensor:
    batch, heads, num, width = pooled.shape
    if linear is not None:
        heads, width = linear.shape[0], linear.shape[2]
    dtype = torch.float32 if implementation == "reference" else pooled.dtype
    return pooled.new_empty(batch, heads, num, width, dtype=dtype)


@custom_op(_fake_encoding)
def _encode_blocks(
    pooled: Tensor,
    linear: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    pitch: int,
    offset: int,
    implementation: str | None,
) -> Tensor:
    """What needs no gradient; with one, tracers are to see the reference."""
    name = dispatch.choose_implementation("encode_blocks", implementation, pooled.device, ENCODERS)
    if name == "triton":
        from . import triton_encode  # imported late: triton is an optional dependency

        return triton_encode.encode_blocks(pooled, linear, cos, sin, pitch, offset)
    encoded = reference.encode_blocks(pooled, linear, cos, sin, pitch, offset).contiguous()
    return encoded if implementation == "reference" else encoded.to(pooled.dtype)


def _fake_scores(q: Tensor, k: Tensor, tiles: Tiles) -> Tensor:
    return empty_scores(q, *tiles.shape(q, k))


@custom_op(_fake_scores)
def _gate_scores(q: Tensor, k: Tensor, tiles: Tiles, implementation: str | None) -> Tensor:
    """As :func:`_encode_blocks`."""
    scores = empty_scores(q, *tiles.shape(q, k))
    name = dispatch.choose_implementation("gate_scores", implementation, q.device, IMPLEMENTATIONS, q, k, tiles)
    if name == "reference":
        scores.copy_(reference.gate_scores(q, k, tiles))
    elif tiles.reduce == "mass":
        dispatch.load(__package__, f"{IMPLEMENTATIONS[name].module}_mass", "mass_scores")(q, k, scores, tiles)
    else:
        dispatch.load(__package__, IMPLEMENTATIONS[name].module, "gate_scores")(q, k, scores, tiles)
    return scores


def empty_scores(q: Tensor, rows: int, columns: int) -> Tensor:
    """Uninitialised float32 ``[B, Hq, R, N]`` with padded rows, where q is ``[B, Hq, Nq, W]``."""
    padded = num_blocks(columns, ROW_ALIGNMENT) * ROW_ALIGNMENT
    return q.new_empty(q.shape[0], q.shape[1], rows, padded, dtype=torch.float32)[..., :columns]


def may_launch(op: str, implementation: str | None, x: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels are to run, so far as arguments tell; this is traced, so triton must not be looked for."""
    linear = others[0]
    width = x.shape[-1] if linear is None else linear.shape[-1]
    if implementation is not None:
        if implementation == "triton" and width > MAX_TRITON_WIDTH:
            raise ValueError(
                f"{op}: the Triton kernels take a width up to {MAX_TRITON_WIDTH}, got {width}; pass implementation=None"
            )
        return implementation != "reference"
    if (
        dispatch.device_type(x.device) != "cuda"
        or width > MAX_TRITON_WIDTH
        or x.dtype not in (torch.float16, torch.bfloat16)
    ):
        return False
    return not (torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in (x, *others)))


def _check_encoding(
    op: str, pooled: Tensor, linear: Tensor | None, cos: Tensor | None, sin: Tensor | None, pitch: int,
    offset: int,
) -> None:  # fmt: skip
    """Raise where shapes or dtypes do not fit each other."""
    if pooled.dim() != 4 or (linear is not None and linear.dim() != 3):
        raise ValueError(
            f"{op}: pooled must be [B, H', N, C] and linear [H, C, W], got {tuple(pooled.shape)} and "
            f"{None if linear is None else tuple(linear.shape)}"
        )
    batch, heads, num, width = pooled.shape
    if linear is not None:
        if linear.dtype != pooled.dtype:
            raise TypeError(f"{op}: linear is {linear.dtype} but pooled is {pooled.dtype}; convert one of them")
        if not heads or linear.shape[0] % heads or linear.shape[1] != width:
            raise ValueError(f"{op}: linear must be [multiple of {heads}, {width}, W], got {tuple(linear.shape)}")
        width = linear.shape[2]
    if (cos is None) != (sin is None):
        raise ValueError(f"{op}: pass both cos and sin, or neither")
    if cos is None or sin is None:
        return
    entries = cos.shape[1] if cos.dim() == 3 else 0
    filled = num_blocks(entries + offset, pitch)
    fits = (filled == num or (offset and entries and filled < num)) and offset >= 0
    if cos.shape != sin.shape or not fits or cos.shape[0] not in (1, batch):
        before = f", from {offset} entries before the first on" if offset else ""
        raise ValueError(
            f"{op}: cos and sin must be [{batch} or 1, T, rotary_dim] with {num} blocks of {pitch} entries{before}, "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if cos.shape[2] > width and cos.shape[2] % width:
        raise ValueError(f"{op}: a rotary table of {cos.shape[2]} channels fits no vectors of width {width}")


def _check_scores(q: Tensor, k: Tensor, rows: Tensor | int | None, span: Span | None, asked: Tiles) -> Tiles:
    """What is asked for, with its rows; raises where arguments do not fit each other."""
    op = "gate_scores"
    block_size, q_pitch, k_pitch = asked.block_size, asked.q_pitch, asked.k_pitch
    if k.dtype != q.dtype:
        raise TypeError(f"{op}: k is {k.dtype} but q is {q.dtype}; convert one of them")
    if q.dim() != 4 or k.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"{op}: q must be [B, Hq, Nq, W] and k [B, Hk, Nk, W], got {tuple(q.shape)}, {tuple(k.shape)}")
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"{op}: {q.shape[1]} query heads are not a multiple of {k.shape[1]} heads of k")
    if not (0 < q_pitch <= block_size and 0 < k_pitch <= block_size) or block_size % q_pitch or block_size % k_pitch:
        raise ValueError(f"{op}: pitches must divide block_size ({block_size}), got {q_pitch} and {k_pitch}")
    if not asked.scale > 0:
        raise ValueError(f"{op}: scale must be positive, got {asked.scale}")
    if asked.reduce not in REDUCTIONS:
        raise ValueError(f"{op}: reduce must be one of {REDUCTIONS}, got {asked.reduce!r}")
    num_rows, columns = num_blocks(q.shape[2], block_size // q_pitch), num_blocks(k.shape[2], block_size // k_pitch)
    table, start, end = None, 0, asked.end
    if span is not None:
        table = span.table
        if span.plain:
            start, end = span.keys - span.queries, span.keys
        if span.batch != q.shape[0] or k.shape[2] != num_blocks(span.keys, k_pitch):
            raise ValueError(
                f"{op}: the span has {span.batch} rows of {span.keys} keys, but k is {tuple(k.shape)} with {k_pitch} "
                "tokens a sub-block"
            )
        if rows is None and num_rows != span.num_rows(block_size):
            raise ValueError(f"{op}: the span has {span.num_rows(block_size)} rows of tiles, but q has {num_rows}")
    first = columns - num_rows if span is None else start // block_size
    if isinstance(rows, int):
        first, rows = rows, None
        if table is not None:
            raise ValueError(f"{op}: rows={first} with a span whose rows begin at different blocks; pass rows=None")
    if rows is None and table is None and not 0 <= first <= columns - num_rows:
        raise ValueError(f"{op}: got {num_rows} rows from query block {first} on, but {columns} key blocks")
    if rows is not None:
        if rows.is_floating_point() or rows.shape not in ((num_rows,), (q.shape[0], num_rows)):
            raise ValueError(
                f"{op}: rows must be integers [{num_rows}] or [{q.shape[0]}, {num_rows}], got {rows.dtype} "
                f"{tuple(rows.shape)}"
            )
        rows = rows.to(q.device, torch.int64)
        rows = rows if rows.dim() == 2 else rows[None]
    return asked._replace(scale=float(asked.scale), rows=rows, first_row=first, start=start, end=end, table=table)
