"""What choosing the blocks of one layer costs: gates beside training-free methods, at one density.

    python -m benchmarks.selection --lengths 8192 32768 --budget 80     # the shape of an 8B Llama, in 90 s
    python -m benchmarks.selection --lengths 131072 --others none       # gates alone, in seconds
    python -m benchmarks.selection --device cpu --tiny                  # a rehearsal, in seconds
    seer report RESULTS --selection benchmarks/results/<device>/selection.json

Each method is brought to the density by the knob of its rule, on the very inputs that are timed, which are normal
random numbers: what a method costs depends on shapes and densities, and for some on how many heads take which branch.
Before it is timed its lists must hold the diagonal. "kernels": our Triton kernels pool, score and select. "plain
torch": the method is in here as a yardstick of quality, with products in float32, and is not what its authors' kernels
take; tables mark it. Times are medians of device time, methods taking turns, the L2 cache flushed before each call.
Attention itself, dense and sparse on the lists of the first gate, stands beside them as a scale.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from seerattention.baselines import Oracle, OracleCover
from seerattention.cli.common import Terminal, resolve_device
from seerattention.config import PrefillGateConfig, SubBlockGateConfig
from seerattention.evaluate.calibration import search
from seerattention.evaluate.comparison_tables import costs_table
from seerattention.evaluate.contenders import Contender, make_contenders
from seerattention.evaluate.kernels import AttentionShape, WrongResultError, dense_kernels, make_gate, make_inputs
from seerattention.evaluate.timing import peak_memory, time_functions
from seerattention.ops.block_sparse_attention import block_sparse_attention
from seerattention.ops.indices import BlockIndices
from seerattention.selectors import LayerInputs

from .command import Budget, make_parser, release
from .registry import SHAPES, TINY_LENGTHS
from .results import own_arguments, start_run

#: Forms of gates to time, by what tables call them. Another form joins by a line.
FORMS: dict[str, Any] = {
    "gate, paper's form": PrefillGateConfig(),
    "gate, max, min and mean of queries": PrefillGateConfig(q_pooling=("max", "min", "avg")),
    "gate, 8x8 sub-blocks": SubBlockGateConfig(),
    "gate, 8x8 sub-blocks, width 64": SubBlockGateConfig(width=64),
    "gate, 8x8 sub-blocks, mass": SubBlockGateConfig(reduce="mass"),
    "gate, 8x4 sub-blocks, mass": SubBlockGateConfig(k_pitch=4, reduce="mass"),
    "gate, 4x4 sub-blocks, mass": SubBlockGateConfig(q_pitch=4, k_pitch=4, reduce="mass"),
}
OTHERS = (
    "streaming,random,mean_pool,sub_block,sub_block:query_parts=8:key_parts=8,xattention,xattention:stride=16,"
    "cosa,flashprefill,flashprefill_v2,rbs,prism,sparge,flexprefill,minference,oracle:policy=top_k(0.1)"
)
_SECONDS = 0.15  # device time on each method


@dataclass(frozen=True)
class Timed:
    """A method that passed its check.

    Attributes:
        contender, selector: what it is, at the density.
        inputs: of the layer.
        lists: what it chose.
    """

    contender: Contender
    selector: Any
    inputs: LayerInputs
    lists: BlockIndices

    @property
    def name(self) -> str:
        """With its rule."""
        return self.contender.family

    @property
    def how(self) -> str:
        """What computes it."""
        ours = self.contender.selector.needs_gate or isinstance(self.contender.selector, Oracle)
        return "kernels" if ours and self.inputs.q.is_cuda else "plain torch"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    given = list(own_arguments() if arguments is None else arguments)
    options = _parse(given)
    terminal, device = Terminal(), torch.device(resolve_device(options.device))
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    shape = SHAPES["tiny" if options.tiny else options.shape]
    shape = AttentionShape(shape.heads, shape.kv_heads, shape.head_dim, dtype=dtype, block_size=64)
    run = start_run("selection", "benchmarks.selection", given, device, options.output, options.tiny)
    budget, status = Budget(options.budget, terminal), 0
    lengths = sorted(options.lengths or (TINY_LENGTHS if options.tiny else (8192, 32768)))
    for length in budget.of(lengths, lambda length: f"{length} tokens"):
        terminal.say(f"selection, {length} tokens, density {options.density:g} on {device}")
        seconds = 0.01 if options.tiny else _SECONDS
        results, wrong = measure(shape, length, options.density, device, seconds, budget, options.others)
        for result in results:
            run.add(result)
        terminal.table(costs_table([result["costs"] for result in results]))
        for name, reason in wrong.items():
            terminal.say(f"wrong: {name}: {reason}")
        status |= bool(wrong)
        release(device)
    terminal.say(f"written to {run.path}")
    return status


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = make_parser("benchmarks.selection", __doc__)
    parser.add_argument("--shape", default="8b", choices=list(SHAPES))
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens; default: 8192 32768")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--others", default=OTHERS, help="training-free methods, joined by commas, or none")
    return parser.parse_args(arguments)


@torch.inference_mode()
def measure(
    shape: AttentionShape,
    length: int,
    density: float,
    device: torch.device,
    seconds: float,
    budget: Budget | None = None,
    others: str = OTHERS,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """One result a method, and what is wrong with those whose lists are.

    Args:
        seconds: device time on each.
        budget: no method is brought to the density once it is spent.
        others: training-free methods, by the names of ``seer compare --selectors``; ``"none"``: gates alone.
    """
    q, k, v = make_inputs(shape, length, length, device)
    timed: dict[str, Timed] = {}
    wrong: dict[str, str] = {}
    pairs = [
        (contender, inputs) for inputs, found in _contenders(shape, length, q, k, v, others) for contender in found
    ]
    for contender, inputs in pairs if budget is None else budget.of(pairs, lambda pair: pair[0].family):
        try:
            one = _at_density(contender, inputs, density)
        except WrongResultError as error:
            wrong[contender.family] = str(error)
        else:
            timed[one.name] = one
        release(device)
    functions: dict[str, Callable[[], Any]] = {
        name: partial(one.selector.select, one.inputs) for name, one in timed.items()
    }
    lists = next(iter(timed.values())).lists
    scale: dict[str, Callable[[], Any]] = {
        "attention, dense": next(iter(dense_kernels(q, k, v).values())),
        "attention, sparse": partial(block_sparse_attention, q, k, v, lists),
    }
    times = time_functions({**functions, **scale}, device, seconds=seconds, min_repeats=3, max_repeats=50)
    results = []
    for name, function in {**functions, **scale}.items():
        method = timed.get(name)
        numbers = times[name].to_dict()
        costs = {
            "selector": name,
            "length": length,
            "median_s": numbers["median_s"],
            "density": method.lists.density() if method else 1.0 if name.endswith("dense") else lists.density(),
            "implementation": method.how if method else "kernels" if q.is_cuda else "plain torch",
            "decides": "" if method is None else "row by row" if method.selector.rowwise else "whole prompt",
        }
        case = {"op": "selection", "selector": name, "length": length, "density": density, "heads": shape.heads}
        peak = {"peak_bytes": peak_memory(function, device)}
        results.append({"case": case, "metrics": {**numbers, **peak}, "costs": costs})
    return results, wrong


def _contenders(
    shape: AttentionShape, length: int, q: Any, k: Any, v: Any, names: str
) -> list[tuple[LayerInputs, list[Contender]]]:
    """Inputs of a layer, and what chooses from them: each form of gate in a layer of its own."""
    found = []
    for name, config in FORMS.items():
        made = make_gate(shape, length, q.device, spec=config)
        inputs = _inputs(shape, q, k, v, made.cos, made.sin, made.gate)
        found.append((inputs, make_contenders({name: "fresh"}, "", ("project", "top_k"))))
    if names == "none":
        return found
    made = make_gate(shape, length, q.device)
    others = make_contenders({}, names, ("own", "project"))
    assert not any(isinstance(each.selector, OracleCover) for each in others)  # minutes, not milliseconds
    found.append((_inputs(shape, q, k, v, made.cos, made.sin, None), others))
    return found


def _inputs(shape: AttentionShape, q: Any, k: Any, v: Any, cos: Any, sin: Any, gate: Any) -> LayerInputs:
    """Of a whole prompt. Rotating q and k changes no time, so they serve on both sides of RoPE."""
    return LayerInputs(0, q, k, v, q, k, cos, sin, None, shape.head_dim**-0.5, gate)


def _at_density(contender: Contender, inputs: LayerInputs, density: float) -> Timed:
    """The contender with the knob that keeps so much of these inputs.

    Raises:
        WrongResultError: a list lacks its diagonal block, so that tokens would see nothing.
    """

    def kept(value: float | int, contender: Contender) -> float:
        return contender.at(value).select(inputs).density()

    for each in contender.conceding():
        value, found, _ = search(each.knob, density, partial(kept, contender=each))
        selector = each.at(value)
        if found <= 1.05 * density:
            break
    lists = selector.select(inputs)
    if not bool(lists.to_mask().diagonal(dim1=-2, dim2=-1).all()):
        raise WrongResultError("a list lacks its diagonal block")
    return Timed(each, selector, inputs, lists)


if __name__ == "__main__":
    sys.exit(main())
