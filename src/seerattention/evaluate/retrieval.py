"""Retrieval accuracy: teacher-forced greedy exact match on the tasks of :mod:`seerattention.tasks`.

An answer counts when, at each of its tokens, the arg max of the logits of the token before equals it. With the answer
given as input that is what greedy decoding would have produced, at the cost of one forward for all questions of a
sample. Question and answer rows are as sparse as all others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from ..tasks import TASKS, TaskGenerator
from .forward import decoder_states, token_logits
from .settings import Setting

__all__ = ["RetrievalResult", "evaluate_retrieval", "make_samples", "score_samples"]

Samples = Mapping[str, Sequence[Any]]


@dataclass
class RetrievalResult:
    """Retrieval of one setting.

    Attributes:
        setting: its name.
        length: tokens a sample.
        correct: task -> bool ``[samples, questions]``.
        density: ``total_density`` over all of them.
    """

    setting: str
    length: int
    density: float
    correct: dict[str, np.ndarray] = field(default_factory=dict)

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
        return RetrievalResult(self.setting, self.length, density, correct)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        tasks = {
            task: {
                "accuracy": float(correct.mean()),
                "standard_error": _finite(self.standard_error(task)),
                "samples": int(correct.shape[0]),
                "questions": int(correct.size),
            }
            for task, correct in self.correct.items()
        }
        return {"setting": self.setting, "length": self.length, "density": self.density, "tasks": tasks}


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
    model: nn.Module, samples: Sequence[Any], batch_size: int = 1, advance: Callable[[int], None] | None = None
) -> np.ndarray:
    """Which questions are answered exactly, bool ``[samples, questions]``, with the model as it is.

    Args:
        samples: task samples of one length and one number of questions.
        advance: called after each batch with the number of tokens that it had (for progress bars).
    """
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    correct = []
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        input_ids = torch.stack([torch.as_tensor(np.asarray(sample.input_ids), dtype=torch.int64) for sample in batch])
        rows, positions = _answer_positions(batch)
        states = decoder_states(model, input_ids.to(device))
        # A token is predicted by the position before it.
        picked = states[rows.to(states.device), (positions - 1).to(states.device)]
        predicted = token_logits(model, picked).argmax(-1).cpu()
        exact = iter((predicted == input_ids[rows, positions]).tolist())
        for sample in batch:
            # A list, not a generator: every token must be consumed, also after a wrong one.
            answers = [[next(exact) for a, b in question.answers for _ in range(a, b)] for question in sample.questions]
            correct.append([all(tokens) for tokens in answers])
        if advance is not None:
            advance(input_ids.numel())
    return np.asarray(correct, dtype=bool)


def evaluate_retrieval(
    model: nn.Module,
    samples: Samples,
    settings: Sequence[Setting],
    *,
    batch_size: int = 1,
    advance: Callable[[int], None] | None = None,
) -> list[RetrievalResult]:
    """Score every setting on the same samples.

    Args:
        model: a Hugging Face causal language model; without gates where settings bring their own.
        samples: task -> samples, from :func:`make_samples`.
        settings: what to compare.
        batch_size: samples a forward.
        advance: called with the number of tokens of each batch (for progress bars).

    Returns:
        one result a setting, in order; density is measured over all samples of the setting.
    """
    lengths = {len(sample.input_ids) for group in samples.values() for sample in group}
    if len(lengths) != 1:
        raise ValueError(f"samples must share one length, got {sorted(lengths)}; evaluate each length by itself")
    results = []
    for setting in settings:
        with setting.applied(model) as measurement:
            correct = {task: score_samples(model, group, batch_size, advance) for task, group in samples.items()}
        results.append(RetrievalResult(setting.name, lengths.copy().pop(), measurement.density, correct))
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


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
