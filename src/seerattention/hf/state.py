"""What an attached model carries: one ``ModelState`` on its decoder, one ``LayerState`` per attention layer.

Neither is an ``nn.Module``, so gates stay out of the base model's parameters and state dict; both are reachable from
the model's hooks and attributes only (no globals), so deep copies and several models in one process just work. What
belongs to one forward is not here (``forward.py``).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache

from ..blocks import BlockIndices
from ..config import GateConfig
from ..gates import BlockGate
from ..ops.dispatch import FLOATING_DTYPES
from ..policies import Policy
from .architectures import Family, Geometry, find_attention, find_decoder, sliding_window
from .forward import Call, Forward, current_forward, watching
from .implementation import NAME, StandIn

_ATTRIBUTE = "_seer_attention"

Selector = Callable[..., BlockIndices]


@dataclass(frozen=True)
class LayerInputs:
    """What one attention layer sees at prefill; rows are right-padded, whatever the padding of the batch.

    Attributes:
        layer: index of the layer.
        q: ``[B, Hq, T, D]`` after RoPE.
        k, v: ``[B, Hkv, T, D]``, k after RoPE.
        q_pre, k_pre: the same as q and k before RoPE (what gates read).
        cos, sin: ``[B or 1, T, rotary_dim]``, the model's rotary table at the tokens' positions.
        lengths: int64 ``[B]``, valid tokens of each row; None: all.
        scale: softmax scale of the attention.
        gate: the layer's gate, or None (a sliding-window layer, or a model attached with a selector only).
        lse: float32 ``[B, Hq, T]``, log-sum-exp of the scaled causal logits of each query, where the layer was attended
            densely by a kernel that returns it; else None. What ``ops.pooled_attention`` need not compute again.
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

    def gate_logits(self, rows: Tensor | None = None, *, masked: bool = True) -> Tensor:
        """Block logits of the layer's gate, float32 ``[B, Hq, R, N]``; ``rows`` and ``masked`` as in its forward.

        Raises:
            ValueError: the layer has no gate.
        """
        if self.gate is None:
            raise ValueError(f"layer {self.layer} has no gate (sliding window, or attached without gates)")
        return self.gate(self.q_pre, self.k_pre, self.cos, self.sin, rows=rows, lengths=self.lengths, masked=masked)


Observer = Callable[[LayerInputs, "BlockIndices | None"], None]


