"""``benchmarks.selection`` on tiny inputs: every method at the density, none timed whose lists are wrong."""

import json

import pytest
import torch
from benchmarks.registry import SHAPES
from benchmarks.selection import FORMS, OTHERS, main, measure

from seerattention.baselines import Streaming
from seerattention.evaluate.contenders import make_contenders
from seerattention.ops.indices import BlockIndices


def test_costs_are_measured_at_the_density(tmp_path, capsys):
    arguments = ["--device", "cpu", "--tiny", "--lengths", "2048", "--density", "0.3", "--output", str(tmp_path)]
    assert main(arguments) == 0
    (run,) = json.loads((tmp_path / "selection.json").read_text())["runs"]
    costs = {result["costs"]["selector"]: result["costs"] for result in run["results"]}
    labels = {contender.label for contender in make_contenders({}, OTHERS)} | set(FORMS)
    assert {name.partition(", own")[0].partition(", project")[0].partition(", top_k")[0] for name in costs} == {
        *labels, "attention, dense", "attention, sparse",
    }  # fmt: skip
    assert costs["attention, dense"]["density"] == 1
    for name, row in costs.items():
        assert row["median_s"] > 0
        assert row["implementation"] == "plain torch"
        if "attention" not in name.split(",")[0] and "streaming" not in name and "minference" not in name:
            assert row["density"] == pytest.approx(0.3, rel=0.15), name
    assert costs["flexprefill, own rule"]["decides"] == "whole prompt"
    assert costs["xattention, own rule"]["decides"] == "row by row"
    assert "time a layer" in capsys.readouterr().out


def test_wrong_lists_are_not_timed(monkeypatch):
    def without_diagonal(self, inputs):
        blocks = inputs.q.shape[2] // 64
        mask = torch.ones(1, 4, blocks, blocks, dtype=torch.bool).tril(-1)
        return BlockIndices.from_mask(mask, 64)

    monkeypatch.setattr(Streaming, "select", without_diagonal)
    results, wrong = measure(SHAPES["tiny"], 256, 0.5, torch.device("cpu"), 0.01, others="streaming")
    assert list(wrong) == ["streaming, own rule"]
    assert not any("streaming" in result["costs"]["selector"] for result in results)


def test_gates_alone():
    results, wrong = measure(SHAPES["tiny"], 256, 0.5, torch.device("cpu"), 0.01, others="none")
    assert not wrong
    assert [result["costs"]["selector"].split(", ")[0] for result in results] == ["gate"] * 2 * len(FORMS) + [
        "attention"
    ] * 2
