"""Prompts in, one way: what a batch must look like, and how it runs through whatever model was given.

Distillation, calibration, block recall and evaluation all read whole prompts. :func:`check_batch` is the one place that
says what such a prompt may consist of, :func:`run_prompt` the one place that runs it: through the outermost module, so
that adapters, prompt tuning, compilation and image towers have their say.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .architectures import find_decoder
from .state import state_of

__all__ = [
    "check_batch",
    "evaluating",
    "input_device",
    "last_hidden_states",
    "module_device",
    "place_gates",
    "prompt_options",
    "run_prompt",
]

_PER_TOKEN = ("input_ids", "attention_mask", "position_ids")
_INTEGERS = (torch.int64, torch.int32)
_MASKS = (torch.bool, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# Labels change no attention, so a batch of a training set may carry them; they are never passed on.
_LEFT_OUT = ("labels",)
# How a prompt is run is not the batch's to say.
_DECIDED_HERE = (
    "cache_position",
    "inputs_embeds",
    "logits_to_keep",
    "num_logits_to_keep",
    "output_attentions",
    "output_hidden_states",
    "past_key_values",
    "return_dict",
    "use_cache",
)


def check_batch(batch: Mapping[str, Any], model: nn.Module | None = None) -> dict[str, Any]:
    """The arguments of a model's forward that a batch holds, or an error that says what is wrong with it.

    Args:
        batch: ``"input_ids"`` int64 or int32 ``[B, T]``; optionally ``"attention_mask"``, bool or integers 0 and 1
            ``[B, T]``, and anything else that the model's forward takes by name (``position_ids``, ``pixel_values``).
            ``labels`` and values that are None are left out: no attention depends on them.
        model: whatever the batch is to run through; None: which keys it takes is not checked.

    Raises:
        TypeError: the batch is no mapping with ``input_ids``, or a value is no tensor of the right dtype.
        ValueError: a wrong shape, a mask that is none, a key that the model does not take, or one that decides how the
            prompt is run (``use_cache``, ``past_key_values``, ...).
    """
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        found = f"one with {sorted(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
        raise TypeError(f'a batch must be a mapping with "input_ids" [B, T], got {found}')
    given = {name: value for name, value in batch.items() if value is not None and name not in _LEFT_OUT}
    if "input_ids" not in given:
        raise TypeError('a batch must be a mapping with "input_ids" [B, T], got None under it')
    decided = sorted(set(given) & set(_DECIDED_HERE))
    if decided:
        raise ValueError(
            f"a batch must not hold {', '.join(decided)}: prompts are read whole, from input_ids and without a cache; "
            "leave it out"
        )
    for name, value in given.items():
        per_token = name in _PER_TOKEN
        if not isinstance(value, Tensor) and (per_token or hasattr(value, "__array__")):
            raise TypeError(
                f"{name} must be a torch tensor{' [B, T]' if per_token else ''}, got {type(value).__name__}; convert "
                "it with torch.as_tensor (data sets: dataset.with_format('torch'))"
            )
    _check_shapes(given)
    _check_dtypes(given)
    if model is not None:
        chain = _forwards(model)
        unknown = sorted(str(name) for name in given if name != "input_ids" and not _takes(chain, name))
        if unknown:
            raise ValueError(
                f"the forward of this {type(model).__name__} does not take {', '.join(unknown)}, which the batch "
                "holds; remove it from the batch"
            )
    return given


def run_prompt(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """Run a whole prompt through a model, whatever wraps it: in eval mode, no cache, no loss.

    Where the model can leave them out, only the last token's logits are computed: those of a whole prompt take more
    memory than anything else. Gradients are recorded or not as the caller has it; training mode is put back.

    Args:
        model: a Hugging Face model around a supported decoder: PEFT, compiled, offloaded, vision-language.
        batch: see :func:`check_batch`; tensors on any device.

    Returns:
        What the model returns.

    Raises:
        TypeError, ValueError: see :func:`check_batch`.
    """
    arguments = check_batch(batch, model)
    device = input_device(model)
    arguments = {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    with evaluating(model):
        return model(**arguments, **prompt_options(model))


def prompt_options(model: nn.Module) -> dict[str, Any]:
    """How a whole prompt is run: without a cache, and where the model can, with the last token's logits only."""
    options: dict[str, Any] = {"use_cache": False}
    if _takes(_forwards(model), "logits_to_keep"):
        options["logits_to_keep"] = 1
    return options


