"""Gates on disk: ``gate_config.json`` + ``gates.safetensors`` + a model card. Strict to read, atomic to write.

The header of the weights file repeats the description of ``gate_config.json``, and both carry the ``save_id`` of the
save that wrote them, a digest of description and weights. So renaming the weights file into place is what commits a
save: a reader that finds the two files of different saves (the writer was killed between them) goes by the header, and
never mixes old and new. Weights that do not have the digest of their description are refused; only the policies and
budgets of ``gate_config.json`` may be edited by hand.

Nothing here needs Hugging Face: a serving engine reads gates with torch and safetensors alone.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from .. import __version__
from ..config import PHASES, GateConfig
from ..files import DamagedFileError, pack, packed_path, read_json, write_file
from ..policies import Budget, Budgets, Policy, policy_from_dict
from .card import model_card
from .geometry import OPTIONAL, fingerprint, mismatches
from .tensors import check_dtypes, digest, is_digest_of, own_memory, read_described, read_safetensors

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
"""What this version writes of gates with budgets, and reads. Those without have version 1, which older readers know."""
CONFIG_FILE = "gate_config.json"
WEIGHTS_FILE = "gates.safetensors"
CARD_FILE = "README.md"
_CONFIG_KEYS = ("format_version", "base_model", "gates", "policies")
_HEADER_KEY = "gate_config"
_HEADER_KEYS = {_HEADER_KEY, "format"}  # some tools that copy weights add a format
_SHAPES = "tensors"
_BUDGETS = "budgets"
_PREFILL, _DECODE = PHASES


@dataclass(frozen=True)
class GateCheckpoint:
    """Gates read from disk, not yet part of a model.

    Attributes:
        gate_config: shape of the gates.
        policy: the prefill policy stored with them; of gates that only decode, Dense.
        base_model: what they were trained for: name, revision and the structural fingerprint of :func:`fingerprint`.
        weights: ``layers.<i>.<phase>.<parameter>`` -> tensor.
        source: where they came from, for messages.
        decode_policy: the policy of decoding stored with them; None: none is.
        budgets: what was fitted for the prefill gates; None: nothing.
    """

    gate_config: GateConfig
    policy: Policy
    base_model: dict[str, Any]
    weights: dict[str, Tensor]
    source: str
    decode_policy: Policy | None = None
    budgets: Budgets | None = None

    def check_base_model(self, config: Any) -> None:
        """Raise ValueError unless a model with this config has the structure that the gates were trained for."""
        present = {**dict.fromkeys(OPTIONAL), **fingerprint(config)}
        wrong = [
            f"{name}: the gates are for {mine}, the model has {value}"
            for name, mine, value in mismatches(self.base_model, present)
        ]
        if wrong:
            name = self.base_model.get("name") or "another model"
            raise ValueError(
                f"{self.source}: these gates belong to a different base model ({name}): " + "; ".join(wrong)
            )
        trained_for, model_name = self.base_model.get("name"), getattr(config, "_name_or_path", "")
        if trained_for and model_name and Path(trained_for).name != Path(model_name).name:
            logger.warning("%s: gates trained for %s go onto %s", self.source, trained_for, model_name)

    def load_into(self, modules: Mapping[int, nn.Module], phase: str = _PREFILL) -> None:
        """Copy the weights of a phase into its gate modules by layer.

        Raises:
            DamagedFileError: keys are missing or unexpected, shapes differ, or values are not finite; the message lists
                them.
        """
        expected = gate_tensors(modules, phase)
        others = [f".{other}." for other in self.gate_config.phases if other != phase]
        weights = {name: x for name, x in self.weights.items() if not any(other in name for other in others)}
        if problems := _misfits({name: tuple(x.shape) for name, x in expected.items()}, weights):
            raise DamagedFileError(f"{self.source}: gate weights do not fit this model; {problems}")
        with torch.no_grad():
            for name, parameter in expected.items():
                parameter.copy_(weights[name])


def _misfits(expected: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor]) -> str:
    """What of these weights is not as expected by name and shape, or not finite; empty if all is well."""
    shapes = [
        f"{name}: {tuple(weights[name].shape)} in the file, {expected[name]} expected"
        for name in sorted(expected.keys() & weights.keys())
        if tuple(weights[name].shape) != expected[name]
    ]
    problems = (
        ("missing", sorted(expected.keys() - weights.keys())),
        ("unexpected", sorted(weights.keys() - expected.keys())),
        ("of wrong shape", shapes),
        ("not finite", _not_finite(weights)),
    )
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in problems if names)


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """NaN scores would select nothing but the diagonal, without a word."""
    return sorted(name for name, tensor in tensors.items() if not bool(tensor.isfinite().all()))


def gate_tensors(modules: Mapping[int, nn.Module], phase: str = _PREFILL) -> dict[str, Tensor]:
    """The parameters of the gates of a phase, by layer, under the names that they have on disk."""
    return {
        f"layers.{layer}.{phase}.{name}": parameter
        for layer, gate in sorted(modules.items())
        for name, parameter in gate.named_parameters()
    }


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Check weights that are about to be saved.

    Raises:
        ValueError: one is empty or not in memory (sharded or offloaded gates), or not finite.
    """
    lost = sorted(name for name, tensor in tensors.items() if tensor.is_meta or tensor.numel() == 0)
    if lost:
        raise ValueError(f"refusing to save gates that are not in memory (sharded or offloaded?): {', '.join(lost)}")
    if bad := _not_finite(tensors):
        raise ValueError(f"refusing to save gates that are not finite: {', '.join(bad)}")


