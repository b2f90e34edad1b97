"""The prefill gate of the SeerAttention paper (arXiv 2410.13276, section 3.1): pool, project, rotate, multiply."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ..config import PrefillGateConfig
from ..ops.block_pooling import block_pooling
from ..ops.gate_scores import gate_scores

# Fresh projections are the identity on pooled means plus noise of about this relative size.
_INIT_NOISE = 0.1


class BlockGate(nn.Module, ABC):
    """What every gate has in common: it scores blocks of ``block_size`` keys for blocks of ``block_size`` queries.

    Attributes:
        block_size: tokens a block of the *mask*; a form may pool more finely inside.
    """

    def __init__(self, config: PrefillGateConfig, *, block_size: int, num_heads: int, num_kv_heads: int, head_dim: int):
        super().__init__()
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads ({num_heads}) must be a multiple of num_kv_heads ({num_kv_heads})")
        self.block_size = block_size
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim

    @abstractmethod
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        rows: Tensor | None = None,
        lengths: Tensor | None = None,
        masked: bool = True,
    ) -> Tensor:
        """Block logits of a whole prompt; see :meth:`PrefillGate.forward`."""

    @abstractmethod
    def check_rotary(self, rotary_dim: int) -> None:
        """Raise ValueError where the gate cannot take a rotary embedding of this many channels."""


class PrefillGate(BlockGate):
    """The published gate: queries and keys pooled per block, linear layers, RoPE at block starts, one product.

    Parameters (input dimension first, no bias; C = number of pooling kinds * head_dim, W = gate width):
        ``k_linear [Hq, C_k, W]`` without a query linear (one key projection per query head, the released form), else
        ``[Hkv, C_k, W]``; ``q_linear [Hq, C_q, W]`` or None.

    Fresh gates begin near the similarity of the blocks' mean query and mean key: projections are the identity on the
    ``avg`` part (on the mean of the other poolings where there is no ``avg``) plus normal noise of a tenth of its
    size, drawn from torch's global generator.
    """

    k_linear: nn.Parameter
    q_linear: nn.Parameter | None

    def __init__(self, config: PrefillGateConfig, *, block_size: int, num_heads: int, num_kv_heads: int, head_dim: int):
        super().__init__(
            config, block_size=block_size, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim
        )
        config = config.resolve(head_dim)
        assert config.hidden_size is not None
        self.config = config
        self.width = config.hidden_size
        self.scale = self.width**-0.5
        k_heads = num_kv_heads if config.q_linear else num_heads
        self.k_linear = nn.Parameter(torch.empty(k_heads, len(config.k_pooling) * head_dim, self.width))
        if config.q_linear:
            self.q_linear = nn.Parameter(torch.empty(num_heads, len(config.q_pooling) * head_dim, self.width))
        else:
            self.register_parameter("q_linear", None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh parameters from torch's global generator."""
        for weight, kinds in ((self.k_linear, self.config.k_pooling), (self.q_linear, self.config.q_pooling)):
            if weight is None:
                continue
            weight.normal_(std=_INIT_NOISE * weight.shape[1] ** -0.5)
            identity = _narrowed_identity(self.head_dim, self.width).to(weight)
            carriers = ("avg",) if "avg" in kinds else kinds
            for slot, kind in enumerate(kinds):
                if kind in carriers:
                    weight[:, slot * self.head_dim : (slot + 1) * self.head_dim] += identity / len(carriers)

    def extra_repr(self) -> str:
        return (
            f"heads={self.num_heads}/{self.num_kv_heads}, head_dim={self.head_dim}, width={self.width}, "
            f"k_pooling={self.config.k_pooling}, q_pooling={self.config.q_pooling}, block_size={self.block_size}"
        )

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        rows: Tensor | None = None,
        lengths: Tensor | None = None,
        masked: bool = True,
    ) -> Tensor:
        """Score every key block for every query block of a whole prompt.

        Differentiable with respect to the parameters; q and k are constants. Pooling runs in the dtype of q, the linear
        layers in that of the parameters, RoPE and the product in float32. Where no gradient is recorded, gates in half
        precision on CUDA devices run as Triton kernels (:func:`seerattention.ops.gate_scores.gate_scores`).

        Args:
            q: ``[B, Hq, T, head_dim]`` before RoPE (after bias and q_norm where the model has them).
            k: ``[B, Hkv, T, head_dim]`` before RoPE.
            cos, sin: ``[B or 1, T, rotary_dim]``, the model's rotary table at the tokens' positions, halves repeated as
                Hugging Face lays it out. Each block is rotated at the position of its first token.
            rows: int64 ``[R]``, absolute query blocks to score (None: all N).
            lengths: int64 ``[B]``, valid tokens of each right-padded row (None: all).
            masked: False: what lies above the block diagonal may be left undefined, for those who ignore it
                (policies do).

        Returns:
            float32 ``[B, Hq, R, N]``, scaled by width**-0.5 and not yet normalised, -inf above the block diagonal.
            Rows may be padded in memory.

        Raises:
            ValueError: shapes that do not fit the gate, or a rotary width that neither fits into the gate's width nor
                is a multiple of it.
        """
        self._check(q, k, cos)
        pooled_q = block_pooling(q.detach(), self.config.q_pooling, block_size=self.block_size, lengths=lengths)
        pooled_k = block_pooling(k.detach(), self.config.k_pooling, block_size=self.block_size, lengths=lengths)
        dtype = self.k_linear.dtype
        return gate_scores(
            pooled_q.to(dtype),
            pooled_k.to(dtype),
            self.k_linear,
            self.q_linear,
            *((cos, sin) if self.config.rope else (None, None)),
            block_size=self.block_size,
            scale=self.scale,
            rows=rows,
            masked=masked,
        )

    def _check(self, q: Tensor, k: Tensor, cos: Tensor) -> None:
        batch, _, length, _ = q.shape
        expected_q = (batch, self.num_heads, length, self.head_dim)
        expected_k = (batch, self.num_kv_heads, length, self.head_dim)
        if tuple(q.shape) != expected_q or tuple(k.shape) != expected_k:
            raise ValueError(
                f"the gate takes q [B, {self.num_heads}, T, {self.head_dim}] and k [B, {self.num_kv_heads}, T, "
                f"{self.head_dim}] of a whole prompt, got {tuple(q.shape)} and {tuple(k.shape)}"
            )
        if not self.config.rope:
            return
        if cos.dim() != 3 or cos.shape[1] != length or cos.shape[0] not in (1, batch):
            raise ValueError(f"cos and sin must be [B or 1, {length}, rotary_dim], got {tuple(cos.shape)}")
        self.check_rotary(cos.shape[-1])

    def check_rotary(self, rotary_dim: int) -> None:
        """Raise ValueError where the gate cannot take a rotary embedding of this many channels."""
        if self.config.rope and rotary_dim > self.width and rotary_dim % self.width:
            raise ValueError(
                f"a gate of width {self.width} cannot take the rotary embedding of {rotary_dim} channels: the width "
                "must be at least the rotary width or divide it; change hidden_size or pass rope=False"
            )


def _narrowed_identity(inputs: int, outputs: int) -> Tensor:
    """``[inputs, outputs]``: the identity, cut to fit. A narrower output takes every s-th channel where s divides, so
    that rotary pairs stay together and meet the frequencies that a narrow gate rotates by."""
    if outputs < inputs and inputs % outputs == 0:
        return torch.eye(inputs)[:, :: inputs // outputs]
    return torch.eye(inputs, outputs)
