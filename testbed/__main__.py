"""``python -m testbed``: from texts to a long-context language model, step by step or in one command."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)

Data = Annotated[list[str], typer.Option(help="Texts: .jsonl, .txt (also .zst), a folder of them, or a Hugging Face dataset id. Repeatable.")]
Out = Annotated[Path, typer.Option(help="Folder of the run.")]


def _texts(sources: list[str], text_field: str) -> Iterator[str]:
    from seerattention.distill.documents import open_documents

    for source in sources:
        yield from open_documents(source, text_field=text_field)(0)


@app.command()
def tokenizer(data: Data, out: Out, vocab_size: int = 8192, characters: float = 30e6, text_field: str = "text", seed: int = 7) -> None:
    """Train the tokenizer on a sample of the texts, taken in turn from every source."""
    from .data import train_tokenizer

    out.mkdir(parents=True, exist_ok=True)

    def in_turn() -> Iterator[str]:
        streams = [_texts([source], text_field) for source in data]
        while streams:
            for stream in list(streams):
                text = next(stream, None)
                if text is None:
                    streams.remove(stream)
                else:
                    yield text

    train_tokenizer(in_turn(), vocab_size, out, characters, seed)


@app.command()
def tokens(data: Data, out: Out, name: str = "train", text_field: str = "text") -> None:
    """Tokenise texts into OUT/NAME.u16. Training reads every train*.u16, also those that arrive while it runs."""
    from transformers import AutoTokenizer

    from .data import tokenise

    total = tokenise(_texts(data, text_field), AutoTokenizer.from_pretrained(out), out / f"{name}.u16")
    typer.echo(f"{out / name}.u16: {total / 1e6:.1f} M tokens")


@app.command()
def train(
    out: Out,
    minutes: float = 10.0,
    seed: int = 11,
    width: int = 384,
    layers: int = 8,
    heads: int = 8,
    kv_heads: int = 2,
    head_dim: int = 64,
    mlp_width: int = 960,
    optimizer: Annotated[str, typer.Option(help="adamw or muon")] = "adamw",
    rate_scale: Annotated[float, typer.Option(help="Scales the learning rates of the long phases.")] = 1.0,
    muon_ratio: float = 5.0,
    phases: Annotated[str, typer.Option(help='JSON list of phases, e.g. [{"context":128,"share":1,"tokens":4096,"rate":3e-4,"drills":1}]')] = "",
    task_mix: Annotated[str, typer.Option(help="JSON object: relative frequencies of task forms.")] = "",
    device: str = "cuda",
    workers: int = 14,
    stop_above: float = 5.5,
) -> None:
    """Train (or resume) in OUT, which holds the tokenizer and train*.u16. About 17 M parameters by default."""
    from transformers import AutoTokenizer

    from .model import ModelConfig
    from .training import Phase, TrainConfig
    from .training import train as run

    extra: dict[str, Any] = {}
    if phases:
        extra["phases"] = tuple(Phase(**phase) for phase in json.loads(phases))
    if task_mix:
        extra["task_mix"] = json.loads(task_mix)
    config = TrainConfig(
        seconds=minutes * 60, seed=seed, optimizer=optimizer, rate_scale=rate_scale, muon_ratio=muon_ratio, workers=workers, stop_above=stop_above, **extra
    )
    vocabulary = len(AutoTokenizer.from_pretrained(out))
    model = ModelConfig(vocabulary, width, layers, heads, kv_heads, head_dim, mlp_width, max_context=max(p.context for p in config.phases))
    summary = run(out, model, config, device)
    typer.echo(json.dumps({k: v for k, v in summary.items() if k != "settings"}))


@app.command()
def evaluate(
    model: Annotated[Path, typer.Option(help="Folder of the trained model, in Hugging Face format.")],
    books: Annotated[list[Path], typer.Option(help="Token files (.u16) of books not used in training. Repeatable.")],
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    lengths: Annotated[list[int] | None, typer.Option(help="Context lengths; default 16384 and 32768.")] = None,
    samples: Annotated[int, typer.Option(help="Questions per task and length.")] = 512,
    batch_tokens: int = 131_072,
    device: str = "cuda",
) -> None:
    """Score the dense model: retrieval by task and length, and the loss of book text by position."""
    from .evaluate import evaluate as run

    out.parent.mkdir(parents=True, exist_ok=True)
    results = run(model, books, lengths or [16_384, 32_768], samples, batch_tokens, device)
    out.write_text(json.dumps(results, indent=1))


@app.command()
def gates(
    model: Annotated[Path, typer.Option(help="Folder of the trained model.")],
    books: Annotated[list[Path], typer.Option(help="Token files (.u16) of training books. Repeatable.")],
    held_out: Annotated[list[Path], typer.Option(help="Token files of books not used in training. Repeatable.")],
    out: Annotated[Path, typer.Option(help="Folder for the gates.")],
    steps: int = 300,
    length: int = 16_384,
    batch_size: int = 8,
    rate: float = 1e-3,
    rows: Annotated[float, typer.Option(help="Share of query-block rows in each step's loss.")] = 0.5,
    seed: int = 0,
    device: str = "cuda",
) -> None:
    """Distil the gates of a trained testbed model."""
    from .gates import distil

    summary = distil(
        model, books, held_out, out, steps=steps, length=length, batch_size=batch_size, rate=rate, rows=rows, seed=seed, device=device
    )
    typer.echo(json.dumps({"first loss": summary["loss"][0], "last loss": summary["loss"][-1], "recall": summary["recall"]}))


@app.command()
def curves(out: Out, picture: Annotated[Path, typer.Option(help="PNG to write.")]) -> None:
    """Draw the curves of OUT/log.jsonl."""
    from .evaluate import draw_curves

    draw_curves(out / "log.jsonl", picture)


@app.command(name="all")
def everything(
    data: Data,
    out: Out,
    held_out: Annotated[list[str], typer.Option(help="Texts for evaluation, as --data.")],
    minutes: float = 10.0,
    vocab_size: int = 8192,
    seed: int = 11,
    width: int = 384,
    layers: int = 8,
    text_field: str = "text",
    device: str = "cuda",
) -> None:
    """Tokenizer, tokens, training, curves and evaluation in one go."""
    tokenizer(data, out, vocab_size=vocab_size, text_field=text_field)
    tokens(data, out, name="train", text_field=text_field)
    tokens(held_out, out, name="test", text_field=text_field)
    train(out, minutes=minutes, seed=seed, width=width, layers=layers, device=device)
    AutoCopy.tokenizer(out)
    curves(out, out / "curves.png")
    evaluate(out / "model", [out / "test.u16"], out / "dense.json", device=device)


class AutoCopy:
    """Puts the tokenizer beside the exported model."""

    @staticmethod
    def tokenizer(out: Path) -> None:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(out).save_pretrained(out / "model")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    app()
