"""``seer demo``: the main job, end to end, on one of the testbed's models."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated

import typer

from ..testbed import MODELS
from .common import Terminal, book_tokens, default_gates, errors, log_level, resolve_device
from .opening import load_model
from .options import check_output, check_seed, real, say_unused
from .parameters import Json

DEMO_MINUTES = 7.0  # on 2 CPU cores; the help below and the README say so too, and a test compares them
#: What is said where a model comes without gates.
NO_COMMITTED = (
    "This version comes without gates for {model}, so there are no 'committed' ones: the fresh ones are all, and a few "
    "steps are far too little for good gates."
)
_TRAIN_TOKENS = 400_000
_TEST_TOKENS = 400_000


def command(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Option(help="testbed (the embedded model), or smollm2, a real pre-trained one."),
    ] = "testbed",
    output: Annotated[
        Path, typer.Option(help="Folder for the report (index.html), the numbers (results.json) and the fresh gates.")
    ] = Path("report"),
    device: Annotated[str, typer.Option(help="auto (the GPU if there is one), cpu, cuda, cuda:1, ...")] = "auto",
    minutes: Annotated[
        float, typer.Option(help="Time to fill with measurement; the number of samples follows from it.")
    ] = DEMO_MINUTES,
    seed: Annotated[int, typer.Option(help="Seed of fresh gates, training text and retrieval tasks.")] = 0,
    fast: Annotated[
        bool,
        typer.Option("--fast", help="A smoke test: short prompts and hardly any samples. Its numbers mean little."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Watch SeerAttention do its job on a small language model that comes with the package.

    Distils fresh gates from the model's own attention, prefills long prompts densely and block-sparsely with the fresh
    and with the committed gates, and prints one table: density, prefill time, perplexity and retrieval accuracy.
    Writes a self-contained report with plots and attention maps. Needs no download; about 7 minutes on 2 CPU cores,
    less on a GPU.
    """
    # A run this short leaves layers that "do not seem to learn"; the table of block recall says so better.
    with errors(), log_level("seerattention.distillation", logging.ERROR):
        terminal = Terminal(as_json)
        real("--minutes", minutes, 0.1)
        check_seed(seed)
        if model not in MODELS:
            raise ValueError(
                f"--model must be {' or '.join(MODELS)}, got {model!r}; for a model of your own use seer distill and "
                "seer eval"
            )
        check_output(output)
        if fast:
            say_unused(context, terminal, ("minutes",), "--fast makes one round")
        chosen = resolve_device(device)
        try:
            gates = default_gates(model)
        except FileNotFoundError:  # the demo distils gates of its own
            gates = None
            terminal.say(NO_COMMITTED.format(model=model))
        terminal.say(f"loading the model {model} on {chosen}")
        loaded, tokenizer = load_model(model, chosen)

        from ..files import write_file
        from .demo_compare import compared_table
        from .demo_job import DemoBooks, run_demo
        from .demo_plan import DemoPlan
        from .demo_report import build_report, demo_to_dict, recall_table, result_table

        plan = DemoPlan.choose(chosen, fast, 60.0 * minutes, model)
        train = book_tokens(None, model, tokenizer, limit=_TRAIN_TOKENS, split="train")
        test = book_tokens(None, model, tokenizer, limit=_TEST_TOKENS)
        output.mkdir(parents=True, exist_ok=True)
        result = run_demo(
            loaded,
            tokenizer,
            gates,
            DemoBooks(train, test),
            plan,
            folder=output,
            seed=seed,
            progress=terminal.progress,
        )
        terminal.table(recall_table(result))
        terminal.table(result_table(result, plan))
        terminal.table(compared_table(result.compared))
        page = build_report(result, plan, seed=seed, device=chosen, fast=fast).save(output / "index.html")
        numbers = demo_to_dict(result, plan, seed)
        write_file(output / "results.json", json.dumps(numbers, indent=2, allow_nan=False) + "\n")
        terminal.say(f"report: {page}")
        terminal.emit(numbers)
