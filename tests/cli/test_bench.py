"""``seer bench`` on small prompts, for real."""

import json

import pytest
import torch
from transformers import AutoConfig

from seerattention.evaluate import bench
from seerattention.evaluate.bench import BenchResult, pays_from
from seerattention.hf.min_context import Shape, default_min_context

SMALL = ["--device", "cpu", "--heads", "4", "--kv-heads", "2", "--head-dim", "32", "--seconds", "0.01"]


def test_bench_measures_every_length_and_density(seer_command):
    for _ in range(3):  # times of a millisecond: another process may stop one of them
        result = seer_command("bench", *SMALL, "--lengths", "512,256", "--densities", "0.25,1", "--json")
        assert result.exit_code == 0, result.stderr
        data = json.loads(result.stdout)
        if all(item["select_seconds"] < item["sparse_seconds"] for item in data["results"]):
            break
    assert [(item["length"], item["density"]) for item in data["results"]] == [
        (256, 1.0), (256, 0.25), (512, 1.0), (512, 0.25),
    ]  # fmt: skip
    assert data["shape"] == {"heads": 4, "kv_heads": 2, "head_dim": 32, "block_size": 64, "dtype": "float32"}
    for item in data["results"]:
        assert 0 < item["select_seconds"] < item["sparse_seconds"]
        assert item["speedup"] == pytest.approx(item["dense_seconds"] / item["sparse_seconds"])
        assert item["dense_kernel"].startswith("sdpa")
        assert (item["selected"] == 1) == (item["density"] == 1)
    assert set(data["min_context"]) == {"1", "0.25"}
    assert "sparse" in result.stderr  # the table and the advice


def test_bench_says_from_where_on_sparse_pays(seer_command, monkeypatch):
    speeds = {256: 0.5, 512: 1.5, 1024: 3.0}

    def measured(shape, length, densities, device, **options):
        return [
            BenchResult(length, density, density, "sdpa", speeds[length] * density * 1e-2, 1e-3, 1e-4)
            for density in densities
        ]

    monkeypatch.setattr(bench, "bench_attention", measured)
    result = seer_command("bench", *SMALL, "--lengths", "256,512,1K", "--densities", "0.1,0.02")
    assert result.exit_code == 0, result.stderr
    assert "density 0.1: sparse pays from 512 tokens on" in result.stdout
    assert "prefill=seer.TopK(0.1), min_context=512" in result.stdout
    assert "density 0.02: sparse does not pay up to 1K tokens here" in result.stdout


def test_bench_takes_heads_from_a_model(seer_command, folder):
    result = seer_command(
        "bench", *SMALL, "--model", folder / "model", "--lengths", "256", "--densities", "1", "--json"
    )
    assert result.exit_code == 0, result.stderr
    config = json.loads((folder / "model" / "config.json").read_text())
    shape = json.loads(result.stdout)["shape"]
    assert shape["heads"] == config["num_attention_heads"]
    assert shape["head_dim"] == config["head_dim"]


def test_bench_saves_what_it_measured(seer_command, folder, monkeypatch, tmp_path):
    """And says where; the model's shape then has another default on this machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = ("--model", folder / "model", "--lengths", "256,512", "--densities", "0.5", "--save", "--json")
    result = seer_command("bench", *SMALL, *options)
    assert result.exit_code == 0, result.stderr
    saved = json.loads(result.stdout)["saved"]
    assert set(saved["speedups"]) == {"256", "512"}
    assert saved["min_context"] in (256, 512, 1024)
    assert saved["path"] in "".join(result.stderr.split())
    shape = Shape.of(AutoConfig.from_pretrained(folder / "model"))
    assert default_min_context(shape, torch.device("cpu")) == saved["min_context"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--save"], "say which with --model"),
        (["--lengths", "100"], "at least two blocks, 128 tokens"),
        (["--densities", "0"], "must lie in (0, 1]"),
        (["--block-size", "48"], "one of 32, 64, 128"),
        (["--heads", "5"], "multiple of KV heads"),
        (["--head-dim", "512"], "at most 256"),
        (["--dtype", "int8"], "must be auto, bfloat16"),
    ],
)
def test_mistakes(seer_command, arguments, message):
    result = seer_command("bench", *SMALL, *arguments)
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())
    assert result.stdout == ""


def test_wrong_attention_gets_no_times(seer_command, monkeypatch):
    monkeypatch.setattr(bench, "block_sparse_attention", lambda q, k, v, blocks: torch.zeros_like(q))
    result = seer_command("bench", *SMALL, "--lengths", "256", "--densities", "0.5")
    assert result.exit_code == 1
    assert "wrong results: relative error" in result.stderr
    assert result.stdout == ""


def test_pays_from():
    def at(length, speed):
        return BenchResult(length, 0.1, 0.1, "sdpa", speed, 1.0, 0.1)

    assert pays_from([at(1, 2.0), at(2, 0.9), at(4, 1.1), at(8, 2.0)], 0.1) == 4
    assert pays_from([at(1, 2.0), at(2, 0.9)], 0.1) is None
    assert pays_from([at(1, 2.0)], 0.2) is None
