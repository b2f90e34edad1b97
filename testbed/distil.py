"""Distils the testbed model's gates on its own training texts and tasks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import seerattention as seer
from seerattention.distillation.data import in_background
from seerattention.tasks import TASKS, TaskGenerator, TrainingMix

from .data import load_books


class TaskBatches:
    """Batches ``{"input_ids": [batch_size, length]}`` of tasks in books, the same ones each time it is iterated.

    Half of the training sequences are the training mix, half look like evaluation samples (a few questions near the
    end, text between them), because a gate must find the few rows that ask among many that do not.

    Args:
        tokenizer, books: as for ``TaskGenerator``.
        length, batch_size, count: tokens a sequence, sequences a batch, batches.
        options: ``seed``, ``split``, ``templates`` of ``TaskGenerator``.
    """

    def __init__(
        self, tokenizer: Any, books: list[np.ndarray], length: int, batch_size: int, count: int, **options: Any
    ) -> None:
        self.arguments = (tokenizer, books)
        self.length, self.batch_size, self.count, self.options = length, batch_size, count, options

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return in_background(self._make(), 4)

    def _make(self) -> Iterator[dict[str, torch.Tensor]]:
        generator = TaskGenerator(*self.arguments, **self.options)
        mix = TrainingMix(generator) if self.options["split"] == "train" else None
        for _ in range(self.count):
            rows = [self._sequence(generator, mix) for _ in range(self.batch_size)]
            yield {"input_ids": torch.from_numpy(np.stack(rows))}

    def _sequence(self, generator: TaskGenerator, mix: TrainingMix | None) -> np.ndarray:
        rng = generator.rng
        if mix is not None and rng.random() < 0.5:
            return mix.sequence(self.length, tasks=0.7).input_ids
        task = TASKS[int(rng.integers(len(TASKS)))]
        most = 1 if task == "single" else min(8, self.length // 512)  # a question with its answers needs that much room
        return generator.sample(task, self.length, int(rng.integers(1, most + 1))).input_ids


FORMS = {
    "sub_block": seer.testbed.GATE_CONFIG,
    # Queries by all three poolings: the average alone loses what a single question among 64 tokens asks for.
    "paper": seer.GateConfig(prefill=seer.PrefillGateConfig(q_pooling=("max", "min", "avg"))),
}
"""Forms of gates by name, the default first."""


@dataclass(frozen=True)
class GateRun:
    """How gates are trained.

    Attributes:
        steps, length, batch_size: of the run, in tokens a sequence and sequences a step.
        rate: most learning rate.
        rows: share of the query blocks whose targets are computed.
        seed: of the gates and batches.
        device: where.
        templates: other needle sentences, [statement, question].
        form: one of :data:`FORMS`.
        target: what gates learn of a tile, as of ``DistillConfig``.

    Raises:
        ValueError: an unknown form or target.
    """

    steps: int
    length: int
    batch_size: int
    rate: float
    rows: float
    seed: int
    device: str
    templates: list | None = None
    form: str = next(iter(FORMS))
    target: str = "max"

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {self.form!r}")
        seer.DistillConfig(target=self.target)


def distil(model_folder: Path, books: list[Path], held_out: list[Path], out: Path, run: GateRun) -> dict[str, Any]:
    """Train fresh gates, save them in ``out`` with their history; returns a summary."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from seerattention.cli.common import Terminal
    from seerattention.distillation import distill

    torch.manual_seed(run.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    dtype = torch.bfloat16 if run.device.startswith("cuda") else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype)
    model.to(run.device).eval()
    bos = tokenizer.bos_token_id
    # Gates remember the model that they were trained for by name, and that of a folder would say nothing.
    model.config._name_or_path = seer.testbed.NAME
    shared: dict[str, Any] = {"seed": run.seed, "templates": run.templates}

    def batches(texts: list[Path], steps: int, split: str) -> TaskBatches:
        tokens = load_books(texts, run.length, bos)
        return TaskBatches(tokenizer, tokens, run.length, run.batch_size, steps, split=split, **shared)

    train, test = batches(books, run.steps, "train"), list(batches(held_out, 1, "test"))
    seer.attach(model, FORMS[run.form], prefill=seer.TopK(0.1))
    config = seer.DistillConfig(
        learning_rate=run.rate, steps=run.steps, rows=run.rows, seed=run.seed, skip_rows=0.0, target=run.target
    )
    with Terminal(False).progress("distilling", run.steps) as advance:
        history = distill(
            model, train, config, eval_batches=test, on_step=lambda report: advance(1 if report.step else 0)
        )
    out.mkdir(parents=True, exist_ok=True)
    seer.save_gates(model, out)
    summary = history.to_dict()
    (out / "history.json").write_text(json.dumps(summary))
    return summary
