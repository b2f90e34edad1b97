"""Runs that die, and runs that go on."""

from __future__ import annotations

import pytest
import torch

from seerattention.distillation import DistillConfig, distill

from .tiny import attached_llama, gate_tensors, random_batches

CONFIG = DistillConfig(steps=6, warmup=2, rows=0.5, eval_every=2)
HELD_OUT = random_batches(1, length=130, seed=9)


def short_batches(count, seed=5):
    return random_batches(count, batch=1, length=130, seed=seed)


def assert_same_gates(one, other):
    for (name, tensor), (_, expected) in zip(gate_tensors(one).items(), gate_tensors(other).items(), strict=True):
        assert torch.equal(tensor, expected), name


class _Stop(Exception):
    pass


def stopped(path, batches, *, at=3, config=CONFIG, model=None, **options):
    """A run that dies after the save of step ``at - 1``, as a killed one does."""

    def stop(report):
        if report.step == at:
            raise _Stop

    with pytest.raises(_Stop):
        distill(model or attached_llama(), batches, config, on_step=stop, state_path=path, save_every=1, **options)


def resumed(path, batches, *, config=CONFIG, model=None, **options):
    model = model or attached_llama()
    return model, distill(model, batches, config, state_path=path, **options)


def texts(count=9):
    generator = torch.Generator().manual_seed(0)
    return [" ".join(map(str, torch.randint(0, 250, (180,), generator=generator).tolist())) for _ in range(count)]
