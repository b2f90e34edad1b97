"""``benchmarks.e2e`` and ``benchmarks.distill`` on a tiny model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import benchmarks.distill
import benchmarks.e2e
import benchmarks.host
import pytest
import torch
from benchmarks.models import MODELS, build_model, num_layers, random_tokens, without_layers

import seerattention.hf.attention
from seerattention.evaluate.kernels import WrongResultError
from seerattention.evaluate.timing import prefill_seconds

from ..distill.test_processes import launch

TINY = ["--device", "cpu", "--tiny", "--lengths", "256", "--repeats", "1"]


@pytest.fixture(scope="module")
def model():
    return build_model("tiny", 2, torch.device("cpu"), torch.float32)


def results_of(tmp_path, name):
    (run,) = json.loads((tmp_path / f"{name}.json").read_text())["runs"]
    assert set(run["environment"]) >= {"versions", "devices", "driver", "git_commit"}
    return run["results"]


def test_e2e(tmp_path, capsys):
    assert benchmarks.e2e.main([*TINY, "--layers", "2", "--densities", "0.5", "--output", str(tmp_path)]) == 0
    sparse, shipped = results_of(tmp_path, "e2e")
    assert sparse["case"] == {
        "model": "tiny", "length": 256, "density": 0.5, "min_context": "0", "layers": 2, "dtype": "float32",
    }  # fmt: skip
    assert shipped["case"]["min_context"] == "default"
    assert (sparse["metrics"]["density"], shipped["metrics"]["density"]) == (pytest.approx(0.6), 1.0)
    assert sparse["whole_layers"] == 4
    fixed, timed = sparse["without_layers_s"], sparse["dense"]["median_seconds"]
    assert 0 < fixed < timed
    assert sparse["metrics"]["dense_s"] == pytest.approx(fixed + 2 * (timed - fixed))
    assert sparse["metrics"]["speedup"] == pytest.approx(1 / sparse["metrics"]["slowdown"])
    assert sparse["check"]["all_blocks"] < 1e-4 < sparse["check"]["density_0.1"]
    assert "as shipped" in capsys.readouterr().out


def test_e2e_of_other_forms(tmp_path, capsys):
    given = ["--layers", "1", "--densities", "0.5", "--form", "paper", "sub_block_shared", "--output", str(tmp_path)]
    assert benchmarks.e2e.main([*TINY, *given]) == 0
    results = results_of(tmp_path, "e2e")
    assert [result["case"].get("form") for result in results] == [None, "sub_block_shared"] * 2
    paper, other = (result["metrics"] for result in results[:2])
    assert "over_paper" not in paper
    assert other["over_paper"] == other["sparse_s"] / paper["sparse_s"]
    assert "sub_block_shared" in capsys.readouterr().out


def test_host(tmp_path, capsys):
    assert benchmarks.host.main([*TINY, "--layers", "2", "--densities", "0.5", "--output", str(tmp_path)]) == 0
    (result,) = results_of(tmp_path, "host")
    metrics = result["metrics"]
    assert metrics["speedup"] == metrics["dense_wall_s"] / metrics["sparse_wall_s"]
    assert metrics["extra_host_s_a_layer"] == (metrics["sparse_host_s"] - metrics["dense_host_s"]) / 2
    assert 0 < metrics["dense_host_s"] <= metrics["dense_wall_s"]
    assert "more host ms a layer" in capsys.readouterr().out
    fixed = result["without_layers_s"]
    dense, sparse = (fixed + 2 * max(0.0, metrics[f"{name}_wall_s"] - fixed) for name in ("dense", "sparse"))
    assert metrics["model_speedup"] == pytest.approx(dense / sparse)  # of four layers


def test_host_of_what_is_shipped(tmp_path, capsys):
    """Prompts below the default of ``min_context`` are dense; what is not profiled is left out."""
    options = ["--layers", "2", "--densities", "0.5", "--ways", "shipped", "--no-profile", "--output", str(tmp_path)]
    assert benchmarks.host.main([*TINY, *options]) == 0
    (result,) = results_of(tmp_path, "host")
    assert result["case"]["way"] == "shipped"
    assert (result["min_context"], result["is_sparse"]) == (2048, False)
    assert not {"dense_gpu_s", "extra_launches_a_layer"} & set(result["metrics"])
    assert "shipped" in capsys.readouterr().out


def test_host_of_a_step(tmp_path):
    options = ["--layers", "2", "--densities", "0.5", "--ways", "eager", "decode", "--output", str(tmp_path)]
    assert benchmarks.host.main([*TINY, *options]) == 0
    assert [result["case"].get("way") for result in results_of(tmp_path, "host")] == [None, "decode"]


def test_host_of_a_chunk(tmp_path):
    """The cache is as long in every repeat, and chunks are sparse."""
    options = ["--layers", "2", "--densities", "0.5", "--ways", "chunk", "--chunk", "128", "--output", str(tmp_path)]
    assert benchmarks.host.main([*TINY, *options]) == 0
    (result,) = results_of(tmp_path, "host")
    assert (result["case"]["way"], result["case"]["chunk"]) == ("chunk", 128)
    assert 0 < result["without_layers_s"] < result["metrics"]["dense_wall_s"]
    model, ids = benchmarks.models.build_model("tiny", 2, torch.device("cpu"), torch.float32), torch.arange(256)[None]
    with torch.inference_mode():
        step = benchmarks.host._chunk(model, ids, 128)
        first = step()
        torch.testing.assert_close(first, step(), rtol=0, atol=0)
        torch.testing.assert_close(first, model(ids, logits_to_keep=1).logits, rtol=1e-3, atol=1e-3)


def test_e2e_times_no_wrong_model(tmp_path, monkeypatch, capsys):
    right = seerattention.hf.attention.block_sparse_attention
    monkeypatch.setattr(
        seerattention.hf.attention, "block_sparse_attention", lambda *args, **options: 1.1 * right(*args, **options)
    )
    assert benchmarks.e2e.main([*TINY, "--output", str(tmp_path)]) == 1
    output = capsys.readouterr()
    assert "wrong results: TopK(1.0)" in output.err
    assert output.out == ""
    assert not list(tmp_path.iterdir())


def test_a_check_that_cannot_fail_is_no_check(model):
    with pytest.raises(WrongResultError, match="the check is blind"):
        benchmarks.e2e.check_model(model, random_tokens("tiny", 64), torch.float32)


@pytest.mark.parametrize(
    ("form", "target"), [("paper", "max"), ("sub_block", "max"), ("sub_block_shared", "max"), ("paper", "row_mass")]
)
def test_distill(tmp_path, form, target):
    options = ["--layers", "2", "--form", form, "--target", target, "--output", str(tmp_path)]
    assert benchmarks.distill.main([*TINY, *options]) == 0
    every, quarter = results_of(tmp_path, "distill")
    assert every["case"]["form"] == quarter["case"]["form"] == form
    assert every["case"].get("target", "max") == target
    assert (every["case"]["rows"], quarter["case"]["rows"]) == (1.0, 0.25)
    for result in (every, quarter):
        assert set(result["metrics"]) == {"tokens_per_s", "step_s", "layer_extra_s", "step_over_forward"}
        assert result["metrics"]["tokens_per_s"] == pytest.approx(256 / result["metrics"]["step_s"])
        assert result["loss_error"] < 1e-3
        assert result["measured_peak_bytes"] is None


def test_distill_with_two_processes(tmp_path):
    """Each has prompts of its own, and one writes. In the form of the recipes."""
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    options = [*TINY, "--layers", "2", "--rows", "0.25", "--batch-size", "2", "--output", str(tmp_path)]
    options += ["--form", "sub_block_shared"]
    said = launch("-m", "benchmarks.distill", *options, env={"PYTHONPATH": paths})
    (result,) = results_of(tmp_path, "distill")
    assert (result["case"]["gpus"], result["case"]["batch_size"]) == (2, 2)
    assert result["metrics"]["tokens_per_s"] == pytest.approx(4 * 256 / result["metrics"]["step_s"])
    assert said.count("losses agree with the reference") == 1
    assert said.count("hours for 0.5 B") == 1


def test_memory_limits_are_of_gpus(tmp_path):
    with pytest.raises(ValueError, match="--memory-limit is of a GPU's memory"):
        benchmarks.distill.main([*TINY, "--memory-limit", "22.5", "--output", str(tmp_path)])


def test_what_does_not_fit_is_said_and_left_out(tmp_path, monkeypatch, capsys):
    right = benchmarks.distill.measure

    def short_of_memory(name, model, asked, *others):
        if asked[1] == 1:
            raise torch.OutOfMemoryError("no more")
        return right(name, model, asked, *others)

    monkeypatch.setattr(benchmarks.distill, "measure", short_of_memory)
    assert benchmarks.distill.main([*TINY, "--layers", "2", "--output", str(tmp_path)]) == 0
    (quarter,) = results_of(tmp_path, "distill")
    assert quarter["case"]["rows"] == 0.25
    assert "tiny, 256 tokens, rows 1: does not fit" in capsys.readouterr().err


def test_distill_times_no_wrong_target(tmp_path, monkeypatch):
    right = benchmarks.distill.pooled_attention
    monkeypatch.setattr(
        benchmarks.distill, "pooled_attention", lambda *args, **options: right(*args, **options).flip(-1)
    )
    assert benchmarks.distill.main([*TINY, "--output", str(tmp_path)]) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [name for name in MODELS if name != "tiny"])
def test_published_shapes(name):
    """Parameters in all, built where they take no memory: within a per cent of the published counts."""
    built = build_model(name, 1, torch.device("meta"), torch.bfloat16)
    layer = sum(p.numel() for p in built.get_decoder().layers[0].parameters())
    total = sum(p.numel() for p in built.parameters()) + (num_layers(name) - 1) * layer
    published = {"llama-3.1-8b": 8.03e9, "qwen3-4b": 4.02e9, "smollm2-135m": 134.5e6}
    published |= {"qwen2.5-0.5b": 494e6, "qwen2.5-1.5b": 1.54e9}
    assert total == pytest.approx(published[name], rel=0.01)
    assert built.dtype == torch.bfloat16


def test_without_layers(model):
    ids = random_tokens("tiny", 128)
    with torch.inference_mode():
        whole = model(ids).logits
        with without_layers(model):
            bare = model(ids).logits
            assert prefill_seconds(model, ids) > 0
        expected = model.lm_head(model.model.norm(model.model.embed_tokens(ids)))
        assert torch.equal(bare, expected)
        assert torch.equal(model(ids).logits, whole)
