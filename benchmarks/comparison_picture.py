"""One picture of a comparison: answers and perplexity over density, a column for each model, the main methods.

    python -m benchmarks.comparison_picture docs/comparison/models.png

Reads what is committed under ``benchmarks/results/h200/comparison``; nothing is measured.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seerattention.cli.common import Terminal
from seerattention.evaluate.comparison import Comparison
from seerattention.evaluate.comparison_file import load_comparison
from seerattention.evaluate.figures import COLORS, new_figure
from seerattention.files import write_file

from .results import own_arguments

RESULTS = Path(__file__).parent / "results" / "h200" / "comparison"
#: Title -> files of the answers and of the texts.
MODELS: Mapping[str, tuple[str, str]] = {
    "SmolLM2-135M": ("smollm2", "smollm2-texts"),
    "embedded model": ("testbed", "testbed-texts"),
    "a model that looks up in layer 1": ("layer-1-steered", "layer-1-steered-texts"),
}
#: Family -> what the legend calls it, and whether the rule is the project's (a full line) or its own (a broken one).
FAMILIES: Mapping[str, tuple[str, bool]] = {
    "gates, project rule": ("gates (default rule)", True),
    "gates, own rule": ("gates, plain threshold", False),
    "xattention, project rule": ("XAttention's score, this project's rule", True),
    "xattention, own rule": ("XAttention", False),
    "cosa, own rule": ("CoSA", False),
    "flashprefill_v2, own rule": ("FlashPrefill V2", False),
    "minference_exact (token by token), own rule": ("MInference, token by token", False),
    "streaming, own rule": ("sink and window", False),
}
#: Methods of one score have one color.
_COLOR_OF = (0, 0, 1, 1, 2, 3, 4, 5)
_MARKERS = "oosv^DPX"
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
    kept = io.BytesIO()
    draw(pairs).savefig(kept, format="png", dpi=130, bbox_inches="tight")
    write_file(options.output, kept.getvalue())
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
            above.axhline(100 * answers.score(dense), color="#6b7680", linewidth=1.2, linestyle=(0, (4, 3)))
        below.axhline(0, color="#6b7680", linewidth=1.2, linestyle=(0, (4, 3)), label="dense" if not column else None)
        for place, (family, (called, full)) in enumerate(FAMILIES.items()):
            style: dict[str, Any] = {
                "color": COLORS[_COLOR_OF[place]],
                "linestyle": "-" if full else "--",
                "marker": _MARKERS[place],
                "markersize": 4.5,
                "linewidth": 2.4 if family.startswith("gates, project") else 1.3,
                "zorder": 3 if family.startswith("gates") else 2,
            }
            above.plot(*scores(answers, length, family), **style)
            below.plot(*rises(texts, answers, length, family), **style, label=None if column else called)
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
            change = comparison.loss_change(entry) if entry.family == family and entry.perplexity is not None else None
            if change is not None and entry.perplexity is not None:
                found.append((entry.perplexity.density, 100 * math.expm1(change.mean)))
        if found:
            found.sort()
            return [x for x, _ in found], [y for _, y in found]
    return [], []


if __name__ == "__main__":
    sys.exit(main())
