"""Tensor ops: torch, triton and the standard library only. Importing them needs no triton and initialises nothing."""

from .block_pooling import block_pooling
from .block_selection import dense_indices, select_threshold, select_topk, select_topp
from .block_sparse_attention import block_sparse_attention
from .block_sparse_attention.mean_correction import mean_corrected_attention
from .block_sparse_decode import block_sparse_decode
from .indices import BlockIndices
from .inverse_rope import inverse_rope
from .pooled_attention import pooled_attention, pooled_attention_decode
from .span import Pages, Span

__all__ = [
    "BlockIndices",
    "Pages",
    "Span",
    "block_pooling",
    "block_sparse_attention",
    "block_sparse_decode",
    "dense_indices",
    "inverse_rope",
    "mean_corrected_attention",
    "pooled_attention",
    "pooled_attention_decode",
    "select_threshold",
    "select_topk",
    "select_topp",
]
