"""Memory that decode gates add to a cache."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..hf.kept import kept_bytes

__all__ = ["CacheMemory", "cache_memory"]


class CacheMemory(NamedTuple):
    """Bytes of a cache.

    Attributes:
        keys_and_values: what the model keeps, room of static caches included.
        gates: what decode gates keep beside it: encoded keys with their room to grow, and the last tokens as they came,
            from which an open sub-block is pooled; with a query window, the encoded queries of the last tokens.
    """

    keys_and_values: int
    gates: int

    @property
    def share(self) -> float:
        """Of ``gates`` in ``keys_and_values``; SeerAttention-R (arXiv 2506.08889) says 1/128 for its form."""
        return self.gates / self.keys_and_values if self.keys_and_values else 0.0


def cache_memory(cache: Any) -> CacheMemory:
    """What a cache of transformers takes, and what decode gates keep with it.

    Gates of prompts keep nothing: they encode the cached keys anew for each chunk. Decode gates do from the first token
    that was decoded sparsely on, and with a query window from the end of the first prompt on.

    Args:
        cache: with ``layers`` that hold ``keys`` and ``values``, as ``generate(return_dict_in_generate=True)`` returns
            it in ``past_key_values``.

    Raises:
        TypeError: it has no layers.
    """
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise TypeError(f"cache_memory takes a cache of transformers that has layers, got {type(cache).__name__}")
    held = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return CacheMemory(sum(x.nbytes for x in held if isinstance(x, Tensor)), sum(kept_bytes(layer) for layer in layers))
