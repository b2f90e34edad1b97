"""A comparison as it is on disk: every setting with its scores, densities, times and intervals.

What ``seer compare`` wrote is read by :meth:`Comparison.read`; :meth:`Comparison.to_dict` holds as plain numbers all
that tables and curves are made of, each question's score and each document's loss included, and
:meth:`Comparison.from_dict` takes it back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .journal import Journal
from .map_measure import MapMeasure, MapResult
from .perplexity import PerplexityMeasure, PerplexityResult
from .statistics import Interval, paired_bootstrap
from .tables import finite
from .text_tasks import TextMeasure, TextResult, solved_tasks
from .timing import TimingMeasure, TimingResult

__all__ = ["RUN", "Comparison", "DocumentLosses", "Entry", "RunResult"]

#: Name of the line that says what a run was: model, machine, versions, command.
RUN = "run"
_MEASURES: Mapping[str, Any] = {
    measure.name: measure
    for measure in (TextMeasure(), PerplexityMeasure(), TimingMeasure(), MapMeasure(TextMeasure()))
}


@dataclass
class RunResult:
    """Where results come from, as a line of the journal."""

    facts: Mapping[str, Any]
    setting: str = RUN
    density: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """The facts."""
        return dict(self.facts)

    def arrays(self) -> dict[str, np.ndarray]:
        """None."""
        return {}


@dataclass(frozen=True)
class DocumentLosses:
    """What a comparison keeps of a :class:`~seerattention.evaluate.perplexity.PerplexityResult`.

    Attributes:
        losses: float64 ``[documents]``, mean nats a token.
        told: what the result says of itself as plain numbers.
    """

    losses: np.ndarray
    told: Mapping[str, Any]

    @classmethod
    def of(cls, result: PerplexityResult) -> DocumentLosses:
        """Without the losses of single tokens."""
        return cls(result.losses.mean(-1, dtype=np.float64), result.to_dict())

    @property
    def density(self) -> float:
        """Over all documents."""
        return float(self.told["density"])

    @property
    def perplexity(self) -> float:
        """Over all positions of all documents."""
        return math.exp(float(self.losses.mean()))


@dataclass
class Entry:
    """One setting at one length.

    Attributes:
        name, length: which.
        target: the density that was asked for; 1 of dense.
        contender: what :class:`~seerattention.evaluate.contenders.Contender` says, and its calibration; empty of dense.
        tasks, perplexity, maps: what was found; None: not measured.
        timing: dense attention and this, taking turns; None: not measured.
        seconds: what all measures of it took, together.
        peak_bytes: most device memory of any.
    """

    name: str
    length: int
    target: float
    contender: Mapping[str, Any] = field(default_factory=dict)
    tasks: TextResult | None = None
    perplexity: DocumentLosses | None = None
    maps: MapResult | None = None
    timing: tuple[TimingResult, TimingResult] | None = None
    seconds: float = 0.0
    peak_bytes: int | None = None

    @property
    def is_dense(self) -> bool:
        """Whether it is what the others are held against."""
        return not self.contender

    @property
    def family(self) -> str:
        """Method, rule and protocol."""
        return str(self.contender.get("family", self.name))

    @property
    def prefill(self) -> float | None:
        """Median seconds of a prefill."""
        return None if self.timing is None else self.timing[1].median

    @property
    def speed(self) -> float | None:
        """How many times as fast as dense attention beside it."""
        return None if self.timing is None else self.timing[0].median / self.timing[1].median


@dataclass
class Comparison:
    """All settings of one model, on the same prompts.

    Attributes:
        facts: of the last run: model, machine, versions, command; ``commands`` are those of all
            that said theirs.
        entries: by length and name, dense first at each length.
        left_out: results of other prompts, models or versions in the same folders.
    """

    facts: Mapping[str, Any]
    entries: dict[tuple[int, str], Entry]
    left_out: int = 0

    @classmethod
    def read(cls, *folders: Path) -> Comparison:
        """From folders of ``seer compare``, which share the work on one model; of several runs in one the last one.

        Raises:
            FileNotFoundError: no results in one.
            ValueError: results, but none of a comparison; or folders of different models.
        """
        parts = [_Part.of(folder) for folder in folders]
        found = cls(_joined([part.facts for part in parts], [str(folder) for folder in folders]), {})
        # Dense decides which prompts count: the ones that it was measured on last.
        dense = {
            (line["case"]["measure"], line["case"]["length"]): line["case"]["prompts"]
            for part in parts
            for line in part.lines
            if "contender" not in line["case"]
        }
        for part in parts:
            for line in part.lines:
                found._add(line, part.journal, dense)
            found.left_out += part.left_out
        found._sort()
        return found

    def joined(self, other: Comparison) -> Comparison:
        """Settings of both; of one that both have, the other's.

        Raises:
            ValueError: they are not of one model, or dense attention found something else on their prompts.
        """
        facts = _joined([self.facts, other.facts], ["these results"])
        for length in self.lengths:
            mine, its = self.dense(length), other.dense(length)
            if mine is not None and its is not None and not _alike(mine, its):
                raise ValueError(
                    f"these results are not of the same prompts of {length} tokens: dense attention differs between "
                    "them; report them apart"
                )
        found = Comparison(facts, {**self.entries, **other.entries}, self.left_out + other.left_out)
        found._sort()
        return found

    def _sort(self) -> None:
        order = sorted(self.entries.values(), key=lambda e: (e.length, not e.is_dense, e.family, e.target))
        self.entries = {(entry.length, entry.name): entry for entry in order}

    def _add(self, line: Mapping[str, Any], journal: Journal, dense: Mapping[tuple[str, int], str]) -> None:
        case = line["case"]
        kind, length = case["measure"], case["length"]
        if kind not in _MEASURES:
            return
        if (kind, length) in dense and dense[kind, length] != case["prompts"]:
            self.left_out += 1
            return
        kept = journal.read(line)
        if kept is None:
            return
        measure = _MEASURES[kind]
        results = [measure.restore(*each) for each in kept]
        contender = case.get("contender", {})
        name = case["settings"][-1]
        entry = self.entries.setdefault((length, name), Entry(name, length, case["target"], contender))
        if kind == "timing":
            entry.timing = results[0], results[-1]
        else:
            setattr(entry, kind, DocumentLosses.of(results[-1]) if kind == "perplexity" else results[-1])
        entry.seconds += case["seconds"]
        if case["peak_bytes"] is not None:
            entry.peak_bytes = max(entry.peak_bytes or 0, case["peak_bytes"])

    @property
    def lengths(self) -> list[int]:
        """Of the prompts, ascending."""
        return sorted({length for length, _ in self.entries})

    def at(self, length: int) -> list[Entry]:
        """Settings at a length, dense first."""
        return [entry for entry in self.entries.values() if entry.length == length]

    def dense(self, length: int) -> Entry | None:
        """What the others are held against."""
        return next((entry for entry in self.at(length) if entry.is_dense), None)

    def solved(self, length: int) -> list[str]:
        """Tasks that count in means."""
        dense = self.dense(length)
        return [] if dense is None or dense.tasks is None else solved_tasks(dense.tasks)

    def score(self, entry: Entry) -> float:
        """Mean over the tasks that dense attention solves; NaN without one."""
        return math.nan if entry.tasks is None else entry.tasks.score(self.solved(entry.length))

    def score_change(self, entry: Entry) -> Interval | None:
        """Of the mean score, from dense attention on the same questions."""
        dense, solved = self.dense(entry.length), self.solved(entry.length)
        if dense is None or dense.tasks is None or entry.tasks is None or not solved:
            return None
        return paired_bootstrap([entry.tasks.scores[t] for t in solved], [dense.tasks.scores[t] for t in solved])

    def loss_change(self, entry: Entry) -> Interval | None:
        """Of the mean loss in nats a token, from dense attention on the same documents."""
        dense = self.dense(entry.length)
        if dense is None or dense.perplexity is None or entry.perplexity is None:
            return None
        return paired_bootstrap([entry.perplexity.losses], [dense.perplexity.losses])

    def winners(self, length: int) -> dict[float, Entry]:
        """By density: the best mean score of what is no oracle, under every row sparse."""
        best: dict[float, Entry] = {}
        for entry in self.at(length):
            method = str(entry.contender.get("label", ""))
            counts = not entry.is_dense and not method.startswith("oracle")
            if not counts or entry.contender["protocol"] != "every_row_sparse" or math.isnan(self.score(entry)):
                continue
            if entry.target not in best or self.score(entry) > self.score(best[entry.target]):
                best[entry.target] = entry
        return best

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON: the facts of the run, each setting with scores and intervals; without maps."""
        return {**self.facts, "left_out": self.left_out, "settings": [self._numbers(e) for e in self.entries.values()]}

    @classmethod
    def from_dict(cls, numbers: Mapping[str, Any]) -> Comparison:
        """What :meth:`to_dict` gave, without maps."""
        facts = {name: value for name, value in numbers.items() if name not in ("left_out", "settings")}
        found = [_entry(each) for each in numbers["settings"]]
        made = cls(facts, {(entry.length, entry.name): entry for entry in found}, numbers["left_out"])
        made._sort()
        return made

    def _numbers(self, entry: Entry) -> dict[str, Any]:
        score, loss = self.score_change(entry), self.loss_change(entry)
        tasks, perplexity = entry.tasks, entry.perplexity
        questions = {} if tasks is None else {"scores": _lists(tasks.scores), "losses": _lists(tasks.losses)}
        documents = {} if perplexity is None else {"document_losses": perplexity.losses.tolist()}
        return {
            "setting": entry.name,
            "length": entry.length,
            "target": entry.target,
            "contender": dict(entry.contender),
            "score": finite(self.score(entry)),
            "score_change": None if score is None else score._asdict(),
            "loss_change": None if loss is None else loss._asdict(),
            "tasks": None if tasks is None else {**tasks.to_dict(), **questions},
            "perplexity": None if perplexity is None else {**perplexity.told, **documents},
            "timing": None if entry.timing is None else [each.to_dict() for each in entry.timing],
            "prefill_seconds": entry.prefill,
            "speed": entry.speed,
            "seconds": entry.seconds,
            "peak_bytes": entry.peak_bytes,
        }


