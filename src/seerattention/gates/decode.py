"""The decode gate of SeerAttention-R (arXiv 2506.08889, section 2): each query token scores the complete key blocks.

It differs from the prefill gate in three ways: queries are not pooled over tokens, the query heads of a group are
merged by a linear layer, and so each KV head has one row of scores for all of its query heads.

Two fields of its configuration lead away from the published form. With ``k_pitch`` keys are pooled in sub-blocks, and
with ``merge_heads=False`` each query head of a group keeps a vector of its own. There is one score a block all the
same, the largest of its products: what one token holds, or one head asks for, is lost in a mean, not in a maximum.

What the paper leaves open, and what is done here: a block counts as complete for a query token once all of its tokens
are at or before that token, whatever else the keys hold. So candidates that are decoded together score what each would
score alone. The open block has no score; whoever selects keeps it (:func:`~seerattention.gates.select_by_token`).

A third field, ``query_window``, is of what is made of the scores: the last tokens choose for each other
(:meth:`DecodeGate.score_window`).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from ..config import DecodeGateConfig
from ..ops.block_pooling import block_pooling
from ..ops.gate_scores import encode_blocks, gate_scores
from ..ops.span import LENGTH, START, Span
from ..ops.token_scores import MOST_TOKENS, encode_tokens, token_scores
from .gate import BlockGate, check_rotary_width, draw_projection
from .query_state import QueryState, Recent
from .state import HISTORY, KeyState, Lengths, on_device
from .window import choose_together

NORM_EPS = 1e-6
"""Of the RMS norms, as in the published code."""


class DecodeGate(BlockGate):
    """One row of block logits for each query token and KV head.

    Parameters (input dimension first, no bias; G = query heads a KV head, C = number of poolings * head_dim, W = gate
    width): ``q_linear [Hkv, G, head_dim, W]``, whose products are summed over G where heads are merged; ``k_linear
    [Hkv, C, W]``; and with ``qk_norm`` ``q_norm [W]`` and ``k_norm [W]``, else None.

    Below, Hv is the number of query vectors of a token: Hkv, or Hq where heads are not merged.

    Fresh gates begin near the similarity of the group's mean query (or of each head's own) and the sub-blocks' mean
    key, as those of prefill do.
    """

    q_linear: nn.Parameter
    k_linear: nn.Parameter
    q_norm: nn.Parameter | None
    k_norm: nn.Parameter | None

    def __init__(self, config: DecodeGateConfig, *, block_size: int, num_heads: int, num_kv_heads: int, head_dim: int):
        super().__init__(
            config, block_size=block_size, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim
        )
        dataclasses.replace(config, block_size=block_size)  # raises where the pitch does not fit
        self.config = config = self.resolve(config)
        self.q_pitch, self.k_pitch = 1, config.k_pitch or block_size
        self.group = num_heads // num_kv_heads
        self.q_vectors = num_kv_heads if config.merge_heads else num_heads
        self.single = self.k_pitch == block_size and config.merge_heads
        self.query_window = config.query_window
        self.q_linear = nn.Parameter(torch.empty(num_kv_heads, self.group, head_dim, self.width))
        self.k_linear = nn.Parameter(torch.empty(num_kv_heads, len(config.k_pooling) * head_dim, self.width))
        for name in ("q_norm", "k_norm"):
            self.register_parameter(name, nn.Parameter(torch.empty(self.width)) if config.qk_norm else None)
        self.reset_parameters()

    def set_query_window(self, tokens: int) -> None:
        """Let so many tokens choose together; nothing of the gate depends on it.

        Raises:
            ValueError, TypeError: as :class:`~seerattention.DecodeGateConfig`.
        """
        self.config = dataclasses.replace(self.config, query_window=tokens)
        self.query_window = tokens

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh parameters from torch's global generator."""
        kinds = self.config.k_pooling
        draw_projection(self.k_linear, [kind == "avg" or "avg" not in kinds for kind in kinds])
        parts = self.group if self.config.merge_heads else 1
        draw_projection(self.q_linear.view(self.q_vectors, parts * self.head_dim, self.width), [True] * parts)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.fill_(1.0)

    def extra_repr(self) -> str:
        return (
            f"heads={self.num_heads}/{self.num_kv_heads}, head_dim={self.head_dim}, width={self.width}, "
            f"k_pooling={self.config.k_pooling}, qk_norm={self.config.qk_norm}, block_size={self.block_size}, "
            f"k_pitch={self.k_pitch}, merge_heads={self.config.merge_heads}, query_window={self.query_window}"
        )

    def encode_keys(
        self, k: Tensor, cos: Tensor, sin: Tensor, *, lengths: Lengths = None, state: KeyState | None = None
    ) -> Tensor:
        """Encoded complete sub-blocks; the open one is left out.

        Args:
            k, cos, sin, lengths, state: see :meth:`BlockGate.encode_keys`. A state encodes each sub-block once, when
                its last token comes. Without one ``lengths`` is not looked at, as nothing is pooled over parts.

        Returns:
            ``[B, Hkv, N, W]`` from position 0 on, N the complete sub-blocks of the longest row, perhaps 0. What lies
            behind a row's own last complete one is undefined.
        """
        self.check_tokens("k", k, self.num_kv_heads, cos if self.config.rope else None)
        tables = (cos, sin) if self.config.rope else (None, None)
        if state is not None:
            with torch.no_grad():
                state.append(k, *tables, encode=self._encode_key_blocks, lengths=lengths, only_complete=True)
                return state.complete if max(state.lengths) >= self.k_pitch else self._no_blocks(k)
        num = k.shape[2] // self.k_pitch
        if num == 0:
            return self._no_blocks(k)
        end = num * self.k_pitch
        starts = [None if table is None else table[:, : end : self.k_pitch] for table in tables]
        return self._encode_key_blocks(k[:, :, :end], *starts)

    def _encode_key_blocks(
        self, k: Tensor, cos: Tensor | None, sin: Tensor | None, lengths: Tensor | None = None
    ) -> Tensor:
        """Whole sub-blocks of ``k``, with tables at their first tokens; ``lengths`` are multiples of the pitch."""
        pooled = block_pooling(k.detach(), self.config.k_pooling, block_size=self.k_pitch)
        return self._encode(pooled, self.k_linear, self.k_norm, cos, sin)

    def _no_blocks(self, k: Tensor) -> Tensor:
        return k.new_zeros(k.shape[0], self.num_kv_heads, 0, self.width, dtype=torch.float32)

    def encode_queries(
        self, q: Tensor, cos: Tensor, sin: Tensor, *,
        rows: Tensor | None = None, lengths: Tensor | None = None, span: Span | None = None,
    ) -> Tensor:  # fmt: skip
        """Encoded queries, one vector for each token and KV head, or query head where they are not merged.

        Args:
            q, cos, sin: see :meth:`BlockGate.encode_queries`; each token is rotated at its own position.
            rows: int64 ``[R]``, absolute query *tokens* to score, in any order (None: all). Not with a span whose rows
                differ.
            lengths: not looked at: tokens do not depend on each other.
            span: the positions of the queries, where they are not whole prompts.

        Returns:
            ``[B, Hv, R, W]``; what lies behind a row's last query is undefined.

        Raises:
            ValueError: shapes that do not fit the gate or the span, or rows with a span whose rows differ.
        """
        self.check_tokens("q", q, self.num_heads, cos if self.config.rope else None)
        if span is not None:
            span.check("encode_queries", q=q)
            q, cos, sin = (self._of_span(x, span) for x in (q, cos, sin))
        if rows is not None:
            if span is not None and not span.plain:
                raise ValueError(
                    "rows cannot be chosen where those of the span begin at different tokens; pass rows=None"
                )
            tokens = rows if span is None else rows - (span.keys - span.queries)
            q = q.index_select(2, tokens)
            if self.config.rope:
                cos, sin = cos.index_select(1, tokens), sin.index_select(1, tokens)
        q = q.detach()
        if q.shape[2] <= MOST_TOKENS:
            linear = self.q_linear.flatten(1, 2) if self.config.merge_heads else self.q_linear.flatten(0, 1)
            tables = (cos, sin) if self.config.rope else (None, None)
            return encode_tokens(q, linear, self.q_norm, *tables, eps=NORM_EPS)
        if not self.config.merge_heads:
            return self._encode(q, self.q_linear.flatten(0, 1), self.q_norm, cos, sin)
        merged = q.unflatten(1, (self.num_kv_heads, self.group)).transpose(2, 3).flatten(3)
        return self._encode(merged, self.q_linear.flatten(1, 2), self.q_norm, cos, sin)

    def _of_span(self, x: Tensor, span: Span) -> Tensor:
        """Queries ``[B, H, T, D]``, or a table ``[B or 1, T, rotary_dim]``, with each row's first query first."""
        if span.plain or (x.dim() == 3 and not self.config.rope):
            return x
        if x.dim() == 4:
            return span.gather_queries(x)
        rows = 1 if span.packed else span.batch
        return span.gather_queries(x.expand(rows, -1, -1)[:, None])[:, 0]

    def score(
        self, queries: Tensor, keys: Tensor, *,
        rows: Tensor | None = None, span: Span | None = None, masked: bool = True,
    ) -> Tensor:  # fmt: skip
        """Block logits of each query token, scaled by ``width**-0.5``.

        Args:
            queries: ``[B, Hv, R, W]`` of :meth:`encode_queries`.
            keys: ``[B, Hkv, N, W]`` of :meth:`encode_keys`, or those of an open block too, which are not looked at.
            rows: int64 ``[R]``, the query tokens, as given to :meth:`encode_queries`.
            span: the positions of the queries. Needed: how many tokens the open block holds is not in the keys.
            masked: what is not complete is always -inf, as policies must not take it for a score.

        Returns:
            float32 ``[B, Hkv, R, span.num_key_blocks(block_size)]``, not yet normalised; -inf in blocks that are not
            complete at the query's position, and in rows that hold no query.

        Raises:
            ValueError: no span, or encoded queries and keys that do not fit it.
        """
        if span is None:
            raise ValueError("the scores of a decode gate need a span, which says where the queries are; see ops.Span")
        columns, parts = span.num_key_blocks(self.block_size), self.block_size // self.k_pitch
        num_rows, most = span.queries if rows is None else len(rows), columns * parts
        if (
            queries.shape[:3] != (span.batch, self.q_vectors, num_rows)
            or keys.shape[2] > most
            or keys.shape[0] != span.batch
        ):
            raise ValueError(
                f"queries must be [{span.batch}, {self.q_vectors}, {num_rows}, W] and keys [{span.batch}, "
                f"{self.num_kv_heads}, up to {most}, W], got {tuple(queries.shape)} and {tuple(keys.shape)}"
            )
        num = keys.shape[2] // parts
        if span.plain and rows is None and span.queries == 1 and num == span.keys // self.block_size:
            # The common step: one token, and keys that are complete blocks, all of which it sees.
            return token_scores(queries, keys, columns=columns, parts=parts, scale=self.scale)
        scores = self._products(queries, keys[:, :, : num * parts], num)
        scores = nn.functional.pad(scores, (0, columns - num))
        open_or_later = torch.arange(columns, device=scores.device) >= self._complete(span, rows, scores.device)
        return scores.masked_fill(open_or_later, float("-inf"))

    def score_window(self, recent: Recent, keys: Tensor, *, span: Span) -> Tensor:
        """Block logits of each query token, together with those of the tokens before it that chose with it.

        A token t gets of each block the largest of the scores that the tokens i of its window, t - ``query_window`` < i
        <= t, give it: ``s_ij - logsumexp_j s_ij``, over the blocks j that are complete at t, the same for all i. So
        each token of a window has the same say, whatever its scores are large by.

        Args:
            recent: the queries of the span and those of the tokens before them, as :class:`QueryState` gives them.
                Where it holds fewer than ``query_window - 1`` of these, windows are as much shorter.
            keys: ``[B, Hkv, N, W]``, as in :meth:`score`.
            span: the positions of the tokens, without those before them.

        Returns:
            float32 ``[B, Hkv, T, span.num_key_blocks(block_size)]``, as :meth:`score` gives it; log-probabilities, not
            normalised again. Of a gate without a window, what :meth:`score` gives.

        Raises:
            ValueError: encoded queries and keys that do not fit the span.
        """
        tokens, (queries, held) = span.queries, recent
        earlier = queries.shape[2] - tokens
        if self.query_window == 1:
            return self.score(queries[:, :, earlier:], keys, span=span)
        columns, parts = span.num_key_blocks(self.block_size), self.block_size // self.k_pitch
        num, batch = keys.shape[2] // parts, span.batch
        if queries.shape[:2] != (batch, self.q_vectors) or earlier < 0 or len(keys) != batch or num > columns:
            raise ValueError(
                f"queries must be [{batch}, {self.q_vectors}, {tokens} and those before them, W] and keys [{batch}, "
                f"{self.num_kv_heads}, up to {columns * parts}, W], got {tuple(queries.shape)} and {tuple(keys.shape)}"
            )
        if earlier >= self.query_window:
            queries, earlier = queries[:, :, 1 - self.query_window - tokens :], self.query_window - 1
        if span.plain and held is None and tokens == 1 and num == span.keys // self.block_size:
            # the common step, as in score
            return token_scores(queries, keys, columns=columns, parts=parts, scale=self.scale, together=True)
        scores = self._products(queries, keys[:, :, : num * parts], num)
        complete, known = self._complete(span, None, scores.device), None
        if held is not None or not span.plain:
            # In front of a padded row's first token there are slots, but no tokens.
            known = span.column(START, scores.device).clamp(max=earlier)
            known = known if held is None else known.minimum(on_device(scores.device, held))
        scores = choose_together(scores, self.query_window, complete=complete, known=known)
        return nn.functional.pad(scores, (0, columns - num), value=float("-inf")) if num < columns else scores

    def _products(self, queries: Tensor, keys: Tensor, num: int) -> Tensor:
        """Scores of ``num`` whole blocks, ``[B, Hkv, R, num]``, as if all were complete."""
        if self.single:
            return (queries.float() @ keys.float().transpose(-1, -2)) * self.scale
        return self._largest(queries, keys, num)

    def new_query_state(self, history: int = HISTORY) -> QueryState:
        """An empty state of the last tokens' encoded queries, for :meth:`score_window`; ``history`` is the number of
        tokens that ``crop`` can take back without making a window shorter."""
        return QueryState(self.query_window, history)

    def _largest(self, queries: Tensor, keys: Tensor, num: int) -> Tensor:
        """The largest product of each of ``num`` whole blocks, ``[B, Hkv, R, num]``, as if all were complete."""
        batch, heads, num_rows, _ = queries.shape
        if num == 0:
            return queries.new_empty(batch, self.num_kv_heads, num_rows, 0, dtype=torch.float32)
        # To the op each query is a row of tiles, and as the last of them it sees all blocks.
        rows = torch.full((num_rows,), num - 1, device=queries.device) if num_rows > 1 else num - 1
        scores = gate_scores(
            queries, keys, block_size=self.block_size, q_pitch=self.block_size, k_pitch=self.k_pitch, scale=self.scale,
            rows=rows,
        )  # fmt: skip
        return scores if heads == self.num_kv_heads else scores.unflatten(1, (self.num_kv_heads, -1)).amax(2)

    def _complete(self, span: Span, rows: Tensor | None, device: torch.device) -> Tensor:
        """How many blocks are complete for each query, int64 ``[B or 1, 1, R, 1]``; 0 where there is none."""
        if span.plain and rows is None:
            positions = torch.arange(span.keys - span.queries, span.keys, device=device)[None]
            return ((positions + 1) // self.block_size)[:, None, :, None]
        start, length = (span.column(column, device)[:, None] for column in (START, LENGTH))
        positions = start + torch.arange(span.queries, device=device) if rows is None else rows[None]
        holds = (positions >= start) & (positions < start + length)
        return torch.where(holds, (positions + 1) // self.block_size, 0)[:, None, :, None]

    def check_rotary(self, rotary_dim: int) -> None:
        """Raise ValueError where the gate cannot take a rotary embedding of this many channels."""
        if self.config.rope:
            check_rotary_width(self.width, rotary_dim)

    def _encode(self, x: Tensor, linear: Tensor, norm: Tensor | None, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        """``x [B, H, N, C]`` and tables of N entries -> ``[B, H, N, W]``.

        The linear layer runs in the dtype of the parameters, norm and rotation in float32. The vectors are of the dtype
        of the parameters again, as attention rounds its own queries and keys: kept keys take half of the memory.
        """
        if not self.config.rope:
            cos = sin = None
        x = x.to(linear.dtype)
        if norm is None:
            return encode_blocks(x, linear, cos, sin).to(linear.dtype)
        projected = nn.functional.rms_norm(encode_blocks(x, linear).float(), (self.width,), norm.float(), NORM_EPS)
        return encode_blocks(projected, None, cos, sin).to(linear.dtype)
