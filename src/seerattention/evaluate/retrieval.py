"""Retrieval accuracy: exact match on the tasks of :mod:`seerattention.tasks`, by one of two methods.

``generate`` is what a user gets: the prompt ends where the answer begins, ``model.generate`` decodes greedily, and its
tokens are compared with the answer's. Every answer takes a prefill of its own. The questions that stand before it in
the sample, with their right answers, are part of the prompt.

``teacher_forcing`` is the fast way: one forward over the sample, answers included, serves all its questions; an answer
counts when, at each of its tokens, the arg max of the logits of the token before equals it. For dense attention both
agree, up to rounding. For block-sparse attention they differ: question and answer lie in one query block, so the answer
takes part in the selection of blocks for its own prediction, which no user has. docs/experiments.md has how much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..tasks import TASKS, TaskGenerator
from .forward import check_batch_size, decoder_states, prompt_device, token_logits
from .generation import decode_greedily
from .measure import Advance, Measure, Picture, Prompts, Subject
from .settings import Setting
from .tables import Table, finite, format_density, format_length, format_percent

__all__ = [
    "METHODS",
    "RetrievalMeasure",
    "RetrievalResult",
    "evaluate_retrieval",
    "make_samples",
    "retrieval_table",
    "score_samples",
]

METHODS = ("generate", "teacher_forcing")

Samples = Mapping[str, Sequence[Any]]


@dataclass
class RetrievalResult:
    """Retrieval of one setting.

    Attributes:
        setting: its name.
        length: tokens a sample.
        correct: task -> bool ``[samples, questions]``.
        density: ``prompt_density`` over all of them: every layer and row of the prompts, dense ones counted as 1, but
            no decoding steps.
        method: how answers were got, one of :data:`METHODS`.
    """

    setting: str
    length: int
    density: float
    correct: dict[str, np.ndarray] = field(default_factory=dict)
    method: str = "teacher_forcing"

    def accuracy(self, tasks: Sequence[str] | None = None) -> float:
        """Share of correct questions: the mean over ``tasks`` (None: all)."""
        return float(np.mean([self.correct[task].mean() for task in tasks or list(self.correct)]))

    def standard_error(self, task: str) -> float:
        """Standard error of the accuracy of a task; NaN below two samples.

        The unit is the sample, because questions about the same text are not independent.
        """
        per_sample = self.correct[task].mean(-1)
        return float(per_sample.std(ddof=1) / math.sqrt(len(per_sample))) if len(per_sample) > 1 else math.nan

    def joined(self, other: RetrievalResult) -> RetrievalResult:
        """This and another result of the same setting, length and tasks as one."""
        mine, theirs = (next(iter(result.correct.values())).shape[0] for result in (self, other))
        density = (self.density * mine + other.density * theirs) / (mine + theirs)
        correct = {task: np.concatenate([array, other.correct[task]]) for task, array in self.correct.items()}
        return RetrievalResult(self.setting, self.length, density, correct, self.method)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        tasks = {
            task: {
                "accuracy": float(correct.mean()),
                "standard_error": finite(self.standard_error(task)),
                "samples": int(correct.shape[0]),
                "questions": int(correct.size),
            }
            for task, correct in self.correct.items()
        }
        return {
            "setting": self.setting,
            "length": self.length,
            "density": self.density,
            "method": self.method,
            "tasks": tasks,
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """Which questions of each task were answered."""
        return dict(self.correct)


def make_samples(
    generator: TaskGenerator, tasks: Sequence[str] = TASKS, length: int = 16384, count: int = 8, questions: int = 4
) -> dict[str, list[Any]]:
    """``count`` samples of each task, ``length`` tokens each, with ``questions`` questions each (``single`` has one).

    Raises:
        ValueError: an unknown task.
    """
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise ValueError(f"unknown tasks {unknown}; choose from {', '.join(TASKS)}")
    asked = {task: 1 if task == "single" else questions for task in tasks}
    return {task: [generator.sample(task, length, questions=asked[task]) for _ in range(count)] for task in tasks}


@torch.inference_mode()
def score_samples(
    model: nn.Module,
    samples: Sequence[Any],
    batch_size: int = 1,
    advance: Callable[[int], None] | None = None,
    *,
    method: str = "generate",
) -> np.ndarray:
    """Which questions are answered exactly, bool ``[samples, questions]``, with the model as it is.

    Args:
        samples: task samples of one length and one number of questions.
        batch_size: prompts a forward.
        advance: called with numbers of tokens (for progress bars), in all those of the samples, whatever the method.
        method: one of :data:`METHODS`, see the module.

    Raises:
        ValueError: an unknown method, or a batch size below 1.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    check_batch_size(batch_size)
    right = _generated if method == "generate" else _teacher_forced
    found = right(model, samples, batch_size, advance)
    correct = [
        [all(found[row, span] for span in question.answers) for question in sample.questions]
        for row, sample in enumerate(samples)
    ]
    return np.asarray(correct, dtype=bool)


def _tokens(sample: Any) -> Tensor:
    return torch.as_tensor(np.asarray(sample.input_ids), dtype=torch.int64)


Found = dict[tuple[int, tuple[int, int]], bool]
"""(sample, span of an answer) -> whether all its tokens are right."""


