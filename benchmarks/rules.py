"""Which rule spends a density best: perplexity over all positions and retrieval, of rules at equal total density.

    python -m benchmarks.rules --model testbed --length 16384 --budget 100
    python -m benchmarks.rules --model smollm2 --gates FOLDER --length 8192 --tasks single --samples 32
    python -m benchmarks.rules --model FOLDER --gates FOLDER --data books.jsonl --length 16384
    python -m benchmarks.rules --device cpu --tiny                                   # a rehearsal, in seconds

Every threshold is fitted on the model's training books (or the first documents of --data) along one dense forward, and
measured on others. A rule is ``form level exponent floor``: one threshold for all rows (``one``) or one for each half
octave of positions (``rows``); for everything, by layer or by head; on ``p n^exponent`` in a row that may see n blocks;
every row keeps block 0 and so many of its best (floor). ``budget`` is what the package does with densities. The scores
are those of the gates, or of the true attention map (--oracle).
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import seerattention as seer
from seerattention import hf
from seerattention.blocks import BlockIndices
from seerattention.cli.common import Terminal, book_tokens, default_gates, open_data, resolve_device
from seerattention.cli.opening import load_model
from seerattention.evaluate import Setting
from seerattention.evaluate.perplexity import cut_documents, evaluate_perplexity
from seerattention.evaluate.retrieval import evaluate_retrieval, make_samples
from seerattention.ops import pooled_attention
from seerattention.policies import Policy, causal_softmax
from seerattention.selectors import LayerInputs, Selector
from seerattention.tasks import TaskGenerator

from .command import case_of, make_parser, make_table, metric
from .results import own_arguments, start_run

BLOCK = 64
LOWEST, HIGHEST, STEPS = -14, 18, 16
BINS = (HIGHEST - LOWEST) * STEPS + 1


@dataclass(frozen=True)
class Rule:
    """What is compared, see the module."""

    form: str
    level: str = "all"
    exponent: float = 1.0
    floor: int = 2

    def __str__(self) -> str:
        return f"{self.form} {self.level} e{self.exponent:g} f{self.floor}"


RULES = [
    *(Rule("one", exponent=exponent) for exponent in (0.0, 0.5, 0.75, 1.0)),
    *(Rule("rows", level) for level in ("all", "layer", "head")),
    *(Rule("rows", floor=floor) for floor in (1, 4, 16, 32)),
    *(Rule("one", floor=floor) for floor in (4, 16, 32)),
]


def scores_of(inputs: LayerInputs, oracle: bool) -> Tensor:
    """Probabilities of blocks, float32 ``[B, H, N, N]``."""
    if oracle:
        return pooled_attention(inputs.q, inputs.k, block_size=BLOCK, scale=inputs.scale, lse=inputs.lse)
    return causal_softmax(inputs.gate_logits())


def values_of(probabilities: Tensor, rule: Rule) -> Tensor:
    """What is compared with thresholds: inf where a block is kept anyway, -1 where it is not causal."""
    num = probabilities.shape[-1]
    block = torch.arange(num, device=probabilities.device)
    own = block[:, None]
    values = probabilities * (own + 1).float() ** rule.exponent
    values = values.masked_fill(block >= own, -1.0)
    if rule.floor > 1:
        best = values.topk(min(rule.floor - 1, num), -1)
        values = values.scatter(-1, best.indices, torch.where(best.values >= 0, math.inf, -1.0))
    return values.masked_fill((block == own) | ((block == 0) & (own > 0)), math.inf)


@dataclass(frozen=True, eq=False)
class Fitted(Selector, registered=False):
    """A rule with its thresholds, ``[layers, heads or 1, N]``."""

    rule: Rule
    thresholds: Tensor
    oracle: bool

    kind, rowwise = "fitted", True

    @property
    def needs_gate(self) -> bool:  # type: ignore[override]
        return not self.oracle

    def select(self, inputs: LayerInputs) -> BlockIndices:
        values = values_of(scores_of(inputs, self.oracle), self.rule)
        limits = self.thresholds[inputs.layer].to(values.device)[None, :, : values.shape[2], None]
        return BlockIndices.from_mask(values > limits, BLOCK)


def histograms(model: Any, prompts: Tensor, rules: Sequence[Rule], oracle: bool) -> dict[tuple[float, int], Tensor]:
    """(exponent, floor) -> float64 ``[layers, heads, N, BINS]`` of the values, the last bin those that are kept."""
    config, num = model.config, prompts.shape[1] // BLOCK
    kinds = {(rule.exponent, rule.floor): rule for rule in rules}
    shape = config.num_hidden_layers, config.num_attention_heads, num, BINS
    found = {kind: torch.zeros(shape, dtype=torch.float64) for kind in kinds}

    def see(inputs: LayerInputs, blocks: BlockIndices | None) -> None:
        probabilities = scores_of(inputs, oracle)
        for kind, rule in kinds.items():
            values = values_of(probabilities, rule)
            bins = ((values.clamp(min=2.0**LOWEST).log2() - LOWEST) * STEPS).clamp(max=BINS - 2).long()
            bins = torch.where(values.isinf(), BINS - 1, bins)
            rows = torch.arange(shape[1] * num, device=values.device).view(1, shape[1], num, 1)
            index = (rows * BINS + bins)[values >= 0]
            counts = torch.bincount(index, minlength=shape[1] * num * BINS).cpu()
            found[kind][inputs.layer] += counts.view(shape[1:])

    with hf.observe(model, see), seer.dense(model), torch.no_grad():
        for prompt in prompts:
            hf.prompts.run_prompt(model, {"input_ids": prompt[None]})
    return found


def fit(counts: Tensor, rule: Rule, density: float) -> Tensor:
    """Thresholds ``[layers, heads or 1, N]`` with which just that share of the blocks is kept."""
    layers, heads, num, _ = counts.shape
    edges = [0, num]
    if rule.form == "rows":
        first = max(4096 // BLOCK, math.ceil(6.4 / density))
        edges = [0, *(round(first * 2 ** (step / 2)) for step in range(40)), num]
        edges = sorted({min(edge, num) for edge in edges})
    groups = {"all": counts.sum((0, 1), keepdim=True), "layer": counts.sum(1, keepdim=True), "head": counts}[rule.level]
    parts = []
    for start, stop in itertools.pairwise(edges):
        above = groups[:, :, start:stop].sum(2).flip(-1).cumsum(-1).flip(-1)  # [l, h, bins]
        wanted = density * above[..., :1]
        place = (above > wanted).sum(-1, keepdim=True).clamp(1, BINS - 1)
        high, low = above.gather(-1, place - 1), above.gather(-1, place)
        share = ((high - wanted) / (high - low).clamp(min=1)).clamp(0, 1)
        limits = 2.0 ** (LOWEST + (place - 1 + share) / STEPS)
        parts.append(limits.expand(layers, heads if rule.level == "head" else 1, stop - start))
    return torch.cat(parts, -1).float()


class _Kept:
    """Density of some policies on the gates' logits along a dense forward."""

    def __init__(self, policies: Sequence[Policy]) -> None:
        self.policies, self.kept, self.all = policies, [0.0] * len(policies), 0.0

    def __call__(self, inputs: LayerInputs, blocks: BlockIndices | None) -> None:
        logits = inputs.gate_logits()
        num = logits.shape[-1]
        self.all += logits.shape[1] * num * (num + 1) / 2
        for place, policy in enumerate(self.policies):
            self.kept[place] += float(policy.select(logits, block_size=BLOCK).counts.sum())


