"""``seer compare``: gates, training-free methods and oracles at equal density, on one set of prompts."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    Terminal,
    book_tokens,
    default_gates,
    errors,
    open_data,
    parse_list,
    resolve_device,
    run_identity,
    token_count,
)
from .opening import open_model
from .options import check_choice, check_dtype, check_gates, check_model, check_output, check_seed, named, parse_density
from .parameters import BatchSize, Device, Dtype, Json, ModelName, TextField, UnseenText

if TYPE_CHECKING:
    from ..evaluate.contenders import Contender
    from ..evaluate.journal import Journal
    from ..evaluate.sweep import Plan

# Prompts of all lengths up to this are made from the same texts.
_SAME_TEXTS = 1 << 15
#: What --preset stands for; options that are given win.
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "tasks": "niah_single_2,niah_multikey_1,niah_multivalue",
        "selectors": "xattention,flashprefill,sub_block:query_parts=8:key_parts=8,streaming,oracle:policy=top_k(0.1)",
        "densities": "0.1,0.2",
        "rules": "own,project,budget",
        "protocols": "every_row_sparse",
        "samples": 24,
        "documents": 4,
        "repeats": 3,
    },
    "full": {
        "tasks": "all",
        "selectors": "xattention,xattention:stride=16,flexprefill,flashprefill,flashprefill_v2,"
        "flashprefill_v2:mean_correction=true,cosa,rbs,prism,sparge,minference,minference_exact,mean_pool,"
        "sub_block:query_parts=8:key_parts=8,sub_block:query_parts=8:key_parts=8:reduce=max,streaming,random,"
        "oracle:policy=top_k(0.1),oracle:reduce=mass:policy=top_k(0.1),oracle_cover",
        "densities": "0.05,0.1,0.2",
        "rules": "own,project,budget",
        "protocols": "every_row_sparse,as_published",
        "samples": 50,
        "documents": 8,
        "repeats": 5,
    },
}
#: What else a preset stands for with a model that knows few tasks: means count those that dense attention solves.
PRESETS_OF_MODEL: dict[tuple[str, str], dict[str, Any]] = {
    ("quick", "smollm2"): {"tasks": "niah_single_1,niah_single_2,niah_multikey_1", "densities": "0.15,0.25"},
}


def command(
    model: ModelName = "testbed",
    gates: Annotated[
        str | None,
        typer.Option(help="Folders or hub ids of gates, comma-separated; 'none'. Default for the testbed: its own."),
    ] = None,
    selectors: Annotated[
        str | None,
        typer.Option(help="What gates are compared with, by kind and arguments, e.g. 'xattention:stride=16,oracle'"),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Long-context tasks: 'all', 'ruler' (thirteen), any by name, or 'none': then densities are reached on "
            "texts alone, so that perplexities compare at equal density."
        ),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts (8192 or 8K).")] = "8K",
    densities: Annotated[
        str | None, typer.Option(help="Total densities that every method is brought to by its knob.")
    ] = None,
    preset: Annotated[
        str, typer.Option(help="quick or full: what is not given otherwise. 'smollm2' has easier tasks in quick.")
    ] = "quick",
    rules: Annotated[
        str | None,
        typer.Option(
            help="How a density is spent: own, project, budget (what is stored with gates), top_k, top_p, threshold."
        ),
    ] = None,
    protocols: Annotated[str | None, typer.Option(help="every_row_sparse, as_published.")] = None,
    samples: Annotated[int | None, typer.Option(help="Prompts of each task and length.", min=1)] = None,
    documents: Annotated[int | None, typer.Option(help="Documents for perplexity; 0: none.", min=0)] = None,
    repeats: Annotated[int | None, typer.Option(help="Timed prefills; 0: none.", min=0)] = None,
    answers: Annotated[
        str,
        typer.Option(
            help="Questions on paragraphs: generate, perplexity (of the right answer), or auto: by the model's size."
        ),
    ] = "auto",
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Ask in the form of the tokenizer's chat template.")
    ] = False,
    qa_data: Annotated[
        Path | None, typer.Option(help="Folder of SQuAD and HotpotQA files. Default: subsets of the package.")
    ] = None,
    maps: Annotated[bool, typer.Option(help="Keep maps and densities of heads at the shortest length.")] = True,
    data: UnseenText = None,
    text_field: TextField = "text",
    batch_size: BatchSize = 4,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the tasks.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for results.jsonl; a run that was stopped goes on.")] = Path(
        "results"
    ),
    as_json: Json = False,
) -> None:
    """Compare gates with training-free methods, oracles and dense attention: same model, kernel, prompts and density.

    Each method is brought to the densities that are asked for by the knob of its rule, on held-out prompts; what was
    measured stands beside every score, with time and memory. Every row of a prompt is sparse (as_published adds what
    publications keep besides). Several GPUs: accelerate launch -m seerattention.cli.compare, same options.

    Example: seer compare --model Qwen/Qwen3-8B --gates my-gates --data books.jsonl --lengths 8K,32K --preset full
    """
    with errors():
        rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
        terminal = Terminal(as_json)
        chosen = _chosen(
            preset,
            model,
            tasks=tasks, selectors=selectors, densities=densities, rules=rules, protocols=protocols, samples=samples,
            documents=documents, repeats=repeats,
        )  # fmt: skip
        from ..distillation.lock import locked
        from ..evaluate.comparison import Comparison
        from ..evaluate.journal import Journal
        from ..evaluate.measure import Subject
        from ..evaluate.sweep import Sweep, run_sweep

        asked_lengths = sorted(parse_list(lengths, token_count, "lengths"))
        check_seed(seed)
        check_dtype(dtype)
        check_model(model)
        check_output(output)
        _check_questions(qa_data)
        folders = _gate_folders(model, gates)
        plan = _plan(
            _contenders(folders, chosen, terminal.say),
            asked_lengths,
            chosen,
            {"answers": answers, "chat": apply_chat_template, "qa_data": None if qa_data is None else str(qa_data)},
            asked_lengths[0] if maps else None,
        )
        texts = open_data(data, model, text_field)
        place = resolve_device(device)
        if place == "cuda" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            place = f"cuda:{local_rank}"
        loaded, tokenizer = open_model(terminal, model, place, dtype)
        # Runs of other lengths in the same folder have the same prompts: up to here the texts do not depend on them.
        longest = max(asked_lengths[-1], _SAME_TEXTS)
        books = book_tokens(texts, model, tokenizer, limit=max(chosen["documents"] + 5, 16) * longest)
        subject = Subject(loaded, tokenizer, books, batch_size, seed)
        with locked(output / (f"results-{rank}.jsonl" if rank else "results.jsonl")):
            journal = Journal(output, rank)
            identity = run_identity(loaded, place.partition(":")[0])
            if place.startswith("cuda"):
                identity.pop("threads")  # a launcher of several processes sets it
            told = {name: "of the package" if _in_package(folder) else folder for name, folder in folders.items()}
            run = _begin(journal, identity, loaded, model=model, gates=told, seed=seed, device=place)
            sweep = Sweep(subject, plan, journal, identity, run)
            terminal.say(f"{len(plan.contenders)} methods under their rules, {len(plan.densities)} densities: {output}")
            bar = terminal.progress if rank == 0 else _no_progress
            run_sweep(sweep, progress=bar, say=terminal.say, last=rank == 0)
        if rank == 0:
            _show(terminal, Comparison.read(output))


@contextmanager
def _no_progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Of several processes the first one shows how far all are."""
    yield lambda amount: None


