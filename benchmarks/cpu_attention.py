"""Block-sparse attention on the CPU against dense SDPA: the op alone, correctness first, then medians.

    python benchmarks/cpu_attention.py --threads 2
    python benchmarks/cpu_attention.py --trained   # also lists of the testbed's trained gates

Dense is the faster of SDPA in float32 and bfloat16, each with K and V as they are (GQA) and repeated per query head.
Writes a JSON file with the machine and versions beside the times.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

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


def median_time(fn, repeats: int) -> float:
    fn()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        fn()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def time_dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, repeats: int) -> dict[str, float]:
    """Median seconds of SDPA by dtype, the faster of native GQA and repeated K and V."""
    group = q.shape[1] // k.shape[1]
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b, c = (x.to(dtype) for x in (q, k, v))
        wide_b, wide_c = b.repeat_interleave(group, 1), c.repeat_interleave(group, 1)
        native = median_time(lambda: F.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=True), repeats)  # noqa: B023
        repeated = median_time(lambda: F.scaled_dot_product_attention(a, wide_b, wide_c, is_causal=True), repeats)  # noqa: B023
        times[str(dtype).removeprefix("torch.")] = min(native, repeated)
    return times


def time_sparse(q, k, v, blocks: BlockIndices, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds by implementation and dtype, after a check against the reference."""
    expected = block_sparse_attention(q, k, v, blocks, implementation="reference")
    times: dict[str, dict[str, float]] = {}
    for name in SPARSE:
        times[name] = {}
        for dtype in (torch.float32, torch.bfloat16):
            a, b, c = (x.to(dtype) for x in (q, k, v))
            out = block_sparse_attention(a, b, c, blocks, implementation=name).float()
            error = float((out - expected).norm() / expected.norm())
            allowed = 1e-5 if dtype == torch.float32 else 1e-2
            if not error < allowed:
                raise SystemExit(f"{name} in {dtype} is wrong by {error:.1e} (relative): no times on wrong results")
            seconds = median_time(lambda: block_sparse_attention(a, b, c, blocks, implementation=name), repeats)  # noqa: B023
            times[name][str(dtype).removeprefix("torch.")] = seconds
    return times


def machine(threads: int) -> dict[str, object]:
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.05, 0.12, 0.2])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
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
    table = Table(title=f"Attention alone, {options.threads} threads, ms (speed-up over the faster dense SDPA)")
    for column in ("tokens", "lists", "density", "dense fp32", "dense bf16", *SPARSE):
        table.add_column(column, justify="left" if column == "lists" else "right")
    console = Console()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=sum(len(lists) for lists in cases.values()))
        for length, lists in cases.items():
            generator = torch.Generator().manual_seed(0)
            q = torch.randn(1, options.heads, length, options.head_dim, generator=generator)
            k = torch.randn(1, options.kv_heads, length, options.head_dim, generator=generator)
            v = torch.randn(1, options.kv_heads, length, options.head_dim, generator=generator)
            dense = time_dense(q, k, v, options.repeats)
            for name, blocks in lists:
                sparse = time_sparse(q, k, v, blocks, options.repeats)
                results.append(
                    {"tokens": length, "lists": name, "density": blocks.density(), "dense_s": dense, "sparse_s": sparse}
                )
                cells = []
                for implementation in SPARSE:
                    slower = max(sparse[implementation].values())  # of the two dtypes: the one that must still win
                    cells.append(f"{1e3 * slower:.0f} ({min(dense.values()) / slower:.1f}x)")
                milliseconds = [f"{1e3 * dense[dtype]:.0f}" for dtype in ("float32", "bfloat16")]
                table.add_row(str(length), name, f"{blocks.density():.3f}", *milliseconds, *cells)
                progress.advance(task)
    console.print(table)
    shape = {"heads": options.heads, "kv_heads": options.kv_heads, "head_dim": options.head_dim}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(
        json.dumps({"machine": machine(options.threads), "shape": shape, "results": results}, indent=1) + "\n"
    )
    console.print(f"written to {options.output}")


if __name__ == "__main__":
    main()
