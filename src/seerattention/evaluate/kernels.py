"""Attention kernels side by side: inputs, lists, dense kernels to compare with, and the check that precedes any time.

What ``seer bench`` and the repository's ``benchmarks/`` share. Shapes as in the ops: ``q [B, Hq, Tq, D]``,
``k, v [B, Hkv, Tk, D]``, queries are the last Tq of the Tk positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from ..config import GateSpec, PrefillGateConfig
from ..gates import BlockGate, build_gate
from ..ops.block_selection import dense_indices
from ..ops.block_sparse_attention import block_sparse_attention
from ..ops.indices import BlockIndices, num_blocks, num_query_blocks, read_lists
from ..policies import TopK

__all__ = [
    "TOLERANCE",
    "AttentionShape",
    "GateInputs",
    "WrongResultError",
    "attention_error",
    "check_attention",
    "count_tiles",
    "dense_kernels",
    "dense_lists",
    "make_gate",
    "make_inputs",
    "random_lists",
    "require_accurate",
    "sample_rows",
    "tile_flops",
]

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest relative error against float32 of a kernel that may be timed, in any sampled block of any head."""

_LSE_TOLERANCE = 1e-2  # absolute, of the natural logarithm
_ROTARY_BASE = 500_000.0


class WrongResultError(ValueError):
    """A kernel is further from its float32 reference than rounding explains; it must not be timed."""


@dataclass(frozen=True)
class AttentionShape:
    """The shape of one attention layer, batch size 1.

    Attributes:
        heads, kv_heads: query heads and KV heads.
        head_dim: channels of a head.
        block_size: tokens a block.
        dtype: of q, k and v.
    """

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 64
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if min(self.heads, self.kv_heads, self.head_dim) < 1 or self.heads % self.kv_heads:
            raise ValueError(
                f"query heads must be a multiple of KV heads, and all sizes positive, got {self.heads} query heads, "
                f"{self.kv_heads} KV heads, head_dim {self.head_dim}"
            )

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads


