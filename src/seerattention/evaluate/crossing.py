"""From which prompt length on sparse prefill pays in a model of a given shape: whole forwards, host time included.

Below that length the launches of a layer take longer than what they save. It depends on how much else a layer
computes, so a few layers of the model are built, with random weights, and run densely and sparsely in turns.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from .. import hf
from ..config import GateConfig
from ..policies import TopK
from .timing import warm_seconds

__all__ = ["measure_prompts", "pays_from"]

LAYERS = 4
_WARM_UP = 3


@torch.inference_mode()
def measure_prompts(
    config: Any,
    lengths: Sequence[int],
    density: float,
    device: torch.device,
    dtype: torch.dtype,
    *,
    repeats: int = 7,
    advance: Callable[[int], None] | None = None,
) -> dict[int, float]:
    """Times faster than dense a sparse prompt is, by its length: medians of whole forwards of a few layers.

    Args:
        config: of a decoder or a causal LM of a supported family; what it says of weights does not matter.
        density: of top-k selection, by fresh gates.
        repeats: timed forwards of each, in turns.
        advance: called with 1 after each length.

    Raises:
        ValueError: a family that is not supported.
    """
    config = copy.deepcopy(config)
    config.num_hidden_layers = LAYERS
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:LAYERS]
    config.max_position_embeddings = max(lengths[-1], config.max_position_embeddings)
    with torch.device(device), torch.inference_mode(False):
        dense = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
        sparse = hf.attach(copy.deepcopy(dense), GateConfig(), prefill=TopK(density), min_context=0)
    found = {}
    for length in lengths:
        ids = torch.randint(0, config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
        seconds: dict[str, list[float]] = {"dense": [], "sparse": []}
        for turn in range(_WARM_UP + repeats):
            for name, model in (("dense", dense), ("sparse", sparse)):
                wall, _ = warm_seconds(lambda m=model, x=ids: m(input_ids=x, use_cache=False, logits_to_keep=1), device)  # type: ignore[misc]
                if turn >= _WARM_UP:
                    seconds[name].append(wall)
        found[length] = statistics.median(seconds["dense"]) / statistics.median(seconds["sparse"])
        if advance is not None:
            advance(1)
    return found


def pays_from(speedups: dict[int, float]) -> int:
    """The shortest measured length from which on none was slower; twice the longest where that one was."""
    lengths = sorted(speedups)
    found = 2 * lengths[-1]
    for length in reversed(lengths):
        if speedups[length] < 1:
            break
        found = length
    return found
