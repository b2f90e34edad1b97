"""``seer convert``: a published AttnGates folder becomes a folder of this package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def command(
    source: Annotated[str, typer.Argument(help="Published AttnGates folder, or its id on the hub (owner/name).")],
    destination: Annotated[Path, typer.Argument(help="Folder to write; it may exist.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Turn a published AttnGates folder (config.json with seerattn_* fields, attn_gate_weights.pth) into
    gate_config.json + gates.safetensors. Weights keep their bits."""
    from rich.console import Console

    from ..files import read_json
    from ..gates.checkpoint import CONFIG_FILE
    from ..gates.sources import convert

    try:
        folder = convert(source, destination)
    except (OSError, ValueError, NotImplementedError) as error:
        Console(stderr=True).print(f"seer convert: {error}", style="red", markup=False)
        raise typer.Exit(1) from error
    description = read_json(folder / CONFIG_FILE)
    if as_json:
        print(json.dumps({"path": str(folder), **description}))
    else:
        Console().print(f"wrote {folder} (gates {description['gates']}, policy {description['policies']['prefill']})")
