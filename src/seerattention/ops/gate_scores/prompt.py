"""Queries and keys of whole prompts, pooled and encoded together where that saves launches."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from .. import dispatch
from ..block_pooling import block_pooling
from ..custom_op import tracing
from .interface import ENCODERS, encode_blocks, may_launch

if TYPE_CHECKING:
    from .triton_prompt import Shape

# Tokens up to which both share their launches. There the host is what a layer waits for; of longer prompts each of the
# two is read by programs that suit it.
MOST_TOKENS = 16384
# Tokens of the longest sub-blocks that are pooled and encoded by one kernel: longer ones leave it too few programs, and
# little to save.
MOST_PITCH = 16


class Encoding(NamedTuple):
    """How queries, or keys, are encoded.

    Attributes:
        linear: ``[H, C, W]``, the projection; None: there is none.
        kinds: how blocks are pooled.
        pitch: tokens a block.
    """

    linear: Tensor | None
    kinds: tuple[str, ...]
    pitch: int


def encode_prompt(
    q: Tensor,
    k: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    encodings: tuple[Encoding, Encoding],
    *,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``encode_blocks(block_pooling(x))`` of the queries and of the keys of whole prompts.

    Where Triton kernels run and nothing is traced: in one launch where both are projected, keys once, and cut into
    sub-blocks of up to 16 tokens, and the GPU has the shared memory; else in two instead of four for prompts of up to
    ``MOST_TOKENS`` tokens.

    Args:
        q, k: ``[B, Hq, T, D]`` and ``[B, Hkv, T, D]``.
        cos, sin: as in :func:`encode_blocks`, of tokens; None: no rotation.
        encodings: of queries and of keys.
        implementation: as in :func:`encode_blocks`.

    Returns:
        Encoded queries and keys.

    Raises:
        ValueError, TypeError: as the two ops.
    """
    if _together(q, k, cos, encodings, implementation):
        of_q, of_k = encodings
        assert of_k.linear is not None
        kinds, pitches = (of_q.kinds, of_k.kinds), (of_q.pitch, of_k.pitch)
        shape = _shape_at_once(q, k, encodings)
        if shape is not None:
            from .triton_prompt import pool_encode  # imported late: triton is an optional dependency

            assert of_q.linear is not None
            return pool_encode(q, k, (of_q.linear, of_k.linear), (cos, sin), kinds, pitches, shape)
        if q.shape[2] <= MOST_TOKENS:
            from ..block_pooling.triton import pool_both
            from .triton_encode import encode_both

            return encode_both(pool_both(q, k, kinds, pitches), (of_q.linear, of_k.linear), (cos, sin), pitches)
    queries, keys = (
        _encode(x, cos, sin, how, encodings[1].linear, implementation) for x, how in zip((q, k), encodings, strict=True)
    )
    return queries, keys


def _encode(
    x: Tensor, cos: Tensor | None, sin: Tensor | None, how: Encoding, other: Tensor | None, implementation: str | None
) -> Tensor:
    """Of queries or keys; in the dtype of the keys' projection."""
    pooled = block_pooling(x, how.kinds, block_size=how.pitch, implementation=implementation)
    pooled = pooled if other is None else pooled.to(other.dtype)
    return encode_blocks(pooled, how.linear, cos, sin, pitch=how.pitch, implementation=implementation)


def _together(
    q: Tensor, k: Tensor, cos: Tensor | None, encodings: tuple[Encoding, Encoding], implementation: str | None
) -> bool:
    """Whether both are encoded by the kernels that take both; whatever is wrong is for the ops to say."""
    (q_linear, q_kinds, _), (k_linear, _, _) = encodings
    if tracing() or k_linear is None or q.dim() != 4 or k.dim() != 4 or 0 in q.shape or 0 in k.shape:
        return False
    width = k_linear.shape[2]
    fits = q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:] and k_linear.shape[0] % k.shape[1] == 0
    if q_linear is None:
        fits = fits and len(q_kinds) * q.shape[3] == width
    else:
        fits = fits and q_linear.shape[0] == q.shape[1] and q_linear.shape[2] == width
    alike = all(x is None or (x.dtype, x.device) == (k.dtype, k.device) for x in (q, k_linear, q_linear))
    if not fits or not alike or q.stride(3) != 1 or k.stride(3) != 1:
        return False
    if not may_launch("encode_blocks", implementation, k, k_linear, q_linear, q):
        return False
    return dispatch.choose_implementation("encode_blocks", implementation, q.device, ENCODERS) == "triton"


def _shape_at_once(q: Tensor, k: Tensor, encodings: tuple[Encoding, Encoding]) -> Shape | None:
    """Of programs that project sub-blocks while they pool them; None: others do. Where all query heads project the keys
    for themselves it would pool them again for each."""
    linear = encodings[1].linear
    if linear is None or linear.shape[0] != k.shape[1]:
        return None
    if any(how.linear is None or how.pitch > MOST_PITCH for how in encodings):
        return None
    from .triton_prompt import shape_of

    return shape_of(q, linear.shape[2], max(len(how.kinds) for how in encodings))
