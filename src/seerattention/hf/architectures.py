"""Where to find, in each model family, the attention modules and the queries and keys before RoPE.

To add a family:

1. Look at its attention module in transformers. Find the last submodules whose outputs are the queries and the keys
   *before* ``apply_rotary_pos_emb`` (usually ``q_norm``/``k_norm`` where they exist, else ``q_proj``/``k_proj``), and
   whether those outputs are flat (``[B, T, H * D]``) or split into heads (``[B, T, H, D]``).
2. Register one line below, under the ``model_type`` of the config of the decoder.
3. Add a tiny config of it to ``tests/tiny_models.py``. The probe test then rotates the captured tensors and compares
   them with what the attention function receives; it must pass exactly.

Requirements: attention goes through transformers' attention interface, decoder layers are
``decoder.layers[i].self_attn``, RoPE is passed as ``position_embeddings`` with half-split pairing, and attention is
plain (no soft cap, no sinks, no bias).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..gates.geometry import Geometry

__all__ = ["FAMILIES", "Family", "Geometry", "find_attention", "find_decoder", "gated_indices", "sliding_window"]


def _flat(x: Tensor, head_dim: int) -> Tensor:
    """``[B, T, H * D]`` -> ``[B, H, T, D]``."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _split(x: Tensor, head_dim: int) -> Tensor:
    """``[B, T, H, D]`` -> ``[B, H, T, D]``."""
    return x.transpose(1, 2)


@dataclass(frozen=True)
class Family:
    """How one model family computes queries and keys.

    Attributes:
        query: name of the submodule of the attention module whose output is the queries before RoPE.
        key: the same for the keys.
        layout: turns that output into ``[B, H, T, D]``, given head_dim.
        one_window: whether all layers have the config's sliding window, whatever its ``layer_types`` say.
    """

    query: str
    key: str
    layout: Callable[[Tensor, int], Tensor]
    one_window: bool = False


_PROJECTIONS = Family("q_proj", "k_proj", _flat)
_NORMS_PER_HEAD = Family("q_norm", "k_norm", _split)

FAMILIES: dict[str, Family] = {
    "llama": _PROJECTIONS,
    "mistral": replace(_PROJECTIONS, one_window=True),
    "qwen2": _PROJECTIONS,
    "qwen3": _NORMS_PER_HEAD,
}


def find_decoder(model: nn.Module) -> nn.Module:
    """The decoder (the module that owns ``layers``) of a supported family inside ``model``.

    It is looked for through wrappers: causal LM heads, PEFT models, compiled modules, vision-language models.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: no decoder of a supported family inside, or several of them.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module (a Hugging Face model), got {type(model).__name__}")
    found = [module for module in model.modules() if _is_decoder(module)]
    if len(found) == 1:
        return found[0]
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None) or type(model).__name__
    if not found:
        raise ValueError(
            f"no supported decoder found in this model ({kind!r}); supported families: {', '.join(sorted(FAMILIES))}. "
            "seerattention/hf/architectures.py says how to add one"
        )
    raise ValueError(
        f"found {len(found)} decoders in this model ({kind!r}); pass the one to attach to, e.g. model.language_model"
    )


def _is_decoder(module: nn.Module) -> bool:
    if getattr(getattr(module, "config", None), "model_type", None) not in FAMILIES:
        return False
    layers = module._modules.get("layers")
    return (
        isinstance(layers, nn.ModuleList) and len(layers) > 0 and all(hasattr(layer, "self_attn") for layer in layers)
    )


def sliding_window(config: Any, layer: int) -> int | None:
    """The sliding window of a layer in tokens, or None for full attention."""
    layer_types = getattr(config, "layer_types", None)
    family = FAMILIES.get(config.model_type)
    if layer_types is not None and not (family is not None and family.one_window):
        return getattr(config, "sliding_window", None) if layer_types[layer] == "sliding_attention" else None
    return getattr(config, "sliding_window", None)


def gated_indices(config: Any, num_layers: int) -> list[int]:
    """The layers that get gates: all without a sliding window. Where *every* layer has one, all of them: prompts within
    the window are whole prompts to them."""
    windows = [sliding_window(config, layer) for layer in range(num_layers)]
    return [layer for layer, window in enumerate(windows) if window is None or None not in windows]


def find_attention(decoder_layer: nn.Module, family: Family) -> nn.Module:
    """The attention module of a decoder layer, inside of adapters that wrap it (AdaptionPrompt).

    Raises:
        AttributeError: none has the submodules that the family's attention has.
    """
    attention = decoder_layer.self_attn
    for module in attention.modules():  # type: ignore[union-attr, operator]
        if family.query in module._modules and family.key in module._modules:
            return module
    raise AttributeError(
        f"{type(attention).__name__} has no {family.query} and {family.key}, nor has a module inside it: gates need "
        "the attention modules of transformers; take adapters that replace them away, or attach before they come"
    )
