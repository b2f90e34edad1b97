"""``benchmarks.run`` on tiny inputs: what it writes, and that it never shows a speed of something wrong."""

from __future__ import annotations

import json

import benchmarks.candidates
import benchmarks.measure
import pytest
import torch
from benchmarks.candidates import _flex
from benchmarks.lists import make_lists
from benchmarks.registry import OPS, SHAPES, make_cases
from benchmarks.run import main
from benchmarks.targets import TARGETS

from seerattention.evaluate.kernels import AttentionShape, check_attention, make_inputs, random_lists
from seerattention.ops.indices import BlockIndices

CPU = torch.device("cpu")
# cpu_flex would have to be compiled.
TINY = ["--device", "cpu", "--tiny", "--lengths", "256", "--densities", "0.5", "--without", "cpu_flex"]


def run(tmp_path, *arguments):
    status = main([*TINY, "--output", str(tmp_path), *arguments])
    return status, {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}


def test_every_op_is_checked_timed_and_written(tmp_path):
    status, files = run(tmp_path, "--op", "all")
    assert status == 0
    assert set(files) == set(OPS)
    for name, data in files.items():
        (one,) = data["runs"]
        assert data["benchmark"] == name
        assert set(one) == {"started", "device", "command", "variables", "environment", "results"}
        assert one["command"].startswith("python -m benchmarks.run --device cpu --tiny")
        assert set(one["environment"]) >= {"versions", "devices", "driver", "git_commit"}
        (result,) = one["results"]
        assert result["case"]["op"] == name
        assert result["wrong"] == []
        assert result["refused"] == {}
        assert result["metrics"]
        for numbers in result["implementations"].values():
            assert numbers["p25_s"] <= numbers["median_s"] <= numbers["p75_s"]
            assert numbers["repeats"] >= 5
            assert 0 <= numbers["error"] < 1e-4
    attention = files["block_sparse_attention"]["runs"][0]["results"][0]
    assert set(attention["implementations"]) == {
        "ours: automatic", "ours: cpu_gathered", "dense: sdpa", "dense: sdpa, K and V repeated",
        "dense: FlexAttention 128",
    }  # fmt: skip
    ours = attention["implementations"]["ours: automatic"]
    # Rows of 1, 2, 3 and 4 causal blocks keep 1, 1, 2 and 2 of them; 4 heads, 4 * 64 * 64 * 32 operations a tile.
    assert ours["density"] == pytest.approx(6 / 10)
    assert ours["tflops"] == pytest.approx(4 * 6 * 4 * 64 * 64 * 32 / ours["median_s"] / 1e12)
    chunk = files["chunk_attention"]["runs"][0]["results"][0]
    assert (chunk["case"]["queries"], chunk["case"]["keys"]) == (128, 256)
    assert "dense: two parts" in chunk["implementations"]
    gate = files["gate_path"]["runs"][0]["results"][0]["metrics"]
    assert set(gate) == {"share_TopK", "share_TokenBudget", "share_Threshold", "share_TopP"}
    target = files["pooled_attention"]["runs"][0]["results"][0]["metrics"]
    assert set(target) >= {"all_extra_time", "quarter_extra_time", "all_extra_time_alone", "lse_extra_time"}
    times = files["pooled_attention"]["runs"][0]["results"][0]["implementations"]
    forward, with_lse, ours = (
        times[key]["median_s"]
        for key in (f"dense: {target['dense_kernel']}", "with LSE: sdpa", "ours: automatic, all rows")
    )
    assert target["all_extra_time"] == pytest.approx((max(0, with_lse - forward) + ours) / forward)


def test_a_wrong_implementation_is_refused_and_shows_no_speed(tmp_path, monkeypatch, capsys):
    right = benchmarks.candidates.block_sparse_attention

    def one_tile_wrong(q, k, v, blocks, *, implementation, **options):
        out = right(q, k, v, blocks, implementation=implementation, **options)
        if implementation == "cpu_gathered":
            out[:, 2, 200:] *= 1.01
        return out

    monkeypatch.setattr(benchmarks.candidates, "block_sparse_attention", one_tile_wrong)
    status, files = run(tmp_path, "--op", "block_sparse_attention")
    assert status == 1
    (result,) = files["block_sparse_attention"]["runs"][0]["results"]
    assert result["wrong"] == ["ours: cpu_gathered"]
    assert "ours: cpu_gathered" not in result["implementations"]
    assert "ours: automatic" in result["implementations"]
    lines = [line for line in capsys.readouterr().out.splitlines() if "cpu_gathered" in line]
    assert len(lines) == 1
    assert "refused: ours: cpu_gathered: wrong results: relative error" in lines[0]


