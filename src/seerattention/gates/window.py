"""The scores of the last few tokens of a sequence taken together: what one of them asks for, all read.

In a prompt the 64 queries of a block choose for each other, as a row of the mask is theirs together. A decoded token
that chooses by its own scores alone, as in SeerAttention-R (arXiv 2506.08889), misses blocks that its neighbours find:
an answer that is copied from far back goes on in the block in which it was found, token after token.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Windows of so many tokens and blocks are scored at once: 64 MiB of float32.
_AT_ONCE = 1 << 24


def largest_share(scores: Tensor, counts: Tensor | None = None) -> Tensor:
    """The largest log-probability that any query of a window gives each block.

    Args:
        scores: float32 ``[..., w, N]`` of the queries of a window.
        counts: bool, of a shape that fits it: which scores count, for a query all, some or none; None: all do.

    Returns:
        ``[..., N]``; -inf where nothing counts.
    """
    if counts is None:
        return scores.log_softmax(-1).amax(-2)
    hidden = ~counts
    shares = scores.masked_fill(hidden, float("-inf")).log_softmax(-1)
    return shares.masked_fill(hidden, float("-inf")).amax(-2)  # no number where nothing counts for a query


def choose_together(scores: Tensor, window: int, *, complete: Tensor, known: Tensor | None = None) -> Tensor:
    """Scores of each token and the ``window - 1`` tokens before it as one: for token t and block j

        max over i in (t - window, t] of  s_ij - logsumexp over j' of s_ij',   j' the blocks that are complete at t.

    Args:
        scores: float32 ``[B, H, E + T, N]``: of T tokens, the last ones, and of E that came before them.
        window: tokens that choose together, the last one included.
        complete: int64 ``[B or 1, 1, T, 1]``, how many blocks are complete at each of the T tokens.
        known: int64 ``[B]``, how many of the E are tokens of the row, the last ones of them; None: all.

    Returns:
        float32 ``[B, H, T, N]``; -inf in blocks that are not complete.
    """
    tokens = complete.shape[2]
    earlier, missing = scores.shape[2] - tokens, window - 1 - (scores.shape[2] - tokens)
    if missing > 0:  # windows that are shorter, of the first tokens; what is put in front does not count
        scores = torch.nn.functional.pad(scores, (0, 0, missing, 0))
    elif missing < 0:
        scores, earlier = scores[:, :, -missing:], window - 1
    device = scores.device
    windows = scores.unfold(2, window, 1).transpose(-1, -2)  # [B, H, T, window, N], the token itself last
    blocks = torch.arange(scores.shape[-1], device=device)
    counts = (blocks < complete)[:, :, :, None]
    if missing > 0 or known is not None:
        known = torch.full((1,), earlier, device=device) if known is None else known.clamp(max=earlier)
        # Before the first of the T tokens, the window of the t-th reaches window - 1 - t tokens back.
        back = (window - 1 - torch.arange(window, device=device)) - torch.arange(tokens, device=device)[:, None]
        counts = counts & (back <= known[:, None, None])[:, None, ..., None]
    step = max(1, _AT_ONCE // max(1, windows[:, :, :1].numel()))
    pairs = zip(windows.split(step, 2), counts.split(step, 2), strict=True)
    parts = [largest_share(some, mine) for some, mine in pairs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)
