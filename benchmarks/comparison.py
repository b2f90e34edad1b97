"""The measured part of docs/comparison.md, from folders of ``seer compare``. Nothing is measured here.

    python -m benchmarks.comparison RESULTS [RESULTS ...]          # writes docs/comparison.md between its two marks

Every table says what model, machine and commit it comes from; the folders are to be committed under
``benchmarks/results/<device>/``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from seerattention.cli.common import Terminal
from seerattention.evaluate.comparison import Comparison, summary_table, task_table
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
    options = parser.parse_args(own_arguments() if arguments is None else arguments)
    text = options.document.read_text()
    write_file(options.document, with_results(text, [(path, Comparison.read(path)) for path in options.results]))
    Terminal().say(f"written to {options.document}")
    return 0


def with_results(text: str, found: Sequence[tuple[Path, Comparison]]) -> str:
    """The document with these results between its marks.

    Raises:
        ValueError: a document without the marks.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document must hold {BEGIN} and behind it {END}")
    parts = [part for path, comparison in found for part in _parts(path, comparison)]
    return f"{before}{BEGIN}\n\n" + "\n\n".join(parts) + f"\n\n{END}{after}"


def _parts(path: Path, comparison: Comparison) -> list[str]:
    facts = comparison.facts
    environment = facts.get("environment", {})
    machine = ", ".join(item["name"] for item in environment.get("devices", [])) or environment.get("processor", "")
    parts = [
        f"### {facts.get('model')}, {machine}",
        f"`{path.as_posix()}`, commit {str(environment.get('git_commit'))[:10]}: `{' '.join(facts['command'])}`",
    ]
    for length in comparison.lengths:
        parts.append(f"#### {format_length(length)} tokens")
        for table in (summary_table(comparison, length), task_table(comparison, length)):
            parts += [table.markdown().strip(), table.caption]
    return parts


if __name__ == "__main__":
    sys.exit(main())
