"""The measured part of docs/comparison.md, and its page, from folders of ``seer compare``. Nothing is measured here.

    python -m benchmarks.comparison testbed=RESULTS,MORE smollm2=RESULTS --save benchmarks/results/h200/comparison
    python -m benchmarks.comparison benchmarks/results/h200/comparison/*.json --page testbed docs/comparison/report.html

The first joins the folders of each model and writes a file of JSON with all that tables, curves and intervals are made
of, down to the score of each question and the loss of each document, and a few maps beside it; losses of single tokens
take too much room to be committed. Both write docs/comparison.md between its pairs of marks: the overview, perplexities
of texts against those of the gates, and all tables. The second does so from what is committed, and makes the page.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from seerattention.cli.common import Terminal
from seerattention.evaluate.comparison import Comparison, Entry
from seerattention.evaluate.comparison_file import load_comparison, open_comparison, save_comparison
from seerattention.evaluate.comparison_report import build_comparison_report
from seerattention.evaluate.comparison_tables import relative, summary_table, task_table
from seerattention.evaluate.environment import machine_name
from seerattention.evaluate.equal_density import REFERENCE, equal_density_table
from seerattention.evaluate.tables import Table, format_length, format_percent
from seerattention.files import write_file

from .results import own_arguments

DOCUMENT = Path(__file__).parents[1] / "docs" / "comparison.md"
BEGIN, END = "<!-- results begin -->", "<!-- results end -->"
OVERVIEW = "<!-- overview begin -->", "<!-- overview end -->"
AGAINST = "<!-- against gates begin -->", "<!-- against gates end -->"
#: Whose maps are kept, as far as they were measured; at the density nearest to this.
MAPS, MAP_DENSITY = (
    ("gates, project", "oracle, project", "xattention, project", "flashprefill, own", "streaming, own"),
    0.1,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.comparison",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="+", help="NAME=FOLDER,FOLDER: what tables call a model; or files of --save")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--save", type=Path, help="folder for the numbers as JSON")
    parser.add_argument("--page", nargs=2, metavar=("NAME", "FILE"), help="the page of one of them, as one HTML file")
    options = parser.parse_args(own_arguments() if arguments is None else arguments)
    found: list[tuple[str, Comparison]] = []
    for given in options.results:
        name, equals, places = given.partition("=")
        paths = [Path(place) for place in (places if equals else given).split(",")]
        name, comparison = name if equals else paths[0].stem, open_comparison(paths)
        if options.save:
            target = options.save / f"{name}.json"
            save_comparison(target, comparison, _shown(comparison), benchmark="comparison")
            Terminal().say(f"written to {target}")
            comparison = load_comparison(target)  # what is shown is what is committed
        found.append((name, comparison))
    text = between(options.document.read_text(), (BEGIN, END), [p for each in found for p in _parts(*each)])
    for marks, tables in ((OVERVIEW, overview), (AGAINST, against_gates)):
        if marks[0] in text:
            text = between(text, marks, [part for each in found for part in tables(*each)])
    write_file(options.document, text)
    Terminal().say(f"written to {options.document}")
    if options.page:
        name, target = options.page
        if name not in dict(found):
            parser.error(f"--page: no results are called {name}; there are {', '.join(dict(found))}")
        build_comparison_report(dict(found)[name], small=True).save(target)
        Terminal().say(f"written to {target}")
    return 0


def _shown(comparison: Comparison) -> list[str]:
    """Settings whose maps are kept."""
    kept = [entry for entry in comparison.entries.values() if entry.maps is not None]
    if not kept:
        return []
    target = min((entry.target for entry in kept), key=lambda value: abs(value - MAP_DENSITY))
    return [f"{name} rule {target:g}" for name in MAPS]


def overview(name: str, comparison: Comparison) -> list[str]:
    """One row a method, a column for each length and density that was asked for: score, rise of perplexity. Nothing of
    comparisons without tasks."""
    columns = [
        (length, target)
        for length in comparison.lengths
        for target in sorted({entry.target for entry in comparison.at(length) if not entry.is_dense})
        if any(entry.tasks is not None for entry in comparison.at(length))
    ]
    if not columns:
        return []
    families = {e.family for length, _ in columns for e in comparison.at(length) if not e.is_dense}
    rows = [["dense", *(_cell(comparison, comparison.dense(length)) for length, _ in columns)]]
    for family in sorted(families, key=_gates_first):
        entries = [
            next((e for e in comparison.at(length) if e.family == family and e.target == target), None)
            for length, target in columns
        ]
        cells = [_cell(comparison, entry) for entry in entries]
        rows.append([f"**{family}**" if family.startswith("gates") else family, *cells])
    return [f"`{name}`", Table(["", *_heads(columns)], rows).markdown().strip()]


def against_gates(name: str, comparison: Comparison) -> list[str]:
    """Of a comparison of texts alone, at equal density: rise of perplexity under the gates; of others, over theirs."""
    if any(entry.tasks is not None for entry in comparison.entries.values()):
        return []
    columns: list[tuple[int, float]] = []
    cells: list[dict[str, str]] = []
    for length in comparison.lengths:
        table = equal_density_table(comparison, length)
        for i in range(1, 0 if table is None else len(table.headers), 2):
            assert table is not None
            columns.append((length, float(table.headers[i].partition(":")[0])))
            cells.append({row[0]: row[i] if row[0] == REFERENCE else row[i + 1] for row in table.rows})
    families = sorted({name: None for each in cells for name in each}, key=lambda n: (n != REFERENCE, _gates_first(n)))
    rows = [
        [f"**{name}, over dense**" if name == REFERENCE else name, *(each.get(name, "-") for each in cells)]
        for name in families
    ]
    heads = ["perplexity over that of the gates", *_heads(columns)]
    return [f"`{name}`", Table(heads, rows).markdown().strip()]


def _gates_first(family: str) -> tuple[bool, str]:
    return not family.startswith("gates"), family


def _heads(columns: Sequence[tuple[int, float]]) -> list[str]:
    """Lengths are said where there are several."""
    several = len({length for length, _ in columns}) > 1
    return [f"{format_length(length)}, {target:g}" if several else f"{target:g}" for length, target in columns]


def _cell(comparison: Comparison, entry: Entry | None) -> str:
    """Score and rise of perplexity."""
    if entry is None:
        return ""
    change = None if entry.is_dense else comparison.loss_change(entry)
    parts = ["" if entry.tasks is None else format_percent(comparison.score(entry))]
    parts.append("" if change is None else relative(change).partition(" [")[0])
    return ", ".join(part for part in parts if part)


def between(text: str, marks: tuple[str, str], parts: Sequence[str]) -> str:
    """The document with these parts between two marks.

    Raises:
        ValueError: a document without the marks.
    """
    before, begin, rest = text.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end:
        raise ValueError(f"the document must hold {marks[0]} and behind it {marks[1]}")
    return f"{before}{begin}\n\n" + "\n\n".join(parts) + f"\n\n{end}{after}"


def _parts(name: str, comparison: Comparison) -> list[str]:
    facts = comparison.facts
    environment = facts.get("environment", {})
    commit = str(environment.get("git_commit"))
    commands = facts.get("commands", [facts.get("command", [])])
    measured = "Commit" if len(commands) == 1 else "The last of these at commit"
    parts = [
        f"### {name}, {machine_name(environment)}",
        f"{measured} {commit[:10]}{' and changes on top of it' if commit.endswith('+') else ''}:",
        "\n".join(f"    {' '.join(command)}" for command in commands),
    ]
    for length in comparison.lengths:
        parts.append(f"#### {format_length(length)} tokens")
        for table in (summary_table(comparison, length), task_table(comparison, length)):
            parts += [table.markdown().strip(), table.caption] if table.rows else []
        equal = equal_density_table(comparison, length)
        parts += [] if equal is None else [equal.markdown().strip(), equal.caption]
    return parts


if __name__ == "__main__":
    sys.exit(main())
