"""The text tasks of :mod:`seerattention.tasks.text` as a measure: greedy answers, scored from 0 to 1.

Questions on paragraphs are too hard for small models to answer freely: what dense attention cannot do says nothing
about sparse attention. For models below :data:`LEAST_PARAMETERS` they are scored by the perplexity of the right answer
instead, and tables say so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import nn

from ..tasks import TEXT_TASKS, TextSample, TextTasks, copied_share, score_answer
from .forward import check_batch_size
from .generation import answer_losses, generate_answers
from .measure import Advance, Measure, Prompts, Subject
from .settings import Setting
from .tables import Table, finite, format_density, format_length, format_percent

__all__ = ["ANSWERS", "LEAST_PARAMETERS", "SOLVED", "TextMeasure", "TextResult", "solved_tasks", "text_table"]

#: Models of fewer parameters are not asked to answer questions on paragraphs freely.
LEAST_PARAMETERS = 1_000_000_000
#: Means count the tasks that the dense model solves to at least this share.
SOLVED = 0.5
ANSWERS = ("auto", "generate", "perplexity")


@dataclass
class TextResult:
    """Text tasks in one setting.

    Attributes:
        setting: its name.
        length: tokens of a prompt with the room for its answer.
        density: ``prompt_density`` over all prompts: every layer and row, dense ones counted as 1, but no decoding
            steps.
        scores: task -> float32 ``[samples]``, from 0 to 1, of the tasks whose answers were generated.
        losses: task -> float32 ``[samples]``, mean nats a token of the right answer, of the others.
    """

    setting: str
    length: int
    density: float
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    losses: dict[str, np.ndarray] = field(default_factory=dict)

    def score(self, tasks: Sequence[str] | None = None) -> float:
        """Mean over tasks (None: all that were generated); NaN without one."""
        chosen = list(self.scores) if tasks is None else tasks
        return float(np.mean([self.scores[task].mean() for task in chosen])) if chosen else math.nan

    def standard_error(self, task: str) -> float:
        """Of the mean score of a task over samples; NaN below two."""
        values = self.scores[task]
        return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan

    def answer_perplexity(self, task: str) -> float:
        """Perplexity of the right answers."""
        return math.exp(float(self.losses[task].mean()))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        tasks = {
            task: {
                "score": float(values.mean()),
                "standard_error": finite(self.standard_error(task)),
                "samples": len(values),
            }
            for task, values in self.scores.items()
        }
        answers = {
            task: {"answer_perplexity": finite(self.answer_perplexity(task)), "samples": len(values)}
            for task, values in self.losses.items()
        }
        return {"setting": self.setting, "length": self.length, "density": self.density, "tasks": tasks | answers}

    def arrays(self) -> dict[str, np.ndarray]:
        """Scores and losses of every sample."""
        return {f"score {task}": values for task, values in self.scores.items()} | {
            f"loss {task}": values for task, values in self.losses.items()
        }


def solved_tasks(dense: TextResult) -> list[str]:
    """The tasks that count in means: those that the dense model solves to at least :data:`SOLVED`."""
    return [task for task, values in dense.scores.items() if values.mean() >= SOLVED]


@dataclass(frozen=True)
class TextMeasure(Measure):
    """Text tasks as a measure, see :class:`~seerattention.evaluate.measure.Measure`.

    Attributes:
        text_tasks: which of ``TEXT_TASKS``.
        samples: prompts of each task.
        answers: of questions on paragraphs: "generate", "perplexity" of the right answer, or "auto": by the number of
            the model's parameters.
        qa_data: a folder of question sets; None: the subsets that come with the package.
        chat: put prompts into the tokenizer's chat template.
    """

    name: ClassVar[str] = "tasks"
    title: ClassVar[str] = "Long-context tasks"

    text_tasks: Sequence[str] = TEXT_TASKS
    samples: int = 8
    answers: str = "auto"
    qa_data: str | None = None
    chat: bool = False

    def __post_init__(self) -> None:
        unknown = [task for task in self.text_tasks if task not in TEXT_TASKS]
        if unknown or not self.text_tasks:
            raise ValueError(f"unknown tasks {unknown}; choose from {', '.join(TEXT_TASKS)}")
        if self.answers not in ANSWERS:
            raise ValueError(f"answers must be one of {ANSWERS}, got {self.answers!r}")
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")

    def prepare(self, subject: Subject, length: int) -> Prompts:
        """Samples of every task. Each task has a generator of its own: its samples are the same, whatever others run.

        Raises:
            ValueError: a length that is too short for a task, or ``chat`` without a chat template.
        """
        made: dict[str, list[TextSample]] = {}
        decides = {}
        for task in self.text_tasks:
            maker = TextTasks(
                subject.tokenizer,
                subject.books,
                seed=subject.seed + 1009 * TEXT_TASKS.index(task),
                questions=self.qa_data,
                chat=self.chat,
            )
            made[task] = [maker.sample(task, length) for _ in range(self.samples)]
            decides[task] = np.stack([sample.prompt for sample in made[task]])
            decides[f"{task} answers"] = np.concatenate([sample.gold for sample in made[task]])
        return Prompts(made, decides, sum(map(len, made.values())) * length)

    def run(
        self, subject: Subject, prompts: Prompts, settings: Sequence[Setting], advance: Advance | None = None
    ) -> list[TextResult]:
        """Every task in each setting."""
        check_batch_size(subject.batch_size)
        results = []
        for setting in settings:
            scores, losses = {}, {}
            with setting.applied(subject.model) as measurement:
                for task, samples in prompts.content.items():
                    if self._by_perplexity(samples[0], subject.model):
                        losses[task] = _losses(subject, samples, advance)
                    else:
                        scores[task] = _scores(subject, samples, advance)
            sample = next(iter(prompts.content.values()))[0]
            length = len(sample.prompt) + sample.room
            results.append(TextResult(setting.name, length, measurement.prompt_density, scores, losses))
        return results

    def _by_perplexity(self, sample: TextSample, model: nn.Module) -> bool:
        if sample.score != "normalised":
            return False
        if self.answers != "auto":
            return self.answers == "perplexity"
        return sum(parameter.numel() for parameter in model.parameters()) < LEAST_PARAMETERS

    def restore(self, numbers: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> TextResult:
        """A result that was kept."""
        scores, losses = (
            {task: arrays[f"{kind} {task}"] for task in numbers["tasks"] if f"{kind} {task}" in arrays}
            for kind in ("score", "loss")
        )
        return TextResult(numbers["setting"], numbers["length"], numbers["density"], scores, losses)

    def table(self, results: Sequence[TextResult]) -> Table:
        """See :func:`text_table`."""
        return text_table(results)


def _batches(samples: Sequence[TextSample], size: int) -> list[Sequence[TextSample]]:
    return [samples[first : first + size] for first in range(0, len(samples), size)]


def _scores(subject: Subject, samples: Sequence[TextSample], advance: Advance | None) -> np.ndarray:
    stop = _ends(subject)
    found: list[float] = []
    for batch in _batches(samples, subject.batch_size):
        count = max(sample.room for sample in batch)
        made = generate_answers(subject.model, [sample.prompt for sample in batch], count, stop)
        for sample, tokens in zip(batch, made, strict=True):
            if sample.score == "copied":
                found.append(copied_share(tokens, sample.gold.tolist()))
            else:
                text = subject.tokenizer.decode(tokens[: sample.room], skip_special_tokens=True)
                found.append(score_answer(sample.score, text, sample.answers))
        if advance is not None:
            advance(sum(len(sample.prompt) + sample.room for sample in batch))
    return np.asarray(found, dtype=np.float32)


def _losses(subject: Subject, samples: Sequence[TextSample], advance: Advance | None) -> np.ndarray:
    found = []
    for sample in samples:
        found.append(answer_losses(subject.model, [sample.prompt], [sample.gold]))
        if advance is not None:
            advance(len(sample.prompt) + sample.room)
    return np.concatenate(found).astype(np.float32)


def _ends(subject: Subject) -> list[int]:
    """Tokens at which an answer ends: the model's own, and the tokenizer's."""
    config = getattr(subject.model, "generation_config", None)
    known = getattr(config, "eos_token_id", None)
    ends = set(known if isinstance(known, list) else [known]) | {getattr(subject.tokenizer, "eos_token_id", None)}
    return sorted(token for token in ends if token is not None)


def text_table(results: Sequence[TextResult]) -> Table:
    """Density, the score of each task, and the mean of those that the first (dense) result solves."""
    first = results[0]
    solved = solved_tasks(first)
    headers = ["setting", "density", *first.scores, "mean of solved", *(f"{task} (ppl)" for task in first.losses)]
    rows = []
    for result in results:
        mean = result.score(solved)
        rows.append(
            [
                result.setting,
                format_density(result.density),
                *(format_percent(result.score([task]), result.standard_error(task)) for task in result.scores),
                "-" if math.isnan(mean) else format_percent(mean),
                *(f"{result.answer_perplexity(task):.2f}" for task in result.losses),
            ]
        )
    count = len(next(iter((first.scores | first.losses).values())))
    caption = (
        f"Tasks at {format_length(first.length)} tokens, {count} prompts each, the same for every row: share of what "
        "was asked for, ± standard error. Answers are generated greedily. The mean counts the tasks that "
        f"'{first.setting}' solves to at least {100 * SOLVED:.0f} %: {', '.join(solved) or 'none'}."
    )
    if first.losses:
        caption += (
            " (ppl): the model is too small to answer questions on paragraphs freely; this is the perplexity of the "
            "right answer, lower is better."
        )
    return Table(headers, rows, caption)
