"""Where gates come from: a folder of either layout, or the hub."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from ..config import PHASES, GateConfig
from ..files import packed_path
from ..policies import Budgets, Policy
from . import published
from .card import card_notes
from .checkpoint import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, GateCheckpoint, read_checkpoint, write_checkpoint
from .geometry import mismatches
from .published import is_published_layout, read_published


def load_gates(source: str | os.PathLike[str], config: Any) -> GateCheckpoint:
    """Read gates for a model with decoder config ``config`` from a folder (either layout) or the hub.

    Raises:
        FileNotFoundError: ``source`` looks like a path and does not exist, or holds neither layout.
        DamagedFileError: damaged files. ValueError: gates for another base model.
        NotImplementedError: published decode gates of a form that this version has not.
    """
    checkpoint = _read(source)
    checkpoint.check_base_model(config)
    return checkpoint


def _read(source: str | os.PathLike[str]) -> GateCheckpoint:
    folder = locate(source)
    if (folder / CONFIG_FILE).is_file():
        return read_checkpoint(folder)
    if is_published_layout(folder):
        return read_published(folder)
    raise FileNotFoundError(
        f"{folder} holds no gates: neither {CONFIG_FILE} (written by save_gates) nor a published AttnGates folder "
        "(config.json with seerattn_* fields and attn_gate_weights.pth)"
    )


def stored_budgets(source: str | os.PathLike[str]) -> Budgets | None:
    """The budgets stored with gates, which :func:`locate` finds; None: none are.

    Raises:
        FileNotFoundError, DamagedFileError: as :func:`load_gates`.
    """
    folder = locate(source)
    return read_checkpoint(folder).budgets if (folder / CONFIG_FILE).is_file() else None


def store_budgets(source: str | os.PathLike[str], destination: str | os.PathLike[str], budgets: Budgets) -> Path:
    """Write the gates of a source with these budgets, whose default becomes their policy of prompts.

    Weights keep their bits and, where they are packed, their packing; a card keeps what people wrote at its end.

    Args:
        source: a folder of either layout, or a hub id.
        destination: folder to write; it may be the source.

    Raises:
        FileNotFoundError, DamagedFileError: as :func:`load_gates`.
    """
    return _store(source, destination, policy=budgets.policy(), budgets=budgets)


def store_policy(source: str | os.PathLike[str], destination: str | os.PathLike[str], policy: Policy) -> Path:
    """Write the gates of a source with this policy of prompts; the rest, stored budgets too, as :func:`store_budgets`.

    Raises:
        FileNotFoundError, DamagedFileError: as :func:`load_gates`.
    """
    return _store(source, destination, policy=policy)


def _store(source: str | os.PathLike[str], destination: str | os.PathLike[str], **changed: Any) -> Path:
    folder, fitted = locate(source), dataclasses.replace(_read(source), **changed)
    packed = not (folder / WEIGHTS_FILE).is_file() and packed_path(folder / WEIGHTS_FILE).is_file()
    return write_checkpoint(destination, fitted, packed=packed, notes=notes_of(folder))


def notes_of(folder: Path) -> str:
    """What people wrote at the end of the card in a folder of gates; empty where there is none."""
    card = folder / CARD_FILE
    known = card.is_file() and (folder / CONFIG_FILE).is_file()
    return card_notes(card.read_text(encoding="utf-8", errors="replace")) if known else ""


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

    names = [CONFIG_FILE, WEIGHTS_FILE, packed_path(Path(WEIGHTS_FILE)).name, "config.json", published.WEIGHTS_FILE]
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


def join(prefill: str | os.PathLike[str], decode: str | os.PathLike[str], destination: str | os.PathLike[str]) -> Path:
    """Write one folder with the prefill gates of one source and the decode gates of another; weights keep their bits.

    Args:
        prefill, decode: folders of either layout, or hub ids, of gates for the same base model. What each holds for the
            other phase is left out.
        destination: folder to write, in the layout of :func:`save_gates`; it may be one of the sources.

    Raises:
        FileNotFoundError: as :func:`load_gates`.
        ValueError: gates of different base models, or a source without gates for its phase.
    """
    phases = dict(zip(PHASES, (_read(prefill), _read(decode)), strict=True))
    for phase, checkpoint in phases.items():
        if phase not in checkpoint.gate_config.phases:
            raise ValueError(
                f"{checkpoint.source} has no gates for {phase!r}, only for {', '.join(checkpoint.gate_config.phases)}"
            )
    first, second = phases.values()
    structure = {name: x for name, x in first.base_model.items() if name not in ("name", "revision") and x is not None}
    if differ := mismatches(second.base_model, structure):
        raise ValueError(
            f"{first.source} and {second.source} are of different base models: "
            + "; ".join(f"{name}: {mine} and {other}" for name, other, mine in differ)
        )
    block_size, own = first.gate_config.block_size, second.gate_config
    of_decoding = own.decode if own.block_size == block_size else own.spec_of("decode")  # which says its own
    config = GateConfig(block_size=block_size, prefill=first.gate_config.prefill, decode=of_decoding)
    weights = {
        name: tensor
        for phase, checkpoint in phases.items()
        for name, tensor in checkpoint.weights.items()
        if f".{phase}." in name
    }
    joined = dataclasses.replace(first, gate_config=config, weights=weights, decode_policy=second.decode_policy)
    return write_checkpoint(destination, joined)
