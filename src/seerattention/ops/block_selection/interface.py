"""Public functions of block selection: argument checks and the choice of an implementation.

Shared by all of them: scores are ``[B, H, Nq, Nk]`` (float32, float16 or bfloat16), query blocks are the last Nq of the
Nk key blocks, or those of a span, and what lies above the block diagonal is ignored. The diagonal block is always kept,
so a row is never empty, whatever the scores are (NaN counts as the lowest score). Rows of a span that hold no query,
and of blocks that are wholly padding, get count 0; every other row selects what it would select alone. Selection has
no gradient.

``lengths`` of right-padded rows is a short way to say a span of whole blocks; below the public functions there is only
the table of a span.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import dispatch
from ..custom_op import custom_op
from ..indices import BlockIndices, ordered_lists
from ..span import Span
from . import reference
from .reference import Rule, causal_softmax, dense_indices

__all__ = ["causal_softmax", "dense_indices", "select_threshold", "select_topk", "select_topp"]

IMPLEMENTATIONS = {name: dispatch.Implementation(name) for name in ("triton", "reference")}
# A Triton program holds a whole row in registers, of at most 1024 threads: 2M tokens in blocks of 64.
MAX_TRITON_BLOCKS = 1 << 15


@torch.no_grad()
def select_threshold(
    probabilities: Tensor, threshold: float | Tensor, *, block_size: int = 64, lengths: Tensor | None = None,
    last_blocks_dense: int = 0, softmax: bool = False, implementation: str | None = None, span: Span | None = None,
    relative: bool = False, min_blocks: int = 0, first_blocks: int = 0, dense_rows: int = 0,
) -> BlockIndices:  # fmt: skip
    """Keep the blocks whose probability is strictly above ``threshold``, and the diagonal.

    The inference rule of the SeerAttention paper (arXiv 2410.13276, section 3.3).

    Args:
        probabilities: ``[B, H, Nq, Nk]``, block scores after the causal softmax.
        threshold: compared in float32. Or a float32 tensor ``[H or 1, N]`` on the device of the scores, a threshold of
            each head and row: the row whose own block is i goes by column i, wherever in the scores it is. N is at
            least Nk, or 1: the same for all rows. A row that has NaN there keeps nothing for its probability.
        block_size: tokens a block.
        lengths: int64 ``[B]``, valid tokens of each right-padded row (None: all).
        last_blocks_dense: the last this many valid query blocks of each row read all causal blocks.
        softmax: what is given are logits, of which the causal softmax is to be taken first. The kernels take it on the
            way, so that probabilities need no memory; theirs may differ from torch's in the last bits.
        implementation: ``"reference"``, ``"triton"`` (up to 32,768 key blocks) or None (automatic: the kernel on GPUs).
        span: which query blocks the rows are, instead of ``lengths``; the lists carry it.
        relative: the threshold is a multiple of uniform attention: a row that may see n blocks keeps those whose
            probability times n is above it.
        min_blocks: a row keeps at least so many blocks, the diagonal and its best others (all, where it has fewer).
        first_blocks: the first this many blocks are kept by every row that may see them: attention sinks.
        dense_rows: rows that may see at most so many blocks read them all.

    Returns:
        BlockIndices with capacity Nk.

    Raises:
        ValueError: wrong shapes, more query blocks than key blocks, both lengths and a span, a negative number of
            blocks, more key blocks than the kernel takes, a threshold tensor on another device.
        TypeError: scores that are not floating point, a threshold tensor that is not float32.
    """
    op = "select_threshold"
    if min(min_blocks, first_blocks, dense_rows) < 0:
        raise ValueError(
            f"{op}: min_blocks, first_blocks and dense_rows must be 0 or more, got {min_blocks}, {first_blocks} and "
            f"{dense_rows}"
        )
    table = _check(op, probabilities, block_size, lengths, span, last_blocks_dense)
    num_keys = probabilities.shape[-1]
    bounds = threshold if isinstance(threshold, Tensor) and threshold.dim() else None
    if bounds is not None:
        _check_bounds(op, bounds, probabilities)
    bound = 0.0 if bounds is not None else float(threshold)
    rule = Rule("threshold", num_keys, block_size, table, last_blocks_dense, bound, softmax=softmax, bounds=bounds)
    rule = rule._replace(relative=relative, min_blocks=min_blocks, first_blocks=first_blocks, dense_rows=dense_rows)
    return ordered_lists(*_block_selection(probabilities, rule, implementation), num_keys, block_size, span=span)


@torch.no_grad()
def select_topk(
    scores: Tensor, keep: Tensor | Sequence[int], *, block_size: int = 64, lengths: Tensor | None = None,
    last_blocks_dense: int = 0, diagonal_extra: bool = False, capacity: int | None = None,
    implementation: str | None = None, span: Span | None = None,
) -> BlockIndices:  # fmt: skip
    """Keep the ``keep[r]`` best causal blocks of each row; equal scores go to the lower block index.

    Args:
        scores: ``[B, H, Nq, Nk]``, logits or probabilities.
        keep: integers ``[Nq]`` or ``[B, Nq]``; values below 1 count as 1. A list or a CPU tensor lets the op bound the
            capacity of the lists without a device synchronisation (but not inside ``torch.compile``).
        block_size, lengths, last_blocks_dense, implementation, span: see :func:`select_threshold`.
        diagonal_extra: False: the diagonal is one of the ``keep`` blocks (it and the best ``keep - 1`` others). True:
            the ``keep`` best of all causal blocks, and the diagonal besides where it is not among them (the
            published top-k rule with the diagonal added).
        capacity: an upper bound of the list length that the caller knows, taken without a look at ``keep``; longer
            lists are cut to their best blocks.

    Returns:
        BlockIndices; the capacity is the longest list that ``keep`` allows where that is known, else Nk.

    Raises:
        ValueError: wrong shapes, more query blocks than key blocks, both lengths and a span, a negative
            ``last_blocks_dense``.
        TypeError: scores that are not floating point, ``keep`` that is not integer.
    """
    op = "select_topk"
    table = _check(op, scores, block_size, lengths, span, last_blocks_dense)
    batch, _, num_rows, num_keys = scores.shape
    keep = torch.as_tensor(keep)
    if keep.is_floating_point() or keep.is_complex() or keep.dtype == torch.bool:
        raise TypeError(f"{op}: keep must hold integers, got {keep.dtype}")
    if keep.shape not in ((num_rows,), (batch, num_rows)):
        raise ValueError(f"{op}: keep must be [{num_rows}] or [{batch}, {num_rows}], got {tuple(keep.shape)}")
    # At least the diagonal, and with diagonal_extra another block, are on every list.
    longest = num_keys if capacity is None else min(num_keys, max(1 + int(diagonal_extra), capacity))
    on_cpu = keep.device.type == "cpu"
    if capacity is None and on_cpu and keep.numel() and not torch.compiler.is_compiling():  # a trace has no values
        longest = min(num_keys, max(1, int(keep.max())) + int(diagonal_extra))
    most = max(1, longest - int(diagonal_extra)) if longest < num_keys else num_keys
    # Pageable memory is copied out before the call returns: no need to wait for the device.
    keep = keep.to(scores.device, torch.int64, non_blocking=on_cpu).clamp(1, most).view(-1, num_rows)
    if last_blocks_dense:
        longest = num_keys
    rule = Rule("topk", longest, block_size, table, last_blocks_dense, keep=keep, diagonal_extra=diagonal_extra)
    return ordered_lists(*_block_selection(scores, rule, implementation), num_keys, block_size, span=span)


@torch.no_grad()
def select_topp(
    probabilities: Tensor, p: float, *, block_size: int = 64, lengths: Tensor | None = None, last_blocks_dense: int = 0,
    softmax: bool = False, implementation: str | None = None, span: Span | None = None,
) -> BlockIndices:  # fmt: skip
    """Keep the diagonal and the fewest best other blocks with which the probabilities sum to at least ``p``.

    Sums are exact: probabilities are cut to multiples of 2^-40 (and to [0, 1]) and added as integers. A row whose
    whole sum is below ``p`` keeps all its causal blocks, and so does every row for ``p >= 1``.

    Args:
        probabilities: ``[B, H, Nq, Nk]``, block scores after the causal softmax.
        p: the mass to reach.
        block_size, lengths, last_blocks_dense, softmax, implementation, span: see :func:`select_threshold`.

    Returns:
        BlockIndices with capacity Nk.

    Raises:
        ValueError: wrong shapes, more query blocks than key blocks, both lengths and a span, ``p`` not
            positive, a negative ``last_blocks_dense``.
        TypeError: scores that are not floating point.
    """
    op = "select_topp"
    table = _check(op, probabilities, block_size, lengths, span, last_blocks_dense)
    if not p > 0:
        raise ValueError(f"{op}: p must be positive, got {p}")
    num_keys = probabilities.shape[-1]
    rule = Rule("topp", num_keys, block_size, table, last_blocks_dense, float(p), softmax=softmax)
    return ordered_lists(*_block_selection(probabilities, rule, implementation), num_keys, block_size, span=span)


def _fake(scores: Tensor, rule: Rule, implementation: str | None) -> tuple[Tensor, Tensor]:
    # The reference cuts a spare slot off rows of this memory.
    spare = int(rule.capacity == scores.shape[-1] and _choose(implementation, scores) == "reference")
    indices = scores.new_empty(*scores.shape[:3], rule.capacity + spare, dtype=torch.int32)
    return indices[..., : rule.capacity], scores.new_empty(scores.shape[:3], dtype=torch.int32)


@custom_op(_fake)
def _block_selection(scores: Tensor, rule: Rule, implementation: str | None) -> tuple[Tensor, Tensor]:
    name = _choose(implementation, scores)
    return dispatch.load(__package__, IMPLEMENTATIONS[name].module, "select")(scores, rule)


def _choose(implementation: str | None, scores: Tensor) -> str:
    name = dispatch.choose_implementation("block_selection", implementation, scores.device, IMPLEMENTATIONS)
    if name == "triton" and scores.shape[-1] > MAX_TRITON_BLOCKS:
        raise ValueError(
            f"block_selection: the Triton kernel takes up to {MAX_TRITON_BLOCKS} key blocks, got {scores.shape[-1]}; "
            "use larger blocks, or pass implementation='reference' if there is memory for some 30 bytes a score"
        )
    return name


def _check_bounds(op: str, bounds: Tensor, scores: Tensor) -> None:
    heads, num_keys = scores.shape[1], scores.shape[-1]
    if bounds.dtype != torch.float32:
        raise TypeError(f"{op}: a threshold tensor must be float32, got {bounds.dtype}")
    if bounds.dim() != 2 or bounds.shape[0] not in (1, heads) or (bounds.shape[1] < num_keys and bounds.shape[1] != 1):
        raise ValueError(
            f"{op}: a threshold tensor must be [{heads} or 1 heads, at least {num_keys} (or 1) rows], got "
            f"{tuple(bounds.shape)}"
        )
    if bounds.device != scores.device:
        raise ValueError(f"{op}: the scores are on {scores.device} but the thresholds on {bounds.device}")


def _check(
    op: str, scores: Tensor, block_size: int, lengths: Tensor | None, span: Span | None, last_blocks_dense: int
) -> Tensor | None:
    """Check what all selections share; returns the table of the span, or of the one that ``lengths`` mean."""
    dispatch.check_floating(op, scores=scores)
    if scores.dim() != 4:
        raise ValueError(f"{op}: scores must be [B, H, Nq, Nk], got {tuple(scores.shape)}")
    batch, _, num_rows, num_keys = scores.shape
    if num_rows > num_keys:
        raise ValueError(f"{op}: got {num_rows} query blocks but only {num_keys} key blocks")
    if block_size <= 0:
        raise ValueError(f"{op}: block_size must be positive, got {block_size}")
    if last_blocks_dense < 0:
        raise ValueError(f"{op}: last_blocks_dense must be 0 or more, got {last_blocks_dense}")
    if span is not None:
        if lengths is not None:
            raise ValueError(f"{op}: got lengths and a span; give one of them, the span knows the lengths")
        expected = span.batch, span.num_rows(block_size), span.num_key_blocks(block_size)
        if (batch, num_rows, num_keys) != expected:
            raise ValueError(
                f"{op}: the span has {expected[0]} batch rows of {expected[1]} query blocks and {expected[2]} key "
                f"blocks of {block_size} tokens, got scores {tuple(scores.shape)}"
            )
        if span.table is not None and span.table.device != scores.device:
            raise ValueError(f"{op}: the scores are on {scores.device} but the span on {span.table.device}")
        return span.table
    if lengths is None:
        return None
    if lengths.shape != scores.shape[:1] or lengths.is_floating_point():
        raise ValueError(f"{op}: lengths must be integers [{batch}], got {lengths.dtype} {tuple(lengths.shape)}")
    return reference.span_of_lengths(batch, num_rows, num_keys, block_size, lengths.to(scores.device)).table
