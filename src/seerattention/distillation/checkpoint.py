"""The training state of a run, in one file that is written atomically."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import replace_file, temporary_name

STATE_FILE = "training_state.safetensors"
_FORMAT = "seerattention-training-state-1"


def save_state(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write tensors and a JSON-able ``meta`` atomically to ``path``.

    Raises:
        ValueError: a tensor has no element. That is what gates look like when a framework has sharded them away, and
            such a file would be worthless.
    """
    empty = sorted(name for name, tensor in tensors.items() if tensor.numel() == 0)
    if empty:
        raise ValueError(f"refusing to write empty tensors: {empty}; were the gates sharded away?")
    path.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, str(temporary_name(path)), metadata={"format": _FORMAT, "meta": json.dumps(meta)})
    replace_file(path)


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_state` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no training state, or it is damaged.
    """
    if not path.exists():
        raise FileNotFoundError(f"no training state at {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no training state ({error}); delete it to start over") from error
    if header.get("format") != _FORMAT:
        raise ValueError(
            f"{path} has format {header.get('format')!r}, this version reads {_FORMAT!r}; delete it to start over"
        )
    return tensors, json.loads(header["meta"])


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
