"""The command line, ``seer``: one module per command, imported only when its command runs.

To add a command, write ``cli/<module>.py`` with a typer function ``command`` (its docstring is the help) and list it in
``COMMANDS``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

COMMANDS = [
    # name, module, one line of help
    ("demo", "demo", "Distil gates on the embedded model and compare dense and sparse prefill."),
    ("distill", "distill", "Train gates for a model on your data."),
    ("calibrate", "calibrate", "Fit budgets for trained gates: what spends a density at every length."),
    ("eval", "eval", "Perplexity and retrieval, dense beside sparse."),
    ("compare", "compare", "Gates beside training-free methods and oracles, at equal density, on long-context tasks."),
    ("report", "report", "One page of what seer compare found."),
    ("inspect", "inspect", "Pictures of true and predicted attention maps."),
    ("bench", "bench", "Dense beside sparse attention on this device: from which length on sparse pays."),
    ("convert", "convert", "Turn a published AttnGates folder into this package's layout."),
    ("join", "join", "Put prefill gates and decode gates that were trained apart into one folder."),
    ("env", "env", "Versions and devices, for bug reports."),
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``seer``; ``arguments`` default to those of the process."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    chosen = next((argument for argument in given if not argument.startswith("-")), None)
    build(chosen)(given)


def build(chosen: str | None) -> Any:
    """The typer application; only the command named ``chosen`` is imported, the others are there to be listed."""
    import typer

    app = typer.Typer(
        name="seer",
        help="SeerAttention: learned block-sparse attention for long prompts of Hugging Face models.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
    )
    for name, module, text in COMMANDS:
        if name == chosen:
            app.command(name)(importlib.import_module(f".{module}", __name__).command)
        else:
            app.command(name, help=text)(_listed_only)
    return app


def _listed_only() -> None:
    raise RuntimeError("a command was run without having been imported")  # main() imports the one that it runs
