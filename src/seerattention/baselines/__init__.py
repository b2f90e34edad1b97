"""Selectors that need no training: anything that makes block indices from the queries and keys of a layer.

Each takes plain tensors and knows nothing of gates or of Hugging Face;
``seerattention.attach(model, selector=...)`` runs one inside a model.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from ..ops.indices import BlockIndices
from .oracle import Oracle

__all__ = ["Oracle", "Selector"]


@runtime_checkable
class Selector(Protocol):
    """What every selector is: a callable from the attention inputs of one layer to block indices."""

    def __call__(
        self, q: Tensor, k: Tensor, *, layer: int, scale: float, lengths: Tensor | None = None
    ) -> BlockIndices:
        """Choose the key blocks of each query block.

        Args:
            q: ``[B, Hq, Tq, D]``, after RoPE; the last Tq of the Tk positions.
            k: ``[B, Hkv, Tk, D]``, after RoPE.
            layer: index of the layer in the model.
            scale: softmax scale of the layer's attention.
            lengths: int64 ``[B]``, valid tokens of each right-padded row (None: all).

        Returns:
            BlockIndices with one list per query head, or one per KV head.
        """
        ...
