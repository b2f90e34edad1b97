"""Finding the value of a knob with which a selector keeps a given share of the blocks, on prompts held out for that."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch

from ..baselines import selector_from_dict
from ..hf.prompts import evaluating
from ..selectors import Selector
from .contenders import Contender, Knob
from .forward import prompt_device, prompt_options
from .measure import Advance, Measure, Prompts, Subject
from .perplexity import cut_documents
from .settings import Setting
from .tables import Table, format_density
from .text_tasks import TextMeasure

__all__ = ["CalibrationMeasure", "CalibrationResult", "search"]

#: Measured density over the one asked for may differ by this share.
TOLERANCE = 0.05
_ROUNDS = 16


@dataclass(frozen=True)
class CalibrationResult:
    """The selector that was found.

    Attributes:
        setting: of which contender and density.
        density: measured on the held-out prompts.
        selector: with the value found, as ``Selector.to_dict`` says it.
        reached: whether the density is as asked for, within :data:`TOLERANCE`; if not, it is the nearest one.
        conceded: how many of the contender's concessions it took.
        runs: how many times the prompts were run.
    """

    setting: str
    density: float
    selector: Mapping[str, Any]
    reached: bool
    conceded: int = 0
    runs: int = 0

    def made(self) -> Selector:
        """The selector."""
        return selector_from_dict(self.selector)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {**vars(self), "selector": dict(self.selector)}

    def arrays(self) -> dict[str, np.ndarray]:
        """None: the numbers are all."""
        return {}


def search(knob: Knob, wanted: float, measure: Callable[[float | int], float]) -> tuple[float | int, float, int]:
    """Value of a knob whose density is nearest to the one wanted, that density, and how often it was measured.

    Bisection, with steps by interpolation in the logarithm of the density as long as these shrink the bracket well.
    Density need not grow strictly. It ends within half of :data:`TOLERANCE`, or where nothing lies between any more.
    """
    seen: dict[float | int, float] = {}

    def density(place: float) -> float:
        value = knob.value(place)
        if value not in seen:
            seen[value] = measure(value)
        return seen[value]

    low, high = 0.0, 1.0
    at_low, at_high = density(low), 1.0
    for step in range(_ROUNDS):
        if at_low >= wanted or abs(at_low / wanted - 1) <= TOLERANCE / 2:
            break
        share = (math.log(wanted) - math.log(max(at_low, 1e-9))) / (math.log(at_high) - math.log(max(at_low, 1e-9)))
        share = 0.5 if step % 3 == 2 else min(max(share, 0.04), 0.96)  # the bracket halves at least every third step
        place = low + share * (high - low)
        if knob.value(place) in (knob.value(low), knob.value(high)) and knob.whole:
            place = (low + high) / 2
            if knob.value(place) in (knob.value(low), knob.value(high)):
                break
        found = density(place)
        if abs(found / wanted - 1) <= TOLERANCE / 2:
            break
        if found < wanted:
            low, at_low = place, found
        else:
            high, at_high = place, max(found, wanted * (1 + 1e-9))
    if knob.whole and len(seen) > 1:  # the neighbour above may be nearer, and has not been measured if it is the bound
        density(high)
    value = min(seen, key=lambda value: abs(math.log(max(seen[value], 1e-9) / wanted)))
    return value, seen[value], len(seen)


@dataclass(frozen=True)
class CalibrationMeasure(Measure):
    """Finds the knob of one contender, as a measure: what was found is kept like any other result.

    Attributes:
        contender: whose knob.
        wanted: density.
        tasks, documents: of what the prompts are: one of each task (None: of none), and so many documents behind those
            of the perplexity (``skip``).
    """

    name: ClassVar[str] = "calibration"
    title: ClassVar[str] = "Calibration"

    contender: Contender
    wanted: float
    tasks: TextMeasure | None
    documents: int = 1
    skip: int = 0

    def prepare(self, subject: Subject, length: int) -> Prompts:
        """Prompts that are not measured otherwise: of another seed, and of documents that follow."""
        prompts: list[np.ndarray] = []
        if self.tasks is not None:
            other = dataclasses.replace(subject, seed=subject.seed + 500_009)
            one = dataclasses.replace(self.tasks, samples=1).prepare(other, length)
            prompts += [sample.prompt for samples in one.content.values() for sample in samples]
        bos = subject.tokenizer.bos_token_id
        if self.documents:
            cut = cut_documents(subject.books, length, self.skip + self.documents, bos=bos)
            prompts += list(cut[self.skip :].numpy())
        decides = {f"prompt {i}": prompt for i, prompt in enumerate(prompts)}
        return Prompts(prompts, decides, 0)

    def run(
        self, subject: Subject, prompts: Prompts, settings: Sequence[Setting], advance: Advance | None = None
    ) -> list[CalibrationResult]:
        """One result for the one setting."""
        runs, best = 0, None
        for conceded, contender in enumerate(self.contender.conceding()):
            value, density, count = search(
                contender.knob, self.wanted, partial(_density, subject, contender, prompts.content)
            )
            runs += count
            reached = abs(density / self.wanted - 1) <= TOLERANCE
            made = contender.at(value).to_dict()
            found = CalibrationResult(settings[0].name, density, made, reached, conceded, runs)
            nearer = best is None or abs(math.log(density / self.wanted)) < abs(math.log(best.density / self.wanted))
            best = found if nearer else best
            if reached or density < self.wanted:
                break
        assert best is not None
        return [best]

    def restore(self, numbers: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> CalibrationResult:
        """A result that was kept."""
        return CalibrationResult(**numbers)

    def table(self, results: Sequence[CalibrationResult]) -> Table:
        """What was found."""
        rows = [[r.setting, format_density(r.density), str(dict(r.selector))] for r in results]
        return Table(["setting", "density", "selector"], rows)


@torch.inference_mode()
def _density(subject: Subject, contender: Contender, prompts: Sequence[np.ndarray], value: float | int) -> float:
    """Total density over the prompts."""
    model, options = subject.model, prompt_options(subject.model)
    setting = contender.setting(contender.at(value), 0.0)
    with setting.applied(model) as measurement, evaluating(model):
        for prompt in prompts:
            ids = torch.as_tensor(prompt, dtype=torch.int64, device=prompt_device(model))[None]
            model(input_ids=ids, **options)
    return measurement.prompt_density
