"""Gates on disk: ``gate_config.json`` + ``gates.safetensors`` + a model card. Strict to read, atomic to write.

The header of the weights file repeats the description of ``gate_config.json``, and both carry the ``save_id`` of the
save that wrote them. So renaming the weights file into place is what commits a save: a reader that finds the two files
of different saves (the writer was killed between them) goes by the header, and never mixes old and new.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .. import __version__
from ..config import GateConfig
from ..files import write_file
from ..policies import Policy, policy_from_dict
from .architectures import Geometry, find_decoder
from .state import gates, state_of

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
CONFIG_FILE = "gate_config.json"
WEIGHTS_FILE = "gates.safetensors"
CARD_FILE = "README.md"
_CONFIG_KEYS = ("format_version", "base_model", "gates", "policies")
_HEADER_KEY = "gate_config"


@dataclass(frozen=True)
class GateCheckpoint:
    """Gates read from disk, not yet part of a model.

    Attributes:
        gate_config: shape of the gates.
        policy: the prefill policy stored with them.
        base_model: what they were trained for: name, revision and the structural fingerprint of :func:`fingerprint`.
        weights: ``layers.<i>.prefill.<parameter>`` -> tensor.
        source: where they came from, for messages.
    """

    gate_config: GateConfig
    policy: Policy
    base_model: dict[str, Any]
    weights: dict[str, Tensor]
    source: str

    def check_base_model(self, config: Any) -> None:
        """Raise ValueError unless a model with this config has the structure that the gates were trained for."""
        present = fingerprint(config)
        wrong = [
            f"{name}: the gates are for {self.base_model[name]}, the model has {value}"
            for name, value in present.items()
            if self.base_model.get(name) not in (None, value)
        ]
        if wrong:
            name = self.base_model.get("name") or "another model"
            raise ValueError(
                f"{self.source}: these gates belong to a different base model ({name}): " + "; ".join(wrong)
            )
        trained_for, model_name = self.base_model.get("name"), getattr(config, "_name_or_path", "")
        if trained_for and model_name and Path(trained_for).name != Path(model_name).name:
            logger.warning("%s: gates trained for %s go onto %s", self.source, trained_for, model_name)

    def load_into(self, modules: Mapping[int, nn.Module]) -> None:
        """Copy the weights into gate modules by layer.

        Raises:
            ValueError: keys are missing or unexpected, shapes differ, or values are not finite; the message lists them.
        """
        expected = gate_tensors(modules)
        problems = []
        missing = sorted(set(expected) - set(self.weights))
        unexpected = sorted(set(self.weights) - set(expected))
        shapes = [
            f"{name}: {tuple(self.weights[name].shape)} in the file, {tuple(expected[name].shape)} expected"
            for name in sorted(set(expected) & set(self.weights))
            if self.weights[name].shape != expected[name].shape
        ]
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of wrong shape", shapes),
            ("not finite", _not_finite(self.weights)),
        ):
            if names:
                problems.append(f"{what}: {', '.join(names)}")
        if problems:
            raise ValueError(f"{self.source}: gate weights do not fit this model; " + "; ".join(problems))
        with torch.no_grad():
            for name, parameter in expected.items():
                parameter.copy_(self.weights[name])


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """NaN scores would select nothing but the diagonal, without a word."""
    return sorted(name for name, tensor in tensors.items() if not bool(tensor.isfinite().all()))


def gate_tensors(modules: Mapping[int, nn.Module]) -> dict[str, Tensor]:
    """The parameters of gates under the names that they have on disk."""
    return {
        f"layers.{layer}.prefill.{name}": parameter
        for layer, gate in sorted(modules.items())
        for name, parameter in gate.named_parameters()
    }


def fingerprint(config: Any) -> dict[str, Any]:
    """What of a base model gates depend on, from its decoder's config (an object or the dict of a config.json)."""
    if isinstance(config, Mapping):
        data = dict(config)
        heads = data["num_attention_heads"]
        geometry = Geometry(
            heads, data.get("num_key_value_heads") or heads, data.get("head_dim") or data["hidden_size"] // heads
        )
    else:
        data = {
            name: getattr(config, name, None)
            for name in ("model_type", "num_hidden_layers", "rope_parameters", "rope_theta")
        }
        geometry = Geometry.of(config)
    rope = data.get("rope_parameters") or {}
    theta = rope.get("rope_theta", data.get("rope_theta"))
    return {
        "model_type": data.get("model_type"),
        "num_hidden_layers": data.get("num_hidden_layers"),
        "num_attention_heads": geometry.num_heads,
        "num_key_value_heads": geometry.num_kv_heads,
        "head_dim": geometry.head_dim,
        "rope_theta": None if theta is None else float(theta),
    }


