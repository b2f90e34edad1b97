"""Time ops against their rivals, correctness first.

    python -m benchmarks.run --op block_sparse_attention --lengths 8192 32768 131072 --densities 0.05 0.1 0.2
    python -m benchmarks.run --op all --budget 540
    python -m benchmarks.run --op all --device cpu --tiny                           # a rehearsal, in seconds

The CPU's figures (README) come from

    OMP_NUM_THREADS=2 python -m benchmarks.run --op block_sparse_attention --device cpu --shape testbed \\
        --dtypes float32 bfloat16 --lengths 4096 8192 16384 --densities 0.05 0.12 --lists random structured testbed

Every candidate runs once and is compared with the float32 reference on sampled query blocks, NaN anywhere in its result
included; one that is wrong is named with its error, no speed of it is shown, and if it is ours the exit status is 1.
Times are medians of device time between CUDA events, candidates taking turns, the L2 cache flushed before every call.
TFLOP/s count the tiles that are visited, 4 * block * block * head_dim each, the diagonal tile once; the density is that
of the very lists that run. Our kernel returns LSE and masks the diagonal exactly; dense kernels and FlexAttention
return no LSE, which favours them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from seerattention.cli.common import Terminal, resolve_device
from seerattention.evaluate.tables import Table, format_length

from .command import Budget, make_parser, release
from .lists import KINDS
from .measure import Options, measure
from .registry import OPS, SHAPES, TINY_CHUNK_QUERIES, TINY_LENGTHS, Case, make_cases
from .results import own_arguments, start_run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    given = list(own_arguments() if arguments is None else arguments)
    options = _parse(given)
    terminal = Terminal()
    device = torch.device(resolve_device(options.device))
    dtypes = [getattr(torch, name) for name in options.dtypes or (["float32"] if options.tiny else ["bfloat16"])]
    settings = Options(
        device,
        seconds=0.01 if options.tiny else options.seconds,
        flex=not any("FlexAttention".startswith(part) for part in options.without),
        compiled=not options.tiny,
        without=tuple(options.without),
    )
    budget, status = Budget(options.budget, terminal), 0
    for name in OPS if options.op == ["all"] else options.op:
        cases = make_cases(
            name,
            shapes=["tiny"] if options.tiny else options.shape,
            lengths=options.lengths or (TINY_LENGTHS if options.tiny else None),
            densities=options.densities,
            lists=options.lists,
            dtypes=dtypes,
            queries=options.queries or (TINY_CHUNK_QUERIES if options.tiny else None),
            block_size=options.block_size,
        )
        run = start_run(name, "benchmarks.run", given, device, options.output, options.tiny)
        terminal.say(f"{name}: {OPS[name].text}; {len(cases)} cases on {device}")
        with terminal.progress(name, len(cases)) as advance:
            for case in budget.of(cases, lambda case: f"{_title(case)} ...", prefix=f"{name}: "):
                begun = time.monotonic()
                result = {"case": case.to_dict(), **measure(case, settings)}
                result["wall_s"] = time.monotonic() - begun
                run.add(result)
                _show(terminal, case, result)
                status |= bool(result["wrong"])
                release(device)
                advance(1)
        terminal.say(f"written to {run.path}")
    return status


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = make_parser("benchmarks.run", __doc__)
    parser.add_argument("--op", nargs="+", default=["block_sparse_attention"], choices=[*OPS, "all"])
    parser.add_argument("--shape", nargs="+", default=["8b"], choices=list(SHAPES))
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens (keys); default: the op's")
    parser.add_argument("--densities", type=float, nargs="+", help="default: the op's")
    parser.add_argument("--lists", nargs="+", choices=KINDS, help="default: random")
    parser.add_argument("--queries", type=int, nargs="+", help="of chunk_attention; default: the op's")
    parser.add_argument("--block-size", type=int, default=64, choices=(32, 64, 128))
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float16", "float32"), help="default: bfloat16")
    parser.add_argument("--seconds", type=float, default=0.5, help="device time for each candidate of a case")
    parser.add_argument("--without", nargs="+", default=[], help="leave out candidates whose name holds one of these")
    options = parser.parse_args(arguments)
    if "all" in options.op and len(options.op) > 1:
        parser.error("--op all stands alone")
    return options


def _title(case: Case) -> str:
    tokens = format_length(case.keys)
    if case.queries != case.keys:
        tokens = f"{format_length(case.queries)} on {tokens}"
    lists = "" if case.lists == "none" else f", {case.lists} lists"
    dtype = str(case.shape.dtype).removeprefix("torch.")
    return f"{case.op}, {tokens} tokens, density {case.density:g}{lists}, head_dim {case.shape.head_dim}, {dtype}"


def _show(terminal: Terminal, case: Case, result: dict[str, Any]) -> None:
    rows = []
    for key, numbers in result["implementations"].items():
        rate = f"{numbers['tflops']:.4g}" if "tflops" in numbers else ""
        density = f"{numbers['density']:.4f}" if "density" in numbers else ""
        spread = (numbers["p75_s"] - numbers["p25_s"]) / numbers["median_s"]
        milliseconds = f"{1e3 * numbers['median_s']:.4g}"
        rows.append(
            [
                key,
                density,
                milliseconds,
                f"{100 * spread:.0f} %",
                str(numbers["repeats"]),
                rate,
                f"{numbers['error']:.1e}",
            ]
        )
    headers = ["what", "density", "ms", "spread", "calls", "TFLOP/s", "error"]
    metrics = ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in result["metrics"].items()
    )
    terminal.out.print(_title(case), markup=False, style="bold", soft_wrap=True)
    terminal.table(Table(headers, rows, metrics))
    for key, reason in result["refused"].items():
        terminal.out.print(f"  refused: {key}: {reason}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
