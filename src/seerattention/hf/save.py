"""Saving the gates of an attached model; what lies on disk is the business of ``gates/checkpoint.py``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..gates.checkpoint import GateCheckpoint, check_tensors, gate_tensors, write_checkpoint
from ..gates.geometry import fingerprint
from .architectures import find_decoder
from .phases import DECODE, PREFILL
from .state import gates_of, state_of

__all__ = ["fingerprint", "save_gates"]


def save_gates(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write the gates of an attached model to a folder, in their present dtype, with policies and budgets.

    Whatever interrupts it, the folder holds either the old gates or the new ones, whole.

    Args:
        model: an attached model.
        path: the folder; it may exist, and its files of the same names are replaced.

    Raises:
        ValueError: no gates are attached, a parameter is empty or not in memory (sharded or offloaded gates), or is not
            finite.
        OSError: the disk is full, read-only, ...
    """
    state = state_of(model)
    phases = () if state.gate_config is None else state.gate_config.phases
    tensors: dict[str, Tensor] = {}
    for phase in phases:
        modules = {layer: gate for layer, gate in enumerate(gates_of(model, phase)) if gate is not None}
        tensors |= {name: value.detach() for name, value in gate_tensors(modules, phase).items()}
    if state.gate_config is None or not tensors:
        raise ValueError("this model has no gates to save (it is attached with a selector only)")
    check_tensors(tensors)
    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    config: Any = find_decoder(model).config
    base_model = {
        "name": getattr(config, "_name_or_path", None) or None,
        "revision": getattr(config, "_commit_hash", None),
        **fingerprint(config),
    }
    policies = {phase: known.policy for phase, known in state.phases.items()}
    checkpoint = GateCheckpoint(
        state.gate_config, policies[PREFILL], base_model, tensors, str(path), policies.get(DECODE), state.budgets
    )
    return write_checkpoint(path, checkpoint)