def _chosen(preset: str, model: str, **given: Any) -> dict[str, Any]:
    """The options of a preset for a model, and those that were given in place of them."""
    if preset not in PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    told = {name: value for name, value in given.items() if value is not None}
    return {**PRESETS[preset], **PRESETS_OF_MODEL.get((preset, model), {}), **told}


def _gate_folders(model: str, gates: str | None) -> dict[str, str]:
    """Folders of gates by what tables call them."""
    if gates == "none":
        return {}
    if gates is None:
        try:
            default = default_gates(model)
        except FileNotFoundError:
            default = None
        return {} if default is None else {"gates": str(default)}
    folders = parse_list(gates, str, "gates")
    for folder in folders:
        check_gates(folder)
    if len(folders) == 1:
        return {"gates": folders[0]}
    names = [Path(folder).name for folder in folders]
    if len(set(names)) < len(names):
        names = folders
    return {f"gates {name}": folder for name, folder in zip(names, folders, strict=True)}


def _in_package(folder: str) -> bool:
    """Whether gates come with the package: where that lies says nothing to other readers."""
    return Path(__file__).parents[1] in Path(folder).resolve().parents


def _contenders(folders: Mapping[str, str], chosen: Mapping[str, Any], say: Callable[[str], None]) -> list[Contender]:
    from ..evaluate.contenders import BUDGET, PROTOCOLS, RULE_NAMES, make_contenders
    from ..gates.sources import stored_budgets

    rules = check_choice(parse_list(chosen["rules"], str, "rules"), RULE_NAMES, "rules")
    protocols = check_choice(parse_list(chosen["protocols"], str, "protocols"), PROTOCOLS, "protocols")
    selectors = chosen["selectors"].strip()
    if not selectors:
        raise ValueError("--selectors is empty; give selectors separated by commas, or none")
    budgets = {name: stored_budgets(folder) for name, folder in folders.items()} if BUDGET in rules else {}
    without = [name for name, stored in budgets.items() if stored is None]
    if without:
        say(f"no budgets are stored with {', '.join(without)}, so not under the rule budget; seer calibrate fits them")
    with named("--selectors"):
        return make_contenders(folders, "" if selectors == "none" else selectors, rules, protocols, budgets)


