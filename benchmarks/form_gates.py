"""Forms and losses that ``benchmarks.forms`` tries and the package does not have, and what scores blocks in a trial."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seerattention import PrefillGateConfig, SubBlockGateConfig
from seerattention.blocks import BlockIndices
from seerattention.distillation.losses import kl_sum
from seerattention.gates import BlockGate, SubBlockGate, build_gate
from seerattention.gates.gate import draw_projection
from seerattention.ops.span import Span
from seerattention.policies import Policy
from seerattention.selectors import LayerInputs, Selector

LOSSES = ("kl", "membership", "rank", "not_local", "outside")
TARGETS = ("max", "row_mass", "both")
FACTOR = 1.2  # of RelativeThreshold, which says what is a member of the true map's list
SHARE = 0.3  # of the second loss beside KL
PAIRS = 64  # pairs of key blocks that the rank loss draws for each row
HIDDEN = -1e4  # a score that no softmax sees, and that is a number all the same


@dataclass(frozen=True)
class Variant:
    """A form of gate and how it is trained.

    Attributes:
        name: what results call it.
        form: its spec; ``None``: none is trained.
        reduce: as the package has it, or "max_lse": of a tile's products the log-sum-exp over key sub-blocks, then the
            maximum over query sub-blocks ("mass" without its normalised queries).
        absmax: queries are pooled to the value that is farthest from 0 (with its sign) and the average.
        target: what a gate learns of a tile: "max", "row_mass" or "both", the mean of these two maps.
        loss: "kl"; beside it "membership" (balanced cross entropy of which blocks the true map keeps) or "rank"
            (logistic loss of pairs of blocks of which the true map keeps one); "not_local": rows count by the share of
            their map that is neither sink nor diagonal; "outside": sink and diagonal, which every rule keeps, are left
            out of target and scores.
    """

    name: str
    form: PrefillGateConfig | SubBlockGateConfig
    reduce: str = "max"
    absmax: bool = False
    target: str = "row_mass"
    loss: str = "kl"

    def build(self, model_config: Any, head_dim: int) -> BlockGate:
        """A fresh gate, float32, drawn from torch's generator."""
        heads = model_config.num_attention_heads
        shape = {"num_heads": heads, "num_kv_heads": model_config.num_key_value_heads, "head_dim": head_dim}
        if isinstance(self.form, SubBlockGateConfig) and (self.absmax or self.reduce == "max_lse"):
            return TrialGate(self, **shape)
        form = self.form
        if isinstance(form, SubBlockGateConfig):
            form = dataclasses.replace(form, reduce=self.reduce)
        return build_gate(form, block_size=64, **shape)


