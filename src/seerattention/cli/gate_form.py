"""The form of fresh gates, as the options of ``seer distill`` give it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import DecodeGateConfig, SubBlockGateConfig
from ..testbed import GATE_CONFIG
from .options import named, say_unused

if TYPE_CHECKING:
    from ..config import GateConfig
    from .common import Terminal

__all__ = [
    "OPTION_OF",
    "GateForm",
    "KeyPitch",
    "MergeHeads",
    "Norms",
    "QueryPitch",
    "QueryWindow",
    "ShareKeys",
    "TileScore",
    "say_what_gates_decide",
]

KeyPitch = Annotated[
    int | None,
    typer.Option(
        help="Tokens a key sub-block, of --form sub_block (default: see --q-pitch) and of --phase decode (default: the "
        "block)."
    ),
]
QueryPitch = Annotated[
    int | None,
    typer.Option(
        help="Tokens a query sub-block, of --form sub_block. Without this, --k-pitch and --tile-score the model's size "
        "decides: 4 x 4 tokens and mass below 1 B parameters, which keeps more, 8 x 8 and max from there on, where "
        "choosing blocks must be cheap. With one of them the others are 8, 8 and max."
    ),
]
TileScore = Annotated[
    str | None,
    typer.Option(
        help="Score of a tile's products, of --form sub_block: max, logsumexp or mass. Default: see --q-pitch."
    ),
]
ShareKeys = Annotated[
    bool,
    typer.Option(
        "--share-keys/--own-keys",
        help="Of --form sub_block: one key projection a KV head, smaller and faster, or one a query head.",
    ),
]
Norms = Annotated[bool, typer.Option("--qk-norm/--no-qk-norm", help="Of --phase decode: norms of queries and keys.")]
MergeHeads = Annotated[
    bool,
    typer.Option(
        "--merge-heads/--own-heads",
        help="Of --phase decode: one query vector for the heads of a KV head, or one for each.",
    ),
]
QueryWindow = Annotated[
    int,
    typer.Option(
        help="Of --phase decode: tokens that choose blocks together when they are decoded, a token and those before it "
        "(1 to 64). Stored with the gates; training is the same whatever it is."
    ),
]

FINE_OPTIONS = ("q_pitch", "k_pitch", "tile_score", "share_keys")
"""What only prefill gates that are finer than their mask have, by the parameter of the command."""

DECODE_OPTIONS = ("qk_norm", "merge_heads", "query_window")
"""What only decode gates have; ``k_pitch`` they may have, too."""

_FIELDS = {"gate_hidden_size": "width", "tile_score": "reduce"}
"""Parameters of the command that gate configs call otherwise."""

_DECODE = "seerattention_r"
_FINE = "sub_block"
_QUERY_POOLINGS = {"paper": "avg", _FINE: "max,min,avg"}
_BY_SIZE = ("q_pitch", "k_pitch", "tile_score")
SMALL_MODEL = 10**9
"""Parameters from which on gates are to cost little, not to keep the most: choosing blocks by 4 x 4 and mass takes an
8B shape three quarters of its sparse attention at 32K, where 8 x 8 takes 22 %. What that loses was measured on models
of at most 135 M parameters (docs/experiments.md, "Sub-blocks by the size of the model")."""


@dataclass(frozen=True)
class GateForm:
    """What was asked for, by the parameters of the command; None: as the form has it.

    Attributes:
        parameters: of the model, which decide about sub-blocks of which nothing was said; None: a large one.

    Raises:
        ValueError: an unknown form.
    """

    form: str
    block_size: int
    k_pooling: str
    q_pooling: str | None
    gate_hidden_size: int
    q_pitch: int | None
    k_pitch: int | None
    tile_score: str | None
    share_keys: bool
    parameters: int | None = None
    qk_norm: bool = True
    merge_heads: bool = True
    query_window: int = 1

    def __post_init__(self) -> None:
        if self.form not in (*_QUERY_POOLINGS, _DECODE):
            raise ValueError(f"--form must be one of {', '.join(_QUERY_POOLINGS)}, got {self.form!r}")
        with named(OPTION_OF):  # also where another form does not read them: nobody means a wrong value
            SubBlockGateConfig(**self._fine())
            DecodeGateConfig(query_window=self.query_window)

    def _fine(self) -> dict[str, Any]:
        small = self.by_size and self.parameters is not None and self.parameters < SMALL_MODEL
        otherwise = GATE_CONFIG.prefill if small else SubBlockGateConfig()
        fields = {name: _FIELDS.get(name, name) for name in FINE_OPTIONS}
        said = {fields[name]: value for name in FINE_OPTIONS if (value := getattr(self, name)) is not None}
        return {field: getattr(otherwise, field) for field in fields.values()} | said

    def _decode(self) -> dict[str, Any]:
        """What leads away from the published form; the rest is left to the defaults."""
        given, published = {name: getattr(self, name) for name in ("k_pitch", *DECODE_OPTIONS)}, DecodeGateConfig()
        return {name: value for name, value in given.items() if value != getattr(published, name)}

    @property
    def by_size(self) -> bool:
        """Whether the size of the model decides: nothing was said of sub-blocks, and these gates have some."""
        return self.fine and all(getattr(self, name) is None for name in _BY_SIZE)

    @property
    def fine(self) -> bool:
        """Whether these gates have sub-blocks."""
        return self.form == _FINE

    def say_unused(self, context: typer.Context, terminal: Terminal) -> None:
        """Say which options were given that this form does not have."""
        fine: tuple[str, ...] = FINE_OPTIONS
        if self.form == _DECODE:
            reason = "queries of --phase decode are not pooled, and its gates have one form"
            say_unused(context, terminal, ("q_pooling", "form"), reason)
            fine = tuple(name for name in fine if name != "k_pitch")
        else:
            say_unused(context, terminal, DECODE_OPTIONS, "only gates of --phase decode have it")
        if not self.fine:
            say_unused(context, terminal, fine, "only --form sub_block has sub-blocks")

    def say_sub_blocks(self, terminal: Terminal) -> None:
        """Say which sub-blocks the size of the model made of it."""
        fine = self.options()
        size = (
            "no size that its config tells" if self.parameters is None else f"{self.parameters / 1e6:,.0f} M parameters"
        )
        terminal.say(
            f"the model has {size}: gates of {fine['q_pitch']} x {fine['k_pitch']} sub-blocks by {fine['tile_score']} "
            "(--q-pitch, --k-pitch, --tile-score)"
        )

    def options(self) -> dict[str, Any]:
        """What decides, by the parameter of the command."""
        q_pooling = _QUERY_POOLINGS.get(self.form, "avg") if self.q_pooling is None else self.q_pooling
        found = {
            "form": self.form,
            "block_size": self.block_size,
            "k_pooling": ",".join(_poolings(self.k_pooling)),
            "q_pooling": ",".join(_poolings(q_pooling)),
            "gate_hidden_size": self.gate_hidden_size,
        }
        if self.form == _DECODE:
            return {**found, **{name: getattr(self, name) for name in ("k_pitch", *DECODE_OPTIONS)}}
        fine = self._fine()
        return {**found, **{name: fine[_FIELDS.get(name, name)] for name in FINE_OPTIONS}} if self.fine else found

    def config(self) -> dict[str, Any]:
        """Fresh gates as ``GateConfig.from_dict`` reads them."""
        spec: dict[str, Any] = {"k_pooling": _poolings(self.k_pooling), "width": self.gate_hidden_size or None}
        if self.form == _DECODE:
            return {"block_size": self.block_size, "prefill": None, "decode": {**spec, **self._decode()}}
        spec["q_pooling"] = _poolings(self.options()["q_pooling"])
        if self.form != "paper":  # which dicts of earlier versions do not name, and runs of theirs go on
            spec["form"] = self.form
        if self.fine:
            spec |= self._fine()
        return {"block_size": self.block_size, "prefill": spec}


def _poolings(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


_PARAMETERS = ("form", "block_size", "k_pooling", "q_pooling", "gate_hidden_size", *FINE_OPTIONS, *DECODE_OPTIONS)
OPTION_OF = {_FIELDS.get(name, name): f"--{name.replace('_', '-')}" for name in _PARAMETERS}
"""Fields of gate configs, by which their errors begin -> the option."""


def say_what_gates_decide(
    terminal: Terminal, source: str, config: GateConfig | None, phase: str, asked: dict[str, Any]
) -> None:
    """Which form gates of a phase in ``source`` have, and which options for another one that makes useless."""
    spec: Any = None if config is None else getattr(config, phase)
    if config is None or spec is None:
        return
    said = {"form": spec.form, **dataclasses.asdict(spec), "block_size": config.block_size_of(phase)}
    said["width"] = said.get("width") or 0
    form = {name: said[field] for name in _PARAMETERS if (field := _FIELDS.get(name, name)) in said}
    form = {name: ",".join(value) if isinstance(value, list | tuple) else value for name, value in form.items()}
    terminal.say(f"starting from the gates in {source}: " + ", ".join(f"{name} {form[name]}" for name in form))
    for name, value in asked.items():
        if value != form.get(name):
            option = f"--{name.replace('_', '-')}"
            terminal.say(
                f"{option} {value} has no effect: --gates {source} decides, and its {name} is {form.get(name)}"
            )
