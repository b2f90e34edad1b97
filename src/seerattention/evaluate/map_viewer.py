"""Maps to look through in a browser: a method, a layer and a head to choose, three pictures beside each other.

Each kind of map of a setting is one picture of tiles, layers down and heads to the right, in 256 colours; a script of a
few lines shows the tile that is asked for. Nothing is loaded from anywhere.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from PIL import Image

from .map_measure import MapResult

__all__ = ["map_viewer"]

_MOST_BLOCKS = 64  # blocks a side of a tile; larger maps are shown by the maximum of neighbours
_KINDS = ("true map", "scores", "selected blocks")
_FUTURE, _SKIPPED = 0, 1  # colours that stand for no share

_SCRIPT = """
(() => {
  const root = document.getElementById("maps"), data = JSON.parse(root.querySelector("script").textContent);
  const select = root.querySelector("select"), [layer, head] = root.querySelectorAll("input[type=range]");
  const canvases = [...root.querySelectorAll("canvas")], pictures = new Map();
  const picture = (source) => {
    if (!pictures.has(source)) {
      const image = new Image();
      pictures.set(source, new Promise((done) => { image.onload = () => done(image); image.src = source; }));
    }
    return pictures.get(source);
  };
  let asked = 0;
  const show = async () => {
    const mine = ++asked, shown = data[select.value], row = +layer.value, column = +head.value, n = shown.blocks;
    root.querySelector("[data-layer]").textContent = "layer " + shown.layers[row];
    root.querySelector("[data-head]").textContent = "head " + shown.heads[column];
    root.querySelector("[data-told]").textContent = shown.told[row][column];
    const images = await Promise.all(shown.pictures.map((source) => source && picture(source)));
    if (mine !== asked) return;
    images.forEach((image, i) => {
      const context = canvases[i].getContext("2d");
      canvases[i].width = canvases[i].height = n;
      context.clearRect(0, 0, n, n);
      if (image) context.drawImage(image, column * n, row * n, n, n, 0, 0, n, n);
    });
    root.dataset.shown = [select.value, row, column].join(",");
  };
  const choose = () => {
    layer.max = data[select.value].layers.length - 1;
    head.max = data[select.value].heads.length - 1;
    show();
  };
  select.addEventListener("change", choose);
  layer.addEventListener("input", show);
  head.addEventListener("input", show);
  choose();
})();
"""


def map_viewer(results: Sequence[MapResult]) -> str:
    """The viewer as HTML.

    Raises:
        ValueError: no maps.
    """
    if not results:
        raise ValueError("there are no maps to look at")
    data = json.dumps([_data(result) for result in results]).replace("<", "\\u003c")
    options = "".join(f'<option value="{i}">{html.escape(result.setting)}</option>' for i, result in enumerate(results))
    first = results[0]
    controls = (
        f'<label>setting<select aria-label="setting">{options}</select></label>'
        f'<label><span data-layer>layer</span><input type="range" min="0" max="{len(first.layers) - 1}" value="0" '
        'aria-label="layer"></label>'
        f'<label><span data-head>head</span><input type="range" min="0" max="{len(first.heads) - 1}" value="0" '
        'aria-label="head"></label>'
    )
    pictures = "".join(
        f'<figure><canvas width="{_MOST_BLOCKS}" height="{_MOST_BLOCKS}" role="img" aria-label="{kind}"></canvas>'
        f"<figcaption>{kind}</figcaption></figure>"
        for kind in _KINDS
    )
    return (
        f'<div id="maps"><div class="controls">{controls}</div><div class="viewer">{pictures}</div>'
        '<p class="caption" data-told></p><noscript><p>Choosing a layer and a head needs JavaScript.</p></noscript>'
        f'<script type="application/json">{data}</script></div><script>{_SCRIPT}</script>'
    )


def _data(result: MapResult) -> dict[str, Any]:
    target = _pooled(result.target)
    selected = _pooled(result.selected.astype(np.uint8)).astype(bool)
    shades = _shades(target)
    drawn = [shades, None if result.prediction is None else _shades(_pooled(result.prediction))]
    drawn.append(np.where(selected | (shades == _FUTURE), shades, _SKIPPED).astype(np.uint8))
    told = [
        [
            f"density {result.densities[layer, head]:.2f}, {100 * result.recall[layer, head]:.0f} % of the attention "
            "in the selected blocks"
            for head in result.heads
        ]
        for layer in result.layers
    ]
    return {
        "layers": result.layers,
        "heads": result.heads,
        "blocks": target.shape[-1],
        "told": told,
        "pictures": [None if tiles is None else _picture(tiles) for tiles in drawn],
    }


def _pooled(tiles: np.ndarray) -> np.ndarray:
    """At most :data:`_MOST_BLOCKS` a side."""
    blocks = tiles.shape[-1]
    factor = -(-blocks // _MOST_BLOCKS)
    if factor == 1:
        return tiles
    padded = np.pad(tiles, [(0, 0)] * (tiles.ndim - 2) + [(0, -blocks % factor)] * 2)
    size = padded.shape[-1] // factor
    return padded.reshape(*tiles.shape[:-2], size, factor, size, factor).max((-1, -3))


def _shades(tiles: np.ndarray) -> np.ndarray:
    """Colours of shares: from 2 on, and one of its own for what lies in the future."""
    future = np.triu(np.ones(tiles.shape[-2:], dtype=bool), 1)
    shades = 2 + np.round(tiles.astype(np.float64) * (253 / 255))
    return np.where(future, _FUTURE, shades).astype(np.uint8)


def _palette() -> list[int]:
    colors = (255 * colormaps["viridis"](np.linspace(0, 1, 254))[:, :3]).round().astype(int)
    return [255, 255, 255, 226, 229, 233, *colors.ravel().tolist()]


def _picture(tiles: np.ndarray) -> str:
    """Tiles ``[layers, heads, N, N]`` as one PNG."""
    layers, heads, size, _ = tiles.shape
    image = Image.fromarray(np.ascontiguousarray(tiles.transpose(0, 2, 1, 3).reshape(layers * size, heads * size)))
    image.putpalette(_palette())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def chosen_maps(entries: Sequence[Any], target: float | None) -> Mapping[str, MapResult]:
    """Maps of the settings of one density, by their names."""
    return {e.name: e.maps for e in entries if e.maps is not None and (target is None or e.target == target)}
