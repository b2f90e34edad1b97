"""``seer report``: one self-contained page, and PNGs, of what ``seer compare`` found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Terminal, errors, parse_list
from .options import check_output, named


def command(
    results: Annotated[
        list[Path],
        typer.Argument(
            help="Folder that seer compare wrote to, several that belong together, or a file of benchmarks.comparison."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder for index.html and the PNGs in figures/. Default: the results folder.")
    ] = None,
    gates: Annotated[
        str | None,
        typer.Option(help="Folders of gates whose learning curves to show (history.json), comma-separated. Default: "
                     "those that were compared, as far as they are here."),
    ] = None,
    selection: Annotated[
        Path | None,
        typer.Option(help="File of python -m benchmarks.selection. Default: selection.json beside the results."),
    ] = None,
) -> None:  # fmt: skip
    """Make one HTML page, which loads nothing from anywhere, of the results of a comparison.

    It may be made while a comparison runs: what is written so far is shown.

    Example: seer report results/
    """
    with errors():
        from ..evaluate.comparison_file import open_comparison
        from ..evaluate.comparison_report import build_comparison_report

        terminal = Terminal()
        first = results[0] if results[0].suffix != ".json" else results[0].parent
        place = first if output is None else output
        check_output(place)
        costs = _costs(first, selection)
        histories = None if gates is None else _histories(parse_list(gates, str, "gates"))
        comparison = open_comparison(results)
        if histories is None:
            compared = [folder for folder in comparison.facts.get("gates", {}).values() if _history(folder).is_file()]
            histories = _histories(compared)
        report = build_comparison_report(
            comparison,
            histories=histories,
            costs=costs,
            figures=place / "figures",
        )
        terminal.say(f"report: {report.save(place / 'index.html')}")


def _history(folder: str) -> Path:
    return Path(folder).expanduser() / "history.json"


def _histories(folders: Sequence[str]) -> dict[str, Any]:
    """Learning curves by the names of the folders."""
    from ..files import read_json

    found = {}
    for folder in folders:
        path = _history(folder)
        if not path.is_file():
            raise FileNotFoundError(f"--gates: no history.json in {folder}; seer distill writes one")
        with named("--gates"):
            history = read_json(path).get("history")
            if not isinstance(history, dict) or not {"loss", "loss_per_layer"} <= set(history):
                raise ValueError(f"{path} is not what seer distill writes")
        found[path.parent.name] = history
    return found


def _costs(results: Path, selection: Path | None) -> list[Any]:
    """Rows that ``benchmarks.selection`` wrote; of a case that was measured several times the latest."""
    from ..files import read_json

    path = results / "selection.json" if selection is None else selection
    if not path.is_file():
        if selection is None:
            return []
        raise FileNotFoundError(f"--selection: no such file: {path}")
    found: dict[str, Any] = {}
    with named("--selection"):
        for run in read_json(path).get("runs", []):
            for result in run["results"]:
                if "costs" in result:
                    found[str(sorted(result["case"].items()))] = result["costs"]
        if not found:
            raise ValueError(f"{path} holds no costs of selection; python -m benchmarks.selection writes them")
    return list(found.values())
