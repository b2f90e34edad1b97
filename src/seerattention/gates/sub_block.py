"""A prefill gate finer than its mask: the paper's, of sub-blocks, with one score a tile (docs/architecture.md)."""

from __future__ import annotations

import dataclasses

from ..config import SubBlockGateConfig
from .prefill import PrefillGate


class SubBlockGate(PrefillGate):
    """The prefill gate of the paper with blocks cut into sub-blocks, see :class:`~seerattention.SubBlockGateConfig`.

    Parameters (C = number of pooling kinds * head_dim, W = gate width): ``q_linear [Hq, C_q, W]``; ``k_linear
    [Hq, C_k, W]``, with shared keys ``[Hkv, C_k, W]``. Fresh ones are drawn as those of :class:`PrefillGate`.
    """

    def __init__(
        self, config: SubBlockGateConfig, *, block_size: int, num_heads: int, num_kv_heads: int, head_dim: int
    ):
        config = dataclasses.replace(config, block_size=block_size)  # raises where pitches do not fit
        super().__init__(
            config, block_size=block_size, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim
        )
        self.q_pitch, self.k_pitch, self.reduce = config.q_pitch, config.k_pitch, config.reduce

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, q_pitch={self.q_pitch}, k_pitch={self.k_pitch}, reduce={self.reduce!r}"
