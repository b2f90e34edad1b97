"""``python -m testbed smollm2`` and ``smollm2-gates``: the real pre-trained model as a folder, and gates for it."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from seerattention.gates.checkpoint import read_checkpoint, write_checkpoint
from seerattention.gates.sources import notes_of
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


def embed_gates(source: Path, target: Path) -> int:
    """Write trained gates as the package embeds them, compressed without loss; returns their size on disk.

    Raises:
        FileNotFoundError, DamagedFileError: ``source`` holds no valid gates.
        ValueError: they are those of another model.
    """
    checkpoint = read_checkpoint(source)
    if checkpoint.base_model.get("name") != smollm2.HUB_ID:
        raise ValueError(
            f"{source} holds gates for {checkpoint.base_model.get('name')}, not for {smollm2.HUB_ID}; distil them with "
            "`seer distill --model smollm2`"
        )
    write_checkpoint(target, checkpoint, packed=True, notes=notes_of(source))
    return sum(path.stat().st_size for path in target.iterdir())
