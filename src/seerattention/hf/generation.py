"""What ``generate`` knows of a forward that the forward does not show: where its prompt ends.

A first chunk, a step without a cache and a prompt with candidates behind it all look like one prompt; a short chunk and
a few candidates on a cache look alike too. ``generate`` of transformers asks its model's
``prepare_inputs_for_generation`` for the inputs of every forward, and says there whether the forward is the first of
its prompt. So an attached model listens at this method (of each of its modules that has one), and hands back inputs
that can be recognised when they reach the decoder. Nothing is changed in them.

What is learnt: in the first forwards of ``generate`` all is prompt, but for candidates of speculative decoding, of
which there is one less than logits are asked for; later ones on a cache are tokens that were decoded, or candidates;
later ones without a cache begin with as many slots as the first one had.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .state import ModelState

_METHOD = "prepare_inputs_for_generation"
_LOGITS = "logits_to_keep"

COMPILES_ATTACHED = tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) >= (2, 13)
"""Whether torch compiles models whose config has a name with more to it (``implementation.StandIn``): 2.11 does not."""

UNKNOWN = -1
"""Instead of a number of tokens: nobody said which tokens of a forward are prompt."""

# How many prepared inputs are alive that are one token of a prompt: forwards of one token are looked at only then.
_single_tokens = 0
_lock = threading.RLock()  # a finalizer may run wherever


class PreparedInputs(dict[str, Any]):
    """The inputs of one forward, as ``generate`` will pass them on.

    Attributes:
        state: the attached model that they are for.
        decoded: trailing slots that are no prompt; None: all of them; or :data:`UNKNOWN`.
        candidates: whether candidates of speculative decoding may follow on the prompt, which is seen by the number of
            logits that are asked for afterwards.
        asked: that number as it was prepared.
    """

    state: ModelState
    decoded: int | None
    candidates: bool
    asked: Any

    def decoded_of(self, queries: int) -> int:
        """How many of the last of ``queries`` slots are no prompt, or :data:`UNKNOWN`."""
        if not self.candidates:
            return queries if self.decoded is None else min(self.decoded, queries)
        wanted = self.get(_LOGITS)
        if wanted is None:
            return UNKNOWN  # a model that cannot leave logits out: generate does not say how many it needs
        return wanted - 1 if wanted != self.asked and 0 < wanted <= queries else 0


class _Uncached(NamedTuple):
    """Of a generation without a cache: its prompt's slots, and those of its last forward."""

    listener: weakref.ref[Listener]
    prompt: int
    last: int


_prepared: ContextVar[weakref.ref[PreparedInputs] | None] = ContextVar("seer_prepared", default=None)
_uncached: ContextVar[_Uncached | None] = ContextVar("seer_uncached", default=None)


