"""The main job in small: distil fresh gates, then measure dense, fresh and committed gates side by side.

Knows nothing of terminals; ``seer demo`` shows its progress and writes its report.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .. import hf
from ..baselines import Oracle
from ..distillation import DistillConfig, DistillHistory, StepReport, distill
from ..evaluate.maps import HeadMap, Inspection, inspect_attention
from ..evaluate.perplexity import PerplexityResult, cut_documents, evaluate_perplexity
from ..evaluate.retrieval import RetrievalResult, evaluate_retrieval, make_samples
from ..evaluate.settings import Setting
from ..evaluate.timing import TimingResult, time_prefill
from ..gates.sources import stored_budgets
from ..measure import Recall, measure_recall
from ..measure.kept import SHOWN
from ..policies import Budgets, Policy, TopK, TopP
from ..tasks import TaskGenerator
from ..testbed import GATE_CONFIG
from .demo_compare import Compared, compare
from .demo_plan import DemoPlan, Rule

__all__ = ["DemoBooks", "DemoResult", "run_demo"]

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]

RECALL_DENSITY = 0.1
COMPARED_DENSITY = 0.2  # low enough to tell methods apart, and short prompts reach it
_ROWS = 0.5  # of the query blocks of a training sequence enter each step
_RECALL_LENGTH = 4096  # at most; the true map of a prompt costs as much as its attention
_WARMUP_LENGTH = 2048  # what is compiled for it serves all longer prompts


@dataclass
class DemoResult:
    """Everything that the demo measured.

    Attributes:
        history: of the distillation of the fresh gates; its recall was measured before and after on held-out text.
        committed_recall: layer index -> block recall of the committed gates on the same text; empty without them.
        oracle_recall: the same for selection from the true block maxima, which gates learn to predict.
        settings: names in the order of the results; the first is dense.
        timing, retrieval, perplexity: one result a setting.
        maps: of the heads that look farthest, from the committed gates, or the fresh ones without those.
        inspection: block recall of all heads in that prompt.
        compared: the same gates beside training-free methods, on other prompts.
        seconds: of each stage.
        shown: the number that is shown beside block recall, of "committed" gates and the "oracle".
    """

    history: DistillHistory
    committed_recall: dict[int, float]
    oracle_recall: dict[int, float]
    timing: list[TimingResult]
    retrieval: list[RetrievalResult]
    perplexity: list[PerplexityResult]
    maps: list[HeadMap]
    inspection: Inspection
    compared: Compared
    seconds: dict[str, float] = field(default_factory=dict)
    shown: dict[str, float | None] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        """How many rounds of evaluation the time allowed, with a document each."""
        return self.perplexity[0].losses.shape[0]

    @property
    def samples(self) -> int:
        """Of each task, in all rounds."""
        return int(next(iter(self.retrieval[0].correct.values())).shape[0])

    def fresh_recall(self) -> tuple[list[float], list[float]]:
        """Block recall of the fresh gates by layer, before and after distillation."""
        values = list(self.history.recall.values())
        return [layer[0] for layer in values], [layer[-1] for layer in values]


class DemoBooks(NamedTuple):
    """Token ids of texts: for distillation, and for every measurement."""

    train: Sequence[np.ndarray]
    test: Sequence[np.ndarray]


def run_demo(
    model: nn.Module,
    tokenizer: Any,
    gates: Path | None,
    books: DemoBooks,
    plan: DemoPlan,
    *,
    folder: Path,
    seed: int = 0,
    progress: Progress,
) -> DemoResult:
    """Run the demo.

    Args:
        model, tokenizer: a model without gates, and its tokenizer.
        gates: folder of the committed gates; None: the model comes without.
        books: what the demo reads.
        folder: the fresh gates are saved in ``folder / "fresh-gates"``, as they were before distillation in
            ``folder / "untrained-gates"``.
        progress: ``progress(what, total)`` is a context manager that gives ``advance(amount)``.
    """
    started = time.monotonic()
    torch.manual_seed(seed)
    clock = _Clock()
    recall_length = min(plan.task_length, _RECALL_LENGTH)
    asker = TaskGenerator(tokenizer, books.test, split="test", seed=seed + 1)
    task = make_samples(asker, plan.tasks[-1:], recall_length, 1, plan.questions)[plan.tasks[-1]][0]
    held_out = [
        {"input_ids": cut_documents(books.test, recall_length, 1, bos=tokenizer.bos_token_id)},
        {"input_ids": torch.as_tensor(task.input_ids)[None]},
    ]
    fresh, untrained = folder / "fresh-gates", folder / "untrained-gates"
    batches = _training_batches(tokenizer, books.train, plan, seed)
    history = _distil_fresh_gates(model, batches, held_out, plan, untrained, fresh, seed, progress)
    committed = Recall()
    if gates is not None:
        hf.attach(model, gates, min_context=0)
        try:
            committed = measure_recall(model, held_out, TopK(RECALL_DENSITY))
        finally:
            hf.detach(model)
    hf.attach(model, selector=Oracle(TopK(RECALL_DENSITY)), min_context=0)
    try:
        oracle = measure_recall(model, held_out)
    finally:
        hf.detach(model)
    clock.lap("distillation")

    kinds = (
        ("committed", gates, plan.committed if gates is not None else ()),
        ("fresh", fresh, plan.fresh),
        ("untrained", untrained, plan.untrained),
    )
    settings = [
        Setting.dense(),
        *(
            Setting(f"{kind} gates, {_rule_name(rule)}", gates=saved, policy=_policy(rule, budgets))
            for kind, saved, rules in kinds
            for budgets in [None if saved is None else stored_budgets(saved)]
            for rule in rules
        ),
    ]
    documents = cut_documents(books.test, plan.length, plan.max_rounds, bos=tokenizer.bos_token_id)
    warmup = min(plan.length, _WARMUP_LENGTH)
    with progress("timing prefill", (plan.repeats * plan.length + warmup) * len(settings)) as advance:
        timing = time_prefill(
            model, documents[:1], settings, repeats=plan.repeats, warmup_length=warmup, advance=advance
        )
    clock.lap("timing")

    best = ("fresh gates", fresh) if gates is None else ("committed gates", gates)
    asker = TaskGenerator(tokenizer, books.test, split="test", seed=seed + 2)
    asked = make_samples(asker, plan.tasks, plan.task_length, 1, plan.questions)
    read = documents[:1, : plan.task_length]
    compared = compare(model, best, asked, read, density=COMPARED_DENSITY, progress=progress)
    clock.lap("comparison")

    generator = TaskGenerator(tokenizer, books.test, split="test", seed=seed)
    retrieval, perplexity = _evaluate_rounds(model, generator, documents, settings, plan, started, progress)
    clock.lap("evaluation")

    prompt = make_samples(generator, ["multikey"], min(plan.task_length, 4096), 1, plan.questions)["multikey"][0]
    hf.attach(model, fresh if gates is None else gates, prefill=TopK(RECALL_DENSITY), min_context=0)
    try:
        inspection = inspect_attention(model, torch.as_tensor(prompt.input_ids)[None])
    finally:
        hf.detach(model)
    clock.lap("maps")
    far = sorted(inspection.maps, key=_far_share, reverse=True)[:3]
    recalls, shown = (committed.block_recall(), oracle.block_recall()), {"committed": committed, "oracle": oracle}
    return DemoResult(
        history, *recalls, timing, retrieval, perplexity, far, inspection, compared, clock.laps,
        {name: recall.numbers()[SHOWN] for name, recall in shown.items()},
    )  # fmt: skip


def _rule_name(rule: Rule) -> str:
    if isinstance(rule, TopP):
        return f"top-p {rule.p:g}"
    return rule if isinstance(rule, str) else f"{rule:g}"


def _policy(rule: Rule, budgets: Budgets | None) -> Policy | None:
    """None is the policy that is stored with the gates."""
    if isinstance(rule, TopP):
        return rule
    if isinstance(rule, str):
        return None
    return TopK(rule) if budgets is None else budgets.policy(rule)


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self._last = now - self._last, now


def _distil_fresh_gates(
    model: nn.Module,
    batches: Sequence[dict[str, Tensor]],
    held_out: list[dict[str, Tensor]],
    plan: DemoPlan,
    untrained: Path,
    trained: Path,
    seed: int,
    progress: Progress,
) -> DistillHistory:
    """Distil new gates; saves them as they were before and after."""
    steps = _affordable_steps(model, batches, plan)
    hf.attach(model, GATE_CONFIG, min_context=0)
    try:
        hf.save_gates(model, untrained)
        config = DistillConfig(
            learning_rate=plan.learning_rate,
            steps=steps,
            warmup=max(1, steps // 10),
            rows=_ROWS,
            seed=seed,
            eval_density=RECALL_DENSITY,
        )
        with progress(f"distilling fresh gates ({steps} steps)", steps) as advance:

            def show(report: StepReport) -> None:
                if report.step:
                    advance(1)

            history = distill(model, batches, config, eval_batches=held_out, on_step=show)
        hf.save_gates(model, trained)
    finally:
        hf.detach(model)
    return history


def _training_batches(
    tokenizer: Any, books: Sequence[np.ndarray], plan: DemoPlan, seed: int
) -> list[dict[str, Tensor]]:
    """Book text and retrieval tasks in turn (names and books that no measurement uses)."""
    text = torch.from_numpy(np.concatenate([np.asarray(book, dtype=np.int64) for book in books]))
    pieces = text[: len(text) // plan.train_length * plan.train_length].view(-1, plan.train_length)
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed))
    generator = TaskGenerator(tokenizer, books, split="train", seed=seed)
    batches = []
    for step in range(plan.max_steps):
        if step % 2:
            task = plan.tasks[step // 2 % len(plan.tasks)]
            made = make_samples(generator, [task], plan.train_length, plan.batch_size, min(4, plan.questions))[task]
            rows = torch.stack([torch.as_tensor(sample.input_ids) for sample in made])
        else:
            first = step // 2 * plan.batch_size + torch.arange(plan.batch_size)
            rows = pieces[order[first % len(pieces)]]
        batches.append({"input_ids": rows})
    return batches


def _affordable_steps(model: nn.Module, batches: Sequence[dict[str, Tensor]], plan: DemoPlan) -> int:
    """Steps that fit a share of the time, judged by the second of two steps of gates that are thrown away."""
    times: list[float] = []
    hf.attach(model, GATE_CONFIG, min_context=0)
    try:
        config = DistillConfig(steps=2, rows=_ROWS)
        distill(model, batches[:2], config, on_step=lambda report: times.append(time.monotonic()))
    finally:
        hf.detach(model)
    affordable = int(plan.distill_share * plan.seconds / (times[-1] - times[-2]))
    return max(2, min(plan.max_steps, affordable))


def _evaluate_rounds(
    model: nn.Module,
    generator: TaskGenerator,
    documents: Tensor,
    settings: Sequence[Setting],
    plan: DemoPlan,
    started: float,
    progress: Progress,
) -> tuple[list[RetrievalResult], list[PerplexityResult]]:
    """Rounds of some samples of each task and a document, each through every setting, as long as time allows (one at
    least).
    """
    retrieval: list[RetrievalResult] = []
    perplexity: list[PerplexityResult] = []
    tokens = (len(plan.tasks) * plan.samples * plan.task_length + plan.length) * len(settings)
    slowest = 0.0
    for index in range(plan.max_rounds):
        begun = time.monotonic()
        if index and begun - started + slowest > plan.seconds:
            break
        samples = make_samples(generator, plan.tasks, plan.task_length, plan.samples, plan.questions)
        with progress(f"evaluating, round {index + 1} of up to {plan.max_rounds}", tokens) as advance:
            # By generation every question would take a prefill of its own.
            answered = evaluate_retrieval(model, samples, settings, advance=advance, method="teacher_forcing")
            read = evaluate_perplexity(model, documents[index : index + 1], settings, advance=advance)
        retrieval = [a.joined(b) for a, b in zip(retrieval, answered, strict=True)] if index else answered
        perplexity = [a.joined(b) for a, b in zip(perplexity, read, strict=True)] if index else read
        slowest = max(slowest, time.monotonic() - begun)
    return retrieval, perplexity


def _far_share(item: HeadMap) -> float:
    """How much of the map lies neither on the diagonal, nor beside it, nor in the first block."""
    rows, columns = np.indices(item.target.shape)
    near = (rows - columns <= 1) | (columns == 0)
    share = float(np.where(near, 0.0, item.target).sum() / item.target.shape[0])
    return share if math.isfinite(share) else 0.0
