"""A comparison as it is on disk: every setting with its scores, densities, times and intervals, and tables of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .contenders import BUDGET
from .journal import Journal
from .map_measure import MapMeasure, MapResult
from .perplexity import PerplexityMeasure, PerplexityResult
from .statistics import Interval, paired_bootstrap
from .tables import Table, finite, format_density, format_length, format_percent, format_seconds
from .text_tasks import SOLVED, TextMeasure, TextResult, solved_tasks
from .timing import TimingMeasure, TimingResult

__all__ = ["RUN", "Comparison", "Entry", "RunResult", "summary_table", "task_table"]

#: What to say of selectors whose choice is read by an attention of their own, by what it is called.
NOTES: Mapping[str, str] = {
    "+ mean correction": (
        "(+ mean correction): blocks that are left out are not forgotten but stand in as the mean of their keys and "
        "values, by another attention than that of the others; its density is of the blocks that are read."
    ),
    "token by token": (
        "(token by token): what is read are single keys and parts of blocks, and the density counts pairs of tokens; "
        "attention is masked dense attention, so that its time says nothing."
    ),
}
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
    perplexity: PerplexityResult | None = None
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
    """All settings of one run, on the same prompts.

    Attributes:
        facts: of the run: model, machine, versions, command.
        entries: by length and name, dense first at each length.
        left_out: results of other prompts, models or versions in the same folder.
    """

    facts: Mapping[str, Any]
    entries: dict[tuple[int, str], Entry]
    left_out: int = 0

    @classmethod
    def read(cls, folder: Path) -> Comparison:
        """From a folder of ``seer compare``; of several runs in it the last one.

        Raises:
            FileNotFoundError: no results in it.
            ValueError: results, but none of a comparison.
        """
        if not any(folder.glob("results*.jsonl")):
            raise FileNotFoundError(f"{folder} holds no results (results.jsonl); seer compare writes them")
        journal = Journal(folder)
        lines = journal.lines()
        runs = [line for line in lines if line["case"].get("measure") == RUN]
        if not runs:
            raise ValueError(f"the results in {folder} are not those of seer compare")
        run = max(runs, key=lambda line: line["case"].get("time", 0.0))
        told = [line for line in lines if line["case"].get("measure") != RUN]
        mine = [line for line in told if line["case"].get("run") == run["case"]["run"]]
        found = cls(run["results"][0], {})
        # Dense decides which prompts count: the ones that it was measured on last.
        dense = {
            (line["case"]["measure"], line["case"]["length"]): line["case"]["prompts"]
            for line in mine
            if "contender" not in line["case"]
        }
        for line in mine:
            found._add(line, journal, dense)
        found.left_out += len(told) - len(mine)
        order = sorted(found.entries.values(), key=lambda e: (e.length, not e.is_dense, e.family, e.target))
        found.entries = {(entry.length, entry.name): entry for entry in order}
        return found

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
        setattr(entry, kind, (results[0], results[-1]) if kind == "timing" else results[-1])
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
        mine, theirs = (each.losses.mean(-1, dtype=np.float64) for each in (entry.perplexity, dense.perplexity))
        return paired_bootstrap([mine], [theirs])

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
        """Plain numbers for JSON: the facts of the run, and each setting with its scores and intervals."""
        return {**self.facts, "left_out": self.left_out, "settings": [self._numbers(e) for e in self.entries.values()]}

    def _numbers(self, entry: Entry) -> dict[str, Any]:
        score, loss = self.score_change(entry), self.loss_change(entry)
        return {
            "setting": entry.name,
            "length": entry.length,
            "target": entry.target,
            "contender": dict(entry.contender),
            "score": finite(self.score(entry)),
            "score_change": None if score is None else score._asdict(),
            "loss_change": None if loss is None else loss._asdict(),
            "tasks": None if entry.tasks is None else entry.tasks.to_dict(),
            "perplexity": None if entry.perplexity is None else entry.perplexity.to_dict(),
            "prefill_seconds": entry.prefill,
            "speed": entry.speed,
            "seconds": entry.seconds,
            "peak_bytes": entry.peak_bytes,
        }


def summary_table(comparison: Comparison, length: int) -> Table:
    """One row a setting: scores, densities, times, memory."""
    rows = []
    for entry in comparison.at(length):
        perplexity = entry.perplexity
        rows.append(
            [
                entry.name,
                "-" if entry.tasks is None else format_density(entry.tasks.density),
                _percent(comparison.score(entry)),
                "" if entry.is_dense else _points(comparison.score_change(entry)),
                "-" if perplexity is None else format_density(perplexity.density),
                "-" if perplexity is None else f"{perplexity.perplexity()[0]:.2f}",
                "" if entry.is_dense else _relative(comparison.loss_change(entry)),
                "-" if entry.prefill is None else format_seconds(entry.prefill),
                "-" if entry.speed is None else f"{entry.speed:.2f}x",
                "-" if entry.peak_bytes is None else f"{entry.peak_bytes / 2**30:.2f} GiB",
                "" if entry.is_dense else "whole prompt" if entry.contender["whole_prompt"] else "row by row",
            ]
        )
    headers = [
        "setting", "density", "score", "score - dense", "density (text)", "perplexity", "perplexity / dense", "prefill",
        "speed", "peak memory", "decides",
    ]  # fmt: skip
    solved = comparison.solved(length)
    caption = (
        f"{format_length(length)} tokens. Score: mean of the tasks that dense attention solves to at least "
        f"{100 * SOLVED:.0f} % ({', '.join(solved) or 'none'}), answers generated greedily. Density: everything that "
        "is kept over everything visible, all layers and rows; the number in a name is the density that was asked for, "
        "reached on held-out prompts by the knob of the rule. Brackets: 95 % of paired bootstrap resamples of the same "
        "questions, or documents. Prefill: one prompt through the whole model, median; speed: dense attention over it, "
        "in turns with it. Training-free methods choose in plain torch, not with the kernels of their authors."
    )
    missed = [entry.name for entry in comparison.at(length) if entry.contender.get("reached") is False]
    if missed:
        caption += f" The density was out of reach for: {'; '.join(missed)}."
    if any(entry.contender.get("rule") == BUDGET for entry in comparison.at(length)):
        caption += (
            " Budget rule: as the gates are shipped, by the factors stored with them; nothing was searched for it, so "
            "that its density is what it came to."
        )
    caption += "".join(f" {NOTES[mark]}" for mark in _attentions(comparison.at(length)))
    conceded = [entry.name for entry in comparison.at(length) if entry.contender.get("conceded")]
    if conceded:
        caption += f" With smaller floors than the rule's defaults, to reach the density: {'; '.join(conceded)}."
    return Table(headers, rows, caption)


def _attentions(entries: Sequence[Entry]) -> list[str]:
    """Attentions other than that of all others that are among these, as :attr:`Selector.attention` calls them."""
    return sorted(NOTES.keys() & {entry.contender.get("attention") for entry in entries})


def task_table(comparison: Comparison, length: int) -> Table:
    """One row a setting, a column a task."""
    entries = [entry for entry in comparison.at(length) if entry.tasks is not None]
    first = entries[0].tasks if entries else None
    if first is None:
        return Table(["setting"], [])
    rows = []
    for entry in entries:
        tasks = entry.tasks
        assert tasks is not None
        rows.append(
            [
                entry.name,
                format_density(tasks.density),
                *(format_percent(tasks.score([t])) if t in tasks.scores else "-" for t in first.scores),
                *(f"{tasks.answer_perplexity(t):.2f}" if t in tasks.losses else "-" for t in first.losses),
            ]
        )
    count = len(next(iter((first.scores | first.losses).values())))
    caption = f"{format_length(length)} tokens, {count} prompts of each task."
    if first.losses:
        caption += (
            " (ppl): the model is too small to answer questions on paragraphs freely; perplexity of the right answer, "
            "lower is better."
        )
    headers = ["setting", "density", *first.scores, *(f"{task} (ppl)" for task in first.losses)]
    return Table(headers, rows, caption)


def costs_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Times of selection alone, as ``benchmarks.selection`` writes them."""
    cells = [
        [
            str(row["selector"]),
            format_length(int(row["length"])),
            format_seconds(float(row["median_s"])),
            format_density(float(row["density"])),
            str(row["implementation"]),
            str(row["decides"]),
        ]
        for row in rows
    ]
    headers = ["selection", "length", "time a layer", "density", "how", "decides"]
    return Table(headers, cells, "Choosing the blocks of one layer, without the attention.")


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else format_percent(share)


def _points(change: Interval | None) -> str:
    if change is None:
        return "-"
    return f"{100 * change.mean:+.1f} [{100 * change.low:+.1f}, {100 * change.high:+.1f}]"


def _relative(change: Interval | None) -> str:
    """A change of the loss as one of the perplexity."""
    if change is None:
        return "-"
    mean, low, high = (100 * math.expm1(value) for value in change)
    return f"{mean:+.1f} % [{low:+.1f}, {high:+.1f}]"