def _generated(
    model: nn.Module, samples: Sequence[Any], batch_size: int, advance: Callable[[int], None] | None
) -> Found:
    """Decode every answer from the tokens before it. Prompts of one length and one length of answer go together."""
    asked: dict[tuple[int, int], list[int]] = {}
    for row, sample in enumerate(samples):
        for span in sorted({tuple(span) for question in sample.questions for span in question.answers}):
            asked.setdefault(span, []).append(row)
    device, found = prompt_device(model), {}
    total = sum(len(sample.input_ids) for sample in samples)
    prompts, done = sum(len(rows) for rows in asked.values()), 0
    for (start, stop), rows in asked.items():
        for first in range(0, len(rows), batch_size):
            batch = rows[first : first + batch_size]
            ids = torch.stack([_tokens(samples[row]) for row in batch])
            made = decode_greedily(model, ids[:, :start].to(device), stop - start)
            exact = (made.cpu() == ids[:, start:stop]).all(-1).tolist()
            found.update({(row, (start, stop)): right for row, right in zip(batch, exact, strict=True)})
            done += len(batch)
            if advance is not None:
                advance(done * total // prompts - (done - len(batch)) * total // prompts)
    return found


def _teacher_forced(
    model: nn.Module, samples: Sequence[Any], batch_size: int, advance: Callable[[int], None] | None
) -> Found:
    """One forward of each sample."""
    device, found = prompt_device(model), {}
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        input_ids = torch.stack([_tokens(sample) for sample in batch])
        rows, positions = _answer_positions(batch)
        states = decoder_states(model, input_ids.to(device))
        # A token is predicted by the position before it.
        picked = states[rows.to(states.device), (positions - 1).to(states.device)]
        predicted = token_logits(model, picked).argmax(-1).cpu()
        exact = iter((predicted == input_ids[rows, positions]).tolist())
        for row, sample in enumerate(batch, start):
            for question in sample.questions:
                for a, b in question.answers:
                    tokens = [next(exact) for _ in range(a, b)]  # all of them, also after a wrong one
                    found[row, (a, b)] = all(tokens)
        if advance is not None:
            advance(input_ids.numel())
    return found


def evaluate_retrieval(
    model: nn.Module,
    samples: Samples,
    settings: Sequence[Setting],
    *,
    batch_size: int = 1,
    advance: Callable[[int], None] | None = None,
    method: str = "generate",
) -> list[RetrievalResult]:
    """Score every setting on the same samples.

    Args:
        model: a Hugging Face causal language model; without gates where settings bring their own.
        samples: task -> samples, from :func:`make_samples`.
        settings: what to compare.
        batch_size: prompts a forward.
        advance: called with numbers of tokens, in all those of the samples for each setting (for progress bars).
        method: ``"generate"`` decodes each answer from the prompt before it, as a user would; ``"teacher_forcing"``
            looks at one forward of each sample with the answers in it: as many times faster as a sample has answers,
            and not the same under sparse attention.

    Returns:
        one result a setting, in order; density is measured over all prompts of the setting.

    Raises:
        ValueError: samples of several lengths, or an unknown method.
    """
    lengths = {len(sample.input_ids) for group in samples.values() for sample in group}
    if len(lengths) != 1:
        raise ValueError(f"samples must share one length, got {sorted(lengths)}; evaluate each length by itself")
    results = []
    for setting in settings:
        with setting.applied(model) as measurement:
            correct = {
                task: score_samples(model, group, batch_size, advance, method=method) for task, group in samples.items()
            }
        density = measurement.prompt_density
        results.append(RetrievalResult(setting.name, lengths.copy().pop(), density, correct, method))
    return results


def _answer_positions(samples: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = [
        (row, position)
        for row, sample in enumerate(samples)
        for question in sample.questions
        for start, stop in question.answers
        for position in range(start, stop)
    ]
    rows, positions = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(-1)
    return rows, positions


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


@dataclass(frozen=True)
class RetrievalMeasure(Measure):
    """Retrieval as a measure, see :class:`~seerattention.evaluate.measure.Measure`.

    Attributes:
        tasks: which of ``TASKS``.
        samples: of each task.
        questions: of each sample.
        method: how answers are got, one of :data:`METHODS`.
    """

    name: ClassVar[str] = "retrieval"
    title: ClassVar[str] = "Retrieval"

    tasks: Sequence[str] = TASKS
    samples: int = 8
    questions: int = 4
    method: str = "generate"

    def prepare(self, subject: Subject, length: int) -> Prompts:
        """Samples of every task."""
        generator = TaskGenerator(subject.tokenizer, subject.books, split="test", seed=subject.seed)
        made = make_samples(generator, self.tasks, length, self.samples, self.questions)
        decides = {}
        for task, group in made.items():
            decides[task] = np.stack([sample.input_ids for sample in group])
            spans = [span for sample in group for question in sample.questions for span in question.answers]
            decides[f"{task} answers"] = np.asarray(spans, dtype=np.int64)
        return Prompts(made, decides, sum(len(group) for group in made.values()) * length)

    def run(
        self, subject: Subject, prompts: Prompts, settings: Sequence[Setting], advance: Advance | None = None
    ) -> list[RetrievalResult]:
        """See :func:`evaluate_retrieval`."""
        return evaluate_retrieval(
            subject.model,
            prompts.content,
            settings,
            batch_size=subject.batch_size,
            advance=advance,
            method=self.method,
        )

    def restore(self, numbers: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> RetrievalResult:
        """A result that was kept."""
        correct = {task: arrays[task] for task in numbers["tasks"]}
        return RetrievalResult(
            numbers["setting"], numbers["length"], numbers["density"], correct, method=numbers["method"]
        )

    def table(self, results: Sequence[RetrievalResult]) -> Table:
        """See :func:`retrieval_table`."""
        return retrieval_table(results)

    def picture(self, results: Sequence[RetrievalResult]) -> Picture:
        """Accuracy over density, a line for each kind of setting."""
        from .figures import over_density

        figure = over_density(results, [100 * result.accuracy() for result in results], "accuracy, %", (-3, 103))
        return Picture(figure, "Mean accuracy of the tasks.", "accuracy over density")
