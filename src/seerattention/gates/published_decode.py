"""Published checkpoints of decode gates (SeerAttention-R, arXiv 2506.08889): their entries and what they mean here.

The files are named as those of prefill gates, config.json with ``seerattn_*`` entries and ``attn_gate_weights.pth``;
entries and weights in them have other names. ``seerattn_loss_slice_ratio`` is of training and not read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..config import DecodeGateConfig, GateConfig
from ..policies import Policy, Threshold, TokenBudget
from .published_parts import KEY

DECODE_KEY = re.compile(KEY.format("attngate_linear_[qk]|attngate_[qk]norm"))
DECODE_METHODS = ("threshold", "token_budget")
DECODE_TYPES: dict[str, tuple[type, ...]] = {
    "seerattn_q_head_pooling_type": (str,),
    "seerattn_k_seq_pooling_type": (str,),
    "seerattn_use_qk_norm": (bool,),
    "seerattn_use_rope": (bool,),
    "seerattn_token_budget": (int,),
}

# With it the paper's reasoning tasks come near dense attention, with half of it they fall well behind.
DEFAULT_BUDGET = 4096
_MERGED = "Qproj"
_POOLING = re.compile(r"K((?:max|min|avg)+)")


def is_decode(data: Mapping[str, Any], weights: Mapping[str, Tensor]) -> bool:
    """Whether entries or weights are those of decode gates."""
    named = any(data.get(name) is not None for name in ("seerattn_q_head_pooling_type", "seerattn_k_seq_pooling_type"))
    return named or any(DECODE_KEY.fullmatch(key) for key in weights)


def decode_config(data: Mapping[str, Any]) -> GateConfig:
    """The gates that checked entries describe. Missing ones are the published defaults; a missing width is head_dim.

    Raises:
        ValueError: an unknown pooling, or numbers out of range.
        NotImplementedError: heads are merged in another way than by a linear layer.
    """
    merged = data.get("seerattn_q_head_pooling_type") or _MERGED
    if merged != _MERGED:
        raise NotImplementedError(
            f"these decode gates merge query heads by {merged!r}; this version has {_MERGED!r} only, a linear layer"
        )
    name = data.get("seerattn_k_seq_pooling_type") or "Kmaxminavg"
    match = _POOLING.fullmatch(name)
    if match is None:
        raise ValueError(f"seerattn_k_seq_pooling_type must look like 'Kmaxminavg', got {name!r}")
    decode = DecodeGateConfig(
        k_pooling=tuple(re.findall("max|min|avg", match[1])),
        width=data.get("seerattn_gate_hidden_size"),
        qk_norm=_given(data, "seerattn_use_qk_norm", True),
        rope=_given(data, "seerattn_use_rope", True),
        block_size=_given(data, "seerattn_gate_block_size", 64),
    )
    return GateConfig(prefill=None, decode=decode)


def decode_policy(data: Mapping[str, Any]) -> Policy:
    """The policy that checked entries ask for; where they leave it to run time, a budget of 4096 tokens.

    It is this package's own policy: the token's own block counts within the budget and has no score until it is
    complete. :class:`~seerattention.policies.PublishedDecode` is the published rule.

    Raises:
        ValueError: numbers out of range.
    """
    if data.get("seerattn_sparsity_method") == "token_budget":
        return TokenBudget(_given(data, "seerattn_token_budget", DEFAULT_BUDGET))
    # A threshold of 0 is a placeholder, and a budget without its method is the published default, which nobody chose.
    threshold = data.get("seerattn_threshold")
    return Threshold(threshold) if threshold else TokenBudget(DEFAULT_BUDGET)


def _given(data: Mapping[str, Any], name: str, default: Any) -> Any:
    return default if data.get(name) is None else data[name]
