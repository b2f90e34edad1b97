"""Forms, losses and targets of gates that were not tried yet, trained side by side and measured at equal density.

    python -m benchmarks.forms --model smollm2 --length 8192 --variants 8x8 8x4 4x4 8x8-mass --references
    python -m benchmarks.forms --model testbed --target max --rate 8e-3 --variants 8x8 4x4 --densities 0.05 0.1 0.15
    python -m benchmarks.forms --read benchmarks/results/h200/forms.json      # the tables again
    python -m benchmarks.forms --device cpu --tiny                            # a rehearsal

All variants of one command learn from the same batches, of which the model's forward and true maps are made once. Then
each chooses blocks under ``RelativeThreshold``, its factor fitted to held-out documents so that it keeps a given share,
and answers for perplexity over all positions, answers to tasks (teacher forcing) and recalls of the true map. What is
read back at equal density is interpolated between measured ones.

``paper+8x8``: the paper's form keeps 30 % of the blocks, and 8x8 sub-blocks choose among these (no kernel saves
anything by it yet: this says whether it would lose anything). ``--references``: the gates that come with the model,
XAttention's score and true maps, under the same rule on the same texts.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

import seerattention as seer
from seerattention import hf
from seerattention.baselines import Oracle, Streaming, XAttention
from seerattention.cli.common import Terminal, book_tokens, open_data, resolve_device
from seerattention.cli.opening import load_model
from seerattention.distillation import DistillConfig
from seerattention.evaluate import Setting
from seerattention.evaluate.perplexity import cut_documents, evaluate_perplexity
from seerattention.evaluate.retrieval import evaluate_retrieval, make_samples
from seerattention.evaluate.tables import Table
from seerattention.gates import BlockGate
from seerattention.hf.state import gates_of
from seerattention.measure import compare_recall
from seerattention.policies import Policy
from seerattention.tasks import TaskGenerator

from .command import Budget, make_parser
from .form_gates import TARGETS, Scorer, Trial, Variant, by_gates, by_selector, in_two_stages
from .results import own_arguments, start_run
from .side_by_side import fit, for_inference, fresh, train

RECALLS = ("block", "needle_heads", "block_needles", "needles")
STAGES = {"paper+8x8": seer.TopK(0.3)}
FIRST_DENSITY = 0.3  # of the first stage where it is a threshold, too


def _sub(name: str, q_pitch: int, k_pitch: int, **options: Any) -> Variant:
    form = {key: options.pop(key) for key in ("width", "share_keys") if key in options}
    return Variant(name, seer.SubBlockGateConfig(q_pitch=q_pitch, k_pitch=k_pitch, **form), **options)


_ALL = (
    Variant("paper", seer.PrefillGateConfig(q_pooling=("max", "min", "avg"))),
    *(_sub(f"{q}x{k}", q, k) for q, k in ((8, 8), (8, 4), (4, 8), (4, 4), (16, 8), (16, 16))),
    _sub("8x8-own", 8, 8, share_keys=False),
    *(_sub(f"8x8-w{width}", 8, 8, width=width) for width in (128, 32, 16)),
    _sub("8x8-lse", 8, 8, reduce="logsumexp"),
    _sub("8x8-maxlse", 8, 8, reduce="max_lse"),
    *(_sub(f"{q}x{k}-mass", q, k, reduce="mass") for q, k in ((8, 8), (8, 4), (4, 4), (16, 8))),
    _sub("8x8-mass-own", 8, 8, reduce="mass", share_keys=False),
    _sub("8x8-mass-w128", 8, 8, reduce="mass", width=128),
    _sub("8x8-absmax", 8, 8, absmax=True),
    *(_sub(f"8x8-{loss}", 8, 8, loss=loss) for loss in ("membership", "rank", "not_local", "outside")),
    *(_sub(f"8x8-{target}", 8, 8, target=target) for target in TARGETS),
)
VARIANTS = {variant.name: variant for variant in _ALL}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    given = list(own_arguments() if arguments is None else arguments)
    options = _parse(given)
    terminal = Terminal()
    if options.read:
        files = [json.loads(path.read_text()) for path in options.read]
        show([result for held in files for run in held["runs"] for result in run["results"]], terminal)
        return 0
    device = torch.device(resolve_device(options.device))
    model, tokenizer = load_model(options.model, str(device), options.dtype)
    batches, fitted, documents, samples = read_texts(model, tokenizer, options)
    variants = [VARIANTS[name] for name in options.variants]
    run = start_run("forms", "benchmarks.forms", given, device, options.output, options.tiny)
    (dense,) = evaluate_perplexity(model, documents, [Setting.dense()])
    case = {"model": options.label or options.model, "length": options.length}
    run.add({"case": {**case, "variant": "dense", "asked": 1.0}, **_numbers(model, dense, dense, samples, 1.0)})
    started = time.monotonic()
    hf.attach(model, selector=Streaming(), min_context=0)
    gates, losses = fresh(model, variants), {}
    config = DistillConfig(steps=options.steps, rows=options.rows, skip_rows=0.0, learning_rate=options.rate)
    if variants:
        losses = train(model, variants, gates, batches, config)
    trained = {name: for_inference(layers, model.dtype) for name, layers in gates.items()}
    facts: dict[str, dict[str, Any]] = {
        variant.name: {
            **_cost(trained[variant.name]),
            "target": variant.target,
            "steps": options.steps,
            "loss": [round(loss, 5) for loss in losses[variant.name][:: max(1, options.steps // 15)]],
        }
        for variant in variants
    }
    terminal.say(f"trained {len(variants)} variants in {time.monotonic() - started:.0f} s")
    scorers: dict[str, Scorer] = {
        variant.name: by_gates(trained[variant.name], variant.loss == "outside") for variant in variants
    }
    if options.references:
        scorers |= {f"true map, {kind}": by_selector(Oracle(reduce=kind)) for kind in ("row_mass", "max")}
        scorers["XAttention"] = by_selector(XAttention(policy=seer.TopP(0.9)))
        hf.detach(model)
        shipped = shipped_gates(model, options)
        scorers["shipped"], facts["shipped"] = by_gates(shipped), _cost(shipped)
        hf.attach(model, selector=Streaming(), min_context=0)
    if options.only:
        scorers = {name: scorer for name, scorer in scorers.items() if name in options.only}
    policies = fit(model, fitted, scorers, [*options.densities, FIRST_DENSITY], options.exponents)
    two = two_stages(trained, policies)
    if two:
        scorers |= two
        policies |= fit(model, fitted, two, options.densities, options.exponents)
    tried = {
        name if exponent == 1 else f"{name}, exponent {exponent:g}": (name, exponent)
        for name in scorers
        for exponent in options.exponents
    }
    at = options.recall_density
    choices = {title: Trial(scorers[name], policies[name, exponent][at]) for title, (name, exponent) in tried.items()}
    recalls = compare_recall(model, [{"input_ids": document[None]} for document in fitted], choices)
    hf.detach(model)
    budget = Budget(options.budget, terminal)  # of what is measured: it must not end before it begins
    for title, (name, exponent) in budget.of(tried.items(), lambda pair: pair[0]):
        kept = recalls[title].numbers()
        known = {**facts.get(name, {}), "recalls": {recall: kept[recall] for recall in RECALLS}}
        for density in options.densities:
            policy: Any = policies[name, exponent][density]
            setting = Setting(title, selector=Trial(scorers[name], policy))
            (read,) = evaluate_perplexity(model, documents, [setting])
            asked = samples if density in options.task_densities else {}
            found = _numbers(model, read, dense, asked, policy.factor, setting)
            run.add({"case": {**case, "variant": title, "asked": density}, **found, **known})
            told = {**found["metrics"], **found["metrics"].get("tasks", {})}
            numbers = ", ".join(f"{key} {value:.3f}" for key, value in told.items() if isinstance(value, float))
            terminal.say(f"{title} {density:g}: {numbers}")
    show(run.results, terminal)
    terminal.say(f"written to {run.path} after {time.monotonic() - started:.0f} s")
    return 0


def two_stages(
    trained: Mapping[str, Sequence[BlockGate]], policies: Mapping[tuple[str, float], Mapping[float, Policy]]
) -> dict[str, Scorer]:
    """Where both stages were trained."""
    if not {"paper", "8x8"} <= set(trained):
        return {}
    firsts = {"top-k": STAGES["paper+8x8"], "relative": policies["paper", next(e for _, e in policies)][FIRST_DENSITY]}
    return {
        f"paper+8x8, {name}": in_two_stages(trained["paper"], trained["8x8"], keep) for name, keep in firsts.items()
    }


def shipped_gates(model: Any, options: Any) -> list[BlockGate]:
    """The gates that come with the model (or ``--gates``), apart from it."""
    name = "smollm2" if model.config.num_hidden_layers == 30 else "testbed"
    hf.attach(model, options.gates or seer.testbed.gates_path(name), min_context=0)
    found = [copy.deepcopy(gate) for gate in gates_of(model, "prefill") if gate is not None]
    hf.detach(model)
    return found


def read_texts(model: Any, tokenizer: Any, options: Any) -> tuple[Iterator[Any], Tensor, Tensor, dict[str, Any]]:
    """Training batches, documents to fit thresholds on, documents for perplexity, samples of the tasks."""
    bos, length, size = tokenizer.bos_token_id, options.length, options.batch_size
    held = open_data(options.held_out, options.model)
    count = options.documents + options.fit
    test = book_tokens(held, options.model, tokenizer, limit=2 * (count + 4) * length)
    both = cut_documents(test, length, count, bos=bos)
    samples = {}
    if options.samples:
        generator = TaskGenerator(tokenizer, test, split="test", seed=0)
        samples = make_samples(generator, options.tasks, length, options.samples, options.questions)
    wanted = options.steps * size
    books = book_tokens(
        open_data(options.data, options.model), options.model, tokenizer, limit=wanted * length, split="train"
    )
    if options.woven:
        from testbed.distil import TaskBatches

        batches = iter(TaskBatches(tokenizer, books, length, size, options.steps, split="train", seed=0))
        return batches, both[: options.fit], both[options.fit :], samples
    pieces = max(1, sum(len(book) // (length - 1) for book in books))
    documents = cut_documents(books, length, min(wanted, pieces), bos=bos)
    order = itertools.cycle(torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist())
    plain = ({"input_ids": documents[[next(order) for _ in range(size)]]} for _ in range(options.steps))
    return plain, both[: options.fit], both[options.fit :], samples


def _numbers(
    model: Any, read: Any, dense: Any, samples: Mapping[str, Any], factor: float, setting: Setting | None = None
) -> dict[str, Any]:
    """What is measured of a setting; losses a document, so that others can be paired with them."""
    rise, error = read.loss_increase(dense)
    metrics: dict[str, Any] = {
        "density": read.density,
        "factor": factor,
        "perplexity": read.perplexity()[0],
        "rise": math.expm1(rise),
        "rise_error": 0.0 if math.isnan(error) else error,
        "last_quarter": read.last_quarter()[0],
        "first_1k": read.perplexity(0, 1024)[0],
    }
    if samples:
        found = evaluate_retrieval(model, samples, [setting or Setting.dense()], method="teacher_forcing")[0]
        metrics["tasks"] = {task: float(found.accuracy([task])) for task in samples}
        metrics["density_tasks"] = found.density
    return {"metrics": metrics, "document_losses": [round(float(x), 5) for x in read.losses.mean(-1)]}


def _cost(gates: Sequence[BlockGate]) -> dict[str, float]:
    """Of all layers: parameters, their bytes in 16 bits, and bytes of encoded queries and keys a token."""
    parameters = sum(p.numel() for gate in gates for p in gate.parameters())
    encoded = 0.0
    for gate in gates:
        width, keys = gate.width, cast(Tensor, gate.k_linear)
        encoded += 2 * width * (gate.num_heads / gate.q_pitch + keys.shape[0] / gate.k_pitch)
    products = sum(gate.num_heads * gate.width / (gate.q_pitch * gate.k_pitch) for gate in gates)
    return {
        "parameters": parameters,
        "parameter_bytes": 2 * parameters,
        "encoded_bytes_per_token": encoded,
        "products_per_pair": products,
    }


def show(results: Sequence[Mapping[str, Any]], terminal: Terminal) -> None:
    """A table for each model: the rise of perplexity at equal densities, and the rest at the measured ones."""
    latest = {json.dumps(result["case"], sort_keys=True): result for result in results}
    key = lambda result: (result["case"]["model"], result["case"]["length"])  # noqa: E731
    for (model, length), group in itertools.groupby(sorted(latest.values(), key=key), key):
        terminal.say(f"{model}, {length} tokens")
        terminal.table(table(list(group)))


def table(cells: Sequence[Mapping[str, Any]], wanted: Sequence[float] = (0.1, 0.15, 0.2, 0.25)) -> Table:
    """One row a variant."""
    rows = []
    by_variant: dict[str, list[Mapping[str, Any]]] = {}
    for cell in cells:
        by_variant.setdefault(cell["case"]["variant"], []).append(cell)
    for name, group in by_variant.items():
        group.sort(key=lambda cell: cell["metrics"]["density"])
        points = [(cell["metrics"]["density"], cell["metrics"]["rise"]) for cell in group]
        rises = [rise_at(points, density) for density in wanted]
        asked = [cell for cell in group if "tasks" in cell["metrics"]]
        tasks = "; ".join(
            f"{cell['metrics']['density_tasks']:.3f}: "
            + " / ".join(f"{100 * value:.0f}" for value in cell["metrics"]["tasks"].values())
            for cell in asked
        )
        recalls = group[0].get("recalls", {})
        told = [f"{recalls[key]:.3f}" if recalls.get(key) is not None else "" for key in RECALLS[:3]]
        texts = ["" if rise is None else f"{100 * rise:+.2f} %" for rise in rises]
        measured = ", ".join(f"{density:.3f}" for density, _ in points)
        rows.append([name, measured, *texts, tasks, *told, str(group[0].get("parameters", ""))])
    headers = ["variant", "densities", *(f"at {d:g}" for d in wanted), "tasks, %", *RECALLS[:3], "parameters"]
    return Table(headers, rows, "Rise of perplexity over dense, between measured densities along their logarithms.")


def rise_at(points: Sequence[tuple[float, float]], density: float) -> float | None:
    """Between the two measured densities around, linear in the logarithm; None where there are none. Points a little
    to the side (a twentieth) count."""
    points = sorted(points)
    if len(points) < 2 or not points[0][0] / 1.05 <= density <= points[-1][0] * 1.05:
        return None
    x, y = np.log([point[0] for point in points]), np.array([point[1] for point in points])
    place = int(np.clip(np.searchsorted(x, math.log(density)), 1, len(x) - 1))
    share = (math.log(density) - x[place - 1]) / (x[place] - x[place - 1])
    return float(y[place - 1] + share * (y[place] - y[place - 1]))


def _parse(arguments: Sequence[str]) -> Any:
    parser = make_parser("benchmarks.forms", __doc__)
    parser.add_argument("--read", type=Path, nargs="+", help="show tables of results files; nothing is measured")
    parser.add_argument("--model", default="testbed", help="testbed, smollm2, a folder or a hub id")
    parser.add_argument("--label", help="what results call the model; default: --model")
    parser.add_argument("--variants", nargs="*", default=["8x8", "8x4", "8x8-mass"], choices=list(VARIANTS))
    parser.add_argument("--target", choices=TARGETS, help="of variants that do not name one; default: row_mass")
    parser.add_argument("--references", action="store_true", help="gates that come with it, XAttention, true maps")
    parser.add_argument("--only", nargs="+", help="of all these, what is measured: e.g. shipped XAttention 8x8")
    parser.add_argument("--gates", help="folder of the gates of --references; default: those that come with the model")
    parser.add_argument("--data", help="texts to train on; default for testbed and smollm2: the testbed's books")
    parser.add_argument("--held-out", help="texts to measure on; likewise")
    parser.add_argument("--woven", action="store_true", help="train on tasks woven into the texts, as testbed gates do")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--length", type=int, default=16384, help="tokens a prompt, a multiple of 64")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rows", type=float, default=0.25, help="share of the rows in each step's loss")
    parser.add_argument("--rate", type=float, default=2e-3, help="most learning rate")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.15, 0.2])
    parser.add_argument("--exponents", type=float, nargs="+", default=[1.0], help="of the RelativeThreshold")
    parser.add_argument(
        "--task-densities", type=float, nargs="*", default=[0.15], help="those at which tasks are asked"
    )
    parser.add_argument("--recall-density", type=float, default=0.15)
    parser.add_argument("--fit", type=int, default=2, help="documents that thresholds are fitted on")
    parser.add_argument("--documents", type=int, default=8, help="documents for perplexity")
    parser.add_argument("--tasks", nargs="+", default=["multikey", "keyvalue"])
    parser.add_argument("--samples", type=int, default=16, help="samples a task; 0: no tasks")
    parser.add_argument("--questions", type=int, default=8, help="questions a sample, of tasks with several")
    options = parser.parse_args(list(arguments))
    if options.tiny:
        options.length, options.steps, options.documents, options.samples = 2048, 2, 1, min(1, options.samples)
        options.batch_size, options.fit, options.recall_density = 1, 1, 0.5
        options.densities, options.task_densities = [0.45, 0.5], [0.5]
    if options.recall_density not in options.densities or not set(options.task_densities) <= set(options.densities):
        parser.error("--recall-density and --task-densities must be among --densities")
    if options.target:
        plain = [name for name in VARIANTS if name not in [f"8x8-{target}" for target in TARGETS]]
        for name in plain:
            VARIANTS[name] = Variant(**{**vars(VARIANTS[name]), "target": options.target})
    return options


if __name__ == "__main__":
    sys.exit(main())
