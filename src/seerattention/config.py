"""What a set of gates looks like: frozen, checked at construction, to and from plain dicts.

To add a form of gate, add a frozen dataclass here that subclasses :class:`GateSpec`; it says which module in ``gates/``
it describes.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ._config_checks import (
    BLOCK_SIZES,
    DECODE_BLOCK_SIZES,
    POOLING_KINDS,
    REDUCTIONS,
    check_block_size,
    check_flag,
    check_pitch,
    check_query_window,
    check_width,
    kinds_of,
)

PHASES = ("prefill", "decode")
"""The phases of inference that may have gates of their own: reading a prompt, and single tokens on a cache."""

OLD_WIDTH = "hidden_size"
"""What earlier versions call the width of a gate, in files too."""

FORM = "form"
"""Entry of a gate spec's dict that says which form of gate it describes; a missing one means the paper's."""

FORMS: dict[str, type[GateSpec]] = {}
"""Gate specs by the name that their form has in files. Every subclass of :class:`GateSpec` is in here."""


class GateSpec:
    """What one form of gate is given by: a frozen dataclass that checks its values, in one phase of a model.

    A subclass joins by being defined: files and :func:`seerattention.gates.build_gate` know it by what it says.

    Attributes:
        form: name of the form in files.
        phase: which of :data:`PHASES` it is for.
        module: where its :class:`~seerattention.gates.BlockGate` is, as ``"package.module:Class"``; None: nowhere yet.
        unsaid: fields and values that files leave out, as those of earlier versions do.
        block_size: a field: tokens a block of this phase; None: that of :class:`GateConfig`.
    """

    form: ClassVar[str]
    phase: ClassVar[str]
    module: ClassVar[str | None]
    unsaid: ClassVar[tuple[tuple[str, Any], ...]] = (("block_size", None),)
    block_size: int | None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.phase not in PHASES:
            raise ValueError(f"{cls.__name__}: phase must be one of {PHASES}, got {cls.phase!r}")
        known = FORMS.get(cls.form)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"{cls.__name__}: the form {cls.form!r} is that of {known.__name__}; choose another name")
        FORMS[cls.form] = cls

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, the form included; a block size that is not its own is left out."""
        data = {FORM: self.form, **dataclasses.asdict(self)}  # type: ignore[call-overload]
        return {name: value for name, value in data.items() if (name, value) not in self.unsaid}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GateSpec:
        """Inverse of :meth:`to_dict`. Unknown keys warn."""
        given = {key: value for key, value in data.items() if key != FORM}
        return cls(**_known_fields(cls, given, f"{cls.phase} gate config"))


