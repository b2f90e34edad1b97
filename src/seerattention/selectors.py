"""Selectors: what chooses the blocks of one attention layer. Gate and policy are one, training-free methods are others.

Nothing here knows Hugging Face. To add a method, subclass :class:`Selector` in a file of ``baselines/``.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor

from .blocks import BlockIndices
from .gates import BlockGate
from .ops import dispatch, inverse_rope
from .ops.block_sparse_attention import block_sparse_attention
from .ops.custom_op import tracing
from .ops.indices import num_blocks, ordered_lists, read_lists
from .ops.replay import Recording, Replays
from .ops.span import Span
from .policies import REPLAYED, Dense, Policy

__all__ = ["SELECTORS", "FunctionSelector", "GateSelector", "LayerInputs", "Selector", "as_selector"]


@dataclass(frozen=True)
class LayerInputs:
    """What one attention layer sees at prefill; rows are right-padded, whatever the padding of the batch.

    Of a chunk on a cache, Tk counts the cached tokens too, and the queries are where ``span`` says.

    Attributes:
        layer: index of the layer.
        q: ``[B, Hq, Tq, D]`` after RoPE.
        k, v: ``[B, Hkv, Tk, D]``, k after RoPE.
        q_pre, k_pre: the same as q and k before RoPE (what gates read). Keys that were in the cache are turned back; a
            :class:`GateSelector` may get those of the queries only, ``[B, Hkv, Tq, D]``, see :meth:`turned_back`.
            Where the model's RoPE turns neighbouring channels, these are in the order of halves, as cos and sin are.
        cos, sin: ``[B or 1, Tk, rotary_dim]``, the model's rotary table at the keys' positions.
        lengths: int64 ``[B]``, valid tokens of each row; None: all.
        scale: softmax scale of the attention.
        gate: the layer's gate, or None (a sliding-window layer, or a model attached with a selector only).
        lse: float32 ``[B, Hq, T]``, log-sum-exp of the scaled causal logits of each query, where the layer was attended
            densely by a kernel that returns it; else None. What ``ops.pooled_attention`` need not compute again.
        phase: "prefill", or "decode" for single tokens on a cache.
        span: of a chunk, which positions the queries of each row are; None: of whole prompts.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    q_pre: Tensor
    k_pre: Tensor
    cos: Tensor
    sin: Tensor
    lengths: Tensor | None
    scale: float
    gate: BlockGate | None
    lse: Tensor | None = None
    phase: str = "prefill"
    span: Span | None = None

    @property
    def holds_all(self) -> bool:
        """Whether ``k_pre`` is of all keys, and not of those of the queries alone."""
        return self.k_pre.shape[2] == self.k.shape[2]

    def turned_back(self) -> LayerInputs:
        """The same with ``k_pre`` of all keys."""
        if self.holds_all:
            return self
        keys = inverse_rope(self.k, self.cos, self.sin, recent=self.k_pre)
        return dataclasses.replace(self, k_pre=keys)

    def gate_logits(self, rows: Tensor | None = None, *, masked: bool = True) -> Tensor:
        """Block logits of the layer's gate, float32 ``[B, Hq, R, N]``; ``rows`` and ``masked`` as in its forward.

        Raises:
            ValueError: the layer has no gate.
        """
        if self.gate is None:
            raise ValueError(f"layer {self.layer} has no gate (sliding window, or attached without gates)")
        cached = {} if self.holds_all else {"cached": self.k}
        return self.gate(
            self.q_pre,
            self.k_pre,
            self.cos,
            self.sin,
            rows=rows,
            lengths=self.lengths,
            masked=masked,
            span=self.span,
            **cached,
        )


SELECTORS: dict[str, type[Selector]] = {}
"""Selectors by name. Every subclass of :class:`Selector` is in here, unless it says ``registered=False``."""


