"""Block-sparse attention on the CPU through compiled FlexAttention.

The block mask is built from the lists as they are: no dense mask, no sorting. What was learned about FlexAttention on
the CPU:

* it computes bfloat16 at half the speed of float32 where the CPU has no AMX, so every call runs in float32;
* it returns no log-sum-exp;
* the number of threads and of heads and head_dim are compiled in; lengths, capacities and lists are not.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..indices import BlockIndices, ordered_lists, read_lists
from ..span import Span
from .cpu_gathered import block_sparse_attention_cpu_gathered

logger = logging.getLogger(__name__)

# Whether the automatic choice may be FlexAttention. It was, until the gathered path became faster, which needs no
# compile and returns LSE: at 8K tokens and density 0.12 (random lists, float32) 111 ms against 215 on a 2-core Ice
# Lake, benchmarks/results/cpu. A switch, because other CPUs have not been measured since, and because FlexAttention
# suffers less where other processes keep the cores busy.
AUTOMATIC = False
# Below this many queries a compile (7 to 40 s, once) never pays, and the gathered path is as fast.
MIN_QUERIES = 2048
# Sizes of the warm-up: unequal on purpose, and marked dynamic.
_WARM_UP_QUERIES, _WARM_UP_KEYS = 333, 777
# Dynamo's default of 8 compiles a function is meant to find accidental ones; here each is a head configuration.
_MAX_CONFIGURATIONS = 64


def flex_usable(q: Tensor, blocks: BlockIndices) -> bool:
    """Whether the automatic choice for these inputs is FlexAttention rather than the gathered path."""
    plain = blocks.span is None or blocks.span.plain
    return AUTOMATIC and plain and q.shape[2] >= MIN_QUERIES and _flex_supported()


@functools.cache
def _flex_supported() -> bool:
    """FlexAttention compiles for the CPU on x86 with AVX2 only; elsewhere do not even try."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and torch._dynamo.is_dynamo_supported()


def block_sparse_attention_cpu_flex(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockIndices, scale: float, required: bool = False
) -> Tensor:
    """``out [B, Hq, Tq, D]`` in the dtype of q; arguments as checked by the interface.

    The first call for a head configuration compiles. Where that fails (no C++ compiler), a warning is logged once and
    the gathered path computes the result; so it does for a single query block.

    Args:
        required: raise instead of falling back.

    Raises:
        RuntimeError: the compile failed and ``required`` is set.
    """
    if blocks.num_rows < 2:  # dynamic sizes are at least 2: a single query block would be one more compile
        return block_sparse_attention_cpu_gathered(q, k, v, blocks, scale, return_lse=False)[0]
    inference = torch.is_inference_mode_enabled()
    compiled = _compiled(q.shape[1], k.shape[1], q.shape[3], blocks.block_size, torch.get_num_threads(), inference)
    if compiled is None:
        if required:
            raise RuntimeError(
                "block_sparse_attention: FlexAttention could not be compiled on this CPU (the warning logged before "
                "says why); use implementation='cpu_gathered' or None"
            )
        return block_sparse_attention_cpu_gathered(q, k, v, blocks, scale, return_lse=False)[0]
    out = torch.empty_like(q)
    for row in range(q.shape[0]):
        # One batch row at a time: batch size 1 and others would be two compiles, and heads keep the cores busy.
        one = slice(row, row + 1)
        indices, counts = read_lists(blocks)
        span = Span(1, q.shape[2], k.shape[2])
        lists = ordered_lists(indices[one], counts[one], blocks.num_key_blocks, blocks.block_size, span=span)
        out[one] = _attend(compiled, q[one], k[one], v[one], lists, scale)
    return out


