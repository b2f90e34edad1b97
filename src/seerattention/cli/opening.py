"""What commands that run a model with gates begin with: which gates, and the model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import testbed
from ..testbed import MODELS
from .common import Terminal, default_gates, is_out_of_memory, one_line, resolve_device
from .options import check_dtype, check_gates, check_model

__all__ = ["gates_for", "in_fast_precision", "load_config", "load_model", "open_model", "scaled_config"]


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


def open_model(
    terminal: Terminal, model: str, device: str, dtype: str, rope_scaling: tuple[str, float] | None = None
) -> tuple[Any, Any]:
    """A model and its tokenizer, see :func:`load_model`; says which and where."""
    place = resolve_device(device)
    terminal.say(f"loading {model} on {place}")
    return load_model(model, place, dtype, rope_scaling)


def load_model(
    name: str, device: str = "auto", dtype: str = "auto", rope_scaling: tuple[str, float] | None = None
) -> tuple[Any, Any]:
    """A model of the testbed (``"testbed"``, ``"smollm2"``), or any Hugging Face causal language model, and its
    tokenizer.

    Args:
        rope_scaling: kind and factor, for prompts of so many times the model's own length; None: as the model is.
    """
    check_model(name)
    chosen = resolve_device(device)
    import torch
    from transformers.utils import logging as transformers_logging

    given = None if check_dtype(dtype) == "auto" else getattr(torch, dtype)
    if name in MODELS or not sys.stderr.isatty():  # loading is quick, or its bar would fill a log
        transformers_logging.disable_progress_bar()
    path = str(Path(name).expanduser()) if name.startswith("~") else name
    changed = {} if rope_scaling is None else {"config": scaled_config(name, *rope_scaling)}
    if name in MODELS:
        return testbed.load(device=chosen, dtype=given, name=name, **changed)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _reading(name):
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto" if given is None else given, **changed)
    model = model if given is not None else in_fast_precision(model, chosen)
    return model.to(chosen).eval(), tokenizer  # type: ignore[arg-type]


def in_fast_precision(model: Any, device: str) -> Any:
    """A float32 model as bfloat16 on a GPU, where attention in float32 has no fast kernel: twenty times as slow, and
    seldom what was meant."""
    import torch

    return model.bfloat16() if device.startswith("cuda") and model.dtype == torch.float32 else model


def count_parameters(name: str) -> int | None:
    """Of a model, from its config alone: weights are neither read nor made. None where that cannot be told, as of a
    model whose class wants more than its config."""
    import torch
    from transformers import AutoModelForCausalLM

    config = _read_config(name)
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    except Exception:  # whatever a model's own code raises: it may load all the same, and loading says what is wrong
        return None


def load_config(name: str) -> Any:
    """The config of a model, of the decoder where it has several."""
    return _read_config(name).get_text_config()


def scaled_config(name: str, kind: str, factor: float) -> Any:
    """The config of a model whose rotary embedding is stretched, for ``factor`` times as many positions.

    Raises:
        ValueError: its rotary embedding is scaled already, differs from layer to layer, or has no known length.
    """
    config = _read_config(name)
    text = config.get_text_config()
    rope, length = getattr(text, "rope_parameters", None), getattr(text, "max_position_embeddings", None)
    if not isinstance(rope, dict) or "rope_theta" not in rope or not length:
        raise ValueError(
            f"--rope-scaling needs a model with one rotary embedding for all layers and a known length, and {name} has "
            f"rope_parameters {rope!r}; change its config.json as its authors say"
        )
    if (present := rope.get("rope_type", "default")) != "default":
        raise ValueError(f"--rope-scaling: the rotary embedding of {name} is scaled already ({present})")
    text.rope_parameters = {**rope, "rope_type": kind, "factor": factor, "original_max_position_embeddings": length}
    if kind != "dynamic":  # which begins to stretch beyond the length that it finds there
        text.max_position_embeddings = int(length * factor)
    return config


def _read_config(name: str) -> Any:
    from transformers import AutoConfig

    folder = str(testbed.model_path(name)) if check_model(name) in MODELS else name
    with _reading(name):
        return AutoConfig.from_pretrained(str(Path(folder).expanduser()))


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Files of a model that are damaged make their readers stumble in any way: say which model it is."""
    try:
        yield
    except OSError:
        raise  # missing files and models, in sentences
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"cannot read the model {name}: {type(error).__name__}: {one_line(error)}") from error
