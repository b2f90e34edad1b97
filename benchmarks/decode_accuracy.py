"""What sparse decoding costs in answers: lists of numbers, said again after long prompts, greedily.

    python -m benchmarks.decode_accuracy                                          # the embedded model, its own gates
    python -m benchmarks.decode_accuracy --gates decode-gates --policies "TokenBudget(1600);RelativeThreshold(1.5)"
    python -m benchmarks.decode_accuracy --model smollm2 --gates FOLDER --length 8192 --count 128
    python -m benchmarks.decode_accuracy --device cpu --tiny                      # a rehearsal, in seconds

A prompt is book text with a list of numbers in its first three quarters; it ends with the first numbers of that list
(``--cue`` tokens), and the right answer is the rest (``--new`` tokens): as many look-ups in a row, and a wrong one
spoils the answer. Prompts are read densely throughout, so that only decoding differs. Of each set of gates and policy:
the share of the answers that are right to the last token, what is lost against dense decoding of the same prompts in
points with the standard error of the paired difference, the density of the sparse steps, and what the gates add to the
cache.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

import seerattention as seer
from seerattention import hf
from seerattention.baselines import parse_selectors
from seerattention.cli.common import Terminal, book_tokens, default_gates, open_data, resolve_device
from seerattention.cli.opening import load_model
from seerattention.evaluate.forward import prompt_device
from seerattention.evaluate.generation import decode_greedily
from seerattention.measure import CacheMemory, cache_memory
from seerattention.policies import KINDS, Policy
from seerattention.tasks import TaskGenerator

from .command import Budget, Result, case_of, make_parser, make_table, metric
from .results import own_arguments, start_run

DENSE = "dense"


@dataclass(frozen=True)
class Lists:
    """Prompts of one length, int64 ``[N, T]``, and the right answers to them, ``[N, new]``."""

    prompts: Tensor
    answers: Tensor


@dataclass(frozen=True)
class Answered:
    """What was decoded for all prompts.

    Attributes:
        right: bool ``[N, new]``, token by token; what follows a wrong token was decoded after it.
        memory: of the last batch's cache.
    """

    right: np.ndarray
    memory: CacheMemory
    seconds: float

    @property
    def exact(self) -> np.ndarray:
        """bool ``[N]``: right to the last token."""
        return np.asarray(self.right.all(-1))


def make_lists(generator: TaskGenerator, count: int, length: int, cue: int, new: int) -> Lists:
    """``count`` prompts of ``length`` tokens, with answers of ``new``."""
    made = [generator.list_copy(length + new, cue, new).input_ids for _ in range(count)]
    ids = torch.from_numpy(np.stack(made))
    return Lists(ids[:, :length], ids[:, length:])


def parse_policies(text: str) -> dict[str, Policy]:
    """Policies by what they are called: ``"TokenBudget(1600);relative_threshold(1.5, min_blocks=8)"``.

    Raises:
        ValueError: no policy, one that is not known, or wrong arguments.
    """
    kinds = {policy.__name__: kind for kind, policy in KINDS.items()}
    found: dict[str, Policy] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, bracket, arguments = part.partition("(")
        described = kinds.get(name.strip(), name.strip()) + bracket + arguments
        (selector,) = parse_selectors(f"gate:policy={described}").values()
        found[part] = selector.policy  # type: ignore[attr-defined]
    if not found:
        raise ValueError(f"--policies needs at least one policy, such as TokenBudget(1600), got {text!r}")
    return found


@torch.inference_mode()
def answer(model: Any, lists: Lists, batch_size: int) -> Answered:
    """Decode all prompts greedily, with the model as it is."""
    started, device, right = time.monotonic(), prompt_device(model), []
    memory = CacheMemory(0, 0)
    for prompts, answers in zip(lists.prompts.split(batch_size), lists.answers.split(batch_size), strict=True):
        cache = DynamicCache(config=model.config.get_text_config())
        made = decode_greedily(model, prompts.to(device), answers.shape[1], cache=cache).cpu()
        memory = cache_memory(cache)
        right.append((made == answers).numpy())
    return Answered(np.concatenate(right), memory, time.monotonic() - started)


def paired_loss(dense: np.ndarray, sparse: np.ndarray) -> tuple[float, float | None]:
    """What is lost in points, and the standard error of the difference on the same prompts (None: of one prompt)."""
    lost = 100 * (dense.astype(float) - sparse.astype(float))
    error = float(lost.std(ddof=1) / math.sqrt(len(lost))) if len(lost) > 1 else None
    return float(lost.mean()), error


def metrics_of(answered: Answered, dense: Answered, density: float) -> dict[str, Any]:
    """The numbers of a case."""
    loss, error = paired_loss(dense.exact, answered.exact)
    return {
        "exact": float(answered.exact.mean()),
        "token_accuracy": float(answered.right.mean()),
        "loss_points": loss,
        "loss_standard_error": error,
        "density": density,
        "gate_bytes": answered.memory.gates,
        "cache_bytes": answered.memory.keys_and_values,
        "gate_memory_share": answered.memory.share,
        "seconds": answered.seconds,
    }


def decoded_sparsely(
    model: Any, lists: Lists, gates: Any, policies: dict[str, Policy], options: Any, budget: Budget
) -> Iterator[tuple[str, Answered, float]]:
    """Name of the policy, answers and density of the sparse steps, with one set of gates."""
    attach(model, gates)
    try:
        for name, policy in budget.of(policies.items(), lambda item: f"{gates}, {item[0]}"):
            hf.set_policy(model, decode=policy)
            with seer.record(model) as stats:
                answered = answer(model, lists, options.batch_size)
            if not stats.sparse_calls and not isinstance(policy, seer.Dense):
                raise ValueError(f"{gates}, {name}: nothing was decoded sparsely: {stats.dense_reasons}")
            yield name, answered, stats.density
    finally:
        hf.detach(model)


def attach(model: Any, gates: Any) -> None:
    """Gates of decoding; what they have for prompts is left out.

    Raises:
        ValueError: they have none of decoding.
    """
    # A sparse policy for decoding is refused where there is no gate for it.
    hf.attach(model, gates, prefill=seer.Dense(), decode=seer.TokenBudget(1600), min_context=0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    given = list(own_arguments() if arguments is None else arguments)
    options, policies = _parse(given)
    terminal, device = Terminal(), torch.device(resolve_device(options.device))
    data = open_data(options.data, options.model)
    model, tokenizer = load_model(options.model, str(device), options.dtype)
    folders = options.gates or [default_gates(options.model)]
    for folder in folders:  # what is wrong with gates is told before an answer is decoded
        attach(model, folder)
        hf.detach(model)
    books = book_tokens(data, options.model, tokenizer, limit=64 * options.length)
    generator = TaskGenerator(tokenizer, books, split="test", seed=options.seed)
    lists = make_lists(generator, options.count, options.length, options.cue, options.new)
    run = start_run("decode_accuracy", "benchmarks.decode_accuracy", given, device, options.output, options.tiny)
    budget = Budget(options.budget, terminal)
    common = {"model": options.label or options.model, "length": options.length, "cue": options.cue}
    common |= {"new": options.new, "count": options.count, "seed": options.seed}

    def add(gates: str, policy: str, described: Any, answered: Answered, density: float) -> None:
        metrics = metrics_of(answered, dense, density)
        exact = "".join(map(str, answered.exact.astype(int)))  # answer by answer, for other pairs than with dense
        case = {**common, "gates": gates, "policy": policy}
        run.add({"case": case, "metrics": metrics, "policy": described, "exact": exact})
        terminal.say(f"{gates}, {policy}: {100 * metrics['exact']:.1f} % exact, density {density:.3f}")

    dense = answer(model, lists, options.batch_size)
    add("none", DENSE, None, dense, 1.0)
    for folder in folders:
        name = "its own" if options.gates is None else str(folder)
        for policy, answered, density in decoded_sparsely(model, lists, folder, policies, options, budget):
            add(name, policy, policies[policy].to_dict(), answered, density)
    terminal.table(_table(run.results))
    terminal.say(f"written to {run.path}")
    return 0


def _table(results: Sequence[Result]) -> Any:
    def loss(result: Result) -> str:
        found = result["metrics"]
        error = found["loss_standard_error"]
        if result["case"]["policy"] == DENSE:
            return ""
        return f"{found['loss_points']:.1f}" + ("" if error is None else f" ± {error:.1f}")

    columns = [
        ("gates", case_of("gates")),
        ("policy", case_of("policy")),
        ("density", metric("density", ".3f")),
        ("exact, %", metric("exact", ".1f", 100)),
        ("tokens, %", metric("token_accuracy", ".2f", 100)),
        ("lost, points", loss),
        ("gates in the cache, %", metric("gate_memory_share", ".2f", 100)),
        ("seconds", metric("seconds", ".0f")),
    ]
    case = results[0]["case"]
    caption = (
        f"{case['count']} lists of {case['new']} tokens after prompts of {case['length']}, decoded greedily; prompts "
        "are read densely. Lost: against dense decoding of the same prompts, ± standard error of the paired difference."
    )
    return make_table(results, columns, caption)


def _parse(arguments: Sequence[str]) -> tuple[Any, dict[str, Policy]]:
    parser = make_parser("benchmarks.decode_accuracy", __doc__)
    parser.add_argument("--model", default="testbed", help="testbed, smollm2, a folder or a hub id")
    parser.add_argument("--label", help="what results call the model; default: --model")
    parser.add_argument("--gates", nargs="+", metavar="FOLDER", help="default: those that come with the model")
    parser.add_argument(
        "--policies",
        default="TokenBudget(1600);RelativeThreshold(1.5)",
        help="which blocks a decoded token reads, separated by semicolons",
    )
    parser.add_argument("--data", help="texts; default for testbed and smollm2: the testbed's books")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--count", type=int, default=512, help="answers")
    parser.add_argument("--length", type=int, default=16384, help="tokens a prompt")
    parser.add_argument("--new", type=int, default=40, help="tokens an answer")
    parser.add_argument("--cue", type=int, default=24, help="tokens of the list that the prompt ends with")
    parser.add_argument("--batch-size", type=int, default=32, help="prompts at a time")
    parser.add_argument("--seed", type=int, default=3, help="of the prompts")
    options = parser.parse_args(list(arguments))
    if options.tiny:
        options.length, options.count, options.new, options.batch_size = 1024, 6, 8, 3
    for name in ("count", "length", "new", "cue", "batch_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if options.length < 2 * options.cue + options.new + 1:
        parser.error(f"--length {options.length} has no room for a list of {options.cue + options.new} tokens")
    try:
        return options, parse_policies(options.policies)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