@dataclass(eq=False)
class ModelState:
    """Everything that belongs to one attached model.

    Attributes:
        decoder: the module whose forward is one forward of the model.
        register: makes the attention implementation known to transformers. It travels with copies and pickles: a
            process that unpickles a model may never have attached one.
        configs: the decoder's config objects, with what stands in them while they are attached.
        others: config objects of other parts of the model, with their implementations.
        detached: set by detach; forwards that are under way then end with an error where they were sparse before.
    """

    decoder: nn.Module
    family: Family
    geometry: Geometry
    gate_config: GateConfig | None
    policy: Policy
    selector: Selector | None
    min_context: int | None
    register: Callable[[], None]
    configs: list[tuple[Any, StandIn]] = field(default_factory=list)
    others: list[tuple[Any, str | None]] = field(default_factory=list)
    layers: list[LayerState] = field(default_factory=list)
    warned: set[str] = field(default_factory=set)
    detached: bool = False
    # What this model did: prompts attended sparsely, and prompts attended densely for their gradients.
    ran_sparse: bool = False
    ran_gradients: bool = False
    _forwards: set[Forward] = field(default_factory=set)
    _hooks: list[Any] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_forwards": set()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.register()
        for _, stand_in in self.configs:
            stand_in.owners.add(self)

    @property
    def block_size(self) -> int:
        return self.gate_config.block_size if self.gate_config is not None else 64

    def warn_once(self, reason: str, message: str) -> None:
        """Warn about each reason once per attached model."""
        if reason not in self.warned:
            self.warned.add(reason)
            warnings.warn(message, UserWarning, stacklevel=2)

    def attach_hooks(self) -> None:
        self._hooks.append(self.decoder.register_forward_pre_hook(self._before_forward, with_kwargs=True))
        self._hooks.append(self.decoder.register_forward_hook(self._after_forward, always_call=True))

    def remove_hooks(self) -> None:
        """Forwards that are under way keep the hook that ends them."""
        for layer in self.layers:
            layer.remove_hooks()
        for forward in tuple(self._forwards):
            forward.close()
        for hook in self._hooks[: 1 if self._forwards else None]:
            hook.remove()

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        single = tokens is not None and tokens.shape[1] == 1
        if not self._aligned():
            self._align()
        if self._standing() and not (single and not watching()):
            self._open(module, single, torch.compiler.is_compiling())

    def _standing(self) -> bool:
        return self.decoder.config._attn_implementation == NAME  # type: ignore[union-attr]

    def _aligned(self) -> bool:
        """Whether every config has its stand-in; where not, the implementation was changed."""
        for config, stand_in in self.configs:
            if config._attn_implementation_internal is not stand_in:
                return False
        return True

    @torch.compiler.disable(reason="configs are changed")
    def _align(self) -> None:
        """Make a change of the implementation one of all parts or of none: the decoder's own config decides."""
        standing = self._standing()
        implementation = self.decoder.config._attn_implementation  # type: ignore[union-attr]
        for config, stand_in in self.configs:
            present = config._attn_implementation
            if standing or present == NAME:
                config._attn_implementation_internal = stand_in if standing else implementation
        for config, original in self.others:
            if config._attn_implementation == NAME and not isinstance(config._attn_implementation, StandIn):
                config._attn_implementation_internal = original
        if not standing:
            self.warn_once(
                "implementation",
                f"the attention implementation was changed to {implementation!r} after gates were attached, so "
                f"attention is dense; model.set_attn_implementation({NAME!r}) turns them on again",
            )

    @torch.compiler.disable(reason="Dynamo does not know contexts")
    def _open(self, module: nn.Module, single: bool, compiled: bool) -> None:
        forward = Forward(self, module, compiled)
        self._forwards.add(forward)
        if not single:
            for layer in self.layers:
                layer.follow_modules(module)

    def _after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._forwards:
            self._end(output)

    @torch.compiler.disable(reason="Dynamo does not know contexts")
    def _end(self, output: Any) -> None:
        forward = current_forward()
        if forward is None or forward.state is not self:
            return
        forward.leave()
        self._forwards.discard(forward)
        if self.detached and not self._forwards:
            for hook in self._hooks:
                hook.remove()
        if output is None:  # it ends with an error
            return
        if self.detached and forward.sparse:
            raise RuntimeError(
                "gates were detached while this forward was under way: some of its layers were attended sparsely and "
                "the others densely; run it again"
            )
        self._report_unseen(forward)

    def _report_unseen(self, forward: Forward) -> None:
        """Warn about layers that should be sparse, but whose attention never came to the attention function."""
        if not forward.called and not any(layer.lost for layer in self.layers):
            return
        layers: Any = self.decoder.layers
        unseen = [
            layer.index
            for layer in self.layers
            if layer.may_be_sparse and (layer.lost or layer.index in forward.called - forward.seen)
        ]
        unseen += range(len(self.layers), min(len(layers), self.decoder.config.num_hidden_layers))  # type: ignore
        if unseen and not self.detached:
            self.warn_once(
                "unseen",
                f"seerattention: layers {', '.join(map(str, unseen))} are not attended sparsely: their attention modules "
                "were replaced or patched and do not call transformers' attention interface with themselves, or they "
                "came after attach; detach before changing modules and attach again",
            )


