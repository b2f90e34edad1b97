"""A forward that holds a prompt and, behind it, tokens that were decoded: each is attended as if it had come alone.

That is so without a cache, where every step of ``generate`` brings all tokens again, and in the first forward of
speculative decoding, which brings the prompt and the first candidates.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .dense import Arguments, attend_densely
from .forward import Call, Forward
from .implementation import original_of


class _PartOfMask:
    """Stands for a part of a mask in the arguments of a part; ``Forward.masks`` says what it is."""


def split(
    arguments: Arguments, call: Call, forward: Forward, mask: tuple[bool, Tensor | None], decoded: int
) -> list[tuple[Arguments, Call]]:
    """The prompt, which sees its own keys only, and the last ``decoded`` queries, which see all.

    Args:
        arguments: of the whole forward.
        call, forward: what hooks saw.
        mask: whether the mask is no more than causality and padding, and the padding ``[B, Tk]``.
        decoded: more than 0, fewer than the queries.
    """
    queries, keys = arguments.query.shape[2], arguments.key.shape[2]
    cut, axis = queries - decoded, call.layer.model.family.token_axis
    positions = call.position_ids if call.position_ids is not None else arguments.options.get("position_ids")
    parts = []
    for begin, end, last in ((0, cut, keys - decoded), (cut, queries, keys)):
        size = end - begin
        mine = arguments._replace(
            query=arguments.query[:, :, begin:end],
            key=arguments.key[:, :, :last],
            value=arguments.value[:, :, :last],
            mask=_part_of_mask(forward, arguments.mask, mask, last),
            options={**arguments.options, "position_ids": _part_of_positions(forward, positions, begin, end)},
        )
        captured = [None if x is None else x.narrow(axis, begin, size) for x in (call.query, call.key)]
        seen = dataclasses.replace(
            call,
            cos=call.cos[:, begin:end],
            sin=call.sin[:, begin:end],
            position_ids=mine.options["position_ids"],
            query=captured[0],
            key=captured[1],
            part=True,
        )
        parts.append((mine, seen))
    call.query = call.key = None
    return parts


def join(
    arguments: Arguments, padding: Tensor | None, prompt: Tensor | None, tokens: Tensor | None
) -> tuple[Tensor, Tensor | None] | None:
    """The outputs ``[B, T, Hq, D]`` of the two parts as one; parts that are None are attended densely.

    Returns:
        As the attention function, or None where both parts are dense: they are then attended as one.
    """
    if prompt is None and tokens is None:
        return None
    if prompt is None:
        assert tokens is not None
        prompt = attend_densely(arguments)[0][:, : -tokens.shape[1]]
    if tokens is None:
        tokens = _attend_last_densely(arguments, padding, arguments.query.shape[2] - prompt.shape[1])
    return torch.cat((prompt, tokens), 1), None


def _attend_last_densely(arguments: Arguments, padding: Tensor | None, queries: int) -> Tensor:
    """The last queries, by the implementation that the model came with; without attending the others, if that can be
    told to it."""
    original = original_of(arguments.module.config)
    query, keys = arguments.query[:, :, -queries:], arguments.key.shape[2]
    options = dict(arguments.options)
    if isinstance(options.get("position_ids"), Tensor):
        options["position_ids"] = options["position_ids"][..., -queries:]
    mask: Any
    if original in ("sdpa", "eager"):
        device = query.device
        seen = torch.arange(keys, device=device) <= torch.arange(keys - queries, keys, device=device)[:, None]
        mask = seen[None, None] if padding is None else seen & padding[:, None, None]
        mask = mask.expand(len(query), -1, -1, -1)
        if original == "eager":
            mask = torch.zeros(mask.shape, dtype=query.dtype, device=device).masked_fill(
                ~mask, torch.finfo(query.dtype).min
            )
    elif arguments.mask is None or (isinstance(arguments.mask, Tensor) and arguments.mask.dim() == 2):
        mask = arguments.mask  # FlashAttention, whose queries are the last of the keys
    else:
        return attend_densely(arguments)[0][:, -queries:]
    return attend_densely(arguments._replace(query=query, mask=mask, options=options))[0]


def _part_of_mask(forward: Forward, whole: Any, mask: tuple[bool, Tensor | None], keys: int) -> _PartOfMask:
    """One a forward, mask and number of keys."""
    name = ("part of a mask", id(whole), keys)
    if name not in forward.facts:
        part, (plain, padding) = _PartOfMask(), mask
        forward.masks.append((part, plain, None if padding is None else padding[:, :keys]))
        forward.facts[name] = part, whole  # kept, so that its id is its own
    return forward.facts[name][0]


def _part_of_positions(forward: Forward, positions: Tensor | None, begin: int, end: int) -> Tensor | None:
    name = ("part of positions", id(positions), begin, end)
    if positions is None:
        return None
    if name not in forward.facts:
        forward.facts[name] = positions[..., begin:end], positions  # kept, so that its id is its own
    return forward.facts[name][0]
