"""``seer report``: one self-contained page, and PNGs, of what ``seer compare`` found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Terminal, errors
from .options import check_output


def command(
    results: Annotated[Path, typer.Argument(help="Folder that seer compare wrote to.")],
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
        from ..evaluate.comparison import Comparison
        from ..evaluate.comparison_report import build_comparison_report

        terminal = Terminal()
        place = results if output is None else output
        check_output(place)
        comparison = Comparison.read(results)
        report = build_comparison_report(
            comparison,
            histories=_histories(comparison, gates),
            costs=_costs(results, selection),
            figures=place / "figures",
        )
        terminal.say(f"report: {report.save(place / 'index.html')}")


def _histories(comparison: Any, gates: str | None) -> dict[str, Any]:
    from ..files import read_json

    if gates is None:
        named = dict(comparison.facts.get("gates", {}))
    else:
        named = {Path(folder).name: folder for folder in gates.split(",")}
    found = {}
    for name, folder in named.items():
        path = Path(folder).expanduser() / "history.json"
        if path.is_file():
            found[name] = read_json(path)["history"]
        elif gates is not None:
            raise FileNotFoundError(f"--gates: no history.json in {folder}; seer distill writes one")
    return found


def _costs(results: Path, selection: Path | None) -> list[Any]:
    from ..files import read_json

    path = results / "selection.json" if selection is None else selection
    if selection is None and not path.is_file():
        return []
    found: dict[str, Any] = {}
    for run in read_json(path).get("runs", []):
        for result in run["results"]:  # of a case that was measured several times the latest counts
            if "costs" in result:
                found[str(sorted(result["case"].items()))] = result["costs"]
    if not found:
        raise ValueError(f"{path} holds no costs of selection; python -m benchmarks.selection writes them")
    return list(found.values())
