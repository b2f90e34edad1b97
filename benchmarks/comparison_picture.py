"""One picture of a comparison: answers and perplexity over density, a column for each model, the main methods.

    python -m benchmarks.comparison_picture docs/comparison/models.png

Reads what is committed under ``benchmarks/results/h200/comparison``; nothing is measured.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from seerattention.cli.common import Terminal
from seerattention.evaluate.comparison import Comparison
from seerattention.evaluate.comparison_file import load_comparison
from seerattention.evaluate.figures import COLORS, new_figure, reference_line
from seerattention.files import replacing

from .results import own_arguments

RESULTS = Path(__file__).parent / "results" / "h200" / "comparison"
#: Title -> files of the answers and of the texts.
MODELS: Mapping[str, tuple[str, str]] = {
    "SmolLM2-135M": ("smollm2", "smollm2-texts"),
    "embedded model": ("testbed", "testbed-texts"),
    "a model that looks up in layer 1": ("layer-1", "layer-1-texts"),
}


class Line(NamedTuple):
    """How a family is drawn: rules of one score in one color, the project's as a full line, others broken."""

    called: str
    color: int
    marker: str
    style: str = "--"


FAMILIES: Mapping[str, Line] = {
    "gates, project rule": Line("gates (default rule)", 0, "o", "-"),
    "gates, own rule": Line("gates, plain threshold", 0, "o"),
    "gates, budget rule": Line("gates, density= (budgets)", 0, "p", ":"),
    "xattention, project rule": Line("XAttention's score, this project's rule", 1, "s", "-"),
    "xattention, own rule": Line("XAttention", 1, "v"),
    "cosa, own rule": Line("CoSA", 2, "^"),
    "flashprefill_v2, own rule": Line("FlashPrefill V2", 3, "D"),
    "minference_exact (token by token), own rule": Line("MInference, token by token", 4, "P"),
    "streaming, own rule": Line("sink and window", 5, "X"),
}
_HIGHEST = 30.0  # percent of perplexity that is shown; what loses more is beyond


def main(arguments: Sequence[str] | None = None) -> int:
    """Write; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.comparison_picture", description=__doc__)
    parser.add_argument("output", type=Path)
    options = parser.parse_args(own_arguments() if arguments is None else arguments)
    pairs = {
        title: (load_comparison(RESULTS / f"{answers}.json"), load_comparison(RESULTS / f"{texts}.json"))
        for title, (answers, texts) in MODELS.items()
    }
    with replacing(options.output) as temporary:
        draw(pairs).savefig(temporary, format="png", dpi=130, bbox_inches="tight")
    Terminal().say(f"written to {options.output}")
    return 0


def draw(pairs: Mapping[str, tuple[Comparison, Comparison]]) -> Any:
    """The figure of these models: comparisons of answers and of texts by title."""
    figure, axes = new_figure(4.1 * len(pairs), 6.2, rows=2, columns=len(pairs))
    for column, (title, (answers, texts)) in enumerate(pairs.items()):
        above, below = axes[column], axes[len(pairs) + column]
        length = answers.lengths[0]
        above.set_title(title, fontsize=11)
        dense = answers.dense(length)
        if dense is not None:
            reference_line(above, 100 * answers.score(dense))
        reference_line(below, 0, None if column else "dense")
        for family, line in FAMILIES.items():
            style: dict[str, Any] = {
                "color": COLORS[line.color],
                "linestyle": line.style,
                "marker": line.marker,
                "markersize": 4.5,
                "linewidth": 2.4 if family.startswith("gates, project") else 1.3,
                "zorder": 3 if family.startswith("gates") else 2,
            }
            above.plot(*scores(answers, length, family), **style)
            below.plot(*rises(texts, answers, length, family), **style, label=None if column else line.called)
        above.set_ylim(-3, 103)
        below.set_yscale("symlog", linthresh=0.3)
        below.set_ylim(-0.1, _HIGHEST)
        below.set_yticks([0, 0.3, 1, 3, 10, 30], ["0", "0.3", "1", "3", "10", "30"])
        for axis in (above, below):
            axis.set_xlim(0, 0.53)
            axis.set_xlabel("density", fontsize=9)
        if not column:
            above.set_ylabel("answers, %", fontsize=9)
            below.set_ylabel("perplexity over dense, %", fontsize=9)
    handles, labels = axes[len(pairs)].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def scores(comparison: Comparison, length: int, family: str) -> tuple[list[float], list[float]]:
    """Densities and mean scores in percent, of settings whose answers were asked for."""
    found = sorted(
        (e.tasks.density, 100 * comparison.score(e))
        for e in comparison.at(length)
        if e.family == family and e.tasks is not None
    )
    return [x for x, _ in found], [y for _, y in found]


def rises(texts: Comparison, answers: Comparison, length: int, family: str) -> tuple[list[float], list[float]]:
    """Densities and rises of perplexity in percent: of the many documents, of the few where there are no others."""
    for comparison in (texts, answers):
        found = []
        for entry in comparison.at(length):
            if entry.family != family or entry.perplexity is None:
                continue
            change = comparison.loss_change(entry)
            if change is not None:
                found.append((entry.perplexity.density, 100 * math.expm1(change.mean)))
        if found:
            found.sort()
            return [x for x, _ in found], [y for _, y in found]
    return [], []


if __name__ == "__main__":
    sys.exit(main())