class Selector(ABC):
    """Chooses the key blocks of each query block of a layer. A subclass is a frozen dataclass of what it can be told.

    Attributes:
        kind: its name, in dicts and on the command line.
        needs_gate: whether it asks the layer's gate, so that layers without one are dense.
        takes_chunks: whether it can choose for queries that are the last of longer keys (chunks on a cache).
        reads_blocks: whether what it reads are lists of blocks. If not, :meth:`attend` and :meth:`share_read` are its
            own.
    """

    kind: ClassVar[str]
    needs_gate: ClassVar[bool] = False
    takes_chunks: ClassVar[bool] = False
    reads_blocks: ClassVar[bool] = True

    def __init_subclass__(cls, registered: bool = True, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not registered:
            return
        known = SELECTORS.get(cls.kind)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"{cls.__name__}: the kind {cls.kind!r} is that of {known.__name__}; choose another name")
        SELECTORS[cls.kind] = cls

    @abstractmethod
    def select(self, inputs: LayerInputs) -> BlockIndices:
        """Choose the key blocks of each query block.

        Every query block must be given its diagonal block, or its tokens may see nothing. Rows of blocks that are
        wholly padding may have any list.

        Returns:
            BlockIndices on the device of q, with one list per query head, or one per KV head.
        """

    @property
    def attention(self) -> str:
        """What tables say of a selector whose choice is read by another attention than that of all others, see
        :meth:`attend`; empty: it is the same."""
        return ""

    def attend(self, inputs: LayerInputs, blocks: BlockIndices) -> Tensor | None:
        """Attention of the layer, ``[B, Hq, Tq, D]`` like q, for methods that are more than lists of blocks, which say
        so by :attr:`attention`. ``blocks`` is what :meth:`select` chose, but rows of a padded batch that are to be
        dense hold everything. None: the block-sparse attention of all others."""
        return None

    def share_read(self, inputs: LayerInputs) -> Tensor | None:
        """Pairs of tokens that :meth:`attend` reads over causal pairs, float64 ``[]``, where that is not what the lists
        say (``reads_blocks`` is False); None: it is."""
        return None

    def scores(self, inputs: LayerInputs) -> Tensor | None:
        """What a policy would choose from, float32 logits ``[B, Hq or 1, R, N]``; undefined behind the diagonal. None
        where it has no scores. For pictures: :meth:`select` need not ask it."""
        return None

    @property
    @abstractmethod
    def rowwise(self) -> bool:
        """Whether it decides row by row: what a query block reads would be the same if the prompt ended with it. False
        for methods that look at the whole prompt, or at its end."""

    @property
    def dense(self) -> bool:
        """Whether it keeps everything anyway, so that the layer had better be attended densely."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """A plain dict, ``{"kind": ..., <arguments>}``, as :func:`seerattention.baselines.selector_from_dict` reads."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {
            "kind": self.kind,
            **{name: value.to_dict() if isinstance(value, Policy) else value for name, value in values.items()},
        }


# Of more pairs of a query and a key (prompts of 32K tokens, chunks of 8K on 128K) blocks are selected and attended in
# two steps: the device has work enough, and the gate's logits need not stay while attention runs.
MOST_PAIRS_AT_ONCE = 1 << 30

_LISTS = Replays()
_LAYERS = Replays()
# Of chunks: each has more keys than the one before, and is of one geometry in all layers.
_CHUNKS = Replays(passing=True)