@dataclass(frozen=True, init=False)
class PrefillGateConfig(GateSpec):
    """The prefill gate of the SeerAttention paper (arXiv 2410.13276, section 3.1); the defaults are the published form.

    Attributes:
        k_pooling: how keys are pooled per block, concatenated in this order.
        q_pooling: how queries are pooled per block, concatenated in this order.
        width: channels of the pooled and projected vectors; None is the model's head_dim. Earlier versions, and their
            files, call it ``hidden_size``, which is still taken as a keyword.
        q_linear: whether queries have a linear layer of their own. None chooses as the published checkpoints do: none
            where the pooled query already has the gate's width (one pooling, width == head_dim), else one.
        rope: re-apply the model's rotary embedding at block positions.
        block_size: tokens a block: 32, 64 or 128; None: that of :class:`GateConfig`.
    """

    form = "paper"
    phase = "prefill"
    module = "seerattention.gates.prefill:PrefillGate"

    k_pooling: tuple[str, ...]
    q_pooling: tuple[str, ...]
    width: int | None
    q_linear: bool | None
    rope: bool
    block_size: int | None

    def __init__(
        self,
        k_pooling: Sequence[str] = ("max", "min", "avg"),
        q_pooling: Sequence[str] = ("avg",),
        width: int | None = None,
        q_linear: bool | None = None,
        rope: bool = True,
        block_size: int | None = None,
        *,
        hidden_size: int | None = None,
    ) -> None:
        name, given = ("width", width) if hidden_size is None else (OLD_WIDTH, hidden_size)
        if given is not None:
            check_width(name, given)
        if width not in (None, given):
            raise ValueError(f"width ({width}) and {OLD_WIDTH} ({hidden_size}) are one thing; pass width only")
        if q_linear is not None:
            check_flag("q_linear", q_linear)
        check_flag("rope", rope)
        if block_size is not None:
            check_block_size(block_size)
        object.__setattr__(self, "k_pooling", kinds_of("k_pooling", k_pooling))
        object.__setattr__(self, "q_pooling", kinds_of("q_pooling", q_pooling))
        object.__setattr__(self, "width", given)
        object.__setattr__(self, "q_linear", q_linear)
        object.__setattr__(self, "rope", rope)
        object.__setattr__(self, "block_size", block_size)

    @property
    def share_keys(self) -> bool:
        """Whether a KV head's query heads share its encoded keys: where queries have a linear layer of their own."""
        return bool(self.q_linear)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PrefillGateConfig:
        """Inverse of :meth:`to_dict`; also of what earlier versions wrote."""
        given = {key: value for key, value in data.items() if key not in (FORM, OLD_WIDTH)}
        # A width that a newer entry gives goes before one of an older name.
        old = {OLD_WIDTH: data[OLD_WIDTH]} if OLD_WIDTH in data and data.get("width") is None else {}
        return cls(**_known_fields(cls, given, f"{cls.phase} gate config"), **old)

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
class SubBlockGateConfig(GateSpec):
    """A prefill gate that looks more finely than its mask: blocks are cut into sub-blocks on both sides.

    Sub-blocks are pooled, projected, rotated at their first tokens and multiplied as in the form of the paper; one
    score a tile is made of all its products. What a single token asks for, or holds, is lost in a vector of 64 tokens
    and not in one of 8. Products cost what attention costs, divided by ``q_pitch * k_pitch``; none is written out.

    Attributes:
        q_pitch, k_pitch: tokens a sub-block of queries and of keys: powers of two from 4 to the block size.
        k_pooling, q_pooling: how keys and queries are pooled per sub-block, concatenated in this order.
        width: channels of the projected vectors; None is the model's head_dim.
        reduce: what makes one score of a tile's products: ``"max"``, ``"logsumexp"``, or ``"mass"``: the largest share
            of its attention that a query sub-block gives to the tile. Twice the products; less perplexity is lost, and
            most with pitches of 4 (docs/experiments.md).
        share_keys: one key projection for the query heads of a KV head, rather than one for each of them. Encoded keys
            then take a group's share of the time and memory; measured on three models, gates are as good.
        rope: rotate sub-blocks at the positions of their first tokens.
        block_size: tokens a block of the mask: 32, 64 or 128; None: that of :class:`GateConfig`.
    """

    form = "sub_block"
    phase = "prefill"
    module = "seerattention.gates.sub_block:SubBlockGate"
    q_linear: ClassVar[bool] = True

    q_pitch: int = 8
    k_pitch: int = 8
    k_pooling: tuple[str, ...] = POOLING_KINDS
    q_pooling: tuple[str, ...] = POOLING_KINDS
    width: int | None = None
    reduce: str = "max"
    share_keys: bool = True
    rope: bool = True
    block_size: int | None = None

    def __post_init__(self) -> None:
        if self.block_size is not None:
            check_block_size(self.block_size)
        for name in ("q_pitch", "k_pitch"):
            check_pitch(name, getattr(self, name), self.block_size or BLOCK_SIZES[-1])
        object.__setattr__(self, "k_pooling", kinds_of("k_pooling", self.k_pooling))
        object.__setattr__(self, "q_pooling", kinds_of("q_pooling", self.q_pooling))
        if self.width is not None:
            check_width("width", self.width)
        if self.reduce not in REDUCTIONS:
            raise ValueError(f"reduce must be one of {REDUCTIONS}, got {self.reduce!r}")
        check_flag("share_keys", self.share_keys)
        check_flag("rope", self.rope)

    def resolve(self, head_dim: int) -> SubBlockGateConfig:
        """The same with ``width`` filled in for a model with this head_dim."""
        return dataclasses.replace(self, width=self.width or head_dim)


