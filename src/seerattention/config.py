"""What a set of gates looks like: frozen, checked at construction, to and from plain dicts."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BLOCK_SIZES = (32, 64, 128)
POOLING_KINDS = ("max", "min", "avg")
# Wider gates than any model has heads: a number that was meant for something else.
MAX_WIDTH = 1024

OLD_WIDTH = "hidden_size"
"""What earlier versions call the width of a gate, in files too."""

FORM = "form"
"""Entry of a gate spec's dict that says which form of gate it describes; a missing one means the paper's."""


def _check_integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def _kinds(name: str, kinds: Any) -> tuple[str, ...]:
    if not isinstance(kinds, list | tuple) or not all(isinstance(kind, str) for kind in kinds):
        raise TypeError(f"{name} must be a tuple of {POOLING_KINDS}, got {kinds!r}")
    kinds = tuple(kinds)
    unknown = [kind for kind in kinds if kind not in POOLING_KINDS]
    if not kinds or unknown or len(set(kinds)) != len(kinds):
        raise ValueError(f"{name} must be a non-empty set of {POOLING_KINDS} without repeats, got {kinds}")
    return kinds


@dataclass(frozen=True, init=False)
class PrefillGateConfig:
    """The prefill gate of the SeerAttention paper (arXiv 2410.13276, section 3.1); the defaults are the published form.

    Attributes:
        k_pooling: how keys are pooled per block, concatenated in this order.
        q_pooling: how queries are pooled per block, concatenated in this order.
        width: channels of the pooled and projected vectors; None is the model's head_dim. Earlier versions, and their
            files, call it ``hidden_size``, which is still taken as a keyword.
        q_linear: whether queries have a linear layer of their own. None chooses as the published checkpoints do: none
            where the pooled query already has the gate's width (one pooling, width == head_dim), else one.
        rope: re-apply the model's rotary embedding at block positions.
    """

    k_pooling: tuple[str, ...]
    q_pooling: tuple[str, ...]
    width: int | None
    q_linear: bool | None
    rope: bool

    def __init__(
        self,
        k_pooling: Sequence[str] = ("max", "min", "avg"),
        q_pooling: Sequence[str] = ("avg",),
        width: int | None = None,
        q_linear: bool | None = None,
        rope: bool = True,
        *,
        hidden_size: int | None = None,
    ) -> None:
        name, given = ("width", width) if hidden_size is None else (OLD_WIDTH, hidden_size)
        if given is not None:
            _check_integer(name, given)
            if not 0 < given <= MAX_WIDTH or given % 2:
                raise ValueError(
                    f"{name} must be a positive even number of at most {MAX_WIDTH}, or None (the model's head_dim), "
                    f"got {given}"
                )
        if width not in (None, given):
            raise ValueError(f"width ({width}) and {OLD_WIDTH} ({hidden_size}) are one thing; pass width only")
        if q_linear is not None:
            _check_flag("q_linear", q_linear)
        _check_flag("rope", rope)
        object.__setattr__(self, "k_pooling", _kinds("k_pooling", k_pooling))
        object.__setattr__(self, "q_pooling", _kinds("q_pooling", q_pooling))
        object.__setattr__(self, "width", given)
        object.__setattr__(self, "q_linear", q_linear)
        object.__setattr__(self, "rope", rope)

    def resolve(self, head_dim: int) -> PrefillGateConfig:
        """The same with ``width`` and ``q_linear`` filled in for a model with this head_dim.

        Raises:
            ValueError: ``q_linear=False`` where the pooled query does not have the gate's width.
        """
        width = self.width or head_dim
        needs_linear = width != head_dim or len(self.q_pooling) > 1
        q_linear = needs_linear if self.q_linear is None else self.q_linear
        if needs_linear and not q_linear:
            raise ValueError(
                f"q_linear=False needs one query pooling and width == head_dim ({head_dim}), got "
                f"q_pooling={self.q_pooling}, width={width}; leave q_linear=None"
            )
        return dataclasses.replace(self, width=width, q_linear=q_linear)


@dataclass(frozen=True)
class GateConfig:
    """Gates for a whole model: the block size that mask and pooling share, and one gate spec per phase.

    Attributes:
        block_size: tokens a block: 32, 64 or 128.
        prefill: the prefill gate, or None for no prefill gate.
        decode: reserved for the decode gate, which this version does not have yet; must be None.
    """

    block_size: int = 64
    prefill: PrefillGateConfig | None = dataclasses.field(default_factory=PrefillGateConfig)
    decode: None = None

    def __post_init__(self) -> None:
        _check_integer("block_size", self.block_size)
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {self.block_size}")
        if self.decode is not None:
            raise NotImplementedError("decode gates are not part of this version; pass decode=None")
        if self.prefill is None:
            raise ValueError("GateConfig needs at least one gate; prefill and decode are both None")
        if not isinstance(self.prefill, PrefillGateConfig):
            raise TypeError(f"prefill must be a PrefillGateConfig, got {type(self.prefill).__name__}")

    def to_dict(self) -> dict[str, Any]:
        """Plain types only; each gate spec names its form."""
        data = dataclasses.asdict(self)
        for phase in PHASES:
            if data[phase] is not None:
                data[phase] = {FORM: _FORM_NAMES[type(getattr(self, phase))], **data[phase]}
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GateConfig:
        """Inverse of :meth:`to_dict`. Unknown keys warn.

        Raises:
            ValueError: a missing ``block_size`` or ``prefill``, an unknown form, or values out of range.
            TypeError: values of a wrong type.
        """
        if not isinstance(data, Mapping):
            raise TypeError(f"a gate config must be a mapping, got {type(data).__name__}")
        missing = [key for key in ("block_size", "prefill") if key not in data]
        if missing:
            raise ValueError(f"gate config lacks {missing}; found {sorted(data)}")
        known = _known_fields(cls, data, "gate config")
        for phase in PHASES:
            if known.get(phase) is not None:
                known[phase] = _spec_from_dict(known[phase], f"{phase} gate config")
        return cls(**known)


PHASES = ("prefill", "decode")
"""The phases of inference that have gates of their own, as entries of :class:`GateConfig`."""

FORMS: dict[str, type] = {"paper": PrefillGateConfig}
"""Gate specs by the name that their form has in files."""

_FORM_NAMES = {spec: name for name, spec in FORMS.items()}


def _spec_from_dict(data: Any, what: str) -> Any:
    if not isinstance(data, Mapping):
        raise TypeError(f"{what} must be a mapping, got {type(data).__name__}")
    name = data.get(FORM, "paper")
    if not isinstance(name, str) or name not in FORMS:
        raise ValueError(
            f"{what}: form must be one of {sorted(FORMS)}, got {name!r}; a newer version of seerattention may have "
            "written it"
        )
    # A width that a newer entry gives goes before one of an older name.
    old = {OLD_WIDTH: data[OLD_WIDTH]} if OLD_WIDTH in data and data.get("width") is None else {}
    given = {key: value for key, value in data.items() if key not in (FORM, OLD_WIDTH)}
    return FORMS[name](**_known_fields(FORMS[name], given, what), **old)


def _known_fields(cls: type, data: Mapping[str, Any], what: str) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(data) - names)
    if unknown:
        warnings.warn(
            f"{what} has unknown keys {unknown}, which are ignored; a newer version may have written it", stacklevel=3
        )
    return {key: value for key, value in data.items() if key in names}
