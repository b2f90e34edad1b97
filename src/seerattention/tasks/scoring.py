"""Scores of generated answers, from 0 to 1: exact match, share of a list, normalised match, length of a copy."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

__all__ = ["SCORES", "copied_share", "exact_match", "listed_share", "normalised", "normalised_match", "score_answer"]

SCORES = ("exact", "listed", "normalised", "copied")


def score_answer(score: str, text: str, answers: Sequence[str]) -> float:
    """What a generated text is worth.

    Args:
        score: "exact", "listed" or "normalised": :func:`exact_match`, :func:`listed_share`, :func:`normalised_match`.
        text: what was generated, without special tokens.
        answers: of "exact" one, of "listed" all that are wanted, of "normalised" those of which any will do.

    Raises:
        ValueError: another score ("copied" compares tokens, see :func:`copied_share`), or no answer.
    """
    if not answers:
        raise ValueError("a score needs at least one right answer")
    if score == "exact":
        return exact_match(text, answers[0])
    if score == "listed":
        return listed_share(text, answers)
    if score == "normalised":
        return normalised_match(text, answers)
    raise ValueError(f"score must be exact, listed or normalised, got {score!r}")


def exact_match(text: str, answer: str) -> float:
    """1 if the text begins with the answer and goes on with something else; case counts.

    Space, quotation marks and the like before it do not.
    """
    return float(re.match(rf"\W*{re.escape(answer)}(?![\w-])", text) is not None)


def listed_share(text: str, answers: Sequence[str]) -> float:
    """Share of the answers that stand in the text as whole words, in any order; case counts. As in RULER."""
    return sum(_holds(text, answer) for answer in answers) / len(answers)


def normalised_match(text: str, answers: Sequence[str]) -> float:
    """1 if the first line of the text holds any of the answers, both normalised as for SQuAD (:func:`normalised`)."""
    lines = text.strip().splitlines()
    said = normalised(lines[0]) if lines else ""
    return float(any(_holds(said, normalised(answer)) for answer in answers))


def normalised(text: str) -> str:
    """Lower case, without punctuation and English articles, words separated by one space.

    An answer that is nothing but these ("The The") keeps its articles.
    """
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    words = plain.split()
    return " ".join([word for word in words if word not in ("a", "an", "the")] or words)


def copied_share(made: Sequence[int], wanted: Sequence[int]) -> float:
    """Share of the wanted tokens that were generated before the first wrong one.

    Raises:
        ValueError: nothing is wanted.
    """
    if not len(wanted):
        raise ValueError("a copy needs at least one token")
    right = 0
    for mine, theirs in zip(made, wanted, strict=False):
        if mine != theirs:
            break
        right += 1
    return right / len(wanted)


def _holds(text: str, answer: str) -> bool:
    return bool(answer) and re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text) is not None
