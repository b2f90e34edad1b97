"""A comparison, unit by unit: a unit is a contender at a density and a length; dense is a unit of its own.

Each unit finds the knob of its contender on held-out prompts and then runs every measure; each result is a case of
:mod:`.cases`, written as it comes. Processes that share the folder take units from one another by locks, which the
operating system gives back when a process ends, however it ends; a unit whose cases are all written costs nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..files import held
from .calibration import CalibrationMeasure, CalibrationResult
from .cases import Case, run_case
from .contenders import Contender
from .journal import Journal
from .map_measure import MapMeasure
from .measure import Advance, Measure, Prompts, Subject
from .perplexity import PerplexityMeasure
from .settings import Setting
from .tables import format_length
from .text_tasks import TextMeasure
from .timing import TimingMeasure

__all__ = ["Plan", "Unit", "run_sweep", "units_of"]

DENSE = Setting.dense()
#: At most so many held-out documents, on which densities are reached where there are no tasks.
DOCUMENTS_ALONE = 4


@dataclass(frozen=True)
class Plan:
    """What a comparison measures.

    Attributes:
        contenders: what is compared with dense attention.
        lengths, densities: of prompts, and total ones to be reached.
        tasks, perplexity, timing: the measures; None: without. Densities are reached on what is measured: prompts of
            the tasks and a document, or without tasks documents alone, so that all methods have them on texts.
        maps: a length at which maps, and densities of layers and heads, are kept; None: without.
    """

    contenders: Sequence[Contender]
    lengths: Sequence[int]
    densities: Sequence[float]
    tasks: TextMeasure | None
    perplexity: PerplexityMeasure | None = None
    timing: TimingMeasure | None = None
    maps: int | None = None

    @property
    def measures(self) -> list[Measure]:
        """Those that run at every length, in order."""
        return [measure for measure in (self.tasks, self.perplexity, self.timing) if measure is not None]


@dataclass(frozen=True)
class Unit:
    """A contender at a density and a length; without one it is dense attention."""

    length: int
    contender: Contender | None = None
    density: float = 1.0

    @property
    def name(self) -> str:
        """What is measured, in words."""
        return DENSE.name if self.contender is None else f"{self.contender.family} {self.density:g}"


def units_of(plan: Plan) -> list[Unit]:
    """Every unit; the short lengths first, dense first at each, and the higher densities first."""
    found = []
    for length in sorted(plan.lengths):
        found.append(Unit(length))
        for density in sorted(plan.densities, reverse=True):
            found += [Unit(length, contender, density) for contender in plan.contenders if contender.reaches(density)]
    return found


class Sweep:
    """Runs units; see :func:`run_sweep`."""

    def __init__(self, subject: Subject, plan: Plan, journal: Journal, identity: Mapping[str, Any], run: str) -> None:
        self.subject, self.plan, self.journal, self.identity, self.run = subject, plan, journal, identity, run
        self._single = replace(subject, batch_size=1)
        self._prepared: dict[tuple[str, int], Prompts] = {}

    def prompts(self, measure: Measure, length: int) -> Prompts:
        """Of a measure at a length, made once; those of other lengths are forgotten."""
        key = measure.name, length
        if key not in self._prepared:
            keep = {k: v for k, v in self._prepared.items() if k[1] == length}
            self._prepared = {**keep, key: measure.prepare(self._of(measure), length)}
        return self._prepared[key]

    def _of(self, measure: Measure) -> Subject:
        """Times are those of one prompt."""
        return self._single if measure is self.plan.timing else self.subject

    def case(self, measure: Measure, length: int, settings: Sequence[Setting]) -> Case:
        """Of a measure."""
        return Case(measure, length, self.prompts(measure, length), settings)

    def __call__(self, unit: Unit, advance: Advance) -> None:
        """Measure what is not written yet."""
        contender, facts = unit.contender, {"run": self.run, "target": unit.density}
        setting = DENSE
        if contender is not None:
            selector = contender.stored(unit.density)
            told = contender.to_dict()
            if selector is None:
                found = self.calibrated(unit, contender)
                selector = found.made()
                told |= {
                    "calibrated_density": found.density,
                    "reached": found.reached,
                    "conceded": found.conceded,
                }
            facts["contender"] = {**told, "selector": selector.to_dict()}
            setting = contender.setting(selector, unit.density)
        for measure in self.plan.measures:
            # Times are of one moment: each is measured beside dense attention.
            together = [DENSE, setting] if measure is self.plan.timing and contender is not None else [setting]
            self.run_case(self.case(measure, unit.length, together), facts, advance)
        if contender is not None and self.plan.maps == unit.length and self.plan.tasks is not None:
            self.run_case(self.case(MapMeasure(self.plan.tasks), unit.length, [setting]), facts, advance)

    def run_case(self, case: Case, facts: Mapping[str, Any], advance: Advance | None) -> list[Any]:
        """The results of a case, from the journal or measured."""
        found, _ = run_case(
            self._of(case.measure), case, journal=self.journal, identity=self.identity, advance=advance, facts=facts
        )
        return found

    def calibrated(self, unit: Unit, contender: Contender) -> CalibrationResult:
        """What reaches the density of the unit on held-out prompts."""
        skip = self.plan.perplexity.documents if self.plan.perplexity is not None else 0
        documents = min(DOCUMENTS_ALONE if self.plan.tasks is None else 1, skip)
        measure = CalibrationMeasure(contender, unit.density, self.plan.tasks, documents=documents, skip=skip)
        key = measure.name, unit.length
        if key not in self._prepared:
            self.prompts(measure, unit.length)
        template = replace(contender.setting(contender.selector, unit.density), name=unit.name)
        facts = {"run": self.run, "target": unit.density, "contender": contender.to_dict()}
        return self.run_case(Case(measure, unit.length, self._prepared[key], [template]), facts, None)[0]

    def tokens(self, length: int) -> int:
        """How much there is to do in a unit, for progress bars."""
        return sum(self.prompts(measure, length).tokens for measure in self.plan.measures)


def run_sweep(
    sweep: Sweep,
    *,
    progress: Callable[[str, int], Any],
    say: Callable[[str], None] = lambda text: None,
    last: bool = True,
) -> None:
    """Run every unit of a plan, beside other processes that do the same in the same folder.

    What runs out of device memory is named at the end and left out; the others go on.

    Args:
        progress: ``progress(what, total)`` is a context manager that gives ``advance(tokens)``.
        say: for remarks.
        last: stay until the units that other processes have taken are done, and do those that they leave.

    Raises:
        ValueError: prompts that cannot be made, or a contender that cannot run on the model.
    """
    units = units_of(sweep.plan)
    for contender in sweep.plan.contenders:
        missing = [f"{density:g}" for density in sweep.plan.densities if not contender.reaches(density)]
        if missing:
            say(f"{contender.family}: no budgets for {', '.join(missing)} are stored; seer calibrate fits them")
    tokens = {length: sweep.tokens(length) for length in sorted(sweep.plan.lengths)}  # all prompts, before any work
    left, failed = [], []

    def run(unit: Unit, advance: Advance) -> None:
        try:
            sweep(unit, advance)
        except torch.OutOfMemoryError:
            failed.append(f"{unit.name} at {format_length(unit.length)}")
            torch.cuda.empty_cache()

    with progress(f"{len(units)} settings", sum(tokens[unit.length] for unit in units)) as advance:
        for unit in units:
            done = _Counted(advance, tokens[unit.length])
            with _taken(sweep, unit, wait=False) as mine:
                if mine:
                    run(unit, done)
                else:
                    left.append(unit)
            done.finish()
        if last and left:
            say(f"waiting for {len(left)} settings that other processes have taken")
            for unit in left:
                with _taken(sweep, unit, wait=True):
                    run(unit, lambda tokens: None)
    if failed:
        say(f"out of memory, and left out: {'; '.join(failed)}; a smaller --batch-size may do")


class _Counted:
    """Tokens of a unit, so that its share of a progress bar ends where it should."""

    def __init__(self, advance: Advance, total: int) -> None:
        self.advance, self.left = advance, total

    def __call__(self, amount: int) -> None:
        amount = min(amount, self.left)
        self.left -= amount
        if amount:
            self.advance(amount)

    def finish(self) -> None:
        self(self.left)


@contextmanager
def _taken(sweep: Sweep, unit: Unit, wait: bool) -> Iterator[bool]:
    """Hold the lock of a unit; gives whether it is held, or need not be."""
    told = json.dumps([sweep.run, unit.name, unit.length]).encode()
    folder = sweep.journal.folder / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder / hashlib.sha256(told).hexdigest()[:16], wait) as mine:
        yield mine is not False
