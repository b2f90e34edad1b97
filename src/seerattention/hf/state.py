"""What an attached model carries: one ``ModelState`` on its decoder, one ``LayerState`` (``layer.py``) per attention
layer.

Neither is an ``nn.Module``, so gates stay out of the base model's parameters and state dict; both are reachable from
the model's hooks and attributes only (no globals), so deep copies and several models in one process just work. What
belongs to one forward is not here (``forward.py``).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..blocks import BlockIndices
from ..config import PHASES, GateConfig
from ..gates import BlockGate
from ..policies import Budgets, Policy
from ..selectors import LayerInputs
from .architectures import Family, find_decoder
from .forward import Arguments, Forward, current_forward
from .generation import InPlace, stop_listening
from .implementation import NAME, StandIn
from .min_context import Shape, default_min_context
from .parking import is_short, park, set_passing, unpark
from .phases import PREFILL, ModelPhase, unnoticed
from .untraced import untraced

if TYPE_CHECKING:
    from .layer import LayerState

_ATTRIBUTE = "_seer_attention"

Observer = Callable[[LayerInputs, "BlockIndices | None"], None]


@dataclass(eq=False)
class ModelState:
    """Everything that belongs to one attached model.

    Attributes:
        decoder: the module whose forward is one forward of the model.
        phases: how its layers choose blocks, by phase; what is not in here is dense.
        register: makes the attention implementation known to transformers. It travels with copies and pickles: a
            process that unpickles a model may never have attached one.
        configs: the decoder's config objects, with what stands in them while they are attached.
        others: config objects of other parts of the model, with their implementations.
        budgets: what was fitted for the prefill gates (``measure.calibrate``, or stored with them); None: nothing.
        listeners: what stands in the place of methods of ``generate``.
        head_rank: which part of the heads this process has; None: all are here.
        detached: set by detach; forwards that are under way then end with an error where they were sparse before.
    """

    decoder: nn.Module
    family: Family
    gate_config: GateConfig | None
    phases: dict[str, ModelPhase]
    min_context: int | None
    register: Callable[[], None]
    configs: list[tuple[Any, StandIn]] = field(default_factory=list)
    others: list[tuple[Any, str | None]] = field(default_factory=list)
    layers: list[LayerState] = field(default_factory=list)
    warned: set[str] = field(default_factory=set)
    budgets: Budgets | None = None
    detached: bool = False
    # What this model did: prompts attended sparsely, and prompts attended densely for their gradients.
    ran_sparse: bool = False
    ran_gradients: bool = False
    # Whether a layer decodes sparsely; where none does, forwards of one token pass all hooks by.
    decodes: bool = False
    # Whether keys can be turned back by the rotary table (``history.py``); None: not tried yet.
    turns_back: bool | None = None
    # What the decoder's rotary tables follow from, by kind of layer, once they were seen to be those of its layers.
    tables: dict[str | None, tuple[Any, ...]] = field(default_factory=dict)
    listeners: list[InPlace] = field(default_factory=list)
    # Whether the hooks of the layers are taken away, see ``parking.py``.
    parked: bool = False
    head_rank: int | None = None
    _minimums: dict[torch.device, int] = field(default_factory=dict)
    _forwards: set[Forward] = field(default_factory=set)
    _hooks: list[Any] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_forwards": set(), "_minimums": {}, "tables": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.register()
        for _, stand_in in self.configs:
            stand_in.owners.add(self)

    @property
    def policy(self) -> Policy:
        """The policy of prefill."""
        return self.phases[PREFILL].policy

    @property
    def block_size(self) -> int:
        """Tokens a block of prefill."""
        return self.phases[PREFILL].block_size

    @property
    def forwards(self) -> bool:
        """Whether forwards are under way of which the layers know."""
        return bool(self._forwards)

    def least_min_context(self, device: torch.device) -> int | None:
        """Tokens below which every layer is dense, with inputs on a device; None: where the layers are is not known."""
        if self.min_context is not None:
            return self.min_context
        places = [layer.placement for layer in self.layers]
        if None in places:
            return None
        devices = {device, *(place[0] for place in places if place is not None)}
        return min(self.default_min_context(each) for each in devices)

    def default_min_context(self, device: torch.device) -> int:
        """What ``min_context=None`` means on a device; looked up once."""
        if device not in self._minimums:
            try:
                shape = Shape.of(self.decoder.config)
            except ValueError:
                shape = None
            self._minimums[device] = default_min_context(shape, device)
        return self._minimums[device]

    def set_query_window(self, tokens: int) -> None:
        """Change how many tokens choose together in decoding, of all layers and of what is saved.

        Raises:
            ValueError: no gates for decoding; ValueError, TypeError: no number of tokens that is supported.
        """
        decode = None if self.gate_config is None else self.gate_config.decode
        if self.gate_config is None or decode is None:
            raise ValueError(f"query_window={tokens!r} needs gates for decoding, and this model has none")
        decode = replace(decode, query_window=tokens)  # type: ignore[call-arg,type-var]
        self.gate_config = replace(self.gate_config, decode=decode)
        for layer in self.layers:
            layer.set_query_window(tokens)

    def set_policy(self, phase: str, policy: Policy) -> None:
        """Of the layers that have none of their own."""
        self.phases[phase] = replace(self.phases[phase], policy=policy)

    def find_out_decoding(self) -> None:
        """Look at gates and policies again, after they changed."""
        self.decodes = any(layer.decodes for layer in self.layers)
        for _, stand_in in self.configs:
            stand_in.decodes = any(owner.decodes for owner in (*stand_in.owners, self))

    def note(self, sparse: bool, gradients: bool) -> None:
        """Remember what was done, and warn once where both were."""
        self.ran_sparse |= sparse
        self.ran_gradients |= gradients
        if self.ran_sparse and self.ran_gradients:
            self.warn_once(
                "both",
                "seerattention: this model attended prompts sparsely without gradients and densely with them; their "
                "losses and log-probabilities differ and must not be compared. Where they are (reference model and "
                "policy, importance ratios), run the forwards without gradients inside seerattention.dense(model), too",
            )

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
        stop_listening(self.listeners)
        for layer in self.layers:
            layer.remove_hooks()
        for forward in tuple(self._forwards):
            forward.close()
        for hook in self._hooks[: 1 if self._forwards else None]:
            hook.remove()

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        length = None if tokens is None else tokens.shape[1]
        if not self._aligned():
            self._align()
        if not self._standing():
            return None
        if length is not None and unnoticed(length, self.decodes):
            if not torch.compiler.is_compiling():
                park(self)
            return None
        if torch.compiler.is_compiling():
            self._open(module, tokens, None)
            return None
        if is_short(self, tokens, args, kwargs) and park(self):
            set_passing(True)
            return None
        arguments = Arguments(kwargs)
        made = len(args) < 2 and kwargs.get("position_ids") is None and kwargs.get("cache_position") is None
        self._open(module, tokens, arguments, made)
        return args, arguments

    def _standing(self) -> bool:
        return self.decoder.config._attn_implementation == NAME  # type: ignore[union-attr]

    def _aligned(self) -> bool:
        """Whether every config has its stand-in; where not, the implementation was changed."""
        return all(config._attn_implementation_internal is stand_in for config, stand_in in self.configs)

    @untraced("configs are changed")
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

    @untraced("Dynamo does not know contexts")
    def _open(
        self,
        module: nn.Module,
        tokens: torch.Tensor | None,
        arguments: Arguments | None,
        positions_are_made: bool = False,
    ) -> None:
        forward = Forward(self, arguments, tokens, positions_are_made)
        self._forwards.add(forward)
        set_passing(False)
        unpark(self)
        if self.decodes or tokens is None or tokens.shape[1] > 1 or forward.prepared is not None:
            for layer in self.layers:
                if not layer.is_present(module):
                    layer.follow_modules(module)

    def _after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._forwards or not torch.compiler.is_compiling():
            self._end(output)

    @untraced("Dynamo does not know contexts")
    def _end(self, output: Any) -> None:
        set_passing(False)
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
        missed = forward.called - forward.seen
        unseen = [
            layer.index
            for layer in self.layers
            if (layer.lost or layer.index in missed) and (layer.may_be_sparse or layer.decodes)
        ]
        unseen += range(len(self.layers), min(len(layers), self.decoder.config.num_hidden_layers))  # type: ignore
        if unseen and not self.detached:
            self.warn_once(
                "unseen",
                f"seerattention: layers {', '.join(map(str, unseen))} are not attended sparsely: their attention "
                "modules were replaced or patched and do not call transformers' attention interface with themselves, "
                "or they came after attach; detach before changing modules and attach again",
            )


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


def gates_of(model: nn.Module, phase: str = PREFILL) -> list[BlockGate | None]:
    """The gate modules of an attached model by layer, on their layers' devices; None where a layer has no gate.

    Args:
        model: an attached model.
        phase: ``"prefill"`` or ``"decode"``.

    Raises:
        ValueError: nothing is attached, or no such phase.
    """
    if phase not in PHASES:
        raise ValueError(f"gates are for the phases {', '.join(PHASES)}, got {phase!r}")
    state = state_of(model)
    for layer in state.layers:
        layer.place_gate()
    return [layer.phases[phase].gate if phase in layer.phases else None for layer in state.layers]


def gated_layers(state: ModelState) -> Iterator[LayerState]:
    return (layer for layer in state.layers if layer.gate is not None)
