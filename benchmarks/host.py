"""What the host takes: its time for each layer, the kernels' own time and how many are launched, dense and sparse.

    python -m benchmarks.host --model smollm2-135m qwen2.5-0.5b llama-3.1-8b --lengths 2048 8192 32768
    python -m benchmarks.host --model smollm2-135m --lengths 8192 --ways eager graphs decode
    python -m benchmarks.host --model smollm2-135m --ways shipped     # with the default min_context
    python -m benchmarks.host --model qwen3-4b --lengths 32768 --ways chunk --layers 12 --densities 0.1
    python -m benchmarks.host --device cpu --tiny                                    # a rehearsal, in seconds

Ways: ``eager``, a prompt in one forward, logits of the last token only, no cache kept; ``shipped``, the same with the
``min_context`` that gates have where nobody says one, below which prompts are dense, beside an untouched copy of the
model, call by call in turns: a percent is asked about there, and the host's own speed changes by more (``over_dense``
is the median of the ratios of neighbours, with its 95 % interval); ``graphs``, with a cache, dense and sparse captured
in a CUDA graph each and replayed, dense without a mask (transformers makes one while a graph is captured, which halves
the speed of dense attention); ``decode``, one token on a cache of so many; ``chunk``, the last ``--chunk`` tokens on a
cache of all before them, dense attention being cuDNN's in two parts as in ``benchmarks.e2e``.
``wall``: until the device is done. ``host``: until the call returns, the device being idle before; where kernels are
short the host is what a forward waits for. ``gpu``: the sum of its kernels' times, from a profile. "Extra host time a
layer" is sparse minus dense, over the layers. Both are timed in turns, and all cases of a model are profiled after all
of them were timed: a process gets slower as it goes on (a profiler that was on once still looks at every launch), and
what is timed after it would pay. So where host times count, give each model a process of its own, or ``--no-profile``.
With fewer layers than the model has (``--layers``) the speed-up is that of the whole model: what a layer takes, times
as many, and what the model takes without layers. Before anything is timed every block through the sparse kernel has to
give what dense attention gives; a case that fails is reported and left.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache

import seerattention as seer
from seerattention.cli.common import Terminal, resolve_device
from seerattention.evaluate.kernels import WrongResultError
from seerattention.evaluate.tables import Table
from seerattention.evaluate.timing import warm_seconds

from .command import PROMPT, ModelBenchmark, case_of, make_table, metric, model_parser
from .e2e import check_model
from .models import lower_right, num_layers, random_tokens, unmasked, without_layers
from .results import own_arguments

Step = Callable[[], object]

WAYS = ("eager", "shipped", "graphs", "decode", "chunk")
# Steps before a measurement: they compile, and find out what can be launched again. And seconds: attaching gates leaves
# the device idle and caches cold, which detaching does not.
_WARM, _WARM_SECONDS = 4, 0.3
# Relative difference of last logits, of a graph's replay from the call that it was captured of.
_SAME = 1e-3


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
        cases=lambda options, lengths: [(lengths,)],
        measure=lambda name, model, case, options: _measure(name, model, case[0], options),
        table=_table,
    )
    return benchmark.run(given, options, dtype)


def _measure(name: str, model: Any, lengths: Sequence[int], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time every case, then profile every case."""
    timed = []
    for length, density, way in itertools.product(lengths, options.densities, options.ways):
        case = {"model": name, "length": length, "density": density, "layers": model.config.num_hidden_layers}
        case |= {"dtype": str(model.dtype).removeprefix("torch."), **({} if way == "eager" else {"way": way})}
        case |= {"chunk": options.chunk} if way == "chunk" else {}
        sides = _Sides(model, random_tokens(name, length).to(model.device), way, density, options.chunk)
        try:
            timed.append((case, sides, _times(sides, options)))
        except (RuntimeError, WrongResultError) as error:  # out of memory, a capture that failed
            Terminal().say(f"{case} failed: {error}")
    for case, sides, (fixed, times, over_dense) in timed:
        try:
            for kind, found in times.items() if options.profile else ():
                found["gpu_s"], found["launches"] = sides.kernels(kind)
        except (RuntimeError, WrongResultError) as error:
            Terminal().say(f"{case} failed: {error}")
            continue
        facts: dict[str, Any] = {"whole_layers": num_layers(name), "without_layers_s": fixed}
        if sides.way == "shipped":
            facts |= {"min_context": sides.min_context, "is_sparse": sides.is_sparse}
        yield {"case": case, "metrics": {**_metrics(case, times, fixed, num_layers(name)), **over_dense}, **facts}


