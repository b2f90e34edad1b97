"""Below which length prompts are attended densely, where nobody says.

Where sparse prefill begins to pay depends on how much a layer computes: in a small model the gate's launches take
longer than what they save. So the default goes by the device and the model's shape:

1. what ``seer bench --save`` measured on this very machine for this very shape, if it did;
2. the committed table (``crossings.py``) of measured shapes on this kind of device;
3. :data:`DEFAULT_MIN_CONTEXT` by the type of the device.

Nothing is timed when gates are attached, so the same files give the same results.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..files import DamagedFileError, read_json, write_file
from ..gates.geometry import Geometry
from .crossings import CROSSINGS

__all__ = ["DEFAULT_MIN_CONTEXT", "Shape", "default_min_context", "device_kind", "machine", "save", "saved_path"]

logger = logging.getLogger(__name__)

DEFAULT_MIN_CONTEXT = {"cpu": 2048, "cuda": 4096}
"""Prompts shorter than this many tokens are attended densely when ``min_context`` is None and nothing is known of the
device and the model's shape, by device type."""

_OTHER_DEVICES_MIN_CONTEXT = 4096
_FORMAT = 1


class Shape(NamedTuple):
    """What of a model decides how long a layer takes.

    Attributes:
        work: parameters that a token meets in a layer (of mixtures of experts, those of the experts that it is sent
            to).
        width: channels of all query heads, to which the time of attention is proportional.
    """

    work: int
    width: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Of the first layer of a decoder, from its config.

        Raises:
            ValueError: the config lacks what is needed.
        """
        geometry = Geometry.of(config)
        width, key_width = (heads * geometry.head_dim for heads in (geometry.num_heads, geometry.num_kv_heads))
        hidden = _number(config, "hidden_size") or width
        mlp = _number(config, "intermediate_size") or 4 * hidden
        experts = _number(config, "num_experts_per_tok")
        if experts:
            mlp = experts * (_number(config, "moe_intermediate_size") or mlp)
        return cls(hidden * (2 * width + 2 * key_width) + 3 * hidden * mlp, width)


def _number(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def device_kind(device: torch.device) -> str:
    """What measurements hold for: ``cpu``, or the GPU's name without its maker (``h100-80gb-hbm3``)."""
    if device.type != "cuda":
        return device.type
    name = torch.cuda.get_device_name(device).lower()
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\b(nvidia|amd|geforce|instinct)\b", "", name)).strip("-")


def machine(device: torch.device) -> str:
    """Name of this machine and device, of which a saved measurement says nothing about any other."""
    kind = device_kind(device)
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    return f"{platform.node()}: {kind}{threads}"


def default_min_context(shape: Shape | None, device: torch.device) -> int:
    """The default for a model's shape on a device; None: a model whose shape is not known."""
    found = None if shape is None else _saved(shape, device)
    if found is None and shape is not None:
        found = crossing(CROSSINGS.get(device_kind(device), ()), shape, device)
    return _by_type(device) if found is None else found


def crossing(table: Sequence[tuple[str, int, int, int]], shape: Shape, device: torch.device) -> int | None:
    """What a table of one kind of device says of a shape; None: it is empty.

    The more a layer computes, the earlier sparse prefill pays. So whatever holds for a model that is no larger, in work
    and in width, holds for this one. Of these only the largest count (those that none of the others contains): a
    measurement that is nearer says more, also where it is the longer one, and a shape that was measured itself gets
    what was measured. Between several the shortest holds. A model that is smaller than all of the table waits for the
    longest of them.
    """
    if not table:
        return None
    below = [row for row in table if row[1] <= shape.work and row[2] <= shape.width]
    nearest = [row for row in below if not any(_smaller(row, other) for other in below)]
    lengths = [length for *_, length in nearest]
    return min(lengths) if lengths else max(_by_type(device), *(length for *_, length in table))


def _smaller(row: tuple[str, int, int, int], other: tuple[str, int, int, int]) -> bool:
    """Whether a row of a table is of a shape that is no larger than another's, and another one."""
    return row[1] <= other[1] and row[2] <= other[2] and row[1:3] != other[1:3]


def _by_type(device: torch.device) -> int:
    return DEFAULT_MIN_CONTEXT.get(device.type, _OTHER_DEVICES_MIN_CONTEXT)


# ---- what was measured on this machine -------------------------------------------------------------------------------


def saved_path() -> Path:
    """Where ``seer bench --save`` writes: ``seerattention/min_context.json`` in ``$XDG_CACHE_HOME``, by default
    ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "seerattention" / "min_context.json"


def save(shape: Shape, device: torch.device, min_context: int, facts: Mapping[str, Any]) -> Path:
    """Keep a measurement for models of this shape on this machine; whatever else the file holds stays.

    Args:
        min_context: tokens from which on sparse prefill pays.
        facts: how it was measured, for readers.

    Raises:
        OSError: the file cannot be written.
    """
    path = saved_path()
    try:
        held = _read(path)
    except (OSError, DamagedFileError):
        held = {}
    mine = held.setdefault(machine(device), {})
    mine[_name(shape)] = {"min_context": min_context, **facts}
    write_file(path, json.dumps({"format": _FORMAT, "machines": held}, indent=1, sort_keys=True) + "\n")
    _read_once.cache_clear()
    return path


def _name(shape: Shape) -> str:
    return f"work {shape.work}, width {shape.width}"


def _saved(shape: Shape, device: torch.device) -> int | None:
    entry = _read_once(saved_path()).get(machine(device), {}).get(_name(shape), {})
    found = entry.get("min_context")
    return found if isinstance(found, int) and not isinstance(found, bool) and found >= 0 else None


@functools.cache
def _read_once(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """What is saved, or nothing; a damaged file is said and left."""
    try:
        return _read(path)
    except FileNotFoundError:
        return {}
    except (OSError, DamagedFileError) as error:
        logger.warning("the saved measurements are not used: %s; write them anew with `seer bench --save`", error)
        return {}


def _read(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    data = read_json(path)
    machines = data.get("machines") if data.get("format") == _FORMAT else None
    if not isinstance(machines, dict) or not all(
        isinstance(entry, dict) for shapes in machines.values() if isinstance(shapes, dict) for entry in shapes.values()
    ):
        raise DamagedFileError(f"{path} does not hold measurements of this version")
    return {name: shapes for name, shapes in machines.items() if isinstance(shapes, dict)}
