"""One forward of an attached model: what is open for it, what was decided about it, what its layers hand over.

A ``Forward`` begins and ends with the decoder's forward. It is found by context (``contextvars``): forwards in other
threads and tasks, and forwards of other models inside this one, have their own. Nothing is remembered from one forward
to the next.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..ops.replay import capturing, of_capture
from .generation import take_prepared
from .untraced import untraced

if TYPE_CHECKING:
    from ..blocks import BlockIndices
    from ..gates import KeyState, QueryState
    from ..gates.query_state import Recent
    from .kept import Kept
    from .layer import LayerState
    from .plan import Plan
    from .state import ModelState

DENSE, OBSERVE, RECORD = "dense", "observe", "record"

HIDDEN = "hidden_states"
_KEPT = "_seer_call"  # attribute of the tensor that keeps a call alive


@dataclass(eq=False)
class Watch:
    """One open ``with`` block: what it is, whose, and what it brings along (an observer, statistics)."""

    kind: str
    state: ModelState | None
    value: Any


_watches: ContextVar[tuple[Watch, ...]] = ContextVar("seer_watches", default=())
_forward: ContextVar[Forward | None] = ContextVar("seer_forward", default=None)
# How many with blocks are open anywhere: compiled decoding asks for the context only where this is not 0.
_open_watches = 0
_lock = threading.Lock()


@contextmanager
def watch(kind: str, state: ModelState, value: Any = None) -> Iterator[None]:
    """Open a watch for the model of ``state``, in the present context only. Blocks may close in any order, even in
    another context than the one they were opened in."""
    global _open_watches
    mine = Watch(kind, state, value)
    _watches.set((*_watches.get(), mine))
    with _lock:
        _open_watches += 1
    try:
        yield
    finally:
        mine.state = mine.value = None  # closed, in every context that holds it
        with _lock:
            _open_watches -= 1
        _watches.set(tuple(other for other in _watches.get() if other.state is not None))


def watching() -> bool:
    """Whether any model is watched in any context."""
    return _open_watches > 0


def given_to(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What an attention module is given beside the hidden states, which live as long as its call does."""
    return args[1:], {name: x for name, x in kwargs.items() if name != HIDDEN}


@dataclass(eq=False)
class Call:
    """One forward call of one attention layer: what the hooks saw, for the attention function.

    Attributes:
        valid_keys: of a static cache, the slots that hold tokens, those of this forward included; None: all do.
        unreadable: a static cache, of which a CUDA graph that is captured cannot say how many tokens it holds.
        before_rope: queries and keys before RoPE, as gates take them, once they were made of what the hooks saw.
        cache: of decoded tokens, and of others whose queries are kept; None: there is none.
        past: the layer of the cache; None: there is none, or decoding is dense.
        kept, decides: what was kept with it, and what the layer has for decoding, where a plan looked.
        state: the encoded keys that were kept for what the cache layer held before these tokens.
        last: the same of the queries of its last tokens, of a decode gate with a window; then these tokens' too.
        recent: the encoded queries of the tokens that are decoded, and of those before them that choose with them.
        part: whether it is a part of the call only: the prompt, or what follows on it in the same forward.
        reason: why it is attended densely, once that is known.
        given: what the attention module was given beside its hidden states, by place and by name, and their shape;
            None: that is not known (compiled code).
    """

    layer: LayerState
    module: nn.Module
    cos: Tensor
    sin: Tensor
    position_ids: Tensor | None
    valid_keys: int | None = None
    unreadable: bool = False
    query: Tensor | None = None
    key: Tensor | None = None
    before_rope: tuple[Tensor, Tensor] | None = None
    cache: Any = None
    past: Any = None
    kept: Kept | None = None
    decides: Any = None
    state: KeyState | None = None
    last: QueryState | None = None
    recent: Recent | None = None
    part: bool = False
    reason: str | None = None
    given: tuple[tuple[tuple[Any, ...], dict[str, Any]], tuple[int, ...]] | None = None


