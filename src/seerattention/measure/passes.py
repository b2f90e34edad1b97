"""Passes over prompts: what gates score is looked at, and what was fitted is put in force for the next pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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


class ToldPrompts(Sequence[Mapping[str, Any]]):
    """Prompts that tell when one of them has been read, by whoever goes through them.

    Args:
        prompts: as :func:`~seerattention.hf.prompts.check_batch` gives them.
        advance: called with 1 for each.
    """

    def __init__(self, prompts: Sequence[Mapping[str, Any]], advance: Callable[[int], None]) -> None:
        self.prompts, self.advance = prompts, advance

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for prompt in self.prompts:
            yield prompt
            self.advance(1)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: Any) -> Any:
        return self.prompts[index]


def read_prompts(model: nn.Module, prompts: Sequence[Mapping[str, Any]], look: Observer, *, densely: bool) -> None:
    """Show ``look`` every layer of a forward a prompt: densely, or along the policies that are in force."""
    with observe(model, look), dense(model) if densely else nullcontext():
        for prompt in prompts:
            run_prompt(model, prompt)


def put_in_force(model: nn.Module, policy: Policy) -> None:
    """For every layer; policies of single layers are taken away."""
    set_policy(model, policy, layers={layer.index: None for layer in state_of(model).layers})
