"""Wall time of prefill, settings interleaved so that a busy or warming machine treats them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .forward import decoder_states, token_logits
from .settings import Setting

__all__ = ["TimingResult", "time_prefill"]


@dataclass
class TimingResult:
    """Prefill times of one setting.

    Attributes:
        setting: its name.
        length: tokens of the prompt.
        batch: prompts at once.
        first_seconds: the first call of all, with whatever was compiled for it.
        seconds: the timed repeats that followed.
        density: ``total_density`` of one call.
    """

    setting: str
    length: int
    batch: int
    density: float = 1.0
    first_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median seconds of the timed repeats."""
        return statistics.median(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {
            "setting": self.setting,
            "length": self.length,
            "batch": self.batch,
            "density": self.density,
            "first_seconds": self.first_seconds,
            "seconds": self.seconds,
            "median_seconds": self.median,
        }


@torch.inference_mode()
def time_prefill(
    model: nn.Module,
    input_ids: Tensor,
    settings: Sequence[Setting],
    *,
    repeats: int = 3,
    warmup_length: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> list[TimingResult]:
    """Time prefill of ``input_ids [B, T]``: the whole model, logits of the last position only, as serving does.

    One untimed call of each setting comes first (its time is reported apart: it holds compilation); then ``repeats``
    rounds through all settings. Density is measured in the untimed call.

    Args:
        warmup_length: tokens of the untimed call, where a whole prompt would take too long; None: all. What is compiled
            serves every length from 2048 tokens on. Density is then measured in the last round.
        advance: called with the number of tokens of each call (for progress bars).

    Raises:
        ValueError: fewer than one repeat.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    input_ids = input_ids.to(device)
    batch, length = input_ids.shape
    warmup = input_ids[:, :warmup_length]
    measured_round = 0 if warmup.shape == input_ids.shape else repeats
    results = [TimingResult(setting.name, length, batch) for setting in settings]
    for round_ in range(repeats + 1):
        for setting, result in zip(settings, results, strict=True):
            prompt = input_ids if round_ else warmup
            with setting.applied(model, measure=round_ == measured_round) as measurement:
                seconds = prefill_seconds(model, prompt)
            if round_ == measured_round:
                result.density = measurement.density
            if round_ == 0:
                result.first_seconds = seconds
            else:
                result.seconds.append(seconds)
            if advance is not None:
                advance(prompt.numel())
    return results


def prefill_seconds(model: nn.Module, input_ids: Tensor) -> float:
    """Seconds of one prefill."""
    _synchronize(input_ids.device)
    start = time.perf_counter()
    token_logits(model, decoder_states(model, input_ids)[:, -1:])
    _synchronize(input_ids.device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
