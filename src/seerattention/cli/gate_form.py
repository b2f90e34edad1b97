"""The form of fresh gates, as the options of ``seer distill`` give it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import DecodeGateConfig, SubBlockGateConfig
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
    "QueryWindow",
    "ShareKeys",
    "say_what_gates_decide",
]

KeyPitch = Annotated[
    int | None,
    typer.Option(
        help="Tokens a key sub-block, of --form sub_block (default: 8) and of --phase decode (default: the block)."
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
_K_PITCH = 8


@dataclass(frozen=True)
class GateForm:
    """What was asked for, by the parameters of the command; None: as the form has it.

    Raises:
        ValueError: an unknown form.
    """

    form: str
    block_size: int
    k_pooling: str
    q_pooling: str | None
    gate_hidden_size: int
    q_pitch: int
    k_pitch: int | None
    tile_score: str
    share_keys: bool
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
        given = {name: getattr(self, name) for name in FINE_OPTIONS}
        given["k_pitch"] = _K_PITCH if self.k_pitch is None else self.k_pitch
        return {_FIELDS.get(name, name): value for name, value in given.items()}

    def _decode(self) -> dict[str, Any]:
        """What leads away from the published form; the rest is left to the defaults."""
        given, published = {name: getattr(self, name) for name in ("k_pitch", *DECODE_OPTIONS)}, DecodeGateConfig()
        return {name: value for name, value in given.items() if value != getattr(published, name)}

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
