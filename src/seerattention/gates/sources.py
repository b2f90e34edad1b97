"""Where gates come from: a folder of either layout, or the hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..policies import Budgets
from . import published
from .checkpoint import CONFIG_FILE, WEIGHTS_FILE, GateCheckpoint, read_checkpoint, write_checkpoint
from .published import is_published_layout, read_published


def load_gates(source: str | os.PathLike[str], config: Any) -> GateCheckpoint:
    """Read gates for a model with decoder config ``config`` from a folder (either layout) or the hub.

    Raises:
        FileNotFoundError: ``source`` looks like a path and does not exist, or holds neither layout.
        DamagedFileError: damaged files. ValueError: gates for another base model.
        NotImplementedError: published decode gates of a form that this version has not.
    """
    folder = locate(source)
    if (folder / CONFIG_FILE).is_file():
        checkpoint = read_checkpoint(folder)
    elif is_published_layout(folder):
        checkpoint = read_published(folder)
    else:
        raise FileNotFoundError(
            f"{folder} holds no gates: neither {CONFIG_FILE} (written by save_gates) nor a published AttnGates folder "
            "(config.json with seerattn_* fields and attn_gate_weights.pth)"
        )
    checkpoint.check_base_model(config)
    return checkpoint


def stored_budgets(source: str | os.PathLike[str]) -> Budgets | None:
    """The budgets stored with gates, which :func:`locate` finds; None: none are.

    Raises:
        FileNotFoundError, DamagedFileError: as :func:`load_gates`.
    """
    folder = locate(source)
    return read_checkpoint(folder).budgets if (folder / CONFIG_FILE).is_file() else None


def locate(source: str | os.PathLike[str]) -> Path:
    """The local folder of ``source``: a folder, or a hub id ``owner/name``, which is downloaded.

    Only a string of exactly that form which could not be meant as a path asks the hub.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    parts = str(source).split("/")
    hub_id = isinstance(source, str) and len(parts) == 2 and all(parts) and "\\" not in source
    if not hub_id or parts[0] in (".", "..", "~") or Path(parts[0]).exists() or folder.exists():
        raise FileNotFoundError(f"no folder of gates at {str(source)!r} (a hub id has the form 'owner/name')")
    from huggingface_hub import snapshot_download

    names = [CONFIG_FILE, WEIGHTS_FILE, "config.json", published.WEIGHTS_FILE]
    return Path(snapshot_download(str(source), allow_patterns=names))


def convert(source: str | os.PathLike[str], destination: str | os.PathLike[str]) -> Path:
    """Turn a published AttnGates folder (or hub id) into the layout of :func:`save_gates`; weights keep their bits.

    Raises:
        FileNotFoundError: no such folder, or not of the published layout.
        ValueError, NotImplementedError: as :func:`read_published`.
    """
    folder = locate(source)
    if not is_published_layout(folder):
        raise FileNotFoundError(
            f"{folder} is no published AttnGates folder: no config.json with seerattn_* fields in it"
        )
    return write_checkpoint(destination, read_published(folder))
