"""Perplexity by length: one forward of each document gives the loss at every position.

Attention is causal and every policy decides row by row, so the losses of the first n tokens of a long document are
those of a prompt of n tokens (n a multiple of the block size); one pass over the longest length gives the whole curve.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from .forward import check_batch_size, check_documents, iterate_token_losses, prompt_device
from .measure import Advance, Measure, Picture, Prompts, Subject
from .settings import Setting
from .tables import Table, finite, format_density, format_length, with_error

__all__ = [
    "PerplexityMeasure",
    "PerplexityResult",
    "cut_documents",
    "document_losses",
    "evaluate_perplexity",
    "perplexity_table",
]


@dataclass
class PerplexityResult:
    """Perplexity of one setting.

    Attributes:
        setting: its name.
        density: ``total_density`` over all documents.
        losses: float32 ``[documents, T - 1]``, cross entropy in nats of tokens 1..T-1.
        rowwise: whether the first positions are those of a shorter document. A selector that looks at the whole prompt
            would have chosen other blocks for that, so only the loss over all positions is its own.
    """

    setting: str
    density: float
    losses: np.ndarray
    rowwise: bool = True

    @property
    def length(self) -> int:
        """Tokens a document."""
        return self.losses.shape[1] + 1

    def loss(self, start: int = 0, stop: int | None = None) -> tuple[float, float]:
        """Mean loss of positions ``start <= position < stop``, and its standard error over documents (one: NaN)."""
        return _mean_and_error(self._per_document(start, stop))

    def perplexity(self, start: int = 0, stop: int | None = None) -> tuple[float, float]:
        """exp of :meth:`loss`, and its standard error (first order)."""
        mean, error = self.loss(start, stop)
        return math.exp(mean), math.exp(mean) * error

    def last_quarter(self) -> tuple[float, float]:
        """Perplexity of the last quarter of the positions: where long context, and the lack of it, shows."""
        return self.perplexity(self.length * 3 // 4)

    def loss_increase(
        self, reference: PerplexityResult, start: int = 0, stop: int | None = None
    ) -> tuple[float, float]:
        """Mean loss minus that of ``reference`` on the same documents, and the standard error of that difference."""
        return _mean_and_error(self._per_document(start, stop) - reference._per_document(start, stop))

    def joined(self, other: PerplexityResult) -> PerplexityResult:
        """This and another result of the same setting and length as one."""
        mine, theirs = self.losses.shape[0], other.losses.shape[0]
        density = (self.density * mine + other.density * theirs) / (mine + theirs)
        return PerplexityResult(self.setting, density, np.concatenate([self.losses, other.losses]), self.rowwise)

    def buckets(self) -> list[tuple[int, int]]:
        """Position ranges that double in length: 0-256, 256-512, 512-1K, ..."""
        edges = [0] + [edge for edge in (2**i for i in range(8, 40)) if edge < self.length] + [self.length]
        return list(itertools.pairwise(edges))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        quarter, quarter_error = self.last_quarter()
        by_position, by_length = [], []
        for start, stop in self.buckets():
            loss, error = self.loss(start, stop)
            by_position.append({"start": start, "stop": stop, "loss": loss, "standard_error": finite(error)})
            perplexity, error = self.perplexity(0, stop)
            if self.rowwise or stop == self.length:
                by_length.append({"length": stop, "perplexity": perplexity, "standard_error": finite(error)})
        return {
            "setting": self.setting,
            "density": self.density,
            "rowwise": self.rowwise,
            "length": self.length,
            "documents": int(self.losses.shape[0]),
            "last_quarter": {"perplexity": quarter, "standard_error": finite(quarter_error)},
            "by_position": by_position,
            "by_length": by_length,
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """The losses."""
        return {"losses": self.losses}

    def _per_document(self, start: int, stop: int | None) -> np.ndarray:
        # The loss at index i is that of the token at position i + 1.
        part = self.losses[:, max(start - 1, 0) : None if stop is None else stop - 1]
        if part.shape[1] == 0:
            raise ValueError(
                f"no predicted token between positions {start} and {stop} of documents of {self.length} tokens"
            )
        return part.mean(-1, dtype=np.float64)


def cut_documents(
    texts: Sequence[np.ndarray | Tensor | Sequence[int]], length: int, count: int, *, bos: int | None = None
) -> Tensor:
    """``count`` documents of ``length`` tokens, int64 ``[count, length]``: the first pieces of every text in turn.

    Args:
        bos: token with which each document begins, one of its ``length``: the tokenizer's ``bos_token_id``, as in the
            samples of the retrieval tasks. Models that were trained with it attend to it from everywhere. None: none.

    Raises:
        ValueError: the texts do not hold that many disjoint pieces.
    """
    arrays = [np.asarray(text, dtype=np.int64) for text in texts]
    opening = np.array([] if bos is None else [bos], dtype=np.int64)
    size = length - len(opening)
    if size < 1 or count < 1:
        raise ValueError(f"documents need a token of text each, got {count} documents of {length} tokens")
    pieces: list[np.ndarray] = []
    round_ = 0
    while len(pieces) < count:
        found = [
            np.concatenate([opening, text[round_ * size : (round_ + 1) * size]])
            for text in arrays
            if len(text) >= (round_ + 1) * size
        ]
        if not found:
            raise ValueError(
                f"the text gives only {len(pieces)} documents of {length} tokens, {count} were asked for; "
                "use fewer or shorter documents, or more text"
            )
        pieces += found
        round_ += 1
    return torch.from_numpy(np.stack(pieces[:count]))


@torch.inference_mode()
def document_losses(
    model: nn.Module, documents: Tensor, batch_size: int = 1, advance: Callable[[int], None] | None = None
) -> np.ndarray:
    """Token losses float32 ``[documents, T - 1]`` of ``documents [documents, T]``, with the model as it is."""
    check_documents(documents)
    check_batch_size(batch_size)
    device = prompt_device(model)
    rows = []
    for batch in documents.split(batch_size):
        rows.append(torch.cat([losses.cpu() for losses in iterate_token_losses(model, batch.to(device))], dim=1))
        if advance is not None:
            advance(batch.numel())
    return torch.cat(rows).numpy()


def evaluate_perplexity(
    model: nn.Module,
    documents: Tensor,
    settings: Sequence[Setting],
    *,
    batch_size: int = 1,
    advance: Callable[[int], None] | None = None,
) -> list[PerplexityResult]:
    """Perplexity of every setting on the same documents, int64 ``[documents, T]``; one result a setting, in order.

    Raises:
        TypeError, ValueError: documents that are none, see :func:`~seerattention.evaluate.forward.check_documents`.
    """
    check_documents(documents)
    check_batch_size(batch_size)
    results = []
    for setting in settings:
        with setting.applied(model) as measurement:
            losses = document_losses(model, documents, batch_size, advance)
        results.append(PerplexityResult(setting.name, measurement.density, losses, setting.rowwise))
    return results


def _mean_and_error(values: np.ndarray) -> tuple[float, float]:
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


def perplexity_table(results: Sequence[PerplexityResult], lengths: Sequence[int] = ()) -> Table:
    """Density, perplexity by length, last-quarter perplexity and the loss added to the first (dense) result."""
    first = results[0]
    lengths = [length for length in lengths or (1024, 4096, 16384, 65536) if length < first.length] + [first.length]
    rows = []
    for result in results:
        quarter, quarter_error = result.last_quarter()
        added = "" if result is first else with_error(*result.loss_increase(first, first.length * 3 // 4), "+.4f")
        by_length = [
            f"{result.perplexity(0, length)[0]:.2f}" if result.rowwise or length == first.length else "-"
            for length in lengths
        ]
        rows.append(
            [result.setting, format_density(result.density), *by_length, with_error(quarter, quarter_error), added]
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
    if not all(result.rowwise for result in results):
        caption += " '-': the selector looks at the whole prompt, so it would read other blocks in a shorter one."
    return Table(headers, rows, caption)


@dataclass(frozen=True)
class PerplexityMeasure(Measure):
    """Perplexity as a measure, see :class:`~seerattention.evaluate.measure.Measure`.

    Attributes:
        documents: how many.
    """

    name: ClassVar[str] = "perplexity"
    title: ClassVar[str] = "Perplexity"

    documents: int = 4

    def lengths(self, asked: Sequence[int]) -> Sequence[int]:
        """The longest, which gives the others too."""
        return asked[-1:]

    def prepare(self, subject: Subject, length: int) -> Prompts:
        """Documents of the books, each with the tokenizer's first token."""
        cut = cut_documents(subject.books, length, self.documents, bos=subject.tokenizer.bos_token_id)
        return Prompts(cut, {"documents": cut.numpy()}, cut.numel())

    def run(
        self, subject: Subject, prompts: Prompts, settings: Sequence[Setting], advance: Advance | None = None
    ) -> list[PerplexityResult]:
        """See :func:`evaluate_perplexity`."""
        return evaluate_perplexity(
            subject.model, prompts.content, settings, batch_size=subject.batch_size, advance=advance
        )

    def restore(self, numbers: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> PerplexityResult:
        """A result that was kept."""
        return PerplexityResult(numbers["setting"], numbers["density"], arrays["losses"], numbers.get("rowwise", True))

    def table(self, results: Sequence[PerplexityResult]) -> Table:
        """See :func:`perplexity_table`."""
        return perplexity_table(results)

    def picture(self, results: Sequence[PerplexityResult]) -> Picture:
        """Loss added to the first (dense) result, over the position."""
        from .figures import line_figure

        first, buckets = results[0], results[0].buckets()
        series = {}
        for result in results[1:]:
            added = [result.loss_increase(first, *bucket) for bucket in buckets]
            errors = None if math.isnan(added[0][1]) else [error for _, error in added]
            series[result.setting] = ([float(stop) for _, stop in buckets], [mean for mean, _ in added], errors)
        figure = line_figure(
            series,
            x_label="position",
            y_label="added loss, nats",
            reference=(first.setting, 0.0),
            log_x=True,
            x_ticks={float(stop): format_length(stop) for _, stop in buckets},
        )
        return Picture(figure, "Loss added to dense, by position.", "added loss by position")
