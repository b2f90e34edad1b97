"""The prefill gate of the SeerAttention paper (arXiv 2410.13276, section 3.1): pool, project, rotate, multiply."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ..config import PrefillGateConfig
from ..ops.block_pooling import block_pooling

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
    ) -> Tensor:
        """Score every key block for every query block of a whole prompt.

        Differentiable with respect to the parameters; q and k are constants. Pooling runs in the dtype of q, the linear
        layers in that of the parameters, RoPE and the product in float32.

        Args:
            q: ``[B, Hq, T, head_dim]`` before RoPE (after bias and q_norm where the model has them).
            k: ``[B, Hkv, T, head_dim]`` before RoPE.
            cos, sin: ``[B or 1, T, rotary_dim]``, the model's rotary table at the tokens' positions, halves repeated as
                Hugging Face lays it out. Each block is rotated at the position of its first token.
            rows: int64 ``[R]``, absolute query blocks to score (None: all N).
            lengths: int64 ``[B]``, valid tokens of each right-padded row (None: all).

        Returns:
            float32 ``[B, Hq, R, N]``, scaled by width**-0.5 and not yet normalised, -inf above the block diagonal.

        Raises:
            ValueError: shapes that do not fit the gate, or a rotary width that neither fits into the gate's width nor
                is a multiple of it.
        """
        self._check(q, k, cos)
        pooled_q = block_pooling(q.detach(), self.config.q_pooling, block_size=self.block_size, lengths=lengths)
        pooled_k = block_pooling(k.detach(), self.config.k_pooling, block_size=self.block_size, lengths=lengths)
        if rows is not None:
            pooled_q = pooled_q.index_select(2, rows)
        dtype = self.k_linear.dtype
        queries, keys = self._project(pooled_q.to(dtype), pooled_k.to(dtype))
        queries, keys = queries.float(), keys.float()
        if self.config.rope:
            cos, sin = self._block_rotary(cos), self._block_rotary(sin)
            keys = _rotate(keys, cos[:, None, None], sin[:, None, None])
            if rows is not None:
                cos, sin = cos.index_select(1, rows), sin.index_select(1, rows)
            queries = _rotate(queries, cos[:, None, None], sin[:, None, None])
        logits = (queries @ keys.transpose(-1, -2)).flatten(1, 2) * self.scale
        columns = torch.arange(keys.shape[-2], device=logits.device)
        absolute = columns if rows is None else rows
        return logits.masked_fill(columns[None, :] > absolute[:, None], float("-inf"))

    def _project(self, pooled_q: Tensor, pooled_k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries ``[B, Hkv, G, R, W]`` and keys ``[B, Hkv, G or 1, N, W]``, G query heads to a KV head."""
        group = self.num_heads // self.num_kv_heads
        if self.q_linear is not None:
            pooled_q = pooled_q @ self.q_linear
        queries = pooled_q.unflatten(1, (self.num_kv_heads, group))
        # One key projection per query head reads the keys of its KV head, which need not be repeated for it.
        keys = pooled_k[:, :, None] @ self.k_linear.unflatten(0, (self.num_kv_heads, -1))
        return queries, keys

    def _block_rotary(self, table: Tensor) -> Tensor:
        """The rotary table at block starts, float32 ``[B or 1, N, min(rotary_dim, W)]``."""
        starts = table[:, :: self.block_size].float()
        if starts.shape[-1] > self.width:
            # A gate narrower than the model's heads rotates by every s-th frequency, which spans the same range.
            return starts[..., :: starts.shape[-1] // self.width]
        return starts

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


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split pairing, of the first ``cos.shape[-1]`` channels; the others pass unrotated."""
    rotary = cos.shape[-1]
    turned, straight = x[..., :rotary], x[..., rotary:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, straight), dim=-1) if straight.shape[-1] else turned


def _narrowed_identity(inputs: int, outputs: int) -> Tensor:
    """``[inputs, outputs]``: the identity, cut to fit. A narrower output takes every s-th channel where s divides, so
    that rotary pairs stay together and meet the frequencies that a narrow gate rotates by."""
    if outputs < inputs and inputs % outputs == 0:
        return torch.eye(inputs)[:, :: inputs // outputs]
    return torch.eye(inputs, outputs)