def _metrics(case: dict[str, Any], times: dict[str, dict[str, float]], fixed: float, whole: int) -> dict[str, float]:
    """The numbers of a case, from what was measured of each side."""
    dense, sparse, layers = times["dense"], times["sparse"], case["layers"]

    def scaled(seconds: float) -> float:
        if layers == whole or case.get("way") == "decode":  # of which the rest is little
            return seconds
        return fixed + max(0.0, seconds - fixed) * whole / layers

    metrics = {f"{kind}_{what}": value for kind, found in times.items() for what, value in found.items()}
    metrics["speedup"] = dense["wall_s"] / sparse["wall_s"]
    metrics["model_speedup"] = scaled(dense["wall_s"]) / scaled(sparse["wall_s"])
    metrics["extra_host_s_a_layer"] = (sparse["host_s"] - dense["host_s"]) / layers
    if "launches" in dense:
        metrics["extra_launches_a_layer"] = (sparse["launches"] - dense["launches"]) / layers
    return metrics


@dataclass
class _Sides:
    """Dense and sparse runs of one case.

    Attributes:
        chunk: tokens of a chunk, where it is one.
        min_context, is_sparse: of what is shipped: its default, and whether these prompts are sparse.
    """

    model: Any
    ids: Tensor
    way: str
    density: float
    chunk: int
    min_context: int | None = None
    is_sparse: bool = True

    @contextmanager
    def step(self, kind: str) -> Iterator[Step]:
        """A step of one of them."""
        with self._sparse() if kind == "sparse" else self._dense():
            yield self._step(self.way)

    def _step(self, way: str) -> Step:
        return _chunk(self.model, self.ids, self.chunk) if way == "chunk" else _STEPS[way](self.model, self.ids)

    def _dense(self) -> AbstractContextManager[object]:
        """With attention as fast as there is."""
        names = {"graphs": unmasked, "chunk": lower_right}
        return _with_attention(self.model, names[self.way]()) if self.way in names else nullcontext()

    def kernels(self, kind: str) -> tuple[float, int]:
        """See :func:`_kernels`."""
        with self.step(kind) as step:
            return _kernels(step, self.ids.device)

    @contextmanager
    def _sparse(self) -> Iterator[None]:
        """With fresh gates attached.

        Raises:
            WrongResultError: no layer is attended sparsely, where it has to be.
        """
        decoding, shipped = self.way == "decode", self.way == "shipped"
        gates = seer.GateConfig(prefill=None, decode=seer.DecodeGateConfig()) if decoding else seer.GateConfig()
        chosen: dict[str, Any] = {"prefill": seer.TopK(self.density)}
        if decoding:
            chosen = {"decode": seer.TokenBudget(max(1, round(self.density * self.ids.shape[1])))}
        seer.attach(self.model, gates, min_context=None if shipped else 0, **chosen)
        try:
            with seer.record(self.model) as stats, torch.inference_mode():
                self._step("eager" if self.way == "graphs" else self.way)()
            self.min_context, self.is_sparse = stats.min_context, bool(stats.sparse_calls)
            if not (self.is_sparse or shipped):
                raise WrongResultError(f"no layer was attended sparsely ({self.way})")
            yield
        finally:
            seer.detach(self.model)


def _times(sides: _Sides, options: argparse.Namespace) -> tuple[float, dict[str, dict[str, float]], dict[str, float]]:
    """Seconds without layers; medians of both sides, taken in turns; and of pairs what sparse takes over dense."""
    device, repeats = sides.ids.device, options.repeats
    ids = sides.ids[:, -sides.chunk :] if sides.way == "chunk" else sides.ids
    with without_layers(sides.model):
        fixed = statistics.median(wall for wall, _ in _timed(_prompt(sides.model, ids), device, repeats))
    timed: dict[str, list[tuple[float, float]]] = {"dense": [], "sparse": []}
    over_dense = {}
    if sides.way == "shipped":
        _time_pairs(sides, timed, options.turns * repeats)
        over_dense = _median_interval([s[0] / d[0] for d, s in zip(timed["dense"], timed["sparse"], strict=True)])
    else:
        for _ in range(options.turns):
            for kind, times in timed.items():
                with sides.step(kind) as step:
                    times += _timed(step, device, repeats)
    medians = {
        kind: [statistics.median(column) for column in zip(*times, strict=True)] for kind, times in timed.items()
    }
    return fixed, {kind: {"wall_s": wall, "host_s": host} for kind, (wall, host) in medians.items()}, over_dense


@torch.inference_mode()
def _time_pairs(sides: _Sides, timed: dict[str, list[tuple[float, float]]], pairs: int) -> None:
    """The untouched model and a copy with gates, one call after the other; which goes first changes."""
    other = dataclasses.replace(sides, model=copy.deepcopy(sides.model))
    device = sides.ids.device
    with sides.step("dense") as dense, other.step("sparse") as sparse:
        steps = {"dense": dense, "sparse": sparse}
        for step in steps.values():
            _warm(step)
        for number in range(pairs):
            for kind in ("dense", "sparse") if number % 2 else ("sparse", "dense"):
                timed[kind].append(warm_seconds(steps[kind], device))
    sides.min_context, sides.is_sparse = other.min_context, other.is_sparse


