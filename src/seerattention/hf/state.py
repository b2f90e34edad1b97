"""What an attached model carries: one ``ModelState`` on its decoder, one ``LayerState`` per attention layer.

Neither is an ``nn.Module``, so gates stay out of the base model's parameters and state dict; both are reachable from
the model's hooks and attributes only (no globals), so deep copies and several models in one process just work.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache

from ..blocks import BlockIndices
from ..config import GateConfig
from ..gates import BlockGate
from ..policies import Policy
from .architectures import Family, Geometry, find_decoder
from .stats import Statistics

NAME = "seer"
"""The attention implementation that transformers dispatches to."""

_ATTRIBUTE = "_seer_attention"

# Quantized layers have parameters of other dtypes, in which gates cannot compute.
_GATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

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


@dataclass
class Call:
    """One forward call of one attention layer: what the hooks saw, carried to the attention function as an argument."""

    layer: LayerState
    cos: Tensor
    sin: Tensor
    static_cache: bool
    query: Tensor | None = None
    key: Tensor | None = None


@dataclass
class ModelState:
    """Everything that belongs to one attached model.

    Attributes:
        register: makes the attention implementation known to transformers. It travels with copies and pickles: a
            process that unpickles a model may never have attached one.
    """

    family: Family
    geometry: Geometry
    gate_config: GateConfig | None
    policy: Policy
    selector: Selector | None
    min_context: int | None
    original_config: Any
    config_entries: dict[str, Any]  # of the original config at attach
    register: Callable[[], None]
    layers: list[LayerState] = field(default_factory=list)
    observers: list[Observer] = field(default_factory=list)
    statistics: list[Statistics] = field(default_factory=list)
    dense_depth: int = 0
    warned: set[str] = field(default_factory=set)
    # The positions and mask last looked at (weakly), their in-place versions, and the answer.
    _positions: tuple[tuple[Callable[[], Tensor | None], ...], tuple[int, ...], bool] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: what contexts are open around the original is not theirs."""
        return {**self.__dict__, "observers": [], "statistics": [], "dense_depth": 0, "_positions": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.register()

    @property
    def block_size(self) -> int:
        return self.gate_config.block_size if self.gate_config is not None else 64

    def warn_once(self, reason: str, message: str) -> None:
        """Warn about each reason once per attached model."""
        if reason not in self.warned:
            self.warned.add(reason)
            warnings.warn(message, UserWarning, stacklevel=2)

    def positions_run_on(self, position_ids: Tensor | None, attention_mask: Tensor | None) -> bool:
        """Whether the content's positions rise by one from token to token (they restart in packed sequences).

        All layers of a forward share one tensor of positions, so the answer, which waits for the device, is kept.
        """
        if position_ids is None:
            return True
        if position_ids.dim() != 2:
            return False
        seen = (position_ids, attention_mask)
        versions = tuple(0 if x is None or x.is_inference() else x._version for x in seen)
        memo = self._positions
        if memo is not None and memo[1] == versions and all(ref() is x for ref, x in zip(memo[0], seen, strict=True)):
            return memo[2]
        consecutive = position_ids.diff(dim=-1) == 1
        if attention_mask is not None:
            consecutive = consecutive | ~(attention_mask[:, 1:] & attention_mask[:, :-1])
        answer = bool(consecutive.all())
        self._positions = (tuple((lambda: None) if x is None else weakref.ref(x) for x in seen), versions, answer)
        return answer


class LayerState:
    """One attention layer: its gate, its policy where it differs from the model's, and the three hooks that feed it."""

    def __init__(self, model: ModelState, index: int, decoder_layer: nn.Module, window: int | None):
        self.model = model
        self.index = index
        self.decoder_layer = decoder_layer
        self.window = window
        self.gate: BlockGate | None = None
        self.policy: Policy | None = None
        self._placement: tuple[torch.device, torch.dtype] | None = None
        # The call in flight, by thread: one model may serve several threads.
        self._calls: dict[int, Call] = {}
        self._hooks: list[Any] = []
        self._captured: tuple[nn.Module, nn.Module] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_calls": {}}

    @property
    def attention(self) -> nn.Module:
        return self.decoder_layer.self_attn  # type: ignore[return-value]

    def attach_hooks(self) -> None:
        attention = self.attention
        family = self.model.family
        query, key = getattr(attention, family.query), getattr(attention, family.key)
        self._captured = (query, key)
        self._hooks = [
            attention.register_forward_pre_hook(self._before_attention, with_kwargs=True),
            query.register_forward_hook(self._after_query),
            key.register_forward_hook(self._after_key),
        ]

    def remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._captured = [], None
        self._calls.clear()

    def place_gate(self, device: torch.device | None = None) -> None:
        """Move the gate where its layer went, or at least to ``device`` (offloaded layers have no place of their own).

        Only a *change* of the layer changes the dtype: trainers may keep the gate in float32.
        """
        if self.gate is None:
            return
        parameter = next((p for p in self.attention.parameters() if p.dtype in _GATE_DTYPES and not p.is_meta), None)
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

    def _before_attention(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if kwargs.get("cache") is not None and "Paged" in type(kwargs["cache"]).__name__:
            raise NotImplementedError(
                "continuous batching is not supported with gates attached; call seerattention.detach(model) first"
            )
        implementation = module.config._attn_implementation  # type: ignore[union-attr]
        if implementation != NAME:
            self.model.warn_once(
                "implementation",
                f"the attention implementation was changed to {implementation!r} after gates were attached, so "
                f"attention is dense; model.set_attn_implementation({NAME!r}) turns them on again",
            )
            return None
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        cos, sin = kwargs["position_embeddings"] if "position_embeddings" in kwargs else args[1]
        call = Call(self, cos, sin, static_cache=isinstance(kwargs.get("past_key_values"), StaticCache))
        if hidden.shape[1] > 1:
            self._follow_replaced_modules(module)
            self._calls[_thread()] = call
        return args, {**kwargs, "seer_call": call}

    def _follow_replaced_modules(self, module: nn.Module) -> None:
        """Hook the present projections: adapters (LoRA) that came after attach put modules of their own there."""
        family = self.model.family
        present = (getattr(module, family.query), getattr(module, family.key))
        assert self._captured is not None
        if present[0] is not self._captured[0] or present[1] is not self._captured[1]:
            for hook in self._hooks[1:]:
                hook.remove()
            self._captured = present
            self._hooks[1:] = [
                present[0].register_forward_hook(self._after_query),
                present[1].register_forward_hook(self._after_key),
            ]

    def _after_query(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        call = self._calls.get(_thread()) if self._calls else None
        if call is not None:
            call.query = output
            self._release(call)

    def _after_key(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        call = self._calls.get(_thread()) if self._calls else None
        if call is not None:
            call.key = output
            self._release(call)

    def _release(self, call: Call) -> None:
        """A call that has both tensors travels on its own, as an argument of the attention function."""
        if call.query is not None and call.key is not None:
            del self._calls[_thread()]


@torch.compiler.disable(reason="Dynamo does not know thread ids")
def _thread() -> int:
    return threading.get_ident()


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
