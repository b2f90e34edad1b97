"""What ``seer distill`` leaves behind: budgets, gates, history, curves, and a table of what was learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from ..distillation import DistillConfig, DistillHistory
    from .common import Terminal

__all__ = ["fit_budgets", "write_results"]


def fit_budgets(model: nn.Module, held_out: list[Any], terminal: Terminal, *, by_layer: bool) -> None:
    """Fit the budgets that are saved with the gates, or say why not: of short texts gates are good without them."""
    from ..hf.state import state_of
    from ..measure.calibrate import calibrate, readings

    state_of(model).budgets = None  # of gates that training went on from
    try:
        with terminal.progress("fitting budgets", len(held_out) * readings(model, by_layer=by_layer)) as advance:
            found = calibrate(model, held_out, by_layer=by_layer, advance=advance)
    except ValueError as error:
        alike = state_of(model).budgets
        if alike is None:
            terminal.say(f"no budgets are stored with these gates: {error}")
            return
        terminal.say(f"budgets have one factor for all layers: {error}")
        found = alike
    known = ", ".join(f"{density:g}" for density in found.densities)
    terminal.say(f"fitted budgets on the held-out sequences, for densities {known}; the default is {found.default:g}")


def write_results(
    model: nn.Module,
    history: DistillHistory,
    config: DistillConfig,
    output: Path,
    terminal: Terminal,
    job: dict[str, Any],
) -> dict[str, Any]:
    """Save gates, ``history.json`` and ``curves.png`` in ``output``, show a table, and give what ``--json`` prints."""
    from .. import hf
    from ..evaluate.figures import learning_curves
    from ..evaluate.tables import Table
    from ..files import replacing, write_file
    from ..measure.kept import RECALLS, SHOWN, SHOWN_SAYS

    hf.save_gates(model, output)
    result = {"settings": {**config.to_dict(), **job}, "history": history.to_dict()}
    write_file(output / "history.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    picture = output / "curves.png"
    with replacing(picture) as temporary:
        learning_curves(history).savefig(temporary, format="png", dpi=120)

    rows = []
    for layer, losses in history.loss_per_layer.items():
        recall = history.recall.get(layer, [])
        rows.append(
            (
                layer,
                f"{losses[0]:.4f}",
                f"{losses[-1]:.4f}",
                f"{recall[0]:.3f}" if recall else "-",
                f"{recall[-1]:.3f}" if recall else "-",
                history.not_learning.get(layer, ""),
            )
        )
    headers = ("layer", "first loss", "last loss", "recall before", "recall after", "does not seem to learn")
    shown = headers if history.not_learning else headers[:-1]
    caption = f"block recall: share of the attention mass inside the selected blocks at density {config.eval_density:g}"
    terminal.table(Table(shown, [row[: len(shown)] for row in rows], caption if history.recall else ""))
    values = history.numbers.get(SHOWN)
    if values and values[0] is not None and values[-1] is not None:
        terminal.say(f"{RECALLS[SHOWN]} {values[0]:.3f} -> {values[-1]:.3f}: {SHOWN_SAYS}")
    terminal.say(
        f"{len(history.loss)} steps, {history.tokens:,} tokens, {history.seconds:.0f} s "
        f"({history.tokens / max(history.seconds, 1e-9):,.0f} tokens/s). Gates, history and curves are in {output}"
    )
    return {"output": str(output), **result}
