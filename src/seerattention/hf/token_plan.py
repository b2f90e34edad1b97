"""What the layers of one decoding step have in common: one finds it out, and the others repeat it (``plan.py``).

Of a token that is decoded, nothing but the host is slow: what a layer launches takes microseconds. So whatever is the
same in all layers (what kind of mask, cache, positions and policy it is, whether it may be sparse, and what is
launched) is found out in one of them. What a layer has for itself is looked at in each: its cache layer and what is
kept with it, its gate, its tensors.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from ..gates import DecodeGate, TokenStep
from ..gates.step import token_tensors
from .decoding import Decoded, attend_one_token, holds_keys
from .dense import Arguments
from .forward import Call, Forward
from .kept import keep_again, kept_with, take_kept
from .phases import DECODE
from .plan import MOST, Plan
from .recent import remember
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
        step: TokenStep,
        key: Tensor,
    ):
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
        asked = list(step.asked)
        self.shift = 0
        if isinstance(step.query, Tensor):
            asked[0] = captured[0]
            self.shift = step.query.data_ptr() - captured[0].data_ptr()
        tensors = (*asked, *step.attended)
        self.num_asked = len(asked)
        self.geometry = [(x.shape, x.stride(), x.dtype, x.data_ptr() & 15) for x in tensors]
        self.captured = [(x.shape, x.stride(), x.dtype) for x in captured]
        self.key = key.shape, key.stride(), key.storage_offset() - captured[1].storage_offset()
        self.keys_dtype = arguments.key.dtype
        # Memory that is one layer's after the other, as their launches are.
        self.lists, spaces = lists.new_results(), (lists.new_workspace(), attention.new_workspace())
        self.listed = [x.data_ptr() for x in self.lists]
        self.spaces, self.between = spaces, [[] if x is None else [x.data_ptr()] for x in spaces]
        ((self.shape, self.stride, _),) = attention.results

    def prepare(self, call: Call) -> bool:
        """Find the layer's cache, and what is kept with it, which has to be of all tokens before this one."""
        layer, cache = call.layer, self.cache
        mine = layer.phases.get(DECODE)
        gate = None if mine is None else cast("DecodeGate | None", mine.gate)
        if gate is None or gate.num_heads != self.heads or self.model.phases.get(DECODE) is not self.phase:
            return False
        index = cast(Any, call.module.__dict__.get("layer_idx", layer.index))
        past = cache.layers[index] if index < len(cache.layers) else None
        if type(past) is not self.kind:
            return False
        kept = kept_with(past, gate)
        if kept is None or kept.state is None or kept.state.lengths != [self.held] * self.batch:
            return False
        if gate.query_window > 1 and (kept.queries is None or kept.queries.window != gate.query_window):
            return False
        call.cache, call.past, call.kept = cache, past, kept
        call.state, call.last = kept.state, kept.queries
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
        q, k, v = attended = arguments.query, arguments.key, arguments.value
        if [(q.shape, q.dtype), (k.shape, k.dtype), (v.shape, v.dtype)] != self.attended:
            return None
        if not holds_keys(call.past, call, k):
            return None
        if gate.query_window > 1:
            remember(arguments, call, 1)
        call.layer.heads = self.heads
        self.forward.take_call(call.module)
        self.forward.seen.add(call.layer.index)
        out = self._replay(call, gate, attended)
        return attend_one_token(arguments, call, gate, policy, call.state).out if out is None else out

    def _replay(self, call: Call, gate: DecodeGate, attended: tuple[Tensor, Tensor, Tensor]) -> Tensor | None:
        """Launch what the layer of the plan did, ``[B, 1, Hq, D]``; None: it is another step, and nothing is done."""
        query, key, state = call.query, call.key, call.state
        if self.recorded is None or query is None or key is None or state is None or call.kept is None:
            return None
        if [(x.shape, x.stride(), x.dtype) for x in (query, key)] != self.captured:
            return None
        if not state.takes_inside_a_block(self.batch):
            return None
        asked: tuple[Tensor, ...]
        if call.recent is None:
            asked = query, *token_tensors(gate, (call.cos, call.sin))
        else:
            asked = (call.recent.queries,)
        tensors = (*asked, state.complete, *attended)
        addresses = [x.data_ptr() for x in tensors]
        geometry = zip(tensors, addresses, strict=True)
        if [(x.shape, x.stride(), x.dtype, address & 15) for x, address in geometry] != self.geometry:
            return None
        take_kept(call.past)
        shape, stride, offset = self.key
        # What is kept may go on in another mode. No gradients are recorded: see ``call_of``.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            own = key.as_strided(shape, stride, key.storage_offset() + offset)
            state.append_inside_a_block(own if key.dtype == self.keys_dtype else own.to(self.keys_dtype))
        keep_again(call.past, call.kept)
        out = attended[0].new_empty_strided(self.shape, self.stride)
        addresses[0] += self.shift
        (lists, attention), (space, other), end = self.recorded, self.between, self.num_asked
        lists.launch([*addresses[:end], *self.listed, *space])
        attention.launch([*addresses[end:], *self.listed, out.data_ptr(), *other])
        call.query = call.key = None
        return out.transpose(1, 2).contiguous()


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
    forward.plans += 1
    if forward.plans <= MOST:
        forward.repeat(TokenPlan(forward, call, arguments, (query, key), step, decoded.key))
