"""``seer inspect``: pictures of what each head attends to, what its gate predicts, and which blocks are read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import common
from .opening import gates_for, open_model
from .options import check_dtype, check_model, check_output, named, parse_index, say_unused
from .parameters import Device, Dtype, ModelName, gates_option, text_option

if TYPE_CHECKING:
    import torch

    from ..distillation.documents import Documents
    from ..policies import Policy


def command(
    context: typer.Context,
    model: ModelName = "testbed",
    gates: Annotated[str | None, gates_option()] = None,
    text: Annotated[Path | None, typer.Option(help="Text file to read as the prompt; see also --data.")] = None,
    length: Annotated[str, typer.Option(help="Use at most this many tokens (4096 or 4K).")] = "4K",
    data: Annotated[str | None, text_option("Where the prompt comes from without --text")] = None,
    density: Annotated[
        float | None,
        typer.Option(
            help="This density, by the budgets stored with the gates, or top-k. Default: the policy stored with them."
        ),
    ] = None,
    layers: Annotated[str, typer.Option(help="Layers to draw, e.g. 0,5,11, or 'all'.")] = "all",
    heads: Annotated[str, typer.Option(help="Query heads to draw, e.g. 0,3, or 'all'.")] = "0",
    output: Annotated[Path, typer.Option(help="Folder for index.html and one PNG a layer.")] = Path("inspect"),
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Write recall and density of every head to stdout as JSON.")
    ] = False,
) -> None:
    """Draw, for each layer and head, the true pooled attention map beside the gate's prediction and the blocks read.

    Also shows the block recall of every head: the share of the true attention mass inside the blocks that are read.
    Each layer is judged on what the sparse layers before it produced.
    """
    with common.errors():
        terminal = common.Terminal(as_json)
        wanted_layers = None if layers == "all" else common.parse_list(layers, parse_index, "layers")
        wanted_heads = None if heads == "all" else common.parse_list(heads, parse_index, "heads")
        tokens = common.token_count(length, "--length")

        from ..policies import TopK

        with named("--density"):
            policy: Policy | None = None if density is None else TopK(density)
        if text is not None and not text.is_file():
            raise FileNotFoundError(f"--text: no such file: {text}")
        if text is not None:
            say_unused(context, terminal, ("data",), "--text is the prompt")
        folder = gates_for(model, gates)
        check_model(model)
        check_dtype(dtype)
        check_output(output)
        if density is not None:
            policy = common.spending(folder, [density], terminal)[density]
        documents = None if text is not None else common.open_data(data, model)
        loaded, tokenizer = open_model(terminal, model, device, dtype)
        prompt = _prompt(text, documents, model, tokenizer, tokens)

        from .. import hf
        from ..evaluate.maps import inspect_attention

        hf.attach(loaded, folder, prefill=policy, min_context=0)
        terminal.say(f"running {prompt.shape[1]} tokens")
        inspection = inspect_attention(loaded, prompt, layers=wanted_layers, heads=wanted_heads)
        terminal.table(_recall_table(inspection))
        page = _write(inspection, output, model=model, gates=folder, tokens=prompt.shape[1])
        terminal.say(f"report: {page}")
        terminal.emit(
            {
                "model": model,
                "gates": folder,
                "tokens": prompt.shape[1],
                "recall": _plain(inspection.recall),
                "density": _plain(inspection.density),
            }
        )


def _prompt(text: Path | None, documents: Documents | None, model: str, tokenizer: Any, tokens: int) -> torch.Tensor:
    import torch

    if text is not None:
        from ..distillation.text_files import read_text

        content = read_text(text)
        ids = tokenizer(content[: 32 * tokens], verbose=False)["input_ids"]
        if len(ids) < 2:
            raise ValueError(f"--text: {text} holds less than two tokens")
        return torch.tensor([ids[:tokens]])
    books = common.book_tokens(documents, model, tokenizer, limit=tokens)
    longest = max(books, key=len)
    if len(longest) < 2:
        raise ValueError("--data: no text in it has two tokens or more")
    return torch.from_numpy(longest[None, :tokens])


def _recall_table(inspection: Any) -> Any:
    import numpy as np

    from ..evaluate.tables import Table, format_density

    rows = []
    for layer, (recall, density) in enumerate(zip(inspection.recall, inspection.density, strict=True)):
        if np.isnan(recall).all():
            rows.append([str(layer), "-", "sliding window", "-", "-"])
            continue
        worst = int(np.nanargmin(recall))
        rows.append(
            [
                str(layer),
                format_density(float(density.mean())),
                f"{recall.mean():.3f}",
                f"{recall[worst]:.3f}",
                str(worst),
            ]
        )
    caption = "Block recall: share of the true attention mass inside the blocks that are read."
    return Table(["layer", "density", "block recall", "worst head", "which"], rows, caption)


def _write(inspection: Any, output: Path, **facts: Any) -> Path:
    from ..evaluate.maps import draw_maps, draw_recall
    from ..evaluate.report import Report

    output.mkdir(parents=True, exist_ok=True)
    report = Report(f"What {facts['model']} attends to", f"{facts['tokens']} tokens, gates from {facts['gates']}.")
    report.section("Block recall")
    report.text(
        "Share of the true attention mass inside the blocks that are read, for every head. Each layer sees what the "
        "sparse layers before it produced."
    )
    report.table(_recall_table(inspection))
    report.figure(draw_recall(inspection.recall), alt="block recall of each layer and head, in per cent")
    for layer in dict.fromkeys(item.layer for item in inspection.maps):
        figure = draw_maps([item for item in inspection.maps if item.layer == layer], inspection.block_size)
        figure.savefig(output / f"layer-{layer:02d}.png", dpi=150)
        report.section(f"Layer {layer}")
        report.figure(figure, alt=f"true map, gate's prediction and blocks read in layer {layer}")
    report.section("How to read the maps")
    report.text(
        f"Rows are query blocks, columns key blocks, {inspection.block_size} tokens each; colours are shares of a row "
        "on a logarithmic scale. Left: the true attention map, the maximum in each block, rows normalised (what gates "
        "are trained to predict). Middle: the gate's prediction. Right: the blocks that are read, coloured by the "
        "true map; grey blocks are skipped."
    )
    return report.save(output / "index.html")


def _plain(values: Any) -> list[list[float | None]]:
    return [[None if value != value else float(value) for value in row] for row in values]