def write_checkpoint(
    path: str | os.PathLike[str], checkpoint: GateCheckpoint, *, packed: bool = False, notes: str = ""
) -> Path:
    """Write the three files of a checkpoint, each atomically, the weights (which commit the save) first.

    Args:
        packed: compress the weights without loss (``gates.safetensors.xz``), to ship them; they are read as others.
        notes: Markdown for the end of the card, second-level headings and below.
    """
    policies = {_PREFILL: checkpoint.policy, _DECODE: checkpoint.decode_policy}
    newer = any(isinstance(policy, Budget) or getattr(policy, "layers", ()) for policy in policies.values())
    older = checkpoint.budgets is None and not newer
    description = {
        "format_version": 1 if older else FORMAT_VERSION,
        "package_version": __version__,
        "base_model": checkpoint.base_model,
        "gates": checkpoint.gate_config.to_dict(),
        "policies": {phase: policy.to_dict() for phase, policy in policies.items() if policy is not None},
        # So that a reader can say which weights are missing or of another shape.
        _SHAPES: {name: list(tensor.shape) for name, tensor in sorted(checkpoint.weights.items())},
    }
    if checkpoint.budgets is not None:
        description[_BUDGETS] = checkpoint.budgets.to_dict()
    tensors = own_memory(checkpoint.weights)
    # Made from the content: equal gates give equal files.
    description["save_id"] = digest(description, tensors)
    folder = Path(path)
    content, plain = save(tensors, metadata={_HEADER_KEY: json.dumps(description)}), folder / WEIGHTS_FILE
    if packed:
        write_file(packed_path(plain), pack(content))
        plain.unlink(missing_ok=True)  # it would be read instead
    else:
        write_file(plain, content)
        packed_path(plain).unlink(missing_ok=True)
    write_file(folder / CONFIG_FILE, json.dumps(description, indent=2) + "\n")
    write_file(folder / CARD_FILE, model_card(description, notes))
    return folder


def read_checkpoint(folder: Path) -> GateCheckpoint:
    """Read a folder that :func:`write_checkpoint` wrote.

    Raises:
        FileNotFoundError: a file is missing.
        DamagedFileError: a file is damaged, of another format, or lacks entries; or the weights or their description
            are not those that were saved.
    """
    config_path, weights_path = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    data = read_json(config_path)
    weights, metadata = read_safetensors(weights_path)
    check_dtypes(weights, str(weights_path))
    if unknown := sorted(metadata.keys() - _HEADER_KEYS):
        raise DamagedFileError(f"{weights_path} is damaged: its header has unknown entries {unknown}")
    if _HEADER_KEY not in metadata:  # of the first version, or copied by a tool that drops the header
        if "save_id" in data:
            _verify(data, weights, weights_path)
        else:
            logger.info("%s has no digest to verify it by: it is of an older format; save the gates again", folder)
        return _parse(data, config_path, weights, folder)
    described = read_described(metadata, _HEADER_KEY, str(weights_path))
    _verify(described, weights, weights_path)
    saved = _parse(described, weights_path, weights, folder)
    if described["save_id"] != data.get("save_id"):
        logger.warning(
            "%s is not of the same save as the weights (was saving interrupted?); going by the description in %s",
            config_path,
            weights_path.name,
        )
        return saved
    checkpoint = _parse(data, config_path, weights, folder)
    _check_edits(checkpoint, saved, config_path)
    return checkpoint


