"""Write the table of prompt lengths from which on sparse prefill pays, from committed results of ``benchmarks.host``.

    python -m benchmarks.crossings            # writes src/seerattention/hf/crossings.py
    python -m benchmarks.crossings --check    # whether it is what the results say; exit status 1 if not

Of every model on every device, with the most layers that were measured: the shortest measured length from which on a
sparse forward, eager and at the density that the results have most of, was no slower than a dense one at any measured
length; twice the longest where it was slower there.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seerattention.cli.common import Terminal
from seerattention.evaluate.crossing import pays_from
from seerattention.files import write_file
from seerattention.hf import crossings
from seerattention.hf.min_context import Shape

from .models import MODELS
from .results import ROOT, latest_results, own_arguments

TARGET = Path(crossings.__file__)


def rows(results: Sequence[dict[str, Any]]) -> list[tuple[str, int, int, int]]:
    """The table's lines of one device, from results of ``benchmarks.host``."""
    eager = [result for result in results if "way" not in result["case"]]
    if not eager:
        return []
    density, _ = Counter(result["case"]["density"] for result in eager).most_common(1)[0]
    found: dict[str, dict[int, float]] = {}
    # Of models that were measured whole and with few layers the former count: short kernels leave a device half asleep.
    for result in sorted(eager, key=lambda result: result["case"].get("layers", 0)):
        case = result["case"]
        if case["density"] == density and case["model"] in MODELS and case["model"] != "tiny":
            found.setdefault(case["model"], {})[case["length"]] = result["metrics"]["model_speedup"]
    lines = [(name, *Shape.of(MODELS[name].config()), pays_from(speedups)) for name, speedups in found.items()]
    return sorted(lines, key=lambda line: line[1:])


def source(root: Path = ROOT) -> str:
    """The module that holds the table, as the results under ``root`` say."""
    before = TARGET.read_text().split("CROSSINGS:")[0]
    lines = ["CROSSINGS: dict[str, list[tuple[str, int, int, int]]] = {"]
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        table = rows(latest_results(folder, "host"))
        if table:
            entries = [f'        ("{name}", {work}, {width}, {length}),' for name, work, width, length in table]
            lines += [f'    "{folder.name}": [', *entries, "    ],"]
    return before + ("\n".join([*lines, "}"]) if len(lines) > 1 else lines[0] + "}") + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.crossings", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(own_arguments() if arguments is None else arguments)
    text = source()
    if options.check:
        return int(text != TARGET.read_text())
    write_file(TARGET, text)
    Terminal().say(f"written to {TARGET}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
