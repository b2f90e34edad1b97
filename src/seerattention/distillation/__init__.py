"""Self-distillation: gates learn to predict the attention map of the model that they are attached to."""

from . import data, documents
from .config import DistillConfig
from .history import DistillHistory
from .repeats import Repeats
from .run import StepReport, distill
from .targets import TargetChoice, choose_target
from .trainer import DistillationError
from .woven import Woven

__all__ = [
    "DistillConfig",
    "DistillHistory",
    "DistillationError",
    "Repeats",
    "StepReport",
    "TargetChoice",
    "Woven",
    "choose_target",
    "data",
    "distill",
    "documents",
]
