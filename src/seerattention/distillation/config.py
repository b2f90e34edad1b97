"""Everything that decides what a distillation run computes, in one frozen, checked, JSON-able object."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..config import PHASES

REDUCTIONS = ("row", "official")
TARGETS = ("max", "row_mass")


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
        last_rows: how many of the last rows are in the loss of every step (at most as many as ``rows`` allows), for
            texts that end with what matters: a question about what lies before it.
        reduction: "row": the mean over rows and heads of the KL divergence of a row; "official": also divided by the
            number of key blocks, as the published code does (its mean counts masked entries).
        target: what gates learn of a tile, of which each row is divided by its sum. "max": its largest single
            probability, the target of the papers. "row_mass": the largest attention mass that one query of the block
            (for decoding, one head of the group) gives to the keys of the tile. It is not in the papers: attention that
            one query spreads over a block counts in full, while a block that one query needs stands out as it does by
            its maximum, and does not where the mass is a mean over queries.
        accumulation: batches a step.
        seed: decides which rows are drawn.
        phase: "prefill" trains the gates of prompts, "decode" those of decoding: their rows are query tokens, of which
            those of the first block are left out.
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
    phase: str = "prefill"
    last_rows: int = 0
    target: str = "max"

    def __post_init__(self) -> None:
        if isinstance(self.betas, list | tuple):
            object.__setattr__(self, "betas", tuple(self.betas))
        for name, accepts, expected in _RULES:
            value = getattr(self, name)
            if not accepts(value):
                raise ValueError(f"{name} must be {expected}, got {value!r}")

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
        """Plain JSON types only; what is newer than the first states only where it is not as it was then."""
        found = {**dataclasses.asdict(self), "betas": list(self.betas)}
        return {key: value for key, value in found.items() if (key, value) not in _AS_BEFORE}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DistillConfig:
        """Inverse of :meth:`to_dict`; an unknown key raises ValueError."""
        unknown = sorted(set(data) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"unknown distillation settings {unknown}")
        return cls(**data)


_AS_BEFORE = (("phase", "prefill"), ("last_rows", 0), ("target", "max"))


def _integer(x: Any, least: int) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and least <= x < 1 << 63


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) <= sys.float_info.max


# Name of a field, which values it takes, and what a message calls them.
_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("learning_rate", lambda x: _number(x) and x > 0, "a positive number"),
    ("steps", lambda x: x is None or _integer(x, 1), "an integer of at least 1, or None for one pass"),
    ("warmup", lambda x: _integer(x, 0), "an integer of at least 0"),
    ("weight_decay", lambda x: _number(x) and x >= 0, "a number of at least 0"),
    (
        "betas",
        lambda x: isinstance(x, tuple) and len(x) == 2 and all(_number(b) and 0 <= b < 1 for b in x),
        "two numbers in [0, 1)",
    ),
    ("clip_norm", lambda x: x is None or (_number(x) and x > 0), "a positive number, or None"),
    (
        "rows",
        lambda x: x is None or _integer(x, 1) or (isinstance(x, float) and 0 < x <= 1),
        "a share in (0, 1], a count of at least 1, or None",
    ),
    ("skip_rows", lambda x: _number(x) and 0 <= x < 1, "a share in [0, 1)"),
    ("reduction", lambda x: isinstance(x, str) and x in REDUCTIONS, f"one of {REDUCTIONS}"),
    ("accumulation", lambda x: _integer(x, 1), "an integer of at least 1"),
    ("seed", lambda x: _integer(x, -(1 << 63)), "an integer of 64 bits"),
    ("eval_every", lambda x: x is None or _integer(x, 1), "an integer of at least 1, or None"),
    ("eval_density", lambda x: _number(x) and 0 < x <= 1, "in (0, 1]"),
    ("min_improvement", lambda x: _number(x) and 0 <= x < 1, "in [0, 1)"),
    ("last_rows", lambda x: _integer(x, 0), "an integer of at least 0"),
    ("phase", lambda x: x in PHASES, f"one of {PHASES}"),
    ("target", lambda x: isinstance(x, str) and x in TARGETS, f"one of {TARGETS}"),
)
