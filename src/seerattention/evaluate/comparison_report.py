"""The page of a comparison: curves, tables, maps, learning curves, costs, and where the numbers come from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from ..files import replacing
from .comparison import Comparison, Entry
from .comparison_tables import costs_table, summary_table, task_table
from .environment import machine_name
from .equal_density import equal_density_table
from .figures import learning_curves, line_figure
from .map_viewer import chosen_maps, map_viewer
from .maps import draw_recall
from .report import Report
from .tables import format_density, format_length, format_percent, format_seconds

__all__ = ["build_comparison_report", "curves"]

_METHOD = (
    "Every setting ran on the same model, the same attention kernel and the same prompts. A method scores blocks; a "
    "rule spends the budget: its own, or the project's, a threshold relative to uniform attention. The knob of the "
    "rule was set on held-out prompts of each length so that the total density is the one asked for; the density "
    "beside every score is the one that was measured on the very prompts of that score. It counts everything that is "
    "kept over everything visible, all layers, heads and rows. Every row of a prompt is sparse, questions included, "
    "unless a setting says 'as published': then what its authors keep dense besides counts into its density. 'whole "
    "prompt' stands by methods that need all of the prompt to choose for its first rows; those that decide row by row "
    "read the same whatever follows."
)
_MAPS = (
    "One prompt. Rows are blocks of queries, columns blocks of keys, colours shares of a row in logarithms. Left: the "
    "true attention, the maximum of each block. Middle: the softmax of the scores, where there are any. Right: the "
    "blocks that are read, coloured by the true map; grey ones are skipped. Each layer is judged on what the sparse "
    "layers before it produced."
)


class _Axis(NamedTuple):
    """What a curve shows of a setting."""

    label: str
    value: Callable[[Entry], float | None]


def build_comparison_report(
    comparison: Comparison,
    *,
    histories: Mapping[str, Mapping[str, Any]] | None = None,
    costs: Sequence[Mapping[str, Any]] = (),
    figures: Path | None = None,
    small: bool = False,
) -> Report:
    """The page.

    Args:
        histories: of distillations, by what they are called: what ``history.json`` holds under "history".
        costs: rows that ``benchmarks.selection`` has written.
        figures: a folder for every picture as PNG; None: only on the page.
        small: pictures of fewer points, for pages that are kept under version control.
    """
    facts = comparison.facts
    model = facts.get("model", "a model")
    lengths = ", ".join(map(format_length, comparison.lengths))
    keep = _Keeper(figures)
    report = Report(
        f"Sparse attention compared on {model}",
        f"Learned gates, training-free methods and oracles at equal density, prompts of {lengths} tokens.",
        dpi=90 if small else 150,
    )
    _headline(report, comparison)
    report.section("How it was compared")
    report.text(_METHOD)
    for length in comparison.lengths:
        report.section(f"At {format_length(length)} tokens")
        report.figures(
            [
                (keep(figure, f"{name}-{length}"), caption, caption)
                for name, figure, caption in curves(comparison, length)
            ]
        )
        report.table(summary_table(comparison, length), strong=[0], long_names=True)
        if (by_task := task_table(comparison, length)).rows:
            report.table(by_task, strong=[0], long_names=True)
        if (equal := equal_density_table(comparison, length)) is not None:
            report.table(equal, long_names=True)
    _maps(report, comparison, keep)
    if histories:
        report.section("Learning curves")
        for name, history in histories.items():
            caption = f"{name}: distillation, {len(history['loss'])} steps."
            drawn = learning_curves(SimpleNamespace(**{"recall": {}, **history}))
            report.figure(keep(drawn, f"learning-{name}"), caption, f"learning curves of {name}")
    if costs:
        report.section("Costs of selection")
        report.table(costs_table(costs), long_names=True)
    report.section("Where the numbers come from")
    report.definitions(_provenance(comparison))
    return report


class _Keeper:
    """Writes pictures to a folder on their way to the page."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def __call__(self, figure: Any, name: str) -> Any:
        if self.folder is not None:
            safe = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)
            with replacing(self.folder / f"{safe}.png") as temporary:
                figure.savefig(temporary, format="png", dpi=150)
        return figure


def _headline(report: Report, comparison: Comparison) -> None:
    length = comparison.lengths[-1] if comparison.lengths else 0
    cards = []
    dense = comparison.dense(length)
    if dense is not None and not math.isnan(comparison.score(dense)):
        cards.append((format_percent(comparison.score(dense)), f"dense attention at {format_length(length)}"))
    for target, best in sorted(comparison.winners(length).items()):
        score = format_percent(comparison.score(best))
        cards.append((score, f"highest at density {target:g}, {format_length(length)}: {best.family}"))
    if cards:
        report.headline(cards)


