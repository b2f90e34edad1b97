"""What differs between training the gates of prompts and those of decoding; a trainer asks here."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..blocks import num_blocks
from ..gates import BlockGate
from ..hf.phases import DECODE, PREFILL
from .config import DistillConfig
from .losses import draw_rows
from .objectives import OBJECTIVES, Objective

__all__ = ["TRAINED", "TrainedPhase"]


@dataclass(frozen=True)
class TrainedPhase:
    """Training of the gates of one phase.

    Attributes:
        objective: what they are trained for.
        heads: the attribute of a gate that counts the heads which have rows of their own.
        fresh: what a user attaches to have such gates, for messages.
        by_token: rows are query tokens, not query blocks.
    """

    objective: Objective
    heads: str
    fresh: str
    by_token: bool

    def heads_of(self, gate: BlockGate) -> int:
        """How many heads of a gate have rows of their own."""
        return int(getattr(gate, self.heads))

    def unit(self, block_size: int) -> int:
        """Tokens a row."""
        return 1 if self.by_token else block_size

    def rows(self, width: int, block_size: int, config: DistillConfig, draw: int) -> Tensor:
        """The rows of a batch that enter the loss, ascending, int64 ``[R]`` on the CPU; see :func:`draw_rows`.

        Args:
            width: tokens of the padded batch.
            block_size: tokens a block of the gates.
            draw: counts the batches of a run.
        """
        number = num_blocks(width, self.unit(block_size))
        rows = draw_rows(number, config.rows, config.skip_rows, config.seed, draw, config.last_rows)
        return rows[rows >= block_size] if self.by_token else rows  # the first block has no complete one before it


TRAINED = {
    PREFILL: TrainedPhase(OBJECTIVES[PREFILL], heads="num_heads", fresh="GateConfig()", by_token=False),
    DECODE: TrainedPhase(
        OBJECTIVES[DECODE], heads="num_kv_heads", fresh="GateConfig(decode=seer.DecodeGateConfig())", by_token=True
    ),
}
"""By the name of the phase."""
