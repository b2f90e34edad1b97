"""Tables of a comparison: what was measured of each setting, task by task, and what choosing blocks costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .comparison import Comparison, Entry
from .contenders import BUDGET
from .statistics import Interval
from .tables import Table, format_density, format_length, format_percent, format_seconds
from .text_tasks import SOLVED

__all__ = ["costs_table", "points", "relative", "summary_table", "task_table"]

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
                "" if entry.is_dense else points(comparison.score_change(entry)),
                "-" if perplexity is None else format_density(perplexity.density),
                "-" if perplexity is None else f"{perplexity.perplexity:.2f}",
                "" if entry.is_dense else relative(comparison.loss_change(entry)),
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
            " Budget rule: by the factors stored with the gates; nothing was searched for it, so "
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


def points(change: Interval | None) -> str:
    """A change of a score, in points."""
    if change is None:
        return "-"
    return f"{100 * change.mean:+.1f} [{100 * change.low:+.1f}, {100 * change.high:+.1f}]"


def relative(change: Interval | None) -> str:
    """A change of the loss as one of the perplexity."""
    if change is None:
        return "-"
    mean, low, high = (100 * math.expm1(value) for value in change)
    return f"{mean:+.1f} % [{low:+.1f}, {high:+.1f}]"
