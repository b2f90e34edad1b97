"""Look-ups for plain text: passages of the first part of a sequence, said again in its last part.

Gates learn to find what some row looks up, and in plain text few rows look anything up from far away. Every language
model does where a passage comes again: it finds the passage, and copies what followed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from .changed import Changed, is_count, is_number

__all__ = ["Repeats", "say_again"]


def say_again(ids: Tensor, place: int, passages: Iterable[tuple[int, int]]) -> Tensor:
    """A copy of token ids ``[..., T]`` in which passages of what lies before ``place`` take the place of the rest.

    Args:
        ids: of any integer dtype.
        place: the first token that is replaced.
        passages: ``(start, size)`` of each in tokens, one after the other. They are taken until the end is reached, and
            the last one is cut there; where they end earlier, what follows stays.
    """
    made, length = ids.clone(), ids.shape[-1]
    at = place
    for start, size in passages:
        if at >= length:
            break
        size = min(size, length - at)
        made[..., at : at + size] = ids[..., start : start + size]
        at += size
    return made


@dataclass(frozen=True)
class Repeats(Changed):
    """Which sequences say passages again, and how.

    With probability ``share`` a sequence of T tokens is changed, each for itself: its last ``floor(part T)`` tokens are
    replaced by passages of the tokens before them, one after the other without gaps, the last one cut at the end of the
    sequence. The size of a passage is uniform in ``[shortest, longest]`` (at most all but the first token of the first
    part), its start uniform among the places where the whole passage lies in the first part; two passages may overlap
    or be the same one. The first token of a sequence, which may be one that begins texts, is never said again. Lengths
    and everything before the last part stay as they are.

    What is drawn is a function of ``seed`` and the place that is given with a sequence, and of nothing before it.

    Attributes:
        share: of the sequences, in [0, 1].
        part: share of a sequence that its last part has, in (0, 1).
        shortest, longest: tokens a passage.
        seed: of the draws, an integer of at least 0.

    Raises:
        ValueError: a value that is out of these ranges.
    """

    share: float
    part: float = 0.25
    shortest: int = 8
    longest: int = 128
    seed: int = 0
    what: ClassVar[str] = "repeats"

    def __post_init__(self) -> None:
        self._check_draws()
        if not (is_number(self.part) and 0 < self.part < 1):
            raise ValueError(f"part must be a share of a sequence between 0 and 1, got {self.part!r}")
        sizes = (self.shortest, self.longest)
        if not all(is_count(size) for size in sizes) or not 1 <= self.shortest <= self.longest:
            raise ValueError(
                f"shortest and longest must be numbers of tokens with 1 <= shortest <= longest, got {sizes[0]!r} and "
                f"{sizes[1]!r}"
            )

    def check_length(self, length: int) -> None:
        """Raise unless each part of a sequence of so many tokens has room for the shortest passage.

        Raises:
            ValueError: it has not.
        """
        if not self._fits(length):
            least = math.floor(self.shortest / min(self.part, 1 - self.part))
            while not self._fits(least):
                least += 1
            raise ValueError(
                f"repeats need sequences of at least {least} tokens, so that their last {self.part:g} holds a passage "
                f"of {self.shortest} and what lies before it one to say again, got {length}"
            )

    def _fits(self, length: int) -> bool:
        last = math.floor(self.part * length)
        return last >= self.shortest and length - last > self.shortest

    def _change(self, ids: Tensor, rng: np.random.Generator) -> Tensor:
        first = len(ids) - math.floor(self.part * len(ids))
        return say_again(ids, first, self._passages(rng, first))

    def _passages(self, rng: np.random.Generator, first: int) -> Iterator[tuple[int, int]]:
        longest = min(self.longest, first - 1)
        while True:
            size = int(rng.integers(self.shortest, longest + 1))
            yield int(rng.integers(1, first - size + 1)), size

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)
