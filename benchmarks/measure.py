"""Measuring one case of an op: check every candidate against its float32 reference, then time those that are right.

Each function returns ``{"implementations": {key: times, error, rate}, "refused": {key: why}, "wrong": [keys of ours],
"metrics": {name: number}}``; the metrics are what targets are stated in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from seerattention.evaluate.kernels import (
    WrongResultError,
    check_attention,
    dense_kernels,
    dense_lists,
    make_gate,
    make_inputs,
    require_accurate,
    sample_rows,
)
from seerattention.evaluate.timing import peak_memory, time_functions
from seerattention.ops.block_pooling import block_pooling
from seerattention.ops.block_sparse_attention import block_sparse_attention
from seerattention.ops.dense import dense_attention_with_lse
from seerattention.ops.indices import BlockIndices, num_blocks
from seerattention.ops.pooled_attention import (
    interface,
    interface_decode,
    pooled_attention,
    pooled_attention_decode,
)
from seerattention.policies import Policy, Threshold, TokenBudget, TopK, TopP

from .candidates import AUTOMATIC, attention_candidates, our_implementations
from .registry import GATE_SPECS, Case

_CANNOT_RUN = (RuntimeError, ValueError, NotImplementedError)
_GATE_TOLERANCE = 3e-2  # of bfloat16 pooling and projections against the same in float32


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        device: where.
        seconds: device time to spend on each function.
        flex: FlexAttention as a rival; compiled=False runs it eagerly, to rehearse.
        without: parts of names of candidates to leave out.
    """

    device: torch.device
    seconds: float = 0.5
    flex: bool = True
    compiled: bool = True
    without: tuple[str, ...] = ()

    def wants(self, key: str) -> bool:
        """Whether this candidate is to be measured."""
        return not any(part in key for part in self.without)


