"""Look-ups for models that know tasks: sentences and dictionaries in a share of the sequences, asked for near the end.

Plain text hardly asks for what was said far before it, and passages that come again
(:mod:`~seerattention.distillation.repeats`) have no look-alikes to be told from. A model that follows instructions, or
was trained on retrieval, finds one entry among hundreds, and gates learn that from its attention.
"""

from __future__ import annotations

from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..tasks import Sample, TaskGenerator, TrainingMix
from .changed import Changed

__all__ = ["Woven"]

# With fewer tokens a task with its questions leaves no text around them.
_LEAST = 512


class Woven(Changed):
    """Which sequences have retrieval tasks woven in, and how.

    With probability ``share`` a sequence becomes another one of the same length, each for itself. Its own text, less
    where statements and questions stand, is the background. Half of these sequences are those of
    :class:`~seerattention.tasks.TrainingMix`, questions anywhere and of any number (three in ten of them text alone),
    half as evaluation asks: a task of :data:`~seerattention.tasks.TASKS` with one to eight questions near the end. Keys
    are those of the train split, which evaluation never asks for. The first token, which may be one that begins texts,
    stays where it is.

    What is drawn is a function of ``seed``, of the sequence and of the place that is given with it, and of nothing
    before it.

    Args:
        tokenizer: a Hugging Face tokenizer; asked nothing before the first sequence that is chosen.
        share: of the sequences, in [0, 1].
        seed: of the draws, an integer of at least 0.

    Raises:
        ValueError: a value that is out of these ranges.
    """

    what = "tasks"
    # Apart from the draws of passages that are said again: which sequences are chosen must not depend on each other.
    stream = (1,)

    def __init__(self, tokenizer: Any, share: float, seed: int = 0) -> None:
        self.tokenizer, self.share, self.seed = tokenizer, share, seed
        self._check_draws()
        self._lock = Lock()

    def check_length(self, length: int) -> None:
        """Raise unless a sequence of so many tokens has room for a task.

        Raises:
            ValueError: it has not.
        """
        if length < _LEAST:
            raise ValueError(f"tasks need sequences of at least {_LEAST} tokens, got {length}")

    def _change(self, ids: Tensor, rng: np.random.Generator) -> Tensor:
        # A thread that was left behind may still be at work on a sequence of before.
        with self._lock:
            sample = self._sample(ids[1:].numpy(), rng)
        return torch.cat([ids[:1], torch.from_numpy(sample.input_ids).to(ids.dtype)])

    def _sample(self, text: np.ndarray, rng: np.random.Generator) -> Sample:
        mix = self._mix
        mix.generator.begin([text], rng)
        return mix.distilling(len(text))

    @cached_property
    def _mix(self) -> TrainingMix:
        """One for all sequences, as it remembers what the tokenizer has encoded."""
        generator = TaskGenerator(self.tokenizer, [np.zeros(1, np.int64)], split="train")
        generator.bos = None  # the first token is the sequence's own
        return TrainingMix(generator)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"share": self.share, "seed": self.seed}
