"""Fixtures of several test files of ops."""

from __future__ import annotations

import contextlib
import importlib

import pytest
import torch

import gluon_emulator
from seerattention.ops import dispatch


@pytest.fixture
def emulated_attention(monkeypatch):
    """implementation="hopper" of block-sparse attention runs on CPU tensors, in the emulator. Returns the launches."""
    pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")
    hopper = importlib.import_module("seerattention.ops.block_sparse_attention.hopper")
    launches = []

    class Kernel:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, num_warps, maxnreg, **constants):
                launches.append((num_warps, maxnreg, constants))
                gluon_emulator.run(self.kernel, grid, args, constants)

            return launch

    monkeypatch.setattr(
        hopper, "block_sparse_attention_hopper_kernel", Kernel(hopper.block_sparse_attention_hopper_kernel)
    )
    monkeypatch.setattr(dispatch, "hopper_unusable", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return launches
