"""Training sequences of which a share is changed, each for itself and in the same way whenever it is read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

__all__ = ["Changed", "is_count", "is_number"]


class Changed(ABC):
    """Which sequences are changed, and how.

    What is drawn is a function of ``seed`` and the place that is given with a sequence, and of nothing before it.

    Attributes:
        what: the word for it in errors.
        stream: tells its draws from those of others with the same seed and places.
        share: of the sequences that are changed, in [0, 1].
        seed: of the draws, an integer of at least 0.
    """

    what: ClassVar[str]
    stream: ClassVar[tuple[int, ...]] = ()
    share: float
    seed: int

    def _check_draws(self) -> None:
        """Raise ValueError unless share and seed are in range."""
        if not (is_number(self.share) and 0 <= self.share <= 1):  # NaN is no share either
            raise ValueError(f"{self.what} must be a share of the sequences, from 0 to 1, got {self.share!r}")
        if not (is_count(self.seed) and self.seed >= 0):
            raise ValueError(f"seed must be an integer of at least 0, got {self.seed!r}")

    @abstractmethod
    def check_length(self, length: int) -> None:
        """Raise unless a sequence of so many tokens can be changed.

        Raises:
            ValueError: it cannot.
        """

    @abstractmethod
    def _change(self, ids: Tensor, rng: np.random.Generator) -> Tensor:
        """Another sequence in the place of one that was chosen."""

    def apply(self, ids: Tensor, *place: int) -> Tensor:
        """The sequence as it is trained on: ``ids`` themselves where it is not chosen, else another one.

        Args:
            ids: token ids ``[T]`` of any integer dtype.
            place: numbers of at least 0 that name the sequence, such as its place in the text.

        Raises:
            ValueError: too short a sequence, see :meth:`check_length`.
        """
        self.check_length(len(ids))
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, *place], spawn_key=self.stream))
        return ids if rng.random() >= self.share else self._change(ids, rng)

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: all that decides what is drawn."""


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
