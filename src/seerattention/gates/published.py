"""Reader of the published AttnGates layout: ``config.json`` with ``seerattn_*`` fields and
``attn_gate_weights.pth``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import GateConfig, PrefillGateConfig
from ..files import DamagedFileError, read_json
from ..policies import Dense, Policy, Threshold, TopK
from .checkpoint import GateCheckpoint
from .geometry import fingerprint
from .published_decode import DECODE_KEY, DECODE_METHODS, DECODE_TYPES, decode_config, decode_policy, is_decode
from .published_parts import KEY, PARAMETERS, check_types
from .tensors import check_dtypes, read_pickled

WEIGHTS_FILE = "attn_gate_weights.pth"

_DEFAULT_THRESHOLD = 2e-3
_PREFILL_KEY = re.compile(KEY.format("mask_linear_[qk]"))
_GATE_TYPE = re.compile(r"Q((?:max|min|avg)+)_K((?:max|min|avg)+)")


def is_published_layout(folder: Path) -> bool:
    """Whether ``folder`` looks like a published AttnGates checkpoint."""
    config = folder / "config.json"
    return config.is_file() and any(key.startswith("seerattn_") for key in read_json(config))


def read_published(folder: Path) -> GateCheckpoint:
    """Read a published checkpoint, of prefill gates (SeerAttention) or of decode gates (SeerAttention-R).

    The policy of prefill gates comes from the stored sparsity method: a threshold (also where no method is named), or
    ``nz_ratio`` as ``TopK(uniform=True)``; ``last_block_dense`` turns on the last two query blocks, as the published
    code does. A threshold of 0 is the published code's placeholder for "given at run time" and becomes 2e-3. For decode
    gates see :func:`~seerattention.gates.published_decode.decode_policy`; prompts stay dense with them.

    Raises:
        FileNotFoundError: the weights are missing.
        DamagedFileError: damaged weights, unknown keys, gates of both kinds, entries of a wrong type, an unknown gate
            type or method.
        NotImplementedError: decode gates that merge the query heads of a group in another way than by a linear layer.
    """
    config_path, weights_path = folder / "config.json", folder / WEIGHTS_FILE
    data = read_json(config_path)
    raw = read_pickled(weights_path)
    decodes = is_decode(data, raw)
    weights = _renamed(raw, DECODE_KEY if decodes else _PREFILL_KEY, "decode" if decodes else "prefill", weights_path)
    check_dtypes(weights, str(weights_path))
    try:
        check_types(data, DECODE_TYPES if decodes else _TYPES, DECODE_METHODS if decodes else _METHODS)
        base_model = {"name": data.get("base_model"), "revision": None, **fingerprint(data)}
        if decodes:
            config = decode_config(data)
            return GateCheckpoint(config, Dense(), base_model, weights, str(folder), decode_policy(data))
        return GateCheckpoint(_gate_config(data), _policy(data), base_model, weights, str(folder))
    except NotImplementedError as error:
        raise NotImplementedError(f"{config_path}: {error}") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise DamagedFileError(f"{config_path} describes no valid gates: {error}") from error


def _renamed(raw: Mapping[str, Tensor], key_of: re.Pattern[str], phase: str, path: Path) -> dict[str, Tensor]:
    """Published weights under the names of :class:`GateCheckpoint`.

    Raises:
        DamagedFileError: unexpected keys, or two for one parameter.
    """
    weights: dict[str, Tensor] = {}
    unknown = []
    for key, value in raw.items():
        match = key_of.fullmatch(key)
        if match is None:
            unknown.append(key)
            continue
        name = f"layers.{int(match['layer'])}.{phase}.{PARAMETERS[match['parameter']]}"
        if name in weights:
            raise DamagedFileError(f"{path} holds {name} twice: the second time as {key}")
        weights[name] = value
    if unknown:
        raise DamagedFileError(f"{path} has unexpected keys: {', '.join(sorted(unknown))}")
    return weights


_METHODS = ("threshold", "nz_ratio")
_TYPES: dict[str, tuple[type, ...]] = {
    "seerattn_gate_type": (str,),
    "seerattn_gate_force_double": (bool,),
    "seerattn_last_block_dense": (bool,),
    "seerattn_nz_ratio": (int, float),
}


def _gate_config(data: dict[str, Any]) -> GateConfig:
    name = data.get("seerattn_gate_type") or "Qavg_Kmaxminavg"
    match = _GATE_TYPE.fullmatch(name)
    if match is None:
        raise ValueError(f"seerattn_gate_type must look like 'Qavg_Kmaxminavg', got {name!r}")
    q_pooling, k_pooling = (tuple(re.findall("max|min|avg", kinds)) for kinds in match.groups())
    return GateConfig(
        block_size=64 if data.get("seerattn_gate_block_size") is None else data["seerattn_gate_block_size"],
        prefill=PrefillGateConfig(
            k_pooling=k_pooling,
            q_pooling=q_pooling,
            width=data.get("seerattn_gate_hidden_size"),
            q_linear=True if data.get("seerattn_gate_force_double") else None,
        ),
    )


def _policy(data: dict[str, Any]) -> Policy:
    last = 2 if data.get("seerattn_last_block_dense") else 0
    if data.get("seerattn_sparsity_method") == "nz_ratio":
        ratio = data.get("seerattn_nz_ratio")
        if ratio is None:
            raise ValueError("seerattn_sparsity_method is 'nz_ratio', but there is no seerattn_nz_ratio")
        return TopK(ratio, last_blocks_dense=last, uniform=True)
    return Threshold(data.get("seerattn_threshold") or _DEFAULT_THRESHOLD, last_blocks_dense=last)
