"""The measures there are, by name. A measure of your own is added with :func:`register`."""

from __future__ import annotations

from typing import TypeVar

from .harness import HarnessMeasure
from .measure import Measure
from .perplexity import PerplexityMeasure
from .retrieval import RetrievalMeasure
from .text_tasks import TextMeasure
from .timing import TimingMeasure

__all__ = ["MEASURES", "register"]

Kind = TypeVar("Kind", bound=type[Measure])

MEASURES: dict[str, type[Measure]] = {}


def register(kind: Kind) -> Kind:
    """Make a measure known by its name, to ``seer eval`` too; also as a decorator.

    Raises:
        ValueError: another measure has that name.
    """
    if MEASURES.setdefault(kind.name, kind) is not kind:
        raise ValueError(f"there is already a measure called {kind.name!r}; give this one another name")
    return kind


for _kind in (RetrievalMeasure, PerplexityMeasure, TimingMeasure, HarnessMeasure, TextMeasure):
    register(_kind)
