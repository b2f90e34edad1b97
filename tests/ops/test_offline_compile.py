"""Every kernel compiles for GPUs that are not here, and the compilers' logs show nothing that costs speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "offline_compile.py"
pytestmark = pytest.mark.slow  # one process compiles everything once: tests/conftest.py keeps this file together

# What one multiprocessor of a Hopper GPU has, and what the Hopper kernel is planned for: programs by padded head_dim.
REGISTERS, SHARED_MEMORY = 65536, 228 * 1024
PROGRAMS = {64: 5, 128: 4}
# Bytes of spilled registers that are there today; fewer are welcome.
KNOWN_SPILLS = {
    ("block_sparse_attention", "sm_80", "128 64 torch.bfloat16 lse=True"): 12,  # with triton 3.7; none with 3.6
    ("block_sparse_attention", "sm_90", "64 64 torch.float32 lse=True"): 256,
    # One register, before the loops and after them.
    ("pooled_attention_decode", "sm_90", "row_sum 128 1 128 torch.bfloat16 lse=True"): 8,
    ("hopper_span", "sm_90", "64 pages in parts"): 8,  # before the loop and after it
    # Eight warps with all registers of a thread; pages look up each tile. A100 runs them from memory of its own.
    ("block_sparse_attention", "sm_80", "128 64 padded"): 64,
    ("block_sparse_attention", "sm_80", "128 64 packed"): 64,
    ("block_sparse_attention", "sm_80", "128 64 pages"): 928,
    ("block_pooling", "sm_90", "chunk 64"): 32,
    ("token_scores", "sm_90", "multiply 8 7 96 1 torch.float16"): 8,  # two registers, before the loop
    ("gate_scores", "sm_90", "max 128 8x8, many columns"): 120,  # with triton 3.7; faster all the same, with 3.6
    # Two programs with all registers of a thread each; faster than one that spills less.
    ("mass_scores_hopper", "sm_90", "128 4x4 torch.bfloat16 masked=False"): 924,  # with triton 3.6; 788 with 3.7
    ("mass_scores_hopper", "sm_90", "64 4x4 torch.float16 masked=False"): 204,  # with triton 3.7; 168 with 3.6
    ("mass_scores_hopper", "sm_90", "128 8x8 torch.bfloat16 masked=True"): 180,  # with triton 3.6; 156 with 3.7
    # 16 warps hold a row, with 128 registers a thread.
    ("block_selection", "sm_90", "topp 32768 True"): 880,
}
# Bytes of shared memory that one program may use.
MAX_SHARED = {"sm_80": 166912, "sm_86": 101376, "sm_90": 232448, "gfx942": 65536}


@pytest.fixture(scope="module")
def report():
    pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    if "skip" in found:
        pytest.skip(found["skip"])
    return found["kernels"]


def check_programs(kernel, programs):
    """So many fit a multiprocessor, and products are not serialised."""
    assert not kernel["serialized"], kernel  # ptxas C7512: products wait for each other for want of registers
    # Registers are handed out 8 at a time; the hardware takes 1 KiB of shared memory for each program.
    assert -(-kernel["registers"] // 8) * 8 * 32 * kernel["num_warps"] * programs <= REGISTERS, kernel
    assert (kernel["shared"] + 1024) * programs <= SHARED_MEMORY, kernel


def test_hopper_kernel_fits_as_planned(report):
    kernels = [kernel for kernel in report if kernel["op"] in ("hopper", "hopper_span")]
    assert len(kernels) == 14 + 12
    for kernel in kernels:
        padded_dim = 64 if kernel["variant"].startswith("64 ") else 128
        programs = PROGRAMS[padded_dim]
        assert kernel["spills"] <= KNOWN_SPILLS.get((kernel["op"], "sm_90", kernel["variant"]), 0), kernel
        check_programs(kernel, programs)
        # q k^T and p v in steps of 16, on the diagonal and in the loop; q, and k and v of the diagonal, those after it
        # (where it is on the list and where not), and in the loop.
        assert kernel["wgmma"] == 2 * (padded_dim // 16 + 64 // 16), kernel
        assert kernel["tma"] == 9, kernel


def test_hopper_kernel_of_the_target_fits_as_planned(report):
    kernels = [kernel for kernel in report if kernel["op"] == "pooled_attention_hopper"]
    assert len(kernels) == 5
    for kernel in kernels:
        assert not kernel["spills"], kernel
        check_programs(kernel, 2)
        # Four products with one tile of keys, in the loop and on the diagonal; four tiles of q, keys before and in it.
        assert kernel["wgmma"] == 2 * 4 * (4 if kernel["variant"].startswith("64 ") else 8), kernel
        assert kernel["tma"] == 8, kernel


def test_hopper_kernel_of_gate_scores_fits_as_planned(report):
    kernels = [kernel for kernel in report if kernel["op"] == "gate_scores_hopper"]
    assert len(kernels) == 3
    for kernel in kernels:
        assert not kernel["spills"], kernel
        check_programs(kernel, 2)
        # Four places of keys with two of queries before the diagonal, one on it; both in a loop and behind it.
        steps = 4 if kernel["variant"].startswith("64 ") else 8
        assert kernel["wgmma"] == 2 * 4 * (2 + 1) * steps, kernel
        # The first two places of queries and four of keys, and one when the first is in registers; then one behind
        # each place of queries, and four of keys.
        assert kernel["tma"] == 2 + 4 + 1 + 2 * (2 + 1) + 2 * 4, kernel


def test_hopper_kernel_of_scores_by_mass_fits_as_planned(report):
    kernels = [kernel for kernel in report if kernel["op"] == "mass_scores_hopper"]
    assert len(kernels) == 3
    for kernel in kernels:
        check_programs(kernel, 2)
        # For each of two heads a product with each pair of places, four in a loop on the diagonal and all before it,
        # and one in the search for maxima.
        pairs = 4 if " 8x8 " in kernel["variant"] else 8
        steps = 4 if kernel["variant"].startswith("64 ") else 8
        assert kernel["wgmma"] == 2 * (4 + pairs + 1) * steps, kernel
        # Queries of two heads, of the first unit and of the next one; four pairs of keys, twice, and one in the search;
        # a pair behind each one that has passed.
        assert kernel["tma"] == 2 * 2 + 2 * 4 + 1 + 4 + pairs, kernel


def test_all_kernels_compile(report):
    targets = {(kernel["op"], kernel["target"]) for kernel in report}
    ops = {
        "block_sparse_attention",
        "merge_parts",
        "pooled_attention",
        "pooled_attention_decode",
        "block_pooling",
        "block_selection",
        "block_sparse_decode",
        "encode_blocks",
        "gate_scores",
        "inverse_rope",
        "mass_scores",
        "pool_encode",
        "token_scores",
    }
    assert targets == {(op, target) for op in ops for target in ("sm_80", "sm_90", "gfx942")} | {
        ("hopper", "sm_90"),
        ("hopper_span", "sm_90"),
        ("gate_scores_hopper", "sm_90"),
        ("mass_scores_hopper", "sm_90"),
        ("row_scores", "sm_90"),
        ("mass_row_scores", "sm_90"),
        ("pooled_attention_hopper", "sm_90"),
        ("pooled_attention_wide", "sm_86"),
        ("pooled_attention_wide", "gfx942"),
    }
    for kernel in report:
        assert kernel["bytes"] > 1000, kernel
        assert kernel["shared"] <= MAX_SHARED[kernel["target"]], kernel
        assert not kernel.get("serialized"), kernel
        known = KNOWN_SPILLS.get((kernel["op"], kernel["target"], kernel["variant"]), 0)
        assert kernel["spills"] <= known, kernel
