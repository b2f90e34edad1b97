"""The queries of the last tokens, which choose blocks together with those that are decoded next (``query_window``).

They come from every forward in which the hooks see them, sparse or dense: the end of a prompt, a chunk, a turn, a
decoded token, candidates. They stay with the cache layer (``kept.py``), or, without a cache, come again with each
forward. Slots of padding in front of a row are among them; the span of a step says which these are. Where they are not
to be had, windows are shorter: on a cache that was filled by another process or without gates, after a crop further
back than is kept, and on static caches in inference mode, of which nobody can say what was written into them.
"""

from __future__ import annotations

from typing import cast

import torch

from ..gates import DecodeGate
from ..ops.replay import capturing
from .decoding import holds_keys
from .dense import Arguments
from .forward import Call
from .generation import UNKNOWN
from .kept import keep


def remember(arguments: Arguments, call: Call, decoded: int) -> None:
    """Encode the queries of the last tokens of a forward of a layer that :attr:`~LayerState.remembers`.

    Args:
        arguments: of the whole forward.
        call: gets ``last`` and, of decoded tokens, ``recent``.
        decoded: how many of the last tokens are decoded ones; or :data:`UNKNOWN`.
    """
    layer, tokens, device = call.layer, arguments.query.shape[2], arguments.query.device
    call.past = layer.cache_layer(call)
    needed = call.past is not None or 0 < decoded < tokens
    if not needed or decoded == UNKNOWN or call.query is None or call.key is None or capturing(device):
        return
    layer.place_gate(device)
    gate = cast(DecodeGate, layer.gate_of(arguments.query.shape[1], layer.decode_gate))
    last = call.last
    if last is None or last.window != gate.query_window:  # another one was set
        last = gate.new_query_state()
    if decoded == tokens:
        size, (query, _) = tokens, layer.before_rope(call)
    else:
        size = min(tokens, max(last.capacity, decoded + gate.query_window - 1))
        axis = layer.model.family.token_axis
        ends = [x.narrow(axis, tokens - size, size) for x in (call.query, call.key)]
        query, _ = layer.model.family.before_rope(ends[0], ends[1], layer.geometry)
    with torch.inference_mode(False), torch.no_grad():  # what is kept may go on in another mode
        cos, sin = call.cos, call.sin
        if size < tokens or cos.device != device:
            cos, sin = (table[:, tokens - size :].to(device) for table in (cos, sin))
        encoded = gate.encode_queries(query, cos, sin)
        if decoded < size:
            last.append(encoded[:, :, : size - decoded])
        if decoded > 0:
            call.recent = last.append(encoded[:, :, size - decoded :] if decoded < size else encoded)
    call.last = last
    if decoded < tokens:
        keep_queries(arguments, call)


def remember_token(call: Call, gate: DecodeGate) -> None:
    """:func:`remember` of one decoded token of a layer, where all else was looked at (``token_plan.py``)."""
    assert call.last is not None
    query, _ = call.layer.before_rope(call)
    with torch.inference_mode(False), torch.no_grad():  # what is kept may go on in another mode
        call.recent = call.last.append(gate.encode_queries(query, call.cos, call.sin))


def keep_queries(arguments: Arguments, call: Call) -> None:
    """Leave the queries of the last tokens with the cache layer, without encoded keys."""
    if call.last is None or call.past is None or not holds_keys(call.past, call, arguments.key):
        return
    gate = call.layer.gate_of(arguments.query.shape[1], call.layer.decode_gate)
    assert gate is not None
    keep(call.past, gate, None, call.last)