def curves(comparison: Comparison, length: int) -> list[tuple[str, Any, str]]:
    """Name, figure and caption of every curve there is at a length, for each rule by itself."""
    entries = comparison.at(length)
    dense = comparison.dense(length)
    score = _Axis("score, %", lambda e: _finite(100 * comparison.score(e)))
    perplexity = _Axis("perplexity", lambda e: None if e.perplexity is None else e.perplexity.perplexity)
    task_density = _Axis("density", lambda e: None if e.tasks is None else e.tasks.density)
    text_density = _Axis("density", lambda e: None if e.perplexity is None else e.perplexity.density)
    prefill = _Axis("prefill, s", lambda e: e.prefill)
    wanted = [
        ("score-density", task_density, score), ("perplexity-density", text_density, perplexity),
        ("score-prefill", prefill, score), ("perplexity-prefill", prefill, perplexity),
    ]  # fmt: skip
    rules = list(dict.fromkeys(e.contender["rule"] for e in entries if not e.is_dense))
    found = []
    for name, x, y in wanted:
        for rule in rules:
            series: dict[str, tuple[list[float], list[float], Any]] = {}
            for family, points in _families(entries, rule).items():
                pairs = sorted((x.value(e), y.value(e)) for e in points if None not in (x.value(e), y.value(e)))
                if pairs:
                    series[family] = ([a for a, _ in pairs], [b for _, b in pairs], None)  # type: ignore[misc]
            if not series:
                continue
            level = None if dense is None else y.value(dense)
            limits = (-3.0, 103.0) if y is score else None
            reference = None if level is None else ("dense", level)
            figure = line_figure(series, x_label=x.label, y_label=y.label, reference=reference, y_limits=limits)
            widest = max(value for xs, _, _ in series.values() for value in xs)
            figure.axes[0].set_xlim(0, 1.08 * widest)
            words = f"{y.label.partition(',')[0].capitalize()} over {x.label.partition(',')[0]}, {rule} rule"
            found.append((f"{name}-{rule}", figure, f"{words}, {format_length(length)} tokens."))
    return found


def _families(entries: Sequence[Entry], rule: str) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        if not entry.is_dense and entry.contender["rule"] == rule:
            published = ", as published" if entry.contender["protocol"] == "as_published" else ""
            found.setdefault(f"{entry.contender['label']}{published}", []).append(entry)
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _maps(report: Report, comparison: Comparison, keep: _Keeper) -> None:
    """Of one length and density: densities of layers and heads, and the maps to look through."""
    kept = [entry for entry in comparison.entries.values() if entry.maps is not None]
    if not kept:
        return
    target = min((entry.target for entry in kept), key=lambda value: abs(value - 0.1))
    chosen = chosen_maps(kept, target)
    length = kept[0].length
    report.section("Density of layers and heads")
    report.text(
        f"Per cent of the causal blocks that each head reads, in one prompt of {format_length(length)} tokens, where "
        f"the total density was to be {target:g}."
    )
    report.figures(
        [
            (keep(draw_recall(maps.densities, "density"), f"heads-{name}"), f"{name}: {format_density(maps.density)}.",
             f"density of each layer and head, {name}")
            for name, maps in chosen.items()
        ]
    )  # fmt: skip
    report.section("True map, scores, selected blocks")
    report.text(_MAPS)
    report.element(map_viewer(list(chosen.values())))


def _provenance(comparison: Comparison) -> list[tuple[str, Any]]:
    facts = comparison.facts
    environment = facts.get("environment", {})
    versions = environment.get("versions", {})
    took = sum(entry.seconds for entry in comparison.entries.values())
    found: list[tuple[str, Any]] = [
        (name, facts[name]) for name in ("model", "parameters", "dtype", "device", "seed", "weights") if name in facts
    ]
    found += [("gates", ", ".join(facts.get("gates", {}).values()) or "none"), ("machine", machine_name(environment))]
    found.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)))
    found.append(("git commit", environment.get("git_commit") or "not a source checkout"))
    commands = facts.get("commands", [facts.get("command", [])])
    found.append(("command", "; ".join(" ".join(command) for command in commands)))
    found.append(("time of all measurements", format_seconds(took)))
    if comparison.left_out:
        found.append(("left out", f"{comparison.left_out} results of other prompts, models or versions in the folder"))
    return found
