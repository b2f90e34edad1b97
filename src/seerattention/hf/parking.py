"""Hooks that are taken away while nobody needs them.

A module with a hook takes torch another way through its call, and in a small model, whose layers take the host half a
millisecond, three such modules a layer are felt: decoding that is dense, and prompts below ``min_context``, must not be
slower than in the untouched model. So the hooks of the layers are *parked* in the forwards in which they would do
nothing, and put back before the first one in which they do something. Those of the decoder stay.

They are left alone where somebody could tell: where layers are compiled (what is traced while they are parked would
have no hooks for ever), where modules were wrapped or replaced, and where other hooks stand beside ours, whose order
would change.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import DynamicCache

from .dense import Arguments, attend_by, attend_densely, dense_function
from .forward import watching
from .implementation import original_of
from .untraced import in_compiled_code

if TYPE_CHECKING:
    from .state import ModelState

_lock = threading.Lock()


class Passing:
    """A forward that is dense throughout and that nobody looks at, so that no layer need know of it."""

    def __init__(self) -> None:
        self.config: Any = None
        self.function: Callable[..., Any] | None = None

    def attend(self, module: nn.Module, *given: Any) -> tuple[Tensor, Tensor | None]:
        """What the untouched model computes. As few calls as there can be: a small model feels each of them.

        Args:
            module, given: the fields of :class:`Arguments`.
        """
        if module.config is not self.config:  # of the first layer: which function it is takes microseconds
            self.config = module.config
            self.function = dense_function(module, "sdpa") if original_of(self.config) == "sdpa" else None
        if self.function is None:
            return attend_densely(Arguments(module, *given))
        return attend_by(self.function, module, *given)


_passing: ContextVar[Passing | None] = ContextVar("seer_passing", default=None)


def passing() -> Passing | None:
    """The forward of that kind that is under way in this context."""
    return _passing.get()


def set_passing(value: bool) -> None:
    """Say in the context of a forward whether it is one of that kind."""
    if value or _passing.get() is not None:
        _passing.set(Passing() if value else None)


def is_short(state: ModelState, tokens: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a forward of the decoder, with what is cached before it, has fewer tokens than any layer's min_context,
    and leaves nothing that a later one needs.

    Args:
        state: of the model.
        tokens: ``[B, T]``, or their embeddings.
        args, kwargs: of the decoder's forward.
    """
    if tokens is None or len(args) > 1 or watching():
        return False
    cache = kwargs.get("past_key_values")
    if cache is not None and type(cache) is not DynamicCache:
        return False
    minimum = state.least_min_context(tokens.device)
    if minimum is None or tokens.shape[1] + (0 if cache is None else cache.get_seq_length()) >= minimum:
        return False
    return not (state.decodes and any(layer.remembers for layer in state.layers))


def park(state: ModelState) -> bool:
    """Take the hooks of the layers away, for a forward that needs none; False: they have to stay."""
    compiled = in_compiled_code()
    for layer in state.layers:  # in every short forward: a generator would take as long as the question
        if compiled or not layer.may_park:
            unpark(state)
            return False
    if state.parked:
        return True
    with _lock:
        if state.forwards:
            return False
        for layer in state.layers:
            layer.park_hooks()
        state.parked = True
    return True


def unpark(state: ModelState) -> None:
    """Put them back, if they were taken away. Whoever needs them has put its forward among the open ones before."""
    if not state.parked:
        return
    with _lock:
        if state.parked:
            for layer in state.layers:
                layer.attach_hooks(first=True)
            state.parked = False
