"""A model beyond the length that it was made for, its rotary embedding stretched: what its gates still find.

    python -m benchmarks.stretched                       # the embedded model: as it is, YaRN, linear and dynamic, x2
    python -m benchmarks.stretched --cases none@32768 yarn:2@32768 yarn:2@65536 --density 0.1
    python -m benchmarks.stretched --device cpu --tiny   # a rehearsal, in seconds

A case is a kind of stretching with its factor, as ``seer eval --rope-scaling`` takes it, and a length. The model is
loaded with it, and the same gates are attached; nothing is trained. Of each case, dense and sparse: answers of three
retrieval tasks, generated greedily, and perplexity of documents; of the lists that the gates give along a dense
forward: block recall, and needle recall. The gates' budget for ``--density`` was fitted at shorter lengths, so the
density is what comes of it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from seerattention import hf
from seerattention.cli.common import Terminal, book_tokens, default_gates, open_data, resolve_device, spending
from seerattention.cli.opening import load_model
from seerattention.cli.options import parse_rope_scaling
from seerattention.evaluate.perplexity import cut_documents, evaluate_perplexity
from seerattention.evaluate.retrieval import evaluate_retrieval, make_samples
from seerattention.evaluate.settings import Setting
from seerattention.measure import measure_recall
from seerattention.policies import Policy
from seerattention.tasks import TaskGenerator

from .command import Budget, Result, case_of, gated_case, gated_parser, make_table, tokens
from .results import own_arguments, start_run

TASKS = ("single", "multikey", "keyvalue")
UNSCALED = "none"
# What is shown of the lists; `seerattention.measure` says what each is.
RECALLS = ("block", "needle_heads", "look_up", "block_needles")

Case = tuple[str, int]


def parse_case(text: str) -> Case:
    """``yarn:2@65536``: what stretches, and tokens.

    Raises:
        ValueError: another form.
    """
    scaling, at, length = text.partition("@")
    if not at or not length.isdecimal() or int(length) < 2:
        raise ValueError(f"a case is a kind of scaling and a length, as in yarn:2@65536 or none@32768, got {text!r}")
    if scaling != UNSCALED:
        parse_rope_scaling(scaling)
    return scaling, int(length)


def measure(
    model: nn.Module, tokenizer: Any, books: Sequence[np.ndarray], gates: Any, policy: Policy, length: int, options: Any
) -> dict[str, dict[str, Any]]:
    """The metrics of both kinds of attention, with the model as it is loaded."""
    generator = TaskGenerator(tokenizer, books, split="test", seed=options.seed)
    samples: dict[str, Any] = {}
    for task in TASKS:
        count = options.count if task == "single" else -(-options.count // options.questions)
        samples |= make_samples(generator, [task], length, count, options.questions)
    documents = cut_documents(_joined(books, length), length, options.documents, bos=tokenizer.bos_token_id)
    settings = [Setting.dense(), Setting("sparse", gates=gates, policy=policy)]
    answered = evaluate_retrieval(model, samples, settings, batch_size=options.batch_size)
    read = evaluate_perplexity(model, documents, settings, batch_size=1)
    hf.attach(model, gates, prefill=policy, min_context=0)
    try:
        seen = [documents[:1], *(torch.as_tensor(samples[task][0].input_ids)[None] for task in TASKS[1:])]
        recall = measure_recall(model, ({"input_ids": ids} for ids in seen), policy).numbers()
    finally:
        hf.detach(model)
    found = {}
    for answers, losses in zip(answered, read, strict=True):
        metrics: dict[str, Any] = {"density": answers.density, "density_documents": losses.density}
        for task in TASKS:
            metrics[f"{task}_accuracy"] = answers.accuracy([task])
            metrics[f"{task}_standard_error"] = answers.standard_error(task) if len(samples[task]) > 1 else None
        metrics["perplexity"], metrics["perplexity_last_quarter"] = losses.perplexity()[0], losses.last_quarter()[0]
        metrics["perplexity_ratio"] = metrics["perplexity"] / read[0].perplexity()[0]
        found[answers.setting] = metrics
    found["sparse"] |= {f"recall_{name}": recall[name] for name in RECALLS}
    return found


def _joined(books: Sequence[np.ndarray], length: int) -> list[np.ndarray]:
    """Texts of at least ``length`` tokens, of so many books each as it takes."""
    texts: list[np.ndarray] = []
    waiting: list[np.ndarray] = []
    for book in books:
        waiting.append(book)
        if sum(map(len, waiting)) >= length:
            texts.append(np.concatenate(waiting))
            waiting = []
    return texts


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    given = list(own_arguments() if arguments is None else arguments)
    options, cases = _parse(given)
    terminal, device = Terminal(), torch.device(resolve_device(options.device))
    gates = options.gates or default_gates(options.model)
    policy = spending(gates, [options.density], terminal)[options.density]
    data = open_data(options.data, options.model)
    run = start_run("stretched", "benchmarks.stretched", given, device, options.output, options.tiny)
    longest = max(length for _, length in cases)
    books = None
    budget = Budget(options.budget, terminal)
    for scaling, length in budget.of(cases, str):
        started = time.monotonic()
        stretched = None if scaling == UNSCALED else parse_rope_scaling(scaling)
        model, tokenizer = load_model(options.model, str(device), options.dtype, stretched)
        if books is None:
            books = book_tokens(data, options.model, tokenizer, limit=max(16, 2 * options.documents) * longest)
        found = measure(model, tokenizer, books, gates, policy, length, options)
        for attention, metrics in found.items():
            case = {
                **gated_case(options, model),
                "scaling": scaling,
                "length": length,
                "attention": attention,
                "asked_density": None if attention == "dense" else options.density,
                "answers": options.count,
                "documents": options.documents,
            }
            run.add({"case": case, "metrics": metrics, "wall_s": time.monotonic() - started})
        terminal.say(f"{scaling} at {length}: {time.monotonic() - started:.0f} s")
    terminal.table(_table(run.results))
    terminal.say(f"written to {run.path}")
    return 0


def _table(results: Sequence[Result]) -> Any:
    def cell(name: str, form: str, times: float = 1) -> Any:
        return lambda result: "" if (x := result["metrics"].get(name)) is None else format(times * x, form)

    columns = [
        ("scaling", case_of("scaling")),
        ("tokens", tokens),
        ("attention", case_of("attention")),
        ("density", cell("density", ".3f")),
        *((f"{task}, %", cell(f"{task}_accuracy", ".1f", 100)) for task in TASKS),
        ("perplexity", cell("perplexity", ".2f")),
        ("last quarter", cell("perplexity_last_quarter", ".2f")),
        ("block recall", cell("recall_block", ".3f")),
        ("look-up recall", cell("recall_look_up", ".3f")),
        ("needle recall by head", cell("recall_needle_heads", ".3f")),
    ]
    case = results[0]["case"]
    caption = (
        f"{case['answers']} answers a task, generated greedily; perplexity of {case['documents']} documents. The gates "
        "are those that come with the model, trained and fitted without scaling."
    )
    return make_table(results, columns, caption)


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[Case]]:
    parser = gated_parser("benchmarks.stretched", __doc__)
    default = ["none@32768", "yarn:2@32768", *(f"{kind}@65536" for kind in ("yarn:2", "none", "linear:2", "dynamic:2"))]
    parser.add_argument("--cases", nargs="+", metavar="SCALING@TOKENS", default=default)
    parser.add_argument("--count", type=int, default=64, help="answers of each task")
    parser.add_argument("--questions", type=int, default=4, help="of a sample, where a task has several")
    parser.add_argument("--documents", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=1, help="prompts at a time")
    options = parser.parse_args(list(arguments))
    if options.tiny:
        options.count, options.documents, options.cases = 4, 1, ["none@1024", "yarn:2@2048"]
    for name in ("count", "questions", "documents", "batch_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    try:
        return options, [parse_case(case) for case in options.cases]
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
