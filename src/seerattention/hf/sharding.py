"""Gates of models whose heads are spread over processes (transformers' ``tp_plan``).

Every process has all gates, whole, so that loading and saving are what they are elsewhere; a layer computes with the
part of its gate that belongs to the heads that it sees. Heads are spread in order: the first ones are those of the
first process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..gates import BlockGate


def head_rank(model: nn.Module) -> int | None:
    """Which part of the heads this process has; None: ``model`` is not spread over processes."""
    for module in model.modules():
        mesh: Any = module.__dict__.get("_device_mesh")
        if mesh is not None:
            names = getattr(mesh, "mesh_dim_names", None) or ()
            return (mesh["tp"] if "tp" in names else mesh).get_local_rank()
    return None


def part_of_gate(gate: BlockGate, heads: int, rank: int | None) -> BlockGate:
    """The gate of ``heads`` query heads: the ``rank``-th part; its parameters are views of those of ``gate``.

    Raises:
        RuntimeError: there is no such part.
    """
    parts = gate.num_heads // heads
    if rank is None or rank >= parts or gate.num_heads % heads or gate.num_kv_heads % parts:
        raise RuntimeError(
            f"a layer sees {heads} query heads and its gate is made for {gate.num_heads} (and {gate.num_kv_heads} of "
            "keys); heads are spread over processes by transformers only (tp_plan), whole groups to each"
        )
    with torch.device("meta"):
        part = type(gate)(
            gate.config,  # type: ignore[arg-type]
            block_size=gate.block_size,
            num_heads=heads,
            num_kv_heads=gate.num_kv_heads // parts,
            head_dim=gate.head_dim,
        )
    for (name, whole), mine in zip(gate.named_parameters(), list(part.parameters()), strict=True):
        view = whole.detach()
        if mine.shape != whole.shape:  # a weight for each head
            view = view[rank * len(mine) : (rank + 1) * len(mine)]
        setattr(part, name, nn.Parameter(view, requires_grad=False))
    return part.train(gate.training)
