"""Gate scores in plain torch: the definition, differentiable, and the path of training and of the CPU.

Linear layers run in the dtype that they are given, rotation and product in float32. Products of sub-blocks are made and
reduced some rows at a time, so that memory is bounded. With gradients they are made again in the backward pass: kept,
those of a layer would be ``R * N * Hq * (block_size / q_pitch) * (block_size / k_pitch)`` float32 numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..indices import num_blocks
from ..span import LENGTH, START

# Products that are made at a time: of all heads, of one query sub-block a tile in as many rows as fit, and of several
# sub-blocks where the rows are few, so that short prompts do not wait for launches. On the CPU as many as caches hold,
# on GPUs enough to keep them busy.
MAX_PRODUCTS = 5 << 17
MAX_PRODUCTS_GPU = 1 << 24
# A share of a query's attention below which all are alike; its logarithm is the lowest score of "mass".
LEAST_MASS = 2.0**-100
# A product that no softmax sees, and that is a number all the same, so that gradients are.
_HIDDEN = -1.0e30


class Tiles(NamedTuple):  # made in every call, so it must be cheap to make
    """What is asked of :func:`gate_scores`, checked.

    Attributes:
        block_size: tokens a tile on both sides.
        q_pitch, k_pitch: tokens a sub-block; they divide block_size.
        scale: factor of the products.
        reduce: ``"max"``, ``"logsumexp"`` or ``"mass"`` of the products of a tile.
        masked: whether what lies above the block diagonal is written.
        rows: int64 ``[B or 1, R]``, the query block of each row; None: consecutive ones.
        first_row: query block of the first of consecutive rows, where all batch rows are alike.
        start, end: positions of the first query and behind the last one, where all batch rows are alike.
        table: that of a span, int32 ``[B, 4]``, where they differ.
    """

    block_size: int
    q_pitch: int
    k_pitch: int
    scale: float
    reduce: str
    masked: bool
    rows: Tensor | None = None
    first_row: int = 0
    start: int = 0
    end: int = 1 << 30  # behind every token, where nothing says how many there are
    table: Tensor | None = None

    @property
    def single(self) -> bool:
        """Whether a tile has one product, which is its score, and all of them count: blocks are not cut."""
        whole = self.q_pitch == self.k_pitch == self.block_size
        return whole and self.table is None and self.reduce != "mass"

    def shape(self, q: Tensor, k: Tensor) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return (
            num_blocks(q.shape[2], self.block_size // self.q_pitch),
            num_blocks(k.shape[2], self.block_size // self.k_pitch),
        )

    def whole_rows(self, q: Tensor, k: Tensor) -> int:
        """How many of consecutive rows, from the first on, lack nothing: all their query sub-blocks hold tokens, and
        the keys up to their diagonal are there.

        Where both pitches are equal, a query sub-block of such a row sees the key sub-blocks that begin where it does
        or before, whatever ``end`` says: sub-blocks on both sides begin at multiples of the pitch, so those that begin
        before the end of the last token do, even if the last query sub-block is not full of tokens.
        """
        per_q, per_k = self.block_size // self.q_pitch, self.block_size // self.k_pitch
        behind = min(num_blocks(self.end, self.q_pitch) // per_q, k.shape[2] // per_k)
        return max(0, min(q.shape[2] // per_q, behind - self.first_row))

    def row_blocks(self, num_rows: int, device: torch.device) -> Tensor:
        """Query block of each row, int64 ``[B or 1, R]``."""
        if self.rows is not None:
            return self.rows
        if self.table is None:
            return torch.arange(self.first_row, self.first_row + num_rows, device=device)[None]
        return torch.arange(num_rows, device=device) + self.table[:, START, None].long() // self.block_size

    def limits(self) -> tuple[Tensor | int, Tensor | int]:
        """``start`` and ``end``, for each batch row ``[B, 1]`` where they differ."""
        if self.table is None:
            return self.start, self.end
        start, length = self.table[:, START, None].long(), self.table[:, LENGTH, None]
        return start, torch.where(length > 0, start + length, 0)  # without a query no block holds one


def encode_blocks(
    pooled: Tensor, linear: Tensor | None, cos: Tensor | None, sin: Tensor | None, pitch: int, offset: int = 0
) -> Tensor:
    """Vectors ``[B, H, N, W]`` in float32."""
    if linear is not None:
        heads = pooled.shape[1]
        if linear.shape[0] == heads:
            pooled = pooled @ linear
        else:  # one key projection per query head reads the keys of its KV head, which need not be repeated for it
            pooled = (pooled[:, :, None] @ linear.unflatten(0, (heads, -1))).flatten(1, 2)
    encoded = pooled.float()
    if cos is None or sin is None:
        return encoded
    if offset:
        starts = torch.arange(encoded.shape[2], device=cos.device) * pitch - offset
        starts, pitch = starts.clamp(0, cos.shape[1] - 1), 1
        cos, sin = cos.index_select(1, starts), sin.index_select(1, starts)
    cos, sin = (_block_rotary(table, pitch, encoded.shape[-1])[:, None] for table in (cos, sin))
    return _rotate(encoded, cos, sin)


def gate_scores(q: Tensor, k: Tensor, tiles: Tiles) -> Tensor:
    """Logits ``[B, Hq, R, N]``, -inf above the block diagonal."""
    num_rows, columns = tiles.shape(q, k)
    rows = tiles.row_blocks(num_rows, q.device)
    q, k = q.float().unflatten(1, (k.shape[1], -1)), k.float()[:, :, None]  # [B, Hk, G, Nq, W], [B, Hk, 1, Nk, W]
    if tiles.single:
        scores = (q @ k.transpose(-1, -2)).flatten(1, 2) * tiles.scale
    else:
        scores = _reduce_tiles(q * tiles.scale, k, tiles, rows, columns)
    future = torch.arange(columns, device=q.device) > rows[..., None]  # [B or 1, R, N]
    return scores.masked_fill(future[:, None], float("-inf"))


def _reduce_tiles(q: Tensor, k: Tensor, tiles: Tiles, rows: Tensor, columns: int) -> Tensor:
    """Some rows at a time; columns behind all of them are left out, which gives 0."""
    per_q, per_k = tiles.block_size // tiles.q_pitch, tiles.block_size // tiles.k_pitch
    batch, k_heads, group, num_q, num_k = *q.shape[:4], k.shape[3]
    limit = _limits(tiles, rows, num_q, num_k)
    # Sub-blocks of one place in their tiles side by side: reductions are over whole vectors.
    q = _pad(q, rows.shape[1] * per_q).unflatten(3, (-1, per_q)).transpose(3, 4)  # [B, Hk, G, per_q, R, W]
    k = _pad(k, columns * per_k).unflatten(3, (columns, per_k)).permute(0, 1, 2, 5, 4, 3)  # [B, Hk, 1, W, per_k, N]
    k = k.contiguous()
    most = MAX_PRODUCTS if q.device.type == "cpu" else MAX_PRODUCTS_GPU
    step = max(1, most // max(1, batch * k_heads * group * per_k * columns))
    parts = []
    for begin in range(0, max(1, rows.shape[1]), step):
        some = slice(begin, min(begin + step, rows.shape[1]))
        places = max(1, step // max(1, some.stop - begin))
        consecutive = tiles.rows is None and tiles.table is None
        seen = min(columns, tiles.first_row + some.stop) if consecutive else columns
        given = (q[..., some, :], k[..., :seen], tiles, rows[:, some], limit[:, some], places)
        reduce_rows: Callable[..., Tensor] = _reduce_rows
        if tiles.reduce == "mass":
            reduce_rows = partial(_mass_rows, past=min(seen, tiles.first_row + begin) if consecutive else 0)
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
            part = checkpoint(reduce_rows, *given, use_reentrant=False, preserve_rng_state=False)
        else:
            part = reduce_rows(*given)
        parts.append(torch.nn.functional.pad(part, (0, columns - seen)))
    return torch.cat(parts, 2)


def _limits(tiles: Tiles, rows: Tensor, num_q: int, num_k: int) -> Tensor:
    """Behind the last token that each query sub-block may see, 0 for one that holds no query: ``[B or 1, R, per_q]``.

    A key sub-block counts if it begins before that: in the diagonal tile those of the future do not.
    """
    per_q = tiles.block_size // tiles.q_pitch
    places = torch.arange(rows.shape[1] * per_q, device=rows.device).view(-1, per_q)
    first = rows[..., None] * tiles.block_size + places % per_q * tiles.q_pitch
    behind = first + tiles.q_pitch
    start, end = (x[..., None] if isinstance(x, Tensor) else x for x in tiles.limits())
    holds = (places < num_q) & (behind > start) & (first < end)
    return torch.where(holds, behind.clamp(max=num_k * tiles.k_pitch).minimum(torch.as_tensor(end)), 0)


def _reduce_rows(q: Tensor, k: Tensor, tiles: Tiles, rows: Tensor, limit: Tensor, places: int) -> Tensor:
    """q ``[B, Hk, G, per_q, R, W]``, k ``[B, Hk, 1, W, per_k, N]``, limit ``[B or 1, R, per_q]`` -> scores; of so many
    places of query sub-blocks in their tiles at a time."""
    per_k, columns = k.shape[-2:]
    # Before the diagonal (the last column, where that comes first) all key sub-blocks of a tile are seen.
    last = rows.clamp(max=columns - 1)[:, None, None, None, :, None]  # [B or 1, 1, 1, 1, R, 1]
    begin = last * tiles.block_size + torch.arange(per_k, device=k.device) * tiles.k_pitch
    parts = []
    for some, seen in _places(limit, places):
        products = _products(q[:, :, :, some], k)
        part = _reduce(products, -2, tiles.reduce)
        at = last.expand(*part.shape[:-1], 1)
        diagonal = products.gather(-1, at[..., None].expand(*at.shape[:-1], per_k, 1))[..., 0]
        diagonal = diagonal.masked_fill(begin >= seen, float("-inf"))
        part = part.scatter(-1, at, _reduce(diagonal, -1, tiles.reduce)[..., None])
        parts.append(part.masked_fill(seen == 0, float("-inf")))
    return _reduce(torch.cat(parts, 3), 3, tiles.reduce).flatten(1, 2)


def _mass_rows(q: Tensor, k: Tensor, tiles: Tiles, _rows: Tensor, limit: Tensor, places: int, past: int) -> Tensor:
    """As :func:`_reduce_rows`; the first ``past`` columns are seen by every query."""
    per_k, columns = k.shape[-2:]
    starts = torch.arange(per_k, device=k.device) * tiles.k_pitch
    begin = torch.arange(past, columns, device=k.device) * tiles.block_size + starts[:, None]  # [per_k, N - past]
    parts = []
    for some, seen in _places(limit, places):
        products = _products(q[:, :, :, some], k)
        # Rows without a query see something, too, so that nothing is divided by zero.
        products[..., past:].masked_fill_(begin >= seen[..., None].clamp(min=1), _HIDDEN)
        shares = products.flatten(-2).softmax(-1).unflatten(-1, (per_k, columns))
        mass = shares.sum(-2).clamp(min=LEAST_MASS)  # [B, Hk, G, P, R, N]
        parts.append(mass.log().masked_fill(seen == 0, float("-inf")))
    return torch.cat(parts, 3).amax(3).flatten(1, 2)


def _places(limit: Tensor, places: int) -> Iterator[tuple[slice, Tensor]]:
    """Some places after others, and what they see: limits ``[B or 1, 1, 1, P, R, 1]``."""
    for first in range(0, limit.shape[2], places):
        some = slice(first, first + places)
        yield some, limit[..., some].transpose(1, 2)[:, None, None, ..., None]


def _products(q: Tensor, k: Tensor) -> Tensor:
    """``[B, Hk, G, P, R, W]`` and ``[B, Hk, 1, W, per_k, N]`` -> ``[B, Hk, G, P, R, per_k, N]``; keys are not repeated
    for the heads that share them."""
    products = q.flatten(2, 4) @ k[:, :, 0].flatten(-2)
    return products.unflatten(-1, k.shape[-2:]).unflatten(2, q.shape[2:5])


def _reduce(x: Tensor, dim: int, kind: str) -> Tensor:
    return x.amax(dim) if kind == "max" else x.logsumexp(dim)


def _pad(x: Tensor, length: int) -> Tensor:
    """Zeros up to ``length`` sub-blocks, in dimension 3."""
    return torch.nn.functional.pad(x, (0, 0, 0, length - x.shape[3])) if x.shape[3] < length else x


def _block_rotary(table: Tensor, pitch: int, width: int) -> Tensor:
    """The rotary table at block starts, float32 ``[B or 1, N, min(rotary_dim, W)]``."""
    starts = table[:, ::pitch].float()
    if starts.shape[-1] > width:
        # A gate narrower than the model's heads rotates by every s-th frequency, which covers the same range.
        return starts[..., :: starts.shape[-1] // width]
    return starts


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split pairing, of the first ``cos.shape[-1]`` channels; the others pass unrotated."""
    rotary = cos.shape[-1]
    turned, straight = x[..., :rotary], x[..., rotary:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, straight), dim=-1) if straight.shape[-1] else turned
