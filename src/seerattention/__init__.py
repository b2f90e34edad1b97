"""SeerAttention: learned block-sparse attention for long prompts of Hugging Face models (arXiv 2410.13276).

    import seerattention as seer

    seer.attach(model, seer.GateConfig(block_size=64))      # fresh gates; or a folder or hub id of trained ones
    seer.distill(model, batches, seer.DistillConfig())      # train them on the model's own attention
    model.generate(**long_prompt)                           # prefilled sparsely

Names, and the rooms below (``seer.ops.block_sparse_attention``), are imported when they are first used, so
``import seerattention`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import baselines as baselines
    from . import blocks as blocks
    from . import cli as cli
    from . import config as config
    from . import distillation as distillation
    from . import evaluate as evaluate
    from . import files as files
    from . import gates as gates
    from . import hf as hf
    from . import measure as measure
    from . import ops as ops
    from . import policies as policies
    from . import selectors as selectors
    from . import tasks as tasks
    from . import testbed as testbed
    from .blocks import BlockIndices
    from .config import DecodeGateConfig, GateConfig, PrefillGateConfig, SubBlockGateConfig
    from .distillation import DistillConfig, distill
    from .hf.attach import attach, detach, set_policy
    from .hf.contexts import dense, observe
    from .hf.save import save_gates
    from .measure.calibrate import calibrate
    from .measure.stats import record
    from .policies import Budget, Budgets, Dense, Policy, RelativeThreshold, Threshold, TokenBudget, TopK, TopP
    from .selectors import LayerInputs

_NAMES = {
    "BlockIndices": "blocks",
    "Budget": "policies",
    "Budgets": "policies",
    "DecodeGateConfig": "config",
    "Dense": "policies",
    "DistillConfig": "distillation",
    "GateConfig": "config",
    "LayerInputs": "selectors",
    "Policy": "policies",
    "PrefillGateConfig": "config",
    "SubBlockGateConfig": "config",
    "Threshold": "policies",
    "RelativeThreshold": "policies",
    "TokenBudget": "policies",
    "TopK": "policies",
    "TopP": "policies",
    "attach": "hf",
    "calibrate": "measure",
    "dense": "hf",
    "detach": "hf",
    "distill": "distillation",
    "observe": "hf",
    "record": "measure",
    "save_gates": "hf",
    "set_policy": "hf",
}
_ROOMS = (
    "baselines",
    "blocks",
    "cli",
    "config",
    "distillation",
    "evaluate",
    "files",
    "gates",
    "hf",
    "measure",
    "ops",
    "policies",
    "selectors",
    "tasks",
    "testbed",
)

__all__ = [
    "BlockIndices",
    "Budget",
    "Budgets",
    "DecodeGateConfig",
    "Dense",
    "DistillConfig",
    "GateConfig",
    "LayerInputs",
    "Policy",
    "PrefillGateConfig",
    "RelativeThreshold",
    "SubBlockGateConfig",
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
    return sorted({*__all__, *_ROOMS})
