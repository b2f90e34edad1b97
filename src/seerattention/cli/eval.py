"""``seer eval``: retrieval, perplexity and prefill time of a model, dense beside sparse, density beside every score."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    Terminal,
    book_tokens,
    default_gates,
    errors,
    load_model,
    open_data,
    parse_list,
    resolve_device,
    token_count,
)
from .options import check_dtype, check_gates, check_model, check_output, check_seed, parse_density, parse_threshold

if TYPE_CHECKING:
    import numpy as np

    from ..evaluate import PerplexityResult, Report, RetrievalResult, Setting, TimingResult

_MEASURES = ("retrieval", "perplexity", "timing")


@dataclass
class _Results:
    """Results by length; lists are in the order of the settings."""

    retrieval: dict[int, list[RetrievalResult]]
    perplexity: list[PerplexityResult]
    timing: dict[int, list[TimingResult]]


def command(
    model: Annotated[
        str, typer.Option(help="Hugging Face model folder or id, 'testbed' for the embedded model, or 'smollm2'.")
    ] = "testbed",
    gates: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of trained gates; 'none' for none. Default for the testbed: its own."),
    ] = None,
    measure: Annotated[
        str, typer.Option(help="What to measure: any of retrieval, perplexity, timing.")
    ] = "retrieval,perplexity",
    tasks: Annotated[
        str, typer.Option(help="Retrieval tasks: any of single, multikey, multivalue, variable, keyvalue.")
    ] = "single,multikey,keyvalue",
    lengths: Annotated[
        str, typer.Option(help="Prompt lengths in tokens (4096 or 4K); perplexity uses the longest.")
    ] = "4K",
    densities: Annotated[str, typer.Option(help="Densities of top-k selection.")] = "0.5,0.2,0.1,0.05",
    thresholds: Annotated[
        str | None, typer.Option(help="Also the gates with these probability thresholds, e.g. 0.002,0.005.")
    ] = None,
    oracle: Annotated[
        bool, typer.Option("--oracle", help="Also select from the true attention map: what a perfect gate would reach.")
    ] = False,
    method: Annotated[
        str,
        typer.Option(
            help="How retrieval answers are got: generate (each from its own prompt, as a user would), or "
            "teacher_forcing (one forward a sample; faster, and not the same under sparse attention)."
        ),
    ] = "generate",
    samples: Annotated[int, typer.Option(help="Samples of each task and length.", min=1)] = 8,
    questions: Annotated[int, typer.Option(help="Questions a sample ('single' has one).", min=1)] = 4,
    documents: Annotated[int, typer.Option(help="Documents for perplexity.", min=1)] = 4,
    repeats: Annotated[int, typer.Option(help="Timed repeats.", min=1)] = 5,
    data: Annotated[
        str | None,
        typer.Option(
            help="Text that the model was not trained on, for haystacks and perplexity: .txt or .jsonl (also .zst), a "
            "folder of them, or a dataset id. Default for testbed and smollm2: the testbed's test books."
        ),
    ] = None,
    text_field: Annotated[str, typer.Option(help="Key of the text in JSON lines and datasets.")] = "text",
    batch_size: Annotated[int, typer.Option(help="Prompts a forward.", min=1)] = 1,
    dtype: Annotated[str, typer.Option(help="dtype of the model: auto, bfloat16, float16 or float32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto (the GPU if there is one), cpu, cuda, ...")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the retrieval tasks.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder for results.json and a report, index.html; none by default.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write the results to stdout as JSON; everything else goes to stderr.")
    ] = False,
) -> None:
    """Measure a model densely and with its gates on the same samples.

    Every row of a sparse prompt is sparse: no minimum length, no dense last rows, questions included. The density
    beside each score counts every layer and row, from the lists that attention read.

    Example: seer eval --model Qwen/Qwen2.5-7B --gates my-gates --data books.jsonl --lengths 16K --samples 50 --oracle
    """
    with errors():
        from ..evaluate.retrieval import METHODS
        from ..tasks import TASKS

        terminal = Terminal(as_json)
        measures = _choice(parse_list(measure, str, "measure"), _MEASURES, "measure")
        asked_lengths = sorted(parse_list(lengths, token_count, "lengths"))
        task_list = _choice(parse_list(tasks, str, "tasks"), TASKS, "tasks")
        (how,) = _choice([method], METHODS, "method")
        settings = _settings(
            default_gates(model) if gates is None else None if gates == "none" else gates,
            parse_list(densities, parse_density, "densities"),
            [] if thresholds is None else parse_list(thresholds, parse_threshold, "thresholds"),
            oracle,
        )
        check_seed(seed)
        check_dtype(dtype)
        check_model(model)
        if gates not in (None, "none"):
            check_gates(gates)
        if output is not None:
            check_output(output)
        texts = open_data(data, model, text_field)
        chosen = resolve_device(device)
        terminal.say(f"loading {model} on {chosen}")
        loaded, tokenizer = load_model(model, chosen, dtype)
        longest = asked_lengths[-1]
        books = book_tokens(texts, model, tokenizer, limit=max(documents + 1, 16) * longest)
        terminal.say(f"settings: {', '.join(setting.name for setting in settings)}")
        job = _Job(terminal, loaded, tokenizer, books, settings, batch_size, seed)
        results = _Results({}, [], {})
        if "retrieval" in measures:
            for length in asked_lengths:
                results.retrieval[length] = job.retrieval(task_list, length, samples, questions, how)
        if "perplexity" in measures:
            results.perplexity = job.perplexity(longest, documents)
        if "timing" in measures:
            for length in asked_lengths:
                results.timing[length] = job.timing(length, repeats)
        numbers = _to_dict(results, model=model, gates=gates, dtype=str(loaded.dtype), device=chosen, seed=seed)
        if output is not None:
            from ..files import write_file

            write_file(output / "results.json", json.dumps(numbers, indent=2, allow_nan=False) + "\n")
            page = _report(results, numbers, model).save(output / "index.html")
            terminal.say(f"report: {page}")
        terminal.emit(numbers)


@dataclass
class _Job:
    """What all measurements share."""

    terminal: Terminal
    model: Any
    tokenizer: Any
    books: Sequence[np.ndarray]
    settings: Sequence[Setting]
    batch_size: int
    seed: int

    def retrieval(
        self, tasks: Sequence[str], length: int, samples: int, questions: int, method: str
    ) -> list[RetrievalResult]:
        from ..evaluate import evaluate_retrieval, make_samples
        from ..evaluate.tables import format_length, retrieval_table
        from ..tasks import TaskGenerator

        generator = TaskGenerator(self.tokenizer, self.books, split="test", seed=self.seed)
        made = make_samples(generator, tasks, length, samples, questions)
        total = len(self.settings) * len(made) * samples * length
        with self.terminal.progress(f"retrieval at {format_length(length)}", total) as advance:
            results = evaluate_retrieval(
                self.model, made, self.settings, batch_size=self.batch_size, advance=advance, method=method
            )
        self.terminal.table(retrieval_table(results))
        return results

    def perplexity(self, length: int, documents: int) -> list[PerplexityResult]:
        from ..evaluate import cut_documents, evaluate_perplexity
        from ..evaluate.tables import format_length, perplexity_table

        cut = cut_documents(self.books, length, documents, bos=self.tokenizer.bos_token_id)
        with self.terminal.progress(
            f"perplexity at {format_length(length)}", len(self.settings) * cut.numel()
        ) as advance:
            results = evaluate_perplexity(self.model, cut, self.settings, batch_size=self.batch_size, advance=advance)
        self.terminal.table(perplexity_table(results))
        return results

    def timing(self, length: int, repeats: int) -> list[TimingResult]:
        from ..evaluate import cut_documents, time_prefill
        from ..evaluate.tables import format_length, timing_table

        prompt = cut_documents(self.books, length, self.batch_size, bos=self.tokenizer.bos_token_id)
        # The oracle computes the whole map to select from it: its time says nothing.
        settings = [setting for setting in self.settings if setting.selector is None]
        with self.terminal.progress(
            f"timing at {format_length(length)}", (repeats + 1) * len(settings) * prompt.numel()
        ) as advance:
            results = time_prefill(self.model, prompt, settings, repeats=repeats, advance=advance)
        self.terminal.table(timing_table(results))
        return results


def _settings(gates: Any, densities: Sequence[float], thresholds: Sequence[float], oracle: bool) -> list[Setting]:
    from ..baselines import Oracle
    from ..evaluate import Setting
    from ..policies import Threshold, TopK

    policies = {f"{density:g}": TopK(density) for density in densities}
    settings = [Setting.dense()]
    if oracle:
        settings += [Setting(f"oracle {name}", selector=Oracle(policy)) for name, policy in policies.items()]
    if gates is not None:
        settings += [Setting(f"gates {name}", gates=gates, policy=policy) for name, policy in policies.items()]
        settings += [Setting(f"gates > {value:g}", gates=gates, policy=Threshold(value)) for value in thresholds]
    elif thresholds:
        raise ValueError("--thresholds needs --gates")
    return settings


def _choice(items: Sequence[str], known: Sequence[str], what: str) -> list[str]:
    unknown = [item for item in items if item not in known]
    if unknown:
        raise ValueError(f"--{what}: {', '.join(unknown)} is not known; choose from {', '.join(known)}")
    return list(items)


def _to_dict(results: _Results, **facts: Any) -> dict[str, Any]:
    from ..evaluate.environment import environment

    return {
        **facts,
        "retrieval": [result.to_dict() for group in results.retrieval.values() for result in group],
        "perplexity": [result.to_dict() for result in results.perplexity],
        "timing": [result.to_dict() for group in results.timing.values() for result in group],
        "environment": environment(),
    }


def _report(results: _Results, numbers: dict[str, Any], model: str) -> Report:
    from ..evaluate import Report
    from ..evaluate.tables import format_length, perplexity_table, retrieval_table, timing_table

    report = Report(
        f"Evaluation of {model}", "Dense beside block-sparse prefill on the same samples; density beside every score."
    )
    for length, retrieval in results.retrieval.items():
        report.section(f"Retrieval at {format_length(length)}")
        report.table(retrieval_table(retrieval), strong=[0])
        report.figure(_accuracy_figure(retrieval), caption="Mean accuracy of the tasks.", alt="accuracy over density")
    if results.perplexity:
        report.section(f"Perplexity at {format_length(results.perplexity[0].length)}")
        report.table(perplexity_table(results.perplexity), strong=[0])
        report.figure(
            _loss_figure(results.perplexity), caption="Loss added to dense, by position.", alt="added loss by position"
        )
    for length, timing in results.timing.items():
        report.section(f"Prefill time at {format_length(length)}")
        report.table(timing_table(timing), strong=[0])
    report.section("How it was measured")
    facts = numbers["environment"]
    machine = ", ".join(item["name"] for item in facts["devices"]) or facts["processor"]
    report.definitions(
        [
            *((name, str(numbers[name])) for name in ("model", "gates", "dtype", "device", "seed")),
            ("machine", machine),
            ("versions", ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)),
            ("git commit", facts["git_commit"] or "not a source checkout"),
        ]
    )
    return report


def _groups(results: Sequence[Any]) -> dict[str, list[Any]]:
    """Sparse results by kind (the first word of their setting), ordered by density."""
    groups: dict[str, list[Any]] = {}
    for result in results[1:]:
        groups.setdefault(result.setting.rsplit(" ", 1)[0], []).append(result)
    return {name: sorted(group, key=lambda result: result.density) for name, group in groups.items()}


def _accuracy_figure(results: Sequence[RetrievalResult]) -> Any:
    from ..evaluate.figures import line_figure

    series = {
        name: ([r.density for r in group], [100 * r.accuracy() for r in group], None)
        for name, group in _groups(results).items()
    }
    dense = ("dense", 100 * results[0].accuracy())
    return line_figure(series, x_label="density", y_label="accuracy, %", reference=dense, y_limits=(-3, 103))


def _loss_figure(results: Sequence[PerplexityResult]) -> Any:
    from ..evaluate.figures import line_figure
    from ..evaluate.tables import format_length

    buckets = results[0].buckets()
    series = {}
    for result in results[1:]:
        added = [result.loss_increase(results[0], *bucket) for bucket in buckets]
        errors_ = None if math.isnan(added[0][1]) else [error for _, error in added]
        series[result.setting] = ([float(stop) for _, stop in buckets], [mean for mean, _ in added], errors_)
    ticks = {float(stop): format_length(stop) for _, stop in buckets}
    return line_figure(
        series, x_label="position", y_label="added loss, nats", reference=("dense", 0.0), log_x=True, x_ticks=ticks
    )
