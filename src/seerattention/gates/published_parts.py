"""What the readers of both kinds of published checkpoints share: names of weights, checks of entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

KEY = r"(?:model\.)?layers\.(?P<layer>\d+)\.self_attn\.attn_gate\.(?P<parameter>{})\.weight"
"""Pattern of the key of a weight, with a place for that of the parameter."""

PARAMETERS = {
    "mask_linear_q": "q_linear",
    "mask_linear_k": "k_linear",
    "attngate_linear_q": "q_linear",
    "attngate_linear_k": "k_linear",
    "attngate_qnorm": "q_norm",
    "attngate_knorm": "k_norm",
}
"""Parameters of this package's gates by their published names. Shapes and layouts are the same."""


TYPES: dict[str, tuple[type, ...]] = {
    "base_model": (str,),
    "model_type": (str,),
    "num_hidden_layers": (int,),
    "seerattn_gate_block_size": (int,),
    "seerattn_gate_hidden_size": (int,),
    "seerattn_sparsity_method": (str,),
    "seerattn_threshold": (int, float),
}
"""Types of the entries that both kinds have."""


def check_types(data: Mapping[str, Any], types: Mapping[str, tuple[type, ...]], methods: Sequence[str]) -> None:
    """Every entry that is read has the type that the published code writes, or is null or missing.

    Args:
        data: entries of a config.json.
        types: those of one kind, besides :data:`TYPES`.
        methods: sparsity methods of that kind.

    Raises:
        TypeError: one has not.
        ValueError: an unknown sparsity method.
    """
    for name, allowed in {**TYPES, **types}.items():
        value = data.get(name)
        if value is not None and (not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed)):
            expected = " or ".join(kind.__name__ for kind in allowed)
            raise TypeError(f"{name} must be {expected}, got {value!r}")
    method = data.get("seerattn_sparsity_method")
    if method not in (None, *methods):
        raise ValueError(f"seerattn_sparsity_method must be one of {tuple(methods)}, got {method!r}")
