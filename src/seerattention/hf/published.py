"""Reader of the published AttnGates layout: ``config.json`` with ``seerattn_*`` fields and
``attn_gate_weights.pth``."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import GateConfig, PrefillGateConfig
from ..policies import Policy, Threshold, TopK
from .checkpoint import GateCheckpoint, fingerprint, read_json

WEIGHTS_FILE = "attn_gate_weights.pth"

_DEFAULT_THRESHOLD = 2e-3
_PREFILL_KEY = re.compile(r"(?:model\.)?layers\.(\d+)\.self_attn\.attn_gate\.mask_linear_([qk])\.weight")
_DECODE_KEY = re.compile(r"attngate_")
_GATE_TYPE = re.compile(r"Q((?:max|min|avg)+)_K((?:max|min|avg)+)")


def is_published_layout(folder: Path) -> bool:
    """Whether ``folder`` looks like a published AttnGates checkpoint."""
    config = folder / "config.json"
    return config.is_file() and any(key.startswith("seerattn_") for key in read_json(config))


def read_published(folder: Path) -> GateCheckpoint:
    """Read a published prefill checkpoint.

    The policy comes from the stored sparsity method: a positive threshold, or ``nz_ratio`` as ``TopK(uniform=True)``;
    ``last_block_dense`` turns on the last two query blocks, as the published code does. A threshold of 0 is the
    published code's placeholder for "given at run time" and becomes 2e-3.

    Raises:
        FileNotFoundError: the weights are missing.
        ValueError: damaged weights, unknown keys or an unknown gate type.
        NotImplementedError: decode gates (SeerAttention-R).
    """
    config_path, weights_path = folder / "config.json", folder / WEIGHTS_FILE
    data = read_json(config_path)
    if "seerattn_q_head_pooling_type" in data or "seerattn_k_seq_pooling_type" in data:
        raise NotImplementedError(f"{folder} holds decode gates (SeerAttention-R), which this version does not support")
    if not weights_path.is_file():
        raise FileNotFoundError(f"{weights_path} does not exist")
    try:
        raw = torch.load(weights_path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise ValueError(f"{weights_path} is damaged, truncated or holds more than tensors: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{weights_path} must hold a dict of tensors, got {type(raw).__name__}")
    if any(_DECODE_KEY.search(key) for key in raw):
        raise NotImplementedError(f"{folder} holds decode gates (SeerAttention-R), which this version does not support")
    weights: dict[str, Tensor] = {}
    unknown = []
    for key, value in raw.items():
        match = _PREFILL_KEY.fullmatch(key)
        if match is None:
            unknown.append(key)
        else:
            weights[f"layers.{match[1]}.prefill.{match[2]}_linear"] = value
    if unknown:
        raise ValueError(f"{weights_path} has unexpected keys: {', '.join(sorted(unknown))}")
    base_model = {"name": data.get("base_model"), "revision": None, **fingerprint(data)}
    return GateCheckpoint(_gate_config(data, config_path), _policy(data), base_model, weights, str(folder))


def _gate_config(data: dict[str, Any], path: Path) -> GateConfig:
    name = data.get("seerattn_gate_type", "Qavg_Kmaxminavg")
    match = _GATE_TYPE.fullmatch(name)
    if match is None:
        raise ValueError(f"{path}: seerattn_gate_type must look like 'Qavg_Kmaxminavg', got {name!r}")
    q_pooling, k_pooling = (tuple(re.findall("max|min|avg", kinds)) for kinds in match.groups())
    return GateConfig(
        block_size=data.get("seerattn_gate_block_size", 64),
        prefill=PrefillGateConfig(
            k_pooling=k_pooling,
            q_pooling=q_pooling,
            hidden_size=data.get("seerattn_gate_hidden_size"),
            q_linear=True if data.get("seerattn_gate_force_double") else None,
        ),
    )


def _policy(data: dict[str, Any]) -> Policy:
    last = 2 if data.get("seerattn_last_block_dense") else 0
    method = data.get("seerattn_sparsity_method")
    if method == "nz_ratio" and data.get("seerattn_nz_ratio"):
        return TopK(data["seerattn_nz_ratio"], last_blocks_dense=last, uniform=True)
    threshold = data.get("seerattn_threshold") if method == "threshold" else None
    return Threshold(threshold or _DEFAULT_THRESHOLD, last_blocks_dense=last)
