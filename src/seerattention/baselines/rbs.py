"""RBS: energies of mean keys, and a second look at blocks whose keys lie far from their mean."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .flashprefill import FlashPrefill, log_energies
from .prompt import Prompt, means


@dataclass(frozen=True)
class RBS(FlashPrefill, kind="rbs", limits=FlashPrefill.limits):
    """The rule of FlashPrefill twice: by mean keys, and by how much more the keys of a wide block can give at most.

    RBS-Attention (arXiv 2609.20971), of which no code was found. The base branch gives a query q and a block the logit
    ``scale * q . mean(k)``. The rescue branch adds ``scale * |q| * radius * f``; the radius of a block is the largest
    distance of one of its keys from their mean, so with f = 1 this is a bound of ``scale * q . k`` for all its keys. f
    rises in a straight line from 0 at the median of the radii of the sequence, in its layer and KV head, to 1 at their
    90th percentile (interpolated between neighbours). Each branch keeps what has at least ``alpha`` times its own
    largest energy; both together are read.

    Left open by what was at hand of the publication, and done as in :class:`FlashPrefill`: the energy of a block, lists
    for each query head, one ``alpha`` for both branches and its default, and the numbers of first and latest blocks.
    How many last rows the publication leaves dense is not known either, so there is no form "as published".

    Attributes:
        alpha: least share of the largest energy of the row in a branch, from 0 (everything) to 1.
        sink_blocks: first blocks that are always kept.
        window_blocks: latest blocks that are always kept, the diagonal among them.
        last_blocks_dense: the last this many query blocks read everything.
        policy: chooses instead, with the scores as logits; the four above then make no difference.

    Raises:
        ValueError: values that are not such numbers.
        TypeError: a policy that is none.
    """

    rowwise = False  # median and percentile are of all keys

    def score(self, prompt: Prompt) -> Tensor:
        """The larger of both branches' ``log(energy / largest energy of the row)``, float32 ``[Hq, R, N]``.

        At least ``log(alpha)`` is what one of the branches keeps; -inf is where no query sees all of a block.
        """
        keys = means(prompt.k, self.block_size)
        radius = radii(prompt.k, keys, self.block_size)
        middle, wide = radius.quantile(torch.tensor([0.5, 0.9], device=radius.device), dim=-1)[..., None]
        ramp = ((radius - middle) / (wide - middle).clamp(min=torch.finfo(radius.dtype).tiny)).clamp(0, 1)
        base, rescue = log_energies(prompt, keys), log_energies(prompt, keys, radius * ramp)
        return torch.maximum(base - base.amax(-1, keepdim=True), rescue - rescue.amax(-1, keepdim=True))


def radii(k: Tensor, centers: Tensor, size: int) -> Tensor:
    """Largest distance of a token of each block from the block's center.

    Args:
        k: ``[H, L, D]``, tokens from position 0 on.
        centers: float32 ``[H, N, D]``.
        size: tokens a block.

    Returns:
        float32 ``[H, N]``.
    """
    found = torch.empty(centers.shape[:2], device=k.device)
    for head in range(k.shape[0]):  # one at a time: all keys in float32 would be a copy of the cache
        own = centers[head].repeat_interleave(size, 0)[: k.shape[1]]
        distance = torch.nn.functional.pad((k[head].float() - own).norm(dim=-1), (0, -k.shape[1] % size))
        found[head] = distance.view(-1, size).amax(-1)
    return found
