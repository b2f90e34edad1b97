"""The interpreter of these tests gives the numbers of Triton's own, and its errors each time."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="for the interpreter")


@triton.jit
def half_of(x, y):
    return x // 2 - y


@triton.jit
def mixed_kernel(out, scale, many, size: tl.constexpr, other: tl.constexpr):
    """Integers that wrap around, floats of three widths, broadcasts, reductions, pointers and booleans."""
    rows, columns = tl.arange(0, size), tl.arange(0, other)
    grid = rows[:, None] * 3 - columns[None, :]
    wide = (grid.to(tl.int32) + many) * 2
    narrow = (grid.to(tl.float32) / 7).to(tl.bfloat16).to(tl.float32) + grid.to(tl.float16).to(tl.float32) * scale
    chosen = tl.where((grid & 1) == 1, narrow, half_of(grid, 5).to(tl.float32))
    chosen += tl.sum(narrow, 0)[None, :] + tl.max(chosen, 1, keep_dims=True) + (wide % 1000).to(tl.float32)
    halves = rows.to(tl.float16) / 2
    chosen += tl.maximum(halves[:, None], columns[None, :]) - tl.minimum(columns, 3)[None, :]
    chosen += tl.where(many > 0, 0.5, rows)[:, None] + tl.clamp(chosen, -2.0, halves[:, None].to(tl.float32))
    chosen += tl.where(chosen == float("nan"), 1.0, 2.0) + ((wide.to(tl.uint32) >> 3) // 5 % 7).to(tl.float32)
    tl.store(out + rows[:, None] * other + columns[None, :], chosen, mask=grid < 20)


@triton.jit
def wrong_kernel(out, size: tl.constexpr):
    tl.store(out, tl.sum(tl.full((size,), 1, tl.int32)))


def results() -> list[float]:
    out = torch.zeros(8, 16)
    mixed_kernel[(1,)](out, 0.25, 2**30, 8, 16)
    return out.flatten().tolist()


def test_numbers_are_those_of_triton():
    path = [os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    code = "import json, test_quick_interpreter as test; print(json.dumps(test.results()))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for _ in range(2):  # of what the second launch needs, much is known from the first
        assert str(results()) == done.stdout.strip()


def test_wrong_shapes_are_refused_each_time():
    for _ in range(2):
        with pytest.raises(Exception, match="power of 2"):
            wrong_kernel[(1,)](torch.zeros(1), 12)
    wrong_kernel[(1,)](torch.zeros(1), 16)
