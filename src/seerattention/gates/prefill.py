"""The prefill gate of the SeerAttention paper (arXiv 2410.13276, section 3.1): pool, project, rotate, multiply."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ..config import GateSpec, PrefillGateConfig
from ..ops.block_pooling import block_pooling
from ..ops.gate_scores import encode_blocks, gate_scores
from ..ops.span import LENGTH, QUERY_SLOT, START, Span
from .state import HISTORY, KeyState, Lengths

# Fresh projections are the identity on pooled means plus noise of about this relative size.
_INIT_NOISE = 0.1


class BlockGate(nn.Module, ABC):
    """What every form of gate offers: it scores blocks of ``block_size`` keys for blocks of ``block_size`` queries.

    In three parts, so that keys are encoded once and queries where they come from: :meth:`encode_keys`,
    :meth:`encode_queries` and :meth:`score`; :meth:`forward` is all of them at once.

    Attributes:
        block_size: tokens a block of the *mask*.
        q_pitch, k_pitch: tokens that are pooled into one vector, which divide block_size; a form may pool more finely
            than its mask.
    """

    def __init__(self, config: GateSpec, *, block_size: int, num_heads: int, num_kv_heads: int, head_dim: int):
        super().__init__()
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads ({num_heads}) must be a multiple of num_kv_heads ({num_kv_heads})")
        self.block_size = self.q_pitch = self.k_pitch = block_size
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim

    @abstractmethod
    def encode_keys(
        self, k: Tensor, cos: Tensor, sin: Tensor, *, lengths: Lengths = None, state: KeyState | None = None
    ) -> Tensor:
        """Encoded keys, one vector for each ``k_pitch`` tokens.

        Args:
            k: ``[B, Hkv, T, head_dim]`` before RoPE (after k_norm where the model has one).
            cos, sin: ``[B or 1, T, rotary_dim]``, the model's rotary table at the tokens' positions, halves repeated as
                Hugging Face lays it out.
            lengths: valid tokens of each right-padded row: int64 ``[B]``, with a state better integers of the host
                (None: all).
            state: what came before these tokens, which are appended to it; without gradients. None: whole prompts.

        Returns:
            ``[B, H, N, W]`` from position 0 on, the last and perhaps partial block included, as :meth:`score` takes it.
            What lies behind a row's last block is undefined.
        """

    @abstractmethod
    def encode_queries(
        self, q: Tensor, cos: Tensor, sin: Tensor, *,
        rows: Tensor | None = None, lengths: Tensor | None = None, span: Span | None = None,
    ) -> Tensor:  # fmt: skip
        """Encoded queries, ``block_size // q_pitch`` vectors for each row of scores.

        Args:
            q: ``[B, Hq, T, head_dim]`` before RoPE (after bias and q_norm where the model has them).
            cos, sin: as in :meth:`encode_keys`.
            rows: int64 ``[R]``, absolute query blocks to score (None: all). Not with a span whose rows differ.
            lengths: int64 ``[B]``, valid tokens of each right-padded row (None: all).
            span: the positions of the queries, where they are not whole prompts. A block of which the span holds a part
                only is pooled over that part, and rotated at the position of the part's first token.

        Returns:
            ``[B, Hq, R * (block_size // q_pitch), W]``, of whole prompts without the sub-blocks behind the last token.
        """

    @abstractmethod
    def score(
        self,
        queries: Tensor,
        keys: Tensor,
        *,
        rows: Tensor | None = None,
        span: Span | None = None,
        masked: bool = True,
    ) -> Tensor:
        """Block logits of encoded queries and keys.

        Args:
            queries, keys: as the two methods before give them, with the same ``rows`` and ``span``.
            rows, span: as in :meth:`encode_queries`.
            masked: False: what lies above the block diagonal may be left undefined, for those who ignore it
                (policies do).

        Returns:
            float32 ``[B, Hq, R, N]``, not yet normalised, -inf above the block diagonal. Rows may be padded in memory.
        """

    @abstractmethod
    def check_rotary(self, rotary_dim: int) -> None:
        """Raise ValueError where the gate cannot take a rotary embedding of this many channels."""

    def new_state(self, history: int = HISTORY) -> KeyState:
        """An empty state for :meth:`encode_keys`; ``history`` is the number of tokens that ``crop`` can always undo."""
        return KeyState(self.k_pitch, history)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        rows: Tensor | None = None,
        lengths: Tensor | None = None,
        masked: bool = True,
        span: Span | None = None,
    ) -> Tensor:
        """Score every key block for every query block of a whole prompt, or of a chunk.

        Differentiable with respect to the parameters; q and k are constants. Pooling runs in the dtype of q, the linear
        layers in that of the parameters, RoPE and the product in float32. Where no gradient is recorded, gates in half
        precision on CUDA devices run as Triton kernels (:mod:`seerattention.ops.gate_scores`).

        Args:
            q: ``[B, Hq, T, head_dim]`` before RoPE (after bias and q_norm where the model has them).
            k: ``[B, Hkv, T, head_dim]`` before RoPE.
            cos, sin: ``[B or 1, T, rotary_dim]``, the model's rotary table at the tokens' positions, halves repeated as
                Hugging Face lays it out. Each block is rotated at the position of its first token.
            rows: int64 ``[R]``, absolute query blocks to score (None: all N).
            lengths: int64 ``[B]``, valid tokens of each right-padded row (None: all).
            masked: False: what lies above the block diagonal may be left undefined, for those who ignore it
                (policies do).
            span: of a chunk, which of the positions of k its queries are. Content comes first in every row; the table
                is that of k, and one for all rows.

        Returns:
            float32 ``[B, Hq, R, N]``, scaled and not yet normalised, -inf above the block diagonal. Rows may be padded
            in memory; those that hold no token are undefined.

        Raises:
            ValueError: shapes that do not fit the gate, or a rotary width that neither fits into the gate's width nor
                is a multiple of it.
        """
        batch, _, length, _ = q.shape
        if span is None and q.shape[2] != k.shape[2]:
            raise ValueError(
                f"the gate takes q and k of a whole prompt, got {tuple(q.shape)} and {tuple(k.shape)}; score chunks by "
                "encode_keys, encode_queries and score, or pass their span"
            )
        keys = self.encode_keys(k, cos, sin, lengths=lengths)
        if span is not None:
            positions = span.column(START, q.device)[:, None] + torch.arange(length, device=q.device)
            positions = positions[:1] if span.plain else positions.clamp(max=k.shape[2] - 1)
            queries = self.encode_queries(q, cos[0, positions], sin[0, positions], rows=rows, span=span)
            return self.score(queries, keys, rows=rows, span=span, masked=masked)
        queries = self.encode_queries(q, cos, sin, rows=rows, lengths=lengths)
        span = None
        if self.q_pitch != self.block_size or self.k_pitch != self.block_size:  # only sub-blocks can be without tokens
            span = Span.of_padded(batch, length, length, lengths)
        return self.score(queries, keys, rows=rows, span=span, masked=masked)


class PrefillGate(BlockGate):
    """The published gate: queries and keys pooled per block, linear layers, RoPE at block starts, one product.

    Parameters (input dimension first, no bias; C = number of pooling kinds * head_dim, W = gate width):
        ``k_linear [Hq, C_k, W]`` without a query linear (one key projection per query head, the released form), else
        ``[Hkv, C_k, W]``; ``q_linear [Hq, C_q, W]`` or None.

    Fresh gates begin near the similarity of the blocks' mean query and mean key: projections are the identity on the
    ``avg`` part (on the mean of the other poolings where there is no ``avg``) plus normal noise of a tenth of its
    size, drawn from torch's global generator.
    """

    k_linear: nn.Parameter
    q_linear: nn.Parameter | None

    def __init__(self, config: PrefillGateConfig, *, block_size: int, num_heads: int, num_kv_heads: int, head_dim: int):
        super().__init__(
            config, block_size=block_size, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim
        )
        config = config.resolve(head_dim)
        assert config.width is not None
        self.config = config
        self.width = config.width
        self.scale = self.width**-0.5
        k_heads = num_kv_heads if config.q_linear else num_heads
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
            if weight is None:
                continue
            weight.normal_(std=_INIT_NOISE * weight.shape[1] ** -0.5)
            identity = _narrowed_identity(self.head_dim, self.width).to(weight)
            carriers = ("avg",) if "avg" in kinds else kinds
            for slot, kind in enumerate(kinds):
                if kind in carriers:
                    weight[:, slot * self.head_dim : (slot + 1) * self.head_dim] += identity / len(carriers)

    def extra_repr(self) -> str:
        return (
            f"heads={self.num_heads}/{self.num_kv_heads}, head_dim={self.head_dim}, width={self.width}, "
            f"k_pooling={self.config.k_pooling}, q_pooling={self.config.q_pooling}, block_size={self.block_size}"
        )

    def encode_keys(
        self, k: Tensor, cos: Tensor, sin: Tensor, *, lengths: Lengths = None, state: KeyState | None = None
    ) -> Tensor:
        """See :meth:`BlockGate.encode_keys`; heads are those of ``k_linear``."""
        self._check("k", k, self.num_kv_heads, cos)
        if state is not None:
            with torch.no_grad():
                tables = (cos, sin) if self.config.rope else (None, None)
                state.append(k, *tables, encode=self._encode_key_blocks, lengths=lengths)
                return state.encoded
        if lengths is not None:
            lengths = torch.as_tensor(lengths, device=k.device)
        return self._encode_key_blocks(k, cos, sin, lengths=lengths, pitch=self.k_pitch)

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
        self._check("q", q, self.num_heads, cos)
        pitch, per_row = self.q_pitch, self.block_size // self.q_pitch
        first = 0
        if span is not None:
            span.check("encode_queries", q=q)
            first = span.keys - span.queries if span.plain else 0
        if span is None or (span.plain and first % self.block_size == 0):  # blocks begin with the first token
            pooled = block_pooling(q.detach(), self.config.q_pooling, block_size=pitch, lengths=lengths)
        else:
            pooled = block_pooling(
                q.detach(), self.config.q_pooling, block_size=pitch, lengths=lengths, span=span, align=self.block_size
            )
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
        return self._encode(pooled, self.q_linear, cos, sin, pitch)

    def score(
        self,
        queries: Tensor,
        keys: Tensor,
        *,
        rows: Tensor | None = None,
        span: Span | None = None,
        masked: bool = True,
    ) -> Tensor:
        """See :meth:`BlockGate.score`; scaled by width**-0.5."""
        return gate_scores(
            queries,
            keys,
            block_size=self.block_size,
            q_pitch=self.q_pitch,
            k_pitch=self.k_pitch,
            scale=self.scale,
            rows=rows,
            span=span,
            masked=masked,
        )

    def _encode(
        self, pooled: Tensor, linear: Tensor | None, cos: Tensor | None, sin: Tensor | None, pitch: int
    ) -> Tensor:
        if not self.config.rope:
            cos = sin = None
        return encode_blocks(pooled.to(self.k_linear.dtype), linear, cos, sin, pitch=pitch)

    def _check(self, name: str, x: Tensor, heads: int, cos: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != heads or x.shape[3] != self.head_dim:
            raise ValueError(
                f"the gate takes {name} [B, {heads}, T, {self.head_dim}] of a whole prompt or a chunk, got "
                f"{tuple(x.shape)}"
            )
        if not self.config.rope:
            return
        batch, length = x.shape[0], x.shape[2]
        if cos.dim() != 3 or cos.shape[1] != length or cos.shape[0] not in (1, batch):
            raise ValueError(f"cos and sin must be [B or 1, {length}, rotary_dim], got {tuple(cos.shape)}")
        self.check_rotary(cos.shape[-1])

    def check_rotary(self, rotary_dim: int) -> None:
        """Raise ValueError where the gate cannot take a rotary embedding of this many channels."""
        if self.config.rope and rotary_dim > self.width and rotary_dim % self.width:
            raise ValueError(
                f"a gate of width {self.width} cannot take the rotary embedding of {rotary_dim} channels: the width "
                "must be at least the rotary width or divide it; change width or pass rope=False"
            )


def _narrowed_identity(inputs: int, outputs: int) -> Tensor:
    """``[inputs, outputs]``: the identity, cut to fit. A narrower output takes every s-th channel where s divides, so
    that rotary pairs stay together and meet the frequencies that a narrow gate rotates by."""
    if outputs < inputs and inputs % outputs == 0:
        return torch.eye(inputs)[:, :: inputs // outputs]
    return torch.eye(inputs, outputs)


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