class TrialGate(SubBlockGate):
    """Sub-blocks that are reduced or pooled in another way; whole prompts without padding, plain torch."""

    def __init__(self, variant: Variant, *, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        assert isinstance(variant.form, SubBlockGateConfig)
        super().__init__(variant.form, block_size=64, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
        self.reduce, self.absmax = variant.reduce, variant.absmax
        if self.absmax:
            self.q_linear = nn.Parameter(torch.empty(num_heads, 2 * head_dim, self.width))
            draw_projection(self.q_linear, [False, True])

    def _encode(
        self, pooled: Tensor, linear: Tensor | None, cos: Tensor | None, sin: Tensor | None, pitch: int, offset: int = 0
    ) -> Tensor:
        if self.absmax and linear is self.q_linear:
            most, least, mean = pooled.chunk(3, -1)
            pooled = torch.cat((torch.where(most.abs() >= least.abs(), most, least), mean), -1)
        return super()._encode(pooled, linear, cos, sin, pitch, offset)

    def score(
        self, queries: Tensor, keys: Tensor, *,
        rows: Tensor | None = None, span: Span | None = None, masked: bool = True,
    ) -> Tensor:  # fmt: skip
        """See :meth:`BlockGate.score`."""
        if self.reduce != "max_lse":
            return super().score(queries, keys, rows=rows, span=span, masked=masked)
        per_q, per_k = self.block_size // self.q_pitch, self.block_size // self.k_pitch
        columns = -(-keys.shape[2] // per_k)
        if rows is None:
            rows = torch.arange(columns, device=queries.device)
        q = F.pad(queries.float(), (0, 0, 0, len(rows) * per_q - queries.shape[2])).unflatten(1, (keys.shape[1], -1))
        k = F.pad(keys.float(), (0, 0, 0, columns * per_k - keys.shape[2]))[:, :, None]
        products = self.scale * q @ k.transpose(-1, -2)  # [B, Hk, G, R * per_q, N * per_k]
        places = torch.arange(per_q, device=q.device) * self.q_pitch + self.q_pitch
        behind = (rows[:, None] * self.block_size + places).flatten()  # the first token that a sub-block may not see
        begin = torch.arange(columns * per_k, device=q.device) * self.k_pitch
        unseen = (begin >= behind[:, None]) | (torch.arange(len(begin), device=q.device) >= keys.shape[2])
        products = products.masked_fill(unseen, float("-inf"))
        # A finite stand-in for tiles without a product keeps gradients finite.
        tiles = products.clamp(min=HIDDEN).unflatten(-1, (columns, per_k)).logsumexp(-1)
        empty = torch.arange(len(behind), device=q.device) >= queries.shape[2]  # behind the last token
        tiles = tiles.masked_fill(empty[:, None], HIDDEN)
        scores = tiles.unflatten(-2, (len(rows), per_q)).amax(-2).flatten(1, 2)
        future = torch.arange(columns, device=q.device) > rows[:, None]
        return scores.masked_fill(future, float("-inf"))


def loss_of(variant: Variant, logits: Tensor, target: Tensor, rows: Tensor, draw: int) -> Tensor:
    """Loss summed over rows and heads.

    Args:
        logits, target: ``[B, H, R, N]``, as of ``kl_sum``.
        rows: int64 ``[R]``.
        draw: number of the step, which decides the pairs of "rank".
    """
    columns = torch.arange(logits.shape[-1], device=rows.device)
    fixed = (columns == 0) | (columns == rows[:, None])
    seen = columns <= rows[:, None]
    if variant.loss == "outside":
        target = target.masked_fill(fixed, 0.0)
        mass = target.sum(-1, keepdim=True)
        target = target / mass.clamp(min=1e-20)
        inside = (mass[..., 0] > 0) & (rows > 1)  # where there is another block
        logits = logits.masked_fill(fixed & (rows[:, None] > 1), float("-inf"))
        return _divergence(logits, target * inside[..., None]).sum()
    if variant.loss == "not_local":
        weight = 1 - (target * fixed).sum(-1)
        return (_divergence(logits, target) * weight).sum() / weight.mean().clamp(min=1e-6)
    loss = kl_sum(logits, target)
    if variant.loss == "kl":
        return loss
    count = (rows + 1)[:, None]
    member = target * count > FACTOR
    if variant.loss == "membership":
        free = seen & ~fixed
        margin = torch.log_softmax(logits.float(), -1).clamp(min=HIDDEN) + (count.float() / FACTOR).log()
        terms = F.binary_cross_entropy_with_logits(margin, member.float(), reduction="none")
        parts = [_mean(terms, free & member), _mean(terms, free & ~member)]
        return loss + SHARE * 0.5 * (parts[0] + parts[1]).sum()
    generator = torch.Generator(device="cpu").manual_seed(draw)
    drawn = torch.rand(2, len(rows), PAIRS, generator=generator).to(rows.device)
    first, second = (drawn * count).long().clamp(max=logits.shape[-1] - 1)
    shape = (*logits.shape[:3], PAIRS)
    scores = [logits.gather(-1, place.expand(shape)) for place in (first, second)]
    kept = [member.gather(-1, place.expand(shape)).float() for place in (first, second)]
    order = kept[0] - kept[1]
    terms = F.softplus(-order * (scores[0] - scores[1])) * order.abs()
    return loss + SHARE * (terms.sum(-1) / order.abs().sum(-1).clamp(min=1)).sum()


def _divergence(logits: Tensor, target: Tensor) -> Tensor:
    """KL of each row; rows of zeros have none."""
    log = torch.where(target == 0, torch.zeros_like(target), torch.log_softmax(logits.float(), -1))
    return (torch.xlogy(target, target) - target * log).sum(-1)


def _mean(terms: Tensor, where: Tensor) -> Tensor:
    return (terms * where).sum(-1) / where.sum(-1).clamp(min=1)


Scorer = Callable[[LayerInputs], Tensor]
"""Block logits ``[B, H, N, N]`` of a layer."""


def by_gates(gates: Sequence[BlockGate], outside: bool = False) -> Scorer:
    """What the gate of each layer says; ``outside``: it was trained without sink and diagonal."""

    def score(inputs: LayerInputs) -> Tensor:
        logits = gates[inputs.layer](inputs.q_pre, inputs.k_pre, inputs.cos, inputs.sin, lengths=inputs.lengths)
        if not outside:
            return logits
        columns = torch.arange(logits.shape[-1], device=logits.device)
        return logits.masked_fill((columns == 0) | (columns == columns[:, None]), HIDDEN)

    return score


def in_two_stages(coarse: Sequence[BlockGate], fine: Sequence[BlockGate], keep: Policy) -> Scorer:
    """Fine scores of the blocks that the coarse ones keep."""
    first, second = by_gates(coarse), by_gates(fine)

    def score(inputs: LayerInputs) -> Tensor:
        mask = keep.select(first(inputs), block_size=64, lengths=inputs.lengths).to_mask()
        return second(inputs).masked_fill(~mask, HIDDEN)

    return score


def by_selector(selector: Selector) -> Scorer:
    """Scores of a method that needs no gates."""

    def score(inputs: LayerInputs) -> Tensor:
        found = selector.scores(inputs)
        assert found is not None
        return found

    return score


@dataclass(frozen=True)
class Trial(Selector, registered=False):
    """Scores and a policy; of whole prompts."""

    scorer: Scorer
    policy: Policy

    kind = "trial"

    def select(self, inputs: LayerInputs) -> BlockIndices:
        logits = self.scorer(inputs)
        return self.policy.select(logits, block_size=64, lengths=inputs.lengths)

    @property
    def rowwise(self) -> bool:
        return self.policy.rowwise
