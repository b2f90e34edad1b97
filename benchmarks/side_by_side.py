"""Gates of several forms and losses trained on the same batches: one dense forward and one true map for all of them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from seerattention import DistillConfig
from seerattention.blocks import num_blocks
from seerattention.cli.common import Terminal
from seerattention.distillation.losses import draw_rows
from seerattention.distillation.objectives import REDUCE_OF
from seerattention.gates import BlockGate
from seerattention.hf.contexts import dense, observe
from seerattention.hf.prompts import run_prompt
from seerattention.ops import pooled_attention
from seerattention.policies import Policy, RelativeThreshold
from seerattention.selectors import LayerInputs

from .form_gates import Scorer, Variant, loss_of

FACTORS = tuple(0.2 * 2 ** (step / 3) for step in range(19))  # 0.2 to 12.8


def fresh(model: Any, variants: Sequence[Variant], seed: int = 0) -> dict[str, list[BlockGate]]:
    """Gates of all layers by variant, float32 on the model's device; each variant is drawn from the same seed."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    gates = {}
    for variant in variants:
        torch.manual_seed(seed)
        layers = [variant.build(config, head_dim) for _ in range(config.num_hidden_layers)]
        gates[variant.name] = [gate.to(model.device) for gate in layers]
    return gates


def train(
    model: nn.Module,
    variants: Sequence[Variant],
    gates: Mapping[str, Sequence[BlockGate]],
    batches: Iterable[Mapping[str, Tensor]],
    config: DistillConfig,
) -> dict[str, list[float]]:
    """Train as ``seer distill`` does (rows, rates and clipping are those of ``config``); whole prompts, no padding.

    Args:
        model: attached with anything, so that its layers can be observed.
        gates: from :func:`fresh`; they are trained in place.
        batches: ``config.steps`` of them.

    Returns:
        for each variant its loss a step, mean over layers, rows and heads.
    """
    if config.steps is None:
        raise ValueError("side by side the rate follows from the number of steps; say it")
    parameters = [p for layers in gates.values() for gate in layers for p in gate.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )
    history: list[Tensor] = []
    for step, batch in zip(range(config.steps), batches, strict=False):
        optimizer.zero_grad(set_to_none=True)
        sums, counts = _accumulate(model, variants, gates, batch, config, step)
        for layers in gates.values():
            for gate in layers:
                _scale(gate, counts, config.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step, config.steps)
        optimizer.step()
        history.append(sums / counts)
    losses = torch.stack(history).cpu()
    if not losses.isfinite().all():
        bad = [variant.name for variant, column in zip(variants, losses.T, strict=True) if not column.isfinite().all()]
        Terminal().say(f"losses of {', '.join(bad)} are not finite: no results of these are worth anything")
    return {variant.name: losses[:, place].tolist() for place, variant in enumerate(variants)}


def _accumulate(
    model: Any,
    variants: Sequence[Variant],
    gates: Mapping[str, Sequence[BlockGate]],
    batch: Mapping[str, Tensor],
    config: DistillConfig,
    step: int,
) -> tuple[Tensor, int]:
    """Gradients of one batch; losses ``[variants]``, summed over rows and heads, mean over layers, and their number."""
    ids = batch["input_ids"].to(model.device)
    blocks = num_blocks(ids.shape[1], 64)
    rows = draw_rows(blocks, config.rows, config.skip_rows, config.seed, step, config.last_rows).to(ids.device)
    sums = torch.zeros(len(variants), device=ids.device)
    layers = model.config.num_hidden_layers

    def learn(inputs: LayerInputs, _: object) -> None:
        maps = _maps(inputs, rows, {variant.target for variant in variants})
        for place, variant in enumerate(variants):
            with torch.enable_grad():
                gate = gates[variant.name][inputs.layer]
                logits = gate(inputs.q_pre, inputs.k_pre, inputs.cos, inputs.sin, rows=rows)
                loss = loss_of(variant, logits, maps[variant.target], rows, step)
                loss.backward()
            sums[place] += loss.detach() / layers

    with torch.no_grad(), dense(model), observe(model, learn):
        run_prompt(model, {"input_ids": ids})
    return sums, len(rows) * ids.shape[0] * model.config.num_attention_heads


@torch.no_grad()
def _maps(inputs: LayerInputs, rows: Tensor, targets: set[str]) -> dict[str, Tensor]:
    wanted = {"max", "row_mass"} if "both" in targets else targets
    maps = {
        target: pooled_attention(
            inputs.q, inputs.k, block_size=64, scale=inputs.scale, rows=rows, lse=inputs.lse, reduce=REDUCE_OF[target]
        )
        for target in wanted
    }
    if "both" in targets:
        maps["both"] = (maps["max"] + maps["row_mass"]) / 2
    return maps


def _scale(gate: BlockGate, count: int, limit: float | None) -> None:
    """Mean gradients, clipped by layer, without waiting for the device."""
    grads = [p.grad for p in gate.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads) / count
    factor = torch.ones_like(norm) if limit is None else (limit / norm.clamp(min=1e-20)).clamp(max=1)
    for grad in grads:
        grad.mul_(factor / count)


def for_inference(gates: Sequence[BlockGate], dtype: torch.dtype) -> list[BlockGate]:
    """Copies in the model's precision, as gates are saved and used."""
    return [copy.deepcopy(gate).to(dtype).requires_grad_(False).eval() for gate in gates]


@torch.no_grad()
def fit(
    model: nn.Module,
    documents: Tensor,
    scorers: Mapping[str, Scorer],
    densities: Sequence[float],
    exponents: Sequence[float] = (1.0,),
) -> dict[tuple[str, float], dict[float, Policy]]:
    """For each scorer, exponent, density the ``RelativeThreshold`` that keeps so many blocks along dense forwards."""
    blocks = num_blocks(documents.shape[1], 64)
    tried = {exponent: [factor * (blocks / 2) ** (exponent - 1) for factor in FACTORS] for exponent in exponents}
    kept = torch.zeros(len(scorers), len(exponents), len(FACTORS), dtype=torch.float64)
    total = 0.0

    def count(inputs: LayerInputs, _: object) -> None:
        nonlocal total
        num = num_blocks(inputs.q.shape[2], 64)
        total += inputs.q.shape[0] * inputs.q.shape[1] * num * (num + 1) / 2
        found = []
        for scorer in scorers.values():
            logits = scorer(inputs)
            for exponent, factors in tried.items():
                policies = [RelativeThreshold(factor, exponent=exponent) for factor in factors]
                found += [policy.select(logits, block_size=64).counts.sum() for policy in policies]
        kept.add_(torch.stack(found).cpu().view_as(kept))

    with dense(model), observe(model, count):
        for document in documents:
            run_prompt(model, {"input_ids": document[None].to(next(model.parameters()).device)})
    shares = kept / total
    return {
        (name, exponent): {
            density: RelativeThreshold(_factor_of(shares[i, j].tolist(), density, factors), exponent=exponent)
            for density in densities
        }
        for i, name in enumerate(scorers)
        for j, (exponent, factors) in enumerate(tried.items())
    }


def _factor_of(shares: Sequence[float], density: float, factors: Sequence[float]) -> float:
    """Between the two factors whose densities lie around, along logarithms; an end where there are none."""
    for i in range(len(shares) - 1):
        high, low = shares[i], shares[i + 1]
        if high >= density > low:
            part = (torch.tensor(high / density).log() / torch.tensor(high / low).log()).item()
            return float(factors[i] * (factors[i + 1] / factors[i]) ** part)
    return factors[0] if density > shares[0] else factors[-1]
