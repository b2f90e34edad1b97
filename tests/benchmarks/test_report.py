"""``benchmarks.report``: numbers beside their targets, and nothing that was not measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks.report import main
from benchmarks.results import ROOT, device_folder, latest_results, merge_runs
from benchmarks.targets import TARGETS

from seerattention.evaluate.environment import environment

SHAPE = {"heads": 32, "kv_heads": 8, "head_dim": 128, "block_size": 64, "dtype": "bfloat16"}


def attention_result(keys, rate, density=0.1):
    case = {
        "op": "block_sparse_attention",
        **SHAPE,
        "queries": keys,
        "keys": keys,
        "density": density,
        "lists": "random",
    }
    ours = {"median_s": 1e-3, "tflops": rate, "density": density}
    dense = {"median_s": 1e-2, "tflops": 500.0, "density": 1.0}
    return {
        "case": case,
        "implementations": {"ours: automatic": ours, "dense: cuDNN": dense},
        "metrics": {"tflops": rate, "speedup_over_cudnn": 10.0, "speedup_over_dense": 10.0, "dense_kernel": "cuDNN"},
    }


def make_run(started, results, name="NVIDIA H200"):
    facts = {**environment(), "devices": [{"name": name, "memory_gib": 139.8, "capability": "9.0"}], "driver": "580.1"}
    device = device_folder(torch.device("cuda"), facts)
    run = {"started": started, "device": device, "command": "python -m benchmarks.run", "variables": {}}
    return {**run, "environment": facts, "results": results}


def report(root, tmp_path, *arguments):
    document = tmp_path / "docs" / "performance.md"
    assert main(["--results", str(root), "--document", str(document), *arguments]) == 0
    return document.read_text()


def row(text, begins):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {begins} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_what_was_not_measured_says_so(tmp_path):
    (tmp_path / "results").mkdir()
    text = report(tmp_path / "results", tmp_path)
    assert text.count("not measured yet") == len(TARGETS)
    assert text.count("Not measured yet") == 1  # the CPU
    assert "met" not in [cell for line in text.splitlines() for cell in line.replace(" ", "").split("|")]
    assert not (tmp_path / "docs" / "performance").exists()


def test_numbers_stand_beside_their_targets(tmp_path):
    root = tmp_path / "results"
    path = root / "h200" / "block_sparse_attention.json"
    merge_runs(path, "block_sparse_attention", [make_run("1", [attention_result(8192, 400.0)])])
    later = [attention_result(8192, 480.0), attention_result(32768, 500.0)]
    merge_runs(path, "block_sparse_attention", [make_run("2", later)])
    (root / "h200" / "notes.md").write_text("32K is missed for want of registers.\n")
    text = report(root, tmp_path)
    assert row(text, "forward, density 0.1, 8K")[1:] == ["at least 470 TFLOP/s", "480 TFLOP/s", "met"]
    assert row(text, "forward, density 0.1, 32K")[1:] == ["at least 560 TFLOP/s", "500 TFLOP/s", "**missed**"]
    assert row(text, "forward, density 0.1, 128K")[2] == "not measured yet"
    assert "NVIDIA H200" in text
    assert "driver 580.1" in text
    assert "32K is missed for want of registers." in text
    assert "(performance/h200-attention.png)" in text
    assert (tmp_path / "docs" / "performance" / "h200-attention.png").stat().st_size < 100_000


def test_results_of_another_machine_are_added_to_its_folder(tmp_path):
    brought, root = tmp_path / "brought", tmp_path / "results"
    root.mkdir()
    run = make_run("1", [attention_result(8192, 480.0)], "NVIDIA H100 80GB HBM3")
    merge_runs(brought / "block_sparse_attention.json", "block_sparse_attention", [run])
    (brought / "other.json").write_text("{}")
    for _ in range(2):  # adding twice changes nothing
        text = report(root, tmp_path, "--add", str(brought))
    (result,) = latest_results(root / "h100-80gb-hbm3", "block_sparse_attention")
    assert result["metrics"]["tflops"] == 480.0
    assert len(json.loads((root / "h100-80gb-hbm3" / "block_sparse_attention.json").read_text())["runs"]) == 1
    assert text.index("## H100-80GB-HBM3") < text.index(
        "## H200\n\nThe GPU that the targets were stated for: not measured"
    )


def test_whole_models_count_before_scaled_ones():
    target = next(target for target in TARGETS if target.key == "prefill")
    results = [
        {"case": {**target.where, "layers": layers}, "metrics": {"speedup": speedup}}
        for layers, speedup in ((8, 1.5), (32, 1.3), (4, 1.6))
    ]
    found = target.find(results)
    assert found["metrics"]["speedup"] == 1.3
    assert not target.met(1.3)
    assert target.met(1.4)
    assert target.wanted() == "at least 1.4x"


@pytest.mark.parametrize(
    ("name", "folder"),
    [("NVIDIA H200", "h200"), ("NVIDIA GeForce RTX 4090", "rtx-4090"), ("AMD Instinct MI300X", "mi300x")],
)
def test_device_folder(name, folder):
    assert device_folder(torch.device("cuda"), {"devices": [{"name": name}]}) == folder
    assert device_folder(torch.device("cpu"), {"devices": [{"name": name}]}) == "cpu"


def test_the_committed_document_is_made_from_the_committed_results(tmp_path):
    document = Path(__file__).parents[2] / "docs" / "performance.md"
    assert report(ROOT, tmp_path) == document.read_text()
