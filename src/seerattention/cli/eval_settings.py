"""What ``seer eval`` compares: dense, gates with budgets, thresholds and selectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .common import Terminal, default_gates, spending
from .options import check_gates

if TYPE_CHECKING:
    from ..evaluate import Setting

__all__ = ["all_gates", "make_settings", "named_gates"]


def named_gates(text: str) -> tuple[str, str]:
    """What ``NAME=FOLDER`` says.

    Raises:
        ValueError: another form.
    """
    name, equals, folder = (part.strip() for part in text.partition("="))
    if not name or not equals:
        raise ValueError(f"expected NAME=FOLDER, got {text!r}")
    return name, check_gates(folder, "--compare-gates")


def all_gates(model: str, gates: str | None, compared: Mapping[str, str]) -> dict[str, Any]:
    """All gates that are measured, by what tables call them."""
    if "gates" in compared:
        raise ValueError("--compare-gates: 'gates' is the name of those of --gates; choose another")
    first = None if gates == "none" else default_gates(model) if gates is None else gates
    return {**({} if first is None else {"gates": first}), **compared}


def make_settings(
    gates: Mapping[str, Any],
    densities: Sequence[float],
    thresholds: Sequence[float],
    oracle: bool,
    selectors: str | None,
    terminal: Terminal,
) -> list[Setting]:
    """Dense, and what the options ask for beside it, by the names that tables show."""
    from ..baselines import Oracle, parse_selectors
    from ..evaluate import Setting
    from ..policies import Threshold, TopK

    settings = [Setting.dense()]
    if oracle:
        settings += [Setting(f"oracle {density:g}", selector=Oracle(TopK(density))) for density in densities]
    if thresholds and not gates:
        raise ValueError("--thresholds needs --gates")
    for called, folder in gates.items():
        for density, policy in spending(folder, densities, terminal).items():
            settings.append(Setting(f"{called} {density:g}", gates=folder, policy=policy))
        settings += [Setting(f"{called} > {x:g}", gates=folder, policy=Threshold(x)) for x in thresholds]
    try:
        chosen = {} if selectors is None else parse_selectors(selectors)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--selectors: {error}") from error
    for name, selector in chosen.items():
        if not selector.needs_gate:
            settings.append(Setting(name, selector=selector))
            continue
        if not gates:
            raise ValueError(f"--selectors: {name} asks gates and needs --gates")
        for called, folder in gates.items():
            shown = name if called == "gates" else f"{called} {name}"
            settings.append(Setting(shown, gates=folder, selector=selector))
    return settings
