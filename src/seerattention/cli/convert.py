"""``seer convert``: a published AttnGates folder becomes a folder of this package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .common import errors
from .options import check_output


def command(
    source: Annotated[str, typer.Argument(help="Published AttnGates folder, or its id on the hub (owner/name).")],
    destination: Annotated[Path, typer.Argument(help="Folder to write; it may exist.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Turn a published AttnGates folder (config.json with seerattn_* fields, attn_gate_weights.pth) into
    gate_config.json + gates.safetensors. Weights keep their bits."""
    with errors():
        check_output(destination, "DESTINATION")
        _convert(source, destination, as_json)


def _convert(source: str, destination: Path, as_json: bool) -> None:
    from rich.console import Console

    from ..files import read_json
    from ..gates.checkpoint import CONFIG_FILE
    from ..gates.sources import convert

    folder = convert(source, destination)
    description = read_json(folder / CONFIG_FILE)
    if as_json:
        print(json.dumps({"path": str(folder), **description}))
    else:
        wrote = f"wrote {folder} (gates {description['gates']}, policy {description['policies']['prefill']})"
        Console().print(wrote, markup=False, soft_wrap=True)
