"""What the layers of one forward have in common: it is found out in one of them, and the others repeat it.

A layer whose prompt is attended by one replay (``GateSelector.attend_at_once``) leaves a ``PromptPlan``: what its
attention module and its attention function were given, the geometry of its tensors, and the recording. A later layer
that is given the same, has tensors of that geometry and a gate of that kind, launches the recording at its own
addresses and decides nothing. Whatever a layer has for itself is compared with the plan: where anything differs, it
takes the ordinary way, for which its call has all that it needs. ``token_plan.py`` has the plan of decoded tokens.

A plan lives as long as the call of the decoder, whose arguments it holds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..ops.indices import num_blocks
from ..ops.replay import Recording, current_stream, is_current
from ..policies import Policy
from ..selectors import GateSelector, LayerInputs
from .dense import Arguments
from .forward import HIDDEN, Call, Forward
from .phases import DECODE, PREFILL
from .recent import remember
from .untraced import in_compiled_code

if TYPE_CHECKING:
    from .layer import LayerState

# Layers of a forward after which a plan is made; where they all differ, to make more costs more than it gives.
MOST = 16
# Bytes of memory between the launches that a plan keeps from layer to layer; of more, each layer has its own.
MOST_WORKSPACE = 1 << 24

_new = object.__new__


class Plan(ABC):
    """What one layer did, for those that do the same; all on one device and one stream.

    A layer's hook asks :meth:`begin`, its attention function :meth:`attend`.

    Attributes:
        single: whether it is of forwards of one token.
    """

    single: bool

    def __init__(self, forward: Forward, call: Call, arguments: Arguments):
        layer = call.layer
        assert call.given is not None
        self.forward, self.model = forward, forward.state
        # What the attention module is given; how transformers reads its config takes microseconds.
        self.given = call.given
        self.num_named = len(call.given[0][1])
        self.table, self.position_ids = (call.cos, call.sin), call.position_ids
        self.config = call.module.config
        self.standing: dict[str, Any] = vars(self.config)
        self.stand_in = self.standing["_attn_implementation_internal"]
        # What the attention function is given.
        self.mask, self.scaling, self.options = arguments.mask, arguments.scaling, arguments.options
        self.num_options = len(self.options)
        self.min_context, self.window, self.placement = self.model.min_context, layer.geometry.window, layer.placement
        self.device = arguments.query.device
        self.index, self.stream = self.device.index, current_stream(self.device)
        on_gpu = self.device.type == "cuda"  # whose autocast is asked for without a name
        self.autocasts = torch.is_autocast_enabled if on_gpu else partial(torch.is_autocast_enabled, self.device.type)

    @abstractmethod
    def attend(self, arguments: Arguments) -> Tensor | None:
        """``[B, T, Hq, D]`` of a layer that does what that of the plan did; None: it may not, and nothing is done."""

    def begin(self, layer: LayerState, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Begin the call of a layer's attention module, if it is given what that of the plan was."""
        (positional, named), shape = self.given
        hidden = None
        if module.config is not self.config or self.standing["_attn_implementation_internal"] is not self.stand_in:
            return False
        if args:
            hidden, *others = args
            if len(others) != len(positional) or any(x is not y for x, y in zip(others, positional, strict=True)):
                return False
        try:
            for name, x in kwargs.items():
                if name == HIDDEN:
                    hidden = x
                elif named[name] is not x:
                    return False
        except KeyError:
            return False
        if hidden is None or hidden.shape != shape or len(kwargs) != self.num_named + (not args):
            return False
        call = _new(Call)  # its defaults are the class's
        call.layer, call.module, call.position_ids = layer, module, self.position_ids
        call.cos, call.sin = self.table
        call.given = self.given  # by which it is known again
        if not self.prepare(call):
            return False
        forward = self.forward
        forward.called.add(layer.index)
        forward.begin(call, hidden)
        return True

    def prepare(self, call: Call) -> bool:
        """What else a call needs; False: its layer takes the ordinary way."""
        return True

    def call_of(self, arguments: Arguments) -> Call | None:
        """The call that a layer began by this plan, where its attention function is given what that of the plan was,
        and may be sparse as that was; else None."""
        module, query, key, value, mask, dropout, scaling, options = arguments
        call = self.forward.call
        if call is None or call.module is not module or call.given is not self.given:
            return None
        if call.query is None or call.key is None:
            return None
        if dropout or mask is not self.mask or scaling != self.scaling or not self._same_options(options):
            return None
        layer = call.layer
        if module.training or layer.decoder_layer.training or not getattr(module, "is_causal", True):
            return None
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            return None
        if self.model.min_context != self.min_context or layer.geometry.window != self.window or self.autocasts():
            return None
        if layer.placement != self.placement or query.device != self.device:
            return None
        if self.index is not None and not is_current(self.index, self.stream):
            return None
        return call

    def _same_options(self, options: dict[str, Any]) -> bool:
        """Whether the attention function is given the same objects by name."""
        mine = self.options
        try:
            for name, x in options.items():
                if mine[name] is not x:
                    return False
        except KeyError:
            return False
        return len(options) == self.num_options


