"""Selectors that need no training, and the way to any selector by its name.

Each is a :class:`~seerattention.selectors.Selector` in a file of its own and knows nothing of Hugging Face;
``seerattention.attach(model, selector=...)`` runs one inside a model.
"""

from __future__ import annotations

from ..selectors import Selector
from .cosa import CoSA
from .flashprefill import FlashPrefill
from .flashprefill_v2 import FlashPrefillV2
from .flexprefill import FlexPrefill
from .mean_pool import MeanPool
from .minference import MInference
from .minference_exact import MInferenceExact
from .oracle import Oracle
from .oracle_cover import OracleCover
from .prism import Prism
from .random import Random
from .rbs import RBS
from .registry import parse_selectors, selector_from_dict
from .sparge import Sparge
from .streaming import Streaming
from .sub_block import SubBlock
from .xattention import XAttention

__all__ = [
    "RBS",
    "CoSA",
    "FlashPrefill",
    "FlashPrefillV2",
    "FlexPrefill",
    "MInference",
    "MInferenceExact",
    "MeanPool",
    "Oracle",
    "OracleCover",
    "Prism",
    "Random",
    "Selector",
    "Sparge",
    "Streaming",
    "SubBlock",
    "XAttention",
    "parse_selectors",
    "selector_from_dict",
]