@dataclass
class _Checked:
    """Functions that passed their check, and what became of the others."""

    functions: dict[str, Callable[[], Any]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def add(self, key: str, function: Callable[[], Any], check: Callable[[], float]) -> None:
        try:
            error = check()
        except _CANNOT_RUN as failure:
            if "CUDA error" in str(failure):  # nothing runs in this process any more
                raise RuntimeError(f"{key} broke the device: {failure}\nLeave it out: --without {key!r}") from failure
            self.refused[key] = (str(failure).strip().splitlines() or [type(failure).__name__])[0]
            if isinstance(failure, WrongResultError) and key.startswith("ours"):
                self.wrong.append(key)
        else:
            self.functions[key], self.errors[key] = function, error

    def time(self, options: Options) -> dict[str, dict[str, Any]]:
        times = time_functions(self.functions, options.device, seconds=options.seconds)
        return {key: {**times[key].to_dict(), "error": self.errors[key]} for key in self.functions}

    def result(self, implementations: dict[str, dict[str, Any]], metrics: dict[str, Any]) -> dict[str, Any]:
        return {
            "implementations": implementations,
            "refused": self.refused,
            "wrong": self.wrong,
            "metrics": {name: value for name, value in metrics.items() if value is not None},
        }


def measure(case: Case, options: Options) -> dict[str, Any]:
    """Measure any case."""
    with torch.inference_mode():
        if case.op == "pooled_attention":
            return measure_pooled_attention(case, options)
        if case.op == "pooled_attention_decode":
            return measure_pooled_attention_decode(case, options)
        if case.op in GATE_SPECS:
            return measure_gate_path(case, options)
        return measure_attention(case, options)


def measure_attention(case: Case, options: Options) -> dict[str, Any]:
    """Block-sparse attention, whole prompts and chunks, against dense kernels and FlexAttention."""
    q, k, v = make_inputs(case.shape, case.queries, case.keys, options.device)
    candidates = {
        candidate.key: candidate
        for candidate in attention_candidates(case, q, k, v, flex=options.flex, compiled=options.compiled)
        if options.wants(candidate.key)
    }
    checked = _Checked()
    for key, one in candidates.items():
        checked.add(key, one.function, partial(check_attention, one.function, q, k, v, one.lists))
    found = checked.time(options)
    for key, numbers in found.items():
        numbers["tflops"] = candidates[key].flops / numbers["median_s"] / 1e12
        numbers["density"] = candidates[key].lists.density()
    metrics: dict[str, Any] = {}
    ours, dense = found.get(f"ours: {AUTOMATIC}"), _fastest(found, "dense: ")
    if ours is not None:
        metrics |= {"tflops": ours["tflops"], "density": ours["density"]}
        if dense is not None:
            metrics["dense_kernel"] = dense.removeprefix("dense: ")
            metrics["speedup_over_dense"] = found[dense]["median_s"] / ours["median_s"]
        if "dense: cuDNN" in found:
            metrics["speedup_over_cudnn"] = found["dense: cuDNN"]["median_s"] / ours["median_s"]
            metrics["rate_over_cudnn"] = ours["tflops"] / found["dense: cuDNN"]["tflops"]
    return checked.result(found, metrics)


def measure_pooled_attention(case: Case, options: Options) -> dict[str, Any]:
    """The distillation target beside a dense forward: all query-block rows, and a random quarter of them."""
    rows = num_blocks(case.keys, case.shape.block_size)
    shares = {
        "all rows": ("all", torch.arange(rows)),
        "a quarter of the rows": ("quarter", _draw_rows(rows, max(1, rows // 4))),
    }
    return _measure_target(case, options, pooled_attention, interface.IMPLEMENTATIONS, shares, case.shape.heads)


def measure_pooled_attention_decode(case: Case, options: Options) -> dict[str, Any]:
    """The target of decode gates beside a dense forward: random query tokens, one a block and eight a block."""
    blocks = num_blocks(case.keys, case.shape.block_size)
    shares = {
        "one token a block": ("one", _draw_rows(case.keys, blocks)),
        "eight tokens a block": ("eight", _draw_rows(case.keys, min(case.keys, 8 * blocks))),
    }
    return _measure_target(
        case, options, pooled_attention_decode, interface_decode.IMPLEMENTATIONS, shares, case.shape.kv_heads
    )


def _draw_rows(available: int, wanted: int) -> Tensor:
    """``wanted`` of the rows, ascending."""
    return torch.randperm(available, generator=torch.Generator().manual_seed(0))[:wanted].sort().values


def _measure_target(
    case: Case,
    options: Options,
    op: Callable[..., Tensor],
    implementations: Iterable[str],
    shares: dict[str, tuple[str, Tensor]],
    heads: int,
) -> dict[str, Any]:
    """A distillation target of ``heads`` maps beside a dense forward, for some choices of rows.

    Extra time is what a dense forward that also returns its log-sum-exp takes longer than without, and the target given
    that; the target that computes both is timed, too ("alone").

    Args:
        shares: choices of rows by name, with a short name for metrics.
    """
    shape, device = case.shape, options.device
    q, k, v = make_inputs(shape, case.queries, case.keys, device)
    shares = {share: (short, rows.to(device)) for share, (short, rows) in shares.items()}
    checked = _Checked()
    lists = dense_lists(shape, case.queries, case.keys, device)
    for name, function in dense_kernels(q, k, v).items():
        if options.wants(f"dense: {name}"):
            checked.add(f"dense: {name}", function, partial(check_attention, function, q, k, v, lists))
    given: Tensor | None = None
    for name, backend in _BACKENDS_WITH_LSE.items():
        with_lse = partial(_dense_with_lse, q, k, v, backend)
        if f"dense: {name}" in checked.functions:
            checked.add(f"with LSE: {name}", with_lse, partial(check_attention, with_lse, q, k, v, lists))
        if given is None and f"with LSE: {name}" in checked.functions:
            given = with_lse()[1]
    for ours in our_implementations(implementations, device):
        for share, (_, rows) in shares.items():
            for suffix, lse in (("", given), (", alone", None)):
                key = f"ours: {ours or AUTOMATIC}, {share}{suffix}"
                if not options.wants(key) or (not suffix and lse is None):
                    continue
                function = partial(op, q, k, block_size=shape.block_size, rows=rows, lse=lse, implementation=ours)
                checked.add(key, function, partial(_target_error, op, function, q, k, rows, shape.block_size))
    found = checked.time(options)
    metrics: dict[str, Any] = {}
    dense = _fastest(found, "dense: ")
    returning: float | None = None  # what returning the log-sum-exp costs
    if dense is not None:
        metrics["dense_kernel"] = dense.removeprefix("dense: ")
        forward, kernel = found[dense]["median_s"], _fastest(found, "with LSE: ")
        if kernel is not None:
            returning = max(0.0, found[kernel]["median_s"] - forward)
            metrics["lse_extra_time"] = returning / forward
    blocks = num_blocks(case.keys, shape.block_size)
    for share, (short, rows) in shares.items():
        key = f"ours: {AUTOMATIC}, {share}"
        if f"{key}, alone" in found and dense is not None:
            metrics[f"{short}_extra_time_alone"] = found[f"{key}, alone"]["median_s"] / forward
        if key not in found:
            continue
        found[key]["extra_bytes"] = extra = peak_memory(checked.functions[key], device)
        if extra is not None:  # the map itself is float32 [1, heads, rows, key blocks]
            metrics[f"{short}_memory_over_map"] = extra / (4 * heads * len(rows) * blocks)
        if returning is not None:
            metrics[f"{short}_extra_time"] = (returning + found[key]["median_s"]) / forward
    return checked.result(found, metrics)


_BACKENDS_WITH_LSE = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "FlashAttention-2": SDPBackend.FLASH_ATTENTION,
    "sdpa": None,
}


def _dense_with_lse(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend | None) -> tuple[Tensor, Tensor]:
    """Dense attention and its log-sum-exp, as a distillation step runs it."""
    found = dense_attention_with_lse(q, k, v, backend=backend)
    if found is None:
        raise NotImplementedError("no log-sum-exp from this kernel")
    return found


def measure_gate_path(case: Case, options: Options) -> dict[str, Any]:
    """Pooling, gate and selection by every policy, beside sparse attention on the lists of ``TopK(density)``."""
    shape, device, length = case.shape, options.device, case.keys
    q, k, v = make_inputs(shape, length, length, device)
    gate = make_gate(shape, length, device, spec=GATE_SPECS[case.op])
    logits = gate.logits(q, k)
    last = logits[:, :, -1].float().softmax(-1)
    policies: dict[str, Policy] = {
        "TopK": TopK(case.density),
        "TokenBudget": TokenBudget(max(1, round(case.density * length))),
        # Values that select about this density where scores are those of a fresh gate on random inputs.
        "Threshold": Threshold(float(last.flatten().kthvalue(max(1, int((1 - case.density) * last.numel()))).values)),
        "TopP": TopP(case.density),
    }
    checked = _Checked()
    lists = {name: policy.select(logits, block_size=shape.block_size) for name, policy in policies.items()}
    rows = sample_rows(logits.shape[2], 6)

    @cache  # all that is checked here rests on the same logits
    def gate_error() -> float:
        return _gate_error(logits, case, q, k, rows)

    for name, policy in policies.items():

        def path(policy: Policy = policy) -> BlockIndices:
            return policy.select(gate.logits(q, k), block_size=shape.block_size)

        def check(name: str = name, policy: Policy = policy) -> float:
            _require_same_lists(lists[name], policy, logits, rows, shape.block_size)
            return gate_error()

        if options.wants(f"ours: {name}"):
            checked.add(f"ours: {name}", path, check)
    attend = partial(block_sparse_attention, q, k, v, lists["TopK"])
    checked.add("ours: sparse attention", attend, partial(check_attention, attend, q, k, v, lists["TopK"]))
    checked.add("part: gate logits", partial(gate.logits, q, k), gate_error)
    module: Any = gate.gate
    pooled = ((q, module.config.q_pooling, module.q_pitch), (k, module.config.k_pooling, module.k_pitch))

    def pool() -> list[Tensor]:
        return [block_pooling(x, kinds, block_size=pitch) for x, kinds, pitch in pooled]

    checked.add("part: pooling", pool, gate_error)  # logits are right only if what they are made of is
    select = partial(policies["TopK"].select, logits, block_size=shape.block_size)
    checked.add("part: selection by TopK", select, gate_error)
    found = checked.time(options)
    metrics: dict[str, Any] = {}
    attention = found.get("ours: sparse attention")
    for name in policies:
        numbers = found.get(f"ours: {name}")
        if numbers is None:
            continue
        numbers["density"] = lists[name].density()
        numbers["waits_for_device"] = _waits_for_device(checked.functions[f"ours: {name}"], device)
        if attention is not None:
            metrics[f"share_{name}"] = numbers["median_s"] / attention["median_s"]
    return checked.result(found, metrics)


def _fastest(found: dict[str, dict[str, Any]], prefix: str) -> str | None:
    return min((key for key in found if key.startswith(prefix)), key=lambda key: found[key]["median_s"], default=None)


def _target_error(
    op: Callable[..., Tensor], function: Callable[[], Tensor], q: Tensor, k: Tensor, rows: Tensor, block_size: int
) -> float:
    """Largest relative error of any head in some rows of the map, checked before it is timed."""
    actual = function()
    sampled = torch.tensor(sample_rows(len(rows), 6), device=q.device)
    expected = op(q.float(), k.float(), block_size=block_size, rows=rows[sampled], implementation="reference")
    difference = (actual[:, :, sampled] - expected).norm(dim=-1) / expected.norm(dim=-1)
    error = float("inf") if bool(actual.isnan().any()) else float(difference.max())
    require_accurate(error, q.dtype)
    return error


def _gate_error(logits: Tensor, case: Case, q: Tensor, k: Tensor, rows: list[int]) -> float:
    """Relative error of the gate's causal logits, against pooling and gate in float32 on the same numbers."""
    exact = make_gate(case.shape, case.keys, q.device, spec=GATE_SPECS[case.op])
    exact.gate.float()
    expected = exact.gate(
        q.float(), k.float(), exact.cos.float(), exact.sin.float(), rows=torch.tensor(rows, device=q.device)
    )
    causal = expected > float("-inf")
    actual = logits[:, :, rows]
    error = float((actual[causal] - expected[causal]).norm() / expected[causal].norm())
    if not error <= _GATE_TOLERANCE:
        raise WrongResultError(f"wrong results: gate logits are off by {error:.1e} (relative) from those in float32")
    return error


def _require_same_lists(lists: BlockIndices, policy: Policy, logits: Tensor, rows: list[int], block_size: int) -> None:
    """Hold some rows of the lists to what the policy selects on the CPU from the same logits, each row alone.

    Probabilities differ in their last bits between devices, so one block in a hundred may be another one.
    """
    mask = lists.to_mask().cpu()
    for row in rows:
        alone = policy.select(logits[:, :, row : row + 1, : row + 1].cpu(), block_size=block_size).to_mask()
        different = (mask[:, :, row, : row + 1] != alone[:, :, 0]).sum(-1)
        allowed = (alone[:, :, 0].sum(-1) // 100).clamp(min=1)
        if bool((different > allowed).any()):
            raise WrongResultError(
                f"wrong results: in query block {row} {policy} selects {int(different.max())} other blocks than on the "
                "CPU"
            )


def _waits_for_device(function: Callable[[], Any], device: torch.device) -> bool | None:
    """Whether a call makes the host wait for the device; None where there is no telling."""
    if device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False
