"""Which cheap number predicts retrieval: numbers of what is kept of the true map, and scores of tasks, over many cells.

    python -m benchmarks.predictors --model testbed --train paper:30 paper:200 sub_block_shared:30 --budget 450
    python -m benchmarks.predictors --model smollm2 --length 8192 --tasks single niah_single_2 --train paper:100
    python -m benchmarks.predictors --model FOLDER --gates mine=FOLDER --data books.jsonl
    python -m benchmarks.predictors --read benchmarks/results/h200/predictors.json      # the tables again
    python -m benchmarks.predictors --device cpu --tiny                                 # a rehearsal, in a minute

A cell is what chooses blocks (a form of gates, trained for so many steps or not at all; the true map; methods without
training) under a rule. Of each cell all numbers of ``seerattention.measure`` are taken along one dense forward of three
kinds of text: plain books, books that repeat passages of their first half in their second, and samples of the tasks
(other ones than are scored). Beside them stand two numbers of the sparse model itself: the share of repeated tokens
that it predicts, and minus its loss on books. Then the cell answers the tasks.

Numbers are compared with the mean score by Spearman's rank correlation over all cells, and over pairs of cells of like
density (within a fifth) whose scores differ by at least five points: how many of them does the number put in the right
order? Density alone correlates with everything, and of like pairs it knows nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import seerattention as seer
from seerattention import hf
from seerattention.baselines import MeanPool, Oracle, Random, Streaming, SubBlock
from seerattention.cli.common import Terminal, book_tokens, default_gates, open_data, resolve_device
from seerattention.cli.opening import load_model
from seerattention.distillation.repeats import say_again
from seerattention.evaluate import Setting
from seerattention.evaluate.forward import decoder_states, prompt_device, token_logits
from seerattention.evaluate.measure import Subject
from seerattention.evaluate.perplexity import cut_documents, document_losses
from seerattention.evaluate.retrieval import evaluate_retrieval, make_samples
from seerattention.evaluate.tables import Table
from seerattention.evaluate.text_tasks import TextMeasure
from seerattention.hf.state import state_of
from seerattention.measure import compare_recall
from seerattention.policies import Policy
from seerattention.selectors import Selector
from seerattention.tasks import TASKS, TEXT_TASKS, TaskGenerator

from .command import Budget, make_parser
from .distill import FORMS
from .results import own_arguments, start_run

RULES: dict[str, Policy] = {
    **{f"top-k {density:g}": seer.TopK(density) for density in (0.05, 0.1, 0.2, 0.4)},
    **{f"top-p {p:g}": seer.TopP(p) for p in (0.6, 0.8, 0.9)},
    **{f"relative {factor:g}": seer.RelativeThreshold(factor) for factor in (1.0, 2.0, 4.0)},
    **{f"threshold {limit:g}": seer.Threshold(limit) for limit in (0.005, 0.02)},
}
BUDGETS = (0.1, 0.2)
SELECTORS: dict[tuple[str, str], Selector] = {
    ("true map", "top-k 0.05"): Oracle(seer.TopK(0.05)),
    ("true map", "top-k 0.1"): Oracle(seer.TopK(0.1)),
    ("true map", "relative 2"): Oracle(seer.RelativeThreshold(2.0)),
    ("true map", "relative 4"): Oracle(seer.RelativeThreshold(4.0)),
    ("mean pooling", "top-k 0.2"): MeanPool(seer.TopK(0.2)),
    ("sub-blocks untrained", "top-k 0.2"): SubBlock(seer.TopK(0.2)),
    ("random", "0.2"): Random(0.2),
    ("random", "0.5"): Random(0.5),
    ("sink and local", "default"): Streaming(),
}
PASSAGE, FIRST_TOKENS = 192, 16  # tokens of a repeated passage, and of those how many are too early to be predicted
LIKE, DIFFER = 1.2, 0.05  # densities, and scores, of pairs of cells
RESAMPLES = 2000


@dataclass(frozen=True)
class Cell:
    """What chooses blocks, under which rule, and how the model is set to it."""

    scores: str
    rule: str
    choice: Policy | Selector
    setting: Setting


@dataclass(frozen=True)
class Texts:
    """Token ids ``[documents, T]``: text to take numbers on by kind, and text to train gates on; samples to score."""

    numbers: Mapping[str, Tensor]
    training: Tensor
    score: Callable[[Setting], tuple[dict[str, float], float]]


def repeated(documents: Tensor, seed: int = 0) -> Tensor:
    """Documents whose second half is made of passages of the first half, in another order."""
    rng, half = np.random.default_rng(seed), documents.shape[1] // 2
    size = min(PASSAGE, half // 2)
    starts = np.arange(1, half - size, size)  # the first token may be one that begins documents
    order = [int(start) for _ in range(half // size + 2) for start in rng.permutation(starts)]
    return say_again(documents, half, [(start, size) for start in order])


@torch.inference_mode()
def copied(model: Any, documents: Tensor) -> float:
    """Share of the tokens of repeated passages that the model, as it is set, predicts; their first ones left out."""
    half = documents.shape[1] // 2
    size = min(PASSAGE, half // 2)
    places = torch.arange(half, documents.shape[1])
    places = places[(places - half) % size >= min(FIRST_TOKENS, size // 2)]
    right = []
    for document in documents:
        states = decoder_states(model, document[None].to(prompt_device(model)))[0]
        found = token_logits(model, states[(places - 1).to(states.device)]).argmax(-1).cpu()
        right.append((found == document[places]).float().mean())
    return float(torch.stack(right).mean())


def groups(model: Any, options: Any, texts: Texts) -> Iterator[list[Cell]]:
    """Cells that share gates, which are attached while the group is in use; the first has selectors."""
    hf.attach(model, selector=Streaming(), min_context=0)
    yield [
        Cell(name, rule, selector, Setting(f"{name}, {rule}", selector=selector))
        for (name, rule), selector in SELECTORS.items()
    ]
    if hf.is_attached(model):
        hf.detach(model)
    own = default_gates(options.model) if not options.gates else None
    gates: dict[str, Any] = dict(pair.split("=", 1) for pair in options.gates or ())
    if own is not None:
        gates["shipped"] = own
    gates |= {f"{form}, fresh": FORMS[form] for form in options.fresh}
    for wanted in options.train:
        form, steps = wanted.split(":")
        gates[f"{form}, {steps} steps"] = (FORMS[form], int(steps))
    for name, source in gates.items():
        attach(model, source, texts.training)
        rules = dict(RULES)
        if (budgets := state_of(model).budgets) is not None:
            rules |= {f"budget {d:g}": budgets.policy(d) for d in BUDGETS if d >= budgets.densities[0]}
        yield [Cell(name, rule, policy, Setting(f"{name}, {rule}", policy=policy)) for rule, policy in rules.items()]
        hf.detach(model)


def attach(model: Any, source: Any, training: Tensor) -> None:
    """Gates from a folder, fresh ones of a form, or those trained for some steps."""
    torch.manual_seed(0)
    if not isinstance(source, tuple):
        fresh = not isinstance(source, str | Path)
        hf.attach(model, seer.GateConfig(prefill=source) if fresh else source, min_context=0)
        return
    form, steps = source
    hf.attach(model, seer.GateConfig(prefill=form), min_context=0)
    batches = [{"input_ids": document[None]} for document in training]
    seer.distill(model, batches, seer.DistillConfig(steps=steps, rows=0.25, learning_rate=2e-3))


def make_texts(model: Any, tokenizer: Any, options: Any) -> Texts:
    """Everything that is read, from the test books (or the first documents of --data); training from others."""
    data = open_data(options.data, options.model)
    need = 2 * (options.documents + 4) * options.length
    training_size = 0 if not options.train else options.training_documents
    books = book_tokens(data, options.model, tokenizer, limit=need + training_size * options.length)
    bos = tokenizer.bos_token_id
    if data is None and training_size:
        train = book_tokens(None, options.model, tokenizer, limit=2 * training_size * options.length, split="train")
        training = cut_documents(train, options.length, training_size, bos=bos)
        documents = cut_documents(books, options.length, options.documents, bos=bos)
    else:
        both = cut_documents(books, options.length, options.documents + training_size, bos=bos)
        documents, training = both[: options.documents], both[options.documents :]
    woven = [task for task in options.tasks if task in TASKS]
    told = [task for task in options.tasks if task in TEXT_TASKS]

    def samples(count: int, seed: int) -> dict[str, list[Any]]:
        generator = TaskGenerator(tokenizer, books, split="test", seed=seed)
        return make_samples(generator, woven, options.length, count, options.questions)

    subject = Subject(model, tokenizer, books, seed=0)
    measure = TextMeasure(text_tasks=told, samples=options.samples) if told else None
    others = dataclasses.replace(measure, samples=options.documents) if measure else None
    asked = [sample.input_ids for group in samples(options.documents, 1).values() for sample in group]
    if others is not None:
        made = others.prepare(dataclasses.replace(subject, seed=1), options.length).content
        asked += [sample.prompt for group in made.values() for sample in group]
    least = min(map(len, asked))  # prompts leave room for their answers
    numbers = {
        "books": documents,
        "repeated": repeated(documents),
        # Cut behind the first token, which may be one that begins prompts, so that they still end with the question.
        "tasks": torch.from_numpy(np.stack([np.r_[ids[:1], ids[len(ids) - least + 1 :]] for ids in asked])),
    }
    scored = samples(options.samples, 0)
    prompts = None if measure is None else measure.prepare(subject, options.length)

    def score(setting: Setting) -> tuple[dict[str, float], float]:
        """Score of each task, and the density of their prompts."""
        found: dict[str, float] = {}
        densities = []
        if woven:
            result = evaluate_retrieval(model, scored, [setting], method=options.method)[0]
            found |= {task: result.accuracy([task]) for task in woven}
            densities.append(result.density)
        if measure is not None and prompts is not None:
            (told_result,) = measure.run(subject, prompts, [setting])
            found |= {task: told_result.score([task]) for task in told}
            densities.append(told_result.density)
        return found, float(np.mean(densities))

    return Texts(numbers, training, score)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    given = list(own_arguments() if arguments is None else arguments)
    options = _parse(given)
    terminal = Terminal()
    if options.read:
        show([result for run in json.loads(options.read.read_text())["runs"] for result in run["results"]], terminal)
        return 0
    device = torch.device(resolve_device(options.device))
    model, tokenizer = load_model(options.model, str(device), options.dtype)
    texts = make_texts(model, tokenizer, options)
    run = start_run("predictors", "benchmarks.predictors", given, device, options.output, options.tiny)
    budget = Budget(options.budget, terminal)
    dense, _ = texts.score(Setting.dense())
    terminal.say("dense: " + ", ".join(f"{task} {share:.3f}" for task, share in dense.items()))
    common = {"model": options.label or options.model, "length": options.length, "method": options.method}
    for cells in budget.of(groups(model, options, texts), lambda cells: cells[0].scores):
        cells = [cell for cell in cells if not options.rules or cell.rule in options.rules]
        if not cells:
            continue
        choices = {place: cell.choice for place, cell in enumerate(cells)}
        found = {
            kind: compare_recall(model, [{"input_ids": text[None]} for text in documents], choices)
            for kind, documents in texts.numbers.items()
        }
        if isinstance(cells[0].choice, Selector):
            hf.detach(model)  # each setting brings its own
        for place, cell in enumerate(cells):
            numbers: dict[str, float | None] = {
                f"{kind}/{name}": value
                for kind, recalls in found.items()
                for name, value in recalls[place].numbers().items()
            }
            with cell.setting.applied(model):
                numbers["repeated/copied"] = copied(model, texts.numbers["repeated"])
                numbers["books/minus loss"] = -float(document_losses(model, texts.numbers["books"]).mean())
            scores, density = texts.score(cell.setting)
            case = {**common, "scores": cell.scores, "rule": cell.rule}
            metrics = {"density": density, "score": float(np.mean(list(scores.values()))), "tasks": scores}
            run.add({"case": case, "metrics": metrics, "numbers": numbers, "dense": dense})
            terminal.say(
                f"{cell.scores}, {cell.rule}: density {density:.3f}, "
                + ", ".join(f"{task} {share:.3f}" for task, share in scores.items())
                + "".join(f", {name} {numbers[name] or 0:.3f}" for name in ("books/block", "books/look_up"))
            )
    show(run.results, terminal)
    terminal.say(f"written to {run.path}")
    return 0


def show(results: Sequence[Mapping[str, Any]], terminal: Terminal) -> None:
    """A table of all numbers for each model, the best first."""
    kept = {json.dumps(result["case"], sort_keys=True): result for result in results}  # the latest of each cell
    for model, group in itertools.groupby(
        sorted(kept.values(), key=lambda result: result["case"]["model"]), lambda result: result["case"]["model"]
    ):
        cells = list(group)
        terminal.say(f"{model}: {len(cells)} cells")
        if len(cells) > 2:
            terminal.table(correlations(cells))


def correlations(cells: Sequence[Mapping[str, Any]]) -> Table:
    """How every number goes with the scores of these cells."""
    scores = np.array([cell["metrics"]["score"] for cell in cells])
    density = np.array([cell["metrics"]["density"] for cell in cells])
    tasks = list(cells[0]["metrics"]["tasks"])
    numbers = {"density": density} | {
        name: np.array([cell["numbers"][name] for cell in cells], dtype=float) for name in cells[0]["numbers"]
    }
    rows = []
    for name, values in numbers.items():
        known = ~np.isnan(values)
        if known.sum() < 3:
            continue
        x, y = values[known], scores[known]
        rho = spearman(x, y)
        low, high = spearman_interval(x, y)
        right, pairs = in_order(x, y, density[known])
        each = [spearman(x, np.array([cell["metrics"]["tasks"][task] for cell in cells])[known]) for task in tasks]
        texts = [name, str(int(known.sum())), f"{rho:.3f}", f"{low:.2f} to {high:.2f}", f"{permutation(x, y):.4f}"]
        texts += [f"{value:.3f}" for value in each]
        rows.append((right / pairs if pairs else 0.5, rho, [*texts, f"{100 * right / pairs:.0f} %" if pairs else "-"]))
    pairs = in_order(density, scores, density)[1]
    caption = (
        "Spearman's correlation of each number with the mean score over cells, the 95 % interval of resampled cells, p "
        f"of a permutation test, and for each task; of {pairs} pairs of cells of like density with scores "
        f"{100 * DIFFER:.0f} points apart or more, the share that is in the right order (ties count half)."
    )
    headers = ["number", "cells", "rank correlation", "interval", "p", *tasks, "like pairs"]
    return Table(headers, [row for _, _, row in sorted(rows, key=lambda row: (-row[0], -row[1]))], caption)


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 along the last dimension, equal values sharing the mean of theirs."""
    distinct, place = np.unique(values, return_inverse=True)
    rows = place.reshape(-1, values.shape[-1])
    size = len(distinct)
    counts = np.stack([np.bincount(row, minlength=size) for row in rows])
    return np.take_along_axis(counts.cumsum(-1) - (counts - 1) / 2, rows, -1).reshape(values.shape)


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Rank correlations along the last dimension; 0 where one of two is constant."""
    a, b = (each - each.mean(-1, keepdims=True) for each in (ranks(x), ranks(y)))
    scale = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return np.divide((a * b).sum(-1), scale, out=np.zeros_like(scale), where=scale > 0)


def permutation(x: np.ndarray, y: np.ndarray, seed: int = 0) -> float:
    """Share of shuffles (and of the data themselves) whose correlation is as far from 0, in either direction."""
    a, b = (values - values.mean() for values in (ranks(x), ranks(y)))
    shuffled = np.random.default_rng(seed).permuted(np.tile(b, (RESAMPLES, 1)), axis=1)  # shuffled ranks are ranks
    as_far = int((np.abs(shuffled @ a) >= abs(a @ b) - 1e-9).sum())
    return (as_far + 1) / (RESAMPLES + 1)


def spearman_interval(x: np.ndarray, y: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap over cells, 95 %."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(x), (RESAMPLES, len(x)))
    low, high = np.percentile(spearman(x[drawn], y[drawn]), (2.5, 97.5))
    return float(low), float(high)


def in_order(x: np.ndarray, y: np.ndarray, density: np.ndarray) -> tuple[float, int]:
    """Of pairs of like density and unlike score, how many x puts in order (ties a half), and how many there are."""
    right, pairs = 0.0, 0
    for i, j in itertools.combinations(range(len(x)), 2):
        like = max(density[i], density[j]) <= LIKE * min(density[i], density[j])
        if like and abs(y[i] - y[j]) >= DIFFER:
            pairs += 1
            right += (1 + np.sign(x[i] - x[j]) * np.sign(y[i] - y[j])) / 2
    return right, pairs


def _parse(arguments: Sequence[str]) -> Any:
    parser = make_parser("benchmarks.predictors", __doc__)
    parser.add_argument("--read", type=Path, help="show the tables of a results file; nothing is measured")
    parser.add_argument("--model", default="testbed", help="testbed, smollm2, a folder or a hub id")
    parser.add_argument("--label", help="what results call the model; default: --model")
    parser.add_argument("--gates", nargs="+", metavar="NAME=FOLDER", help="default: those that come with the model")
    parser.add_argument("--fresh", nargs="*", default=["paper", "sub_block_shared"], choices=list(FORMS))
    parser.add_argument("--train", nargs="*", default=[], metavar="FORM:STEPS", help=f"forms: {', '.join(FORMS)}")
    parser.add_argument("--training-documents", type=int, default=8, help="documents of --train, read again and again")
    parser.add_argument("--rules", nargs="+", help="only these; default: all")
    parser.add_argument("--data", help="texts; default for testbed and smollm2: the testbed's books")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--length", type=int, default=16384, help="tokens a prompt, a multiple of 64")
    parser.add_argument("--documents", type=int, default=2, help="documents of each kind that numbers are taken on")
    parser.add_argument("--samples", type=int, default=16, help="samples a task")
    parser.add_argument("--questions", type=int, default=8, help="questions a sample, of tasks with several")
    parser.add_argument("--tasks", nargs="+", default=["multikey", "keyvalue"], choices=[*TASKS, *TEXT_TASKS])
    parser.add_argument("--method", default="teacher_forcing", choices=("generate", "teacher_forcing"))
    options = parser.parse_args(list(arguments))
    if options.tiny:
        options.length, options.documents, options.samples, options.questions = 1024, 1, 2, 2
        options.train, options.training_documents = ["paper:2"], 1
        options.rules = options.rules or ["top-k 0.1", "relative 2", "0.2"]
    if wrong := [pair for pair in options.gates or () if "=" not in pair]:
        parser.error(f"--gates takes NAME=FOLDER, got {wrong[0]}")
    for wanted in options.train:
        form, _, steps = wanted.partition(":")
        if form not in FORMS or not steps.isdigit() or not int(steps):
            parser.error(f"--train takes FORM:STEPS with a form of {', '.join(FORMS)}, got {wanted}")
    return options


if __name__ == "__main__":
    sys.exit(main())
