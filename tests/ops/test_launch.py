"""Bound launches are those of the JIT: the same variant of a kernel, on the same grid, with the same arguments."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "unlaunched.py"


@pytest.mark.slow
@pytest.mark.parametrize("level", ["launcher", "c"])
def test_bound_and_replayed_launches_are_those_of_the_jit(level):
    pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, SCRIPT, level], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "same"
