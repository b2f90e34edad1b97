"""Results as tables of text, once for the terminal and the report alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .perplexity import PerplexityResult
from .retrieval import RetrievalResult
from .timing import TimingResult

__all__ = [
    "Table",
    "format_density",
    "format_length",
    "format_percent",
    "perplexity_table",
    "retrieval_table",
    "timing_table",
]


@dataclass(frozen=True)
class Table:
    """Headers, rows of as many cells, and a caption that says what the numbers mean.

    Raises:
        ValueError: a row has another number of cells than there are headers.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.headers):
                raise ValueError(
                    f"a table row has {len(row)} cells but there are {len(self.headers)} headers: {list(row)}"
                )


def format_length(tokens: int) -> str:
    """Tokens in words: 512, 8K, 12.5K."""
    return str(tokens) if tokens < 1024 else f"{tokens / 1024:.1f}".removesuffix(".0") + "K"


def format_density(density: float) -> str:
    """Density with as many digits as are of use."""
    return f"{density:.3f}" if density < 0.1 else f"{density:.2f}"


def format_percent(share: float, error: float = math.nan) -> str:
    """A share in per cent, with its standard error where there is one."""
    return f"{100 * share:.0f} %" if math.isnan(error) else f"{100 * share:.0f} ± {100 * error:.0f} %"


_HOW = {
    "generate": "Answers are generated greedily from the prompt before them.",
    "teacher_forcing": "Teacher forcing: the right answers are part of the prompt, which is faster and not quite what "
    "generation gives.",
}


def retrieval_table(results: Sequence[RetrievalResult]) -> Table:
    """Density and accuracy of each task beside each other, one row a setting."""
    tasks = list(results[0].correct)
    rows = [
        [
            result.setting,
            format_density(result.density),
            *(format_percent(result.accuracy([task]), result.standard_error(task)) for task in tasks),
            format_percent(result.accuracy()),
        ]
        for result in results
    ]
    counts = ", ".join(f"{task} {array.shape[0]} x {array.shape[1]}" for task, array in results[0].correct.items())
    caption = (
        f"Retrieval at {format_length(results[0].length)} tokens: share of questions answered exactly, ± standard "
        "error over samples; "
        f"samples x questions a sample, the same for every row: {counts}. {_HOW[results[0].method]} Every row of the "
        "prompts is as sparse as the density says, questions included."
    )
    return Table(["setting", "density", *tasks, "mean"], rows, caption)


def perplexity_table(results: Sequence[PerplexityResult], lengths: Sequence[int] = ()) -> Table:
    """Density, perplexity by length, last-quarter perplexity and the loss added to the first (dense) result."""
    first = results[0]
    lengths = [length for length in lengths or (1024, 4096, 16384, 65536) if length < first.length] + [first.length]
    rows = []
    for result in results:
        quarter, quarter_error = result.last_quarter()
        added = "" if result is first else _signed(*result.loss_increase(first, first.length * 3 // 4))
        by_length = [f"{result.perplexity(0, length)[0]:.2f}" for length in lengths]
        rows.append(
            [result.setting, format_density(result.density), *by_length, _with_error(quarter, quarter_error), added]
        )
    headers = [
        "setting",
        "density",
        *(f"first {format_length(length)}" for length in lengths),
        "last quarter",
        "added loss",
    ]
    caption = (
        f"Perplexity of {first.losses.shape[0]} documents of {format_length(first.length)} tokens (lower is better). "
        "'Last quarter': "
        "the last quarter of the positions, where most context lies behind; 'added loss': nats a token more than "
        f"'{first.setting}' there, "
        "± standard error of the paired difference over documents."
    )
    return Table(headers, rows, caption)


def timing_table(results: Sequence[TimingResult]) -> Table:
    """Median prefill time of each setting and its speed relative to the first (dense) one."""
    first = results[0]
    rows = [
        [
            result.setting,
            format_density(result.density),
            _seconds(result.median),
            f"{first.median / result.median:.2f}x",
            f"{_seconds(min(result.seconds))} - {_seconds(max(result.seconds))}",
            _seconds(result.first_seconds),
        ]
        for result in results
    ]
    caption = (
        f"Prefill of {first.batch} x {format_length(first.length)} tokens through the whole model: median of "
        f"{len(first.seconds)} interleaved "
        "repeats. 'First call' is the untimed warm-up; it holds whatever had to be compiled."
    )
    return Table(["setting", "density", "prefill", f"speed vs {first.setting}", "range", "first call"], rows, caption)


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _with_error(value: float, error: float) -> str:
    return f"{value:.2f}" if math.isnan(error) else f"{value:.2f} ± {error:.2f}"


def _signed(value: float, error: float) -> str:
    return f"{value:+.4f}" if math.isnan(error) else f"{value:+.4f} ± {error:.4f}"