def _attend(compiled: Callable, q: Tensor, k: Tensor, v: Tensor, blocks: BlockIndices, scale: float) -> Tensor:
    block_size, num_rows, num_key_blocks = blocks.block_size, blocks.num_rows, blocks.num_key_blocks
    indices, counts = read_lists(blocks)
    shared = q.shape[1] // counts.shape[1]
    indices, counts = indices.repeat_interleave(shared, 1), counts.repeat_interleave(shared, 1)
    if indices.shape[-1] < 2:  # dynamic sizes are at least 2
        indices = F.pad(indices, (0, 2 - indices.shape[-1]))
    query_blocks = torch.arange(blocks.first_row, num_key_blocks, dtype=torch.int32)
    last = indices.gather(-1, (counts - 1).clamp(min=0)[..., None].long())[..., 0]
    # The diagonal block needs the mask; as the last entry of an ascending list it is cut off the full blocks by count.
    diagonal = ((last == query_blocks) & (counts > 0)).int()
    # FlexAttention cuts query blocks from its first query on: pad in front to the block grid.
    offset = k.shape[2] - q.shape[2]
    front = offset % block_size
    out = compiled(
        _plain(F.pad(q.float(), (0, 0, front, 0)) if front else q.float()),
        _plain(k.float()),
        _plain(v.float()),
        _plain(diagonal),
        query_blocks[:, None].expand(1, q.shape[1], num_rows, max(2, num_key_blocks)),
        _plain(counts - diagonal),
        _plain(indices),
        torch.tensor(offset - front, dtype=torch.int64),
        scale,
    )
    return out[:, :, front:]


def _plain(x: Tensor) -> Tensor:
    """A contiguous tensor that is no view: strides and the base of a view are guarded, and would compile again."""
    x = x.contiguous()
    return x.clone() if x._is_view() else x


@functools.cache
def _compiled(
    num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, num_threads: int, inference_mode: bool
) -> Callable | None:
    """The compiled function for one head configuration, tried on a small input; None where it cannot be had."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        num_partial: Tensor,
        partial: Tensor,
        num_full: Tensor,
        full: Tensor,
        offset: Tensor,
        scale: float,
    ) -> Tensor:
        def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return query + offset >= key

        mask = BlockMask(
            seq_lengths=(q.shape[2], k.shape[2]),
            kv_num_blocks=num_partial,
            kv_indices=partial,
            full_kv_num_blocks=num_full,
            full_kv_indices=full,
            q_num_blocks=None,
            q_indices=None,
            full_q_num_blocks=None,
            full_q_indices=None,
            BLOCK_SIZE=(block_size, block_size),
            mask_mod=causal,
        )
        return flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=True)

    # The generated code sizes its buffers by the number of threads, so that is part of the key and said explicitly:
    # a cached binary of another thread count must not be picked up.
    compiled = torch.compile(attention, dynamic=True, fullgraph=True, options={"cpp.threads": num_threads})
    try:
        with torch._dynamo.config.patch(recompile_limit=_MAX_CONFIGURATIONS):
            _warm_up(compiled, num_heads, num_kv_heads, head_dim, block_size)
    except Exception as error:  # whatever goes wrong in a compiler, there is a path without it
        first_line = (str(error).strip().splitlines() or [""])[0]
        logger.warning(
            "block_sparse_attention: FlexAttention cannot be compiled for this CPU, the slower gathered path runs "
            "instead (a C++ compiler, found through CXX, is needed): %s: %s",
            type(error).__name__,
            first_line,
        )
        return None
    return compiled


def _warm_up(compiled: Callable, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int) -> None:
    """Compile on a small input, and do not trust the binary before it has computed that input correctly."""
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float32)
    q = draw(1, num_heads, _WARM_UP_QUERIES, head_dim)
    k, v = draw(2, 1, num_kv_heads, _WARM_UP_KEYS, head_dim).unbind(0)
    first_row = (_WARM_UP_KEYS - _WARM_UP_QUERIES) // block_size
    num_key_blocks = -(-_WARM_UP_KEYS // block_size)
    mask = draw(1, num_heads, num_key_blocks - first_row, num_key_blocks) < 0
    blocks = BlockIndices.from_mask(mask, block_size)

    def mark_and_run(*inputs: Tensor | float) -> Tensor:
        for tensor in inputs[:7]:
            assert isinstance(tensor, Tensor)
            torch._dynamo.mark_dynamic(tensor, 2)
        for tensor in (inputs[4], inputs[6]):
            torch._dynamo.mark_dynamic(tensor, 3)
        return compiled(*inputs)

    scale = head_dim**-0.5
    out = _attend(mark_and_run, q, k, v, blocks, scale)
    expected = block_sparse_attention_cpu_gathered(q, k, v, blocks, scale, return_lse=False)[0]
    error = float((out - expected).abs().max())
    if not error < 1e-3:
        raise RuntimeError(f"the compiled attention is wrong by {error}")