@dataclass
class _Part:
    """The last run in a folder: its facts, its lines, and how many of others there are."""

    journal: Journal
    facts: Mapping[str, Any]
    lines: list[dict[str, Any]]
    left_out: int

    @classmethod
    def of(cls, folder: Path) -> _Part:
        if not any(folder.glob("results*.jsonl")):
            raise FileNotFoundError(f"{folder} holds no results (results.jsonl); seer compare writes them")
        journal = Journal(folder)
        lines = journal.lines()
        runs = [line for line in lines if line["case"].get("measure") == RUN]
        if not runs:
            raise ValueError(f"the results in {folder} are not those of seer compare")
        last = max(runs, key=lambda line: line["case"].get("time", 0.0))
        mine = [line for line in runs if line["case"]["run"] == last["case"]["run"]]
        told = [line for line in lines if line["case"].get("measure") != RUN]
        lines = [line for line in told if line["case"].get("run") == last["case"]["run"]]
        facts = dict(last["results"][0])
        commands = _unlike([line["results"][0]["command"] for line in mine if "command" in line["results"][0]])
        facts |= {"commands": commands} if commands else {}
        return cls(journal, facts, lines, len(told) - len(lines))


def _alike(mine: Entry, its: Entry) -> bool:
    """Whether dense attention was measured on the same prompts, as far as both were measured."""
    if mine.perplexity is not None and its.perplexity is not None:
        a, b = mine.perplexity.losses, its.perplexity.losses
        if a.shape != b.shape or not np.allclose(a, b, rtol=1e-2):
            return False
    if mine.tasks is None or its.tasks is None:
        return True
    return all(
        len(mine.tasks.scores[task]) == len(its.tasks.scores[task])
        for task in mine.tasks.scores.keys() & its.tasks.scores.keys()
    )


