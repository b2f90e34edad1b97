"""SeerAttention inside Hugging Face transformers: hooks and a registered attention function, no forked models."""

from ..gates.sources import convert
from ..selectors import LayerInputs
from .architectures import FAMILIES, Family, find_decoder
from .attach import attach, detach, set_policy
from .attention import DEFAULT_MIN_CONTEXT
from .calibrate import calibrate
from .checkpoint import save_gates
from .contexts import dense, observe, record
from .state import gates, is_attached
from .stats import Statistics

__all__ = [
    "DEFAULT_MIN_CONTEXT",
    "FAMILIES",
    "Family",
    "LayerInputs",
    "Statistics",
    "attach",
    "calibrate",
    "convert",
    "dense",
    "detach",
    "find_decoder",
    "gates",
    "is_attached",
    "observe",
    "record",
    "save_gates",
    "set_policy",
]
