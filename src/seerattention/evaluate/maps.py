"""Pictures of what attention does: the true pooled map, what the gate predicts, and which blocks are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor, nn

from .. import hf
from ..hf.phases import PREFILL
from ..hf.state import state_of
from ..ops import pooled_attention
from ..ops.indices import BlockIndices, causal_block_mask
from ..policies import causal_softmax
from ..selectors import Selector
from .forward import check_documents, decoder_states, prompt_device

__all__ = ["HeadMap", "Inspection", "draw_maps", "draw_recall", "inspect_attention"]

_FLOOR = 1e-4  # shares below this are drawn alike
_MAP_COLORS = "viridis"


@dataclass
class HeadMap:
    """One head's map over blocks; every array is ``[Nq, Nk]``.

    Attributes:
        layer, head: indices of the layer and of the query head.
        target: the true attention map, max-pooled per block, rows summing to 1 (the distillation target).
        prediction: the block probabilities of the gate, or of another selector that has scores; else None.
        selected: bool, the blocks that attention read.
        recall: block recall: share of the true attention mass inside them (mean over query blocks).
        density: selected causal blocks over all causal blocks.
    """

    layer: int
    head: int
    target: np.ndarray
    prediction: np.ndarray | None
    selected: np.ndarray
    recall: float
    density: float


@dataclass
class Inspection:
    """Maps of the chosen heads, and the numbers of all heads.

    Attributes:
        maps: one for each chosen layer and head, in order.
        recall, density: float ``[layers, query heads]`` (NaN for layers without attention calls).
        block_size: tokens a block.
    """

    maps: list[HeadMap]
    recall: np.ndarray
    density: np.ndarray
    block_size: int


@torch.inference_mode()
def inspect_attention(
    model: nn.Module, input_ids: Tensor, *, layers: Sequence[int] | None = None, heads: Sequence[int] | None = None
) -> Inspection:
    """Run one prompt through an attached model and look at its attention.

    Args:
        model: a model with gates or a selector attached.
        input_ids: int64 ``[1, T]``.
        layers: layers to keep maps of (None: all).
        heads: query heads to keep maps of (None: all).

    Raises:
        ValueError: more than one prompt, or a layer or head that the model does not have.
    """
    check_documents(input_ids, "input_ids")
    if input_ids.shape[0] != 1:
        raise ValueError(f"input_ids must be one prompt [1, T], got {tuple(input_ids.shape)}")
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    num_layers, num_heads = config.num_hidden_layers, config.num_attention_heads
    chosen_layers = _check_choice("layer", layers, num_layers)
    chosen_heads = _check_choice("head", heads, num_heads)
    recall = np.full((num_layers, num_heads), np.nan)
    density = np.full((num_layers, num_heads), np.nan)
    maps: dict[tuple[int, int], HeadMap] = {}
    sizes = set()

    def look(inputs: hf.LayerInputs, blocks: BlockIndices | None) -> None:
        block_size = (
            blocks.block_size if blocks is not None else inputs.gate.block_size if inputs.gate is not None else 64
        )
        sizes.add(block_size)
        common: dict[str, Any] = {
            "block_size": block_size,
            "scale": inputs.scale,
            "lengths": inputs.lengths,
            "lse": inputs.lse,
        }
        mass = pooled_attention(inputs.q, inputs.k, reduce="sum", **common)[0]
        selected = _selected(blocks, mass)
        causal = causal_block_mask(mass.shape[-2], mass.shape[-1], device=mass.device)
        inside = (mass * selected).sum(-1).mean(-1)
        share = selected.sum((-1, -2)) / causal.sum()
        recall[inputs.layer], density[inputs.layer] = inside.cpu().numpy(), share.cpu().numpy()
        if inputs.layer not in chosen_layers:
            return
        target = pooled_attention(inputs.q, inputs.k, **common)[0]
        prediction = _prediction(inputs, state_of(model).phases[PREFILL].selector)
        for head in chosen_heads:
            maps[inputs.layer, head] = HeadMap(
                inputs.layer,
                head,
                target[head].float().cpu().numpy(),
                None if prediction is None else prediction[head].float().cpu().numpy(),
                selected[head].cpu().numpy(),
                float(inside[head]),
                float(share[head]),
            )

    with hf.observe(model, look):
        decoder_states(model, input_ids.to(prompt_device(model)))
    ordered = [maps[layer, head] for layer in chosen_layers for head in chosen_heads if (layer, head) in maps]
    if not sizes:
        raise ValueError(
            f"no layer read this prompt of {input_ids.shape[1]} tokens as a whole: it must be longer than one token "
            "and not longer than the model's sliding window"
        )
    return Inspection(ordered, recall, density, sizes.pop())


def draw_maps(maps: Sequence[HeadMap], block_size: int) -> Figure:
    """One row a head: true map, prediction, selected blocks. Query blocks run down, key blocks to the right."""
    columns = 3 if any(item.prediction is not None for item in maps) else 2
    figure = Figure(figsize=(2.9 * columns + 0.6, 2.95 * len(maps)), layout="constrained", facecolor="white")
    axes = figure.subplots(len(maps), columns, squeeze=False)
    norm = LogNorm(_FLOOR, 1.0)
    for row, item in zip(axes, maps, strict=True):
        above = np.triu(np.ones(item.target.shape, dtype=bool), item.target.shape[1] - item.target.shape[0] + 1)
        pictures = [("true map (max per block)", item.target)]
        if columns == 3:
            pictures.append(
                ("gate's prediction", item.prediction if item.prediction is not None else np.zeros_like(item.target))
            )
        for axis, (title, picture) in zip(row, pictures, strict=False):
            shown = np.ma.array(picture.clip(_FLOOR, 1.0), mask=above)
            image = axis.imshow(shown, norm=norm, cmap=_MAP_COLORS, interpolation="nearest")
            axis.set_title(title, fontsize=9)
        hit = np.ma.array(np.where(item.selected, item.target.clip(_FLOOR, 1.0), np.nan), mask=above | ~item.selected)
        row[-1].imshow(
            np.ma.array(np.ones_like(item.target), mask=above), cmap="Greys", vmin=0, vmax=12, interpolation="nearest"
        )
        row[-1].imshow(hit, norm=norm, cmap=_MAP_COLORS, interpolation="nearest")
        row[-1].set_title(f"read: density {item.density:.2f}, recall {item.recall:.2f}", fontsize=9)
        row[0].set_ylabel(f"layer {item.layer}, head {item.head}\nquery block", fontsize=9)
        for axis in row:
            axis.tick_params(labelsize=7, colors="#5b6670")
            axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel(f"key block of {block_size} tokens", fontsize=8)
    bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 0.9 / len(maps) ** 0.5), pad=0.01)
    bar.set_label("share of the row", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def draw_recall(recall: np.ndarray, label: str = "block recall") -> Figure:
    """Block recall of every head, or another share of this ``label``, layers down, heads to the right."""
    layers, heads = recall.shape
    figure = Figure(
        figsize=(max(3.4, 0.42 * heads + 1.6), max(2.2, 0.3 * layers + 1.0)), layout="constrained", facecolor="white"
    )
    axis = figure.subplots()
    image = axis.imshow(recall, vmin=0, vmax=1, cmap="cividis", aspect="auto", interpolation="nearest")
    if heads <= 40:
        for layer in range(layers):
            for head in range(heads):
                value = recall[layer, head]
                if np.isfinite(value):
                    axis.text(
                        head,
                        layer,
                        f"{100 * value:.0f}",
                        ha="center",
                        va="center",
                        fontsize=7,
                        color="black" if value > 0.6 else "white",
                    )
        axis.set_xticks(range(heads))
        axis.set_yticks(range(layers))
    axis.set_xlabel("query head", fontsize=9)
    axis.set_ylabel("layer", fontsize=9)
    axis.tick_params(labelsize=8)
    bar = figure.colorbar(image, ax=axis)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def _prediction(inputs: hf.LayerInputs, selector: Selector | None) -> Tensor | None:
    """Block probabilities ``[Hq, Nq, Nk]`` of the gate, or else of the selector if it has scores."""
    logits = inputs.gate_logits() if inputs.gate is not None else None
    if logits is None and selector is not None:
        logits = selector.scores(inputs)
    if logits is None:
        return None
    found = causal_softmax(logits.float())[0]
    return found.repeat_interleave(inputs.q.shape[1] // found.shape[0], dim=0)


def _selected(blocks: BlockIndices | None, mass: Tensor) -> Tensor:
    """Bool ``[Hq, Nq, Nk]`` of what attention read; dense calls read every causal block."""
    if blocks is None:
        return causal_block_mask(mass.shape[-2], mass.shape[-1], device=mass.device).expand(mass.shape)
    mask = blocks.to_mask()[0]
    return mask.repeat_interleave(mass.shape[0] // mask.shape[0], dim=0)


def _check_choice(what: str, chosen: Sequence[int] | None, count: int) -> list[int]:
    if chosen is None:
        return list(range(count))
    wrong = [index for index in chosen if not 0 <= index < count]
    if wrong:
        raise ValueError(f"the model has {what}s 0 to {count - 1}, got {wrong}")
    return list(chosen)
