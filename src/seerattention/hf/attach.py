"""The life cycle of an attached model: attach, set_policy, detach."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from ..blocks import BlockIndices
from ..config import PHASES, GateConfig
from ..gates import BlockGate, build_gate
from ..gates.by_token import check_by_token
from ..gates.checkpoint import GateCheckpoint
from ..gates.sources import load_gates
from ..ops.dispatch import FLOATING_DTYPES
from ..policies import Budgets, Dense, Policy, RelativeThreshold, TokenBudget, TopK
from ..selectors import Selector, as_selector
from .architectures import FAMILIES, find_decoder, gated_indices
from .attention import register
from .generation import listen
from .implementation import NAME, configs_of, give_back, original_of, stand_in
from .layer import LayerState
from .phases import DECODE, PREFILL, ModelPhase
from .sharding import head_rank
from .state import ModelState, is_attached, set_state, state_of

DEFAULT_POLICY = RelativeThreshold(1.0)
"""The policy of fresh gates: what gets more than uniform attention would give it."""

DEFAULT_DECODE_POLICY = TokenBudget(4096)
"""The policy of fresh decode gates; a budget that the SeerAttention-R paper uses."""


def attach(
    model: nn.Module,
    gates: GateConfig | str | os.PathLike[str] | None = None,
    *,
    density: float | None = None,
    prefill: Policy | None = None,
    decode: Policy | None = None,
    selector: Selector | Callable[..., BlockIndices] | None = None,
    min_context: int | None = None,
) -> nn.Module:
    """Make a Hugging Face model prefill long prompts, and decode after them, block-sparsely.

    The model is changed in place, by hooks; and its ``prepare_inputs_for_generation`` is listened to, as only
    ``generate`` knows where a prompt ends. So give the model whose ``generate`` is called, not a part of it.

    Gates stay out of the model's parameters and state dict; they follow their layers' devices and dtypes.

    Args:
        model: a causal LM of a supported family (or a PEFT, compiled or vision-language model around one).
        gates: a :class:`GateConfig` for fresh gates (drawn from torch's global generator), or trained ones: a folder
            written by :func:`save_gates`, a published AttnGates folder, or the id of either on the hub. None needs
            ``selector``.
        density: share of the causal blocks to read in prompts, in (0, 1]: the budget fitted for these gates decides
            where (:class:`~seerattention.Budget`). Total density comes out at about that, at any length from 4,096
            tokens on (of densities below 0.1: from longer ones on). None: as ``prefill`` says.
        prefill: which blocks to read, instead of a density; None is the policy stored with the gates (of gates with
            budgets, the budget of their default density), and ``RelativeThreshold(1.0)`` for fresh ones.
        decode: which blocks a decoded token reads, where there are gates for decoding; None is the policy stored with
            them, and ``TokenBudget(4096)`` for fresh ones; ``Dense()`` decodes densely, as a model without such gates.
        selector: chooses the blocks of prompts instead of gates and policy: a
            :class:`~seerattention.selectors.Selector`, or a callable as ``selector(q, k, layer=, scale=, lengths=)``
            with tensors after RoPE, right-padded. Gates may be given too; they are then loaded, and asked by selectors
            that ask them.
        min_context: prompts of fewer tokens are attended densely. None takes the default of the device and the model's
            shape (:mod:`seerattention.hf.min_context`; ``seer bench --save`` measures it), 0 is sparse at any length.

    Returns:
        The model itself.

    Raises:
        ValueError: something is attached already, the model is of no supported family, neither gates nor a selector, or
            gates that do not fit the model; a sparse policy for a phase that the gates do not have; or a density beside
            ``prefill`` or ``selector``, of gates without budgets, or outside of what these were fitted for.
        FileNotFoundError: ``gates`` looks like a path and does not exist.
    """
    decoder = find_decoder(model)
    if is_attached(model):
        raise ValueError(
            "this model is attached already; call seerattention.detach(model) first, or set_policy(model, ...)"
        )
    if gates is None and selector is None:
        raise ValueError("attach needs gates (a GateConfig, a folder or a hub id), a selector, or both; got neither")
    chosen = None if selector is None else as_selector(selector)
    if chosen is not None and chosen.needs_gate and gates is None:
        raise ValueError(f"the selector {chosen.kind!r} asks the layers' gates; attach needs gates beside it")
    if min_context is not None and (
        isinstance(min_context, bool) or not isinstance(min_context, int) or min_context < 0
    ):
        raise ValueError(f"min_context must be a number of tokens of 0 or more, or None, got {min_context!r}")
    _check_density(density, prefill, selector)
    for phase, policy in ((PREFILL, prefill), (DECODE, decode)):
        _check_policy(phase, policy)
    if not getattr(decoder, "_can_set_attn_implementation", lambda: True)():
        raise ValueError(
            f"{type(decoder).__name__} does not dispatch attention through transformers' attention interface"
        )

    config: Any = decoder.config
    checkpoint: GateCheckpoint | None = None
    if isinstance(gates, str | os.PathLike):
        checkpoint = load_gates(gates, config)
        gate_config: GateConfig | None = checkpoint.gate_config
    elif gates is None or isinstance(gates, GateConfig):
        gate_config = gates
    else:
        raise TypeError(f"gates must be a GateConfig, a path or a hub id, got {type(gates).__name__}")
    phases = () if gate_config is None else gate_config.phases
    budgets = None if checkpoint is None else checkpoint.budgets
    if density is not None:
        prefill = _spend(density, budgets, "these gates" if checkpoint is None else checkpoint.source)
    _check_phases({DECODE: decode} if chosen is not None else {PREFILL: prefill, DECODE: decode}, phases)

    state = ModelState(
        decoder=decoder,
        family=FAMILIES[config.model_type],
        gate_config=gate_config,
        phases=_model_phases(gate_config, checkpoint, prefill, decode, chosen),
        min_context=min_context,
        register=register,
        budgets=budgets,
        head_rank=head_rank(model),
    )
    layers: Any = decoder.layers
    _check_layers(state.phases[PREFILL].policy, len(layers))
    state.layers = [LayerState(state, index, layer) for index, layer in enumerate(layers)]
    if gate_config is not None:
        with torch.inference_mode(False):  # tensors made in inference mode could never be trained
            for phase in phases:
                for index, gate in _build_gates(state, phase, gated_indices(config, len(layers)), checkpoint).items():
                    state.layers[index].set_phase(phase, gate=gate)
    register()
    own = configs_of(decoder)
    try:
        for layer in state.layers:
            _check_dtype(layer)
            layer.place_gate()
            layer.attach_hooks()
        state.others = [
            (other, original_of(other)) for other in configs_of(model) if all(other is not config for config in own)
        ]
        state.configs = [(config, stand_in(config, state)) for config in own]
        state.find_out_decoding()
        state.attach_hooks()
        state.listeners = listen(model, state)
    except BaseException:
        _undo(state)
        raise
    set_state(decoder, state)
    return model


def detach(model: nn.Module) -> nn.Module:
    """Undo :func:`attach`: hooks and gates are gone, and the model computes bit for bit what it did before.

    What was changed in ``model.config`` while it was attached stays changed. A forward that is under way in another
    thread goes on densely, or ends with a RuntimeError if some of its layers were attended sparsely before.

    Raises:
        ValueError: nothing is attached.
    """
    decoder, state = find_decoder(model), state_of(model)
    state.detached = True
    set_state(decoder, None)
    _undo(state)
    # Whatever came after attach: layers copied from attached ones, and parts that the name was set in from outside.
    for module in decoder.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number, hook in tuple(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), LayerState):
                    del hooks[number]
                    module._forward_pre_hooks_with_kwargs.pop(number, None)
    original = state.configs[0][1].original
    for config in configs_of(model):
        give_back(config, state, original)
    return model


def _undo(state: ModelState) -> None:
    state.remove_hooks()
    for config, standing in state.configs:
        give_back(config, state, standing.original)
    for config, original in state.others:
        if config._attn_implementation == NAME:
            give_back(config, state, original)


def set_policy(
    model: nn.Module,
    prefill: Policy | None = None,
    *,
    density: float | None = None,
    decode: Policy | None = None,
    layers: Mapping[int, Policy | Mapping[str, Policy | None] | None] | None = None,
    query_window: int | None = None,
) -> None:
    """Change which blocks an attached model reads.

    Args:
        model: an attached model.
        prefill: the policy of all layers without one of their own; None leaves it.
        density: the same, by the budgets of the gates, as in :func:`attach`.
        decode: the same for decoding, where there are gates for it.
        layers: prefill policies of single layers by index, or mappings from phase (``"prefill"``, ``"decode"``) to
            policy; a None takes a layer's own policy away.
        query_window: tokens that choose together when they are decoded (:class:`~seerattention.DecodeGateConfig`), of
            gates that are there: it is not trained. None leaves it.

    Raises:
        ValueError: nothing is attached, no such layer or phase, a sparse ``decode`` policy or a window without gates
            for decoding, a density beside ``prefill``, of gates without budgets, or outside of what these were fitted
            for.
        TypeError: not a policy.
    """
    state = state_of(model)
    _check_density(density, prefill, state.phases[PREFILL].selector)
    if density is not None:
        prefill = _spend(density, state.budgets, "the attached gates")
    own: dict[int, Mapping[str, Policy | None]] = {}
    for index, given in (layers or {}).items():
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(state.layers):
            raise ValueError(f"layers must be numbered 0 to {len(state.layers) - 1}, got {index!r}")
        own[index] = given if isinstance(given, Mapping) else {PREFILL: given}
    for policies in ({PREFILL: prefill, DECODE: decode}, *own.values()):
        for phase, policy in policies.items():
            _check_policy(phase, policy)
            _check_layers(policy, len(state.layers))
        _check_phases({DECODE: policies.get(DECODE)}, state.phases)
    if query_window is not None:
        state.set_query_window(query_window)
    for phase, policy in ((PREFILL, prefill), (DECODE, decode)):
        if policy is not None and phase in state.phases:
            state.set_policy(phase, policy)
    for index, policies in own.items():
        for phase, policy in policies.items():
            if phase in state.phases:
                state.layers[index].set_phase(phase, policy=policy)
    state.find_out_decoding()


def _model_phases(
    gate_config: GateConfig | None,
    checkpoint: GateCheckpoint | None,
    prefill: Policy | None,
    decode: Policy | None,
    selector: Selector | None,
) -> dict[str, ModelPhase]:
    """What the layers of a model go by: always for prefill, and for decoding where there are gates for it."""
    policy = prefill or (checkpoint.policy if checkpoint else DEFAULT_POLICY)
    if gate_config is None:
        return {PREFILL: ModelPhase(policy, 64, selector)}
    if prefill is None and PREFILL not in gate_config.phases:
        policy = Dense()
    found = {PREFILL: ModelPhase(policy, gate_config.block_size_of(PREFILL), selector)}
    if DECODE in gate_config.phases:
        policy = decode or (checkpoint and checkpoint.decode_policy) or DEFAULT_DECODE_POLICY
        check_by_token(policy)
        found[DECODE] = ModelPhase(policy, gate_config.block_size_of(DECODE))
    return found


def _build_gates(
    state: ModelState, phase: str, indices: list[int], checkpoint: GateCheckpoint | None
) -> dict[int, BlockGate]:
    """Gates of a phase by layer.

    Trained ones are made without values first: drawing some would move torch's global generator.
    """
    assert state.gate_config is not None
    spec, built = state.gate_config.spec_of(phase), {}
    for index in indices:
        geometry = state.layers[index].geometry
        with nullcontext() if checkpoint is None else torch.device("meta"):
            built[index] = build_gate(
                spec, num_heads=geometry.num_heads, num_kv_heads=geometry.num_kv_heads, head_dim=geometry.head_dim
            )
        if geometry.rotary_dim is not None:
            built[index].check_rotary(geometry.rotary_dim)
    if checkpoint is not None:
        for gate in built.values():
            gate.to_empty(device="cpu").float()
        checkpoint.load_into(built, phase)
    return built


def _check_dtype(layer: LayerState) -> None:
    """Refuse models of a precision that no op computes in."""
    for parameter in layer.attention.parameters():
        if parameter.dtype == torch.float64:
            supported = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING_DTYPES)
            raise ValueError(
                f"layer {layer.index} of this model is float64; sparse attention computes in {supported}: convert the "
                "model first, for example with model.float()"
            )


def _check_density(density: float | None, prefill: Any, selector: Any) -> None:
    """Raise where a density would not be all that is said about the blocks of prompts."""
    if density is not None and (prefill is not None or selector is not None):
        other = f"prefill={prefill!r}" if prefill is not None else f"the selector {selector!r}"
        raise ValueError(
            f"got density={density!r} and {other}: a density is spent by the budgets of the gates; give one of them"
        )


def _spend(density: float, budgets: Budgets | None, source: str) -> Policy:
    """The policy for a density, of gates that have budgets."""
    if budgets is None:
        raise ValueError(
            f"{source}: no budgets were fitted for these gates, so nothing is known of what reaches density "
            f"{density!r}; attach them without it, call seerattention.calibrate(model, batches) on your prompts and "
            "seerattention.save_gates, or give a policy: prefill=TopK(...)"
        )
    return budgets.policy(density)


def _check_policy(phase: str, policy: Any) -> None:
    """Raise unless ``policy`` is one that can choose in this phase, or None."""
    if phase not in PHASES:
        raise ValueError(f"policies are for the phases {', '.join(PHASES)}, got {phase!r}")
    if policy is not None and not isinstance(policy, Policy):
        raise TypeError(
            f"a policy must be one of seerattention's (Threshold, TopK, ...) or None, got {type(policy).__name__}"
        )
    if phase == DECODE and policy is not None:
        check_by_token(policy)


def _check_layers(policy: Policy | None, count: int) -> None:
    """Raise where a policy that differs by layer is not for so many."""
    known = len(getattr(policy, "layers", ()))
    if known not in (0, count):
        raise ValueError(f"{policy!r} has numbers for {known} layers, and this model has {count}; fit them to it")


def _check_phases(policies: Mapping[str, Policy | None], phases: Iterable[str]) -> None:
    """Raise where a sparse policy is for a phase without gates, in which nothing would come of it."""
    for phase, policy in policies.items():
        keeps_all = policy is None or isinstance(policy, Dense) or (isinstance(policy, TopK) and policy.density == 1)
        if phase not in phases and not keeps_all:
            raise ValueError(
                f"{policy!r} is to choose in {phase!r}, for which this model has no gates, so it is dense there; pass "
                f"{phase}=None, or attach gates for it: GateConfig({phase}=...)"
            )