class LayerState:
    """One attention layer: its gate, its policy where it differs from the model's, and the three hooks that feed it."""

    def __init__(self, model: ModelState, index: int, decoder_layer: nn.Module):
        self.model = model
        self.index = index
        self.decoder_layer = decoder_layer
        self.window = sliding_window(model.decoder.config, index)
        self.gate: BlockGate | None = None
        self.policy: Policy | None = None
        self.stray = False  # in a copy of the layer alone, without its model: the hooks do nothing
        self.lost = False  # the layer has no attention module any more that could be hooked
        self._placement: tuple[torch.device, torch.dtype] | None = None
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
    def may_be_sparse(self) -> bool:
        """Whether the layer attends sparsely to some prompts."""
        return self.gate is not None or (self.model.selector is not None and not self.window_is_its_own)

    @property
    def window_is_its_own(self) -> bool:
        """Whether the layer has a sliding window that other layers of the model do not have: it never gets a gate."""
        return self.window is not None and any(layer.window is None for layer in self.model.layers)

    def attach_hooks(self) -> None:
        attention, family = self.attention, self.model.family
        query, key = getattr(attention, family.query), getattr(attention, family.key)
        self._hooked = (attention, query, key)
        self._hooks.append(attention.register_forward_pre_hook(self._before_attention, with_kwargs=True))
        self._hooks.append(query.register_forward_hook(self._after_query))
        self._hooks.append(key.register_forward_hook(self._after_key))

    def remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._hooked = [], ()

    def follow_modules(self, decoder: nn.Module) -> None:
        """Hook the present modules: adapters (LoRA) that came after attach put modules of their own there."""
        family, layers = self.model.family, decoder.layers
        try:
            attention = find_attention(layers[self.index], family)  # type: ignore[index]
        except (AttributeError, IndexError):
            self.lost = True
            return
        present = (attention, getattr(attention, family.query), getattr(attention, family.key))
        if all(a is b for a, b in zip(present, self._hooked, strict=True)) or self._hooks_are_in(present):
            return
        self.remove_hooks()
        self.decoder_layer, self.lost = layers[self.index], False  # type: ignore[index]
        self.attach_hooks()

    def _hooks_are_in(self, modules: tuple[nn.Module, ...]) -> bool:
        """Replicas of a module on other devices (DataParallel) share its dicts of hooks."""
        attention, query, key = modules
        places = (attention._forward_pre_hooks, query._forward_hooks, key._forward_hooks)
        return all(hook.id in place for hook, place in zip(self._hooks, places, strict=True))

    def place_gate(self, device: torch.device | None = None) -> None:
        """Move the gate where its layer went, or at least to ``device`` (offloaded layers have no place of their own).

        Only a *change* of the layer changes the dtype: trainers may keep the gate in float32. Quantized layers have
        parameters of other dtypes, in which gates cannot compute.
        """
        if self.gate is None:
            return
        parameters = () if self.lost else self.attention.parameters()
        parameter = next((p for p in parameters if p.dtype in FLOATING_DTYPES and not p.is_meta), None)
        placement = None if parameter is None else (parameter.device, parameter.dtype)
        with torch.inference_mode(False):  # tensors made in inference mode could never be trained or loaded into
            if placement is not None and placement != self._placement:
                self._placement = placement
                self.gate.to(device=placement[0], dtype=placement[1])
            if device is not None and next(self.gate.parameters()).device != device:
                self.gate.to(device)

    def take(self, call: Call) -> tuple[Tensor, Tensor]:
        """The captured queries and keys before RoPE, ``[B, H, T, D]``; the call lets go of them."""
        if call.query is None or call.key is None:
            raise RuntimeError(
                f"layer {self.index}: the queries and keys before RoPE were not seen; the attention module no longer "
                f"calls its {self.model.family.query} and {self.model.family.key}; detach before changing modules"
            )
        layout, head_dim = self.model.family.layout, self.model.geometry.head_dim
        query, key = layout(call.query, head_dim), layout(call.key, head_dim)
        call.query = call.key = None
        return query, key

    def _before_attention(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.stray:
            return
        if kwargs.get("cache") is not None and "Paged" in type(kwargs["cache"]).__name__:
            raise NotImplementedError(
                "continuous batching is not supported with gates attached; call seerattention.detach(model) first"
            )
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        if hidden is None or (hidden.shape[1] == 1 and not watching()):
            return
        table = kwargs.get("position_embeddings", args[1] if len(args) > 1 else None)
        self._begin(module, table, kwargs, hidden, torch.compiler.is_compiling())

    @torch.compiler.disable(reason="Dynamo does not know contexts")
    def _begin(
        self, module: nn.Module, table: tuple[Tensor, Tensor], kwargs: dict[str, Any], hidden: Tensor, compiled: bool
    ) -> None:
        forward = current_forward()
        if forward is None or forward.state is not self.model:
            silent = hidden.shape[1] == 1 or module.training  # layers are run again for the gradients of checkpointing
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
            static = isinstance(kwargs.get("past_key_values"), StaticCache)
            call = Call(self, module, *table, position_ids=kwargs.get("position_ids"), static_cache=static)
            forward.begin(call, keeper=None if compiled else hidden)  # compiled code may drop its arguments early

    def _after_query(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if not self.stray and output.shape[1] > 1:
            self._keep(query=output)

    def _after_key(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if not self.stray and output.shape[1] > 1:
            self._keep(key=output)

    @torch.compiler.disable(reason="Dynamo does not know contexts")
    def _keep(self, query: Tensor | None = None, key: Tensor | None = None) -> None:
        """A call that has both tensors waits for the attention function, which takes them."""
        forward = current_forward()
        call = None if forward is None else forward.call
        if call is not None and call.layer is self:
            call.query = call.query if query is None else query
            call.key = call.key if key is None else key


def state_of(model: nn.Module) -> ModelState:
    """The state of an attached model.

    Raises:
        ValueError: nothing is attached.
    """
    state = find_decoder(model).__dict__.get(_ATTRIBUTE)
    if state is None:
        raise ValueError("nothing is attached to this model; call seerattention.attach(model, ...) first")
    return state


def is_attached(model: nn.Module) -> bool:
    """Whether gates or a selector are attached to ``model``."""
    return _ATTRIBUTE in find_decoder(model).__dict__


def set_state(decoder: nn.Module, state: ModelState | None) -> None:
    if state is None:
        del decoder.__dict__[_ATTRIBUTE]
    else:
        decoder.__dict__[_ATTRIBUTE] = state


def gates(model: nn.Module) -> list[BlockGate | None]:
    """The gate modules of an attached model by layer, on their layers' devices; None where a layer has no gate."""
    state = state_of(model)
    for layer in state.layers:
        layer.place_gate()
    return [layer.gate for layer in state.layers]


def gated_layers(state: ModelState) -> Iterator[LayerState]:
    return (layer for layer in state.layers if layer.gate is not None)
