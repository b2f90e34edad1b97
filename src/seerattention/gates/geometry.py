"""The shape of a model's attention, as far as gates depend on it: from a config object or the dict of a config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Geometry", "fingerprint"]


@dataclass(frozen=True)
class Geometry:
    """Shape of a decoder's attention: ``num_heads`` query heads, ``num_kv_heads`` KV heads, ``head_dim``."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Any) -> Geometry:
        """Of a decoder's config, an object or a dict.

        Raises:
            ValueError: it lacks what is needed.
        """
        heads = _entry(config, "num_attention_heads")
        kv_heads, head_dim = _entry(config, "num_key_value_heads") or heads, _entry(config, "head_dim")
        if heads and not head_dim and _entry(config, "hidden_size"):
            head_dim = _entry(config, "hidden_size") // heads
        found = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim or hidden_size": head_dim}
        for name, value in found.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"the config has no valid {name}: got {value!r}")
        return cls(heads, kv_heads, head_dim)


def fingerprint(config: Any) -> dict[str, Any]:
    """What of a base model gates depend on, from its decoder's config (an object or the dict of a config.json).

    Raises:
        ValueError: the config lacks the shape of its attention.
    """
    geometry = Geometry.of(config)
    rope = _entry(config, "rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_parameters must be a mapping, got {type(rope).__name__}")
    theta = rope.get("rope_theta", _entry(config, "rope_theta"))
    if theta is not None and (isinstance(theta, bool) or not isinstance(theta, int | float)):
        raise ValueError(f"rope_theta must be a number, got {theta!r}")
    return {
        "model_type": _entry(config, "model_type"),
        "num_hidden_layers": _entry(config, "num_hidden_layers"),
        "num_attention_heads": geometry.num_heads,
        "num_key_value_heads": geometry.num_kv_heads,
        "head_dim": geometry.head_dim,
        "rope_theta": None if theta is None else float(theta),
    }


def _entry(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
