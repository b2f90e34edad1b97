"""The life cycle of an attached model: attach, set_policy, detach."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..config import GateConfig
from ..gates import build_gate
from ..gates.checkpoint import GateCheckpoint
from ..gates.sources import load_gates
from ..policies import Dense, Policy, Threshold, TopK
from .architectures import FAMILIES, Geometry, find_decoder, sliding_window
from .attention import register
from .state import NAME, LayerState, ModelState, Selector, is_attached, set_state, state_of

DEFAULT_POLICY = Threshold(2e-3)
"""The policy of fresh gates; the threshold that the paper uses on LongBench."""


def attach(
    model: nn.Module,
    gates: GateConfig | str | os.PathLike[str] | None = None,
    *,
    prefill: Policy | None = None,
    decode: Policy | None = None,
    selector: Selector | None = None,
    min_context: int | None = None,
) -> nn.Module:
    """Make a Hugging Face model prefill long prompts block-sparsely. The model is changed in place by hooks only.

    Gates stay out of the model's parameters and state dict; they follow their layers' devices and dtypes.

    Args:
        model: a causal LM of a supported family (or a PEFT, compiled or vision-language model around one).
        gates: a :class:`GateConfig` for fresh gates (drawn from torch's global generator), or trained ones: a folder
            written by :func:`save_gates`, a published AttnGates folder, or the id of either on the hub. None needs
            ``selector``.
        prefill: which blocks to read; None is the policy stored with the gates, and ``Threshold(2e-3)`` for fresh ones.
        decode: None; decoding is dense in this version (``Dense()`` and ``TopK(1.0)`` say the same).
        selector: chooses blocks instead of gates and policy: called as ``selector(q, k, layer=, scale=, lengths=)``
            with tensors after RoPE, right-padded. Gates may be given too; they are then loaded but not asked.
        min_context: prompts of fewer tokens are attended densely. None takes the default of the device
            (:data:`~seerattention.hf.attention.DEFAULT_MIN_CONTEXT`), 0 is sparse at any length.

    Returns:
        The model itself.

    Raises:
        ValueError: something is attached already, the model is of no supported family, neither gates nor a selector, or
            gates that do not fit the model.
        FileNotFoundError: ``gates`` looks like a path and does not exist.
        NotImplementedError: a sparse ``decode`` policy.
    """
    decoder = find_decoder(model)
    if is_attached(model):
        raise ValueError(
            "this model is attached already; call seerattention.detach(model) first, or set_policy(model, ...)"
        )
    if gates is None and selector is None:
        raise ValueError("attach needs gates (a GateConfig, a folder or a hub id), a selector, or both; got neither")
    if selector is not None and not callable(selector):
        raise TypeError(f"selector must be callable, got {type(selector).__name__}")
    if min_context is not None and (
        isinstance(min_context, bool) or not isinstance(min_context, int) or min_context < 0
    ):
        raise ValueError(f"min_context must be a number of tokens of 0 or more, or None, got {min_context!r}")
    _check_prefill(prefill)
    _check_decode(decode)
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

    state = ModelState(
        family=FAMILIES[config.model_type],
        geometry=Geometry.of(config),
        gate_config=gate_config,
        policy=prefill or (checkpoint.policy if checkpoint else DEFAULT_POLICY),
        selector=selector,
        min_context=min_context,
        original_config=config,
        config_entries=copy.deepcopy(config.__dict__),
        register=register,
    )
    layers: Any = decoder.layers
    built: dict[int, Any] = {}
    if gate_config is not None:
        with torch.inference_mode(False):  # tensors made in inference mode could never be trained
            built = _build_gates(state, config, len(layers), checkpoint)
    frequencies = getattr(getattr(decoder, "rotary_emb", None), "inv_freq", None)
    if frequencies is not None:
        for gate in built.values():
            gate.check_rotary(2 * len(frequencies))
    register()
    try:
        for index, decoder_layer in enumerate(layers):
            layer = LayerState(state, index, decoder_layer, sliding_window(config, index))
            state.layers.append(layer)
            layer.gate = built.get(index)
            layer.place_gate()
            layer.attach_hooks()
    except BaseException:
        for layer in state.layers:
            layer.remove_hooks()
        raise
    # A config of its own: another model built from the same config object keeps its attention implementation.
    own_config = copy.deepcopy(config)
    _swap_config(model, config, own_config)
    own_config._attn_implementation_internal = NAME
    set_state(decoder, state)
    if gate_config is not None and not built:
        state.warn_once("windows", "every layer of this model attends to a sliding window, so all of them stay dense")
    return model


def detach(model: nn.Module) -> nn.Module:
    """Undo :func:`attach`: hooks and gates are gone, and the model computes bit for bit what it did before.

    What was changed in ``model.config`` while it was attached stays changed.

    Raises:
        ValueError: nothing is attached.
    """
    decoder, state = find_decoder(model), state_of(model)
    for layer in state.layers:
        layer.remove_hooks()
    config: Any = decoder.config
    _keep_config_edits(state, config)
    config._attn_implementation_internal = state.original_config._attn_implementation_internal
    _swap_config(model, config, state.original_config)
    set_state(decoder, None)
    return model


def set_policy(
    model: nn.Module,
    prefill: Policy | None = None,
    *,
    decode: Policy | None = None,
    layers: Mapping[int, Policy | None] | None = None,
) -> None:
    """Change which blocks an attached model reads.

    Args:
        model: an attached model.
        prefill: the policy of all layers without one of their own; None leaves it.
        decode: as in :func:`attach`.
        layers: policies of single layers by index; a None takes a layer's own policy away.

    Raises:
        ValueError: nothing is attached, or no such layer.
        NotImplementedError: a sparse ``decode`` policy.
    """
    state = state_of(model)
    _check_prefill(prefill)
    _check_decode(decode)
    for index, policy in (layers or {}).items():
        if not isinstance(index, int) or not 0 <= index < len(state.layers):
            raise ValueError(f"layers must be numbered 0 to {len(state.layers) - 1}, got {index!r}")
        _check_prefill(policy)
    if prefill is not None:
        state.policy = prefill
    for index, policy in (layers or {}).items():
        state.layers[index].policy = policy


def _build_gates(state: ModelState, config: Any, num_layers: int, checkpoint: GateCheckpoint | None) -> dict[int, Any]:
    assert state.gate_config is not None
    layer_types = getattr(config, "layer_types", None)
    geometry = state.geometry
    built = {}
    for index in range(num_layers):
        if layer_types is not None and layer_types[index] == "sliding_attention":
            continue
        built[index] = build_gate(
            state.gate_config.prefill,
            block_size=state.gate_config.block_size,
            num_heads=geometry.num_heads,
            num_kv_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
        )
    if checkpoint is not None:
        checkpoint.load_into(built)
    return built


def _keep_config_edits(state: ModelState, config: Any) -> None:
    """Carry over what was changed in an attached model's config (new embeddings, another implementation)."""
    original, before = state.original_config.__dict__, state.config_entries
    for name in before.keys() - config.__dict__.keys():
        original.pop(name, None)
    for name, value in config.__dict__.items():
        unchanged = name in before and before[name] == value
        if not unchanged and (name, value) != ("_attn_implementation_internal", NAME):
            original[name] = value


def _swap_config(model: nn.Module, old: Any, new: Any) -> None:
    for module in model.modules():
        if module.__dict__.get("config") is old:
            module.config = new  # type: ignore[assignment]


def _check_prefill(policy: Any) -> None:
    if policy is not None and not isinstance(policy, Policy):
        raise TypeError(
            f"a policy must be one of seerattention's (Threshold, TopK, ...) or None, got {type(policy).__name__}"
        )


def _check_decode(policy: Any) -> None:
    if policy is None or isinstance(policy, Dense) or (isinstance(policy, TopK) and policy.density == 1):
        return
    raise NotImplementedError(f"decoding is dense in this version; pass decode=None, got {policy!r}")