def _median_interval(values: Sequence[float]) -> dict[str, float]:
    """As metrics name them: the median, and the order statistics that hold it with a probability of 95 %."""
    ordered, count = sorted(values), len(values)
    aside = max(0, math.floor(count / 2 - 0.98 * math.sqrt(count)) - 1)
    ends = {"over_dense_low": ordered[aside], "over_dense_high": ordered[count - 1 - aside]}
    return {"over_dense": statistics.median(ordered), **ends}


@contextmanager
def _with_attention(model: Any, name: str) -> Iterator[None]:
    """Dense attention by another implementation."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _prompt(model: Any, ids: Tensor) -> Step:
    return lambda: model(input_ids=ids, logits_to_keep=1, use_cache=False).logits


@torch.inference_mode()
def _captured(model: Any, ids: Tensor) -> Step:
    """Replays a graph of a prompt with a cache."""

    def forward() -> Tensor:
        return model(input_ids=ids, logits_to_keep=1, use_cache=True).logits

    side = torch.cuda.Stream(ids.device)
    side.wait_stream(torch.cuda.current_stream(ids.device))
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles
            expected = forward().float()
    torch.cuda.synchronize(ids.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = forward()
    graph.replay()
    difference = float((found.float() - expected).norm() / expected.norm())
    if not difference <= _SAME:
        raise WrongResultError(f"a replay of the graph is {difference:.1e} from the forward that it was captured of")

    def replay() -> Tensor:
        graph.replay()
        return found

    return replay


def _decoding(model: Any, ids: Tensor) -> Step:
    """A step on a cache that grows by it."""
    cache = DynamicCache()
    with torch.inference_mode():
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = ids[:, :1].clone()
    return lambda: model(input_ids=token, past_key_values=cache, use_cache=True).logits


def _chunk(model: Any, ids: Tensor, tokens: int) -> Step:
    """The last tokens of a prompt on a cache of those before, which is then cropped to what it was."""
    cache = DynamicCache()
    with torch.inference_mode():
        for part in ids[:, :-tokens].split(tokens, dim=1):
            model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    last = ids[:, -tokens:].clone()

    def step() -> Tensor:
        logits = model(input_ids=last, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        cache.crop(-tokens)
        return logits

    return step


_STEPS: dict[str, Callable[[Any, Tensor], Step]] = {
    "eager": _prompt, "shipped": _prompt, "graphs": _captured, "decode": _decoding,
}  # fmt: skip


@torch.inference_mode()
def _timed(step: Step, device: torch.device, repeats: int) -> list[tuple[float, float]]:
    """Seconds until the device is done and until the call returns, of so many steps."""
    _warm(step)
    return [warm_seconds(step, device) for _ in range(repeats)]


def _warm(step: Step) -> None:
    begun = time.perf_counter()
    steps = 0
    while steps < _WARM or time.perf_counter() - begun < _WARM_SECONDS:
        step()
        steps += 1


@torch.inference_mode()
def _kernels(step: Step, device: torch.device) -> tuple[float, int]:
    """Seconds of all kernels of a step, and how many there are; what only a GPU has is 0 elsewhere."""
    if device.type != "cuda":
        return 0.0, 0
    for _ in range(_WARM):
        step()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    events = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(event.device_time for event in events) / 1e6, len(events)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = model_parser("benchmarks.host", __doc__, check_length=2048)
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of a chunk, shorter than the prompt")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.2])
    parser.add_argument("--no-profile", dest="profile", action="store_false", help="no times of kernels, nor launches")
    parser.add_argument("--turns", type=int, default=3, help="of dense and sparse, each of so many repeats")
    parser.add_argument("--ways", nargs="+", default=["eager"], choices=WAYS, help="graphs: on a GPU only")
    return parser.parse_args(arguments)


def _interval(result: dict[str, Any]) -> str:
    metrics = result["metrics"]
    if "over_dense" not in metrics:
        return ""
    return f"{metrics['over_dense']:.3f} [{metrics['over_dense_low']:.3f}, {metrics['over_dense_high']:.3f}]"


def _table(results: Sequence[dict[str, Any]]) -> Table:
    def profiled(name: str, form: str, times: float = 1) -> Callable[[dict[str, Any]], str]:
        return lambda result: metric(name, form, times)(result) if name in result["metrics"] else ""

    columns = [
        *PROMPT,
        ("density", case_of("density", "g")),
        ("way", lambda result: result["case"].get("way", "eager")),
        ("dense ms", metric("dense_wall_s", ".4g", 1e3)),
        ("sparse ms", metric("sparse_wall_s", ".4g", 1e3)),
        ("speed-up", metric("model_speedup", ".2f")),
        ("dense GPU ms", profiled("dense_gpu_s", ".4g", 1e3)),
        ("sparse GPU ms", profiled("sparse_gpu_s", ".4g", 1e3)),
        ("more host ms a layer", metric("extra_host_s_a_layer", ".3f", 1e3)),
        ("more launches a layer", profiled("extra_launches_a_layer", ".1f")),
        ("over dense, pairs", _interval),
    ]
    return make_table(
        results,
        columns,
        "Medians; the speed-up is that of all layers.",
    )


if __name__ == "__main__":
    sys.exit(main())
