"""What the 2-D and the 1-D op of this directory share: what may be asked of them, and the checks of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import dispatch

REDUCTIONS = ("max", "sum")


class Wanted(NamedTuple):
    """What is asked of an implementation, checked; every one is called with ``q, k, rows`` and this.

    The public functions of both ops say what each field means.
    """

    block_size: int
    scale: float
    lengths: Tensor | None
    reduce: str
    normalize: bool
    lse: Tensor | None


def check_arguments(
    op: str,
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None,
    rows: Tensor | None,
    lengths: Tensor | None,
    reduce: str,
    lse: Tensor | None,
) -> tuple[float, Tensor | None]:
    """Check all arguments but the block size and the values of ``rows``.

    Returns:
        The scale that was given or is the default, and ``lengths`` as int64 on the device of q.

    Raises:
        ValueError: shapes that do not fit, an unknown reduction, a scale of 0 or less.
        TypeError: unsupported dtypes.
    """
    dispatch.check_query_key(op, q, k)
    if reduce not in REDUCTIONS:
        raise ValueError(f"{op}: reduce must be one of {REDUCTIONS}, got {reduce!r}")
    batch, _, _, head_dim = q.shape
    if rows is not None and (rows.dim() != 1 or rows.dtype != torch.int64):
        raise ValueError(f"{op}: rows must be int64 [R], got {rows.dtype} {tuple(rows.shape)}")
    if lengths is not None:
        if lengths.shape != (batch,) or lengths.is_floating_point():
            raise ValueError(f"{op}: lengths must be integers [{batch}], got {lengths.dtype} {tuple(lengths.shape)}")
        lengths = lengths.to(q.device, torch.int64)
    scale = dispatch.default_scale(head_dim, scale)
    if not scale > 0:
        raise ValueError(f"{op}: scale must be positive, got {scale}")
    if lse is not None and (lse.shape != q.shape[:3] or lse.dtype != torch.float32 or lse.device != q.device):
        raise ValueError(
            f"{op}: lse must be float32 {list(q.shape[:3])} on {q.device}, got {lse.dtype} {list(lse.shape)} on "
            f"{lse.device}"
        )
    return scale, lengths


def as_op(
    name: str, fake: Callable[..., Tensor], run: Callable[[Tensor, Tensor, Tensor, Wanted, str | None], Tensor]
) -> Callable[..., Tensor]:
    """One op to tracers that calls ``run`` with ``q, k, rows``, what is wanted of it, and the implementation asked for.

    Tracers take tensors, numbers and strings, so that the op has a parameter for each field of :class:`Wanted`.

    Args:
        name: what torch knows the op by.
        fake: see :func:`~seerattention.ops.dispatch.custom_op`.
    """

    def op(
        q: Tensor,
        k: Tensor,
        rows: Tensor,
        block_size: int,
        scale: float,
        lengths: Tensor | None,
        reduce: str,
        normalize: bool,
        lse: Tensor | None,
        implementation: str | None,
    ) -> Tensor:
        return run(q, k, rows, Wanted(block_size, scale, lengths, reduce, normalize, lse), implementation)

    op.__name__ = name
    return dispatch.custom_op(fake)(op)


def check_range(op: str, rows: Tensor, first: int, end: int, what: str) -> None:
    """Raise ValueError unless all ``rows`` lie in ``[first, end)``, which ``what`` says in words.

    This reads values, and so would wait for a device: it is made on the CPU only, and not while tracing.
    """
    if rows.device.type != "cpu" or not rows.numel():
        return
    if not (first <= int(rows.min()) and int(rows.max()) < end):
        raise ValueError(f"{op}: rows must lie in [{first}, {end}), {what}, got {rows.tolist()}")