def _check_questions(folder: Path | None) -> None:
    """Question sets that can be read."""
    from ..tasks.questions import load_questions

    try:
        with named("--qa-data"):
            load_questions(None if folder is None else str(folder))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--qa-data: {error}") from error


def _plan(
    contenders: Sequence[Contender],
    lengths: Sequence[int],
    chosen: Mapping[str, Any],
    options: Mapping[str, Any],
    maps: int | None,
) -> Plan:
    from ..evaluate.perplexity import PerplexityMeasure
    from ..evaluate.sweep import Plan
    from ..evaluate.text_tasks import ANSWERS, TextMeasure
    from ..evaluate.timing import TimingMeasure
    from ..tasks import RULER_TASKS, TEXT_TASKS

    check_choice([options["answers"]], ANSWERS, "answers")
    groups = {"all": TEXT_TASKS, "ruler": RULER_TASKS}
    measure = None
    if chosen["tasks"] != "none":
        tasks = groups.get(chosen["tasks"]) or parse_list(chosen["tasks"], str, "tasks")
        with named("--tasks"):
            measure = TextMeasure(tuple(tasks), chosen["samples"], **options)
    elif not chosen["documents"]:
        raise ValueError("--tasks none leaves only documents to measure; give --documents")
    return Plan(
        contenders,
        lengths,
        parse_list(chosen["densities"], parse_density, "densities"),
        measure,
        PerplexityMeasure(chosen["documents"]) if chosen["documents"] else None,
        TimingMeasure(chosen["repeats"]) if chosen["repeats"] else None,
        maps,
    )


def _begin(journal: Journal, identity: Mapping[str, Any], loaded: Any, **facts: Any) -> str:
    """Write where the results of this run come from, and give what they are marked with."""
    from ..evaluate.comparison import RUN, RunResult
    from ..evaluate.environment import environment

    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
    run = digest[:12]
    case = {"measure": RUN, "run": run, "settings": [], "length": 0, "time": time.time()}
    told = {
        **facts,
        "dtype": str(loaded.dtype),
        "parameters": sum(parameter.numel() for parameter in loaded.parameters()),
        "weights": identity["weights"],
        "command": _command(sys.argv),
        "environment": environment(),
    }
    journal.add(case, digest, [RunResult(told)])
    return run


def _command(argv: Sequence[str]) -> list[str]:
    """What was typed; under `accelerate launch -m` there is no name of a command before the options."""
    return ["seer", "compare", *argv[2 if list(argv[1:2]) == ["compare"] else 1 :]]


def _show(terminal: Terminal, comparison: Any) -> None:
    from ..evaluate.comparison_tables import summary_table, task_table
    from ..evaluate.equal_density import equal_density_table

    for length in comparison.lengths:
        if (by_task := task_table(comparison, length)).rows:
            terminal.table(by_task)
        terminal.table(summary_table(comparison, length))
        if (equal := equal_density_table(comparison, length)) is not None:
            terminal.table(equal)
    if comparison.left_out:
        terminal.say(f"{comparison.left_out} results of other prompts, models or versions in the folder are left out")
    terminal.say("seer report makes a page of them")
    terminal.emit(comparison.to_dict())


if __name__ == "__main__":
    typer.run(command)
