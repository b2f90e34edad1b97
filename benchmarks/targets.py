"""What was aimed at, as numbers that results can be held to: H200, bfloat16, batch 1, 32 query and 8 KV heads,
head_dim 128, 64x64 blocks, one list per query head, the diagonal masked exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from seerattention.evaluate.tables import format_length

_8B = {"heads": 32, "kv_heads": 8, "head_dim": 128, "block_size": 64, "dtype": "bfloat16"}
_MODEL = {"model": "llama-3.1-8b", "density": 0.1}


@dataclass(frozen=True)
class Target:
    """One number to reach.

    Attributes:
        key: the family that ops in ``registry.py`` name.
        text: what it is, for tables.
        benchmark: the results file that answers it; where: entries of the case; metric: the number.
        bound: the value to reach; at_most: whether it must not be exceeded (else it is a minimum).
        unit: follows the numbers in tables.
    """

    key: str
    text: str
    benchmark: str
    where: Mapping[str, Any]
    metric: str
    bound: float
    at_most: bool = False
    unit: str = ""

    def find(self, results: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """The result among those of its benchmark that answers it; of several the one with most layers."""
        fitting = [
            result
            for result in results
            if self.metric in result["metrics"]
            and all(result["case"].get(name) == value for name, value in self.where.items())
        ]
        return max(fitting, key=lambda result: result["case"].get("layers", 0), default=None)

    def met(self, value: float) -> bool:
        """Whether a measured value reaches it."""
        return value <= self.bound if self.at_most else value >= self.bound

    def wanted(self) -> str:
        """The bound, for tables."""
        return f"{'at most' if self.at_most else 'at least'} {self.show(self.bound)}"

    def show(self, value: float) -> str:
        """A value of this metric, for tables."""
        if self.unit == "%":
            return f"{100 * value:.1f} %"
        digits = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
        return f"{digits}{'' if self.unit == 'x' else ' '}{self.unit}".strip()


def _forward(density: float, rates: Sequence[float]) -> list[Target]:
    return [
        Target(
            "forward",
            f"forward, density {density:g}, {format_length(length)}",
            "block_sparse_attention",
            {**_8B, "keys": length, "density": density, "lists": "random"},
            "tflops",
            rate,
            unit="TFLOP/s",
        )
        for length, rate in zip((8192, 32768, 131072), rates, strict=True)
    ]


def _model(key: str, text: str, length: int, metric: str, bound: float, **where: Any) -> Target:
    at_most = metric in ("slowdown", "over_paper")
    case = {**_MODEL, "min_context": "0", "length": length, "form": None, **where}  # no form: the paper's gate
    return Target(key, text, "e2e", case, metric, bound, at_most, "x")


TARGETS: tuple[Target, ...] = (
    *_forward(0.1, (470, 560, 600)),
    Target(
        "forward-over-dense",
        "forward, density 0.1, 128K: times faster than dense cuDNN",
        "block_sparse_attention",
        {**_8B, "keys": 131072, "density": 0.1, "lists": "random"},
        "speedup_over_cudnn",
        10.0,
        unit="x",
    ),
    *_forward(0.05, (400, 520, 580)),
    *_forward(0.2, (520, 580, 610)),
    *(
        Target(
            "head64",
            f"head_dim 64, density 0.1, {format_length(length)}: share of dense cuDNN's rate",
            "block_sparse_attention",
            {**_8B, "head_dim": 64, "keys": length, "density": 0.1, "lists": "random"},
            "rate_over_cudnn",
            0.8,
        )
        for length in (32768, 131072)
    ),
    Target(
        "chunk",
        "chunk of 2K queries on 128K keys, density 0.1: times faster than the fastest correct dense kernel",
        "chunk_attention",
        {**_8B, "queries": 2048, "keys": 131072, "density": 0.1, "lists": "random"},
        "speedup_over_dense",
        7.0,
        unit="x",
    ),
    *(
        Target(
            "gate-path",
            f"gate + selection + list, {format_length(length)}: share of sparse attention at density 0.1",
            "gate_path",
            {**_8B, "keys": length, "density": 0.1},
            "share_TopK",
            bound,
            at_most=True,
            unit="%",
        )
        for length, bound in ((32768, 0.10), (131072, 0.03))
    ),
    *(
        Target(
            f"target-{share}",
            f"distillation target, {format_length(length)}, {text}: extra time over a dense forward",
            "pooled_attention",
            {**_8B, "keys": length},
            f"{share}_extra_time",
            bound,
            at_most=True,
            unit="x",
        )
        for length in (32768, 131072)
        for share, text, bound in (("all", "all rows", 0.5), ("quarter", "a quarter of the rows", 0.15))
    ),
    Target(
        "target-memory",
        "distillation target, 128K, all rows: extra memory over the map itself",
        "pooled_attention",
        {**_8B, "keys": 131072},
        "all_memory_over_map",
        1.05,
        at_most=True,
        unit="x",
    ),
    _model(
        "prefill", "time to first token, 8B shape, density 0.1, 32K: times faster than dense", 32768, "speedup", 1.4
    ),
    _model(
        "prefill", "time to first token, 8B shape, density 0.1, 128K: times faster than dense", 131072, "speedup", 2.6
    ),
    _model(
        "prefill",
        "time to first token, 8B shape, density 0.1, 128K: with sub-blocks over the paper's gate",
        131072,
        "over_paper",
        1.05,
        form="sub_block_shared",
    ),
    *(
        _model(
            "short",
            f"short prompts as shipped, 8B shape, {format_length(length)}: time over dense",
            length,
            "slowdown",
            1.02,
            min_context="default",
        )
        for length in (1024, 2048, 4096)
    ),
)
