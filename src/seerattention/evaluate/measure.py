"""What a measure is: the one form of retrieval, perplexity, prefill time, and of whatever else is measured.

A measure is a dataclass whose fields are its options. It prepares prompts of one length, runs settings on them, and
shows the results as a table, a picture and JSON. :mod:`.cases` runs measures and :mod:`.journal` keeps what they found;
neither knows any of them. ``CONTRIBUTING.md`` says how to add one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from torch import nn

from .settings import Setting
from .tables import Table

__all__ = ["Advance", "Measure", "Picture", "Prompts", "Result", "Subject"]

Advance = Callable[[int], None]
"""Called with numbers of tokens, for progress bars."""


@dataclass(frozen=True)
class Subject:
    """What is measured, and the texts to measure it with.

    Attributes:
        model: a Hugging Face causal language model; without gates where settings bring their own.
        tokenizer: its tokenizer.
        books: token ids of texts that the model was not trained on, 1-D integer arrays.
        batch_size: prompts a forward.
        seed: of whatever a measure draws.
    """

    model: nn.Module
    tokenizer: Any
    books: Sequence[np.ndarray]
    batch_size: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Prompts:
    """What a measure made to run settings on.

    Attributes:
        content: whatever the measure's ``run`` takes.
        decides: every array that decides what is found, by name: token ids, places of answers. Results that are kept
            are those of the same arrays.
        tokens: how many tokens each setting runs, for progress bars.
    """

    content: Any
    decides: Mapping[str, np.ndarray]
    tokens: int


@dataclass(frozen=True)
class Picture:
    """A matplotlib figure, the sentence under it, and what it shows for those who cannot see it."""

    figure: Any
    caption: str
    alt: str


class Result(Protocol):
    """What a measure found out about one setting.

    Attributes:
        setting: its name.
        density: selected causal blocks over all causal blocks of what ran.
    """

    setting: str
    density: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON, finite or None."""

    def arrays(self) -> dict[str, np.ndarray]:
        """What the numbers alone do not hold: with both, ``restore`` makes the same result again."""


class Measure(Protocol):
    """One way to measure. Implementations are frozen dataclasses; their fields are options.

    ``seer eval`` fills fields that are called like its own options (``samples``, ``questions``, ``documents``,
    ``repeats``, ``tasks``, ``method``; ``lm_eval_tasks``, ``limit``, ``num_fewshot``, ``apply_chat_template``;
    ``max_seq_lengths`` from ``--lengths``).

    Attributes:
        name: on the command line and in ``results.json``.
        title: in headings, before "at 4K".
        together: settings take turns in one run, so they are kept or measured again together; as a rule they do not.
        needs_texts: whether it reads ``Subject.books``; where it is missing, it does.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    together: ClassVar[bool] = False
    needs_texts: ClassVar[bool] = True

    def lengths(self, asked: Sequence[int]) -> Sequence[int]:
        """Which of the lengths that were asked for, ascending, to measure: all. ``[0]``: prompts have their own."""
        return asked

    def settings(self, asked: Sequence[Setting]) -> Sequence[Setting]:
        """Which of the settings that were asked for to measure: all."""
        return asked

    def prepare(self, subject: Subject, length: int) -> Prompts:
        """Prompts of ``length`` tokens: a function of the arguments and the options."""

    def run(
        self, subject: Subject, prompts: Prompts, settings: Sequence[Setting], advance: Advance | None = None
    ) -> Sequence[Any]:
        """One :class:`Result` a setting, in order."""

    def restore(self, numbers: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Any:
        """The :class:`Result` whose ``to_dict`` and ``arrays`` these are."""

    def table(self, results: Sequence[Any]) -> Table:
        """Results of one length, one row a setting; density beside every score."""

    def picture(self, results: Sequence[Any]) -> Picture | None:
        """The same as a picture, where it says more than the table."""
        return None