def top_p(model: Any, prompts: Tensor, densities: Sequence[float]) -> dict[float, Policy]:
    """The top-p policies whose densities these are."""
    masses = [step / 40 for step in range(8, 40)]
    seen = _Kept([seer.TopP(p) for p in masses])
    with hf.observe(model, seen), seer.dense(model), torch.no_grad():
        hf.prompts.run_prompt(model, {"input_ids": prompts[:1]})
    found = [kept / seen.all for kept in seen.kept]
    return {
        density: seer.TopP(masses[min(range(len(masses)), key=lambda place: abs(found[place] - density))])
        for density in densities
    }


def settings_of(
    model: Any, gates: Any, prompts: Tensor, options: Any, rules: Sequence[Rule]
) -> Iterator[tuple[float, Setting]]:
    """Everything that is compared, fitted on these prompts; the model is left detached."""
    if gates is not None:
        hf.attach(model, gates, min_context=0)
    else:
        hf.attach(model, seer.GateConfig(), min_context=0)
    counts = histograms(model, prompts, rules, options.oracle)
    masses, budgets = {}, None
    if not options.oracle:
        masses = top_p(model, prompts, options.densities)
        long_enough = [d for d in options.densities if max(4096, 64 * 6.4 / d) <= options.length]
        if long_enough:
            budgets = seer.calibrate(model, list(prompts.split(1)), densities=long_enough)
    hf.detach(model)
    for density in options.densities:
        if not options.oracle:
            yield density, Setting("top-k", gates=gates, policy=seer.TopK(density))
            yield density, Setting("top-p", gates=gates, policy=masses[density])
            if budgets is not None and density in budgets.densities:
                yield density, Setting("budget", gates=gates, policy=budgets.policy(density))
        for rule in rules:
            thresholds = fit(counts[rule.exponent, rule.floor], rule, density)
            selector = Fitted(rule, thresholds, options.oracle)
            yield density, Setting(str(rule), gates=None if options.oracle else gates, selector=selector)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    given = list(own_arguments() if arguments is None else arguments)
    options = _parse(given)
    terminal, device = Terminal(), torch.device(resolve_device(options.device))
    if options.tiny:
        options.length, options.documents, options.samples, options.fit = 4096, 1, 1, 1
    rules = RULES[3:6] if options.tiny else RULES
    model, tokenizer = load_model(options.model, str(device), options.dtype)
    gates = options.gates or (None if options.oracle else default_gates(options.model))
    run = start_run("rules", "benchmarks.rules", given, device, options.output, options.tiny)
    data = open_data(options.data, options.model)
    need = (options.fit + options.documents + 4) * options.length
    books = book_tokens(data, options.model, tokenizer, limit=2 * need)
    bos = tokenizer.bos_token_id
    if data is None:
        train = book_tokens(None, options.model, tokenizer, limit=2 * need, split="train")
        fitted = cut_documents(train, options.length, options.fit, bos=bos)
        documents = cut_documents(books, options.length, options.documents, bos=bos)
    else:
        both = cut_documents(books, options.length, options.fit + options.documents, bos=bos)
        fitted, documents = both[: options.fit], both[options.fit :]
    samples = None
    if options.samples and options.tasks:
        generator = TaskGenerator(tokenizer, books, split="test", seed=0)
        samples = make_samples(generator, options.tasks, options.length, options.samples, 4)
    started = time.monotonic()
    every = itertools.chain([(1.0, Setting.dense())], settings_of(model, gates, fitted, options, rules))
    with torch.no_grad():
        for target, setting in every:
            if options.budget and time.monotonic() - started > options.budget:
                terminal.say(f"the budget of {options.budget:g} s is spent; left out: {setting.name} and what follows")
                break
            read = evaluate_perplexity(model, documents, [setting])[0]
            metrics = {
                "density": read.density,
                "perplexity": read.perplexity()[0],
                "last_quarter": read.last_quarter()[0],
                "first_1k": read.perplexity(0, 1024)[0],
            }
            if samples is not None:
                found = evaluate_retrieval(model, samples, [setting], method="teacher_forcing")[0]
                metrics |= {task: found.accuracy([task]) for task in samples}
                metrics["density_tasks"] = found.density
            case = {"model": options.model, "rule": setting.name, "target": target, "length": options.length}
            case |= {"scores": "oracle" if options.oracle else "gates", "gates": str(options.gates or "its own")}
            run.add({"case": case, "metrics": metrics, "documents": options.documents, "samples": options.samples})
            terminal.say(f"{target:g} {setting.name}: " + ", ".join(f"{k} {v:.3f}" for k, v in metrics.items()))
    columns = [("rule", case_of("rule")), ("target", case_of("target", "g"))]
    columns += [(name, metric(name, ".3f")) for name in run.results[0]["metrics"]]
    terminal.table(make_table(run.results, columns))
    terminal.say(f"written to {run.path}")
    return 0


def _parse(arguments: Sequence[str]) -> Any:
    parser = make_parser("benchmarks.rules", __doc__)
    parser.add_argument("--model", default="testbed", help="testbed, smollm2, a folder or a hub id")
    parser.add_argument("--gates", help="folder of gates; default: those that come with the model")
    parser.add_argument("--data", help="texts; default for testbed and smollm2: the testbed's books")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--length", type=int, default=16384, help="tokens a prompt, a multiple of 64")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.2])
    parser.add_argument("--fit", type=int, default=2, help="prompts that thresholds are fitted on")
    parser.add_argument("--documents", type=int, default=4, help="documents for perplexity")
    parser.add_argument("--samples", type=int, default=8, help="samples a task; 0: no retrieval")
    parser.add_argument("--tasks", nargs="+", default=["multikey", "keyvalue"])
    parser.add_argument("--oracle", action="store_true", help="scores of the true attention map, not of gates")
    return parser.parse_args(list(arguments))


if __name__ == "__main__":
    sys.exit(main())
