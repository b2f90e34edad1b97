"""docs/accuracy.md and its pictures: score and perplexity over density, by form and rule. Nothing is measured here.

python -m benchmarks.accuracy        # from benchmarks/results/h200/gate_forms_three_models.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from seerattention.evaluate.figures import COLORS, new_figure
from seerattention.evaluate.tables import Table
from seerattention.files import replacing, write_file

from .results import own_arguments

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "h200" / "gate_forms_three_models.json"
DOCUMENT = ROOT / "docs" / "accuracy.md"
TASKS = ("single", "multikey", "keyvalue")
FORMS = {
    "64x64": ("own", "mmm"),  # what the rows call them: those of the package at that time, and fresh ones
    "8x8, own keys": ("sub",),
    "8x8, shared keys": ("shared",),
    "true map": ("oracle",),
}
RULES = {"relative": "o", "Threshold": "s", "TopP": "^", "TopK": "X"}
STYLES = dict(zip(FORMS, ("--", ":", "-", (0, (1, 1))), strict=True))

_METHOD = """What the rows of a prompt read was chosen by gates of three forms, and by the true attention map (what a
perfect gate would choose), under four rules. Every row is sparse, questions and answers included. Density counts the
blocks of all layers, heads and rows. Answers are scored by teacher forcing (a standard error up to 3 points, 5 of
`single`); perplexity is that of unseen books over all positions, and more than 15 % above dense is outside of the
pictures."""

_NAMES = """* **64x64**: the paper's form, with maximum, minimum and average of the queries. **8x8**: sub-blocks, keys
  projected for each query head (own) or for each KV head (shared, what `seer distill` trains for models of 1 B
  parameters and more). 4x4 sub-blocks by mass, which ship and are trained for smaller models, are in the
  [README](../README.md) and the [comparison](comparison.md).
* **relative**: `RelativeThreshold` of 0.5 to 4. **Threshold**: 0.005, 0.01. **TopP**: 0.9, 0.8. **TopK**: 0.2, 0.1."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(own_arguments() if arguments is None else arguments)
    results = json.loads(RESULTS.read_text())
    for name, model in results["models"].items():
        with replacing(picture_of(name)) as temporary:
            draw(model).savefig(temporary, format="png", dpi=90)
    write_file(DOCUMENT, document(results))
    return 0


def picture_of(name: str) -> Path:
    return DOCUMENT.parent / "accuracy" / f"{name}.png"


def document(results: Mapping[str, Any]) -> str:
    """The page, in Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    parts = [
        "# Accuracy over density",
        _METHOD,
        f"Measured on one {results['gpu']} (driver {results['driver']}, {versions}, {results['date']});\n"
        f"numbers, training and commit are in `{RESULTS.relative_to(ROOT).as_posix()}`. This page is made from it:\n"
        "`python -m benchmarks.accuracy`. What follows from it stands in [the experiments](experiments.md), and what\n"
        "to use in the [README](../README.md).",
        _NAMES,
    ]
    for name, model in results["models"].items():
        picture = picture_of(name).relative_to(DOCUMENT.parent).as_posix()
        parts += [f"## {model['label']}", f"![score and perplexity over density]({picture})", table(model).markdown()]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def table(model: Mapping[str, Any]) -> Table:
    """All settings of a model, densest first within each form."""
    tasks = tasks_of(model)
    rows = [_cells("dense", "", _dense(model), tasks)]
    for form, rule, row in _settings(model):
        rows.append(_cells(form, rule, row, tasks))
    return Table(["form", "rule", "density", *tasks, "perplexity", "last quarter", "first 1K"], rows)


def draw(model: Mapping[str, Any]) -> Figure:
    """Mean score, and perplexity over that of the dense model, over density."""
    figure, (score, loss) = new_figure(width=10.5, height=4.0, columns=2)
    dense, tasks = _dense(model), tasks_of(model)
    for i, form in enumerate(FORMS):
        for rule, marker in RULES.items():
            points = sorted(
                (row["density"], 100 * sum(row[task] for task in tasks) / len(tasks), row["ppl"] / dense["ppl"])
                for found, told, row in _settings(model)
                if found == form and told.split()[0] == rule
            )
            if not points:
                continue
            x, scores, losses = zip(*points, strict=True)
            how: dict[str, Any] = {
                "color": COLORS[i],
                "marker": marker,
                "markersize": 5,
                "linewidth": 1.3,
                "linestyle": STYLES[form],
            }
            score.plot(x, scores, label=f"{form}, {rule}", **how)
            loss.plot(x, [100 * (value - 1) for value in losses], **how)
    score.axhline(100 * sum(dense[task] for task in tasks) / len(tasks), color="#5b6670", linewidth=1, label="dense")
    for axis in (score, loss):
        axis.set_xscale("log")
        axis.set_xticks([0.05, 0.1, 0.2, 0.3], ["0.05", "0.1", "0.2", "0.3"])
        axis.minorticks_off()
        axis.set_xlabel("density")
        axis.grid(axis="y", color="#e8ebee", linewidth=0.8)
    score.set_ylabel("right answers, %")
    score.set_title("mean of " + ", ".join(tasks), fontsize=9)
    loss.set_ylabel("perplexity above dense, %")
    loss.set_ylim(0, 15)
    figure.legend(*score.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=7)
    return figure


def tasks_of(model: Mapping[str, Any]) -> list[str]:
    """The tasks that a model was asked."""
    return [task for task in TASKS if task in _dense(model)]


def _dense(model: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(row for row in model["rows"] if row["setting"] == "dense")


def _settings(model: Mapping[str, Any]) -> Iterable[tuple[str, str, Mapping[str, Any]]]:
    """Form, rule and numbers of each sparse setting."""
    for form, names in FORMS.items():
        rows = [(row["setting"].partition(" "), row) for row in model["rows"]]
        mine = [(rule, row) for (name, _, rule), row in rows if name in names]
        yield from ((form, rule, row) for rule, row in sorted(mine, key=lambda pair: -pair[1]["density"]))


def _cells(form: str, rule: str, row: Mapping[str, Any], tasks: Sequence[str]) -> list[str]:
    scores = [f"{100 * row[task]:.1f} %" for task in tasks]
    return [form, rule, f"{row['density']:.3f}", *scores, *(f"{row[key]:.2f}" for key in ("ppl", "q4", "first1k"))]


if __name__ == "__main__":
    sys.exit(main())
