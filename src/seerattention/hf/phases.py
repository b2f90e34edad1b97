"""The phases of inference, and what a model and its layers have for each.

Everything that differs between reading a prompt and decoding is in here, or asks here: gate, policy and selector by
phase, and which forwards nobody needs to know of.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import PHASES
from ..gates import BlockGate
from ..policies import Policy
from ..selectors import GateSelector, Selector
from .forward import watching
from .generation import single_tokens

PREFILL, DECODE = PHASES


def unnoticed(length: int, decodes: bool) -> bool:
    """Whether a forward of this many tokens is plain decoding: no hook and no context need know of it.

    Args:
        length: tokens.
        decodes: whether a layer of the model decodes sparsely.
    """
    return length == 1 and not decodes and not watching() and not single_tokens()


@dataclass(frozen=True)
class ModelPhase:
    """How the layers of a model choose blocks in one phase.

    Attributes:
        policy: of the layers that have none of their own.
        block_size: tokens a block of the gates.
        selector: is asked instead of gate and policy; None: they are.
    """

    policy: Policy
    block_size: int
    selector: Selector | None = None


@dataclass(frozen=True)
class LayerPhase:
    """How one layer chooses blocks in one phase.

    Attributes:
        gate: the layer's; None: it has none.
        policy: of this layer alone; None: that of the model.
    """

    gate: BlockGate | None = None
    policy: Policy | None = None

    def selector(self, model: ModelPhase) -> Selector | None:
        """What is asked; None: the layer is dense."""
        selector = GateSelector(self.policy or model.policy) if model.selector is None else model.selector
        return None if selector.needs_gate and self.gate is None else selector
