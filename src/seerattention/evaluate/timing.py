"""Wall time of prefill and of single functions, interleaved so that a busy or warming machine treats all alike."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..hf.prompts import evaluating
from .forward import check_documents, prompt_device, prompt_options
from .measure import Advance, Measure, Prompts, Subject
from .perplexity import cut_documents
from .settings import Setting
from .tables import Table, format_density, format_length, format_seconds

__all__ = [
    "Times",
    "TimingMeasure",
    "TimingResult",
    "peak_memory",
    "synchronize",
    "time_functions",
    "time_prefill",
    "timing_table",
    "warm_seconds",
]

# Written before each call on a GPU, so that no function finds its inputs in the L2 cache: several times the cache.
_FLUSH_FACTOR = 4
_MIN_FLUSH_BYTES = 128 << 20
# Flushes run while the host prepares the call, so that launches of many small kernels are not what is timed.
_MAX_FLUSHES = 20


@dataclass
class TimingResult:
    """Prefill times of one setting.

    Attributes:
        setting: its name.
        length: tokens of the prompt.
        batch: prompts at once.
        first_seconds: the first call of all, with whatever was compiled for it.
        seconds: the timed repeats that followed.
        density: ``total_density`` of one call.
        peak_bytes: most device memory allocated during a timed call, model included; None where there is no GPU.
    """

    setting: str
    length: int
    batch: int
    density: float = 1.0
    first_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def median(self) -> float:
        """Median seconds of the timed repeats."""
        return statistics.median(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {**dataclasses.asdict(self), "median_seconds": self.median}

    def arrays(self) -> dict[str, np.ndarray]:
        """None: the numbers are all."""
        return {}


@dataclass
class Times:
    """Seconds of the timed calls of one function, warm-up excluded."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """Median, quartiles and number of calls, for JSON."""
        low, _, high = (
            statistics.quantiles(self.seconds, n=4, method="inclusive") if len(self.seconds) > 1 else 3 * self.seconds
        )
        return {"median_s": self.median, "p25_s": low, "p75_s": high, "repeats": len(self.seconds)}


@torch.inference_mode()
def time_prefill(
    model: nn.Module,
    input_ids: Tensor,
    settings: Sequence[Setting],
    *,
    repeats: int = 3,
    warmup_length: int | None = None,
    advance: Callable[[int], None] | None = None,
    chunk: int | None = None,
) -> list[TimingResult]:
    """Time prefill of ``input_ids [B, T]``: the whole model, logits of the last position only, as serving does.

    One untimed call of each setting comes first (its time is reported apart: it holds compilation); then ``repeats``
    rounds through all settings. Density is measured in the untimed call.

    Args:
        warmup_length: tokens of the untimed call, where a whole prompt would take too long; None: all. What is compiled
            serves every length from 2048 tokens on. Density is then measured in the last round.
        advance: called with the number of tokens of each call (for progress bars).
        chunk: tokens of each forward, on a cache of those before; None: the whole prompt in one.

    Raises:
        ValueError: fewer than one repeat, or chunks of less than one token.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    check_documents(input_ids, "input_ids")
    device = prompt_device(model)
    input_ids = input_ids.to(device)
    batch, length = input_ids.shape
    warmup = input_ids[:, :warmup_length]
    measured_round = 0 if warmup.shape == input_ids.shape else repeats
    results = [TimingResult(setting.name, length, batch) for setting in settings]
    for round_ in range(repeats + 1):
        for setting, result in zip(settings, results, strict=True):
            prompt = input_ids if round_ else warmup
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            with setting.applied(model, measure=round_ == measured_round) as measurement:
                seconds = prefill_seconds(model, prompt, chunk)
            if round_ == measured_round:
                result.density = measurement.density
            if round_ == 0:
                result.first_seconds = seconds
            else:
                result.seconds.append(seconds)
                if device.type == "cuda":
                    result.peak_bytes = max(result.peak_bytes or 0, torch.cuda.max_memory_allocated(device))
            if advance is not None:
                advance(prompt.numel())
    return results


def prefill_seconds(model: nn.Module, input_ids: Tensor, chunk: int | None = None) -> float:
    """Seconds of one prefill, through the whole model that was given, in one forward or in chunks on a cache."""
    options = prompt_options(model)
    if chunk is not None:
        options |= {"use_cache": True, "past_key_values": DynamicCache()}
    with evaluating(model):
        synchronize(input_ids.device)
        start = time.perf_counter()
        for part in input_ids.split(chunk or input_ids.shape[1], dim=1):
            model(input_ids=part, **options)
        synchronize(input_ids.device)
        return time.perf_counter() - start


def timing_table(results: Sequence[TimingResult]) -> Table:
    """Median prefill time of each setting and its speed relative to the first (dense) one."""
    first = results[0]
    rows = [
        [
            result.setting,
            format_density(result.density),
            format_seconds(result.median),
            f"{first.median / result.median:.2f}x",
            f"{format_seconds(min(result.seconds))} - {format_seconds(max(result.seconds))}",
            format_seconds(result.first_seconds),
        ]
        for result in results
    ]
    caption = (
        f"Prefill of {first.batch} x {format_length(first.length)} tokens through the whole model: median of "
        f"{len(first.seconds)} interleaved "
        "repeats. 'First call' is the untimed warm-up; it holds whatever had to be compiled."
    )
    return Table(["setting", "density", "prefill", f"speed vs {first.setting}", "range", "first call"], rows, caption)


