"""What a gate needs of the tokens that are in the cache already: their keys before RoPE.

The cache is the state: the keys in it are turned back by the rotary table and encoded anew for every chunk. So whatever
happened to the cache (cropped, reordered, repeated, copied, offloaded, filled by dense decoding) is right by
construction, and nothing has to be kept beside it. It costs one pass over the cached keys, which a chunk of many
queries reads anyway.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import Span, inverse_rope
from .forward import Call, Forward

# Rotary tables that depend on how long the sequence is: keys in the cache were turned by another one.
_CHANGING_TABLES = ("dynamic", "longrope")
# Error of keys that were turned back, relative to the keys: that of a rounding or two, by bytes of an element.
_TOLERANCE = {2: 3e-2, 4: 1e-4}

NO_TABLE = "its decoder has no rotary table (rotary_emb) to turn the keys of the cache back with"
CHANGING_TABLE = "its rotary table changes with the length of the sequence, so the keys of the cache have another one"
OTHER_TABLE = "its rotary table is not the one that the decoder makes for these positions"
OTHER_ROTATION = "turning keys back by the rotary table does not give what they were before it"


def history_problem(call: Call, forward: Forward, key: Tensor) -> str | None:
    """Why the keys ``[B, Hkv, Tk, D]`` of a layer cannot be turned back, or None.

    Waits for the device once a model, and once a forward whose positions were given; where the decoder counts them, the
    table was looked at in an earlier forward.
    """
    rotary: Any = getattr(call.layer.model.decoder, "rotary_emb", None)
    if rotary is None:
        return NO_TABLE
    types = getattr(rotary, "rope_type", "default")
    kind = _layer_type(call)
    if (types.get(kind) if isinstance(types, dict) else types) in _CHANGING_TABLES:
        return CHANGING_TABLE
    state, name = call.layer.model, ("same table", kind)
    known = forward.facts.get(name)
    if known is None:
        seen = (rotary, *_frequencies(rotary, kind))
        if forward.positions_are_made and _are_the_same(state.tables.get(kind, ()), seen):
            known = True
        else:
            known = _is_that_of_the_decoder(call, forward, key.shape[2])
            if known and forward.positions_are_made:
                state.tables[kind] = seen
        forward.facts[name] = known
    if not known:
        return OTHER_TABLE
    if state.turns_back is None:
        state.turns_back = _turns_back(call, key)
    return None if state.turns_back else OTHER_ROTATION


def _frequencies(rotary: Any, kind: str | None) -> tuple[Any, ...]:
    """All that a rotary table follows from, beside positions."""
    prefix = "" if kind is None else f"{kind}_"
    frequencies = getattr(rotary, f"{prefix}inv_freq", None)
    if frequencies is None or frequencies.is_inference():  # of which nobody counts changes
        return (object(),)
    hooks = tuple(rotary._forward_hooks), tuple(rotary._forward_pre_hooks)
    scale = getattr(rotary, f"{prefix}attention_scaling", None)
    return frequencies, frequencies._version, scale, rotary.__dict__.get("forward"), hooks


def _are_the_same(known: tuple[Any, ...], seen: tuple[Any, ...]) -> bool:
    return len(known) == len(seen) and all(
        x is y or (not isinstance(x, Tensor | nn.Module) and x == y) for x, y in zip(known, seen, strict=True)
    )


def _is_that_of_the_decoder(call: Call, forward: Forward, keys: int) -> bool:
    """Whether the table of a call is what the decoder makes for its positions, the last of ``keys``. Waits."""
    cos, sin = history_table(call, forward, keys)
    length, places = call.cos.shape[1], call.position_ids
    places = torch.arange(keys - length, keys)[None] if places is None else places
    places = places.to(cos.device).clamp(0, keys - 1)
    return all(torch.allclose(table[0, places], given) for table, given in ((cos, call.cos), (sin, call.sin)))


def history_table(call: Call, forward: Forward, length: int) -> tuple[Tensor, Tensor]:
    """The rotary table ``[1, length, rotary_dim]`` of positions 0, 1, ..., made once a forward and kind of layer."""
    kind = _layer_type(call)
    name = ("table", kind, length, call.cos.device)
    if name not in forward.facts:
        rotary: Any = call.layer.model.decoder.rotary_emb
        positions = torch.arange(length, device=call.cos.device)[None]
        given = {} if kind is None else {"layer_type": kind}
        forward.facts[name] = rotary(call.cos, positions, **given)
    return forward.facts[name]


def chunk_of(padding: Tensor, queries: int, forward: Forward) -> Tensor:
    """The padding ``[B, queries]`` of the last slots, one tensor a forward."""
    name = ("padding of a chunk", id(padding), queries)
    if name not in forward.facts:
        forward.facts[name] = padding[:, -queries:], padding  # kept, so that its id is its own
    return forward.facts[name][0]


def chunk_span(lengths: Tensor, queries: int, keys: int) -> Span:
    """Where the queries of left-padded rows of ``lengths [B]`` tokens lie, once the content of each comes first."""
    return Span.of_rows(queries, keys, start=(lengths - queries).clamp(min=0), length=lengths.clamp(max=queries))


def _turns_back(call: Call, key: Tensor) -> bool:
    """Whether that gives what the hooks saw, for the tokens of this chunk."""
    assert call.query is not None
    assert call.key is not None
    family = call.layer.model.family
    recent = family.before_rope(call.query, call.key, call.layer.geometry)[1]
    cos, sin = call.cos.to(key.device), call.sin.to(key.device)
    back = inverse_rope(family.half_split(key[:, :, -recent.shape[2] :], cos.shape[-1]), cos, sin)
    error = (back.float() - recent.float()).norm()
    return bool(error <= _TOLERANCE[key.element_size()] * recent.float().norm())


def _layer_type(call: Call) -> str | None:
    """The kind of a layer, where the decoder's rotary table is one of several by kind."""
    decoder: Any = call.layer.model.decoder
    return (
        decoder.config.layer_types[call.layer.index] if _asks_for_layer_type(type(decoder.rotary_emb).forward) else None
    )


@functools.cache
def _asks_for_layer_type(forward: Callable[..., Any]) -> bool:
    return "layer_type" in inspect.signature(forward).parameters
