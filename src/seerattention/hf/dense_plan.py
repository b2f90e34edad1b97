"""What the layers of a forward that is dense throughout have in common: nothing is to be looked at (``plan.py``).

Of short prompts the host is what a forward waits for in a small model, so what is decided in each layer would make the
prompts slow that are too short to be made faster. One layer finds out that all of them are dense, and why; those that
follow go straight to the attention that the model came with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .conditions import ASKED_FOR, BELOW_MIN_CONTEXT
from .dense import Arguments, attend_by, dense_function
from .forward import Call, Forward
from .implementation import original_of
from .phases import DECODE
from .plan import Plan
from .untraced import in_compiled_code

if TYPE_CHECKING:
    from .layer import LayerState

# Of all layers of a forward, and on all devices of one kind.
_OF_ALL = (ASKED_FOR, BELOW_MIN_CONTEXT)


class DensePlan(Plan):
    """Of a prompt, or a chunk of one, that no layer attends sparsely. Made by :func:`make_dense_plan`."""

    single = False

    def __init__(self, forward: Forward, call: Call, arguments: Arguments):
        assert call.given is not None
        self.forward, self.model = forward, forward.state
        (_, named), self.shape = call.given
        self.cache = named.get("past_key_values")
        self.function = dense_function(call.module, "sdpa")
        self.keys, self.device = arguments.key.shape[2], arguments.query.device
        self.module: nn.Module | None = None  # which is under way
        self.layer = call.layer.index

    def begin(self, layer: LayerState, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if hidden is None or hidden.shape != self.shape or hidden.device != self.device:
            return False
        if kwargs.get("past_key_values") is not self.cache or layer.geometry.window is not None:
            return False
        if DECODE in layer.phases and layer.remembers:  # the queries of these tokens
            return False
        self.module, self.layer = module, layer.index
        self.forward.called.add(layer.index)
        return True

    def attend(self, arguments: Arguments) -> Tensor | None:
        mine, self.module = self.module is arguments.module, None
        if not mine or arguments.key.shape[2] != self.keys:
            return None
        self.forward.seen.add(self.layer)
        return attend_by(self.function, *arguments)[0]


def make_dense_plan(forward: Forward, call: Call, arguments: Arguments) -> None:
    """Leave a plan after a layer that attended a prompt densely for a reason that is one of all layers.

    Not where somebody looks on, nor where the attention probabilities may be asked for.
    """
    if call.reason not in _OF_ALL or call.given is None or call.part or call.valid_keys is not None:
        return
    if forward.observers or forward.statistics or call.layer.remembers or call.layer.geometry.window is not None:
        return
    if original_of(call.module.config) == "sdpa" and not in_compiled_code():
        forward.repeat(DensePlan(forward, call, arguments))
