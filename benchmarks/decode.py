"""Time a step of decoding: block-sparse attention of one query token a row against the dense kernels of torch.

    python -m benchmarks.decode --contexts 32768 131072 --batch 1 8 16 --densities 0.1
    python -m benchmarks.decode --device cpu --tiny                                  # a rehearsal, in seconds

Every candidate reads the same cache, contiguous or ``[B, Hkv, T, D]`` views of ``[B, T, Hkv, D]`` (``--layout``),
and is compared with a float32 computation before it is timed. On a GPU each is captured in a CUDA graph, as engines
run steps, and its replay is timed, the L2 cache flushed before; "eager" are the same calls from Python. The ideal is
the time of the fastest dense kernel times the density.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from seerattention.cli.common import Terminal, resolve_device
from seerattention.evaluate.kernels import require_accurate
from seerattention.evaluate.tables import Table, format_length
from seerattention.evaluate.timing import time_functions
from seerattention.ops import BlockIndices, Pages, Span, block_sparse_decode
from seerattention.ops.indices import ordered_lists, read_lists

from .command import Budget, add_dtype, make_parser
from .results import own_arguments, start_run

OURS, OURS_PAGED = "ours", "ours, pages"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit status: 1 if a result of ours was wrong."""
    given = list(own_arguments() if arguments is None else arguments)
    options = _parse(given)
    terminal = Terminal()
    device = torch.device(resolve_device(options.device))
    dtype = torch.float32 if options.tiny else getattr(torch, options.dtype)
    run = start_run("decode_attention", "benchmarks.decode", given, device, options.output, options.tiny)
    contexts = [300, 512] if options.tiny else options.contexts
    budget, status = Budget(options.budget, terminal), 0
    cases = [(c, b, d) for c in contexts for b in options.batch for d in options.densities]
    with terminal.progress("decoding", len(cases)) as advance:
        for context, batch, density in budget.of(cases, lambda case: f"{case[0]} tokens and more"):
            result = measure(options, device, dtype, context, batch, density)
            run.add(result)
            status |= bool(result["wrong"])
            advance(1)
    terminal.table(_table(run.results))
    terminal.say(f"written to {run.path}")
    return status


@torch.inference_mode()
def measure(
    options: argparse.Namespace, device: torch.device, dtype: torch.dtype, context: int, batch: int, density: float
) -> dict[str, Any]:
    """One case: check, then time."""
    heads, kv_heads, head_dim = options.heads, options.kv_heads, options.head_dim
    generator = torch.Generator(device).manual_seed(0)
    make = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    q = make(batch, heads, 1, head_dim)
    if options.layout == "contiguous":
        k, v = (make(batch, kv_heads, context, head_dim) for _ in range(2))
    else:
        k, v = (make(batch, context, kv_heads, head_dim).transpose(1, 2) for _ in range(2))
    blocks = draw_lists(batch, kv_heads, context, options.block_size, density, device)
    sparse: dict[str, Callable[[], Any]] = {OURS: partial(block_sparse_decode, q, k, v, blocks)}
    if context % options.block_size == 0:
        pages, values, span = paged(k, v, options.block_size)
        sparse[OURS_PAGED] = partial(block_sparse_decode, q, pages, values, blocks, span=span)
    functions, refused, wrong = {}, {}, []
    listed = reference(q, k, v, blocks)
    everything = reference(q, k, v, None)
    for name, function in {**sparse, **dense_candidates(q, k, v)}.items():
        try:
            require_accurate(_error(function(), listed if name in sparse else everything), dtype)
            functions[name] = _graphed(function) if device.type == "cuda" else function
            if name == OURS and device.type == "cuda":
                functions["eager: ours"] = function
        except (RuntimeError, ValueError, NotImplementedError) as failure:
            refused[name] = str(failure).splitlines()[0]
            if name in sparse:
                wrong.append(name)
    times = time_functions(functions, device, seconds=options.seconds)
    found = {name: value.to_dict() for name, value in times.items()}
    dense = min((name for name in found if name.startswith("dense")), key=lambda name: found[name]["median_s"])
    actual = float(read_lists(blocks)[1].sum()) / (batch * kv_heads * blocks.num_key_blocks)
    metrics: dict[str, Any] = {"dense_kernel": dense, "density": actual}
    for name, key in ((OURS, ""), (OURS_PAGED, "_pages")):
        if name in found:
            speedup = found[dense]["median_s"] / found[name]["median_s"]
            read = 2 * actual * batch * kv_heads * context * head_dim * dtype.itemsize
            metrics |= {
                f"speedup{key}": speedup,
                f"share_of_ideal{key}": speedup * actual,
                f"bytes_per_s{key}": read / found[name]["median_s"],
            }
    case = {
        "op": "block_sparse_decode",
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "block_size": options.block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "layout": options.layout,
        "keys": context,
        "batch": batch,
        "density": density,
    }
    return {"case": case, "metrics": metrics, "implementations": found, "refused": refused, "wrong": wrong}


