"""Checks of what options were given, before any work is done; every sentence names the option.

Numbers: :func:`whole`, :func:`real`, and the kinds of items that :func:`~seerattention.cli.common.parse_list` takes.
Places: :func:`check_model`, :func:`check_gates`, :func:`check_output`. What the package's own checks say gets the name
of the option with :func:`named`; an option that another one makes useless is not passed over in silence, see
:func:`say_unused`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..testbed import MODELS

if TYPE_CHECKING:
    import typer

    from .common import Terminal

__all__ = [
    "DTYPES",
    "check_choice",
    "check_dtype",
    "check_gates",
    "check_model",
    "check_output",
    "check_seed",
    "check_task_files",
    "is_given",
    "named",
    "parse_density",
    "parse_index",
    "parse_target",
    "parse_threshold",
    "real",
    "say_unused",
    "whole",
]

DTYPES = ("bfloat16", "float16", "float32")
_LARGEST_SEED = 2**62  # generators take 64 bits, and seeds are added to

# ---- numbers -----------------------------------------------------------------------------------------------------


def whole(option: str, value: int, minimum: int = 1, maximum: int | None = None, meaning: str = "") -> int:
    """``value`` if it lies between the bounds; ``meaning`` says what a special value does ("0: all")."""
    if value < minimum or (maximum is not None and value > maximum):
        bounds = f"at least {minimum}" if maximum is None or value < minimum else f"at most {maximum}"
        raise ValueError(f"{option} must be {bounds}{f' ({meaning})' if meaning else ''}, got {value}")
    return value


def real(
    option: str, value: float, minimum: float = 0.0, *, exclusive: bool = False, maximum: float = math.inf
) -> float:
    """``value`` if it is a finite number from ``minimum`` (``exclusive``: above it) to ``maximum``."""
    large_enough = value > minimum if exclusive else value >= minimum  # NaN is neither
    if not (math.isfinite(value) and large_enough and value <= maximum):
        bounds = f"{'above' if exclusive else 'at least'} {minimum:g}"
        bounds += f" and at most {maximum:g}" if math.isfinite(maximum) else ""
        raise ValueError(f"{option} must be a number {bounds}, got {value:g}")
    return value


def check_seed(seed: int) -> int:
    """A seed that every generator takes."""
    return whole("--seed", seed, 0, _LARGEST_SEED)


def parse_density(text: str) -> float:
    """An item of ``--densities``."""
    value = float(text)
    if not 0 < value <= 1:  # NaN is no density either
        raise ValueError("a density must lie in (0, 1]")
    return value


def parse_target(text: str) -> float:
    """An item of ``--densities`` where budgets are fitted."""
    value = float(text)
    if not 0 < value < 1:
        raise ValueError("the density of a budget must lie between 0 and 1")
    return value


def parse_threshold(text: str) -> float:
    """An item of ``--thresholds``."""
    value = float(text)
    if not 0 <= value < 1:
        raise ValueError("a threshold is a probability and must lie in [0, 1)")
    return value


ROPE_SCALINGS = ("yarn", "linear", "dynamic")
"""Kinds of ``--rope-scaling``: those of transformers that need no more than a factor."""


def parse_rope_scaling(text: str) -> tuple[str, float]:
    """``--rope-scaling``: kind and factor, as in "yarn:2"."""
    kind, _, factor = text.partition(":")
    try:
        value = float(factor)
    except ValueError:
        value = math.nan
    if kind not in ROPE_SCALINGS or not (math.isfinite(value) and value > 1):
        raise ValueError(
            f"--rope-scaling is one of {', '.join(ROPE_SCALINGS)} with a factor above 1, as in 'yarn:2', got {text!r}"
        )
    return kind, value


def parse_index(text: str) -> int:
    """An item of ``--layers`` or ``--heads``: layers and heads are counted from 0."""
    if not (text.isascii() and text.isdecimal()):
        raise ValueError("it must be a whole number of 0 or more")
    return int(text)


# ---- names and places --------------------------------------------------------------------------------------------


def check_choice(items: Iterable[str], known: Iterable[str], what: str) -> list[str]:
    """Items of a list that are all known; ``what`` is the option's name without its dashes."""
    items, known = list(items), list(known)
    unknown = [item for item in items if item not in known]
    if unknown:
        raise ValueError(f"--{what}: {', '.join(unknown)} is not known; choose from {', '.join(known)}")
    return items


def check_dtype(dtype: str) -> str:
    """``auto`` or one of :data:`DTYPES`."""
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"--dtype must be auto, {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, got {dtype!r}")
    return dtype


def check_model(model: str) -> str:
    """A model that can be there: one of the testbed's, a folder, or what could be a hub id."""
    if not model.strip():
        raise ValueError("--model is empty; give a model folder, a hub id (owner/name) 'testbed' or 'smollm2'")
    if model in MODELS or not _means_a_path(model):
        return model
    folder = Path(model).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"no model folder at {model}")
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise FileNotFoundError(f"--model: {model} holds no model: there is no config.json in it")
    return model


def check_gates(gates: str, option: str = "--gates") -> str:
    """A folder, or what could be a hub id."""
    if not gates.strip():
        raise ValueError(f"{option} is empty; give a folder of gates or a hub id (owner/name)")
    if _means_a_path(gates) and not Path(gates).expanduser().is_dir():
        raise FileNotFoundError(f"{option}: no folder of gates at {gates!r} (a hub id has the form 'owner/name')")
    return gates


def check_task_files(option: str, names: Iterable[str]) -> None:
    """Every name that is one of a YAML file has its file."""
    for name in names:
        if name.endswith((".yaml", ".yml")) and not Path(name).is_file():
            raise FileNotFoundError(f"{option}: no task file at {name}")


def _means_a_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or Path(name).exists()


def check_output(folder: Path, option: str = "--output") -> Path:
    """A folder that is there and can be written to, or can be made."""
    existing = next((place for place in (folder, *folder.absolute().parents) if os.path.lexists(place)), None)
    if existing is not None and not existing.is_dir():
        what = "is a file" if existing == folder else f"cannot be made: {existing} is a file"
        raise NotADirectoryError(f"{option} must be a folder, but {folder} {what}; choose another name")
    if existing is not None and not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{option}: {existing} cannot be written to; choose another folder")
    return folder


# ---- sentences ---------------------------------------------------------------------------------------------------


@contextmanager
def named(option: str | Mapping[str, str]) -> Iterator[None]:
    """Put the option's name before what the package's own checks say.

    Args:
        option: its name; or name of a field -> option, for checks of several fields, which begin with the field.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        name = option if isinstance(option, str) else option.get(str(error).split(" ", 1)[0])
        if name is None:
            raise
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(f"{name}: {error}") from error


def is_given(context: typer.Context, parameter: str) -> bool:
    """Whether a parameter of the command was named on the command line, not left at its default."""
    source = context.get_parameter_source(parameter)
    return source is not None and source.name == "COMMANDLINE"


def say_unused(context: typer.Context, terminal: Terminal, parameters: tuple[str, ...], reason: str) -> None:
    """Say which of these parameters were given although they have no effect, and why."""
    given = [f"--{name.replace('_', '-')}" for name in parameters if is_given(context, name)]
    if given:
        terminal.say(f"{', '.join(given)} {'has' if len(given) == 1 else 'have'} no effect: {reason}")
