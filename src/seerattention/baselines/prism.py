"""Prism: mean pooling of fast and of slow channels apart, so that the fast ones are not lost in the mean."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..policies import Policy
from .base import TrainingFree
from .prompt import Prompt, dot, means, reach_share


@dataclass(frozen=True)
class Prism(TrainingFree, kind="prism", limits={"p": (0, 1)}):
    """Products of mean queries and mean keys in two bands of channels; each band keeps a share of its own softmax.

    Prism (arXiv 2602.08426; described from its publication and what its code does). RoPE turns the first channels of
    each half of a head fastest, and means of a block lose them. So the fast half of the channels and the slow three
    quarters of them (of heads of 128: the first 32 and the last 48 of each half, which overlap) have logits of their
    own, ``q . k / sqrt(width of the band) / T`` of mean queries and mean keys, with

        T = sqrt(width / head_dim) * rms(q in the band) / rms(q) * rms(k in the band) / rms(k)

    which makes up for what means have lost in the band. Of each row a band keeps its largest shares of the softmax over
    visible blocks, up to the one that reaches ``p``; both are read, with block 0 and the diagonal.

    Left open and decided here: rms is taken over all blocks and channels of a head, of a KV head for k, that is, of the
    prompt or of a chunk and its history. A band of a head of another size has the same part of the channels. Where a
    model scales otherwise than by ``1 / sqrt(head_dim)``, so do both bands. Channels are taken to lie in halves, as in
    Llama; models whose RoPE turns neighbouring channels, or only a part of them, have other bands than are meant.

    Attributes:
        p: share of the softmax that each band keeps, from 0 (block 0 and the diagonal) to 1 (everything).
        policy: chooses instead, with the logarithm of the larger of both bands' shares as logits, which is not from the
            publication; ``p`` then makes no difference.

    Raises:
        ValueError: a p out of range.
        TypeError: a policy that is none.
    """

    p: float = 0.95
    policy: Policy | None = None

    rowwise = False  # rms is of all blocks

    def score(self, prompt: Prompt) -> Tensor:
        """Logarithm of the larger share of the softmax, float32 ``[Hq, R, N]``; -inf behind the diagonal."""
        return self.log_shares(prompt).amax(0)

    def log_shares(self, prompt: Prompt) -> Tensor:
        """Logarithm of the softmax of each band, float32 ``[2, Hq, R, N]``: the fast one, the slow one."""
        queries = means(prompt.q, self.block_size, prompt.start)
        keys = means(prompt.k, self.block_size)
        dim = keys.shape[-1]
        future = prompt.columns() > prompt.rows()
        found = torch.empty(2, prompt.heads, prompt.num_rows, prompt.num_keys, device=keys.device)
        for band, channels in enumerate(bands(dim, keys.device)):
            # 1 / sqrt(width) / sqrt(width / dim) is dim / width of the usual scale.
            scale = prompt.scale * dim / len(channels)
            logits = dot(_lifted(queries, channels) * scale, _lifted(keys, channels))
            found[band] = logits.masked_fill_(future, -math.inf).log_softmax(-1)
        return found

    def keep(self, prompt: Prompt) -> Tensor:
        """bool ``[Hq, R, N]``."""
        shares = self.log_shares(prompt).exp_()
        keep = torch.ones_like(shares[0], dtype=torch.bool)
        if self.p == 1:
            return keep
        for head in range(prompt.heads):
            fast, slow = (reach_share(band, band, self.p) for band in shares[:, head])
            keep[head] = fast | slow | (prompt.columns() == 0)
        return keep


def bands(dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Channels of heads of ``dim`` that are in the fast and in the slow band, int64."""
    half = dim // 2
    channels = torch.arange(half, device=device)
    fast, slow = channels[: (half + 1) // 2], channels[half // 4 :]
    return torch.cat([fast, fast + half]), torch.cat([slow, slow + half])


def _lifted(x: Tensor, channels: Tensor) -> Tensor:
    """The channels of means ``[H, n, D]``, made as large on average as all channels of the head."""
    band = x[..., channels]
    rms, of_band = (y.square().mean((1, 2), keepdim=True).sqrt() for y in (x, band))
    return band * (rms / of_band.clamp(min=1e-12))