class Attended(NamedTuple):
    """What a layer did with the queries of a call, or with a part of them, for whoever counts it.

    Attributes:
        blocks: the lists that were read; None: everything was.
        shape: of the queries, ``[B, Hq, Tq, D]``.
        keys: Tk.
        device: of both.
        lengths: tokens of each padded row, ``[B]``; None: no padding.
        block_size: in which dense calls are counted.
        decoding: whether the queries are decoded tokens.
        reason: why it was dense.
        min_context: tokens below which it would have been.
        share: pairs of tokens that were read over causal pairs, where the lists do not say it; None: they do.
    """

    blocks: BlockIndices | None
    shape: tuple[int, ...]
    keys: int
    device: torch.device
    lengths: Tensor | None
    block_size: int
    decoding: bool
    reason: str | None
    min_context: int
    share: Tensor | None = None


class Arguments(dict[str, Any]):
    """The keyword arguments of a call of the decoder, as an object whose end can be seen.

    Attributes:
        plan: what the layers of the call may repeat, which ends with it.
    """

    plan: Plan | None = None


class Forward:
    """One forward of the decoder of an attached model.

    Attributes:
        state: the model's.
        dense: whether all layers attend densely, because the caller said so.
        observers, statistics: what is to be called, and counted, in every layer.
        masks: masks of kinds that do not say themselves what they are, with whether they are causality and padding,
            and the padding.
        called, seen: indices of layers whose attention module was called, and that reached the attention function.
        sparse: whether a layer was attended sparsely.
        positions_are_made: whether the decoder was given no positions, and so counts from the end of its cache on.
        facts: what was found out about this forward, by name, so that it is asked and waited for once.
        prepared: what ``generate`` said of this forward; None: nothing.
        plans: layers after which a plan for the others was made, or tried to.
    """

    def __init__(
        self,
        state: ModelState,
        arguments: Arguments | None,
        tokens: Tensor | None = None,
        positions_are_made: bool = False,
    ):
        """``arguments`` live as long as the call of the decoder; None: not known (compiled code). It begins with
        ``tokens [B, T]``, or their embeddings."""
        mine = [watch for watch in _watches.get() if watch.state is state]
        self.state = state
        self.dense = any(watch.kind == DENSE for watch in mine)
        self.observers = tuple(watch.value for watch in mine if watch.kind == OBSERVE)
        self.statistics = tuple(watch.value for watch in mine if watch.kind == RECORD)
        self.masks: list[tuple[Any, bool, Tensor | None]] = []
        self.called: set[int] = set()
        self.seen: set[int] = set()
        self.sparse = False
        self.positions_are_made = positions_are_made
        self.facts: dict[Any, Any] = {}
        self.prepared = take_prepared(state, tokens)
        self.plans = 0
        self._call: Callable[[], Call | None] = _nothing
        self._keeper: Callable[[], Tensor | None] = _nothing
        self._outer = _forward.get()
        self._arguments = None if arguments is None else weakref.ref(arguments)
        # Ctrl-C runs no hooks, so forwards may be left over that it ended.
        while self._outer is not None and self._outer._arguments is not None and self._outer._arguments() is None:
            self._outer = self._outer._outer
        _forward.set(self)
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            of_capture(self.facts)

    def decoded_of(self, queries: int) -> int:
        """How many of the last of ``queries`` tokens are decoded ones (or candidates) and no prompt, or ``UNKNOWN``.

        Where ``generate`` says nothing, one token is decoded, and several are a prompt.
        """
        return int(queries == 1) if self.prepared is None else self.prepared.decoded_of(queries)

    def repeat(self, plan: Plan | None) -> None:
        """Let the layers that follow repeat what one did; None: no more."""
        arguments = None if self._arguments is None else self._arguments()
        if arguments is not None:
            arguments.plan = plan

    @property
    def call(self) -> Call | None:
        """The attention layer that is under way."""
        return self._call()

    def begin(self, call: Call, keeper: Tensor | None) -> None:
        """Remember a call as long as ``keeper`` lives, an argument of the attention module: whatever ends the call, its
        tensors do not stay. None: until the call ends or another begins."""
        if keeper is None:
            self._call = lambda: call
            self._keeper = _nothing
        else:
            keeper.__dict__[_KEPT] = call
            self._call, self._keeper = weakref.ref(call), weakref.ref(keeper)

    def take_call(self, module: nn.Module) -> Call | None:
        """The call of an attention module, which is then over; None where another one is under way, or none."""
        call = self._call()
        if call is None or call.module is not module:
            return None
        keeper = self._keeper()
        if keeper is not None:
            keeper.__dict__.pop(_KEPT, None)
        self._call = self._keeper = _nothing
        return call

    def close(self) -> None:
        """Let go of all tensors. Called in the context that opened it, or by whoever detaches the model."""
        self._call = _nothing
        self.repeat(None)
        self.masks.clear()
        self.facts.clear()

    def leave(self) -> None:
        """End the forward in its own context."""
        self.close()
        of_capture(None)
        _forward.set(self._outer)

    def tokens_in(self, cache: Any, layer: int, slots: Tensor | None) -> int:
        """How many slots of a static cache hold tokens before this forward, which is waited for once a forward.

        Early versions of transformers count keys that are not 0 there, but hand each layer the ``slots`` of the tokens.
        """
        name = ("tokens in a cache", id(cache))
        if name not in self.facts:
            held = cache.get_seq_length(layer) if slots is None else slots[0]
            self.facts[name] = int(held), cache  # kept, so that its id is its own
        return self.facts[name][0]

    def _tokens_on_cache(self) -> int | None:
        """Tokens of a cache that knows their number, those of this forward included once they are in it, as they are
        when attention asks; None: it would have to be waited for, or there is no cache."""
        arguments = None if self._arguments is None else self._arguments()
        cache = None if arguments is None else arguments.get("past_key_values")
        return cache.get_seq_length() if type(cache) is DynamicCache else None

    def positions_run_on(self, position_ids: Tensor | None, padding: Tensor | None) -> bool:
        """Whether the content's positions rise by one from token to token (they restart in packed sequences).

        Of positions that the decoder made itself that is known. All layers of a forward share one tensor of others, so
        the answer, which waits for the device, is kept as long as the forward lasts.
        """
        if position_ids is None or self.positions_are_made:
            return True
        if position_ids.dim() != 2 or capturing(position_ids.device):
            return False
        name = ("run on", id(position_ids), id(padding))
        if name not in self.facts:
            consecutive = position_ids.diff(dim=-1) == 1
            if padding is not None:
                mask = padding.to(position_ids.device)
                consecutive = consecutive | ~(mask[:, 1:] & mask[:, :-1])
            # The tensors are kept, so that their ids are their own.
            self.facts[name] = bool(consecutive.all()), position_ids, padding
        return self.facts[name][0]

    def positions_end_at(self, position_ids: Tensor | None, padding: Tensor | None, keys: int) -> bool:
        """Whether the last slot of every row of a chunk holds its last token, and its position counts all tokens of the
        row: ``keys``, or as many as ``padding [B, keys]`` says; rows that hold none yet are right too. The answer waits
        for the device once a forward, but for positions that the decoder made itself for a cache that it counts."""
        if position_ids is None or position_ids.dim() != 2 or capturing(position_ids.device):
            return False
        if self.positions_are_made and padding is None and (counted := self._tokens_on_cache()) is not None:
            return counted == keys
        name = ("ends", id(position_ids), id(padding), keys)
        if name not in self.facts:
            if padding is None:
                right = position_ids[:, -1] == keys - 1
            else:
                mask = padding.to(position_ids.device)
                right = (position_ids[:, -1] == mask.sum(-1) - 1) & mask[:, -1] | ~mask.any(-1)
            # The tensors are kept, so that their ids are their own.
            self.facts[name] = bool(right.all()), position_ids, padding
        return self.facts[name][0]


def _nothing() -> None:
    return None


def present_plan() -> Plan | None:
    """What a layer of the present forward may repeat. Not for compiled code."""
    forward = _forward.get()
    arguments = None if forward is None or forward._arguments is None else forward._arguments()
    return None if arguments is None else arguments.plan


def present_call() -> Call | None:
    """The attention layer that is under way in this context. Not for compiled code."""
    forward = _forward.get()
    return None if forward is None or forward._call is _nothing else forward._call()


@untraced("Dynamo does not know contexts")
def current_forward() -> Forward | None:
    """The innermost forward of an attached model in this context."""
    return _forward.get()
