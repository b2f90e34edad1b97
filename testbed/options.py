"""Options that several commands of ``python -m testbed`` share, and those that take a sentence to say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Data = Annotated[
    list[str],
    typer.Option(help="Texts: .jsonl, .txt (also .zst), a folder of them, or a Hugging Face dataset id. Repeatable."),
]
HeldOut = Annotated[list[str], typer.Option(help="Texts for evaluation only, as --data.")]
Out = Annotated[Path, typer.Option(help="Folder of the run.")]
Seed = Annotated[int, typer.Option(help="Of weights, batches and gates.")]
Width = Annotated[int, typer.Option(help="Hidden size.")]
MlpWidth = Annotated[int, typer.Option(help="0: two and a half times the width.")]
Optimizer = Annotated[str, typer.Option(help="adamw or muon")]
RateScale = Annotated[float, typer.Option(help="Scales the learning rates of the phases without 'most'.")]
Phases = Annotated[
    str, typer.Option(help='JSON list, e.g. [{"context":128,"share":1,"tokens":4096,"rate":3e-4,"drills":1}]')
]
Mix = Annotated[
    str,
    typer.Option(
        help="JSON object: how often each form is drawn, in phases that do not say their own (default: the package's)."
    ),
]
Templates = Annotated[
    Path | None, typer.Option(help="JSON list of [statement, question] with {key} and {value}: other needle sentences.")
]
ReportEvery = Annotated[int, typer.Option(help="Steps between two lines of log.jsonl.")]
Start = Annotated[
    Path | None, typer.Option(help="Folder of a model to train on, instead of a new one; its shape counts.")
]
LookUp = Annotated[
    str,
    typer.Option(
        help="Layers that see far while the drills last, so that look-up forms there: 2,3 is easy on gates, 1 is hard; "
        "all: chance decides."
    ),
]
Retries = Annotated[int, typer.Option(help="Begin again with the next seed that often if look-up does not form.")]
Least = Annotated[
    float,
    typer.Option(
        help="Stop before the gates if the dense model answers less than this share of single, multikey or keyvalue at "
        "the shortest length of the evaluation; 0: go on anyway."
    ),
]
Form = Annotated[
    str | None,
    typer.Option(
        help="Of the gates. Of prompts: mass (the default), sub-blocks of 4 tokens whose tiles are scored by their "
        "mass; sub_block, of 8 tokens by their maximum, which choose faster; paper. Of decoding: sub_block (the "
        "default), paper."
    ),
]
GateBooks = Annotated[
    list[Path] | None,
    typer.Option(
        help="Training books, or held-out ones: token files (.u16) or texts. Repeatable. Default: those of the package."
    ),
]
