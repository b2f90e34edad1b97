"""Maps as a measure: the true attention, scores and chosen blocks of one prompt, and densities of layers and heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from .maps import Inspection, inspect_attention
from .measure import Advance, Measure, Prompts, Subject
from .settings import Setting
from .tables import Table, format_density
from .text_tasks import TextMeasure

__all__ = ["LEAST_SHARE", "MOST_MAPS", "MapMeasure", "MapResult"]

#: So many layers, and so many heads of each, are kept as maps: evenly spread where a model has more.
MOST_MAPS = 8
#: Shares of a row below this are kept as this.
LEAST_SHARE = 1e-4


@dataclass
class MapResult:
    """One setting on one prompt. A layer is judged on what the sparse layers before it produced.

    Attributes:
        setting: its name.
        density: mean over layers and heads.
        layers, heads: which are kept as maps.
        block_size: tokens a block.
        recall, densities: float32 ``[all layers, all heads]``: share of the true attention in the chosen blocks, and of
            the causal blocks that are chosen; NaN for layers without attention over whole prompts.
        target: uint8 ``[layers, heads, N, N]``, the true map, max-pooled, rows summing to 1; 0 is :data:`LEAST_SHARE`
            or less and 255 is 1, in logarithms.
        prediction: the same of the softmax of the scores; None where there are no scores.
        selected: bool ``[layers, heads, N, N]``.
    """

    setting: str
    density: float
    layers: list[int]
    heads: list[int]
    block_size: int
    recall: np.ndarray
    densities: np.ndarray
    target: np.ndarray
    prediction: np.ndarray | None
    selected: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        found = {name: getattr(self, name) for name in ("setting", "density", "layers", "heads", "block_size")}
        return {**found, "blocks": self.target.shape[-1], "recall": float(np.nanmean(self.recall))}

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything else; bits of what is selected are packed."""
        arrays = {"recall": self.recall, "densities": self.densities, "target": self.target}
        arrays["selected"] = np.packbits(self.selected, axis=-1)
        return arrays if self.prediction is None else {**arrays, "prediction": self.prediction}


@dataclass(frozen=True)
class MapMeasure(Measure):
    """Maps of one prompt, see :class:`~seerattention.evaluate.measure.Measure`.

    Attributes:
        tasks: whose first task gives the prompt.
    """

    name: ClassVar[str] = "maps"
    title: ClassVar[str] = "Maps"

    tasks: TextMeasure

    def prepare(self, subject: Subject, length: int) -> Prompts:
        """One prompt."""
        one = dataclasses.replace(self.tasks, samples=1, text_tasks=self.tasks.text_tasks[:1])
        (samples,) = one.prepare(subject, length).content.values()
        return Prompts(samples[0].prompt, {"prompt": samples[0].prompt}, 0)

    def run(
        self, subject: Subject, prompts: Prompts, settings: Sequence[Setting], advance: Advance | None = None
    ) -> list[MapResult]:
        """See :func:`~seerattention.evaluate.maps.inspect_attention`."""
        config: Any = subject.model.config.get_text_config()  # type: ignore[union-attr, operator]
        layers, heads = _spread(config.num_hidden_layers), _spread(config.num_attention_heads)
        ids = torch.as_tensor(prompts.content, dtype=torch.int64)[None]
        results = []
        for setting in settings:
            with setting.applied(subject.model, measure=False):
                found = inspect_attention(subject.model, ids, layers=layers, heads=heads)
            results.append(_result(setting.name, found))
        return results

    def restore(self, numbers: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> MapResult:
        """A result that was kept."""
        names = ("setting", "density", "layers", "heads", "block_size")
        blocks = numbers["blocks"]
        return MapResult(
            **{name: numbers[name] for name in names},
            recall=arrays["recall"],
            densities=arrays["densities"],
            target=arrays["target"],
            prediction=arrays.get("prediction"),
            selected=np.unpackbits(arrays["selected"], axis=-1, count=blocks).astype(bool),
        )

    def table(self, results: Sequence[MapResult]) -> Table:
        """Density and block recall."""
        rows = [[r.setting, format_density(r.density), f"{np.nanmean(r.recall):.3f}"] for r in results]
        return Table(["setting", "density", "block recall"], rows, "Means over layers and heads, of one prompt.")


def _spread(count: int) -> list[int]:
    """At most :data:`MOST_MAPS` of so many, the first and the last among them."""
    if count <= MOST_MAPS:
        return list(range(count))
    return [round(i * (count - 1) / (MOST_MAPS - 1)) for i in range(MOST_MAPS)]


def _result(name: str, found: Inspection) -> MapResult:
    layers, heads = sorted({m.layer for m in found.maps}), sorted({m.head for m in found.maps})

    def stacked(values: Sequence[Any]) -> np.ndarray:
        return np.stack(values).reshape(len(layers), len(heads), *values[0].shape)

    scored = all(item.prediction is not None for item in found.maps)
    return MapResult(
        name,
        float(np.nanmean(found.density)),
        layers,
        heads,
        found.block_size,
        found.recall.astype(np.float32),
        found.density.astype(np.float32),
        stacked([_quantised(item.target) for item in found.maps]),
        stacked([_quantised(item.prediction) for item in found.maps]) if scored else None,  # type: ignore[arg-type]
        stacked([item.selected for item in found.maps]),
    )


def _quantised(shares: np.ndarray) -> np.ndarray:
    lowest = np.log(LEAST_SHARE)
    logs = np.log(np.clip(np.nan_to_num(shares), LEAST_SHARE, 1.0))
    return np.round(255 * (1 - logs / lowest)).astype(np.uint8)