def last_hidden_states(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The decoder's last hidden states of a prompt that :func:`run_prompt` runs: what the LM head would be given.

    Returns:
        ``[B, T, hidden]``, on the decoder's last device; without the virtual tokens that prompt tuning puts in front.

    Raises:
        TypeError, ValueError: see :func:`check_batch`.
        RuntimeError: the model's forward did not run its decoder exactly once.
    """
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output.last_hidden_state)

    hook = find_decoder(model).register_forward_hook(keep)
    try:
        run_prompt(model, batch)
    finally:
        hook.remove()
    length = batch["input_ids"].shape[1]
    if len(seen) != 1 or seen[0].shape[1] < length:
        raise RuntimeError(
            f"the decoder of this {type(model).__name__} ran {len(seen)} times in one forward of a prompt of {length} "
            "tokens; the hidden states of a prompt need one run over all of it"
        )
    return seen[0][:, seen[0].shape[1] - length :]


def input_device(model: nn.Module) -> torch.device:
    """Where a model's inputs belong: where its input embeddings compute, also when they are offloaded (on meta)."""
    decoder = find_decoder(model)
    embeddings = getattr(decoder, "get_input_embeddings", lambda: None)()
    return (
        module_device(embeddings if isinstance(embeddings, nn.Module) else decoder)
        or module_device(model)
        or torch.device("cpu")
    )


def module_device(module: nn.Module) -> torch.device | None:
    """Where a module computes: where accelerate's hooks bring its tensors, else where they are; None: not known."""
    for part in module.modules():
        hook = part.__dict__.get("_hf_hook")
        for each in getattr(hook, "hooks", (hook,)):  # several hooks are kept as one with a list
            device = getattr(each, "execution_device", None)
            if device is not None:
                return torch.device(device) if not isinstance(device, int) else torch.device("cuda", device)
    return next((parameter.device for parameter in module.parameters() if not parameter.is_meta), None)


def place_gates(model: nn.Module) -> None:
    """Move the gates of an attached model to where their layers compute, offloaded layers (on meta) included."""
    for layer in state_of(model).layers:
        layer.place_gate(module_device(layer.attention))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards each module is in the mode in which it was, which need not be that of all."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check_shapes(given: Mapping[str, Any]) -> None:
    shape = tuple(given["input_ids"].shape)
    if len(shape) == 1:
        raise ValueError(f"input_ids must be [B, T], got {shape}; a single prompt is input_ids[None]")
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"input_ids must be [B, T] and not empty, got {shape}")
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if mask is not None and tuple(mask.shape) != shape:
        raise ValueError(f"attention_mask must be {shape} like input_ids, got {tuple(mask.shape)}")
    if positions is not None and tuple(positions.shape) not in (shape, (1, shape[1])):
        raise ValueError(
            f"position_ids must be {shape} like input_ids, or one row for all, got {tuple(positions.shape)}"
        )


def _check_dtypes(given: Mapping[str, Any]) -> None:
    for name in ("input_ids", "position_ids"):
        if name in given and given[name].dtype not in _INTEGERS:
            raise TypeError(f"{name} must be int64 or int32, got {given[name].dtype}; convert them with .long()")
    mask = given.get("attention_mask")
    if mask is None:
        return
    if mask.dtype not in _MASKS:
        raise TypeError(f"attention_mask must be bool or integers 0 and 1, got {mask.dtype}; convert it with .bool()")
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("attention_mask must be 1 at tokens and 0 at padding, got other numbers")
    if not bool(mask.any(-1).all()):
        raise ValueError("attention_mask has a row without any token; leave such rows out of the batch")


def _forwards(model: nn.Module) -> list[Mapping[str, inspect.Parameter]]:
    """The parameters of the forwards that a prompt goes through, from the outermost module to the decoder."""
    decoder = find_decoder(model)
    path = next(name for name, module in model.named_modules() if module is decoder)
    parts = path.split(".") if path else []
    modules = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1)]
    return [inspect.signature(module.forward).parameters for module in modules if _has_forward(module)]


def _has_forward(module: nn.Module) -> bool:
    """Containers on the way (module lists) have none."""
    return getattr(module.forward, "__func__", None) is not nn.Module.forward


def _takes(chain: list[Mapping[str, inspect.Parameter]], name: str) -> bool:
    """Whether a keyword reaches a forward that names it: each one outside of that passes on what it does not know."""
    for parameters in chain:
        if name in parameters:
            return True
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
            return False
    return False
