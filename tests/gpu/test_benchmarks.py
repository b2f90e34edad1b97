"""The clocks, dense kernels and benchmarks on a GPU, on small inputs: what only a GPU can get wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from seerattention.evaluate.bench import bench_attention
from seerattention.evaluate.kernels import AttentionShape, check_attention, dense_kernels, dense_lists, make_inputs
from seerattention.evaluate.timing import peak_memory, time_functions

sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are a folder of the repository

CUDA = torch.device("cuda")


def test_times_are_those_of_the_device():
    """A product of known size runs at a possible rate, twice the work takes about twice as long."""
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    times = time_functions({"once": lambda: a @ a, "twice": lambda: a @ a @ a}, CUDA, seconds=0.1)
    rate = 2 * 4096**3 / times["once"].median / 1e12
    assert 10 < rate < 5000
    assert 1.5 < times["twice"].median / times["once"].median < 2.5


def test_peak_memory():
    result = peak_memory(lambda: torch.zeros(1 << 20, device="cuda").add(1.0), CUDA)
    assert result == 8 << 20


@pytest.mark.parametrize("lengths", [(1024, 1024), (512, 2048)])
def test_dense_kernels(lengths):
    """At least one of them is there; each that is there is right."""
    shape = AttentionShape(8, 2, 64)
    q, k, v = make_inputs(shape, *lengths, CUDA)
    lists = dense_lists(shape, *lengths, CUDA)
    ran = 0
    for name, kernel in dense_kernels(q, k, v).items():
        try:
            kernel()
        except RuntimeError as missing:
            print(name, missing)
            continue
        check_attention(kernel, q, k, v, lists)
        ran += 1
    assert ran


def test_bench():
    """Other processes that use the GPU may take turns with one measurement, but hardly with three of them."""
    results = [bench_attention(AttentionShape(8, 2, 64), 4096, [0.1], CUDA, seconds=0.05)[0] for _ in range(3)]
    assert all(result.select_seconds > 0 and 0.1 <= result.selected < 0.15 for result in results)
    assert any(result.select_seconds < result.sparse_seconds for result in results)


@pytest.mark.parametrize(
    "op", ["block_sparse_attention", "chunk_attention", "pooled_attention", "pooled_attention_decode", "gate_path"]
)
def test_run(op, tmp_path):
    from benchmarks.registry import OPS
    from benchmarks.run import main

    arguments = ["--op", op, "--shape", "head64", "--lengths", "4096", "--densities", "0.1", "--seconds", "0.05"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / f"{op}.json").read_text())["runs"][0]["results"]
    assert len(results) == max(1, len(OPS[op].queries))
    for result in results:
        assert any(key.startswith("ours") for key in result["implementations"])
        assert result["metrics"]


@pytest.mark.parametrize("module", ["e2e", "distill"])
def test_whole_models(module, tmp_path):
    import importlib

    main = importlib.import_module(f"benchmarks.{module}").main
    assert main(["--tiny", "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / f"{module}.json").read_text())["runs"][0]["results"]
    assert results
    if module == "distill":
        assert all(result["metrics"]["fits_24gb"] for result in results)


def test_decoded_lists(tmp_path):
    """The embedded model copies lists densely; sparse decoding that keeps every block says nearly the same."""
    from benchmarks.decode_accuracy import main

    arguments = ["--length", "4096", "--count", "32", "--new", "16", "--policies", "TokenBudget(65536);TokenBudget(64)"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    (run,) = json.loads((tmp_path / "decode_accuracy.json").read_text())["runs"]
    dense, everything, own_block = (result["metrics"] for result in run["results"])
    assert dense["exact"] >= 0.9
    assert abs(everything["loss_points"]) <= 100 * 2 / 32  # kernels round differently, so a near tie may fall otherwise
    assert everything["density"] == pytest.approx(1)
    assert own_block["loss_points"] >= 50
    assert own_block["gate_bytes"] > dense["gate_bytes"] == 0
