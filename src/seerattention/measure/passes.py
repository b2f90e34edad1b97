"""Passes over prompts: what gates score is looked at, and what was fitted is put in force for the next pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from torch import nn

from ..hf.attach import set_policy
from ..hf.contexts import dense, observe
from ..hf.prompts import run_prompt
from ..hf.state import Observer, state_of
from ..policies import Policy

NOTHING_SEEN = (
    "calibrate saw no prompt in any gated layer; prompts must be longer than one token and not longer than the model's "
    "sliding window"
)


def read_prompts(model: nn.Module, prompts: Sequence[Mapping[str, Any]], look: Observer, *, densely: bool) -> None:
    """Show ``look`` every layer of a forward a prompt: densely, or along the policies that are in force."""
    with observe(model, look), dense(model) if densely else nullcontext():
        for prompt in prompts:
            run_prompt(model, prompt)


def put_in_force(model: nn.Module, policy: Policy) -> None:
    """For every layer; policies of single layers are taken away."""
    set_policy(model, policy, layers={layer.index: None for layer in state_of(model).layers})
