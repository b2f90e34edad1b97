"""What every form of gate offers, and what they share: checks of their arguments and fresh projections."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..config import DecodeGateConfig, GateSpec, PrefillGateConfig, SubBlockGateConfig
from ..ops import Span, inverse_rope
from ..ops.span import START
from .state import HISTORY, KeyState, Lengths

# Fresh projections are the identity on pooled means plus noise of about this relative size.
_INIT_NOISE = 0.1


Widened = TypeVar("Widened", PrefillGateConfig | SubBlockGateConfig, DecodeGateConfig)


class BlockGate(nn.Module, ABC):
    """What every form of gate offers: it scores blocks of ``block_size`` keys for blocks of ``block_size`` queries.

    In three parts, so that keys are encoded once and queries where they come from: :meth:`encode_keys`,
    :meth:`encode_queries` and :meth:`score`; :meth:`forward` is all of them at once. What is said here of query heads
    and query blocks holds for gates of prompts; a gate of decoding has a row for each KV head and query token.

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

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}/{self.num_kv_heads}, head_dim={self.head_dim}, block_size={self.block_size}"

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

    def encode_cached_keys(self, k: Tensor, recent: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """:meth:`encode_keys` of rows without padding, of which all but the last tokens come from a cache.

        Args:
            k: ``[B, Hkv, T, head_dim]`` after RoPE.
            recent: ``[B, Hkv, R, head_dim]``, the last tokens before RoPE.
            cos, sin: of all T.
        """
        return self.encode_keys(inverse_rope(k, cos, sin, recent=recent), cos, sin)

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

    def encode_prompt(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Encoded queries and keys of whole prompts without padding: what the two methods before give."""
        return self.encode_queries(q, cos, sin), self.encode_keys(k, cos, sin)

    @abstractmethod
    def score(
        self, queries: Tensor, keys: Tensor, *,
        rows: Tensor | None = None, span: Span | None = None, masked: bool = True,
    ) -> Tensor:  # fmt: skip
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

    def replayed(self) -> tuple[tuple[Tensor, ...], tuple[Hashable, ...]] | None:
        """Parameters and settings, with which all that it launches follows from the geometry of its arguments
        (``ops/replay.py``); None: something else may have a say."""
        return None

    def resolve(self, config: Widened) -> Widened:
        """The config with its width, which follows from head_dim where it says none; sets ``width`` and ``scale``."""
        config = _resolved(config, self.head_dim)
        assert config.width is not None
        self.width, self.scale = config.width, config.width**-0.5
        return config

    def check_tokens(self, name: str, x: Tensor, heads: int, cos: Tensor | None) -> None:
        """Raise ValueError unless ``x`` is ``[B, heads, T, head_dim]`` and ``cos`` its table; None: a gate without."""
        if x.dim() != 4 or x.shape[1] != heads or x.shape[3] != self.head_dim:
            raise ValueError(
                f"the gate takes {name} [B, {heads}, T, {self.head_dim}] of a whole prompt or a chunk, got "
                f"{tuple(x.shape)}"
            )
        if cos is None:
            return
        batch, length = x.shape[0], x.shape[2]
        if cos.dim() != 3 or cos.shape[1] != length or cos.shape[0] not in (1, batch):
            raise ValueError(f"cos and sin must be [B or 1, {length}, rotary_dim], got {tuple(cos.shape)}")
        self.check_rotary(cos.shape[-1])

    def new_state(self, history: int = HISTORY) -> KeyState:
        """An empty state for :meth:`encode_keys`; ``history`` is the number of tokens that ``crop`` can always undo."""
        return KeyState(self.k_pitch, history)

    def forward(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *,
        rows: Tensor | None = None, lengths: Tensor | None = None, masked: bool = True, span: Span | None = None,
        cached: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
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
            cached: ``[B, Hkv, Tk, head_dim]``, all keys *after* RoPE, of a chunk on a cache of rows without padding. k
                holds those of the queries only then; those before them are turned back.

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
        if span is not None:
            if cached is not None:
                keys = self.encode_cached_keys(cached, k, cos, sin)
            else:
                keys = self.encode_keys(k, cos, sin, lengths=lengths)
            if span.plain:  # views, so that all that is done are launches
                own = cos[:, span.keys - length :], sin[:, span.keys - length :]
            else:
                positions = span.column(START, q.device)[:, None] + torch.arange(length, device=q.device)
                positions = positions.clamp(max=k.shape[2] - 1)
                own = cos[0, positions], sin[0, positions]
            queries = self.encode_queries(q, *own, rows=rows, span=span)
            return self.score(queries, keys, rows=rows, span=span, masked=masked)
        if rows is None and lengths is None:
            queries, keys = self.encode_prompt(q, k, cos, sin)
        else:
            keys = self.encode_keys(k, cos, sin, lengths=lengths)
            queries = self.encode_queries(q, cos, sin, rows=rows, lengths=lengths)
        if self.q_pitch != self.block_size or self.k_pitch != self.block_size:  # only sub-blocks can be without tokens
            span = Span.of_padded(batch, length, length, lengths)
        return self.score(queries, keys, rows=rows, span=span, masked=masked)


@functools.cache
def _resolved(config: Any, head_dim: int) -> Any:
    """One object for the gates of all layers, which are then quickly seen to be of one kind."""
    return config.resolve(head_dim)


def check_rotary_width(width: int, rotary_dim: int) -> None:
    """Raise ValueError where vectors of this width cannot take a rotary embedding of this many channels."""
    if rotary_dim > width and rotary_dim % width:
        raise ValueError(
            f"a gate of width {width} cannot take the rotary embedding of {rotary_dim} channels: the width must be at "
            "least the rotary width or divide it; change width or pass rope=False"
        )


@torch.no_grad()
def draw_projection(weight: Tensor, carriers: Sequence[bool]) -> None:
    """Fill ``weight [H, parts * head_dim, W]``: the identity on the mean of the parts that carry, plus small noise.

    Args:
        weight: is written to.
        carriers: for each part whether it carries; one does at least.
    """
    if weight.is_meta:  # there is nothing to fill, which the meta device takes milliseconds to find out
        return
    weight.normal_(std=_INIT_NOISE * weight.shape[1] ** -0.5)
    parts = weight.unflatten(1, (len(carriers), -1))
    identity = _narrowed_identity(parts.shape[2], weight.shape[2]).to(weight)
    for part, carries in enumerate(carriers):
        if carries:
            parts[:, part] += identity / sum(carriers)


def _narrowed_identity(inputs: int, outputs: int) -> Tensor:
    """``[inputs, outputs]``: the identity, cut to fit. A narrower output takes every s-th channel where s divides, so
    that rotary pairs stay together and meet the frequencies that a narrow gate rotates by."""
    if outputs < inputs and inputs % outputs == 0:
        return torch.eye(inputs)[:, :: inputs // outputs]
    return torch.eye(inputs, outputs)