class InPlace:
    """Stands in the place of a method of a module.

    An object, and no closure, so that in copies and pickles of the model it stands in the copy.
    """

    method: ClassVar[str]

    def __init__(self, state: ModelState, module: nn.Module):
        self.state = state
        self.module = module
        self.below = module.__dict__.get(self.method)  # somebody else stood there

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The method; ``inspect.signature`` finds by this name what it takes."""
        return self.below or getattr(type(self.module), self.method).__get__(self.module)


class Eager(InPlace):
    """In the place of what says whether ``generate`` compiles decoding by itself, as it does on static caches: no."""

    method = "_valid_auto_compile_criteria"

    def __call__(self, *args: Any, **kwargs: Any) -> bool:
        return bool(self.state.detached and self.__wrapped__(*args, **kwargs))


class Listener(InPlace):
    """Stands in the place of a module's ``prepare_inputs_for_generation``."""

    method = _METHOD

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = self.__wrapped__(*args, **kwargs)
        ids = args[0] if args else kwargs.get("input_ids")
        queries = _num_tokens(inputs) if isinstance(inputs, dict) else None
        if self.state.detached or queries is None or not isinstance(ids, Tensor):
            return inputs
        first = bool(kwargs.get("is_first_iteration"))
        cache = inputs.get("past_key_values") if inputs.get("use_cache", True) else None
        if cache is None:
            return self._prepared(inputs, self._decoded_without_cache(ids, first))
        if first:
            return self._prepared(inputs, 0, candidates=True)
        if kwargs.get("next_sequence_length") is None:
            # Later chunks of a prompt are no first forwards to early versions; nothing else is taken whole.
            return self._prepared(inputs, 0)
        if queries == 1:
            return inputs  # it looks like what it is
        # Assistants are never told that their first forward is one.
        return self._prepared(inputs, None if int(cache.get_seq_length()) > 0 else 0)

    def _decoded_without_cache(self, ids: Tensor, first: bool) -> int:
        slots, known = ids.shape[1], _uncached.get()
        if first:
            prompt = slots
        elif known is not None and known.listener() is self and known.last == slots - 1:
            prompt = known.prompt
        else:
            return UNKNOWN
        _uncached.set(_Uncached(weakref.ref(self), prompt, slots))
        return slots - prompt

    def _prepared(self, inputs: dict[str, Any], decoded: int | None, candidates: bool = False) -> PreparedInputs:
        """``inputs`` as ones that the forward that they are for will find."""
        prepared = PreparedInputs(inputs)
        prepared.state, prepared.decoded, prepared.candidates = self.state, decoded, candidates
        prepared.asked = inputs.get(_LOGITS)
        _prepared.set(weakref.ref(prepared))
        if _num_tokens(inputs) == 1:
            _count_single_tokens(1)
            weakref.finalize(prepared, _count_single_tokens, -1).atexit = False
        return prepared


def take_prepared(state: ModelState, tokens: Tensor | None) -> PreparedInputs | None:
    """What ``generate`` prepared for the forward of ``state`` that begins with ``tokens [B, T]`` or ``[B, T, hidden]``;
    None: it is no forward of ``generate``, or of one that could not be listened to."""
    reference = _prepared.get()
    prepared = None if reference is None else reference()
    if prepared is None or prepared.state is not state or tokens is None:
        return None
    given = prepared.get("inputs_embeds")
    given = prepared.get("input_ids") if given is None else given
    if given is not tokens and (given is None or given.shape[0] != tokens.shape[0] or given.shape[1] > tokens.shape[1]):
        return None  # a module around the decoder may embed tokens, and put others in front
    _prepared.set(None)
    return prepared


def single_tokens() -> bool:
    """Whether a forward of one token may be one of a prompt, in any context."""
    return _single_tokens > 0


def listen(model: nn.Module, state: ModelState) -> list[InPlace]:
    """Listen to all modules of ``model`` that prepare inputs of ``generate``, and keep it from compiling decoding where
    that would fail."""
    kinds: tuple[type[InPlace], ...] = (Listener,) if COMPILES_ATTACHED else (Listener, Eager)
    listeners = [kind(state, each) for each in model.modules() for kind in kinds if hasattr(type(each), kind.method)]
    for listener in listeners:
        listener.module.__dict__[listener.method] = listener
    return listeners


def stop_listening(listeners: list[InPlace]) -> None:
    """Give modules their methods back. Listeners that others have put something over only pass on from now on."""
    for listener in listeners:
        if listener.module.__dict__.get(listener.method) is listener:
            del listener.module.__dict__[listener.method]
            if listener.below is not None:
                listener.module.__dict__[listener.method] = listener.below


def _num_tokens(inputs: dict[str, Any]) -> int | None:
    given = inputs.get("inputs_embeds")
    given = inputs.get("input_ids") if given is None else given
    return given.shape[1] if isinstance(given, Tensor) else None


def _count_single_tokens(change: int) -> None:
    global _single_tokens
    with _lock:
        _single_tokens += change
