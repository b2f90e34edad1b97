"""The building blocks of retrieval tasks at token level: keys, values, statements, questions.

Everything is composed from token pieces, so a sequence has exactly the asked length and the position of every answer is
known, for any tokenizer. Pieces are cut where tokenizers cut anyway (line breaks, spaces before words, digits).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .words import ADJECTIVES, NOUNS, TEST_SHARE, is_test_key

#: Training weights of tokens: answers count most, what nobody could predict (keys, values when first stated) least.
ANSWER_WEIGHT = 8.0
COPY_WEIGHT = 3.0
NOISE_WEIGHT = 0.1
#: With fewer single-token words than this in a vocabulary, loose words are not used.
FEWEST_LOOSE_WORDS = 200

#: (statement, question) pairs; {key} is two words, {value} a number.
NEEDLE_TEMPLATES = (
    ("\nThe passcode of the{key} is {value}.\n", "\nQuestion: What is the passcode of the{key}? Answer: {value}\n"),
    ("\nRemember that the number of the{key} is {value}.\n", "\nWhat is the number of the{key}? It is {value}.\n"),
    (
        " (The special number for the{key} is {value}.) ",
        "\nThe special number for the{key}, as was said, is {value}.\n",
    ),
    ("\nNote: the{key} has the number {value}.\n", "\nAsked for the number of the{key}, he said {value}.\n"),
)
VARIABLE_TEMPLATES = (
    (
        "\nThe{key} has the same number as the{source}.\n",
        "\nWhat is the number of the{key}? It is that of the{source}, which is {value}.\n",
    ),
    (
        "\nTake for the{key} the number of the{source}.\n",
        "\nThe number of the{key} is that of the{source}: {value}.\n",
    ),
)
MULTIVALUE_QUESTION = ("\nAll numbers of the{key} are", " {value}", ",", ".\n")
DICTIONARY = ("\n{", '\n "{key}": "{value}",', "}\n", '\nValue of "{key}" is "{value}".\n')


@dataclass
class Event:
    """Tokens that go into the text as one piece.

    Attributes:
        tokens, weights: token ids and their training weights.
        answers: (start, stop) inside ``tokens`` of each answer; empty for a statement.
        position: where in the surrounding text, 0 (first) to 1 (last).
        group: events that only make sense together share a number; -1 must not be dropped.
    """

    tokens: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    answers: list[tuple[int, int]] = field(default_factory=list)
    position: float = 0.0
    group: int = -1

    def add(self, tokens: list[int], weight: float = 1.0, *, answer: bool = False) -> Event:
        if answer:
            self.answers.append((len(self.tokens), len(self.tokens) + len(tokens)))
        self.tokens += tokens
        self.weights += [weight] * len(tokens)
        return self


class Pieces:
    """Encodes keys, values and templates with one tokenizer, and remembers the pieces.

    Args:
        tokenizer: a Hugging Face tokenizer (anything with ``encode(text, add_special_tokens=False)``).
        split: ``"train"`` or ``"test"``: which keys may be drawn.
        rng: the source of all randomness.
        templates: (statement, question) pairs like ``NEEDLE_TEMPLATES`` (None: those); each text has ``{key}`` and
            behind it ``{value}``, once, and the key follows a word without a space, which keys bring along.
    """

    def __init__(
        self,
        tokenizer: Any,
        split: str,
        rng: np.random.Generator,
        templates: Sequence[tuple[str, str]] | None = None,
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', got {split!r}")
        self.templates = tuple((s, q) for s, q in (NEEDLE_TEMPLATES if templates is None else templates))
        for text in (text for pair in self.templates for text in pair):
            if not 0 <= text.find("{key}") < text.find("{value}") or text.count("{key}") + text.count("{value}") != 2:
                raise ValueError(f"a template needs {{key}} and behind it {{value}}, each once, got {text!r}")
        if not self.templates:
            raise ValueError("templates must hold at least one (statement, question) pair, got none")
        self.tokenizer = tokenizer
        self.test = split == "test"
        self.rng = rng
        self._cache: dict[str, list[int]] = {}
        # Sentencepiece tokenizers put a space before whatever comes first; encode after a line break and cut that off.
        self._anchor = [] if self._raw("\n1") == self._raw("\n") + self._raw("1") else self._raw("\n")
        groups = [self._raw(f"{i:03d}") for i in range(1000)]
        in_threes = all(len(group) == 1 for group in groups) and self._raw("123456") == groups[123] + groups[456]
        self._groups = groups if in_threes else None
        #: Which (adjective, noun) may be a key in this split.
        self._allowed = np.array([[is_test_key((a, n)) == self.test for n in NOUNS] for a in ADJECTIVES])
        self._keys = np.argwhere(self._allowed)
        self._loose_words: list[list[int]] | None = None

    def _raw(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of text inside a longer text; remembered."""
        if text not in self._cache:
            self._cache[text] = self.tokens(text)
        return list(self._cache[text])

    def tokens(self, text: str) -> list[int]:
        """The same, not remembered: for texts that do not come again."""
        return self._raw("\n" + text)[len(self._anchor) :] if self._anchor else self._raw(text)

    def number(self, value: int) -> list[int]:
        """Token ids of a six-digit number."""
        if self._groups is None:
            ids = self._raw(f"\n{value:06d}")[len(self._anchor) :] if self._anchor else self._raw(f"{value:06d}")
            return ids
        return self._groups[value // 1000] + self._groups[value % 1000]

    def value(self) -> list[int]:
        """A random six-digit number."""
        return self.number(int(self.rng.integers(0, 1_000_000)))

    def numbers(self, count: int) -> list[int]:
        """``count`` token ids of random six-digit numbers, one after the other; the last number may be cut."""
        tokens: list[int] = []
        while len(tokens) < count:
            tokens += self.value()
        return tokens[:count]

    def keys(self, count: int, *, close: bool = False) -> list[list[int]]:
        """``count`` different two-word keys of this split, each beginning with a space.

        ``close`` draws them from few adjectives and few nouns where enough are to be had, so that neither word alone
        tells two keys apart.
        """
        return [self.encode(f" {a}") + self.encode(f" {n}") for a, n in self.key_words(count, close=close)]

    def key_words(self, count: int, *, close: bool = False) -> list[tuple[str, str]]:
        """The same keys as words, for tasks that are written as text."""
        pairs = self._close_pairs(count) if close else self._keys
        chosen = pairs[self.rng.choice(len(pairs), count, replace=False)]
        return [(ADJECTIVES[a], NOUNS[n]) for a, n in chosen]

    def _close_pairs(self, count: int) -> np.ndarray:
        side = math.ceil(math.sqrt(2 * count)) + 1
        if side > min(len(ADJECTIVES), len(NOUNS)):
            return self._keys
        adjectives = self.rng.choice(len(ADJECTIVES), side, replace=False)
        nouns = self.rng.choice(len(NOUNS), side, replace=False)
        places = np.argwhere(self._allowed[np.ix_(adjectives, nouns)])
        pairs = np.stack([adjectives[places[:, 0]], nouns[places[:, 1]]], 1)
        return pairs if len(pairs) >= count else self._keys

    def alike_keys(self, count: int) -> list[list[int]]:
        """``count`` different two-word keys of this split that all share one word, so that only the other one tells.

        Raises:
            ValueError: the vocabulary of keys has no ``count`` pairs that share a word.
        """
        lines = self._allowed.T if self.rng.random() < 0.5 else self._allowed
        wide = np.flatnonzero(lines.sum(1) >= count)
        if not len(wide):
            raise ValueError(f"no word begins or ends {count} keys; at most {int(lines.sum(1).max())} share one")
        shared = int(self.rng.choice(wide))
        others = self.rng.choice(np.flatnonzero(lines[shared]), count, replace=False)
        pairs = [(a, shared) for a in others] if lines is not self._allowed else [(shared, n) for n in others]
        return [self.encode(f" {ADJECTIVES[a]}") + self.encode(f" {NOUNS[n]}") for a, n in pairs]

    def single_keys(self, count: int) -> list[list[int]]:
        """``count`` different keys of one word each: a step towards keys of two words, which evaluation uses."""
        return [self.encode(f" {NOUNS[i]}") for i in self.rng.choice(len(NOUNS), count, replace=False)]

    def number_keys(self, count: int) -> list[list[int]]:
        """``count`` different six-digit keys of this split, each after a space as words are."""
        return [self.encode(" ") + key for key in self.dictionary_keys(count)]

    def loose_keys(self, count: int) -> list[list[int]]:
        """``count`` different keys of two arbitrary vocabulary words, for variety in training.

        Raises:
            ValueError: the split is "test", whose keys are listed ones only.
        """
        if self.test:
            raise ValueError("loose keys are for training only: they may contain any pair of words")
        words = self.loose_words()
        if len(words) < FEWEST_LOOSE_WORDS:
            return self.keys(count)
        chosen = self.rng.choice(len(words) * len(words), count, replace=False)
        return [words[i // len(words)] + words[i % len(words)] for i in chosen]

    def loose_words(self) -> list[list[int]]:
        """Every vocabulary word that is one token, but for the listed nouns: so no pair can be a key of evaluation."""
        if self._loose_words is None:
            before = self._raw("\n")
            start = len(self.tokenizer.decode(before))
            # After a line break, because a decoder may drop the space of a first word.
            texts = ((i, self.tokenizer.decode([*before, i])[start:]) for i in range(len(self.tokenizer)))
            self._loose_words = [
                [i]
                for i, text in texts
                if len(text) > 3 and text[0] == " " and text[1:].isalpha() and text.islower() and text[1:] not in NOUNS
            ]
        return self._loose_words

    def random_words(self, count: int) -> list[int]:
        """``count`` token ids of random listed or loose words; no two words in a row are a key of the other split."""
        words = self.loose_words() if self.rng.random() < 0.5 else []
        if len(words) >= FEWEST_LOOSE_WORDS:
            return [words[i][0] for i in self.rng.integers(0, len(words), count)]
        drawn = self.rng.integers(0, len(ADJECTIVES) + len(NOUNS), count).tolist()
        tokens: list[int] = []
        for i, index in enumerate(drawn):
            before, noun = drawn[i - 1] if i else len(ADJECTIVES), index - len(ADJECTIVES)
            if noun >= 0 and before < len(ADJECTIVES) and not self._allowed[before, noun]:
                drawn[i] = index = before  # an adjective where the noun would have made a foreign key
            tokens += self.encode(f" {(ADJECTIVES + NOUNS)[index]}")
        return tokens[:count]

    def dictionary_keys(self, count: int) -> list[list[int]]:
        """``count`` different six-digit keys of this split."""
        share = 1_000_000 // TEST_SHARE
        drawn = self.rng.choice(share if self.test else 1_000_000 - share, count, replace=False)
        # Multiples of TEST_SHARE are the evaluation's, all others the training's.
        numbers = drawn * TEST_SHARE if self.test else drawn + drawn // (TEST_SHARE - 1) + 1
        return [self.number(int(n)) for n in numbers]

    # ---------------------------------------------------------------- events
    def fill(self, template: str, **parts: tuple[list[int], float, bool]) -> Event:
        """Event of a template whose ``{name}`` fields are token pieces given as (tokens, weight, is an answer)."""
        event = Event()
        for literal, name in _split(template):
            if literal:
                event.add(self.encode(literal))
            if name:
                tokens, weight, answer = parts[name]
                event.add(tokens, weight, answer=answer)
        return event

    def statement(self, template: int, key: list[int], value: list[int]) -> Event:
        return self.fill(self.templates[template][0], key=_noise(key), value=_noise(value))

    def question(self, template: int, key: list[int], value: list[int]) -> Event:
        return self.fill(self.templates[template][1], key=_noise(key), value=_answer(value))

    def alias(self, template: int, key: list[int], source: list[int]) -> Event:
        return self.fill(VARIABLE_TEMPLATES[template][0], key=_noise(key), source=_noise(source))

    def alias_question(self, template: int, key: list[int], source: list[int], value: list[int]) -> Event:
        return self.fill(VARIABLE_TEMPLATES[template][1], key=_noise(key), source=_answer(source), value=_answer(value))

    def multivalue_question(self, key: list[int], values: list[list[int]]) -> Event:
        opening, item, comma, end = MULTIVALUE_QUESTION
        event = self.fill(opening, key=_noise(key))
        for i, value in enumerate(values):
            if i:
                event.add(self.encode(comma))
            event.add(self.encode(item.split("{")[0]))
            event.add(value, ANSWER_WEIGHT, answer=True)
        return event.add(self.encode(end))

    def dictionary(self, pairs: list[tuple[list[int], list[int]]]) -> Event:
        opening, _, end, _ = DICTIONARY
        event = Event().add(self.encode(opening))
        for key, value in pairs:
            entry = self.entry(key, value)
            event.tokens += entry.tokens
            event.weights += entry.weights
        return event.add(self.encode(end))

    def entry(self, key: list[int], value: list[int]) -> Event:
        return self.fill(DICTIONARY[1], key=_noise(key), value=_noise(value))

    def dictionary_question(self, key: list[int], value: list[int]) -> Event:
        return self.fill(DICTIONARY[3], key=_noise(key), value=_answer(value))


def _noise(tokens: list[int]) -> tuple[list[int], float, bool]:
    return tokens, NOISE_WEIGHT, False


def _answer(tokens: list[int]) -> tuple[list[int], float, bool]:
    return tokens, ANSWER_WEIGHT, True


_FIELDS = ("key", "value", "source")


def _split(template: str) -> list[tuple[str, str]]:
    """``"a{key}b"`` -> ``[("a", "key"), ("b", "")]``; braces that enclose no field name are literal text."""
    parts: list[tuple[str, str]] = []
    rest = template
    while rest:
        found = [(rest.find("{" + name + "}"), name) for name in _FIELDS if "{" + name + "}" in rest]
        if not found:
            parts.append((rest, ""))
            break
        at, name = min(found)
        parts.append((rest[:at], name))
        rest = rest[at + len(name) + 2 :]
    return parts
