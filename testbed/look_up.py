"""Where a model looks things up: the attention of a question's last token on the needle that answers it.

A perfect score does not make a good testbed. Right behind one layer that mixes neighbouring tokens, a head can compare
hashes of whole names, and any token of a block may match any token of another; gates of one vector a block cannot
follow that (``docs/experiments.md``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seerattention.tasks import Sample, TaskGenerator
from seerattention.tasks.pieces import NOISE_WEIGHT

#: Share of its attention on the needle from which on a head is said to look it up.
LOOKS_UP = 0.5
#: The first layer whose look-ups gates can follow.
LOWEST_LAYER = 2
#: Tokens at a prompt's end that are its question at most, and tokens on either side of a needle, for what is looked up
#: from another token than the last one or next to the needle.
_QUESTION, _AROUND = 24, 8


@torch.inference_mode()
def look_up(model: Any, generator: TaskGenerator, length: int = 4096, samples: int = 16) -> dict[str, Any]:
    """How much of the attention of a question's last token lies on its needle, the only one in the text.

    Args:
        model: a dense Hugging Face model to which nothing is attached.
        generator: of the test split.
        length: tokens of a sample.
        samples: how many to take the mean of.

    Returns:
        ``length``, ``samples`` and ``mass``: for each layer, for each of its query heads, the mean share that lies on
        the needle, from the first token of its name to the last of its number. ``wide``: the same of the token of the
        question (the last 24) that gives most to the needle and the 8 tokens on either side of it. A number may be
        gathered in the full stop behind it, and looked up from the name in the question.
    """
    import seerattention as seer

    masses: dict[str, dict[int, list[Tensor]]] = {"mass": {}, "wide": {}}
    seer.attach(model, seer.GateConfig())  # only what is attached can be observed; everything stays dense
    try:
        for _ in range(samples):
            sample = generator.sample("single", length)
            asks, needle = sample.questions[0].answers[0][0] - 1, _needle(sample)

            def see(inputs: Any, _: Any, needle: slice = needle) -> None:
                keys = inputs.k[0].repeat_interleave(inputs.q.shape[1] // inputs.k.shape[1], 0)
                logits = (inputs.q[0, :, -_QUESTION:] @ keys.mT * inputs.scale).float()  # [heads, queries, tokens]
                future = torch.ones_like(logits, dtype=torch.bool).triu(logits.shape[2] - logits.shape[1] + 1)
                attention = logits.masked_fill(future, -torch.inf).softmax(-1)
                masses["mass"].setdefault(inputs.layer, []).append(attention[:, -1, needle].sum(-1).cpu())
                around = slice(max(0, needle.start - _AROUND), needle.stop + _AROUND)
                masses["wide"].setdefault(inputs.layer, []).append(attention[..., around].sum(-1).amax(-1).cpu())

            ids = torch.from_numpy(sample.input_ids[: asks + 1]).to(model.device)[None]
            with seer.dense(model), seer.observe(model, see):
                model.model(input_ids=ids, use_cache=False)
    finally:
        seer.detach(model)
    means = {
        name: [torch.stack(found[layer]).mean(0).tolist() for layer in sorted(found)] for name, found in masses.items()
    }
    return {"length": length, "samples": samples, **means}


def _needle(sample: Sample) -> slice:
    """From a sample of task "single", where the name and the number of its one statement are."""
    start, stop = sample.questions[0].answers[0]
    # Up to the answer only names and the stated number weigh that little: name, number, and the name in the question.
    light = np.flatnonzero(sample.weights[:start] == np.float32(NOISE_WEIGHT))
    name = (len(light) - (stop - start)) // 2
    return slice(int(light[0]), int(light[-name - 1]) + 1)


def best_heads(mass: Sequence[Sequence[float]]) -> list[tuple[int, float]]:
    """For each layer, the head with the largest share on the needle, and that share."""
    return [max(enumerate(heads), key=lambda item: item[1]) for heads in mass]


def verdict(mass: Sequence[Sequence[float]], wide: Sequence[Sequence[float]] | None = None) -> str:
    """One sentence: which layers look things up, as a warning where gates cannot follow them.

    Args:
        mass, wide: of :func:`look_up`; ``wide`` says where the last token and the needle alone show nothing. None: not
            measured, as by earlier versions.
    """
    layers, elsewhere = _layers(mass), [] if wide is None else _layers(wide)
    if not layers and not elsewhere:
        return f"Warning: no head has {LOOKS_UP:.0%} of its attention on the needle, so nothing is looked up."
    where = "" if layers else ", from another token of the question or next to the needle"
    layers = layers or elsewhere
    if layers[0] < LOWEST_LAYER:
        return (
            f"Warning: look-up begins in layer {layers[0]}{where}, where gates of one vector a block cannot follow "
            '(docs/experiments.md, "A model that looks up in its second layer").'
        )
    return f"It looks things up in layer{'s' if len(layers) > 1 else ''} {' and '.join(map(str, layers))}{where}."


def _layers(mass: Sequence[Sequence[float]]) -> list[int]:
    return [layer for layer, (_, share) in enumerate(best_heads(mass)) if share >= LOOKS_UP]
