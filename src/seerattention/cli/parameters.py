"""Options that several commands have: what ``typer`` is told of them."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["Device", "Dtype", "ModelName", "TextField"]

ModelName = Annotated[
    str, typer.Option(help="Hugging Face model folder or id, 'testbed' for the embedded model, or 'smollm2'.")
]
Dtype = Annotated[
    str, typer.Option(help="bfloat16, float16, float32, or auto: as stored, but float32 as bfloat16 on a GPU.")
]
Device = Annotated[str, typer.Option(help="auto (the GPU if there is one), cpu, cuda, ...")]
TextField = Annotated[str, typer.Option(help="Key of the text in JSON lines and datasets.")]