def make_inputs(
    shape: AttentionShape, queries: int, keys: int, device: torch.device, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal random q, k, v, laid out as Hugging Face models have them: ``[1, H, T, D]`` views of ``[1, T, H, D]``."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(heads: int, length: int) -> Tensor:
        x = torch.randn(1, length, heads, shape.head_dim, generator=generator, device=device, dtype=shape.dtype)
        return x.transpose(1, 2)

    return draw(shape.heads, queries), draw(shape.kv_heads, keys), draw(shape.kv_heads, keys)


def random_lists(
    shape: AttentionShape, queries: int, keys: int, density: float, device: torch.device, seed: int = 0
) -> BlockIndices:
    """A uniformly random list per query head and query block, of the length that ``TopK(density)`` gives it."""
    rows, blocks = num_query_blocks(queries, keys, shape.block_size), num_blocks(keys, shape.block_size)
    generator = torch.Generator(device).manual_seed(seed)
    noise = torch.rand(1, shape.heads, rows, blocks, generator=generator, device=device)
    return TopK(density).select(noise, block_size=shape.block_size)


def dense_lists(shape: AttentionShape, queries: int, keys: int, device: torch.device) -> BlockIndices:
    """Every causal block on every list."""
    rows, blocks = num_query_blocks(queries, keys, shape.block_size), num_blocks(keys, shape.block_size)
    return dense_indices(1, shape.heads, rows, blocks, block_size=shape.block_size, device=device)


@dataclass(frozen=True)
class GateInputs:
    """A gate and what it takes beside q and k.

    Attributes:
        gate: the gate module, in the dtype of the shape that it was made for.
        cos, sin: ``[1, T, head_dim]``, the rotary table.
    """

    gate: BlockGate
    cos: Tensor
    sin: Tensor

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        """Block logits ``[1, Hq, N, N]`` of a whole prompt, as a layer's prefill asks for them: undefined above the
        block diagonal."""
        return self.gate(q, k, self.cos, self.sin, masked=False)


def make_gate(
    shape: AttentionShape, length: int, device: torch.device, seed: int = 0, spec: GateSpec | None = None
) -> GateInputs:
    """A fresh gate, of the published form where no other is given, and the rotary table of ``length`` tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gate = build_gate(
            PrefillGateConfig() if spec is None else spec,
            block_size=shape.block_size,
            num_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
        )
    gate = gate.to(device, shape.dtype).requires_grad_(False)
    frequencies = _ROTARY_BASE ** (-torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim)
    angles = torch.arange(length, device=device)[:, None] * frequencies
    angles = torch.cat((angles, angles), -1)[None]
    return GateInputs(gate, angles.cos().to(shape.dtype), angles.sin().to(shape.dtype))


def dense_kernels(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Dense causal attention through every kernel of torch's that may serve here, GQA native where there is a choice.

    With fewer queries than keys the causal mask is aligned to the last key (lower right): SDPA's own ``is_causal`` is
    aligned to the first, which is another function. A kernel that this device does not have raises RuntimeError when it
    is called.
    """
    group = q.shape[1] // k.shape[1]
    if q.shape[2] < k.shape[2]:
        bias = causal_lower_right(q.shape[2], k.shape[2])
        if q.device.type == "cuda":
            return {
                "FlashAttention-2 lower-right": partial(_lower_right, SDPBackend.FLASH_ATTENTION, q, k, v, bias),
                "cuDNN in two parts": partial(_two_parts, q, k, v),
            }
        return {
            "sdpa lower-right": partial(_lower_right, None, q, k, v, bias),
            "two parts": partial(_two_parts, q, k, v),
        }
    if q.device.type == "cuda":
        return {
            "cuDNN": partial(_causal, SDPBackend.CUDNN_ATTENTION, q, k, v),
            "FlashAttention-2": partial(_causal, SDPBackend.FLASH_ATTENTION, q, k, v),
        }
    kernels: dict[str, Callable[[], Tensor]] = {"sdpa": partial(_causal, None, q, k, v)}
    if group > 1:  # on the CPU either of the two may be the faster one
        wide = (k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
        kernels["sdpa, K and V repeated"] = partial(F.scaled_dot_product_attention, q, *wide, is_causal=True)
    return kernels


def _causal(backend: SDPBackend | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _lower_right(backend: SDPBackend | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v, bias, enable_gqa=True)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, bias, enable_gqa=True)


def _two_parts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All keys before the first query without a mask, the others causally, merged by log-sum-exp: what cuDNN, which
    cannot align its causal mask to the last key, makes of a chunk."""
    split = k.shape[2] - q.shape[2]
    before, lse_before = _with_lse(q, k[:, :, :split], v[:, :, :split], False)
    own, lse_own = _with_lse(q, k[:, :, split:], v[:, :, split:], True)
    share = (lse_own - lse_before).sigmoid()[..., None]
    return torch.lerp(before.float(), own.float(), share).to(q.dtype)


def _with_lse(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    if q.device.type == "cuda":
        out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal)[:2]
    else:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    return out, lse.reshape(q.shape[:3]).float()


def sample_rows(num_rows: int, count: int, seed: int = 0) -> list[int]:
    """At most ``count`` rows of ``num_rows``, ascending: the first, the second, the last, and random ones."""
    drawn = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(list(dict.fromkeys([0, num_rows - 1, min(1, num_rows - 1), *drawn]))[:count])


@torch.inference_mode()
def attention_error(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockIndices,
    rows: Sequence[int],
    *,
    lse: Tensor | None = None,
) -> float:
    """How far attention is from the float32 reference on the lists ``blocks``, on some of their rows.

    Args:
        out: ``[1, Hq, Tq, D]``; lse: float32 ``[1, Hq, Tq]``, also checked where given.
        rows: rows of the lists to compare; every element of ``out`` is checked for NaN.

    Returns:
        The largest ``norm(out - reference) / norm(reference)`` of any head in any of these query blocks; infinite where
        there is a NaN, a wrong shape or dtype, or an LSE that is off by more than 0.01.
    """
    if out.shape != q.shape or out.dtype != q.dtype or bool(out.isnan().any()):
        return float("inf")
    offset, worst = k.shape[2] - q.shape[2], 0.0
    for row in rows:
        absolute = blocks.first_row + row
        start = max(offset, absolute * blocks.block_size)
        end = min(k.shape[2], (absolute + 1) * blocks.block_size)
        listed = BlockIndices(
            blocks.indices[:, :, row : row + 1], blocks.counts[:, :, row : row + 1], absolute + 1, blocks.block_size
        )
        queries = slice(start - offset, end - offset)
        exact = [x.float() for x in (q[:, :, queries], k[:, :, :end], v[:, :, :end])]
        expected, expected_lse = block_sparse_attention(
            exact[0], exact[1], exact[2], listed, return_lse=True, implementation="reference"
        )
        difference = (out[:, :, queries].float() - expected).flatten(2).norm(dim=-1)
        worst = max(worst, float((difference / expected.flatten(2).norm(dim=-1)).max()))
        if lse is not None and not float((lse[:, :, queries] - expected_lse).abs().max()) < _LSE_TOLERANCE:
            return float("inf")
    return worst


def check_attention(
    function: Callable[[], Tensor | tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockIndices,
    *,
    sampled: int = 6,
    seed: int = 0,
) -> float:
    """Run an attention function once and hold it to the float32 reference; returns its :func:`attention_error`.

    The memory that the result is likely to get holds NaN, so that what is never written shows.

    Raises:
        WrongResultError: the error is above :data:`TOLERANCE`: times of this function would be times of wrong results.
    """
    poison = torch.full_like(q, float("nan"))
    del poison
    result = function()
    out, lse = result if isinstance(result, tuple) else (result, None)
    error = attention_error(out, q, k, v, blocks, sample_rows(blocks.num_rows, sampled, seed), lse=lse)
    require_accurate(error, q.dtype)
    return error


def require_accurate(error: float, dtype: torch.dtype) -> None:
    """Raise :class:`WrongResultError` where a relative error is above :data:`TOLERANCE` of the dtype."""
    if not error <= TOLERANCE[dtype]:
        raise WrongResultError(
            f"wrong results: relative error {error:.1e} against the float32 reference, at most {TOLERANCE[dtype]:.0e} "
            f"is allowed in {str(dtype).removeprefix('torch.')}"
        )


def count_tiles(blocks: BlockIndices, heads: int) -> int:
    """Tiles that attention of ``heads`` query heads visits; the diagonal tile counts once, a partial one as a whole."""
    counts = read_lists(blocks.checked())[1]
    return int(counts.sum(dtype=torch.int64)) * (heads // counts.shape[1])


def tile_flops(block_size: int, head_dim: int) -> int:
    """Floating-point operations of one tile: two products of ``block_size x block_size x head_dim``."""
    return 4 * block_size * block_size * head_dim
