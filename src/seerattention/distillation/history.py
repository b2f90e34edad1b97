"""What a distillation run measured, step by step and layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class DistillHistory:
    """Losses and block recall of a run, and other numbers of what its gates keep.

    Attributes:
        loss: one float per step, the mean over the layers of the losses that the step's gradient came from; the first
            was measured before any update.
        loss_per_layer: the same for each layer, by its name.
        recall: block recall of each layer, by its name, at ``recall_steps``; empty without ``eval_batches``.
        recall_steps: number of updates done when recall was measured; the first is 0 (the gates as they came).
        recall_density: density at which recall was measured.
        numbers: each of :data:`seerattention.measure.RECALLS` over all layers, at ``recall_steps``; None where there
            was nothing of the kind, or where an earlier version did not count it.
        learning_rate: of each step.
        tokens: prompt tokens read so far, all processes together.
        seconds: time spent in training steps and evaluation, all parts of an interrupted run together.
        no_gradient: layer name -> number of steps that taught it nothing, because its gradient was exactly zero (rows
            that see a single block, padding only, gates that are all zero).
        not_learning: layer name -> why it is thought not to have learned; filled at the end of the run.
    """

    loss: list[float] = field(default_factory=list)
    loss_per_layer: dict[str, list[float]] = field(default_factory=dict)
    recall: dict[str, list[float]] = field(default_factory=dict)
    recall_steps: list[int] = field(default_factory=list)
    recall_density: float | None = None
    numbers: dict[str, list[float | None]] = field(default_factory=dict)
    learning_rate: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    no_gradient: dict[str, int] = field(default_factory=dict)
    not_learning: dict[str, str] = field(default_factory=dict)

    def add_step(
        self, losses: Mapping[str, float], learning_rate: float, tokens: int, no_gradient: Sequence[str] = ()
    ) -> None:
        for layer in no_gradient:
            self.no_gradient[layer] = self.no_gradient.get(layer, 0) + 1
        for layer, value in losses.items():
            self.loss_per_layer.setdefault(layer, []).append(value)
        self.loss.append(sum(losses.values()) / len(losses))
        self.learning_rate.append(learning_rate)
        self.tokens += tokens

    def add_recall(
        self, step: int, recall: Mapping[str, float], numbers: Mapping[str, float | None] | None = None
    ) -> None:
        for layer, value in recall.items():
            self.recall.setdefault(layer, []).append(value)
        for name, number in (numbers or {}).items():
            self.numbers.setdefault(name, [None] * len(self.recall_steps)).append(number)
        self.recall_steps.append(step)

    def mean_recall(self) -> float | None:
        """The latest block recall, averaged over the layers; None where it was never measured."""
        if not self.recall:
            return None
        return sum(values[-1] for values in self.recall.values()) / len(self.recall)

    def latest_numbers(self) -> dict[str, float | None]:
        """The latest of :attr:`numbers`; empty where they were never measured."""
        return {name: values[-1] for name, values in self.numbers.items()}

    def find_not_learning(self, min_improvement: float, warmup: int) -> dict[str, str]:
        """Fill :attr:`not_learning`: layers without any gradient, whose loss hardly fell, or whose block recall is not
        above where it began. A layer whose loss fell by half may keep its recall, within a hundredth: fresh gates can
        choose nearly the best blocks of a layer that looks at its neighbours.

        Rows and texts differ from step to step, so the end of the run is averaged over up to a tenth of it; a loss of
        exactly zero is that of rows with a single block to choose from, and says nothing. Runs too short to tell (fewer
        than 10 steps after the warm-up) report layers without any gradient only.
        """
        self.not_learning = {}
        for layer, losses in self.loss_per_layer.items():
            if self.no_gradient.get(layer, 0) == len(losses):
                self.not_learning[layer] = "its gradient was zero in every step"
                continue
            telling = [loss for loss in losses if loss != 0]
            if not telling or len(self.loss) - warmup < 10:
                continue
            reasons = []
            window = max(1, len(telling) // 10)
            first, last = _mean(telling[: min(window, 3)]), _mean(telling[-window:])
            if last > (1 - min_improvement) * first:
                reasons.append(f"loss {first:.4g} -> {last:.4g}")
            recall = self.recall.get(layer, [])
            allowed = 0.01 if last < 0.5 * first else 0.0
            if len(recall) > 1 and recall[-1] <= recall[0] - allowed:
                reasons.append(f"block recall {recall[0]:.3f} -> {recall[-1]:.3f}")
            if reasons:
                self.not_learning[layer] = ", ".join(reasons)
        return self.not_learning

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DistillHistory:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: unknown entries. TypeError: entries of another type than they are written with.
        """
        types = {name: type(value) for name, value in vars(cls(recall_density=0.0)).items()}
        if unknown := sorted(data.keys() - types):
            raise ValueError(f"unknown entries {unknown}")
        for name, value in data.items():
            if not isinstance(value, (types[name], type(None)) if name == "recall_density" else types[name]):
                raise TypeError(f"{name} must be of type {types[name].__name__}, got {type(value).__name__}")
        return cls(**data)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
