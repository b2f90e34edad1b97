"""SeerAttention inside Hugging Face transformers: hooks and a registered attention function, no forked models."""

from __future__ import annotations

import warnings
from typing import Any

from ..gates.sources import convert
from ..selectors import LayerInputs
from .architectures import FAMILIES, Family, find_decoder
from .attach import attach, detach, set_policy
from .contexts import dense, observe
from .min_context import DEFAULT_MIN_CONTEXT
from .save import save_gates
from .state import gates_of, is_attached

__all__ = [
    "DEFAULT_MIN_CONTEXT",
    "FAMILIES",
    "Family",
    "LayerInputs",
    "attach",
    "convert",
    "dense",
    "detach",
    "find_decoder",
    "gates_of",
    "is_attached",
    "observe",
    "save_gates",
    "set_policy",
]

# What this package offered before measuring got a room of its own.
_MOVED = ("Statistics", "calibrate", "record")


def __getattr__(name: str) -> Any:
    if name == "gates":  # until 0.5; "gates" is the name of a room and of an argument
        warnings.warn("seerattention.hf.gates is called gates_of now", DeprecationWarning, stacklevel=2)
        return gates_of
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .recall import moved

    return moved(f"{__name__}.{name}", name)
