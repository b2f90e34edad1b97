"""What lists of blocks keep of the true attention map, counted in several ways: the arithmetic, without a model.

Block recall is most of all the sink and the diagonal, which every policy keeps. What an answer hangs on is a single far
block of a few heads. A block is *far* where it is neither the first nor the row's own nor the one before that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["LOOK_UP", "PEAK", "RECALLS", "SHOWN", "Recall", "count_kept"]

PEAK = 0.1
"""A far block is a peak of its row if some query gives one of its keys more than this probability."""
LOOK_UP = 0.3
"""A row whose highest probability of all is above this and lies in a far block looks something up."""
# A look-up by so many queries, or fewer, is a needle: what pooled queries lose first.
_FEW = 2.0
# Rows with less of their attention in far blocks have nothing there to keep.
_LEAST_FAR = 0.01

# Shares that are sums over sums, of each head.
_RATIOS = (
    "block", "far", "far_mass", "peaks", "high_peaks", "best_mass", "best", "look_up_mass", "look_up", "needles",
    "needle_look_up",
)  # fmt: skip
_BUSY = _RATIOS.index("best")
# Numbers in which every head that has any counts the same, and what of.
_BY_HEAD = {"best_heads": "best", "look_up_heads": "look_up", "needle_heads": "needles"}
# Rows by their block recall.
_BINS = 1024
# Share of the rows, or heads, that are the worst; and of the heads, those that look up most.
_WORST, _BUSIEST = 0.1, 0.05

RECALLS = {
    "block": "block recall",
    "far": "far recall",
    "far_mass": "far recall by mass",
    "peaks": "peak recall",
    "high_peaks": "high-peak recall",
    "best_mass": "recall of best far blocks by mass",
    "best": "recall of best far blocks",
    "look_up_mass": "look-up recall by mass",
    "look_up": "look-up recall",
    "needles": "needle recall",
    "needle_look_up": "look-up recall of needles",
    "best_heads": "recall of best far blocks by head",
    "look_up_heads": "look-up recall by head",
    "needle_heads": "needle recall by head",
    "worst_rows": "block recall of the worst rows",
    "worst_heads": "block recall of the worst heads",
    "busy_heads": "recall of best far blocks of busy heads",
    "worst_busy_head": "recall of best far blocks of the worst busy head",
    "block_needles": "block recall times needle recall by head",
}
"""The numbers by name, and what people are told that they are; :meth:`Recall.numbers` says what each is."""

SHOWN = "block_needles"
"""The one that is shown beside block recall: on plain text it goes with retrieval best on all of three models, where
either factor fails on one (docs/experiments.md)."""

SHOWN_SAYS = (
    "block recall, multiplied by needle recall: of the rows in which one or two queries look at a single place far "
    "back (with more than 0.3 of their attention, outside of the first block, their own and the one before) the share "
    "in which that block is selected, mean over heads"
)
"""What it says, for people."""


@dataclass
class Recall:
    """Sums over prompts of what lists keep of the true map, by layer. They stay on the layers' devices.

    Attributes:
        heads: layer index -> float64 ``[H, ratios, 2]``: what is kept, and of how much, for each query head (KV head,
            of decoding).
        rows: layer index -> int64 ``[1024]``: how many rows of all heads have a block recall in each bin of 0 to 1.
    """

    heads: dict[int, Tensor] = field(default_factory=dict)
    rows: dict[int, Tensor] = field(default_factory=dict)

    def add(self, layer: int, heads: Tensor, rows: Tensor) -> None:
        """Add what :func:`count_kept` found."""
        self.heads[layer] = self.heads[layer] + heads if layer in self.heads else heads
        self.rows[layer] = self.rows[layer] + rows if layer in self.rows else rows

    def block_sums(self) -> dict[int, Tensor]:
        """Layer index -> float64 ``[2]``: attention mass inside the blocks, and how many rows of all heads it is of."""
        return {layer: sums[:, 0].sum(0) for layer, sums in sorted(self.heads.items())}

    def block_recall(self) -> dict[int, float]:
        """Block recall of each layer that has read a prompt."""
        return {layer: share for layer, share in self.by_layer().items() if share is not None}

    def by_layer(self, name: str = "block") -> dict[int, float | None]:
        """One of the shares of all heads together, for each layer; None where a layer has nothing of the kind.

        Raises:
            ValueError: a name that is no share of each layer.
        """
        if name not in _RATIOS:
            raise ValueError(f"shares of a layer are {', '.join(_RATIOS)}, got {name!r}")
        sums = {layer: values[:, _RATIOS.index(name)].sum(0) for layer, values in sorted(self.heads.items())}
        return {layer: _share(*values.tolist()) for layer, values in sums.items()}

    def numbers(self) -> dict[str, float | None]:
        """Every number of :data:`RECALLS`, over all layers and heads; None where there is nothing of the kind.

        * ``block``: share of the attention mass inside the chosen blocks.
        * ``far``: the same of far blocks alone, mean over rows with at least 1 % of their attention there;
          ``far_mass``: over all rows, weighted by that attention.
        * ``peaks``, ``high_peaks``: share of the far blocks with a probability above :data:`PEAK`, above
          :data:`LOOK_UP`, that are chosen.
        * ``best``: of rows whose highest far block is above :data:`LOOK_UP`, in how many that block is chosen;
          ``best_mass``: weighted by the attention mass in it.
        * ``look_up``: the same of rows where no other block, sink and local ones included, is higher;
          ``look_up_mass``: weighted by mass.
        * ``needles``, ``needle_look_up``: ``best`` and ``look_up`` where the block gets as much attention as two
          queries of the row have to give, or less.
        * ``best_heads``, ``look_up_heads``, ``needle_heads``: mean over the heads that have any of their own ``best``,
          ``look_up`` and ``needles``.
        * ``worst_rows``, ``worst_heads``: mean block recall of the worst tenth of all rows, of all heads.
        * ``busy_heads``, ``worst_busy_head``: ``best`` of the twentieth of the heads (at least four) that have most
          such rows, their mean and the least of them.
        * ``block_needles``: ``block`` times ``needle_heads``.
        """
        if not self.heads:
            return dict.fromkeys(RECALLS)
        heads = torch.cat([self.heads[layer].cpu() for layer in sorted(self.heads)])
        found: dict[str, float | None] = {
            name: _share(*heads[:, place].sum(0).tolist()) for place, name in enumerate(_RATIOS)
        }
        rows = torch.stack([counts.cpu() for counts in self.rows.values()]).sum(0)
        found["worst_rows"] = _mean_of_lowest(rows)
        of_heads = heads[:, 0, 0] / heads[:, 0, 1].clamp(min=1e-12)
        found["worst_heads"] = float(of_heads.sort().values[: math.ceil(_WORST * len(heads))].mean())
        for name, ratio in _BY_HEAD.items():
            kept, whole = heads[:, _RATIOS.index(ratio)].unbind(-1)
            shares = (kept / whole)[whole > 0]
            found[name] = float(shares.mean()) if len(shares) else None
        asked = heads[:, _BUSY, 1]
        busy = asked.argsort(descending=True, stable=True)[: max(4, math.ceil(_BUSIEST * len(heads)))]
        busy = busy[asked[busy] > 0]
        shares = heads[busy, _BUSY, 0] / asked[busy]
        found["busy_heads"] = float(shares.mean()) if len(busy) else None
        found["worst_busy_head"] = float(shares.min()) if len(busy) else None
        block, needles = found["block"], found["needle_heads"]
        found["block_needles"] = None if block is None or needles is None else block * needles
        return {name: found[name] for name in RECALLS}

    def joined(
        self, heads: Mapping[int, int], add_up: Callable[[Tensor], Tensor], device: torch.device | str
    ) -> Recall:
        """What several processes have seen together.

        Args:
            heads: how many heads each layer has. All layers, as a process without a prompt has seen none.
            add_up: adds up a float32 tensor over the processes; not every device has sums of float64.
            device: where it may be added up.
        """
        joined = Recall()
        for layer, count in heads.items():
            shape = count, len(_RATIOS), 2
            mine, rows = self.heads.get(layer), self.rows.get(layer)
            parts = [torch.zeros(shape) if mine is None else mine, torch.zeros(_BINS) if rows is None else rows]
            flat = add_up(torch.cat([part.to(device, torch.float32).flatten() for part in parts])).cpu()
            joined.add(layer, flat[:-_BINS].double().view(shape), flat[-_BINS:].long())
        return joined


def count_kept(
    masses: Tensor, peaks: Tensor, selected: Tensor | None, own: Tensor, valid: Tensor, queries: int
) -> tuple[Tensor, Tensor]:
    """Count what lists keep of one layer's map.

    Args:
        masses: float32 ``[B, H, R, N]``, attention mass of each block, rows that hold a query summing to 1.
        peaks: float32 ``[B, H, R, N]``, largest probability in each block.
        selected: bool ``[B, H, R, N]``; None: everything is.
        own: int64 ``[R]``, the block that each row lies in.
        valid: bool ``[B, R]``, rows that hold a query.
        queries: how many queries a row has (those of a partial last block count as if it were whole).

    Returns:
        float64 ``[H, ratios, 2]`` and int64 ``[1024]``, see :class:`Recall`.
    """
    selected = torch.ones_like(masses, dtype=torch.bool) if selected is None else selected
    valid = valid[:, None, :].expand(masses.shape[:3])
    blocks = torch.arange(masses.shape[-1], device=masses.device)
    far = ((blocks >= 1) & (blocks <= own[:, None] - 2)) & valid[..., None]
    kept = masses * selected
    recall = kept.sum(-1).clamp(max=1)
    far_all, far_kept = (masses * far).sum(-1), (kept * far).sum(-1)
    any_far = far_all >= _LEAST_FAR
    sums = [(recall, valid), ((far_kept / far_all.clamp(min=_LEAST_FAR)) * any_far, any_far), (far_kept, far_all)]
    for least in (PEAK, LOOK_UP):
        high = far & (peaks > least)
        sums.append(((high & selected).sum(-1), high.sum(-1)))
    best, place = peaks.masked_fill(~far, -1.0).max(-1, keepdim=True)
    mass, found = masses.gather(-1, place)[..., 0], selected.gather(-1, place)[..., 0]
    far_off = best[..., 0] > LOOK_UP
    looks = far_off & (best >= peaks.amax(-1, keepdim=True))[..., 0]
    few = mass * queries <= _FEW
    for which in (far_off, looks):
        sums += [(mass * (which & found), mass * which), (which & found, which)]
    sums += [(which & few & found, which & few) for which in (far_off, looks)]
    heads = torch.stack([torch.stack([part.double().sum((0, 2)) for part in pair], -1) for pair in sums], 1)
    bins = (recall[valid] * (_BINS - 1)).round().long()
    return heads, torch.bincount(bins, minlength=_BINS)


def _share(kept: float, of: float) -> float | None:
    return kept / of if of else None


def _mean_of_lowest(rows: Tensor) -> float | None:
    """Mean of the lowest tenth of what a histogram over 0 to 1 holds."""
    if not (wanted := math.ceil(_WORST * int(rows.sum()))):
        return None
    values = torch.linspace(0, 1, len(rows), dtype=torch.float64)
    below = rows.cumsum(0) - rows
    taken = (wanted - below).clamp(min=0).minimum(rows).double()
    return float((taken * values).sum() / wanted)
