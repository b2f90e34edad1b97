"""``seer eval``: retrieval, perplexity, timing and lm-eval tasks, dense beside sparse, density beside every score."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Terminal, book_tokens, errors, open_data, parse_list, resolve_device, run_identity, token_count
from .eval_settings import all_gates, make_settings, named_gates
from .opening import open_model
from .options import (
    check_choice,
    check_dtype,
    check_gates,
    check_model,
    check_output,
    check_seed,
    check_task_files,
    is_given,
    parse_density,
    parse_rope_scaling,
    parse_threshold,
    real,
    say_unused,
)
from .parameters import BatchSize, Device, Dtype, Json, ModelName, TextField, UnseenText, gates_option

if TYPE_CHECKING:
    from ..evaluate import Report
    from ..evaluate.cases import Group
    from ..evaluate.measure import Measure


def command(
    context: typer.Context,
    model: ModelName = "testbed",
    gates: Annotated[str | None, gates_option("; 'none' for none")] = None,
    compare_gates: Annotated[
        str | None,
        typer.Option(help="Also these gates, in everything that asks gates: NAME=FOLDER,... (other forms, say)."),
    ] = None,
    measure: Annotated[
        str, typer.Option(help="What to measure, in this order: any of retrieval, perplexity, timing, tasks, lm-eval.")
    ] = "retrieval,perplexity",
    tasks: Annotated[
        str,
        typer.Option(
            help="Retrieval tasks: any of single, multikey, multivalue, variable, keyvalue. Of --measure tasks: any of "
            "those that seer compare has; default: all."
        ),
    ] = "single,multikey,keyvalue",
    lengths: Annotated[
        str,
        typer.Option(
            help="Prompt lengths in tokens (4096 or 4K); perplexity uses the longest. Of lm-eval tasks only those that "
            "make prompts to measure (RULER) use them."
        ),
    ] = "4K",
    densities: Annotated[
        str,
        typer.Option(
            help="Densities: by the budgets stored with the gates, or of top-k selection where there are none. "
            "none: no such."
        ),
    ] = "0.5,0.2,0.1,0.05",
    thresholds: Annotated[
        str | None, typer.Option(help="Also the gates with these probability thresholds, e.g. 0.002,0.005.")
    ] = None,
    oracle: Annotated[
        bool, typer.Option("--oracle", help="Also select from the true attention map: what a perfect gate would reach.")
    ] = False,
    selectors: Annotated[
        str | None,
        typer.Option(
            help="Also these, by kind and arguments, e.g. 'oracle:policy=top_p(0.9),gate:policy=token_budget(2048)'"
        ),
    ] = None,
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
    lm_eval_tasks: Annotated[
        str | None,
        typer.Option(
            help="Also these tasks, groups or tags of lm-evaluation-harness, or YAML files of your own tasks; without "
            "--measure these alone. Needs the extra 'lm-eval'."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Documents of each lm-eval task. Default: all.", min=1)] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples before each question of lm-eval tasks. Default: the task's.", min=0)
    ] = None,
    apply_chat_template: Annotated[
        bool,
        typer.Option(
            "--apply-chat-template", help="Ask lm-eval tasks, and --measure tasks, in the tokenizer's chat template."
        ),
    ] = False,
    rope_scaling: Annotated[
        str | None,
        typer.Option(
            help="Stretch the model's rotary embedding, for prompts longer than it was made for, as in 'yarn:2': "
            "yarn, linear or dynamic, and how many times its length."
        ),
    ] = None,
    data: UnseenText = None,
    text_field: TextField = "text",
    batch_size: BatchSize = 1,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the retrieval tasks.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for results.json and a report, index.html; none by default. Each result is in results.jsonl "
            "as soon as it is measured, and the same command goes on where it was stopped."
        ),
    ] = None,
    seconds: Annotated[
        float,
        typer.Option(help="Begin no further measurement after so long, setting by setting until then; 0: measure all."),
    ] = 0.0,
    as_json: Json = False,
) -> None:
    """Measure a model densely and with its gates on the same samples.

    Every row of a sparse prompt is sparse: no minimum length, no dense last rows, questions included. The density
    beside each score counts every layer and row, from the lists that attention read.

    Example: seer eval --model Qwen/Qwen2.5-7B --gates my-gates --data books.jsonl --lengths 16K --samples 50 --oracle
    """
    with errors():
        from ..distillation.lock import locked
        from ..evaluate.cases import run_measures
        from ..evaluate.harness import require_lm_eval
        from ..evaluate.journal import Journal
        from ..evaluate.measure import Subject
        from ..evaluate.registry import MEASURES
        from ..evaluate.retrieval import METHODS
        from ..files import write_file
        from ..tasks import TASKS, TEXT_TASKS

        terminal = Terminal(as_json)
        scaling = None if rope_scaling is None else parse_rope_scaling(rope_scaling)
        names = check_choice(parse_list(measure, str, "measure"), list(MEASURES), "measure")
        harness_tasks = [] if lm_eval_tasks is None else parse_list(lm_eval_tasks, str, "lm-eval-tasks")
        names = _with_harness(names, harness_tasks, is_given(context, "measure"))
        asked_lengths = sorted(parse_list(lengths, token_count, "lengths"))
        task_list = check_choice(parse_list(tasks, str, "tasks"), [*TASKS, *TEXT_TASKS], "tasks")
        text_tasks = [task for task in task_list if task in TEXT_TASKS]
        task_list = [task for task in task_list if task in TASKS]
        if "retrieval" in names and not task_list:
            raise ValueError("--tasks names no retrieval task; leave retrieval out of --measure, or name one")
        check_choice([method], METHODS, "method")
        chosen_measures = _measures(
            names,
            tasks=task_list,
            text_tasks=text_tasks or list(TEXT_TASKS),
            chat=apply_chat_template,
            samples=samples,
            questions=questions,
            method=method,
            documents=documents,
            repeats=repeats,
            lm_eval_tasks=harness_tasks,
            limit=limit,
            num_fewshot=num_fewshot,
            apply_chat_template=apply_chat_template,
            max_seq_lengths=asked_lengths,
        )
        if harness_tasks:
            check_task_files("--lm-eval-tasks", harness_tasks)
            require_lm_eval()
        else:
            unused = ("limit", "num_fewshot", *(() if "tasks" in names else ("apply_chat_template",)))
            say_unused(context, terminal, unused, "only --lm-eval-tasks reads it")
        real("--seconds", seconds)
        clock = _Clock(seconds) if seconds else None
        compared = {} if compare_gates is None else dict(parse_list(compare_gates, named_gates, "compare-gates"))
        check_seed(seed)
        check_dtype(dtype)
        check_model(model)
        if output is not None:
            check_output(output)
        needs_texts = any(getattr(each, "needs_texts", True) for each in chosen_measures)
        if not needs_texts:
            say_unused(context, terminal, ("data", "text_field"), "lm-eval tasks bring their own texts")
        texts = open_data(data, model, text_field) if needs_texts else None
        if gates not in (None, "none"):
            check_gates(gates)
        settings = make_settings(
            all_gates(model, gates, compared),
            [] if densities == "none" else parse_list(densities, parse_density, "densities"),
            [] if thresholds is None else parse_list(thresholds, parse_threshold, "thresholds"),
            oracle,
            selectors,
            terminal,
        )
        chosen = resolve_device(device)
        loaded, tokenizer = open_model(terminal, model, chosen, dtype, scaling)
        longest = asked_lengths[-1]
        books = []
        if needs_texts:
            books = book_tokens(texts, model, tokenizer, limit=max(documents + 1, 16) * longest)
        terminal.say(f"settings: {', '.join(setting.name for setting in settings)}")
        subject = Subject(loaded, tokenizer, books, batch_size, seed)
        facts = {
            "model": model,
            "gates": gates,
            "compared gates": compared,
            "dtype": str(loaded.dtype),
            **({} if scaling is None else {"rope scaling": scaling}),
            "device": chosen,
            "seed": seed,
        }
        with ExitStack() as stack:
            journal = None
            if output is not None:
                stack.enter_context(locked(output / "results.jsonl"))
                journal = Journal(output)
            groups = run_measures(
                subject,
                chosen_measures,
                settings,
                asked_lengths,
                journal=journal,
                identity=None if journal is None else run_identity(loaded, str(loaded.device)),
                progress=terminal.progress,
                show=lambda group: _show(terminal, group),
                stop=clock,
            )
            if clock is not None and clock.stopped:
                again = "" if output is None else "; the same command goes on"
                terminal.say(f"stopped after --seconds {seconds:g}, before all was measured{again}")
            numbers = _to_dict(groups, **facts)
            if output is not None:
                write_file(output / "results.json", json.dumps(numbers, indent=2, allow_nan=False) + "\n")
                page = _report(groups, numbers, model).save(output / "index.html")
                terminal.say(f"report: {page}")
        terminal.emit(numbers)


def _with_harness(names: Sequence[str], tasks: Sequence[str], chosen: bool) -> list[str]:
    """What to measure if these lm-eval tasks were asked for: they alone, where the measures were not ``chosen``."""
    if not tasks:
        if "lm-eval" in names:
            raise ValueError("--measure lm-eval needs --lm-eval-tasks, the tasks to run")
        return list(names)
    return list(dict.fromkeys([*(names if chosen else ()), "lm-eval"]))


def _measures(names: Sequence[str], **options: Any) -> list[Measure]:
    """Measures by name; each takes the options that it has."""
    from ..evaluate.registry import MEASURES

    made = []
    for name in names:
        kind: Any = MEASURES[name]
        known = {field.name for field in dataclasses.fields(kind)}
        made.append(kind(**{option: value for option, value in options.items() if option in known}))
    return made


def _show(terminal: Terminal, group: Group) -> None:
    if group.kept:
        terminal.say(
            f"{group.kept} of {len(group.results)} results were measured before and are taken from results.jsonl; "
            "delete it to measure them again"
        )
    terminal.table(group.measure.table(group.results))


class _Clock:
    """Whether the time is up; what it said last stays said."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.stopped = False

    def __call__(self) -> bool:
        self.stopped = self.stopped or time.monotonic() > self.end
        return self.stopped


