"""A comparison as one JSON file that is small enough to be committed, and a few of its maps beside it.

All tables, curves and intervals come from it again; what is not in it are losses of single tokens and most maps.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import DamagedFileError, read_bytes, read_json, write_file
from .comparison import Comparison, Entry
from .map_measure import MapMeasure, MapResult
from .text_tasks import TextMeasure

__all__ = ["load_comparison", "open_comparison", "save_comparison", "shrunk"]

#: So many layers, and heads of each, are kept of the maps; and blocks a side, of which each is the largest of several.
_MAPS_A_SIDE, _BLOCKS_A_SIDE = 4, 64
_DIGITS = 7


def open_comparison(paths: Sequence[Path]) -> Comparison:
    """From folders of ``seer compare`` and files that :func:`save_comparison` wrote, which belong together.

    Of a setting that several have, the last one counts; folders come behind files.

    Raises:
        FileNotFoundError, ValueError, DamagedFileError: see :meth:`Comparison.read`, :func:`load_comparison` and
            :meth:`Comparison.joined`.
    """
    files = [path for path in paths if path.suffix == ".json"]
    folders = [path for path in paths if path.suffix != ".json"]
    parts = [load_comparison(path) for path in files]
    if folders or not files:
        parts.append(Comparison.read(*folders))
    return functools.reduce(Comparison.joined, parts)


def save_comparison(path: Path, comparison: Comparison, maps: Sequence[str] = (), **told: Any) -> None:
    """Write ``path``, and ``path`` ending in .npz with what is left of the maps of these settings, if there are any.

    Args:
        maps: names of settings, in the order in which they are shown.
        told: what else the file says first.
    """
    kept = [
        (entry, shrunk(entry.maps))
        for name in maps
        for entry in comparison.entries.values()
        if entry.name == name and entry.maps is not None
    ]
    numbers = {**told, **comparison.to_dict(), "maps": [[e.name, e.length, found.to_dict()] for e, found in kept]}
    write_file(path, json.dumps(_rounded(numbers), separators=(",", ":"), allow_nan=False) + "\n")
    if kept:
        buffer = io.BytesIO()
        arrays = {f"{i} {name}": array for i, (_, m) in enumerate(kept) for name, array in m.arrays().items()}
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        write_file(path.with_suffix(".npz"), buffer.getvalue())


def load_comparison(path: Path) -> Comparison:
    """What :func:`save_comparison` wrote; without maps where their file is not there.

    Raises:
        FileNotFoundError, DamagedFileError: no such file, or not one of these.
    """
    numbers = read_json(path)
    try:
        maps = numbers.pop("maps", [])
        found = Comparison.from_dict(numbers)
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedFileError(f"{path} is not a comparison as benchmarks.comparison writes it") from error
    beside = path.with_suffix(".npz")
    if maps and beside.is_file():
        with np.load(io.BytesIO(read_bytes(beside)), allow_pickle=False) as opened:
            arrays = {name: opened[name] for name in opened.files}
        shown: list[tuple[Entry, MapResult]] = []
        for i, (name, length, told) in enumerate(maps):
            mine = {key.partition(" ")[2]: array for key, array in arrays.items() if key.startswith(f"{i} ")}
            shown.append((found.entries[length, name], MapMeasure(TextMeasure()).restore(told, mine)))
        for entry, result in shown:
            entry.maps = result
    return found


def shrunk(maps: MapResult) -> MapResult:
    """Fewer layers, heads and blocks of the maps; densities and recall of all layers and heads stay."""

    def some(count: int) -> list[int]:
        if count <= _MAPS_A_SIDE:
            return list(range(count))
        return [round(i * (count - 1) / (_MAPS_A_SIDE - 1)) for i in range(_MAPS_A_SIDE)]

    layers, heads = some(len(maps.layers)), some(len(maps.heads))
    factor = -(-maps.target.shape[-1] // _BLOCKS_A_SIDE)

    def small(tiles: np.ndarray) -> np.ndarray:
        tiles = tiles[layers][:, heads]
        tiles = np.pad(tiles, [(0, 0), (0, 0), *[(0, -tiles.shape[-1] % factor)] * 2])
        size = tiles.shape[-1] // factor
        return tiles.reshape(*tiles.shape[:2], size, factor, size, factor).max((-1, -3))

    return dataclasses.replace(
        maps,
        layers=[maps.layers[i] for i in layers],
        heads=[maps.heads[i] for i in heads],
        block_size=maps.block_size * factor,
        target=small(maps.target),
        prediction=None if maps.prediction is None else small(maps.prediction),
        selected=small(maps.selected),
    )


def _rounded(value: Any) -> Any:
    """Numbers of seven digits: what intervals are made of needs no more."""
    if isinstance(value, float):
        short = float(f"{value:.{_DIGITS}g}")
        return int(short) if short == int(short) and abs(short) < 1e15 else short
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
