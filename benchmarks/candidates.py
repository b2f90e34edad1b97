"""What is timed for block-sparse attention: our implementations, dense kernels, and FlexAttention."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattention.evaluate.kernels import count_tiles, dense_kernels, dense_lists, tile_flops
from seerattention.ops.block_sparse_attention import IMPLEMENTATIONS, block_sparse_attention
from seerattention.ops.indices import BlockIndices

from .lists import make_lists
from .registry import Case

AUTOMATIC = "automatic"
_FLEX_BLOCKS = (64, 128)
# One compile for every length, density and block size; dynamo's default of 8 is meant to find accidental ones.
_MAX_COMPILES = 256


@dataclass(frozen=True)
class Candidate:
    """One way to compute a case.

    Attributes:
        kind: "ours", "dense" (all causal tiles) or "rival" (sparse, on lists of its own where its blocks differ).
        name: how tables call it.
        function: computes it; raises RuntimeError, ValueError or NotImplementedError where it cannot run here.
        lists: the blocks that it is to read: what it is checked against.
        flops: floating-point operations of the tiles that it visits, the diagonal tile once.
    """

    kind: str
    name: str
    function: Callable[[], Any]
    lists: BlockIndices
    flops: int

    @property
    def key(self) -> str:
        """Name in results files."""
        return f"{self.kind}: {self.name}"


def our_implementations(names: Iterable[str], device: torch.device) -> list[str | None]:
    """What an op offers here: the automatic choice (None), then every implementation but the reference by name."""
    on_cpu = device.type == "cpu"
    fitting = [name for name in names if name != "reference" and name.startswith("cpu") == on_cpu]
    return [None, *fitting]


def attention_candidates(
    case: Case, q: Tensor, k: Tensor, v: Tensor, *, flex: bool = True, compiled: bool = True
) -> list[Candidate]:
    """All candidates of a case; whether each of them runs and is right is found out when it is called.

    Args:
        flex: FlexAttention too, where it is a rival (on the CPU it is one of our implementations).
        compiled: False runs FlexAttention eagerly, on any device: only to rehearse.
    """
    shape, device = case.shape, q.device
    lists = make_lists(case.lists, shape, case.queries, case.keys, case.density, device)
    flops = count_tiles(lists, shape.heads) * tile_flops(shape.block_size, shape.head_dim)
    found = [
        Candidate("ours", name or AUTOMATIC, functools.partial(_ours, q, k, v, lists, name), lists, flops)
        for name in our_implementations(IMPLEMENTATIONS, device)
    ]
    if case.queries < case.keys and device.type == "cuda":
        found.append(Candidate("ours", "lists in one part", functools.partial(_one_part, q, k, v, lists), lists, flops))
    everything = dense_lists(shape, case.queries, case.keys, device)
    dense_flops = count_tiles(everything, shape.heads) * tile_flops(shape.block_size, shape.head_dim)
    found += [
        Candidate("dense", name, function, everything, dense_flops) for name, function in dense_kernels(q, k, v).items()
    ]
    if not flex or (device.type == "cpu" and compiled):
        return found
    for block_size in _FLEX_BLOCKS if compiled else ():  # eagerly, it ignores the lists of blocks
        coarse = case.with_block_size(block_size)
        try:
            own = (
                lists
                if coarse == case
                else make_lists(case.lists, coarse.shape, case.queries, case.keys, case.density, device)
            )
        except ValueError:  # the testbed's gates have one block size
            continue
        found.append(
            Candidate(
                "rival",
                f"FlexAttention {block_size}",
                _flex(q, k, v, own, compiled),
                own,
                count_tiles(own, shape.heads) * tile_flops(block_size, shape.head_dim),
            )
        )
    coarse = case.with_block_size(128)
    own = dense_lists(coarse.shape, case.queries, case.keys, device)
    found.append(Candidate("dense", "FlexAttention 128", _flex(q, k, v, own, compiled), own, dense_flops))
    return found


def _ours(q: Tensor, k: Tensor, v: Tensor, lists: BlockIndices, implementation: str | None) -> Any:
    """Exact masks and, where the implementation returns it, LSE: what a product kernel has to do."""
    with_lse = q.device.type != "cpu"  # the best CPU implementation returns none
    return block_sparse_attention(q, k, v, lists, return_lse=with_lse, implementation=implementation)


def _one_part(q: Tensor, k: Tensor, v: Tensor, lists: BlockIndices) -> Any:
    """The automatic choice, but never more than one program a list: what cutting lists into parts gains."""
    from seerattention.ops.block_sparse_attention import triton_parts  # imported late: triton is an optional dependency

    with mock.patch.object(triton_parts, "MAX_PARTS", 1):
        return _ours(q, k, v, lists, None)


def _flex(q: Tensor, k: Tensor, v: Tensor, lists: BlockIndices, compiled: bool) -> Callable[[], Tensor]:
    """FlexAttention on these lists, the diagonal block with a mask, all others without; compiled when first run."""
    block_size = lists.block_size
    # Without this, its default tiles are wider than the blocks.
    options = {"BLOCK_M": 64, "BLOCK_N": 64} if block_size == 64 else None

    @functools.cache
    def prepared() -> tuple[Callable[..., Any], Any]:
        return _flex_function(compiled), _block_mask(lists, q.shape[2], k.shape[2])

    def run() -> Tensor:
        function, mask = prepared()
        return function(q, k, v, block_mask=mask, enable_gqa=True, kernel_options=options)

    return run


@functools.cache
def _flex_function(compiled: bool) -> Callable[..., Any]:
    """One compiled function for all cases, so that cases of one length share a compile; every length gets its own."""
    from torch.nn.attention.flex_attention import flex_attention

    if not compiled:
        return flex_attention
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MAX_COMPILES)
    return torch.compile(flex_attention, dynamic=False)


def _block_mask(lists: BlockIndices, queries: int, keys: int) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    offset = keys - queries
    if offset % lists.block_size:
        raise ValueError(
            f"FlexAttention cuts query blocks from the first query on, which is {offset % lists.block_size} tokens "
            f"into a block of {lists.block_size}"
        )
    counts, rows = lists.counts, torch.arange(lists.first_row, lists.num_key_blocks, device=lists.counts.device)
    slots = torch.arange(lists.indices.shape[-1], device=counts.device)
    indices = lists.indices.masked_fill(slots >= counts[..., None], 0)
    last = indices.gather(-1, (counts - 1).clamp(min=0)[..., None].long())[..., 0]
    diagonal = ((last == rows) & (counts > 0)).int()
    # A block mask takes the number of key blocks from the width of its lists.
    indices = F.pad(indices, (0, lists.num_key_blocks - indices.shape[-1])).contiguous()
    partial = F.pad(rows[:, None].int(), (0, lists.num_key_blocks - 1)).expand(indices.shape).contiguous()

    def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query + offset >= key

    return BlockMask.from_kv_blocks(
        diagonal,
        partial,
        counts - diagonal,
        indices,
        BLOCK_SIZE=(lists.block_size, lists.block_size),
        mask_mod=causal,
        seq_lengths=(queries, keys),
    )
