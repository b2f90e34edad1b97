"""Methods at the same density of the same texts, where each was measured near it: interpolated, document by document.

The density that a comparison asks for is reached on held-out prompts; on the texts of the perplexity it comes out a few
per cent higher for one method and lower for another, and at 0.15 ten per cent of density are worth a fifth of what is
lost. So methods are compared here at one density: of each document the loss, linear in the logarithm of the density
between the two settings of a method around it. The loss is convex there, so what is interpolated lies a little above
what would be measured, for all methods alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .comparison import Comparison, Entry
from .comparison_tables import relative
from .statistics import paired_bootstrap
from .tables import Table, format_length

__all__ = ["equal_density_table", "losses_at"]

#: How far beyond the settings of a method a density may lie, as a share.
BEYOND = 0.05
#: What the others are held against where it was measured.
REFERENCE = "gates, project rule"


def losses_at(entries: Sequence[Entry], density: float) -> np.ndarray | None:
    """Mean loss of each document, float64 ``[documents]``, of one method at a density of its texts.

    None where its settings do not reach it: fewer than two, or all more than :data:`BEYOND` away on one side.
    """
    measured = [
        (entry.perplexity.density, entry.perplexity.losses) for entry in entries if entry.perplexity is not None
    ]
    measured.sort(key=lambda each: each[0])
    densities = [each[0] for each in measured]
    if len(densities) < 2 or not densities[0] / (1 + BEYOND) <= density <= densities[-1] * (1 + BEYOND):
        return None
    above = min(max(sum(each < density for each in densities), 1), len(densities) - 1)
    (low, before), (high, behind) = measured[above - 1 : above + 1]
    if low == high:
        return None
    share = math.log(density / low) / math.log(high / low)
    return before + share * (behind - before)


def equal_density_table(comparison: Comparison, length: int, densities: Sequence[float] = ()) -> Table | None:
    """One row a method under every row sparse: what perplexity rises by at each density, and against the gates.

    Args:
        densities: of the texts; none: those that were asked for.

    Returns:
        None where no method has two settings.
    """
    dense = comparison.dense(length)
    if dense is None or dense.perplexity is None:
        return None
    methods: dict[str, list[Entry]] = {}
    for entry in comparison.at(length):
        if not entry.is_dense and entry.contender["protocol"] == "every_row_sparse":
            methods.setdefault(entry.family, []).append(entry)
    asked = densities or sorted({entry.target for found in methods.values() for entry in found})
    rows = []
    for family, entries in methods.items():
        cells = []
        for density in asked:
            mine, theirs = losses_at(entries, density), losses_at(methods.get(REFERENCE, []), density)
            cells.append("-" if mine is None else relative(paired_bootstrap([mine], [dense.perplexity.losses])))
            against = (
                None if mine is None or theirs is None or family == REFERENCE else paired_bootstrap([mine], [theirs])
            )
            cells.append("" if family == REFERENCE else relative(against))
        if any(cell not in ("-", "") for cell in cells):
            rows.append([family, *cells])
    if not rows:
        return None
    headers = ["method"]
    for density in asked:
        headers += [f"{density:g}: perplexity / dense", f"{density:g}: / {REFERENCE}"]
    caption = (
        f"{format_length(length)} tokens, {len(dense.perplexity.losses)} documents. All methods at the same density of "
        "these texts: the loss of each document, linear in the logarithm of the density between the settings of a "
        "method around it (or, within "
        f"{100 * BEYOND:.0f} %, beyond them). Brackets: 95 % of paired bootstrap resamples of the documents. "
        f"'/ {REFERENCE}': perplexity over that of the gates there; above 0 the gates lose less."
    )
    return Table(headers, rows, caption)
