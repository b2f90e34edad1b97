"""Keys as they were before RoPE, from keys after it."""

from .interface import inverse_rope, pooled_inverse_rope

__all__ = ["inverse_rope", "pooled_inverse_rope"]
