"""The training state of a run, in one file that is written atomically and verified when it is read."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..config import GateConfig
from ..files import DamagedFileError, write_file
from ..gates.tensors import digest, is_digest_of, own_memory, read_described, read_safetensors
from .history import DistillHistory

logger = logging.getLogger(__name__)

STATE_FILE = "training_state.safetensors"
_FORMAT = "seerattention-training-state-2"
# Without a digest, which was added before the number was changed: where there is one, it is verified.
_EARLIER_FORMAT = "seerattention-training-state-1"
_ADVICE = "delete it to start over"


def save_state(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write tensors and a JSON-able ``meta`` atomically to ``path``.

    Raises:
        ValueError: a tensor has no element. That is what gates look like when a framework has sharded them away, and
            such a file would be worthless.
        OSError: the disk is full, read-only, ...; what was there before is unchanged.
    """
    empty = sorted(name for name, tensor in tensors.items() if tensor.numel() == 0)
    if empty:
        raise ValueError(f"refusing to write empty tensors: {empty}; were the gates sharded away?")
    content, described = own_memory(tensors), json.dumps(meta)
    header = {"format": _FORMAT, "meta": described, "digest": digest(_all_of(_FORMAT, json.loads(described)), content)}
    write_file(path, save(content, metadata=header))


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_state` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: the file is no training state, or it is damaged.
    """
    if not path.exists():
        raise FileNotFoundError(f"no training state at {path}")
    try:
        tensors, header = read_safetensors(path)
        if header.get("format") not in (_FORMAT, _EARLIER_FORMAT):
            raise DamagedFileError(f"{path} has format {header.get('format')!r}, this version reads {_FORMAT!r}")
        meta = read_described(header, "meta", str(path))
        _verify(header, meta, tensors, path)
    except DamagedFileError as error:
        raise DamagedFileError(f"{error}; {_ADVICE}") from error
    return tensors, meta


def _all_of(form: str, meta: Mapping[str, Any]) -> dict[str, Any]:
    """What the digest is taken of, besides the tensors."""
    return {"format": form, "meta": meta} if form == _FORMAT else dict(meta)


def _verify(header: Mapping[str, str], meta: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> None:
    form = header["format"]
    if form == _EARLIER_FORMAT and header.keys() == {"format", "meta"}:
        logger.info("%s has no digest to verify it by: an earlier version wrote it", path)
        _check_earlier(meta, tensors, path)
    elif not is_digest_of(header.get("digest"), _all_of(form, meta), tensors):
        raise DamagedFileError(f"{path} is damaged: it does not hold what was saved")


def _check_earlier(meta: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> None:
    """As much as can be told of a state without a digest: entries and dtypes are those that were written."""
    kinds = {"settings": dict, "step": int, "data": dict, "history": dict}
    wrong = [f"{name} is {meta.get(name)!r:.40}" for name, kind in kinds.items() if type(meta.get(name)) is not kind]
    wrong += [
        f"{name} is {x.dtype}"
        for name, x in tensors.items()
        if x.dtype != (torch.uint8 if name.startswith("rng/") else torch.float32)
    ]
    wrong += [f"{name} is not finite" for name, x in tensors.items() if not bool(x.isfinite().all())]
    if not wrong and type(meta["data"].get("taken")) is not int:
        wrong.append(f"data.taken is {meta['data'].get('taken')!r:.40}")
    if not wrong:
        try:
            DistillHistory.from_dict(meta["history"])
        except (TypeError, ValueError) as error:
            wrong.append(f"history: {error}")
    if wrong:
        raise DamagedFileError(f"{path} is damaged: {'; '.join(wrong)}")


def check_same_run(saved: Mapping[str, Any], current: Mapping[str, Any], path: Path) -> None:
    """Refuse to resume a run with other settings than it was started with.

    Raises:
        DamagedFileError: ``saved`` describes no gates.
        ValueError: lists every setting that differs, with both values.
    """
    if saved.get("gates") is not None:
        saved = {**saved, "gates": _in_present_form(saved["gates"], path)}
    differing = [
        f"{key}: was {saved.get(key)!r}, now {current.get(key)!r}"
        for key in sorted(set(saved) | set(current))
        if saved.get(key) != current.get(key)
    ]
    if differing:
        raise ValueError(
            f"{path} belongs to a run with other settings ({'; '.join(differing)}). Repeat the command with the "
            "settings that the run was started with, choose another output directory, or delete the file to start over"
        )


def _in_present_form(gates: Any, path: Path) -> dict[str, Any]:
    """A gate config as this version writes it: with the entries that an earlier one did not have."""
    try:
        described: dict[str, Any] = json.loads(json.dumps(GateConfig.from_dict(gates).to_dict()))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise DamagedFileError(f"{path} describes no valid gates: {error}; {_ADVICE}") from error
    return described
