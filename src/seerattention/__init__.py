"""SeerAttention: learned block-sparse attention for long prompts of Hugging Face models (arXiv 2410.13276).

    import seerattention as seer

    seer.attach(model, seer.GateConfig(block_size=64))      # fresh gates; or a folder or hub id of trained ones
    seer.distill(model, batches, seer.DistillConfig())      # train them on the model's own attention
    model.generate(**long_prompt)                           # prefilled sparsely

Names are imported when they are first used, so ``import seerattention`` costs nothing.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import baselines, testbed
    from .blocks import BlockIndices
    from .config import GateConfig, PrefillGateConfig
    from .distill import DistillConfig, distill
    from .hf.attach import attach, detach, set_policy
    from .hf.calibrate import calibrate
    from .hf.checkpoint import save_gates
    from .hf.contexts import dense, observe, record
    from .hf.state import LayerInputs
    from .policies import Dense, Policy, Threshold, TokenBudget, TopK, TopP

_NAMES = {
    "BlockIndices": "blocks",
    "Dense": "policies",
    "DistillConfig": "distill",
    "GateConfig": "config",
    "LayerInputs": "hf",
    "Policy": "policies",
    "PrefillGateConfig": "config",
    "Threshold": "policies",
    "TokenBudget": "policies",
    "TopK": "policies",
    "TopP": "policies",
    "attach": "hf",
    "calibrate": "hf",
    "dense": "hf",
    "detach": "hf",
    "distill": "distill",
    "observe": "hf",
    "record": "hf",
    "save_gates": "hf",
    "set_policy": "hf",
}
_ROOMS = ("baselines", "testbed")

__all__ = [
    "BlockIndices",
    "Dense",
    "DistillConfig",
    "GateConfig",
    "LayerInputs",
    "Policy",
    "PrefillGateConfig",
    "Threshold",
    "TokenBudget",
    "TopK",
    "TopP",
    "__version__",
    "attach",
    "baselines",
    "calibrate",
    "dense",
    "detach",
    "distill",
    "observe",
    "record",
    "save_gates",
    "set_policy",
    "testbed",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f".{name}", __name__)
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """``seerattention.distill`` is a function although a subpackage of that name exists: importing the subpackage,
    which binds it to its name here, must not hide the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "distill" and isinstance(value, ModuleType):
            value = value.distill
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
