"""What the layers of one decoding step have in common: one finds it out, and the others repeat it (``plan.py``).

Of a token that is decoded, nothing but the host is slow: what a layer launches takes microseconds. So whatever is the
same in all layers (what kind of mask, cache, positions and policy it is, and whether it may be sparse) is decided in
one of them. What a layer has for itself is looked at in each: its cache layer and what is kept with it, its gate, its
tensors.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor

from ..gates import DecodeGate
from ..policies import Policy
from .decoding import Decoded, attend_one_token, holds_keys
from .dense import Arguments
from .forward import Call, Forward
from .kept import kept_with
from .phases import DECODE
from .plan import MOST, Plan
from .recent import remember
from .untraced import in_compiled_code


class TokenPlan(Plan):
    """Of one token on a cache without padding. Made by :func:`make_token_plan`."""

    single = True

    def __init__(self, forward: Forward, call: Call, arguments: Arguments, gate: DecodeGate, policy: Policy):
        super().__init__(forward, call, arguments)
        self.phase, self.policy = forward.state.phases[DECODE], policy
        self.gate_config, self.block_size, self.heads = gate.config, gate.block_size, gate.num_heads
        self.cache, self.kind = call.cache, type(call.past)
        tensors = (arguments.query, arguments.key, arguments.value)
        self.geometry = [(x.shape, x.dtype) for x in tensors]
        self.batch, self.held = arguments.query.shape[0], arguments.key.shape[2] - 1

    def prepare(self, call: Call) -> bool:
        """Find the layer's cache, and what is kept with it, which has to be of all tokens before this one."""
        layer, cache = call.layer, self.cache
        mine = layer.phases.get(DECODE)
        gate = None if mine is None else cast("DecodeGate | None", mine.gate)
        if gate is None or gate.num_heads != self.heads or self.model.phases.get(DECODE) is not self.phase:
            return False
        index = getattr(call.module, "layer_idx", layer.index)
        past = cache.layers[index] if index < len(cache.layers) else None
        if type(past) is not self.kind:
            return False
        kept = kept_with(past, gate)
        if kept is None or kept.state is None or kept.state.lengths != [self.held] * self.batch:
            return False
        if gate.query_window > 1 and (kept.queries is None or kept.queries.window != gate.query_window):
            return False
        call.cache, call.past, call.state, call.last = cache, past, kept.state, kept.queries
        return True

    def attend(self, arguments: Arguments) -> Tensor | None:
        call = self.call_of(arguments)
        mine = None if call is None else call.layer.phases.get(DECODE)
        if call is None or mine is None or call.state is None:
            return None
        if self.model.phases.get(DECODE) is not self.phase:  # changed since the call began
            return None
        gate, policy = cast("DecodeGate | None", mine.gate), mine.policy or self.phase.policy
        if gate is None or (policy is not self.policy and policy != self.policy):
            return None
        if gate.config is not self.gate_config and gate.config != self.gate_config:
            return None
        if gate.block_size != self.block_size or gate.q_linear.device != self.device:
            return None
        tensors = (arguments.query, arguments.key, arguments.value)
        if [(x.shape, x.dtype) for x in tensors] != self.geometry or not holds_keys(call.past, call, arguments.key):
            return None
        if call.layer.remembers:
            remember(arguments, call, 1)
        call.layer.heads = self.heads
        self.forward.take_call(call.module)
        self.forward.seen.add(call.layer.index)
        return attend_one_token(arguments, call, gate, policy, call.state)


def make_token_plan(forward: Forward, call: Call, arguments: Arguments, decoded: Decoded) -> None:
    """Leave a plan after a layer that attended one token at once, if others can repeat it."""
    gate, policy, layer = decoded.gate, decoded.policy, call.layer
    if (
        gate is None
        or policy is None
        or gate is not layer.decode_gate
        or forward.state.phases[DECODE].selector is not None
    ):
        return
    if call.given is None or call.part or call.valid_keys is not None or in_compiled_code():
        return
    forward.plans += 1
    if forward.plans <= MOST:
        forward.repeat(TokenPlan(forward, call, arguments, gate, policy))