@pytest.mark.parametrize(
    ("op", "name"), [("pooled_attention", "pooled_attention"), ("gate_path", "make_gate")], ids=["target", "gate"]
)
def test_wrong_targets_and_gates_are_refused(tmp_path, monkeypatch, op, name):
    right, calls = getattr(benchmarks.measure, name), []

    def wrong(*args, **options):
        result = right(*args, **options)
        calls.append(options)
        if op == "gate_path" and len(calls) == 1:
            result.gate.k_linear.mul_(1.1)
        elif op == "pooled_attention" and options["implementation"] != "reference":
            result[:, :, -1] = result[:, :, -1].flip(-1)
        return result

    monkeypatch.setattr(benchmarks.measure, name, wrong)
    status, files = run(tmp_path, "--op", op)
    (result,) = files[op]["runs"][0]["results"]
    assert status == 1
    assert result["wrong"]
    assert not set(result["wrong"]) & set(result["implementations"])


def test_a_second_run_is_added(tmp_path):
    for _ in range(2):
        run(tmp_path, "--op", "chunk_attention")
    data = json.loads((tmp_path / "chunk_attention.json").read_text())
    assert len(data["runs"]) == 2


def test_spent_budget_leaves_cases_out(tmp_path, capsys):
    status, files = run(tmp_path, "--op", "chunk_attention", "--budget", "1e-9")
    assert (status, files) == (0, {})
    assert "left out: chunk_attention, 128 on 256 tokens" in capsys.readouterr().err


def test_cases():
    cases = make_cases("block_sparse_attention", lengths=[8192, 1024], densities=[0.1, 0.2], shapes=["8b", "head64"])
    assert [case.keys for case in cases] == [1024] * 4 + [8192] * 4
    assert all(case.queries == case.keys for case in cases)
    chunks = make_cases("chunk_attention")
    assert [chunk.queries for chunk in chunks] == [64, 256, 512, 1024, 2048]
    assert {(chunk.keys, chunk.density) for chunk in chunks} == {(131072, 0.1)}
    (chunk,) = make_cases("chunk_attention", queries=[100])
    assert chunk.queries == 100
    with pytest.raises(ValueError, match="unknown op"):
        make_cases("attention")
    with pytest.raises(ValueError, match="at least as many keys"):
        make_cases("chunk_attention", lengths=[1024])


def test_every_op_names_its_targets():
    named = {key for op in OPS.values() for key in op.targets}
    assert named == {target.key for target in TARGETS if target.benchmark in OPS}
    for target in TARGETS:
        if target.benchmark in OPS:
            assert target.key in OPS[target.benchmark].targets


@pytest.mark.parametrize("kind", ["random", "structured", "testbed"])
def test_lists(kind):
    shape = SHAPES["testbed"] if kind == "testbed" else SHAPES["tiny"]
    lists = make_lists(kind, shape, 512, 1024, 0.25, CPU)
    assert lists.counts.shape == (1, shape.heads, 8)
    assert lists.counts[0, 0].tolist() == [3, 3, 3, 3, 4, 4, 4, 4]
    mask = lists.to_mask()[0]
    assert mask[:, range(8), range(8, 16)].all()  # the diagonal
    assert not torch.equal(mask[0], mask[1])
    if kind == "testbed":
        with pytest.raises(ValueError, match="only of 64"):
            make_lists(kind, AttentionShape(8, 2, 64, 128), 1024, 1024, 0.25, CPU)


@pytest.mark.slow
@pytest.mark.parametrize(("block_size", "queries"), [(64, 512), (128, 128)])
def test_flex_attention_reads_the_lists(block_size, queries):
    shape = AttentionShape(4, 2, 32, block_size, torch.float32)
    q, k, v = make_inputs(shape, queries, 512, CPU)
    lists = random_lists(shape, queries, 512, 0.3, CPU)
    function = _flex(q, k, v, lists, True)
    with torch.inference_mode():
        assert check_attention(function, q, k, v, lists) < 1e-5


def test_flex_attention_refuses_queries_that_begin_inside_a_block():
    q, k, v = make_inputs(SHAPES["tiny"], 100, 256, CPU)
    lists = random_lists(SHAPES["tiny"], 100, 256, 1.0, CPU)
    assert isinstance(lists, BlockIndices)
    with pytest.raises(ValueError, match="28 tokens into a block"):
        _flex(q, k, v, lists, False)()