def _joined(facts: Sequence[Mapping[str, Any]], folders: Sequence[str]) -> dict[str, Any]:
    """Facts of runs that share the work on one model.

    Raises:
        ValueError: they do not.
    """
    last = facts[-1]
    for name in ("weights", "dtype", "seed"):
        if len({str(each.get(name)) for each in facts}) > 1:
            raise ValueError(f"{', '.join(folders)} are not one comparison: {name} differs between them")
    commands = _unlike([command for each in facts for command in each.get("commands", [])])
    return {**last, "commands": commands} if commands else dict(last)


def _unlike(commands: Sequence[list[str]]) -> list[list[str]]:
    """Each once, in order."""
    return [command for i, command in enumerate(commands) if command not in commands[:i]]


def _lists(arrays: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    """float32 in as few digits as give it back."""
    return {
        name: [int(value) if value == int(value) else float(str(value)) for value in values]
        for name, values in arrays.items()
    }


def _entry(numbers: Mapping[str, Any]) -> Entry:
    """What :meth:`Comparison.to_dict` holds of one."""
    told, perplexity, timing = numbers["tasks"], numbers["perplexity"], numbers.get("timing")
    tasks = None
    if told is not None:
        scores, losses = (
            {name: np.asarray(values, dtype=np.float32) for name, values in told[kind].items()}
            for kind in ("scores", "losses")
        )
        tasks = TextResult(told["setting"], told["length"], told["density"], scores, losses)
    if perplexity is not None:
        rest = {name: value for name, value in perplexity.items() if name != "document_losses"}
        perplexity = DocumentLosses(np.asarray(perplexity["document_losses"]), rest)
    times = None
    if timing is not None:
        dense, mine = (TimingMeasure().restore(each, {}) for each in timing)
        times = dense, mine
    return Entry(
        numbers["setting"], numbers["length"], numbers["target"], numbers["contender"], tasks, perplexity,
        timing=times, seconds=numbers["seconds"], peak_bytes=numbers["peak_bytes"],
    )  # fmt: skip
