"""Random: uniformly drawn blocks, the floor that every selector must clear."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.indices import BlockIndices
from ..policies import TopK
from ..selectors import LayerInputs
from .base import TrainingFree
from .prompt import Prompt, scores_to_lists


@dataclass(frozen=True)
class Random(TrainingFree, kind="random", limits={"density": (0, 1), "seed": 0}):
    """As many blocks a row as ``TopK(density)`` keeps: the diagonal, block 0, then others drawn uniformly.

    Layers, heads and query blocks draw independently. What a query block reads follows from these, the density and the
    seed alone: it is the same in every sequence, batch and chunk, and on every device.

    Attributes:
        density: share of the causal blocks to keep, in (0, 1]. A row that keeps one block keeps the diagonal only.
        seed: another one draws other blocks, 0 or more.

    Raises:
        ValueError: values that are not such numbers.
    """

    density: float = 0.1
    seed: int = 0

    rowwise = True

    def __post_init__(self) -> None:
        super().__post_init__()
        TopK(self.density)

    def select(self, inputs: LayerInputs) -> BlockIndices:
        return scores_to_lists(inputs, self.block_size, TopK(self.density), self.score)

    def score(self, prompt: Prompt) -> Tensor:
        """float32 ``[Hq, R, N]``: numbers in [0, 1), and more for block 0."""
        scores = torch.zeros(prompt.heads, prompt.num_rows, prompt.num_keys)
        for slot, row in enumerate(range(prompt.first_row, prompt.num_keys)):
            # Generators use 32 bits of their seed: layer, row and seed are mixed into these.
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed},{prompt.layer},{row}".encode()))
            scores[:, slot, : row + 1] = torch.rand(prompt.heads, row + 1, generator=generator)
        scores[:, :, 0] = 2.0
        return scores.to(prompt.q.device)
