"""Settings to compare: dense, gates with a policy, or a selector, all measured by the same code on the same samples."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from .. import hf
from ..hf.state import state_of
from ..measure import record
from ..policies import Policy
from ..selectors import as_selector

__all__ = ["Measurement", "Setting"]


class Measurement:
    """What a block under :meth:`Setting.applied` cost; complete once the block has ended.

    Attributes:
        density: ``total_density`` of everything that ran: selected causal blocks over all causal blocks, every layer,
            row and call, dense ones counted as 1.
        prompt_density: the same without decoding steps.
    """

    density: float = 1.0
    prompt_density: float = 1.0


@dataclass(frozen=True)
class Setting:
    """One way to run prefill.

    Attributes:
        name: what tables call it.
        gates: folder of saved gates; None uses the gates that are attached to the model, if any.
        policy: policy for those gates; None is the policy stored with them.
        selector: a selector instead of gates (``baselines.Oracle`` for example); one that asks gates goes with them.
        sparse: False is the dense model, whatever is attached to it.
        min_context: prompts of fewer tokens are dense. 0: none, every row of every prompt is sparse (but for the last
            ones where the policy says so). None: as the model is attached, or the default of the device.
    """

    name: str
    gates: str | os.PathLike[str] | None = None
    policy: Policy | None = None
    selector: Any = None
    sparse: bool = True
    min_context: int | None = 0

    def __post_init__(self) -> None:
        if not self.sparse and (self.gates or self.policy or self.selector):
            raise ValueError(f"setting {self.name!r} is dense and cannot have gates, a policy or a selector")
        asks_gates = getattr(self.selector, "needs_gate", False)
        if self.selector is not None and (self.policy or (self.gates and not asks_gates)):
            raise ValueError(f"setting {self.name!r} has a selector and also gates or a policy; give one or the other")

    @classmethod
    def dense(cls, name: str = "dense") -> Setting:
        """The model as it is without sparsity."""
        return cls(name, sparse=False)

    @property
    def rowwise(self) -> bool:
        """Whether what a position reads would be the same if the prompt ended there, as far as this setting says."""
        chosen = self.policy if self.selector is None else as_selector(self.selector)
        return chosen is None or chosen.rowwise

    @contextmanager
    def applied(self, model: nn.Module, measure: bool = True) -> Iterator[Measurement]:
        """Run the block with the model in this setting; afterwards the model is as before.

        ``measure=False`` leaves the density unmeasured (and nothing added to what is timed).

        Raises:
            ValueError: gates or a selector for a model that already has gates attached.
        """
        measurement = Measurement()
        attached = _is_attached(model)
        if not self.sparse:
            if attached:
                with hf.dense(model):
                    yield measurement
            else:
                yield measurement
            return
        if self.gates is None and self.selector is None:
            if not attached:
                raise ValueError(
                    f"setting {self.name!r} has neither gates nor a selector and the model has no gates attached"
                )
            with _as_set(model, self), _recorded(model, measurement, measure):
                yield measurement
            return
        if attached:
            raise ValueError(
                f"setting {self.name!r} brings its own gates or selector but the model already has gates attached; "
                "detach them (seer.save_gates, then seer.detach) and pass their folder as a setting"
            )
        if self.selector is not None:
            hf.attach(model, self.gates, selector=self.selector, min_context=self.min_context)
        else:
            hf.attach(model, self.gates, prefill=self.policy, min_context=self.min_context)
        try:
            with _recorded(model, measurement, measure):
                yield measurement
        finally:
            hf.detach(model)


def _is_attached(model: nn.Module) -> bool:
    """Also for models of families that gates do not support yet, which can be measured densely."""
    try:
        return hf.is_attached(model)
    except ValueError:
        return False


@contextmanager
def _as_set(model: nn.Module, setting: Setting) -> Iterator[None]:
    """An attached model with the ``min_context`` of the setting and, where it has one, its policy in every layer;
    afterwards all is as it was."""
    state, policy = state_of(model), setting.policy
    min_context, before, own = state.min_context, state.policy, {layer.index: layer.policy for layer in state.layers}
    if setting.min_context is not None:
        state.min_context = setting.min_context
    if policy is not None:
        hf.set_policy(model, policy, layers=dict.fromkeys(own))
    try:
        yield
    finally:
        state.min_context = min_context
        if policy is not None:
            hf.set_policy(model, before, layers=own)


@contextmanager
def _recorded(model: nn.Module, measurement: Measurement, measure: bool) -> Iterator[None]:
    if not measure:
        yield
        return
    with record(model) as stats:
        yield
    measurement.density, measurement.prompt_density = float(stats.total_density), float(stats.prompt_density)
