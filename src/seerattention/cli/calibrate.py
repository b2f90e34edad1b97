"""``seer calibrate``: fit budgets, or one rule, for trained gates on text, and store them with the gates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Terminal, book_tokens, errors, open_data, parse_list, token_count
from .opening import gates_for, open_model
from .options import check_dtype, check_model, check_output, parse_target, whole
from .parameters import Device, Dtype, ModelName, TextField, gates_option, text_option


def command(
    model: ModelName,
    output: Annotated[
        Path, typer.Option(help="Folder to write: the gates with what was fitted. It may be that of --gates.")
    ],
    gates: Annotated[str | None, gates_option()] = None,
    data: Annotated[str | None, text_option("Text that the gates were not trained on", "training")] = None,
    length: Annotated[str, typer.Option(help="Tokens a prompt, the longest that matters (16K).")] = "32K",
    sequences: Annotated[int, typer.Option(help="Prompts to read; a few do.")] = 4,
    densities: Annotated[
        str | None, typer.Option(help="What to fit, as 0.1,0.2. Default: from 0.05 to 0.5, as far as prompts reach.")
    ] = None,
    shortest: Annotated[
        str | None,
        typer.Option(
            help="Tokens of the shortest prompt that is held to a density, from 4K (the default) to --length. Shorter "
            "ones are denser, and long ones lose less the longer it is."
        ),
    ] = None,
    relative_threshold: Annotated[
        str | None,
        typer.Option(
            help="A density: fit not budgets but the one RelativeThreshold that has it in prompts of --length. The "
            "gates are attached with it then where nothing else is asked for; budgets that they have stay."
        ),
    ] = None,
    by_layer: Annotated[
        bool,
        typer.Option(
            help="Also find out what a block is worth in each layer, and spend more where it is more: less is lost at "
            "the same density. Each prompt is read twice more for each layer."
        ),
    ] = True,
    text_field: TextField = "text",
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print what was fitted as JSON.")] = False,
) -> None:
    """Fit budgets, so that seerattention.attach(model, OUTPUT, density=0.1) spends that density at every length.

    The prompts are read five times, and twice for each layer (--no-by-layer: twice). seer distill does this at its
    end, at the length that it trains at; do it again for longer prompts, or on texts like yours.

    With --relative-threshold one rule is fitted for one length instead, which loses less of a text as a whole and more
    of what its last rows look up (docs/density.md).
    """
    with errors():
        terminal = Terminal(as_json)
        tokens = token_count(length, "--length")
        least = 4096 if shortest is None else token_count(shortest, "--shortest", minimum=4096)
        if shortest is not None and least > tokens:
            raise ValueError(f"--shortest must not be longer than the prompts (--length {length}), got {shortest}")
        whole("--sequences", sequences)
        asked = None if densities is None else parse_list(densities, parse_target, "densities")
        rule = (
            None if relative_threshold is None else parse_list(relative_threshold, parse_target, "relative-threshold")
        )
        if rule is not None and (len(rule) != 1 or densities is not None or shortest is not None):
            raise ValueError(
                "--relative-threshold takes one density, for one length, without --densities and --shortest, which are "
                f"for budgets; got --relative-threshold {relative_threshold}"
            )
        folder = gates_for(check_model(model), gates)
        check_dtype(dtype)
        check_output(output)
        documents = open_data(data, model, text_field)
        loaded, tokenizer = open_model(terminal, model, device, dtype)

        from .. import hf
        from ..evaluate.perplexity import cut_documents
        from ..gates.sources import store_budgets, store_policy
        from ..measure.calibrate import calibrate, readings
        from ..policies import RelativeThreshold

        texts = book_tokens(documents, model, tokenizer, limit=2 * sequences * tokens, split="train")
        prompts = cut_documents(texts, tokens, sequences, bos=tokenizer.bos_token_id)
        hf.attach(loaded, folder, min_context=0)
        times = readings(loaded, by_layer=by_layer)
        with terminal.progress(
            f"reading {sequences} prompts of {tokens} tokens, {times} times", sequences * times
        ) as on:
            how: dict[str, Any] = {"densities": asked, "shortest": least}
            if rule is not None:
                how = {"density": rule[0], "policy": RelativeThreshold(1.0)}
            found: Any = calibrate(loaded, list(prompts.split(1)), by_layer=by_layer, advance=on, **how)
        # Not hf.save_gates: the weights stay those of the folder, bit by bit, in their own precision.
        if rule is None:
            store_budgets(folder, output, found)
            known = ", ".join(f"{density:g}" for density in found.densities)
            said = f"budgets for densities {known}; the default is {found.default:g}"
        else:
            store_policy(folder, output, found)
            layers = " with factors by layer" if found.layers else ""
            said = f"RelativeThreshold({found.factor:.3g}){layers} is the default, {rule[0]:g} of prompts of {length}"
        terminal.say(f"wrote {output}: {said}")
        emitted: dict[str, Any] = {"model": model, "gates": folder, "output": str(output), **found.to_dict()}
        terminal.emit(emitted)
