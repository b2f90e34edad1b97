"""Retrieval tasks in the style of RULER (arXiv 2404.06654), woven into book text, reproducible from a seed.

| task | in the text | asked |
|---|---|---|
| single | one number for one name | that number |
| multikey | a number for each of many names | the numbers of some |
| multivalue | four numbers for each of some names | all four, in order |
| variable | numbers for names, and names that share another's number | whose number it is, then the number |
| keyvalue | a JSON dictionary of random numbers | the values of some keys |

Names are pairs of words; pairs used in evaluation are never keys in training (``split``). Values are random. Answers
are scored in ``seerattention.evaluate.retrieval``: generated greedily, or by teacher forcing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .pieces import ANSWER_WEIGHT, NOISE_WEIGHT, VARIABLE_TEMPLATES, Event, Pieces

TASKS = ("single", "multikey", "multivalue", "variable", "keyvalue")

#: Tokens of context for each distractor in evaluation samples (so 16K tokens hold 81 names, or 409 dictionary pairs).
TOKENS_PER_NAME = 200
TOKENS_PER_PAIR = 40
TOKENS_PER_ALIAS = 800
VALUES_PER_NAME = 4


@dataclass(frozen=True)
class Question:
    """Where the answers of one question are: ``input_ids[start:stop]`` for each (start, stop)."""

    answers: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Sample:
    """One sequence with its questions.

    Attributes:
        task: one of ``TASKS``, ``list``, or the name of a training form.
        input_ids: int64 ``[length]``, statements, book text, questions and right answers.
        questions: every question of the sequence.
        weights: float32 ``[length]``, weight of each token in the training loss.
    """

    task: str
    input_ids: np.ndarray
    questions: tuple[Question, ...]
    weights: np.ndarray


class TaskGenerator:
    """Makes samples of the retrieval tasks.

    Args:
        tokenizer: a Hugging Face tokenizer. If it has a ``bos_token_id``, every sample begins with that token.
        books: token ids of book texts (1-D integer arrays), the haystack. Use other books than in training.
        split: ``"train"`` or ``"test"``, which chooses disjoint sets of keys.
        seed: samples are a function of the arguments, the seed and the order of calls.
        templates: other sentences for the needles, see :class:`Pieces` (None: the package's).
    """

    def __init__(
        self,
        tokenizer: Any,
        books: Sequence[np.ndarray],
        *,
        split: str = "test",
        seed: int = 0,
        templates: Sequence[tuple[str, str]] | None = None,
    ) -> None:
        self._take(books)
        self.rng = np.random.default_rng(seed)
        self.pieces = Pieces(tokenizer, split, self.rng, templates)
        self.bos = getattr(tokenizer, "bos_token_id", None)

    def begin(self, books: Sequence[np.ndarray], rng: np.random.Generator) -> None:
        """Go on with other books and as ``rng`` would draw; what the tokenizer has encoded so far is kept.

        Args:
            books: as for the generator itself.
            rng: one of ``numpy.random.default_rng``; its state is copied.
        """
        self._take(books)
        self.rng.bit_generator.state = rng.bit_generator.state  # pieces and mixes draw from the same one

    def _take(self, books: Sequence[np.ndarray]) -> None:
        books = [np.asarray(book) for book in books if len(book)]
        if not books:
            raise ValueError("TaskGenerator needs at least one non-empty book as the haystack")
        self.books = books
        self._book_weights = np.array([len(book) for book in books], dtype=np.float64)
        self._book_weights /= self._book_weights.sum()

    def sample(self, task: str, length: int, questions: int = 1) -> Sample:
        """A sample of exactly ``length`` tokens that asks ``questions`` different questions near its end.

        Questions stand 64 to 128 tokens of book text apart, so that each is asked from another block.

        Raises:
            ValueError: unknown task, or a length too short for the task.
        """
        makers = {
            "single": self._single,
            "multikey": self._multikey,
            "multivalue": self._multivalue,
            "variable": self._variable,
            "keyvalue": self._keyvalue,
        }
        if task not in makers:
            raise ValueError(f"task must be one of {TASKS}, got {task!r}")
        if questions < 1:
            raise ValueError(f"questions must be at least 1, got {questions}")
        statements, asked = makers[task](length, questions)
        gaps = self.rng.integers(64, 128, len(asked))
        gaps[-1] = self.rng.integers(0, 64)
        used = sum(len(event.tokens) for event in statements + asked) + int(gaps.sum())
        room = length - used - (self.bos is not None)
        if room < 0:
            raise ValueError(
                f"{task} with {questions} questions needs {length - room} tokens, got length {length}; "
                "use longer samples or fewer questions"
            )
        body = self.book_text(room + int(gaps.sum()))
        # Statements lie anywhere before the first question; positions count book tokens.
        places = [(int(event.position * room), event) for event in statements]
        place = room
        for event, gap in zip(asked, gaps, strict=True):
            places.append((place, event))
            place += int(gap)
        return self.weave(task, body, places)

    def list_copy(self, length: int, cue: int, count: int) -> Sample:
        """A list of numbers in book text, which the end of the sample says again: as many look-ups in a row.

        The list of ``cue + count`` tokens lies within the first three quarters of the sample's ``length`` tokens, at a
        random place. Its first ``cue`` tokens, said again, are the question, and the ``count`` others, the last ones of
        the sample, the only answer. In training that is a row that looks something up for nearly each token of the
        list; in evaluation the sample up to the answer is a prompt.

        Raises:
            ValueError: a number below 1, or a length in which the list has no room twice.
        """
        if cue < 1 or count < 1:
            raise ValueError(f"cue and count must be at least 1, got {cue} and {count}")
        size, opening = cue + count, int(self.bos is not None)
        room = length - opening - 2 * size
        if room < 0:
            raise ValueError(f"a list of {size} tokens and its copy need {length - room} tokens, got length {length}")
        tokens = self.pieces.numbers(size)
        place = int(self.rng.integers(0, min(room, 3 * length // 4 - size - opening) + 1))
        asked = Event().add(tokens[:cue], NOISE_WEIGHT).add(tokens[cue:], ANSWER_WEIGHT, answer=True)
        statement = Event().add(tokens, NOISE_WEIGHT)
        return self.weave("list", self.book_text(room), [(place, statement), (room, asked)])

    # ---------------------------------------------------------------- tasks
    def _needles(self, keys: list[list[int]], questions: int) -> tuple[list[Event], list[Event]]:
        template = int(self.rng.integers(len(self.pieces.templates)))
        values = [self.pieces.value() for _ in keys]
        statements = [self.pieces.statement(template, k, v) for k, v in zip(keys, values, strict=True)]
        asked = [self.pieces.question(template, k, v) for k, v in zip(keys[:questions], values, strict=False)]
        return self.scatter(statements), asked

    def _single(self, length: int, questions: int) -> tuple[list[Event], list[Event]]:
        if questions != 1:
            raise ValueError(
                f"task 'single' has one needle and so one question, got questions={questions}; use 'multikey'"
            )
        return self._needles(self.pieces.keys(1), 1)

    def _multikey(self, length: int, questions: int) -> tuple[list[Event], list[Event]]:
        return self._needles(self.pieces.keys(max(questions + 1, length // TOKENS_PER_NAME)), questions)

    def _multivalue(self, length: int, questions: int) -> tuple[list[Event], list[Event]]:
        template = int(self.rng.integers(len(self.pieces.templates)))
        statements, asked = [], []
        for key in self.pieces.keys(questions):
            values = [self.pieces.value() for _ in range(VALUES_PER_NAME)]
            statements += self.scatter([self.pieces.statement(template, key, value) for value in values])
            asked.append(self.pieces.multivalue_question(key, values))
        return statements, asked

    def _variable(self, length: int, questions: int) -> tuple[list[Event], list[Event]]:
        chains = max(questions + 1, length // TOKENS_PER_ALIAS)
        keys = self.pieces.keys(2 * chains)
        template, needle = (
            int(self.rng.integers(len(VARIABLE_TEMPLATES))),
            int(self.rng.integers(len(self.pieces.templates))),
        )
        statements, asked = [], []
        for i in range(chains):
            source, alias, value = keys[2 * i], keys[2 * i + 1], self.pieces.value()
            statements += self.scatter(
                [self.pieces.statement(needle, source, value), self.pieces.alias(template, alias, source)]
            )
            if i < questions:
                asked.append(self.pieces.alias_question(template, alias, source, value))
        return statements, asked

    def _keyvalue(self, length: int, questions: int) -> tuple[list[Event], list[Event]]:
        keys = self.pieces.dictionary_keys(max(questions + 1, length // TOKENS_PER_PAIR))
        pairs = [(key, self.pieces.value()) for key in keys]
        chosen = self.rng.choice(len(pairs), questions, replace=False)
        asked = [self.pieces.dictionary_question(*pairs[i]) for i in chosen]
        return self.scatter([self.pieces.dictionary(pairs)]), asked

    # ---------------------------------------------------------------- weaving
    def scatter(self, events: list[Event]) -> list[Event]:
        """Give the events increasing random positions."""
        for event, position in zip(events, np.sort(self.rng.random(len(events))), strict=True):
            event.position = float(position)
        return events

    def book_text(self, length: int) -> np.ndarray:
        """``length`` consecutive tokens from a random place, running on into the next book where one ends."""
        index = int(self.rng.choice(len(self.books), p=self._book_weights))
        book = self.books[index]
        start = int(self.rng.integers(0, max(1, len(book) - length)))
        parts, missing = [book[start : start + length]], length - min(length, len(book) - start)
        while missing > 0:
            index = (index + 1) % len(self.books)
            parts.append(self.books[index][:missing])
            missing -= len(parts[-1])
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def weave(self, task: str, body: np.ndarray, places: list[tuple[int, Event]]) -> Sample:
        """Insert each event before token ``place`` of ``body``; events at one place keep their order."""
        tokens: list[Any] = [] if self.bos is None else [[self.bos]]
        weights: list[Any] = [] if self.bos is None else [[1.0]]
        questions, done, length = [], 0, len(tokens)
        for place, event in sorted(places, key=lambda item: item[0]):
            if place > done:
                tokens.append(body[done:place])
                weights.append(np.ones(place - done, np.float32))
                length += place - done
                done = place
            if event.answers:
                questions.append(Question(tuple((length + a, length + b) for a, b in event.answers)))
            tokens.append(event.tokens)
            weights.append(event.weights)
            length += len(event.tokens)
        tokens.append(body[done:])
        weights.append(np.ones(len(body) - done, np.float32))
        return Sample(
            task,
            np.concatenate([np.asarray(t, dtype=np.int64) for t in tokens]),
            tuple(questions),
            np.concatenate([np.asarray(w, dtype=np.float32) for w in weights]),
        )
