"""Gates: small learned modules that predict which blocks of the attention map matter. Plain torch, no Hugging Face.

A second form of gate joins by a config class of its own and one entry in ``_FORMS``: its module is a
:class:`BlockGate`, which takes the same constructor arguments as :class:`PrefillGate` and has the same three parts,
whatever it pools inside.
"""

from __future__ import annotations

from typing import Any

from ..config import PrefillGateConfig
from .prefill import BlockGate, PrefillGate
from .state import KeyState

__all__ = ["BlockGate", "KeyState", "PrefillGate", "build_gate"]

_FORMS: dict[type, type[BlockGate]] = {PrefillGateConfig: PrefillGate}


def build_gate(config: Any, *, block_size: int, num_heads: int, num_kv_heads: int, head_dim: int) -> BlockGate:
    """The gate module that a gate config describes, on the CPU in float32, drawn from torch's global generator.

    Raises:
        TypeError: no gate form belongs to this config class.
    """
    form = _FORMS.get(type(config))
    if form is None:
        raise TypeError(
            f"gate config must be one of {[known.__name__ for known in _FORMS]}, got {type(config).__name__}"
        )
    return form(config, block_size=block_size, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