@dataclass(frozen=True)
class GateSelector(Selector):
    """The layer's gate scores, a policy chooses.

    Attributes:
        policy: turns the gate's logits into block indices.
    """

    policy: Policy

    kind = "gate"
    needs_gate = True
    takes_chunks = True

    def select(self, inputs: LayerInputs) -> BlockIndices:
        gate, replayed = inputs.gate, self._replayed(inputs)
        if gate is None or replayed is None:
            return self._select(inputs)
        chosen: BlockIndices | None = None

        def select() -> tuple[Tensor, Tensor]:
            nonlocal chosen
            chosen = self._select(inputs)
            return read_lists(chosen)

        parameters, settings = replayed
        cached = () if inputs.holds_all else (inputs.k,)
        tensors = (inputs.q_pre, inputs.k_pre, inputs.cos, inputs.sin, *parameters, *self._tensors(inputs), *cached)
        indices, counts = _LISTS.call(select, tensors, *settings, self.policy, inputs.span)
        if chosen is not None:
            return chosen
        num = num_blocks(inputs.k.shape[2], gate.block_size)
        return ordered_lists(indices, counts, num, gate.block_size, span=inputs.span)

    def attend_at_once(self, inputs: LayerInputs) -> Tensor | None:
        """What attention gives on the lists that are selected, ``[B, Hq, T, D]``, where nobody wants to see the lists:
        both are one replay then, and so is turning keys of a cache back. None: they are steps of their own."""
        at_once = self._at_once(inputs)
        if at_once is None:
            return None

        def attend() -> tuple[Tensor]:
            blocks = self._select(inputs)
            return (cast(Tensor, block_sparse_attention(inputs.q, inputs.k, inputs.v, blocks, scale=inputs.scale)),)

        tensors, settings = at_once
        return _replays_of(inputs).call(attend, tensors, *settings)[0]

    def recording(self, inputs: LayerInputs) -> Recording | None:
        """What :meth:`attend_at_once` replays, of the tensors q, k, v, q_pre, k_pre, cos, sin, the gate's parameters
        and what the policy has for the layer; None: it calls, or is no replay."""
        at_once = self._at_once(inputs)
        return None if at_once is None else _replays_of(inputs).recorded(at_once[0], *at_once[1])

    def _at_once(self, inputs: LayerInputs) -> tuple[tuple[Tensor, ...], tuple[Hashable, ...]] | None:
        """Tensors and settings of :meth:`attend_at_once`."""
        replayed = self._replayed(inputs)
        long = inputs.q.shape[2] * inputs.k.shape[2] > MOST_PAIRS_AT_ONCE
        if replayed is None or long or dispatch.device_type(inputs.q.device) != "cuda":
            return None
        parameters, settings = replayed
        given = (inputs.q, inputs.k, inputs.v, inputs.q_pre, inputs.k_pre, inputs.cos, inputs.sin)
        return (*given, *parameters, *self._tensors(inputs)), (
            *settings,
            self.policy,
            inputs.scale,
            dispatch.hopper_automatic(),
        )

    def _replayed(self, inputs: LayerInputs) -> tuple[tuple[Tensor, ...], tuple[Hashable, ...]] | None:
        """Parameters and settings of the gate where all launches follow from shapes, as those of rows without padding
        do, and need not be found anew in every layer. None: they may not."""
        plain = inputs.lengths is None and (inputs.span is None or inputs.span.plain) and not tracing()
        if inputs.gate is None or not plain or type(self.policy) not in REPLAYED:
            return None
        replayed = inputs.gate.replayed()
        return replayed and (replayed[0], (*replayed[1], inputs.span is None))

    def _tensors(self, inputs: LayerInputs) -> tuple[Tensor, ...]:
        """What the policy has for this layer alone."""
        assert inputs.gate is not None
        columns = num_blocks(inputs.k.shape[2], inputs.gate.block_size)
        return self.policy.tensors(inputs.layer, columns, inputs.q.device)

    def _select(self, inputs: LayerInputs) -> BlockIndices:
        logits = inputs.gate_logits(masked=False)
        assert inputs.gate is not None
        lengths = inputs.lengths if inputs.span is None else None  # the span knows them
        return self.policy.of_layer(inputs.layer).select(
            logits, block_size=inputs.gate.block_size, lengths=lengths, span=inputs.span
        )

    def scores(self, inputs: LayerInputs) -> Tensor:
        return inputs.gate_logits()

    @property
    def rowwise(self) -> bool:
        return self.policy.rowwise

    @property
    def dense(self) -> bool:
        return isinstance(self.policy, Dense)


def _replays_of(inputs: LayerInputs) -> Replays:
    return _LAYERS if inputs.span is None else _CHUNKS


@dataclass(frozen=True)
class FunctionSelector(Selector, registered=False):
    """A plain callable as a selector: ``function(q, k, *, layer, scale, lengths)``, of tensors after RoPE.

    Nothing is known of how it decides, so it counts as one that looks at the whole prompt.
    """

    function: Callable[..., BlockIndices]

    kind = "function"
    rowwise = False

    def select(self, inputs: LayerInputs) -> BlockIndices:
        return self.function(inputs.q, inputs.k, layer=inputs.layer, scale=inputs.scale, lengths=inputs.lengths)

    def to_dict(self) -> dict[str, Any]:
        """Its name only: no dict gives a function back."""
        name = getattr(self.function, "__qualname__", type(self.function).__qualname__)
        return {"kind": self.kind, "name": name}


def as_selector(selector: Selector | Callable[..., BlockIndices]) -> Selector:
    """A selector, from one or from a plain callable (see :class:`FunctionSelector`).

    Raises:
        TypeError: neither.
    """
    if isinstance(selector, Selector):
        return selector
    if isinstance(selector, type) or not callable(selector):
        what = f"the class {selector.__name__}" if isinstance(selector, type) else type(selector).__name__
        raise TypeError(
            f"a selector must be a seerattention.selectors.Selector or callable as selector(q, k, layer=, scale=, "
            f"lengths=), got {what}"
        )
    return FunctionSelector(selector)
