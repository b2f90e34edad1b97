"""What the host takes: its time for each layer, the kernels' own time and how many are launched, dense and sparse.

    python -m benchmarks.host --model smollm2-135m qwen2.5-0.5b llama-3.1-8b --lengths 2048 8192 32768
    python -m benchmarks.host --device cpu --tiny                                    # a rehearsal, in seconds

A prompt in one forward, eager, logits of the last token only, no cache kept. ``wall``: until the device is done.
``host``: until the call returns, the device being idle before; where kernels are short the host is what a forward waits
for. ``gpu``: the sum of its kernels' times, from a profile. "Extra host time a layer" is sparse minus dense, over the
layers. Before anything is timed every block through the sparse kernel has to give what dense attention gives.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import seerattention as seer
from seerattention.cli.common import resolve_device
from seerattention.evaluate.tables import Table
from seerattention.evaluate.timing import warm_seconds

from .command import PROMPT, ModelBenchmark, case_of, make_table, metric, model_parser
from .e2e import check_model
from .models import random_tokens
from .results import own_arguments


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    given = list(own_arguments() if arguments is None else arguments)
    options = _parse(given)
    on_cpu = resolve_device(options.device) == "cpu"
    dtype = torch.float32 if options.tiny and on_cpu else getattr(torch, options.dtype)

    def check(model: Any, name: str, length: int) -> tuple[dict[str, Any], str]:
        found = check_model(model, random_tokens(name, length), dtype)
        return {"check": found}, str(found)

    benchmark = ModelBenchmark(
        name="host",
        lengths=[2048, 4096, 8192, 16384, 32768],
        prepare=lambda model: model,
        check=check,
        cases=lambda options, lengths: [(length, density) for length in lengths for density in options.densities],
        measure=lambda name, model, case, options: _measure(name, model, *case, options),
        table=_table,
    )
    return benchmark.run(given, options, dtype)


def _measure(
    name: str, model: Any, length: int, density: float, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    ids, layers = random_tokens(name, length).to(model.device), model.config.num_hidden_layers
    dense = _times(model, ids, options.repeats)
    seer.attach(model, seer.GateConfig(), prefill=seer.TopK(density), min_context=0)
    try:
        sparse = _times(model, ids, options.repeats)
    finally:
        seer.detach(model)
    metrics = {f"dense_{what}": value for what, value in dense.items()}
    metrics |= {f"sparse_{what}": value for what, value in sparse.items()}
    metrics["speedup"] = dense["wall_s"] / sparse["wall_s"]
    metrics["extra_host_s_a_layer"] = (sparse["host_s"] - dense["host_s"]) / layers
    metrics["extra_launches_a_layer"] = (sparse["launches"] - dense["launches"]) / layers
    case = {"model": name, "length": length, "density": density, "layers": layers}
    yield {"case": {**case, "dtype": str(model.dtype).removeprefix("torch.")}, "metrics": metrics}


@torch.inference_mode()
def _times(model: Any, ids: Tensor, repeats: int) -> dict[str, float]:
    """Medians in seconds of one forward, and kernels launched; what only a GPU has is 0 elsewhere."""

    def forward() -> None:
        model(input_ids=ids, logits_to_keep=1, use_cache=False)

    for _ in range(3):  # compiles
        forward()
    timed = [warm_seconds(forward, ids.device) for _ in range(repeats)]
    wall, host = (statistics.median(column) for column in zip(*timed, strict=True))
    gpu, launches = _kernels(forward) if ids.device.type == "cuda" else (0.0, 0)
    return {"wall_s": wall, "host_s": host, "gpu_s": gpu, "launches": launches}


def _kernels(forward: Callable[[], None]) -> tuple[float, int]:
    """Seconds of all kernels of a forward, and how many there are."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        forward()
        torch.cuda.synchronize()
    events = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(event.device_time for event in events) / 1e6, len(events)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = model_parser("benchmarks.host", __doc__, check_length=2048)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.2])
    return parser.parse_args(arguments)


def _table(results: Sequence[dict[str, Any]]) -> Table:
    columns = [
        *PROMPT,
        ("density", case_of("density", "g")),
        ("dense ms", metric("dense_wall_s", ".4g", 1e3)),
        ("sparse ms", metric("sparse_wall_s", ".4g", 1e3)),
        ("speed-up", metric("speedup", ".2f")),
        ("dense GPU ms", metric("dense_gpu_s", ".4g", 1e3)),
        ("sparse GPU ms", metric("sparse_gpu_s", ".4g", 1e3)),
        ("more host ms a layer", metric("extra_host_s_a_layer", ".3f", 1e3)),
        ("more launches a layer", metric("extra_launches_a_layer", ".1f")),
    ]
    return make_table(results, columns, "One prompt in one forward, eager; medians.")


if __name__ == "__main__":
    sys.exit(main())
