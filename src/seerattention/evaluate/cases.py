"""Runs measures case by case: a case is a setting, a measure, a length and a seed.

Each case is written as soon as it is measured, with a digest of all that decides its results: the model, the gates and
policy or the selector, the prompts to the last token, the options of the measure, and what the caller adds. A case
whose digest is on disk is not measured again, so a run that was stopped goes on where it was, and one with another
setting measures that setting only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..gates.sources import load_gates
from ..gates.tensors import digest as gates_digest
from ..policies import Budget, Policy, RelativeThreshold
from .forward import prompt_device
from .journal import Journal
from .measure import Advance, Measure, Prompts, Subject
from .settings import Setting
from .tables import format_length

__all__ = ["Case", "Group", "case_digest", "describe", "prompts_digest", "run_case", "run_measures"]

Progress = Callable[[str, int], AbstractContextManager[Advance]]


@dataclass(frozen=True)
class Group:
    """The results of one measure at one length, one a setting (that was measured before a run was stopped).

    Attributes:
        length: 0 where prompts have lengths of their own.
        kept: how many of them were on disk already.
    """

    measure: Measure
    length: int
    results: Sequence[Any]
    kept: int = 0

    @property
    def heading(self) -> str:
        """What was measured, for reports."""
        return _at(self.measure.title, self.length)


def run_measures(
    subject: Subject,
    measures: Sequence[Measure],
    settings: Sequence[Setting],
    lengths: Sequence[int],
    *,
    journal: Journal | None = None,
    identity: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    show: Callable[[Group], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> list[Group]:
    """Run every measure at each of its lengths. All prompts are made before anything is measured.

    Args:
        subject: model, tokenizer and texts.
        measures: what to measure.
        settings: what to compare; the first is what the others are held against.
        lengths: tokens of the prompts.
        journal: where to write each case and to look for those that are done.
        identity: what decides results and only the caller knows: a digest of the model's weights, its dtype, versions.
            Needed with a journal.
        progress: ``progress(what, total)`` is a context manager that gives ``advance(tokens)``.
        show: called with each group when it is complete, or at the end.
        stop: asked before each case that has to be measured: True ends the run with what there is. Cases then go
            setting by setting, all measures of each, so that what there is can be compared.

    Raises:
        ValueError: a journal without an identity, or prompts that cannot be made.
    """
    if journal is not None and not identity:
        raise ValueError("a journal needs an identity, or results of another model could be taken for this one's")
    plans = []
    for measure in measures:
        if chosen := measure.settings(settings):
            cases = [list(chosen)] if measure.together else [[setting] for setting in chosen]
            plans += [_Plan(measure, n, cases, measure.prepare(subject, n)) for n in measure.lengths(sorted(lengths))]
    # By place in memory: those of the caller live as long as this call.
    described = {} if journal is None else {id(each): describe(each, subject.model) for each in settings}
    order = [(plan, case) for plan in plans for case in plan.cases]
    if stop is not None:
        places = {id(setting): place for place, setting in enumerate(settings)}
        order.sort(key=lambda each: places.get(id(each[1][0]), 0))
    stopped = False

    def halt() -> bool:
        nonlocal stopped
        stopped = stopped or (stop is not None and stop())
        return stopped

    for plan, run in itertools.groupby(order, lambda each: each[0]):
        cases = [case for _, case in run]
        measure, prompts = plan.measure, plan.prompts
        what, total = _at(measure.name, plan.length), sum(map(len, cases)) * prompts.tokens
        with (progress or _silent)(what, total) as advance:
            for settings_of in cases:
                told = [described[id(s)] if id(s) in described else describe(s, subject.model) for s in settings_of]
                case = Case(measure, plan.length, prompts, settings_of, told if journal is not None else None)
                measured, found = run_case(
                    subject, case, journal=journal, identity=identity or {}, advance=advance, stop=halt
                )
                if measured:
                    plan.results, plan.done = [*plan.results, *measured], plan.done + 1
                    plan.kept += len(measured) if found else 0
        if show is not None and plan.done == len(plan.cases):
            show(plan.group())
    for plan in plans:
        if show is not None and 0 < plan.done < len(plan.cases):
            show(plan.group())
    return [plan.group() for plan in plans if plan.done]


@dataclass
class _Plan:
    """The cases of one measure at one length, and what was found in those that were run."""

    measure: Measure
    length: int
    cases: list[list[Setting]]
    prompts: Prompts
    results: list[Any] = dataclasses.field(default_factory=list)
    kept: int = 0
    done: int = 0

    def group(self) -> Group:
        return Group(self.measure, self.length, list(self.results), self.kept)


@dataclass(frozen=True)
class Case:
    """What is measured at a time, and written.

    Attributes:
        measure, length, prompts: see :class:`~seerattention.evaluate.measure.Measure`.
        settings: those that run together.
        told: what :func:`describe` says of each; None: ask it.
    """

    measure: Measure
    length: int
    prompts: Prompts
    settings: Sequence[Setting]
    told: Sequence[Mapping[str, Any] | None] | None = None


def run_case(
    subject: Subject,
    case: Case,
    *,
    journal: Journal | None = None,
    identity: Mapping[str, Any] | None = None,
    advance: Advance | None = None,
    facts: Mapping[str, Any] | None = None,
    stop: Callable[[], bool] | None = None,
) -> tuple[list[Any], bool]:
    """The results of a case, one a setting, and whether they were in the journal.

    What it took is written beside them: seconds, and the most device memory that was allocated meanwhile.

    Args:
        facts: plain values, to be written too, for readers.
        stop: is asked before anything is measured; where it says so, nothing is, and there are no results.
    """
    measure, digest = case.measure, None
    if journal is not None:
        told = case.told if case.told is not None else [describe(s, subject.model) for s in case.settings]
        digest = case_digest(subject, measure, case.length, case.prompts, told, identity or {})
        found = journal.find(digest)
        if found is not None:
            if advance is not None:
                advance(len(case.settings) * case.prompts.tokens)
            return [measure.restore(*each) for each in found], True
    if stop is not None and stop():
        return [], False
    device = prompt_device(subject.model)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    measured = list(measure.run(subject, case.prompts, case.settings, advance))
    if journal is not None:
        cost = {"seconds": time.perf_counter() - start, "peak_bytes": None}
        if device.type == "cuda":
            cost["peak_bytes"] = torch.cuda.max_memory_allocated(device)
        what: dict[str, Any] = {"measure": measure.name, "length": case.length, "seed": subject.seed}
        what["settings"] = [setting.name for setting in case.settings]
        what["prompts"] = prompts_digest(case.prompts)
        journal.add({**what, **cost, **(facts or {})}, digest, measured)
    return measured, False


def _at(name: str, length: int) -> str:
    return f"{name} at {format_length(length)}" if length else name


def case_digest(
    subject: Subject,
    measure: Measure,
    length: int,
    prompts: Prompts,
    settings: Sequence[Mapping[str, Any] | None],
    identity: Mapping[str, Any],
) -> str | None:
    """Digest of all that decides a case; None where something in it does not say what it is.

    Args:
        settings: what :func:`describe` says of each.
        identity: see :func:`run_measures`.
    """
    if None in settings:
        return None
    try:
        content = {
            "identity": _plain(identity),
            "measure": measure.name,
            "options": _plain(dataclasses.asdict(measure)),  # type: ignore[call-overload]
            "length": length,
            "seed": subject.seed,
            "batch size": subject.batch_size,
            "prompts": {name: _array_digest(array) for name, array in prompts.decides.items()},
            "settings": list(settings),
        }
    except _Unknown:
        return None
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def prompts_digest(prompts: Prompts) -> str:
    """What tells prompts from others, for readers."""
    told = {name: _array_digest(array) for name, array in prompts.decides.items()}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def describe(setting: Setting, model: nn.Module) -> dict[str, Any] | None:
    """What decides what a setting does to a model, as JSON has it: of gates a digest, not their folder.

    None where that cannot be told: gates that are attached to the model already, a selector that is a plain function.
    """
    if setting.sparse and setting.gates is None and setting.selector is None:
        return None
    try:
        return {
            "name": setting.name,
            "sparse": setting.sparse,
            "min_context": setting.min_context,
            "gates": None if setting.gates is None else _gates(setting.gates, model),
            "policy": _plain(setting.policy),
            "selector": _plain(setting.selector),
        }
    except _Unknown:
        return None


class _Unknown(Exception):
    """Something does not say what it is."""


def _gates(source: str | os.PathLike[str], model: nn.Module) -> str:
    config: Any = model.config
    checkpoint = load_gates(source, config.get_text_config())
    return gates_digest(checkpoint.gate_config.to_dict(), checkpoint.weights)


def _plain(value: Any) -> Any:
    """A value as JSON has it; of others what they say of themselves, if that is the same in every process."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    policy: Any = value if isinstance(value, Policy) else getattr(value, "policy", None)
    if isinstance(policy, Budget) or (isinstance(policy, RelativeThreshold) and policy.layers):
        return _plain(value.to_dict())  # their numbers are too many for what they say of themselves
    said = repr(value)
    if re.search(r"\bat 0x[0-9a-fA-F]+", said):  # where it lies in memory, not what it is
        raise _Unknown
    return f"{type(value).__module__}.{said}"


def _array_digest(array: np.ndarray) -> str:
    digest = hashlib.sha256(f"{array.dtype}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


@contextmanager
def _silent(what: str, total: int) -> Iterator[Advance]:
    yield lambda tokens: None
