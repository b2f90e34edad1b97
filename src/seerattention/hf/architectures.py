"""Where to find, in each model family, the attention modules and the queries and keys before RoPE.

To add a family:

1. Look at its attention module in transformers. Find the last submodules whose outputs are the queries and the keys
   *before* ``apply_rotary_pos_emb`` (usually ``q_norm``/``k_norm`` where they exist, else ``q_proj``/``k_proj``, or one
   projection for both), and how those outputs are laid out: flat (``[B, T, H * D]``), split into heads
   (``[B, T, H, D]``), or fused. A layout of another kind is a function of its own.
2. Register one line below, under the ``model_type`` of the config of the decoder.
3. Add a tiny config of it to ``tests/tiny_models.py``. The probe test then rotates the captured tensors and compares
   them with what the attention function receives; it must pass exactly.

Requirements: attention goes through transformers' attention interface, decoder layers are
``decoder.layers[i].self_attn``, RoPE is passed as ``position_embeddings`` with halves repeated, and attention is plain
(no soft cap, no sinks, no bias). Layers may differ in shape, rotary table, window and scale: the scale is what the
attention module hands to the attention function. RoPE may pair channels a half apart, or neighbours (``interleaved``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..gates.geometry import Geometry

__all__ = [
    "FAMILIES",
    "Family",
    "Geometry",
    "find_attention",
    "find_decoder",
    "flat",
    "fused",
    "gated_indices",
    "heads_first",
    "heads_last",
    "sliding_window",
]

# What a submodule gave for queries and for keys -> queries [B, Hq, T, D] and keys [B, Hkv, T, D] before RoPE.
Layout = Callable[[Tensor, Tensor, Geometry], tuple[Tensor, Tensor]]


def flat(query: Tensor, key: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Both ``[B, T, H * D]``."""
    query, key = (x.unflatten(-1, (-1, geometry.head_dim)).transpose(1, 2) for x in (query, key))
    return query, key


def heads_last(query: Tensor, key: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Both ``[B, T, H, D]``."""
    return query.transpose(1, 2), key.transpose(1, 2)


def heads_first(query: Tensor, key: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Both ``[B, H, T, D]``."""
    return query, key


def fused(query: Tensor, key: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Both the same ``[B, T, (Hq + 2 * Hkv) * D]``: queries, keys, values."""
    width, key_width = geometry.num_heads * geometry.head_dim, geometry.num_kv_heads * geometry.head_dim
    return flat(query[..., :width], key[..., width : width + key_width], geometry)


@dataclass(frozen=True)
class Family:
    """How one model family computes queries and keys.

    Attributes:
        query: name of the submodule of the attention module whose output is the queries before RoPE.
        key: the same for the keys; it may be the same submodule.
        layout: turns the two outputs into queries and keys by head, given the layer's geometry.
        token_axis: dimension of the tokens in the two outputs.
        one_window: whether all layers have the config's sliding window, whatever its ``layer_types`` say.
        interleaved: whether RoPE turns neighbouring channels (0 and 1, 2 and 3, ...) instead of channels that are half
            the rotary width apart.
        shape: shape of a layer's attention, from the decoder's config and the layer's index.
    """

    query: str
    key: str
    layout: Layout
    token_axis: int = 1
    one_window: bool = False
    interleaved: bool = False
    shape: Callable[[Any, int], Geometry] = Geometry.of

    def before_rope(self, query: Tensor, key: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """Queries ``[B, Hq, T, D]`` and keys ``[B, Hkv, T, D]`` before RoPE, from what the two submodules gave; in the
        order of channels of :meth:`half_split`, which the model's rotary table fits."""
        width = geometry.rotary_dim or geometry.head_dim
        query, key = self.layout(query, key, geometry)
        return self.half_split(query, width), self.half_split(key, width)

    def half_split(self, x: Tensor, width: int) -> Tensor:
        """``x [..., D]`` with channels that RoPE turns together ``width / 2`` apart, within its first ``width``."""
        if not self.interleaved:
            return x
        return torch.cat((x[..., 0:width:2], x[..., 1:width:2], x[..., width:]), -1)

    def geometry(self, decoder: nn.Module, layer: int) -> Geometry:
        """Shape of the attention of one layer of a decoder, its window and rotary width included.

        Raises:
            ValueError: the decoder's config lacks what is needed.
        """
        config = decoder.config
        shape, width = self.shape(config, layer), _rotary_width(decoder, layer)
        width = shape.rotary_dim if width is None else width
        return replace(shape, window=sliding_window(config, layer), rotary_dim=width)


_PROJECTIONS = Family("q_proj", "k_proj", flat)
_NORMS_PER_HEAD = Family("q_norm", "k_norm", heads_last)

FAMILIES: dict[str, Family] = {
    "gemma3_text": Family("q_norm", "k_norm", heads_first, token_axis=2),
    "glm4": replace(_PROJECTIONS, interleaved=True),
    "granite": _PROJECTIONS,
    "llama": _PROJECTIONS,
    "mistral": replace(_PROJECTIONS, one_window=True),
    "olmo2": Family("q_norm", "k_norm", flat),
    "phi3": Family("qkv_proj", "qkv_proj", fused),
    "qwen2": _PROJECTIONS,
    "qwen3": _NORMS_PER_HEAD,
    "qwen3_moe": replace(_NORMS_PER_HEAD, one_window=True),
}


def _rotary_width(decoder: nn.Module, layer: int) -> int | None:
    """Channels of the rotary table of a layer, from the frequencies that the decoder holds; None: it holds none."""
    table: Any = getattr(decoder, "rotary_emb", None)
    kinds = getattr(decoder.config, "layer_types", None)
    frequencies = getattr(table, "inv_freq", None)
    if frequencies is None and kinds:
        frequencies = getattr(table, f"{kinds[layer]}_inv_freq", None)
    return None if frequencies is None else 2 * len(frequencies)


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
