"""Digests: what a run was computed from, so that it is not continued with something else."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["batch_digest", "batches_digest", "text_digest", "weights_digest"]


def text_digest(before: str, text: str) -> str:
    """Digest of the texts so far, given that of those before this one ("" for none)."""
    digest = hashlib.sha256(before.encode())
    digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def batch_digest(before: str, batch: Mapping[str, Any]) -> str:
    """Digest of the batches so far, given that of those before this one ("" for none).

    Names, dtypes, shapes and values of all tensors count; other values by their repr.
    """
    digest = hashlib.sha256(before.encode())
    for name in sorted(batch):
        digest.update(f"{name}:".encode())
        _add(digest, batch[name])
    return digest.hexdigest()


def batches_digest(batches: Iterable[Mapping[str, Any]]) -> str:
    """:func:`batch_digest` of all of them, in order."""
    found = ""
    for batch in batches:
        found = batch_digest(found, batch)
    return found


def weights_digest(model: nn.Module) -> str:
    """Digest of every weight of a model, to the last bit: SHA-256 of each tensor, on several threads.

    Parameters and persistent buffers count, adapters too, under their names (without those of compiled wrappers).
    Offloaded weights are read from where accelerate keeps them; those that cannot be found count by their shape only.
    It costs one pass over the weights: about a second for 1.5 GB on each of up to 8 threads.
    """
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        parts = list(pool.map(_one_weight, _weights(model)))
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _one_weight(named: tuple[str, Any]) -> str:
    digest = hashlib.sha256(f"{named[0]}:".encode())
    _add(digest, named[1])
    return digest.hexdigest()


def _weights(model: nn.Module) -> Iterator[tuple[str, Any]]:
    seen: set[int] = set()
    for path, module in model.named_modules():
        kept = module._non_persistent_buffers_set
        tensors = [*module._parameters.items(), *((k, v) for k, v in module._buffers.items() if k not in kept)]
        stored = getattr(module.__dict__.get("_hf_hook"), "weights_map", None)
        for name, tensor in tensors:
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if tensor.is_meta and stored is not None:
                tensor = stored[name]
            yield f"{path}.{name}".replace("_orig_mod.", ""), tensor


def _add(digest: Any, value: Any) -> None:
    if not isinstance(value, Tensor):
        digest.update(repr(value).encode())
        return
    digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
    if value.is_meta:
        return
    try:
        flat = value.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    except (RuntimeError, NotImplementedError, TypeError):  # quantized tensors that are no plain memory
        digest.update(repr(value.detach().cpu()).encode())
        return
    digest.update(flat.numpy().data)
