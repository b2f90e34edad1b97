"""A sample of a text task before its length is known, and what its makers work with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from .generator import TaskGenerator
from .questions import QuestionSets

__all__ = ["Body", "Draft", "Kit"]


@dataclass(frozen=True)
class Body:
    """The middle of a prompt: tokens, and where in them lies what the answer is to be found in."""

    tokens: list[int]
    places: list[tuple[int, int]]


@dataclass(frozen=True)
class Draft:
    """A sample before its length is known.

    Attributes:
        opening: what is said before the text.
        body: makes the text of so many tokens.
        question: what is asked after the text.
        lead: how the answer begins; the prompt ends with it.
        answers, score: as of :class:`~seerattention.tasks.TextSample`.
        gold: a right answer as text, without space before it.
        room: tokens for the answer.
        lead_tokens, gold_tokens: tokens of both, where they are no text.
    """

    opening: str
    body: Callable[[int], Body]
    question: str
    lead: str
    answers: tuple[str, ...]
    score: str
    gold: str
    room: int
    lead_tokens: tuple[int, ...] = field(default=())
    gold_tokens: tuple[int, ...] = field(default=())


class Kit:
    """What makers of drafts work with: random numbers, words, book text, and ways to fill a text to a length.

    Attributes:
        rng: the source of all randomness.
        pieces: names and sentences.
        questions: question sets.
        generator: gives book text.
    """

    def __init__(self, generator: TaskGenerator, questions: QuestionSets) -> None:
        self.generator, self.questions = generator, questions
        self.rng, self.pieces = generator.rng, generator.pieces

    def tokens(self, text: str) -> list[int]:
        """Token ids of a piece of text."""
        return self.pieces.tokens(text)

    def count(self, text: str) -> int:
        """How many tokens a text takes behind a space."""
        return len(self.pieces.encode(f" {text}"))

    def book(self, size: int) -> list[int]:
        """So many tokens of a book."""
        return self.generator.book_text(size).tolist() if size else []

    def repeated(self, text: str, size: int) -> list[int]:
        """So many tokens of a text that comes again and again."""
        once = self.pieces.encode(text)
        return (once * (size // len(once) + 1))[:size]

    def woven(self, size: int, events: Sequence[list[int]], filler: Callable[[int], list[int]]) -> Body:
        """Events in random places of a filler, in their order; ``size`` tokens in all.

        Raises:
            ValueError: the events alone are longer.
        """
        room = size - sum(len(event) for event in events)
        _check_room(size, room)
        text = filler(room)
        cuts = np.sort(self.rng.integers(0, room + 1, len(events))).tolist()
        tokens: list[int] = []
        places, done = [], 0
        for cut, event in zip(cuts, events, strict=True):
            tokens += text[done:cut]
            places.append((len(tokens), len(tokens) + len(event)))
            tokens += event
            done = cut
        return Body(tokens + text[done:], places)

    def stacked(
        self, size: int, wanted: Sequence[list[int]], others: Iterator[list[int]], *, ordered: bool = False
    ) -> Body:
        """Wanted items among as many others as fit, in random order; ``size`` tokens in all.

        What is left of the room holds the end of one more of the others, at the very beginning, and book text before it
        where the others do not suffice.

        Args:
            ordered: the wanted ones come first, in their order.

        Raises:
            ValueError: the wanted ones alone are longer.
        """
        left = size - sum(len(item) for item in wanted)
        _check_room(size, left)
        items = [(item, True) for item in wanted]
        rest: list[int] = []
        for item in others:
            if len(item) > left:
                rest = item[len(item) - left :]
                break
            items.append((item, False))
            left -= len(item)
        tokens, places = self.book(left - len(rest)) + rest, []
        order = range(len(items)) if ordered else self.rng.permutation(len(items)).tolist()
        for index in order:
            item, is_wanted = items[index]
            if is_wanted:
                places.append((len(tokens), len(tokens) + len(item)))
            tokens += item
        return Body(tokens, places)


def _check_room(size: int, room: int) -> None:
    if room < 0:
        raise ValueError(f"{-room} tokens more are needed than the {max(size, 0)} that are left for the text")
