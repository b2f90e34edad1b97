"""From which prompt length on does sparse prefill attention pay on this device? One attention layer, dense beside
sparse; sparse includes the gate and the selection of blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.block_sparse_attention import block_sparse_attention
from ..policies import TopK
from .kernels import (
    AttentionShape,
    check_attention,
    dense_kernels,
    dense_lists,
    make_gate,
    make_inputs,
)
from .timing import time_functions

__all__ = ["BenchResult", "bench_attention", "pays_from"]

_SAMPLED_BLOCKS = 4


@dataclass(frozen=True)
class BenchResult:
    """Dense and sparse attention of one prompt at one density, one layer.

    Attributes:
        length: tokens of the prompt.
        density: as asked for; ``selected``: selected blocks over causal blocks of the lists that ran.
        dense_kernel: name of the fastest dense kernel here.
        dense_seconds: its median; sparse_seconds: median of gate, selection and attention together.
        select_seconds: median of gate and selection alone.
    """

    length: int
    density: float
    selected: float
    dense_kernel: str
    dense_seconds: float
    sparse_seconds: float
    select_seconds: float

    @property
    def speedup(self) -> float:
        """How many times faster than dense sparse is."""
        return self.dense_seconds / self.sparse_seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {**asdict(self), "speedup": self.speedup}


@torch.inference_mode()
def bench_attention(
    shape: AttentionShape,
    length: int,
    densities: Sequence[float],
    device: torch.device,
    *,
    seconds: float = 0.3,
    advance: Callable[[int], None] | None = None,
) -> list[BenchResult]:
    """Time one attention layer on random inputs, batch size 1: every density, and the fastest dense kernel.

    Everything is checked against the float32 reference on some query blocks before it is timed. Dense kernels that are
    not there, or wrong, do not take part.

    Args:
        seconds: device time to spend on each function.
        advance: called with 1 for every function once it is warm, and once more at the end.

    Raises:
        ValueError: sparse attention is wrong on this device, or no dense kernel is right.
    """
    q, k, v = make_inputs(shape, length, length, device)
    gate = make_gate(shape, length, device)
    functions: dict[str, Callable[[], object]] = {}
    dense: dict[str, str] = {}
    everything = dense_lists(shape, length, length, device)
    for name, kernel in dense_kernels(q, k, v).items():
        try:
            check_attention(kernel, q, k, v, everything, sampled=_SAMPLED_BLOCKS)
        except (RuntimeError, ValueError) as error:
            dense[name] = str(error).splitlines()[0]
        else:
            functions[f"dense {name}"] = kernel
    if not functions:
        raise ValueError(f"no dense attention works on {device} in {shape.dtype}: {dense}; try another --dtype")
    selected = {}
    for density in densities:
        policy = TopK(density)
        lists = policy.select(gate.logits(q, k), block_size=shape.block_size)
        selected[density] = lists.density()

        def select(policy: TopK = policy) -> Any:
            return policy.select(gate.logits(q, k), block_size=shape.block_size)

        def attend(select: Callable[[], Any] = select) -> Tensor:
            return block_sparse_attention(q, k, v, select())  # type: ignore[return-value]

        check_attention(attend, q, k, v, lists, sampled=_SAMPLED_BLOCKS)
        functions[f"select {density:g}"], functions[f"sparse {density:g}"] = select, attend
    medians = {
        name: times.median
        for name, times in time_functions(functions, device, seconds=seconds, min_repeats=3, advance=advance).items()
    }
    fastest = min((name for name in functions if name.startswith("dense ")), key=medians.__getitem__)
    return [
        BenchResult(
            length=length,
            density=density,
            selected=selected[density],
            dense_kernel=fastest.removeprefix("dense "),
            dense_seconds=medians[fastest],
            sparse_seconds=medians[f"sparse {density:g}"],
            select_seconds=medians[f"select {density:g}"],
        )
        for density in densities
    ]


def pays_from(results: Sequence[BenchResult], density: float) -> int | None:
    """The shortest measured length from which on sparse attention of this density is faster than dense at every
    measured length; None where it is slower at the longest."""
    found = None
    for result in sorted((r for r in results if r.density == density), key=lambda r: r.length, reverse=True):
        if result.speedup <= 1:
            break
        found = result.length
    return found
