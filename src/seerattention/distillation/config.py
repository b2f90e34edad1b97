"""Everything that decides what a distillation run computes, in one frozen, checked, JSON-able object."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

REDUCTIONS = ("row", "official")


@dataclass(frozen=True)
class DistillConfig:
    """How gates are distilled; the defaults follow the SeerAttention paper (arXiv 2410.13276, section 3.2 and 4.1).

    Attributes:
        learning_rate: peak learning rate of AdamW.
        steps: optimizer steps; None is one pass over the batches.
        warmup: steps of linear warm-up before the cosine to zero. At most half of the run is spent on it. The cosine
            needs the length of the run: with ``steps=None`` and batches without ``len()`` the rate stays at its peak.
        weight_decay: decoupled weight decay of AdamW.
        betas: AdamW's decay rates of its moments.
        clip_norm: largest gradient norm *of each layer* (layers have separate losses, so one layer's outlier must not
            slow the others); None: no clipping.
        rows: how many query-block rows enter the loss of a step, drawn anew each step: a share of the rows (a float in
            (0, 1]), a count (an int), or None for all of them. The cost of the target is proportional to it.
        skip_rows: share of the rows at the start that never enters the loss (the paper: a quarter; they see few blocks,
            so there is little to select). In a padded batch it is a share of the padded width.
        reduction: "row": the mean over rows and heads of the KL divergence of a row; "official": also divided by the
            number of key blocks, as the published code does (its mean counts masked entries).
        accumulation: batches a step.
        seed: decides which rows are drawn.
        eval_every: measure block recall every so many steps, besides before and after (None: only then). It takes
            ``eval_batches``; without them recall is not measured.
        eval_density: density of the ``TopK`` policy at which block recall is measured.
        min_improvement: a layer whose loss has fallen by less than this share at the end is reported as not learning.
    """

    learning_rate: float = 1e-3
    steps: int | None = None
    warmup: int = 20
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float | None = 1.0
    rows: float | int | None = None
    skip_rows: float = 0.25
    reduction: str = "row"
    accumulation: int = 1
    seed: int = 0
    eval_every: int | None = None
    eval_density: float = 0.1
    min_improvement: float = 0.02

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        _require(self.learning_rate > 0, "learning_rate", "positive", self.learning_rate)
        _require(self.steps is None or self.steps >= 1, "steps", "at least 1, or None for one pass", self.steps)
        _require(self.warmup >= 0, "warmup", "at least 0", self.warmup)
        _require(self.weight_decay >= 0, "weight_decay", "at least 0", self.weight_decay)
        _require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "betas", "two numbers in [0, 1)", self.betas
        )
        _require(self.clip_norm is None or self.clip_norm > 0, "clip_norm", "positive, or None", self.clip_norm)
        _require(_is_row_choice(self.rows), "rows", "a share in (0, 1], a count of at least 1, or None", self.rows)
        _require(0 <= self.skip_rows < 1, "skip_rows", "a share in [0, 1)", self.skip_rows)
        _require(self.reduction in REDUCTIONS, "reduction", f"one of {REDUCTIONS}", self.reduction)
        _require(self.accumulation >= 1, "accumulation", "at least 1", self.accumulation)
        _require(self.eval_every is None or self.eval_every >= 1, "eval_every", "at least 1, or None", self.eval_every)
        _require(0 < self.eval_density <= 1, "eval_density", "in (0, 1]", self.eval_density)
        _require(0 <= self.min_improvement < 1, "min_improvement", "in [0, 1)", self.min_improvement)

    def learning_rate_at(self, step: int, total: int | None) -> float:
        """Learning rate of optimizer step ``step`` (from 0) of ``total``: linear warm-up, then a cosine to zero."""
        warmup = self.warmup if total is None else min(self.warmup, total // 2)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        if total is None:
            return self.learning_rate
        progress = (step - warmup) / max(1, total - warmup)
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types only."""
        return {**dataclasses.asdict(self), "betas": list(self.betas)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DistillConfig:
        """Inverse of :meth:`to_dict`; an unknown key raises ValueError."""
        unknown = sorted(set(data) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"unknown distillation settings {unknown}")
        return cls(**data)


def _is_row_choice(rows: float | int | None) -> bool:
    if rows is None:
        return True
    if isinstance(rows, bool):
        return False
    return rows >= 1 if isinstance(rows, int) else 0 < rows <= 1


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {got!r}")
