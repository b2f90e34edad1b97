"""Block-sparse attention on the CPU against dense SDPA: the op alone, correctness first, then medians.

    python benchmarks/cpu_attention.py --threads 2
    python benchmarks/cpu_attention.py --trained   # also lists of the testbed's trained gates

Dense is the fastest of SDPA in float32 and bfloat16, each with K and V as they are (GQA) and repeated per query head.
Writes a JSON file with the machine and versions beside the times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from seerattention.evaluate.environment import environment
from seerattention.ops.block_sparse_attention import block_sparse_attention
from seerattention.ops.indices import BlockIndices, causal_block_mask

SPARSE = ("cpu_flex", "cpu_gathered")
RESULTS = Path(__file__).parent / "results" / "cpu" / "attention.json"


def top_lists(scores: torch.Tensor, density: float, block_size: int) -> BlockIndices:
    """Row i keeps its ceil(density * (i + 1)) best causal blocks, the diagonal among them."""
    rows = scores.shape[-1]
    causal = causal_block_mask(rows, rows)
    scores = scores.masked_fill(~causal, float("-inf"))
    scores.diagonal(dim1=-2, dim2=-1).fill_(float("inf"))
    keep = (density * torch.arange(1, rows + 1)).ceil().clamp(min=1)
    rank = scores.argsort(-1, descending=True).argsort(-1)
    return BlockIndices.from_mask((rank < keep[:, None]) & causal, block_size)


def make_lists(kind: str, heads: int, rows: int, density: float, block_size: int) -> BlockIndices:
    """``random``: uniform. ``structured``: vertical stripes per head, a local band, and noise."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1, heads, rows, rows, generator=generator)
    if kind == "random":
        return top_lists(noise, density, block_size)
    distance = torch.arange(rows)[:, None] - torch.arange(rows)
    stripes = torch.rand(1, heads, 1, rows, generator=generator)
    return top_lists(stripes + 0.5 * (distance < 4) + 0.3 * noise, density, block_size)


def trained_lists(length: int, density: float) -> list[tuple[str, BlockIndices]]:
    """Lists that the embedded testbed's trained gates make of a book, of its first, a middle and its last layer."""
    import seerattention as seer
    from seerattention import testbed

    model, tokenizer = testbed.load("cpu")
    seer.attach(model, testbed.gates_path(), prefill=seer.TopK(density), min_context=0)
    text = "\n".join(testbed.book_texts("test"))
    ids = torch.tensor([tokenizer.encode(text[: 8 * length])[:length]])
    lists: dict[int, BlockIndices] = {}
    with torch.no_grad(), seer.observe(model, lambda inputs, blocks: lists.update({inputs.layer: blocks})):
        model(ids, use_cache=False, logits_to_keep=1)
    last = max(lists)
    return [(f"trained layer {layer} {density:g}", lists[layer]) for layer in (0, last // 2, last)]


def median_times(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each; they take turns, so that a busy moment of the machine hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if repeat:  # the first turn is a warm-up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def dense_functions(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Callable[[], object]]:
    """SDPA in float32 and bfloat16, each with K and V as they are (GQA) and repeated per query head."""
    functions: dict[str, Callable[[], object]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b, c = (x.to(dtype) for x in (q, k, v))
        wide = tuple(x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (b, c))
        name = str(dtype).removeprefix("torch.")
        functions[f"{name} gqa"] = partial(F.scaled_dot_product_attention, a, b, c, is_causal=True, enable_gqa=True)
        functions[f"{name} repeated"] = partial(F.scaled_dot_product_attention, a, *wide, is_causal=True)
    return functions


def sparse_functions(q, k, v, blocks: BlockIndices) -> dict[str, Callable[[], object]]:
    """Every CPU implementation in both dtypes, each checked against the reference first."""
    expected = block_sparse_attention(q, k, v, blocks, implementation="reference")
    functions: dict[str, Callable[[], object]] = {}
    for name in SPARSE:
        for dtype in (torch.float32, torch.bfloat16):
            a, b, c = (x.to(dtype) for x in (q, k, v))
            function = partial(block_sparse_attention, a, b, c, blocks, implementation=name)
            error = float((function().float() - expected).norm() / expected.norm())
            if not error < (1e-5 if dtype == torch.float32 else 1e-2):
                raise SystemExit(f"{name} in {dtype} is wrong by {error:.1e} (relative): no times on wrong results")
            functions[f"{name} {str(dtype).removeprefix('torch.')}"] = function
    return functions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.05, 0.11, 0.2])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--trained", action="store_true", help="also lists of the embedded testbed's gates (8/2 heads)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    cases: dict[int, list[tuple[str, BlockIndices]]] = {}
    for length in options.lengths:
        rows = -(-length // options.block_size)
        cases[length] = [
            (f"{kind} {density:g}", make_lists(kind, options.heads, rows, density, options.block_size))
            for kind in ("random", "structured")
            for density in options.densities
        ]
        if options.trained:
            for density in options.densities:
                cases[length] += trained_lists(length, density)

    results = []
    table = Table(title=f"Attention alone, {options.threads} threads, ms (speed-up over the fastest dense SDPA)")
    for column in ("tokens", "lists", "density", "dense", *SPARSE):
        table.add_column(column, justify="left" if column == "lists" else "right", no_wrap=True)
    console = Console()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=len(cases))
        for length, lists in cases.items():
            generator = torch.Generator().manual_seed(0)
            q = torch.randn(1, options.heads, length, options.head_dim, generator=generator)
            k = torch.randn(1, options.kv_heads, length, options.head_dim, generator=generator)
            v = torch.randn(1, options.kv_heads, length, options.head_dim, generator=generator)
            functions = dense_functions(q, k, v)
            for name, blocks in lists:
                made = sparse_functions(q, k, v, blocks)
                functions |= {f"{name}: {implementation}": function for implementation, function in made.items()}
            times = median_times(functions, options.repeats)
            dense = {name: seconds for name, seconds in times.items() if ":" not in name}
            for name, blocks in lists:
                sparse = {key.split(": ")[1]: t for key, t in times.items() if key.startswith(f"{name}: ")}
                row = {
                    "tokens": length,
                    "lists": name,
                    "density": blocks.density(),
                    "dense_s": dense,
                    "sparse_s": sparse,
                }
                results.append(row)
                # Of the two dtypes the slower one counts: it must still win against the fastest dense one.
                slower = [
                    max(t for key, t in sparse.items() if key.startswith(implementation)) for implementation in SPARSE
                ]
                cells = [f"{1e3 * seconds:.0f} ({min(dense.values()) / seconds:.1f}x)" for seconds in slower]
                table.add_row(str(length), name, f"{blocks.density():.3f}", f"{1e3 * min(dense.values()):.0f}", *cells)
            progress.advance(task)
    console.print(table)
    shape = {
        "heads": options.heads,
        "kv_heads": options.kv_heads,
        "head_dim": options.head_dim,
        "repeats": options.repeats,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(
        json.dumps({"environment": environment(), "shape": shape, "results": results}, indent=1) + "\n"
    )
    console.print(f"written to {options.output}")


if __name__ == "__main__":
    main()
