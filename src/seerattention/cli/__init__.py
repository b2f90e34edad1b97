"""The command line, ``seer``: one module per command, imported only when its command runs.

To add a command, write ``cli/<module>.py`` with a typer function ``command`` (its docstring is the help) and list it in
``COMMANDS``.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

COMMANDS = [
    # name, module, one line of help
    ("demo", "demo", "Distil gates on the embedded model and compare dense and sparse prefill."),
    ("distill", "distill", "Train gates for a model on your data."),
    ("eval", "eval", "Perplexity and retrieval, dense beside sparse."),
    ("inspect", "inspect", "Pictures of true and predicted attention maps."),
    ("convert", "convert", "Turn a published AttnGates folder into this package's layout."),
    ("env", "env", "Versions and devices, for bug reports."),
]


def main() -> None:
    """Entry point of ``seer``."""
    import click
    import typer

    class Commands(click.Group):
        def list_commands(self, ctx: click.Context) -> list[str]:
            return [name for name, module, _ in COMMANDS if _exists(module)]

        def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
            module = next((module for known, module, _ in COMMANDS if known == name), None)
            if module is None or not _exists(module):
                return None
            return _command(module, name)

        def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
            with formatter.section("Commands"):
                formatter.write_dl([(name, text) for name, module, text in COMMANDS if _exists(module)])

    def _command(module: str, name: str) -> Any:
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command(name)(importlib.import_module(f".{module}", __name__).command)
        return typer.main.get_command(app)

    Commands(
        name="seer",
        help="SeerAttention: learned block-sparse attention for long prompts of Hugging Face models.",
        no_args_is_help=True,
    )()


def _exists(module: str) -> bool:
    return importlib.util.find_spec(f"{__name__}.{module}") is not None
