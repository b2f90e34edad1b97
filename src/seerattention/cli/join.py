"""``seer join``: prefill gates of one folder and decode gates of another become one folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .common import errors
from .options import check_output

_SOURCE = "a folder of gates, or its id on the hub (owner/name)."


def command(
    prefill: Annotated[str, typer.Argument(help=f"Gates of prompts: {_SOURCE}")],
    decode: Annotated[str, typer.Argument(help=f"Gates of decoding: {_SOURCE}")],
    destination: Annotated[Path, typer.Argument(help="Folder to write; it may exist.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Put gates that were trained apart into one folder: those of prompts from PREFILL, those of decoding from DECODE.

    Both must be for the same base model. Weights keep their bits, and each phase its policy.
    """
    with errors():
        check_output(destination, "DESTINATION")
        _join(prefill, decode, destination, as_json)


def _join(prefill: str, decode: str, destination: Path, as_json: bool) -> None:
    from rich.console import Console

    from ..files import read_json
    from ..gates.checkpoint import CONFIG_FILE
    from ..gates.sources import join

    folder = join(prefill, decode, destination)
    if as_json:
        print(json.dumps({"path": str(folder), **read_json(folder / CONFIG_FILE)}))
    else:
        Console().print(f"wrote {folder}", markup=False, soft_wrap=True)