class PromptPlan(Plan):
    """Of a prompt, or a chunk of one on a cache, that is attended by one replay. Made by :func:`make_plan`."""

    single = False

    def __init__(
        self,
        forward: Forward,
        call: Call,
        arguments: Arguments,
        inputs: LayerInputs,
        captured: tuple[Tensor, Tensor],
        recording: Recording,
    ):
        super().__init__(forward, call, arguments)
        layer, model, gate = call.layer, forward.state, inputs.gate
        assert gate is not None
        self.recording = recording
        # What decides in the layer, and what its gate launches.
        self.phase = model.phases[PREFILL]
        self.policy: Policy = layer.phases[PREFILL].policy or self.phase.policy
        parameters, self.gate_settings = gate.replayed() or ((), ())
        self.columns = num_blocks(inputs.k.shape[2], gate.block_size)
        parameters = (*parameters, *self.policy.tensors(layer.index, self.columns, inputs.q.device))
        # Tensors: as the attention function and as the hooks of the two submodules get them, and the gate's.
        tensors = (arguments.query, arguments.key, arguments.value, *captured, *parameters)
        self.geometry = [(x.shape, x.stride(), x.dtype) for x in tensors]
        self.alignment = [x.data_ptr() & 15 for x in tensors]
        self.shifts = [x.data_ptr() - y.data_ptr() for x, y in zip((inputs.q_pre, inputs.k_pre), captured, strict=True)]
        # The rotary table of all keys: that of the forward, or one of what is cached, too.
        self.key_tables = inputs.cos, inputs.sin
        self.tables = [x.data_ptr() for x in self.key_tables]
        self.cache = call.given and call.given[0][1].get("past_key_values")
        # The result: as it is handed on, or by head, as the recording has it.
        shape, stride, _ = recording.results[0]
        batch, self.heads, length, head_dim = shape
        self.shape, self.by_head = (batch, length, self.heads, head_dim), (shape, stride)
        width = self.heads * head_dim
        handed_on = zip(shape, stride, (length * width, head_dim, width, 1), strict=True)
        self.joined = all(size == 1 or step == wanted for size, step, wanted in handed_on)
        self.workspace = recording.new_workspace() if recording.workspace <= MOST_WORKSPACE else None
        self.between = [] if self.workspace is None else [self.workspace.data_ptr()]

    def prepare(self, call: Call) -> bool:
        if DECODE in call.layer.phases and call.layer.remembers:  # the queries of the last tokens
            call.layer.look_into(call, self.cache, decodes=False)
        return True

    def attend(self, arguments: Arguments) -> Tensor | None:
        call = self.call_of(arguments)
        parameters = None if call is None else self._parameters(call.layer)
        if call is None or parameters is None:
            return None
        query = arguments.query
        assert call.query is not None
        assert call.key is not None
        tensors = (query, arguments.key, arguments.value, call.query, call.key, *parameters)
        addresses = [x.data_ptr() for x in tensors]
        if [(x.shape, x.stride(), x.dtype) for x in tensors] != self.geometry:
            return None
        if [address & 15 for address in addresses] != self.alignment:
            return None
        if DECODE in call.layer.phases and call.layer.remembers:
            remember(arguments, call, 0)
        out = query.new_empty(self.shape) if self.joined else query.new_empty_strided(*self.by_head)
        shift_q, shift_k = self.shifts
        addresses[3] += shift_q
        addresses[4] += shift_k
        addresses[5:5] = self.tables
        addresses += [out.data_ptr(), *self.between]
        if self.workspace is None and (mine := self.recording.new_workspace()) is not None:
            addresses.append(mine.data_ptr())
        self.recording.launch(addresses)
        self.forward.take_call(call.module)
        self.forward.seen.add(call.layer.index)
        return out if self.joined else out.transpose(1, 2).contiguous()

    def _parameters(self, layer: LayerState) -> tuple[Tensor, ...] | None:
        """Of the gate of a layer that decides as that of the plan did, and what the policy has for the layer; None: it
        does not."""
        mine = layer.phases.get(PREFILL)
        if mine is None or self.model.phases.get(PREFILL) is not self.phase:
            return None
        gate, policy = mine.gate, mine.policy or self.phase.policy
        if gate is None or gate.num_heads != self.heads or (policy is not self.policy and policy != self.policy):
            return None
        replayed = gate.replayed()
        if replayed is None or replayed[1] != self.gate_settings or replayed[0][0].device != self.device:
            return None
        layer.heads = self.heads
        return (*replayed[0], *policy.tensors(layer.index, self.columns, self.device))


def make_plan(
    forward: Forward,
    call: Call,
    arguments: Arguments,
    inputs: LayerInputs,
    captured: tuple[Tensor | None, Tensor | None],
    selector: GateSelector,
) -> None:
    """Leave a plan after a layer that was attended by one replay, if others can repeat it.

    Args:
        forward, call, arguments, inputs, selector: of that layer.
        captured: what the two submodules gave, of which ``inputs.q_pre`` and ``inputs.k_pre`` are to be views.
    """
    query, key = captured
    if call.given is None or call.part or call.valid_keys is not None or in_compiled_code():
        return
    if query is None or key is None or call.cos.device != arguments.query.device or arguments.query.shape[2] == 1:
        return
    if forward.state.phases[PREFILL].selector is not None or inputs.gate is not call.layer.gate:
        return
    views = zip((inputs.q_pre, inputs.k_pre), (query, key), strict=True)
    if any(x.untyped_storage().data_ptr() != y.untyped_storage().data_ptr() for x, y in views):
        return
    forward.plans += 1
    recording = selector.recording(inputs) if forward.plans <= MOST else None
    if recording is not None and [dtype for *_, dtype in recording.results] == [inputs.q.dtype]:
        forward.repeat(PromptPlan(forward, call, arguments, inputs, (query, key), recording))
