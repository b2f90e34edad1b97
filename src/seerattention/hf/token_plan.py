"""What the layers of one decoding step have in common: one finds it out, and the others repeat it (``plan.py``).

Of a token that is decoded, nothing but the host is slow: what a layer launches takes microseconds. So whatever is the
same in all layers (what kind of mask, cache, positions and policy it is, whether it may be sparse, and what is
launched) is found out in one of them. What a layer has for itself is looked at in each: its cache layer and what is
kept with it, its gate, its tensors.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..gates import DecodeGate
from ..gates.query_state import Recent
from ..gates.step import token_parameters, token_tables
from ..ops.replay import capturing
from .decoding import Decoded, attend_one_token, holds_keys
from .dense import Arguments
from .forward import Call, Forward
from .kept import Kept, keep_again, kept_with, take_kept
from .phases import DECODE
from .plan import MOST, Plan
from .recent import remember_token
from .untraced import in_compiled_code


class TokenPlan(Plan):
    """Of one token on a cache without padding. Made by :func:`make_token_plan`."""

    single = True

    def __init__(
        self,
        forward: Forward,
        call: Call,
        arguments: Arguments,
        captured: tuple[Tensor, Tensor],
        decoded: Decoded,
    ):
        step, key, state = decoded.step, decoded.key, decoded.state
        assert step is not None
        assert key is not None
        assert state is not None
        super().__init__(forward, call, arguments)
        gate = step.gate
        self.phase, self.policy = forward.state.phases[DECODE], step.policy
        self.gate_config, self.block_size, self.heads = gate.config, gate.block_size, gate.num_heads
        self.cache, self.kind = call.cache, type(call.past)
        self.batch, self.held = arguments.query.shape[0], arguments.key.shape[2] - 1
        self.attended = [(x.shape, x.dtype) for x in step.attended]
        # What is launched, and of which tensors; None: each layer finds that out.
        self.recorded = step.recorded()
        if isinstance(step.query, Tensor) and not _is_view(step.query, captured[0]):
            self.recorded = None
        if self.recorded is None or not _is_view(key, captured[1]):
            self.recorded = None
            return
        lists, attention = self.recorded
        self.gate_geometry = () if isinstance(step.query, Recent) else _geometry(*token_parameters(gate))
        self.tables = [x.data_ptr() for x in token_tables(gate, step.tables)] if self.gate_geometry else []
        asked, vectors = step.query.queries if isinstance(step.query, Recent) else captured[0], state.vectors
        assert vectors is not None
        self.geometry = _geometry(asked, *captured, vectors, *step.attended)
        self.shift = step.query.data_ptr() - captured[0].data_ptr() if isinstance(step.query, Tensor) else 0
        self.key = key.shape, key.stride(), key.storage_offset() - captured[1].storage_offset()
        # Memory that is one layer's after the other, as their launches are.
        self.lists, spaces = lists.new_results(), (lists.new_workspace(), attention.new_workspace())
        self.listed = [x.data_ptr() for x in self.lists]
        self.spaces, self.between = spaces, [[] if x is None else [x.data_ptr()] for x in spaces]
        ((shape, stride, _),) = attention.results
        self.shape = (shape[0], 1, *shape[1::2])  # a token's heads lie side by side
        if shape[2] != 1 or stride[:2] != (shape[1] * shape[3], shape[3]) or stride[3] != 1:
            self.recorded = None

    def prepare(self, call: Call) -> bool:
        """Find the layer's cache, and what is kept with it, which has to be of all tokens before this one; and look at
        what chooses in the layer."""
        layer, cache = call.layer, self.cache
        mine = layer.phases.get(DECODE)
        if mine is None or self.model.phases.get(DECODE) is not self.phase:
            return False
        gate: Any = mine.gate
        if gate is None or gate.num_heads != self.heads or gate.block_size != self.block_size:
            return False
        if gate.config is not self.gate_config and gate.config != self.gate_config:
            return False
        if mine.policy is not None and mine.policy != self.policy:
            return False
        if mine.policy is None and self.phase.policy is not self.policy and self.phase.policy != self.policy:
            return False
        index = call.module.__dict__.get("layer_idx", layer.index)
        past = cache.layers[index] if index < len(cache.layers) else None
        if type(past) is not self.kind:
            return False
        kept = kept_with(past, gate)
        if kept is None or kept.state is None or kept.state.lengths != [self.held] * self.batch:
            return False
        if gate.query_window > 1 and (kept.queries is None or kept.queries.window != gate.query_window):
            return False
        call.cache, call.past, call.kept, call.decides = cache, past, kept, mine
        call.state, call.last = kept.state, kept.queries
        return True

    def attend(self, arguments: Arguments) -> Tensor | None:
        call = self.call_of(arguments)
        if call is None or call.state is None or call.kept is None:
            return None
        layer = call.layer
        mine = layer.phases.get(DECODE)
        if mine is None or mine is not call.decides or self.model.phases.get(DECODE) is not self.phase:
            return None  # changed since the call began
        q, k, v = attended = arguments.query, arguments.key, arguments.value
        if [(q.shape, q.dtype), (k.shape, k.dtype), (v.shape, v.dtype)] != self.attended:
            return None
        if call.past.keys is not k and not holds_keys(call.past, call, k):
            return None
        gate: Any = mine.gate
        if gate._parameters["q_linear"].device != self.device:
            return None
        if gate.query_window > 1:
            remember_token(call, gate)
        layer.heads = self.heads
        self.forward.take_call(call.module)
        self.forward.seen.add(layer.index)
        out = self._replay(call, gate, attended)
        return attend_one_token(arguments, call, gate, self.policy, call.state).out if out is None else out

    def _replay(self, call: Call, gate: DecodeGate, attended: tuple[Tensor, Tensor, Tensor]) -> Tensor | None:
        """Launch what the layer of the plan did, ``[B, 1, Hq, D]``; None: it is another step, and nothing is done."""
        query, key, state, kept = call.query, call.key, call.state, call.kept
        if self.recorded is None or query is None or key is None or state is None or kept is None:
            return None
        vectors, (q, k, v) = state.vectors, attended
        if not state.room or vectors is None or key.dtype != k.dtype:
            return None
        asked = query if call.recent is None else call.recent.queries
        if _geometry(asked, query, key, vectors, q, k, v) != self.geometry:
            return None
        parameters = self._parameters(gate, kept)
        if parameters is None:
            return None
        take_kept(call.past)
        shape, stride, offset = self.key
        state.append_inside_a_block(key.as_strided(shape, stride, key.storage_offset() + offset))
        keep_again(call.past, kept)
        out = q.new_empty(self.shape)
        (lists, attention), (space, other), listed = self.recorded, self.between, self.listed
        lists.launch([asked.data_ptr() + self.shift, *self.tables, *parameters, vectors.data_ptr(), *listed, *space])
        attention.launch([q.data_ptr(), k.data_ptr(), v.data_ptr(), *listed, out.data_ptr(), *other])
        call.query = call.key = None
        return out

    def _parameters(self, gate: DecodeGate, kept: Kept) -> list[int] | None:
        """Addresses of what a token is encoded with; None: it is other than that of the plan."""
        if not self.gate_geometry:  # it is encoded already
            return []
        if kept.noted is None:  # good as long as the gate is as it was
            tensors = token_parameters(gate)
            kept.noted = _geometry(*tensors), [x.data_ptr() for x in tensors]
        geometry, addresses = kept.noted
        return addresses if geometry == self.gate_geometry else None


def _geometry(*tensors: Tensor) -> tuple[Any, ...]:
    """What launches follow from."""
    return tuple([(x.shape, x.stride(), x.dtype, x.data_ptr() & 15) for x in tensors])


def _is_view(x: Tensor, of: Tensor) -> bool:
    return x.untyped_storage().data_ptr() == of.untyped_storage().data_ptr()


def make_token_plan(
    forward: Forward, call: Call, arguments: Arguments, captured: tuple[Tensor | None, Tensor | None], decoded: Decoded
) -> None:
    """Leave a plan after a layer that attended one token at once, if others can repeat it.

    Args:
        forward, call, arguments, decoded: of that layer.
        captured: what the two submodules gave.
    """
    (query, key), step = captured, decoded.step
    if step is None or decoded.key is None or query is None or key is None:
        return
    if step.gate is not call.layer.decode_gate or forward.state.phases[DECODE].selector is not None:
        return
    if call.given is None or call.part or call.valid_keys is not None or in_compiled_code():
        return
    if capturing(arguments.query.device):  # in which nothing may be kept
        return
    forward.plans += 1
    if forward.plans <= MOST:
        forward.repeat(TokenPlan(forward, call, arguments, (query, key), decoded))
