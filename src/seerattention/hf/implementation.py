"""What stands in a config while gates are attached: the name that transformers dispatches to, and what it stands for.

Config objects have other owners than the model: a vision-language model, other models made from the same object. So
they are never swapped: their attention implementation is set, remembered, and set back.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn

from .architectures import FAMILIES

NAME = "seer"
"""The attention implementation that transformers dispatches to."""


class StandIn(str):
    """:data:`NAME` in a config, with the implementation that was there before.

    It travels with copies of the config, so whatever computes with such a config knows what dense means there.

    Attributes:
        original: the implementation of the untouched model.
        owners: the attached models that need the name in this config; copies have none at first.
        decodes: whether one of them decodes sparsely.
    """

    original: str | None
    owners: weakref.WeakSet[Any]
    decodes: bool

    def __new__(cls, original: str | None, decodes: bool = False) -> StandIn:
        self = super().__new__(cls, NAME)
        self.original = original
        self.owners = weakref.WeakSet()
        self.decodes = decodes
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return StandIn, (self.original, self.decodes)

    def __contains__(self, part: object) -> bool:
        """transformers asks for parts of the name, as in ``"flash" in implementation``: answered for the original."""
        return str(part) in (self.original or "")


def original_of(config: Any) -> str | None:
    """The implementation that dense attention with this config has.

    Raises:
        ValueError: the config says "seer", and nothing was attached to the model.
    """
    implementation = config._attn_implementation
    if isinstance(implementation, StandIn):
        return implementation.original
    if implementation != NAME:
        return implementation
    if config.model_type in FAMILIES:
        raise ValueError(
            f"the attention implementation of this model is {NAME!r}, but no gates are attached to it; call "
            "seerattention.attach(model, ...), or model.set_attn_implementation('sdpa')"
        )
    return "sdpa"  # another part of a model with gates: set_attn_implementation sets all parts


def decodes_sparsely(config: Any) -> bool:
    """Whether a model with this config may decode sparsely."""
    implementation = config._attn_implementation
    return isinstance(implementation, StandIn) and implementation.decodes


def configs_of(module: nn.Module) -> list[Any]:
    """The distinct config objects of a module and everything in it, configs inside configs included."""
    found: dict[int, Any] = {}
    for part in module.modules():
        for config in _with_parts(part.__dict__.get("config")):
            found.setdefault(id(config), config)
    return list(found.values())


def _with_parts(config: Any) -> Iterator[Any]:
    if not hasattr(config, "_attn_implementation_internal"):
        return
    yield config
    for name in getattr(config, "sub_configs", ()):
        yield from _with_parts(getattr(config, name, None))


def stand_in(config: Any, owner: Any) -> StandIn:
    """Set :data:`NAME` in ``config`` on behalf of ``owner``."""
    present = config._attn_implementation
    if not isinstance(present, StandIn):
        present = StandIn(original_of(config))
    present.owners.add(owner)
    config._attn_implementation_internal = present
    return present


def give_back(config: Any, owner: Any, original: str | None) -> None:
    """Undo :func:`stand_in`, unless another attached model still needs the name. ``original`` is used where it does not
    say itself what it stands for."""
    present = config._attn_implementation
    if isinstance(present, StandIn):
        present.owners.discard(owner)
        if not present.owners:
            config._attn_implementation_internal = present.original
    elif present == NAME:
        config._attn_implementation_internal = original
