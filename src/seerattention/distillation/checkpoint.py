"""The training state of a run, in one file that is written atomically and verified when it is read."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from ..files import DamagedFileError, write_file
from ..gates.tensors import digest, read_described, read_safetensors

logger = logging.getLogger(__name__)

STATE_FILE = "training_state.safetensors"
_FORMAT = "seerattention-training-state-1"
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
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    described = json.dumps(meta)
    header = {"format": _FORMAT, "meta": described, "digest": digest(json.loads(described), contiguous)}
    write_file(path, save(contiguous, metadata=header))


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
        if header.get("format") != _FORMAT:
            raise DamagedFileError(f"{path} has format {header.get('format')!r}, this version reads {_FORMAT!r}")
        meta = read_described(header, "meta", str(path))
    except DamagedFileError as error:
        raise DamagedFileError(f"{error}; {_ADVICE}") from error
    if "digest" not in header:
        logger.info("%s has no digest to verify it by: an older version wrote it", path)
    elif digest(meta, tensors) != header["digest"]:
        raise DamagedFileError(f"{path} is damaged: it does not hold what was saved; {_ADVICE}")
    return tensors, meta


def check_same_run(saved: Mapping[str, Any], current: Mapping[str, Any], path: Path) -> None:
    """Refuse to resume a run with other settings than it was started with.

    Raises:
        ValueError: lists every setting that differs, with both values.
    """
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
