"""When a layer must be dense whatever its gate says, in prompts and in decoding alike."""

from __future__ import annotations

import torch

from ..ops.dispatch import FLOATING_DTYPES
from .dense import Arguments
from .layer import LayerState

# Reasons that nobody is warned of, as they are what was asked for; ``record`` gives them.
ASKED_FOR = "seerattention.dense(model) was open"
BELOW_MIN_CONTEXT = "it has fewer tokens than min_context"
DENSE_POLICY = "the policy of the layer is Dense()"
NO_GATE = "the layer has no gate, or another part in this phase"
ONE_BLOCK = "there is no more than one block to read"

CAPTURED = (
    "a CUDA graph is captured, in which masks, positions and caches cannot be looked at: capture whole prompts without "
    "attention_mask and position_ids, with use_cache=True"
)

# Where nobody can tell what is asked for.
SHORT_CHUNK = (
    "it brings fewer tokens than a block to a cache, and a forward does not say whether these are a prompt or "
    "candidates of speculative decoding; generate() does"
)
UNKNOWN_PROMPT = (
    "it does not say which of its tokens are a prompt: a step of generate() without a cache whose first step was not "
    "seen, or a model that does not take logits_to_keep"
)


def warn_dense(layer: LayerState, reason: str) -> None:
    """Say once a model why a forward is dense that could be expected to be sparse."""
    layer.model.warn_once(reason, f"seerattention: this forward is attended densely, because {reason}")


def records_gradients(arguments: Arguments) -> bool:
    """Whether a backward pass may follow. Any of the three: adapters may train the values alone."""
    tensors = (arguments.query, arguments.key, arguments.value)
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def must_be_dense(arguments: Arguments, layer: LayerState, gradients: bool) -> str | None:
    """Why the kernels cannot stand for the attention that is asked for, or None."""
    if arguments.module.training or layer.decoder_layer.training:
        return (
            "the model is in training mode, where forwards with gradients and without must agree, and dropout needs "
            "dense attention (for inference, call model.eval())"
        )
    if gradients:
        return (
            "gradients are recorded and the sparse kernels have no backward pass (for inference, use torch.no_grad() "
            "or torch.inference_mode())"
        )
    if arguments.dropout > 0:
        return "attention dropout is on (call model.eval() for inference)"
    if arguments.wants_weights:
        return "output_attentions=True asks for the whole attention map"
    if arguments.query.dtype not in FLOATING_DTYPES:
        return f"the sparse kernels do not compute in {arguments.query.dtype} (convert it with model.float())"
    return None
