"""Plots for reports: one restrained style, colours that colour-blind readers can tell apart (Okabe and Ito).

No two lines of a figure differ by their colour alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..measure.kept import RECALLS, SHOWN

__all__ = ["COLORS", "bar_figure", "learning_curves", "line_figure", "new_figure", "over_density", "reference_line"]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Behind seven lines colours come again: these lines are dashed, have other markers, and are open.
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (9, 2)))
_INK = "#1d2329"
_SOFT = "#5b6670"


def new_figure(width: float = 6.4, height: float = 3.6, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure without pyplot's global state, and its axes in reading order."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color("#b8c0c8")
        axis.tick_params(colors=_SOFT, labelsize=9)
        axis.title.set_color(_INK)
    return figure, axes


def line_figure(
    series: Mapping[str, tuple[Sequence[float], Sequence[float], Any]],
    *,
    x_label: str,
    y_label: str,
    reference: tuple[str, float] | None = None,
    log_x: bool = False,
    x_ticks: Mapping[float, str] | None = None,
    y_limits: tuple[float, float] | None = None,
    reverse_x: bool = False,
) -> Figure:
    """Lines with markers.

    Args:
        series: name -> (x, y, standard errors or None); errors are ``[n]``, or ``[2, n]`` below and above.
        reference: name and value of a horizontal line (the dense model).
        x_ticks: value -> label, where the automatic ticks do not fit.
    """
    figure, (axis,) = new_figure()
    for i, (name, (x, y, errors)) in enumerate(series.items()):
        turn, place = divmod(i, len(COLORS))
        axis.errorbar(
            x,
            y,
            yerr=errors,
            color=COLORS[place],
            linestyle=_DASHES[turn % len(_DASHES)],
            marker=_MARKERS[(place + turn) % len(_MARKERS)] if len(x) <= 24 else None,
            markerfacecolor="white" if turn % 2 else COLORS[place],
            markersize=5,
            linewidth=1.6,
            capsize=2.5,
            elinewidth=1,
            label=name,
        )
    if reference is not None:
        reference_line(axis, reference[1], reference[0])
    if log_x:
        axis.set_xscale("log", base=2)
    if x_ticks:
        axis.set_xticks(list(x_ticks), list(x_ticks.values()))
        axis.minorticks_off()
    if y_limits:
        axis.set_ylim(*y_limits)
    if reverse_x:
        axis.invert_xaxis()
    _label(axis, x_label, y_label)
    if len(series) + (reference is not None) > 1:
        if len(series) > len(COLORS):  # beside the lines, or there is no room for them
            figure.set_figwidth(1.4 * figure.get_figwidth())
            figure.set_figheight(max(figure.get_figheight(), 0.17 * (len(series) + 2)))
            axis.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
        else:
            axis.legend(frameon=False, fontsize=9)
    return figure


def reference_line(axis: Axes, value: float, label: str | None = None) -> None:
    """A horizontal line that others are held against (the dense model)."""
    axis.axhline(value, color=_SOFT, linewidth=1.2, linestyle=(0, (4, 3)), label=label)


def over_density(
    results: Sequence[Any], values: Sequence[float], y_label: str, y_limits: tuple[float, float] | None = None
) -> Figure:
    """A value of each result over its density: the first as a horizontal line, the others as a line for each kind of
    setting (its name without the last word).
    """
    groups: dict[str, list[tuple[float, float]]] = {}
    for result, value in list(zip(results, values, strict=True))[1:]:
        groups.setdefault(result.setting.rsplit(" ", 1)[0], []).append((result.density, value))
    series = {}
    for name, points in groups.items():
        densities, heights = zip(*sorted(points), strict=True)
        series[name] = (densities, heights, None)
    reference = (results[0].setting, values[0])
    return line_figure(series, x_label="density", y_label=y_label, reference=reference, y_limits=y_limits)


def bar_figure(labels: Sequence[str], series: Mapping[str, Sequence[float]], *, x_label: str, y_label: str) -> Figure:
    """Groups of bars: one group a label, one bar a series."""
    figure, (axis,) = new_figure()
    width = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        positions = [j + (i - (len(series) - 1) / 2) * width for j in range(len(labels))]
        axis.bar(positions, values, width=width * 0.92, color=COLORS[i % len(COLORS)], label=name)
    axis.set_xticks(range(len(labels)), labels)
    _label(axis, x_label, y_label)
    if len(series) > 1:
        axis.legend(
            frameon=False, fontsize=9, ncols=min(3, len(series)), loc="upper center", bbox_to_anchor=(0.5, 1.16)
        )
    return figure


def _label(axis: Axes, x_label: str, y_label: str) -> None:
    axis.set_xlabel(x_label, color=_INK, fontsize=10)
    axis.set_ylabel(y_label, color=_INK, fontsize=10)
    axis.grid(axis="y", color="#e8ebee", linewidth=0.8)
    axis.set_axisbelow(True)


def learning_curves(history: Any) -> Figure:
    """Loss of each layer and their mean, and block recall where it was measured, of a ``DistillHistory``.

    A thick line among the layers' block recall is the number that is shown beside it, of all layers together.
    """
    figure, axes = new_figure(width=9.6, columns=2 if history.recall else 1)
    for losses in history.loss_per_layer.values():
        axes[0].plot(range(1, len(losses) + 1), losses, color=COLORS[5], linewidth=0.7, alpha=0.6)
    axes[0].plot(
        range(1, len(history.loss) + 1), history.loss, color=COLORS[0], linewidth=1.8, label="mean of the layers"
    )
    axes[0].set(xlabel="step", ylabel="loss (KL divergence)")
    axes[0].legend(frameon=False)
    if history.recall:
        for layer, values in history.recall.items():
            axes[1].plot(history.recall_steps, values, marker="o", markersize=3, linewidth=1.2, label=layer)
        shown = getattr(history, "numbers", {}).get(SHOWN)  # histories of earlier versions have none
        if shown and None not in shown:
            axes[1].plot(history.recall_steps, shown, color=COLORS[0], linewidth=2.4, label=f"{RECALLS[SHOWN]}, all")
        axes[1].set(xlabel="step", ylabel=f"block recall at density {history.recall_density:g}")
        if len(history.recall) <= 12:
            axes[1].legend(frameon=False, fontsize=7, ncols=2)
    for axis in axes:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure
