"""Options that several commands have: what ``typer`` is told of them.

Types are options that say the same everywhere; functions make one whose help begins with what the command does with it.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

__all__ = [
    "BatchSize",
    "BlockSize",
    "Device",
    "Dtype",
    "Json",
    "ModelName",
    "TextField",
    "UnseenText",
    "gates_option",
    "text_option",
]

ModelName = Annotated[
    str, typer.Option(help="Hugging Face model folder or id, 'testbed' for the embedded model, or 'smollm2'.")
]
Dtype = Annotated[
    str, typer.Option(help="bfloat16, float16, float32, or auto: as stored, but float32 as bfloat16 on a GPU.")
]
Device = Annotated[str, typer.Option(help="auto (the GPU if there is one), cpu, cuda, ...")]
TextField = Annotated[str, typer.Option(help="Key of the text in JSON lines and datasets.")]
BatchSize = Annotated[int, typer.Option(help="Prompts a forward.", min=1)]
BlockSize = Annotated[int, typer.Option(help="Tokens a block: 32, 64 or 128.")]
Json = Annotated[
    bool, typer.Option("--json", help="Write the results to stdout as JSON; everything else goes to stderr.")
]


def gates_option(besides: str = "") -> Any:
    """``--gates`` of trained gates, which :func:`~seerattention.cli.opening.gates_for` looks up.

    Args:
        besides: what else it takes.
    """
    return typer.Option(help=f"Folder or hub id of trained gates{besides}. Default for testbed and smollm2: their own.")


def text_option(purpose: str, books: str = "test") -> Any:
    """``--data``, which :func:`~seerattention.cli.common.open_data` opens.

    Args:
        purpose: what the text is for, or which text may be taken.
        books: split of the testbed's books that is read where nothing is given.
    """
    return typer.Option(
        help=f"{purpose}: .txt or .jsonl (also .zst), a folder of them, or a dataset id. Default for testbed and "
        f"smollm2: the testbed's {books} books."
    )


UnseenText = Annotated[str | None, text_option("Text that the model was not trained on, for haystacks and perplexity")]
