"""The prefill gate of the SeerAttention paper (arXiv 2410.13276, section 3.1): pool, project, rotate, multiply."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor, nn

from ..config import PrefillGateConfig, SubBlockGateConfig
from ..ops.block_pooling import block_pooling
from ..ops.gate_scores import encode_blocks, gate_scores
from ..ops.gate_scores.prompt import Encoding, encode_prompt
from ..ops.inverse_rope import pooled_inverse_rope
from ..ops.span import LENGTH, QUERY_SLOT, START, Span
from .gate import BlockGate, check_rotary_width, draw_projection
from .state import KeyState, Lengths


class PrefillGate(BlockGate):
    """The published gate: queries and keys pooled per block, linear layers, RoPE at block starts, one product.

    Parameters (input dimension first, no bias; C = number of pooling kinds * head_dim, W = gate width):
        ``k_linear [Hq, C_k, W]`` without a query linear (one key projection per query head, the released form), else
        ``[Hkv, C_k, W]``; ``q_linear [Hq, C_q, W]`` or None.

    Fresh gates begin near the similarity of the blocks' mean query and mean key: projections are the identity on the
    ``avg`` part (on the mean of the other poolings where there is no ``avg``) plus normal noise of a tenth of its
    size, drawn from torch's global generator.
    """

    reduce = "max"
    """What makes one score of the products of a tile, where it has several."""

    k_linear: nn.Parameter
    q_linear: nn.Parameter | None
    # Said by each class for itself: its launches follow from its configuration and the geometry of its arguments.
    launches_by_geometry = True

    def __init__(
        self,
        config: PrefillGateConfig | SubBlockGateConfig,
        *,
        block_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
    ):
        super().__init__(
            config, block_size=block_size, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim
        )
        self.config = config = self.resolve(config)
        k_heads = num_kv_heads if config.share_keys else num_heads
        self.k_linear = nn.Parameter(torch.empty(k_heads, len(config.k_pooling) * head_dim, self.width))
        if config.q_linear:
            self.q_linear = nn.Parameter(torch.empty(num_heads, len(config.q_pooling) * head_dim, self.width))
        else:
            self.register_parameter("q_linear", None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh parameters from torch's global generator."""
        for weight, kinds in ((self.k_linear, self.config.k_pooling), (self.q_linear, self.config.q_pooling)):
            if weight is not None:
                draw_projection(weight, [kind == "avg" or "avg" not in kinds for kind in kinds])

    def replayed(self) -> tuple[tuple[Tensor, ...], tuple[Hashable, ...]] | None:
        """See :meth:`BlockGate.replayed`."""
        if "launches_by_geometry" not in type(self).__dict__ or self._forward_hooks or self._forward_pre_hooks:
            return None
        parameters = self._parameters  # nn.Module's own way takes microseconds
        k_linear, q_linear = parameters["k_linear"], parameters["q_linear"]
        assert k_linear is not None
        tensors = (k_linear,) if q_linear is None else (k_linear, q_linear)
        return tensors, (self.config, self.block_size, self.q_pitch, self.k_pitch, self.scale)

    def extra_repr(self) -> str:
        pooling = f"k_pooling={self.config.k_pooling}, q_pooling={self.config.q_pooling}"
        return f"{super().extra_repr()}, width={self.width}, {pooling}"

    def encode_keys(
        self, k: Tensor, cos: Tensor, sin: Tensor, *, lengths: Lengths = None, state: KeyState | None = None
    ) -> Tensor:
        """See :meth:`BlockGate.encode_keys`; heads are those of ``k_linear``."""
        self.check_tokens("k", k, self.num_kv_heads, cos if self.config.rope else None)
        if state is not None:
            with torch.no_grad():
                tables = (cos, sin) if self.config.rope else (None, None)
                state.append(k, *tables, encode=self._encode_key_blocks, lengths=lengths)
                return state.encoded
        if lengths is not None:
            lengths = torch.as_tensor(lengths, device=k.device)
        return self._encode_key_blocks(k, cos, sin, lengths=lengths, pitch=self.k_pitch)

    def encode_cached_keys(self, k: Tensor, recent: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See :meth:`BlockGate.encode_cached_keys`; turned back and pooled in one pass."""
        if "launches_by_geometry" not in type(self).__dict__:  # a subclass may encode in its own way
            return super().encode_cached_keys(k, recent, cos, sin)
        self.check_tokens("k", k, self.num_kv_heads, cos)
        kinds = self.config.k_pooling
        pooled = pooled_inverse_rope(k.detach(), cos, sin, kinds, block_size=self.k_pitch, recent=recent.detach())
        return self._encode(pooled, self.k_linear, cos, sin, self.k_pitch)

    def _encode_key_blocks(
        self, k: Tensor, cos: Tensor | None, sin: Tensor | None, lengths: Tensor | None, pitch: int = 1
    ) -> Tensor:
        pooled = block_pooling(k.detach(), self.config.k_pooling, block_size=self.k_pitch, lengths=lengths)
        return self._encode(pooled, self.k_linear, cos, sin, pitch)

    def encode_queries(
        self, q: Tensor, cos: Tensor, sin: Tensor, *,
        rows: Tensor | None = None, lengths: Tensor | None = None, span: Span | None = None,
    ) -> Tensor:  # fmt: skip
        """See :meth:`BlockGate.encode_queries`."""
        self.check_tokens("q", q, self.num_heads, cos if self.config.rope else None)
        pitch, per_row = self.q_pitch, self.block_size // self.q_pitch
        first = offset = 0
        if span is not None:
            span.check("encode_queries", q=q)
            first = span.keys - span.queries if span.plain else 0
        if span is None or (span.plain and first % self.block_size == 0):  # blocks begin with the first token
            pooled = block_pooling(q.detach(), self.config.q_pooling, block_size=pitch, lengths=lengths)
        else:
            pooled = block_pooling(
                q.detach(), self.config.q_pooling, block_size=pitch, lengths=lengths, span=span, align=self.block_size
            )
            if span.plain and rows is None:
                offset = first % self.block_size
            else:
                cos, sin, pitch = (*_part_starts(cos, sin, span, pitch, pooled.shape[2], self.block_size), 1)
        if rows is not None:
            if span is not None and not span.plain:
                raise ValueError(
                    "rows cannot be chosen where those of the span begin at different blocks; pass rows=None"
                )
            blocks = (rows - first // self.block_size)[:, None] * per_row + torch.arange(per_row, device=rows.device)
            blocks = blocks.flatten().clamp(max=pooled.shape[2] - 1)  # score leaves out those behind the last token
            pooled = pooled.index_select(2, blocks)
            cos, sin, pitch = cos[:, ::pitch].index_select(1, blocks), sin[:, ::pitch].index_select(1, blocks), 1
        return self._encode(pooled, self.q_linear, cos, sin, pitch, offset)

    def encode_prompt(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`BlockGate.encode_prompt`; both in the same launches."""
        if "launches_by_geometry" not in type(self).__dict__:  # a subclass may encode in its own way
            return super().encode_prompt(q, k, cos, sin)
        table = cos if self.config.rope else None
        self.check_tokens("k", k, self.num_kv_heads, table)
        self.check_tokens("q", q, self.num_heads, table)
        of_q = Encoding(self.q_linear, tuple(self.config.q_pooling), self.q_pitch)
        of_k = Encoding(self.k_linear, tuple(self.config.k_pooling), self.k_pitch)
        return encode_prompt(q.detach(), k.detach(), table, None if table is None else sin, (of_q, of_k))

    def score(
        self, queries: Tensor, keys: Tensor, *,
        rows: Tensor | None = None, span: Span | None = None, masked: bool = True,
    ) -> Tensor:  # fmt: skip
        """See :meth:`BlockGate.score`; scaled by width**-0.5."""
        return gate_scores(
            queries,
            keys,
            block_size=self.block_size,
            q_pitch=self.q_pitch,
            k_pitch=self.k_pitch,
            scale=self.scale,
            reduce=self.reduce,
            rows=rows,
            span=span,
            masked=masked,
        )

    def _encode(
        self, pooled: Tensor, linear: Tensor | None, cos: Tensor | None, sin: Tensor | None, pitch: int, offset: int = 0
    ) -> Tensor:
        if not self.config.rope:
            cos = sin = None
        return encode_blocks(pooled.to(self.k_linear.dtype), linear, cos, sin, pitch=pitch, offset=offset)

    def check_rotary(self, rotary_dim: int) -> None:
        """Raise ValueError where the gate cannot take a rotary embedding of this many channels."""
        if self.config.rope:
            check_rotary_width(self.width, rotary_dim)


def _part_starts(cos: Tensor, sin: Tensor, span: Span, pitch: int, num: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Rotary tables ``[B or 1, num, rotary_dim]`` at the first tokens of sub-blocks, or of the parts that a span holds.

    Sub-blocks count from the block that holds a row's first query; those without a token get some entry or other.
    """
    start, length, slot = (span.column(column, cos.device)[:, None] for column in (START, LENGTH, QUERY_SLOT))
    tokens = torch.arange(num, device=cos.device) * pitch - start % block_size
    slots = slot + tokens.clamp(min=0).minimum(length - 1).clamp(min=0)
    if span.plain:
        return cos.index_select(1, slots[0]), sin.index_select(1, slots[0])
    rows = torch.zeros_like(slots) if cos.shape[0] == 1 else torch.arange(len(slots), device=cos.device)[:, None]
    return cos[rows, slots], sin[rows, slots]
