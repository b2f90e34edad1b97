"""What a policy is, and its way through JSON."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..ops.indices import BlockIndices
from ..ops.span import Span

# Kernels count in 32 bits.
MOST_TOKENS = (1 << 31) - 1

T = TypeVar("T")

How = dict[str, Any]
"""What all selections take: block_size, lengths, span, last_blocks_dense."""

# By the kind in their dicts.
KINDS: dict[str, type[Policy]] = {}


class Policy(ABC):
    """Turns block logits into block indices. The diagonal block is always kept, so no row of valid tokens is empty.

    Every subclass that has a ``kind`` is known by it to :func:`policy_from_dict`.
    """

    kind: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in vars(cls):
            known = KINDS.setdefault(cls.kind, cls)
            if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(f"two policies of kind {cls.kind!r}: {known.__qualname__} and {cls.__qualname__}")
            KINDS[cls.kind] = cls  # the same one, defined anew

    @abstractmethod
    def select(
        self, logits: Tensor, *, block_size: int, lengths: Tensor | None = None, span: Span | None = None
    ) -> BlockIndices:
        """Choose the key blocks of each query block.

        Args:
            logits: ``[B, H, Nq, Nk]``, block scores before the softmax; query blocks are the last Nq of the Nk key
                blocks, or those of the span. What lies above the block diagonal is undefined and must be ignored.
            block_size: tokens a block.
            lengths: int64 ``[B]``, valid tokens of each right-padded row (None: all). Rows of blocks that are wholly
                padding get count 0; every other row selects what it would select without the padding.
            span: which query blocks the rows are, instead of ``lengths``. Rows that hold no query get count 0; every
                other row selects what it would select alone.

        Returns:
            BlockIndices on the device of the logits, with the span.
        """

    def of_layer(self, layer: int) -> Policy:
        """What chooses in the layer of that index: itself, unless it is not the same in all layers.

        Raises:
            ValueError: it knows no such layer.
        """
        return self

    def tensors(self, layer: int, columns: int, device: torch.device) -> tuple[Tensor, ...]:
        """What the layer of that index has of its own on the device, to choose among so many columns of scores. What
        is launched for one layer is launched for another with that one's tensors (``ops/replay.py``)."""
        return ()

    @property
    def rowwise(self) -> bool:
        """Whether it decides row by row: what a query block reads would be the same if the sequence ended with it."""
        return not getattr(self, "last_blocks_dense", 0)

    def to_dict(self) -> dict[str, Any]:
        """A plain dict, ``{"kind": ..., <arguments>}``, which :func:`policy_from_dict` turns back into the policy."""
        return {"kind": self.kind, **dataclasses.asdict(self)}  # type: ignore[call-overload]


class ScorePolicy(Policy):
    """A policy that looks at the scores, and may leave the last query blocks dense."""

    last_blocks_dense: int

    @abstractmethod
    def _select(self, logits: Tensor, how: How) -> BlockIndices: ...

    def select(
        self, logits: Tensor, *, block_size: int, lengths: Tensor | None = None, span: Span | None = None
    ) -> BlockIndices:
        how = {"block_size": block_size, "lengths": lengths, "span": span, "last_blocks_dense": self.last_blocks_dense}
        return self._select(logits, how)


def policy_from_dict(data: Mapping[str, Any]) -> Policy:
    """The inverse of :meth:`Policy.to_dict`.

    Raises:
        ValueError: an unknown or missing ``kind``, unknown or missing arguments, or values out of range.
    """
    policy, arguments = read_kind(data, KINDS, "policy")
    return policy(**arguments)


def read_kind(data: Mapping[str, Any], kinds: Mapping[str, type[T]], what: str) -> tuple[type[T], dict[str, Any]]:
    """The dataclass that a dict ``{"kind": ..., <arguments>}`` means, and its arguments: those it needs, and no other.

    Raises:
        ValueError: an unknown or missing ``kind``, unknown or missing arguments.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"a {what} must be a mapping with a kind, got {type(data).__name__}")
    arguments = dict(data)
    kind = arguments.pop("kind", None)
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"{what} kind must be one of {sorted(kinds)}, got {kind!r}")
    fields = dataclasses.fields(kinds[kind])  # type: ignore[arg-type]
    names = [field.name for field in fields]
    needed = [
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    unknown, missing = sorted(set(arguments) - set(names)), [name for name in needed if name not in arguments]
    if unknown or missing:
        raise ValueError(f"{what} {kind!r} takes {names}; unknown: {unknown}, missing: {missing}")
    return kinds[kind], arguments


def check_number(policy: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{policy}: {name} must be a finite number, got {value!r}")


def check_share(policy: str, name: str, value: Any, meaning: str) -> None:
    """A number in (0, 1]; ``meaning`` says what it is a share of."""
    check_number(policy, name, value)
    if not 0 < value <= 1:
        raise ValueError(f"{name} is {meaning} and must lie in (0, 1], got {value}")


def check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST_TOKENS:
        raise ValueError(f"{name} must be an integer from 0 to {MOST_TOKENS}, got {value!r}")


def check_numbers(policy: str, name: str, values: Any) -> tuple[float, ...]:
    """Numbers above 0, as a tuple.

    Raises:
        ValueError, TypeError: they are none.
    """
    if not isinstance(values, list | tuple):
        raise TypeError(f"{policy}: {name} must be a sequence of numbers, got {type(values).__name__}")
    for value in values:
        check_number(policy, name, value)
        if value <= 0:
            raise ValueError(f"{policy}: {name} must be above 0, got {value}")
    return tuple(float(value) for value in values)
