"""Public functions of scores of query tokens: argument checks and the choice of an implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ..custom_op import tracing
from ..gate_scores.interface import MAX_TRITON_WIDTH
from ..replay import Replays
from . import reference
from .reference import Row

__all__ = ["encode_tokens", "token_scores"]

IMPLEMENTATIONS = {name: dispatch.Implementation(name) for name in ("triton", "reference")}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# A program reads all of its head's projection for one token: more tokens had better be encoded as blocks are.
MOST_TOKENS = 16
# Queries of a window that a program holds.
MOST_TOGETHER = 64
_ENCODED = Replays()


def encode_tokens(
    q: Tensor,
    linear: Tensor,
    norm: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    eps: float = 1e-6,
    implementation: str | None = None,
) -> Tensor:
    """Project the query tokens of a decode gate, normalise and rotate them (SeerAttention-R, arXiv 2506.08889).

    Args:
        q: ``[B, Hq, T, D]`` before RoPE; float32, float16 or bfloat16.
        linear: ``[H, G * D, W]``, with Hq = H * G: the query heads of a group are merged (G of them), or each has a
            projection of its own (G = 1).
        norm: ``[W]``, weight of the RMS norm; None: there is none.
        cos, sin: ``[B or 1, T, rotary_dim]``, the rotary table at the tokens; a table wider than W is read at every
            (rotary_dim / W)-th channel. None: no rotation.
        eps: of the norm.
        implementation: ``"reference"``, ``"triton"`` or None (Triton on CUDA devices where no gradient is asked for and
            nothing is traced: one launch).

    Returns:
        ``[B, H, T, W]`` of the dtype of ``linear``; Triton computes in float32 up to there.

    Raises:
        ValueError: shapes that do not fit each other; ``"triton"`` asked for with W above 256.
        TypeError: dtypes that are not supported.
    """
    op = "encode_tokens"
    _check_encoding(op, q, linear, norm, cos, sin)
    if not _may_launch(op, implementation, linear.shape[2], q, linear, norm):
        return reference.encode_tokens(q, linear, norm, cos, sin, eps)
    from . import triton  # imported late: triton is an optional dependency

    tensors = [x for x in (q, linear, norm, cos, sin) if x is not None]

    def encode() -> tuple[Tensor]:
        return (triton.encode_tokens(q, linear, norm, cos, sin, eps),)

    return _ENCODED.call(encode, tensors, norm is None, cos is None, eps)[0]


def token_scores(
    queries: Tensor,
    keys: Tensor,
    *,
    columns: int,
    parts: int = 1,
    scale: float = 1.0,
    together: bool = False,
    implementation: str | None = None,
) -> Tensor:
    """Scores of all complete key blocks for one query token, or for the queries of a window together.

    The score of a block is the largest product of any of its parts with any query head of the KV head. With
    ``together`` the queries are those of the last tokens, and a block gets the largest of their log-probabilities,
    ``s_ij - logsumexp_j s_ij``.

    Args:
        queries: ``[B, Hv, R, W]`` of :func:`encode_tokens`, Hv a multiple of Hkv; R is 1 without ``together``.
        keys: ``[B, Hkv, N * parts, W]``, dtype of the queries: parts of N complete blocks, all of which are seen. What
            is left over of a block is not looked at.
        columns: key blocks of the row of scores, N at least; those behind the complete ones score -inf.
        parts: encoded keys a block.
        scale: positive factor of the products.
        together: see above.
        implementation: as in :func:`encode_tokens` (one launch, or two together).

    Returns:
        float32 ``[B, Hkv, 1, columns]``. Rows may be padded in memory.

    Raises:
        ValueError: shapes that do not fit each other; ``"triton"`` asked for with W above 256 or more than 64 queries.
        TypeError: dtypes that differ or are not supported.
    """
    op = "token_scores"
    _check_scores(op, queries, keys, columns, parts, scale, together)
    row = Row(columns, parts, scale, together)
    fits = queries.shape[2] <= MOST_TOGETHER
    if implementation == "triton" and not fits:
        raise ValueError(f"{op}: the Triton kernels take up to {MOST_TOGETHER} queries, got {queries.shape[2]}")
    if not fits or not _may_launch(op, implementation, keys.shape[3], queries, keys):
        return reference.token_scores(queries, keys, row)
    from . import triton  # imported late: triton is an optional dependency

    return triton.token_scores(queries, keys, row)


def _may_launch(op: str, implementation: str | None, width: int, *tensors: Tensor | None) -> bool:
    """Whether the kernels are to run."""
    if implementation == "triton" and width > MAX_TRITON_WIDTH:
        raise ValueError(f"{op}: the Triton kernels take a width up to {MAX_TRITON_WIDTH}, got {width}")
    device = next(x.device for x in tensors if x is not None)
    if implementation is not None:
        return dispatch.choose_implementation(op, implementation, device, IMPLEMENTATIONS) == "triton"
    if dispatch.device_type(device) != "cuda" or width > MAX_TRITON_WIDTH or tracing():
        return False
    if not dispatch.triton_importable():
        return False
    return not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors))


def _check_encoding(
    op: str, q: Tensor, linear: Tensor, norm: Tensor | None, cos: Tensor | None, sin: Tensor | None
) -> None:
    if q.dim() != 4 or linear.dim() != 3:
        raise ValueError(
            f"{op}: q must be [B, Hq, T, D] and linear [H, G * D, W], got {tuple(q.shape)}, {tuple(linear.shape)}"
        )
    batch, heads, tokens, head_dim = q.shape
    if not linear.shape[0] or heads * head_dim != linear.shape[0] * linear.shape[1] or linear.shape[1] % head_dim:
        raise ValueError(f"{op}: linear must be [H, {heads} / H * {head_dim}, W], got {tuple(linear.shape)}")
    if q.dtype not in DTYPES or linear.dtype not in DTYPES:
        raise TypeError(f"{op}: q and linear must be float32, float16 or bfloat16, got {q.dtype} and {linear.dtype}")
    width = linear.shape[2]
    if norm is not None and norm.shape != (width,):
        raise ValueError(f"{op}: norm must be [{width}], got {tuple(norm.shape)}")
    if (cos is None) != (sin is None):
        raise ValueError(f"{op}: pass both cos and sin, or neither")
    if cos is None or sin is None:
        return
    if cos.dim() != 3 or cos.shape != sin.shape or cos.shape[1] != tokens or cos.shape[0] not in (1, batch):
        raise ValueError(f"{op}: cos and sin must be [{batch} or 1, {tokens}, rotary_dim], got {tuple(cos.shape)}")
    if cos.shape[2] > width and cos.shape[2] % width:
        raise ValueError(f"{op}: a rotary table of {cos.shape[2]} channels fits no vectors of width {width}")


def _check_scores(
    op: str, queries: Tensor, keys: Tensor, columns: int, parts: int, scale: float, together: bool
) -> None:
    if queries.dtype != keys.dtype or keys.dtype not in DTYPES:
        raise TypeError(
            f"{op}: queries and keys must both be float32, float16 or bfloat16, got {queries.dtype} and {keys.dtype}"
        )
    if queries.dim() != 4 or keys.dim() != 4 or queries.shape[0] != keys.shape[0] or queries.shape[3] != keys.shape[3]:
        raise ValueError(
            f"{op}: queries must be [B, Hv, R, W] and keys [B, Hkv, N * parts, W], got {tuple(queries.shape)} and "
            f"{tuple(keys.shape)}"
        )
    if not keys.shape[1] or queries.shape[1] % keys.shape[1]:
        raise ValueError(f"{op}: {queries.shape[1]} query vectors are not a multiple of {keys.shape[1]} KV heads")
    if queries.shape[2] < 1 or (queries.shape[2] > 1 and not together):
        raise ValueError(f"{op}: one query has a row of scores, or several together, got {queries.shape[2]}")
    if parts < 1 or columns < keys.shape[2] // parts:
        raise ValueError(
            f"{op}: {keys.shape[2]} keys of {parts} parts a block do not fit into {columns} columns of blocks"
        )
    if not scale > 0:
        raise ValueError(f"{op}: scale must be positive, got {scale}")