def draw_lists(
    batch: int, kv_heads: int, context: int, block_size: int, density: float, device: torch.device
) -> BlockIndices:
    """Random ascending lists, the open block among them, each a share ``density`` of the blocks."""
    blocks = -(-context // block_size)
    count = max(1, round(density * blocks))
    noise = torch.rand(batch, kv_heads, 1, blocks, generator=torch.Generator().manual_seed(0))
    noise[..., -1] = 2
    indices = noise.topk(count).indices.sort().values.to(torch.int32).to(device)
    counts = torch.full((batch, kv_heads, 1), count, dtype=torch.int32, device=device)
    return ordered_lists(indices, counts, blocks, block_size, by_token=True)


def paged(k: Tensor, v: Tensor, page_size: int) -> tuple[Tensor, Tensor, Span]:
    """The same keys and values in pages of one block, in random order."""
    batch, kv_heads, context, head_dim = k.shape
    pages = context // page_size
    order = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(0)).to(k.device)
    table = order.argsort().view(batch, pages).to(torch.int32)

    def scatter(x: Tensor) -> Tensor:
        split = x.unflatten(2, (pages, page_size)).transpose(1, 2)  # [B, pages, Hkv, page, D]
        return split.reshape(batch * pages, kv_heads, page_size, head_dim)[order].contiguous()

    start = torch.full((batch,), context - 1, device=k.device)
    span = Span.of_rows(1, context, start=start, length=torch.ones_like(start), pages=Pages(table, page_size))
    return scatter(k), scatter(v), span


def dense_candidates(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """One token on a cache through every kernel of torch's that may serve; some refuse."""
    group = q.shape[1] // k.shape[1]
    sdpa = partial(F.scaled_dot_product_attention, q, k, v, enable_gqa=True)

    def with_backend(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa()

    def grouped() -> Tensor:
        """The query heads of a group as the queries of one head: keys and values are read once."""
        queries = q.unflatten(1, (k.shape[1], group)).flatten(2, 3)
        return F.scaled_dot_product_attention(queries, k, v).unflatten(2, (group, 1)).flatten(1, 2)

    def grouped_with(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return grouped()

    def products() -> Tensor:
        queries = q.unflatten(1, (k.shape[1], group)).flatten(2, 3) * q.shape[-1] ** -0.5
        out = (queries @ k.transpose(-1, -2)).softmax(-1, dtype=torch.float32).to(q.dtype) @ v
        return out.unflatten(2, (group, 1)).flatten(1, 2)

    found: dict[str, Callable[[], Any]] = {"dense: sdpa": sdpa, "dense: sdpa, grouped": grouped}
    found["dense: products"] = products
    if q.device.type == "cuda":
        for name, backend in (
            ("cuDNN", SDPBackend.CUDNN_ATTENTION),
            ("FlashAttention-2", SDPBackend.FLASH_ATTENTION),
            ("memory-efficient", SDPBackend.EFFICIENT_ATTENTION),
        ):
            found[f"dense: {name}"] = partial(with_backend, backend)
            found[f"dense: {name}, grouped"] = partial(grouped_with, backend)
        found["dense: FlexAttention"] = _flex(q, k, v)
    # Our own kernel on every block: what its launch and merge cost when nothing is left out.
    blocks = draw_lists(q.shape[0], k.shape[1], k.shape[2], 64, 1.0, q.device)
    found["dense: ours, every block"] = partial(block_sparse_decode, q, k, v, blocks)
    return found


def _flex(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    return partial(compiled, q, k, v, enable_gqa=True)


def reference(q: Tensor, k: Tensor, v: Tensor, blocks: BlockIndices | None) -> Tensor:
    """In float32, row by row: the listed blocks, or all."""
    group, rows = q.shape[1] // k.shape[1], []
    for row in range(q.shape[0]):
        keys, values = k[row].float(), v[row].float()
        scores = q[row].float().unflatten(0, (k.shape[1], group))[:, :, 0] @ keys.mT * q.shape[-1] ** -0.5
        if blocks is not None:
            listed = torch.zeros(k.shape[1], blocks.num_key_blocks, dtype=torch.bool, device=q.device)
            listed.scatter_(1, read_lists(blocks)[0][row, :, 0].long(), True)
            seen = listed.repeat_interleave(blocks.block_size, 1)[:, : k.shape[2]]
            scores = scores.masked_fill(~seen[:, None], float("-inf"))
        rows.append((scores.softmax(-1) @ values).flatten(0, 1)[:, None])
    return torch.stack(rows)


def _error(out: Tensor, expected: Tensor) -> float:
    """Largest relative error of a head of a row."""
    if out.shape != expected.shape or bool(out.isnan().any()):
        return float("inf")
    return float(((out.float() - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def _graphed(function: Callable[[], Tensor]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = make_parser("benchmarks.decode", __doc__)
    add_dtype(parser)
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768, 65536, 131072])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--layout", choices=("contiguous", "transposed"), default="contiguous")
    parser.add_argument("--seconds", type=float, default=0.3)
    options = parser.parse_args(arguments)
    if options.tiny:
        options.heads, options.kv_heads, options.head_dim, options.batch = 4, 2, 32, [1, 2]
    return options


def _table(results: Sequence[dict[str, Any]]) -> Table:
    rows = []
    for result in results:
        case, metrics = result["case"], result["metrics"]
        found = result["implementations"]
        milliseconds = [found[name]["median_s"] * 1e3 for name in (metrics["dense_kernel"], OURS) if name in found]
        rows.append(
            [
                format_length(case["keys"]),
                str(case["batch"]),
                f"{metrics['density']:.3f}",
                metrics["dense_kernel"].removeprefix("dense: "),
                *(f"{value:.4g}" for value in milliseconds),
                f"{metrics.get('speedup', 0):.2f}x",
                f"{100 * metrics.get('share_of_ideal', 0):.0f} %",
                f"{metrics.get('bytes_per_s', 0) / 1e12:.2f}",
            ]
        )
    headers = ["context", "batch", "density", "fastest dense", "its ms", "ours ms", "speed-up", "of the ideal", "TB/s"]
    return Table(headers, rows)


if __name__ == "__main__":
    sys.exit(main())
