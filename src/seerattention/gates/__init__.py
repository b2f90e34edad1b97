"""Gates: small learned modules that predict which blocks of the attention map matter. Plain torch, no Hugging Face.

Another form of gate joins by a spec of its own in ``config.py``, which names its module: a :class:`BlockGate`, which
takes the same constructor arguments as :class:`PrefillGate` and has the same three parts, whatever it pools inside.
:class:`SubBlockGate` looks more finely than its mask. :class:`DecodeGate` scores for each query token and KV head;
:func:`select_by_token` makes lists of such scores.
"""

from __future__ import annotations

import importlib
from typing import Any

from ..config import FORMS, GateSpec
from .by_token import select_by_token
from .decode import DecodeGate
from .gate import BlockGate
from .prefill import PrefillGate
from .query_state import QueryState
from .state import KeyState
from .step import attend_token, attends_at_once
from .sub_block import SubBlockGate

__all__ = [
    "BlockGate",
    "DecodeGate",
    "KeyState",
    "PrefillGate",
    "QueryState",
    "SubBlockGate",
    "attend_token",
    "attends_at_once",
    "build_gate",
    "select_by_token",
]


def build_gate(
    config: Any, *, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int | None = None
) -> BlockGate:
    """The gate module that a gate spec describes, on the CPU in float32, drawn from torch's global generator.

    Args:
        config: a spec, as :meth:`~seerattention.GateConfig.spec_of` gives it.
        num_heads, num_kv_heads, head_dim: shape of the layer's attention.
        block_size: tokens a block, where the spec has no size of its own.

    Raises:
        TypeError: no gate spec.
        NotImplementedError: this version has no module for this form.
        ValueError: neither the spec nor the caller says the block size.
    """
    if not isinstance(config, GateSpec):
        known = sorted(spec.__name__ for spec in FORMS.values())
        raise TypeError(f"gate config must be one of {known}, got {type(config).__name__}")
    if config.module is None:
        raise NotImplementedError(f"{config.phase} gates ({type(config).__name__}) are not part of this version")
    size = block_size if config.block_size is None else config.block_size
    if size is None:
        raise ValueError(f"{type(config).__name__} has no block size of its own; pass block_size")
    package, name = config.module.split(":")
    form: type[BlockGate] = getattr(importlib.import_module(package), name)
    return form(config, block_size=size, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
