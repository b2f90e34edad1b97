"""The shape of a model's attention, as far as gates depend on it: from a config object or the dict of a config.json.

Layers may differ: an entry may be a list with a value a layer, and ``rope_parameters`` may be nested by layer type.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["OPTIONAL", "Geometry", "fingerprint", "mismatches"]

OPTIONAL = ("rotary_dim",)
"""Entries of a fingerprint that only models have which differ from the plain ones in them."""


@dataclass(frozen=True)
class Geometry:
    """Shape of the attention of one layer.

    Attributes:
        num_heads: query heads.
        num_kv_heads: KV heads.
        head_dim: channels of a head.
        rotary_dim: channels that RoPE turns; None: all.
        window: sliding window in tokens; None: full attention.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int | None = None
    window: int | None = None

    @classmethod
    def of(cls, config: Any, layer: int = 0) -> Geometry:
        """Of one layer of a decoder, from its config, an object or a dict. The window is not known from it alone.

        Raises:
            ValueError: it lacks what is needed.
        """
        heads = _layer_entry(config, "num_attention_heads_per_layer", layer)
        heads = _layer_entry(config, "num_attention_heads", layer) if heads is None else heads
        kv_heads = _layer_entry(config, "num_key_value_heads", layer) or heads
        head_dim = _layer_entry(config, "head_dim", layer)
        hidden, common = _entry(config, "hidden_size"), _entry(config, "num_attention_heads")
        if not head_dim and hidden:
            head_dim = hidden // (common if isinstance(common, int) and common else heads or 1)
        found = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim or hidden_size": head_dim}
        for name, value in found.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"the config has no valid {name}: got {value!r}")
        share = _rope(config, layer).get("partial_rotary_factor", _entry(config, "partial_rotary_factor"))
        partial = isinstance(share, int | float) and not isinstance(share, bool) and 0 < share < 1
        return cls(heads, kv_heads, head_dim, rotary_dim=int(head_dim * share) if partial else None)


def fingerprint(config: Any) -> dict[str, Any]:
    """What of a base model gates depend on, from its decoder's config (an object or the dict of a config.json).

    An entry in which layers differ is a string that counts them, ``"2x 8, 4"`` for two layers with 8 and one with 4.

    Raises:
        ValueError: the config lacks the shape of its attention.
    """
    layers = _entry(config, "num_hidden_layers")
    counted = range(layers) if isinstance(layers, int) and not isinstance(layers, bool) and layers > 0 else range(1)
    # Configs of whose layers none differs, nearly all, are looked at once.
    counted = counted if _differs(config) else range(1)
    shapes = [Geometry.of(config, layer) for layer in counted]
    rotary = _summary([shape.rotary_dim for shape in shapes])
    return {
        "model_type": _entry(config, "model_type"),
        "num_hidden_layers": layers,
        "num_attention_heads": _summary([shape.num_heads for shape in shapes]),
        "num_key_value_heads": _summary([shape.num_kv_heads for shape in shapes]),
        "head_dim": _summary([shape.head_dim for shape in shapes]),
        "rope_theta": _summary([_theta(config, layer) for layer in counted]),
        **({} if rotary is None else {"rotary_dim": rotary}),
    }


def mismatches(known: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Entries of ``other`` that are known to be something else, as (name, what is known, what ``other`` has).

    What is missing or None in ``known`` fits everything.
    """
    return [(name, known[name], value) for name, value in other.items() if known.get(name) not in (None, value)]


_PER_LAYER = ("num_attention_heads", "num_attention_heads_per_layer", "num_key_value_heads", "head_dim")


def _differs(config: Any) -> bool:
    """Whether a config may say different things of different layers."""
    rope = _entry(config, "rope_parameters")
    nested = isinstance(rope, Mapping) and any(isinstance(value, Mapping) for value in rope.values())
    return nested or any(isinstance(_entry(config, name), list | tuple) for name in _PER_LAYER)


def _summary(values: list[Any]) -> Any:
    """The value that all layers have, or a string that counts those in a row."""
    groups = [(value, len(list(group))) for value, group in itertools.groupby(values)]
    if len(groups) == 1:
        return values[0]
    return ", ".join(f"{count}x {value}" if count > 1 else str(value) for value, count in groups)


def _theta(config: Any, layer: int) -> float | None:
    theta = _rope(config, layer).get("rope_theta", _entry(config, "rope_theta"))
    if theta is not None and (isinstance(theta, bool) or not isinstance(theta, int | float)):
        raise ValueError(f"rope_theta must be a number, got {theta!r}")
    return None if theta is None else float(theta)


def _rope(config: Any, layer: int) -> Mapping[str, Any]:
    """The rotary parameters of a layer: its layer type's, where they are nested by type."""
    rope = _entry(config, "rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_parameters must be a mapping, got {type(rope).__name__}")
    kind = _layer_entry(config, "layer_types", layer)
    own = rope.get(kind) if isinstance(kind, str) else None
    return own if isinstance(own, Mapping) else rope


def _layer_entry(config: Any, name: str, layer: int) -> Any:
    value = _entry(config, name)
    if not isinstance(value, list | tuple):
        return value
    if not 0 <= layer < len(value):
        raise ValueError(f"{name} must have an entry for each layer, got {len(value)} and none for layer {layer}")
    return value[layer]


def _entry(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
