"""A progress line for distillation: loss, block recall, the number that tells more, tokens per second, time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..measure.kept import RECALLS, SHOWN
from .run import StepReport

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["distill_progress"]

_PLAIN_LINES = 10
_SMOOTHING = 0.9


@contextmanager
def distill_progress(console: Console, what: str = "distilling gates") -> Iterator[Callable[[StepReport], None]]:
    """Yields an ``on_step`` for :func:`~seerattention.distillation.distill` that shows a bar on ``console``.

    Where the console is no terminal, about ten plain lines are written instead.
    """
    if not console.is_terminal:
        yield _PlainProgress(console, what)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=None, figures="")
        rate = _Rate()
        yield lambda report: bar.update(
            task, completed=report.step, total=report.total, figures=_figures(report, rate(report))
        )


class _Rate:
    """Tokens per second, smoothed over the steps."""

    def __init__(self) -> None:
        self.value = 0.0

    def __call__(self, report: StepReport) -> float:
        new = report.tokens_per_second
        self.value = new if self.value == 0 else _SMOOTHING * self.value + (1 - _SMOOTHING) * new
        return self.value


class _PlainProgress:
    def __init__(self, console: Console, what: str):
        self.console, self.what = console, what
        self.rate = _Rate()
        self.first: tuple[int, float] | None = None
        self.next_step = 0

    def __call__(self, report: StepReport) -> None:
        rate, now = self.rate(report), time.monotonic()
        if self.first is None:
            self.first = (report.step, now)
        if report.step < self.next_step and report.step != report.total:
            return
        self.next_step = report.step + max(1, (report.total or 500) // _PLAIN_LINES)
        done = report.step - self.first[0]
        left = ""
        if report.total is not None and done:
            left = f", {(now - self.first[1]) / done * (report.total - report.step):.0f} s left"
        total = "" if report.total is None else f"/{report.total}"
        text: Any = f"{self.what}: step {report.step}{total} {_figures(report, rate)}{left}"
        self.console.print(text, markup=False, soft_wrap=True)


def _figures(report: StepReport, rate: float) -> str:
    parts = []
    if report.loss is not None:
        parts.append(f"loss {report.loss:.4f}")
    if report.recall is not None:
        parts.append(f"block recall {report.recall:.3f}")
    if (shown := report.numbers.get(SHOWN)) is not None:
        parts.append(f"{RECALLS[SHOWN]} {shown:.3f}")
    if rate:
        parts.append(f"{rate / 1000:.1f}K tokens/s" if rate >= 1000 else f"{rate:.0f} tokens/s")
    return ", ".join(parts)