@dataclass(frozen=True)
class TimingMeasure(Measure):
    """Prefill time as a measure, see :class:`~seerattention.evaluate.measure.Measure`.

    Attributes:
        repeats: timed calls of each setting.
    """

    name: ClassVar[str] = "timing"
    title: ClassVar[str] = "Prefill time"
    together: ClassVar[bool] = True

    repeats: int = 5

    def settings(self, asked: Sequence[Setting]) -> Sequence[Setting]:
        """No selectors: the oracle computes the whole map to select from it, so its time says nothing."""
        return [setting for setting in asked if setting.selector is None]

    def prepare(self, subject: Subject, length: int) -> Prompts:
        """A batch of text."""
        prompt = cut_documents(subject.books, length, subject.batch_size, bos=subject.tokenizer.bos_token_id)
        return Prompts(prompt, {"prompt": prompt.numpy()}, (self.repeats + 1) * prompt.numel())

    def run(
        self, subject: Subject, prompts: Prompts, settings: Sequence[Setting], advance: Advance | None = None
    ) -> list[TimingResult]:
        """See :func:`time_prefill`."""
        return time_prefill(subject.model, prompts.content, settings, repeats=self.repeats, advance=advance)

    def restore(self, numbers: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> TimingResult:
        """A result that was kept."""
        return TimingResult(**{name: value for name, value in numbers.items() if name != "median_seconds"})

    def table(self, results: Sequence[TimingResult]) -> Table:
        """See :func:`timing_table`."""
        return timing_table(results)


def time_functions(
    functions: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float = 0.5,
    min_repeats: int = 5,
    max_repeats: int = 100,
    advance: Callable[[int], None] | None = None,
) -> dict[str, Times]:
    """Time functions that launch work on one device, taking turns.

    Each is called twice untimed; the second call decides how many timed ones fit into ``seconds``. On a GPU the time is
    that between two events around the call, with the L2 cache flushed before it, and the host runs ahead: what is
    measured is the device's time, unless the function itself waits for the device. Elsewhere it is wall time.

    Args:
        seconds: device time to spend on the timed calls of each function.
        min_repeats, max_repeats: bounds on the number of timed calls of each.
        advance: called with 1 for every function once it is warm, and once more when all are timed.

    Returns:
        Times of each function, by name.

    Raises:
        ValueError: no repeat is allowed.
    """
    if min_repeats < 1:
        raise ValueError(f"min_repeats must be at least 1, got {min_repeats}")
    clock = _EventClock(device) if device.type == "cuda" else _WallClock(device)
    rounds: dict[str, int] = {}
    for name, function in functions.items():
        function()
        warm, host = warm_seconds(function, device)
        clock.expect(name, host)
        rounds[name] = min(max_repeats, max(min_repeats, math.ceil(seconds / max(warm, 1e-9))))
        if advance is not None:
            advance(1)
    for round_ in range(max(rounds.values(), default=0)):
        for name, function in functions.items():
            if round_ < rounds[name]:
                clock.call(name, function)
    times = clock.times()
    if advance is not None:
        advance(1)
    return {name: Times(times[name]) for name in functions}


def warm_seconds(function: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds of one call until its work is done, and until it has returned."""
    synchronize(device)
    start = time.perf_counter()
    function()
    returned = time.perf_counter() - start
    synchronize(device)
    return time.perf_counter() - start, returned


class _WallClock:
    """Wall time of calls."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, list[float]] = {}

    def expect(self, name: str, host_seconds: float) -> None:
        """Make room for the calls of a function that takes so long to return."""
        self.seconds[name] = []

    def call(self, name: str, function: Callable[[], object]) -> None:
        synchronize(self.device)
        start = time.perf_counter()
        function()
        synchronize(self.device)
        self.seconds[name].append(time.perf_counter() - start)

    def times(self) -> dict[str, list[float]]:
        return self.seconds


class _EventClock:
    """Device time of calls by CUDA events, after a flush of the L2 cache that lasts at least as long as the launch."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        size = max(_MIN_FLUSH_BYTES, _FLUSH_FACTOR * cache)
        self.flushed = torch.empty(size, dtype=torch.int8, device=device)
        self.flushed.zero_()
        self.flush_seconds = warm_seconds(self.flushed.zero_, device)[0]
        self.flushes: dict[str, int] = {}
        self.events: dict[str, list[tuple[Any, Any]]] = {}

    def expect(self, name: str, host_seconds: float) -> None:
        wanted = math.ceil(1.5 * host_seconds / self.flush_seconds)
        self.flushes[name] = min(_MAX_FLUSHES, max(1, wanted))
        self.events[name] = []

    def call(self, name: str, function: Callable[[], object]) -> None:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.device(self.device):
            for _ in range(self.flushes[name]):
                self.flushed.zero_()
            start.record()
            function()
            end.record()
        self.events[name].append((start, end))

    def times(self) -> dict[str, list[float]]:
        synchronize(self.device)
        return {name: [1e-3 * start.elapsed_time(end) for start, end in pairs] for name, pairs in self.events.items()}


def peak_memory(function: Callable[[], object], device: torch.device) -> int | None:
    """Most bytes of device memory that one call holds beyond what was allocated before, result included; None where
    the device does not count them.
    """
    if device.type != "cuda":
        return None
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