def _parse(data: dict[str, Any], path: Path, weights: dict[str, Tensor], folder: Path) -> GateCheckpoint:
    missing = [key for key in _CONFIG_KEYS if key not in data]
    if missing:
        raise DamagedFileError(f"{path} lacks {missing}")
    if type(data["format_version"]) is not int or not 1 <= data["format_version"] <= FORMAT_VERSION:
        raise DamagedFileError(
            f"{path} has format_version {data['format_version']!r}, this version of seerattention reads "
            f"1 to {FORMAT_VERSION}; upgrade seerattention or convert the gates again"
        )
    try:
        gate_config = GateConfig.from_dict(data["gates"])
        policy = policy_from_dict(data["policies"][_PREFILL])
        stored = data["policies"].get(_DECODE)
        decode_policy = None if stored is None else policy_from_dict(stored)
        base_model = _base_model(data["base_model"])
        budgets = None if data.get(_BUDGETS) is None else Budgets.from_dict(data[_BUDGETS])
        if budgets is not None and budgets.block_size != gate_config.block_size_of(_PREFILL):
            raise ValueError(f"its budgets are for blocks of {budgets.block_size} tokens")
    except NotImplementedError as error:
        raise NotImplementedError(f"{path}: {error}") from error
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise DamagedFileError(f"{path} describes no valid gates: {error}") from error
    return GateCheckpoint(gate_config, policy, base_model, weights, str(folder), decode_policy, budgets)


def _base_model(data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise TypeError(f"base_model must be a JSON object, got {type(data).__name__}")
    wrong = [
        f"{name} is {value!r}"
        for name, value in data.items()
        if value is not None and (isinstance(value, bool) or not isinstance(value, str | int | float))
    ]
    if wrong:
        raise TypeError(f"entries of base_model must be strings or numbers: {', '.join(wrong)}")
    return dict(data)


def _verify(described: dict[str, Any], weights: dict[str, Tensor], path: Path) -> None:
    """Raise :class:`DamagedFileError` unless the weights and their description are what one save wrote."""
    content = {name: value for name, value in described.items() if name != "save_id"}
    if is_digest_of(described.get("save_id"), content, weights):
        return
    expected, problems = _expected_shapes(described), ""
    if expected is not None:
        problems = _misfits(expected, weights)
    raise DamagedFileError(
        f"{path} is damaged: its weights or their description are not those that were saved"
        + (f" ({problems})" if problems else "")
        + "; copy the gates again, or distil them again"
    )


def _expected_shapes(described: dict[str, Any]) -> dict[str, tuple[int, ...]] | None:
    shapes = described.get(_SHAPES)
    if not isinstance(shapes, dict) or not all(isinstance(shape, list) for shape in shapes.values()):
        return None
    return {name: tuple(shape) for name, shape in shapes.items()}


def _check_edits(checkpoint: GateCheckpoint, saved: GateCheckpoint, path: Path) -> None:
    """Of the description only the policies may differ from what was saved with the weights."""
    for name in ("gate_config", "base_model"):
        mine, theirs = getattr(checkpoint, name), getattr(saved, name)
        if mine != theirs:
            raise DamagedFileError(
                f"{path} is damaged or was edited: it says {name} {mine}, but the weights were saved with {theirs}; "
                "only the policies may be edited by hand"
            )
    for name in ("policy", "decode_policy", "budgets"):
        mine, theirs = getattr(checkpoint, name), getattr(saved, name)
        if mine != theirs:
            what = "budgets" if name == "budgets" else "policy"
            logger.warning("%s: the %s %s was edited by hand (%s was saved)", path, what, mine, theirs)
