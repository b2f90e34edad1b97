"""How much ``seer demo`` does, by device, model and the time that it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from ..policies import TopP
from .demo import DEMO_MINUTES

__all__ = ["STORED", "DemoPlan", "Rule"]

Rule: TypeAlias = float | TopP | Literal["default"]
STORED: Final = "default"
"""The policy that is stored with gates; of fresh ones, that of ``attach``."""


@dataclass(frozen=True)
class DemoPlan:
    """How much the demo does.

    Attributes:
        model: which of the testbed's models.
        length: tokens of the prompts that are timed and of the documents for perplexity.
        task_length: tokens of the retrieval samples.
        train_length, batch_size: tokens and sequences of a training step.
        max_steps: most steps of distillation; fewer where ``distill_share`` of ``seconds`` does not hold them.
        max_rounds: most rounds of evaluation (samples of each task and a document); fewer where the time is short.
        samples: of each task in a round.
        questions: questions a sample.
        repeats: timed prefills of each setting.
        seconds: what the whole demo may take.
        committed, fresh, untrained: what the committed gates (not used where the model has none), the fresh ones, and
            those before distillation are asked for: :data:`STORED`, a share of probability as :class:`TopP`, or a
            density, spent by the budgets of the gates or, where they have none, by top-k selection.
        headline: which of the committed (else the fresh) ones stands at the top of the report.
        tasks: retrieval tasks.
        learning_rate: for the fresh gates.
    """

    model: str = "testbed"
    length: int = 8192
    task_length: int = 8192
    train_length: int = 2048
    batch_size: int = 1
    max_steps: int = 60
    distill_share: float = 0.25
    max_rounds: int = 4
    samples: int = 1
    questions: int = 16
    repeats: int = 2
    seconds: float = 60.0 * DEMO_MINUTES
    committed: Sequence[Rule] = (STORED, 0.1)
    fresh: Sequence[Rule] = (STORED, 0.2)
    untrained: Sequence[Rule] = (0.2,)
    headline: int = 0
    tasks: Sequence[str] = ("multikey", "keyvalue")
    learning_rate: float = 4e-3

    @classmethod
    def choose(
        cls, device: str, fast: bool = False, seconds: float = 60.0 * DEMO_MINUTES, model: str = "testbed"
    ) -> DemoPlan:
        """What fits the device and the model; ``fast`` is a smoke test whose numbers mean little."""
        if model == "smollm2":
            return cls._of_smollm2(device, fast, seconds)
        if fast:
            tokens: dict[str, Any] = {"length": 1024, "task_length": 1024, "train_length": 512}
            work: dict[str, Any] = {"max_steps": 4, "max_rounds": 1, "questions": 2, "repeats": 1, "seconds": seconds}
            return cls(**tokens, **work, committed=(STORED, 0.2), fresh=(STORED, 0.2))
        if device.startswith("cuda"):
            return cls(
                length=16384,
                task_length=16384,
                train_length=8192,
                batch_size=4,
                max_steps=200,
                max_rounds=12,
                repeats=5,
                seconds=seconds,
                committed=(STORED, 0.5, 0.1, 0.05),
                fresh=(STORED, 0.2, 0.1),
            )
        return cls(seconds=seconds)

    @classmethod
    def _of_smollm2(cls, device: str, fast: bool, seconds: float) -> DemoPlan:
        """A token costs eight times as much as the testbed's. A share of each row's own blocks (top-k) drops the
        attention sink of early rows, which this model does not bear: it is there to compare fresh gates with untrained
        ones. Of many names, the model finds half in 2K tokens, and hardly any in more: questions are what counts, so a
        CPU has few steps and rules and more samples. Gates that saw shorter texts than they are used for are worth
        little here."""
        shared: dict[str, Any] = {
            "model": "smollm2",
            "seconds": seconds,
            "committed": (STORED,),
            "tasks": ("multikey",),
            "questions": 8,
        }
        if fast:
            small: dict[str, Any] = {**shared, "length": 512, "task_length": 512, "questions": 1}
            return cls(train_length=256, max_steps=2, max_rounds=1, repeats=1, **small)
        if device.startswith("cuda"):
            more: dict[str, Any] = {**shared, "committed": (STORED, TopP(0.9)), "distill_share": 0.4}
            return cls(task_length=2048, train_length=8192, batch_size=4, max_steps=200, max_rounds=12, **more)
        return cls(
            length=4096, task_length=2048, train_length=2048, max_rounds=6, samples=3, distill_share=0.1, **shared
        )
