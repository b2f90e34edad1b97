"""What an attached model carries for one attention layer: gate and policy by phase, and the hooks that feed gates."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import StaticCache

from ..gates import BlockGate, DecodeGate
from ..ops.dispatch import FLOATING_DTYPES
from ..ops.replay import capturing
from ..policies import Policy
from ..selectors import Selector
from .architectures import find_attention
from .forward import Call, current_forward, given_to, present_call, present_plan
from .implementation import NAME
from .kept import kept_keys, kept_queries
from .parking import passing
from .phases import DECODE, PREFILL, LayerPhase, unnoticed
from .sharding import part_of_gate
from .untraced import untraced

if TYPE_CHECKING:
    from .state import ModelState


class LayerState:
    """One attention layer: what it has for each phase, and the three hooks that feed its gates.

    Attributes:
        phases: gate and own policy by phase; the layer is dense in phases that are not in here.
    """

    def __init__(self, model: ModelState, index: int, decoder_layer: nn.Module):
        self.model = model
        self.index, self._name = index, str(index)  # its name among the decoder's layers
        self.decoder_layer = decoder_layer
        self.geometry = model.family.geometry(model.decoder, index)
        self.phases: dict[str, LayerPhase] = {PREFILL: LayerPhase()}
        self.stray = False  # in a copy of the layer alone, without its model: the hooks do nothing
        self.lost = False  # the layer has no attention module any more that could be hooked
        self.heads = self.geometry.num_heads  # as last seen: of those that are spread over processes, a part
        self._parts: dict[int, tuple[tuple[int, ...] | None, BlockGate]] = {}
        self.placement: tuple[torch.device, torch.dtype] | None = None
        # Where the parameter is that the gates follow: a module's dict of parameters, and its name in there.
        self._guide: tuple[dict[str, Any], str] | None = None
        self._hooks: list[Any] = []
        self._hooked: tuple[nn.Module, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerState:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        with_model = not self.stray and id(self.model.decoder) in memo
        twin.__dict__ = copy.deepcopy(self.__dict__, memo) if with_model else {"stray": True}
        return twin

    @property
    def attention(self) -> nn.Module:
        """The attention module, inside of adapters that wrap it.

        Raises:
            AttributeError: there is none of the kind that the family has.
        """
        return find_attention(self.decoder_layer, self.model.family)

    @property
    def gate(self) -> BlockGate | None:
        """The gate of prefill."""
        return self.phases[PREFILL].gate

    @property
    def policy(self) -> Policy | None:
        """The layer's own policy of prefill."""
        return self.phases[PREFILL].policy

    @property
    def decode_gate(self) -> DecodeGate | None:
        """The gate of decoding."""
        return cast("DecodeGate | None", self.phases.get(DECODE, LayerPhase()).gate)

    @property
    def decode_policy(self) -> Policy | None:
        """What chooses for the gate of decoding: the layer's own policy, or that of the model."""
        mine, model = self.phases.get(DECODE), self.model.phases.get(DECODE)
        return None if mine is None or model is None else mine.policy or model.policy

    @property
    def decodes(self) -> bool:
        """Whether the layer decodes sparsely."""
        selector = self.selector(DECODE)
        return selector is not None and not selector.dense

    @property
    def remembers(self) -> bool:
        """Whether tokens choose together with those before them when it decodes, so that it keeps their queries."""
        gate = self.decode_gate
        return gate is not None and gate.query_window > 1 and self.decodes

    def set_phase(self, phase: str, **changes: Any) -> None:
        """Change entries of the layer's :class:`LayerPhase`."""
        self.phases[phase] = replace(self.phases.get(phase, LayerPhase()), **changes)

    def set_query_window(self, tokens: int) -> None:
        """Change how many tokens choose together in decoding, where the layer has a gate for it."""
        if self.decode_gate is not None:
            self.decode_gate.set_query_window(tokens)
            self._parts.clear()  # gates of other heads were made with the old one

    def selector(self, phase: str) -> Selector | None:
        """What chooses the layer's blocks in a phase; None: it is dense."""
        mine, model = self.phases.get(phase), self.model.phases.get(phase)
        return None if mine is None or model is None else mine.selector(model)

    @property
    def may_be_sparse(self) -> bool:
        """Whether the layer attends sparsely to some prompts."""
        selector = self.selector(PREFILL)
        return selector is not None and (selector.needs_gate or not self.window_is_its_own)

    @property
    def window_is_its_own(self) -> bool:
        """Whether the layer has a sliding window that other layers of the model do not have: it never gets a gate."""
        return self.geometry.window is not None and any(layer.geometry.window is None for layer in self.model.layers)

    def attach_hooks(self, first: bool = False) -> None:
        """Hook the present modules; ``first``: before hooks that came in the meantime."""
        attention, family = self.attention, self.model.family
        query, key = getattr(attention, family.query), getattr(attention, family.key)
        if self._hooked != (attention, query, key):
            self._hooked, self._guide = (attention, query, key), None
        hook = attention.register_forward_pre_hook(self._before_attention, with_kwargs=True, prepend=first)
        self._hooks.append(hook)
        self._hooks.append(query.register_forward_hook(self._after_query, prepend=first))
        self._hooks.append(key.register_forward_hook(self._after_key, prepend=first))

    def remove_hooks(self) -> None:
        self.park_hooks()
        self._hooked = ()

    def park_hooks(self) -> None:
        """Take them away, and know which modules had them."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @property
    def may_park(self) -> bool:
        """Whether nobody can tell if the hooks are there: nothing is wrapped, replaced or compiled, and there are no
        other hooks beside them. (Queries and keys may be one module, with both hooks.)"""
        if self.lost or not self.is_present(self.model.decoder):
            return False
        attention, query, key = self._hooked
        for module in (self.decoder_layer, attention, query, key):
            if module._compiled_call_impl is not None:
                return False
        if not self._hooks:  # they are put back before those that came in the meantime
            return True
        of_outputs = len(query._forward_hooks) + len(key._forward_hooks)
        return len(attention._forward_pre_hooks) == 1 and of_outputs == (4 if query is key else 2)

    def follow_modules(self, decoder: nn.Module) -> None:
        """Hook the present modules: adapters (LoRA) that came after attach put modules of their own there."""
        family = self.model.family
        layers = cast(nn.ModuleList, decoder.layers)
        try:
            attention = find_attention(layers[self.index], family)
        except (AttributeError, IndexError):
            self.lost = True
            return
        present = (attention, getattr(attention, family.query), getattr(attention, family.key))
        if all(a is b for a, b in zip(present, self._hooked, strict=True)) or self._hooks_are_in(present):
            return
        self.remove_hooks()
        self.decoder_layer, self.lost = layers[self.index], False
        self.attach_hooks()

    def is_present(self, decoder: nn.Module) -> bool:
        """Whether the hooked modules are where they were, and not wrapped: nearly always so, in every forward."""
        family = self.model.family
        try:
            layer = decoder._modules["layers"]._modules[self._name]  # type: ignore[union-attr]
            attention = layer._modules["self_attn"]  # type: ignore[union-attr]
            inner = attention._modules  # type: ignore[union-attr]
            return layer is self.decoder_layer and self._hooked == (attention, inner[family.query], inner[family.key])
        except (AttributeError, KeyError, TypeError):  # wrapped, or not there
            return False

    def _hooks_are_in(self, modules: tuple[nn.Module, ...]) -> bool:
        """Replicas of a module on other devices (DataParallel) share its dicts of hooks."""
        attention, query, key = modules
        places = (attention._forward_pre_hooks, query._forward_hooks, key._forward_hooks)
        return all(hook.id in place for hook, place in zip(self._hooks, places, strict=True))

    def place_gate(self, device: torch.device | None = None) -> None:
        """Move the gates where the layer went, or at least to ``device`` (offloaded layers have no place of their own).

        Only a *change* of the layer changes the dtype: trainers may keep the gate in float32. Quantized layers have
        parameters of other dtypes, in which gates cannot compute.
        """
        gates = [phase.gate for phase in self.phases.values() if phase.gate is not None]
        if not gates or self._in_place(gates, device):
            return
        self._guide = None
        parameter = None if self.lost else self._find_guide()
        placement = None if parameter is None else (parameter.device, parameter.dtype)
        moved = placement is not None and placement != self.placement
        with torch.inference_mode(False):  # tensors made in inference mode could never be trained or loaded into
            for gate in gates:
                if placement is not None and moved:
                    self.placement = placement
                    gate.to(device=placement[0], dtype=placement[1])
                if device is not None and next(gate.parameters()).device != device:
                    gate.to(device)

    def gate_of(self, heads: int, gate: BlockGate | None) -> BlockGate | None:
        """``gate`` for the query heads that this process has."""
        self.heads = heads
        if gate is None or gate.num_heads == heads:
            return gate
        name = (heads, *(parameter.data_ptr() for parameter in gate.parameters()))  # gates move
        known, part = self._parts.get(id(gate), (None, gate))
        if known != name:
            part = part_of_gate(gate, heads, self.model.head_rank)
            self._parts[id(gate)] = name, part
        return part

    def _find_guide(self) -> Tensor | None:
        """The first parameter of the layer's attention that gates can follow."""
        for module in self.attention.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.dtype in FLOATING_DTYPES and not parameter.is_meta:
                    self._guide = module._parameters, name
                    return parameter
        return None

    def _in_place(self, gates: list[BlockGate], device: torch.device | None) -> bool:
        """Whether nothing has moved since the gates were placed: to walk through all parameters takes long, and is
        asked for in every call."""
        if self._guide is None or self.placement is None:
            return False
        parameters, name = self._guide
        guide, (place, dtype) = parameters.get(name), self.placement
        if guide is None or guide.dtype != dtype or guide.device != place or device not in (None, place):
            return False
        return all(_first_parameter(gate).device == place for gate in gates)

    def before_rope(self, call: Call) -> tuple[Tensor, Tensor]:
        """The captured queries and keys before RoPE, ``[B, H, T, D]``."""
        if call.before_rope is None:
            if call.query is None or call.key is None:
                raise RuntimeError(
                    f"layer {self.index}: the queries and keys before RoPE were not seen; the attention module no "
                    f"longer calls its {self.model.family.query} and {self.model.family.key}; detach before changing "
                    "modules"
                )
            call.before_rope = self.model.family.before_rope(call.query, call.key, self.geometry)
        return call.before_rope

    def take(self, call: Call) -> tuple[Tensor, Tensor]:
        """What :meth:`before_rope` gives; the call lets go of them."""
        taken = self.before_rope(call)
        call.query = call.key = call.before_rope = None
        return taken

    def _before_attention(self, module: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        if self.stray or kwargs is None:  # taken away by another thread while the hooks of a call were gone through
            return
        if not torch.compiler.is_dynamo_compiling():
            plan = present_plan()
            if plan is not None and plan.model is self.model and plan.begin(self, module, args, kwargs):
                return
        if kwargs.get("cache") is not None and "Paged" in type(kwargs["cache"]).__name__:
            raise NotImplementedError(
                "continuous batching is not supported with gates attached; call seerattention.detach(model) first"
            )
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        if hidden is None or unnoticed(hidden.shape[1], self.model.decodes):
            return
        table = kwargs.get("position_embeddings", args[1] if len(args) > 1 else None)
        self._begin(module, table, (args, kwargs), hidden, torch.compiler.is_compiling())

    @untraced("Dynamo does not know contexts")
    def _begin(
        self,
        module: nn.Module,
        table: tuple[Tensor, Tensor] | None,
        given: tuple[tuple[Any, ...], dict[str, Any]],
        hidden: Tensor,
        compiled: bool,
    ) -> None:
        forward = current_forward()
        if forward is None or forward.state is not self.model:
            # Layers are run again for the gradients of checkpointing, and another thread may have put hooks back.
            silent = hidden.shape[1] == 1 or module.training or passing() is not None
            if forward is None and not silent and module.config._attn_implementation == NAME:  # type: ignore
                self.model.warn_once(
                    "outside",
                    "seerattention: a layer that is called outside of a forward of its decoder is attended densely, "
                    "because nothing is known there of the whole prompt",
                )
            return
        implementation = module.config._attn_implementation  # type: ignore[union-attr]
        if implementation != NAME and any(config is module.config for config, _ in self.model.configs):
            if self.model.detached:
                return
            raise RuntimeError(
                f"the attention implementation was changed to {implementation!r} while a forward of this model was "
                "under way; run it again"
            )
        forward.called.add(self.index)
        if table is not None:
            kwargs = given[1]
            cache = kwargs.get("past_key_values")
            call = Call(self, module, *table, position_ids=kwargs.get("position_ids"))
            call.given = None if compiled else (given_to(*given), hidden.shape)
            if isinstance(cache, StaticCache) and capturing(hidden.device):
                call.unreadable = True
            elif isinstance(cache, StaticCache):
                held = forward.tokens_in(cache, call.module.layer_idx, kwargs.get("cache_position"))  # type: ignore
                call.valid_keys = held + hidden.shape[1]
            if (decodes := forward.decoded_of(hidden.shape[1]) > 0) or self.remembers:
                self.look_into(call, cache, decodes)
            forward.begin(call, keeper=None if compiled else hidden)  # compiled code may drop its arguments early

    def look_into(self, call: Call, cache: Any, decodes: bool) -> None:
        """Find the cache layer of decoded tokens, and of others whose queries are kept, before they are in it."""
        gate, call.cache = self.decode_gate, cache
        call.past = self.cache_layer(call)
        if gate is not None and call.past is not None:
            mine = self.gate_of(self.heads, gate)
            assert mine is not None
            in_place = call.valid_keys is not None
            if decodes:
                call.state = kept_keys(call.past, mine, in_place=in_place)
            if gate.query_window > 1:
                call.last = kept_queries(call.past, mine, in_place=in_place)

    def cache_layer(self, call: Call) -> Any:
        """The cache layer of a call, or None. Some caches have none before its first tokens are in it."""
        layers, index = getattr(call.cache, "layers", ()), getattr(call.module, "layer_idx", self.index)
        return layers[index] if self.decodes and index < len(layers) else None

    # Two hooks that share no code: in one function for both, Dynamo breaks its graph at more places.
    def _after_query(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self.stray:
            return
        if torch.compiler.is_dynamo_compiling():
            if self._captures(output):
                self._keep(query=output)
        elif (call := present_call()) is not None and call.layer is self:
            call.query = output

    def _after_key(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self.stray:
            return
        if torch.compiler.is_dynamo_compiling():
            if self._captures(output):
                self._keep(key=output)
        elif (call := present_call()) is not None and call.layer is self:
            call.key = output

    def _captures(self, output: Tensor) -> bool:
        """Whether what a submodule gave is kept: prompts are, for observers too, and tokens for a decode gate."""
        return not unnoticed(output.shape[self.model.family.token_axis], DECODE in self.phases)

    @untraced("Dynamo does not know contexts")
    def _keep(self, query: Tensor | None = None, key: Tensor | None = None) -> None:
        """A call that has both tensors waits for the attention function, which takes them."""
        forward = current_forward()
        call = None if forward is None else forward.call
        if call is not None and call.layer is self:
            call.query = call.query if query is None else query
            call.key = call.key if key is None else key


def _first_parameter(gate: BlockGate) -> Tensor:
    """As ``next(gate.parameters())``, which takes microseconds."""
    for parameter in gate._parameters.values():
        if parameter is not None:
            return parameter
    return next(gate.parameters())