@dataclass(frozen=True)
class DecodeGateConfig(GateSpec):
    """The decode gate of SeerAttention-R (arXiv 2506.08889); the defaults are the published form.

    The query of each token is merged over the query heads of a KV head by a linear layer, keys are pooled per block,
    and each KV head has one row of scores for all of its query heads. Keys may also be pooled more finely, and query
    heads be left apart; a block's score is then the largest of its products.

    Attributes:
        k_pooling: how keys are pooled per sub-block, concatenated in this order.
        width: channels of the queries and projected keys; None is the model's head_dim.
        qk_norm: RMS norms, with weights, of queries and projected keys.
        rope: rotate queries at their tokens' positions, keys at the first positions of their sub-blocks.
        block_size: tokens a block: 16, 32, 64 or 128; None: that of :class:`GateConfig`.
        k_pitch: tokens a sub-block of keys: a power of two from 4 to the block size; None: blocks are not cut.
        merge_heads: one query vector for all query heads of a KV head; False: one for each.
        query_window: a token reads the blocks that it or one of the ``query_window - 1`` tokens before it asks for, as
            in a prompt the queries of a block choose for each other; 1 to 64. 1, the published form: each for itself.
            It is of decoding alone: gates are trained the same way whatever it is.
    """

    form = "seerattention_r"
    phase = "decode"
    module = "seerattention.gates.decode:DecodeGate"
    unsaid = (*GateSpec.unsaid, ("k_pitch", None), ("merge_heads", True), ("query_window", 1))

    k_pooling: tuple[str, ...] = ("max", "min", "avg")
    width: int | None = None
    qk_norm: bool = True
    rope: bool = True
    block_size: int | None = None
    k_pitch: int | None = None
    merge_heads: bool = True
    query_window: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "k_pooling", kinds_of("k_pooling", self.k_pooling))
        if self.width is not None:
            check_width("width", self.width)
        check_flag("qk_norm", self.qk_norm)
        check_flag("rope", self.rope)
        if self.block_size is not None:
            check_block_size(self.block_size, DECODE_BLOCK_SIZES)
        if self.k_pitch is not None:
            check_pitch("k_pitch", self.k_pitch, self.block_size or BLOCK_SIZES[-1])
        check_flag("merge_heads", self.merge_heads)
        check_query_window(self.query_window)

    def resolve(self, head_dim: int) -> DecodeGateConfig:
        """The same with ``width`` filled in for a model with this head_dim."""
        return dataclasses.replace(self, width=self.width or head_dim)


@dataclass(frozen=True)
class GateConfig:
    """Gates for a whole model: one gate spec per phase, and the block size of those that have none of their own.

    Attributes:
        block_size: tokens a block, shared by mask and pooling: 32, 64 or 128.
        prefill: the gate that reads prompts (:class:`PrefillGateConfig` or :class:`SubBlockGateConfig`), or None.
        decode: the gate that decodes (:class:`DecodeGateConfig`), or None: decoding is dense.
    """

    block_size: int = 64
    prefill: GateSpec | None = dataclasses.field(default_factory=PrefillGateConfig)
    decode: GateSpec | None = None

    def __post_init__(self) -> None:
        check_block_size(self.block_size)
        for phase in PHASES:
            spec = getattr(self, phase)
            if spec is not None and not (isinstance(spec, GateSpec) and spec.phase == phase):
                names = " or ".join(known.__name__ for known in FORMS.values() if known.phase == phase)
                raise TypeError(f"{phase} must be a {names} or None, got {type(spec).__name__}")
            if spec is not None:
                self.spec_of(phase)  # raises where what it says does not go with the block size
        if not self.phases:
            raise ValueError("GateConfig needs at least one gate; prefill and decode are both None")

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases that have a gate."""
        return tuple(phase for phase in PHASES if getattr(self, phase) is not None)

    def spec_of(self, phase: str) -> GateSpec:
        """The spec of a phase with a block size, its own or that of all.

        Raises:
            ValueError: the phase has no gate.
        """
        spec = getattr(self, phase) if phase in PHASES else None
        if spec is None:
            raise ValueError(f"these gates have no gate for {phase!r}, only for {', '.join(self.phases)}")
        return spec if spec.block_size is not None else dataclasses.replace(spec, block_size=self.block_size)

    def block_size_of(self, phase: str) -> int:
        """Tokens a block in a phase, whether it has a gate or not."""
        spec = getattr(self, phase)
        return self.block_size if spec is None or spec.block_size is None else spec.block_size

    def to_dict(self) -> dict[str, Any]:
        """Plain types only; each gate spec names its form."""
        specs = {phase: getattr(self, phase) for phase in PHASES}
        return {
            "block_size": self.block_size,
            **{phase: None if spec is None else spec.to_dict() for phase, spec in specs.items()},
        }

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
                known[phase] = _spec_from_dict(known[phase], phase)
        return cls(**known)


_UNNAMED_FORM: dict[str, type[GateSpec]] = {"prefill": PrefillGateConfig, "decode": DecodeGateConfig}
"""The form of a spec that names none, by phase."""


def _spec_from_dict(data: Any, phase: str) -> GateSpec:
    what = f"{phase} gate config"
    if not isinstance(data, Mapping):
        raise TypeError(f"{what} must be a mapping, got {type(data).__name__}")
    name = data.get(FORM, _UNNAMED_FORM[phase].form)
    known = sorted(form for form, spec in FORMS.items() if spec.phase == phase)
    if not isinstance(name, str) or name not in known:
        raise ValueError(
            f"{what}: form must be one of {known}, got {name!r}; a newer version of seerattention may have written it"
        )
    return FORMS[name].from_dict(data)


def _known_fields(cls: type, data: Mapping[str, Any], what: str) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(data) - names)
    if unknown:
        warnings.warn(
            f"{what} has unknown keys {unknown}, which are ignored; a newer version may have written it", stacklevel=3
        )
    return {key: value for key, value in data.items() if key in names}
