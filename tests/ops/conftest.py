"""Fixtures of several test files of ops."""

from __future__ import annotations

import contextlib
import importlib

import pytest
import torch

import gluon_emulator
from seerattention.ops import dispatch


def emulate(monkeypatch, op, module="hopper", name=None):
    """implementation="hopper" of an op runs on CPU tensors, in the emulator. Returns the launches.

    name: of the kernel in the module; None: that of the op.
    """
    pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")
    hopper, name = importlib.import_module(f"seerattention.ops.{op}.{module}"), name or f"{op}_hopper_kernel"
    kernel, launches = getattr(hopper, name), []

    class Kernel:
        def __getitem__(self, grid):
            def launch(*args, num_warps, maxnreg=None, **constants):
                launches.append((num_warps, maxnreg, constants))
                gluon_emulator.run(kernel, grid, args, constants)

            return launch

    monkeypatch.setattr(hopper, name, Kernel())
    monkeypatch.setattr(dispatch, "hopper_unusable", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return launches


@pytest.fixture
def emulated_attention(monkeypatch):
    """Of block-sparse attention."""
    return emulate(monkeypatch, "block_sparse_attention")


@pytest.fixture
def emulated_pooled_attention(monkeypatch, nan_filled_empty):
    """Of pooled attention."""
    return emulate(monkeypatch, "pooled_attention")


@pytest.fixture
def emulated_gate_scores(monkeypatch, nan_filled_empty):
    """Of gate scores."""
    return emulate(monkeypatch, "gate_scores")


@pytest.fixture
def emulated_mass_scores(monkeypatch, nan_filled_empty):
    """Of gate scores by mass; on three multiprocessors, so that programs have several units, and not equally many."""
    monkeypatch.setattr(dispatch, "multiprocessors", lambda device: 3)
    return emulate(monkeypatch, "gate_scores", "hopper_mass", "mass_scores_hopper_kernel")
