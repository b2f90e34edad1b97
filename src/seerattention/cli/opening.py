"""What commands that run a model with gates begin with: which gates, and the model."""

from __future__ import annotations

from typing import Any

from .common import Terminal, default_gates, load_model, resolve_device
from .options import check_gates

__all__ = ["gates_for", "open_model"]


def gates_for(model: str, gates: str | None) -> str:
    """The folder or hub id of ``--gates``, or where it is not given of the gates that come with the model.

    Raises:
        ValueError: none are given, and none come with this model.
        FileNotFoundError: no such folder, or the model's own gates are not there yet.
    """
    folder = gates or default_gates(model)
    if folder is None:
        raise ValueError("--gates is needed for this model: a folder of trained gates or a hub id")
    return check_gates(str(folder))


def open_model(terminal: Terminal, model: str, device: str, dtype: str) -> tuple[Any, Any]:
    """A model and its tokenizer, see :func:`~seerattention.cli.common.load_model`; says which and where."""
    place = resolve_device(device)
    terminal.say(f"loading {model} on {place}")
    return load_model(model, place, dtype)