def save_gates(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write the gates of an attached model to a folder, in their present dtype.

    Whatever interrupts it, the folder holds either the old gates or the new ones, whole.

    Args:
        model: an attached model.
        path: the folder; it may exist, and its files of the same names are replaced.

    Raises:
        ValueError: no gates are attached, a parameter is empty or not in memory (sharded or offloaded gates), or is not
            finite.
    """
    state = state_of(model)
    modules = {layer: gate for layer, gate in enumerate(gates(model)) if gate is not None}
    if state.gate_config is None or not modules:
        raise ValueError("this model has no gates to save (it is attached with a selector only)")
    tensors = {
        name: value.detach().cpu().contiguous() for name, value in gate_tensors(modules).items() if not value.is_meta
    }
    lost = sorted(name for name in gate_tensors(modules) if name not in tensors or tensors[name].numel() == 0)
    if lost:
        raise ValueError(f"refusing to save gates that are not in memory (sharded or offloaded?): {', '.join(lost)}")
    if bad := _not_finite(tensors):
        raise ValueError(f"refusing to save gates that are not finite: {', '.join(bad)}")
    config: Any = find_decoder(model).config
    base_model = {
        "name": getattr(config, "_name_or_path", None) or None,
        "revision": getattr(config, "_commit_hash", None),
        **fingerprint(config),
    }
    return write_checkpoint(path, GateCheckpoint(state.gate_config, state.policy, base_model, tensors, str(path)))


def write_checkpoint(path: str | os.PathLike[str], checkpoint: GateCheckpoint) -> Path:
    """Write the three files of a checkpoint, each atomically, the weights (which commit the save) first."""
    description = {
        "format_version": FORMAT_VERSION,
        "package_version": __version__,
        "base_model": checkpoint.base_model,
        "gates": checkpoint.gate_config.to_dict(),
        "policies": {"prefill": checkpoint.policy.to_dict()},
    }
    tensors = {name: tensor.contiguous() for name, tensor in checkpoint.weights.items()}
    # Made from the content: equal gates give equal files.
    content = hashlib.sha256(json.dumps(description).encode() + save(tensors))
    description["save_id"] = content.hexdigest()[:16]
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / WEIGHTS_FILE, save(tensors, metadata={_HEADER_KEY: json.dumps(description)}))
    write_file(folder / CONFIG_FILE, json.dumps(description, indent=2) + "\n")
    write_file(folder / CARD_FILE, _model_card(description))
    return folder


def read_checkpoint(folder: Path) -> GateCheckpoint:
    """Read a folder that :func:`save_gates` wrote.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, of a newer format, or lacks entries.
    """
    config_path, weights_path = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    data = read_json(config_path)
    if not weights_path.is_file():
        raise FileNotFoundError(f"{weights_path} does not exist")
    try:
        with safe_open(str(weights_path), framework="pt") as file:
            header = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{weights_path} is damaged or truncated: {error}") from error
    if _HEADER_KEY in header:
        described = json.loads(header[_HEADER_KEY])
        if described.get("save_id") != data.get("save_id"):
            logger.warning(
                "%s is not of the same save as the weights (was saving interrupted?); going by the description in %s",
                config_path,
                weights_path.name,
            )
            data = described
    missing = [key for key in _CONFIG_KEYS if key not in data]
    if missing:
        raise ValueError(f"{config_path} lacks {missing}")
    if data["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{config_path} has format_version {data['format_version']}, this version of seerattention reads "
            f"{FORMAT_VERSION}; upgrade seerattention or convert the gates again"
        )
    try:
        gate_config = GateConfig.from_dict(data["gates"])
        policy = policy_from_dict(data["policies"]["prefill"])
        base_model = dict(data["base_model"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{config_path} describes no valid gates: {error}") from error
    return GateCheckpoint(gate_config, policy, base_model, weights, str(folder))


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data


def _model_card(description: dict[str, Any]) -> str:
    base, gate_config = description["base_model"], description["gates"]
    name = base["name"] or f"a {base['model_type']} model of {base['num_hidden_layers']} layers"
    header = ["---", "library_name: seerattention", "tags: [sparse-attention, seerattention]"]
    if base["name"] and base["name"].count("/") == 1 and not base["name"].startswith((".", "/", "~")):
        header.append(f"base_model: {base['name']}")
    header.append("---")
    table = "\n".join(f"| {key} | {value} |" for key, value in base.items() if value is not None)
    return (
        "\n".join(header)
        + f"""

# SeerAttention gates for {name}

Learned gates (arXiv 2410.13276) that choose which {gate_config["block_size"]}x{gate_config["block_size"]} blocks of the
attention map a long prompt reads. The base model is not part of this folder and stays unchanged.

```python
import seerattention as seer
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base["name"] or "<base model>"!r}, dtype="bfloat16")
seer.attach(model, "<this folder>")
```

| base model | |
|---|---|
{table}

| gates | |
|---|---|
| prefill | `{json.dumps(gate_config["prefill"])}` |
| prefill policy | `{json.dumps(description["policies"]["prefill"])}` |
| written by | seerattention {description["package_version"]} |
"""
    )
