"""``python -m testbed smollm2``: the real pre-trained model as a folder, and what it was made from."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from seerattention.testbed import smollm2


def write(folder: Path) -> None:
    """Build the model in ``folder``, unless it is there; a failure ends the program with a sentence."""
    gguf = smollm2.find_gguf()
    source = f"{gguf.name} of {smollm2.PACKAGE}" if gguf is not None else smollm2.HUB_ID
    known = (folder / "config.json").is_file()
    try:
        smollm2.build(folder)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    typer.echo(f"{folder}: {'was there already' if known else f'made from {source}'}")
