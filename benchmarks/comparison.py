"""The measured part of docs/comparison.md, from folders of ``seer compare``. Nothing is measured here.

    python -m benchmarks.comparison RESULTS [RESULTS ...] --save benchmarks/results/h200/comparison

writes docs/comparison.md between its two marks, and all numbers of the tables with their intervals and origin as JSON,
a file for each model. The losses of all tokens, which a folder holds as well, take too much room to be committed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from seerattention.cli.common import Terminal
from seerattention.evaluate.comparison import Comparison
from seerattention.evaluate.comparison_tables import summary_table, task_table
from seerattention.evaluate.tables import format_length
from seerattention.files import write_file

from .results import own_arguments

DOCUMENT = Path(__file__).parents[1] / "docs" / "comparison.md"
BEGIN, END = "<!-- results begin -->", "<!-- results end -->"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.comparison",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=Path, nargs="+", help="folders that seer compare wrote to")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--names", nargs="+", help="what tables call the models; default: as the runs were given them")
    parser.add_argument("--save", type=Path, help="folder for the numbers as JSON")
    options = parser.parse_args(own_arguments() if arguments is None else arguments)
    names = options.names or [path.name for path in options.results]
    if len(names) != len(options.results):
        parser.error(f"--names has {len(names)} names for {len(options.results)} folders")
    found = [(name, Comparison.read(path)) for name, path in zip(names, options.results, strict=True)]
    write_file(options.document, with_results(options.document.read_text(), found))
    Terminal().say(f"written to {options.document}")
    for name, comparison in found if options.save else ():
        target = options.save / f"{name}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_file(target, json.dumps({"benchmark": "comparison", **comparison.to_dict()}, separators=(",", ":")))
        Terminal().say(f"written to {target}")
    return 0


def with_results(text: str, found: Sequence[tuple[str, Comparison]]) -> str:
    """The document with these results between its marks.

    Raises:
        ValueError: a document without the marks.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document must hold {BEGIN} and behind it {END}")
    parts = [part for name, comparison in found for part in _parts(name, comparison)]
    return f"{before}{BEGIN}\n\n" + "\n\n".join(parts) + f"\n\n{END}{after}"


def _parts(name: str, comparison: Comparison) -> list[str]:
    facts = comparison.facts
    environment = facts.get("environment", {})
    machine = ", ".join(item["name"] for item in environment.get("devices", [])) or environment.get("processor", "")
    parts = [
        f"### {name}, {machine}",
        f"Commit {str(environment.get('git_commit'))[:10]}: `{' '.join(facts['command'])}`",
    ]
    for length in comparison.lengths:
        parts.append(f"#### {format_length(length)} tokens")
        for table in (summary_table(comparison, length), task_table(comparison, length)):
            parts += [table.markdown().strip(), table.caption]
    return parts


if __name__ == "__main__":
    sys.exit(main())
