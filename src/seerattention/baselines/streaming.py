"""Streaming: the first tokens and the latest ones, whatever they say (StreamingLLM; the A shape of MInference)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..ops.span import num_blocks
from .base import TrainingFree
from .prompt import Prompt


@dataclass(frozen=True)
class Streaming(TrainingFree, kind="streaming", limits={"sink": 0, "window": 0, "last_blocks_dense": 0}):
    """The blocks of the first ``sink`` tokens, and a window of the latest blocks.

    StreamingLLM (arXiv 2309.17453, section 3.2) defines it for single tokens: each reads the ``sink`` first and the
    ``window`` latest ones. Here both are rounded up to whole blocks and only the causal mask cuts them, so a query
    reads at most ``window`` latest tokens (if that is whole blocks), and up to ``block_size - 1`` fewer at the
    beginning of a block. All heads read the same.

    Attributes:
        sink: first tokens to keep, 0 or more.
        window: latest tokens to keep, the diagonal block among them; 0 or more.
        last_blocks_dense: the last this many query blocks read everything (MInference's Tri shape).

    Raises:
        ValueError: values that are not such numbers.
    """

    sink: int = 64
    window: int = 1024
    last_blocks_dense: int = 0

    def keep(self, prompt: Prompt) -> Tensor:
        """bool ``[1, R, N]``."""
        rows, columns = prompt.rows(), prompt.columns()
        sink, window = num_blocks(self.sink, self.block_size), num_blocks(self.window, self.block_size)
        keep = (columns < sink) | (rows - columns < window) | (rows >= prompt.num_keys - self.last_blocks_dense)
        return keep[None]