def _to_dict(groups: Sequence[Group], **facts: Any) -> dict[str, Any]:
    from ..evaluate.environment import environment
    from ..evaluate.registry import MEASURES

    results: dict[str, list[dict[str, Any]]] = {name: [] for name in MEASURES}
    for group in groups:
        results[group.measure.name] += [result.to_dict() for result in group.results]
    return {**facts, **results, "environment": environment()}


def _report(groups: Sequence[Group], numbers: dict[str, Any], model: str) -> Report:
    from ..evaluate import Report
    from ..evaluate.environment import machine_name

    report = Report(
        f"Evaluation of {model}", "Dense beside block-sparse prefill on the same samples; density beside every score."
    )
    for group in groups:
        report.section(group.heading)
        report.table(group.measure.table(group.results), strong=[0])
        picture = group.measure.picture(group.results)
        if picture is not None:
            report.figure(picture.figure, caption=picture.caption, alt=picture.alt)
    report.section("How it was measured")
    facts = numbers["environment"]
    report.definitions(
        [
            *((name, str(numbers[name])) for name in ("model", "gates", "dtype", "device", "seed")),
            ("machine", machine_name(facts)),
            ("versions", ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)),
            ("git commit", facts["git_commit"] or "not a source checkout"),
        ]
    )
    return report
