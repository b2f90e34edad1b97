"""The demo's whole path, on a tiny model."""

import json

import pytest
import torch

import seerattention as seer
from seerattention.cli.demo_job import _affordable_steps, _policy
from seerattention.cli.demo_plan import STORED, DemoPlan
from seerattention.gates.sources import stored_budgets
from seerattention.measure.kept import RECALLS, SHOWN

from ..evaluate.tiny import make_model


def test_demo_does_the_main_job(seer_command, tiny_testbed, tmp_path):
    result = seer_command("demo", "--fast", "--device", "cpu", "--output", tmp_path / "report", "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    plan = DemoPlan.choose("cpu", fast=True)
    committed = ["committed gates, default", "committed gates, 0.2"]
    names = ["dense", *committed, "fresh gates, default", "fresh gates, 0.2", "untrained gates, 0.2"]
    for part in ("timing", "retrieval", "perplexity"):
        assert [item["setting"] for item in data[part]] == names
    densities = [item["density"] for item in data["retrieval"]]
    assert densities[0] == 1.0
    assert densities[2] == densities[4] == densities[5] < densities[1] < 1  # the tiny model's gates store TopK(0.5)
    compared = data["comparison"]
    methods = ["xattention", "flashprefill_v2", "sub_block:query_parts=8:key_parts=8", "oracle"]
    compared_names = ["dense", *(f"{name}, top_k rule 0.2" for name in ("committed gates", *methods))]
    compared_names.append("streaming, own rule 0.2")
    for part in ("retrieval", "perplexity"):
        assert [item["setting"] for item in compared[part]] == compared_names
        found = [item["density"] for item in compared[part]]
        assert found[0] == 1.0
        assert len({round(density, 9) for density in found[1:-1]}) == 1  # one rule, one density
        assert abs(found[-1] / found[1] - 1) < 0.2
    distillation = data["distillation"]
    assert 2 <= distillation["steps"] <= plan.max_steps
    assert len(distillation["loss"]) == distillation["steps"]
    assert distillation["tokens"] == distillation["steps"] * plan.train_length
    for kind in ("before", "after", "committed", "oracle"):
        assert all(0 < recall < 1 for recall in distillation[f"recall_{kind}"])
    assert distillation["recall_before"] != distillation["recall_after"]
    assert {name: len(values) for name, values in distillation["numbers"].items()} == dict.fromkeys(RECALLS, 2)
    assert set(distillation[SHOWN]) == {"committed", "oracle"}
    # What was distilled is there to be used.
    model = make_model(seer.testbed.load()[0].config.vocab_size)
    seer.attach(model, tmp_path / "report" / "fresh-gates")
    page = (tmp_path / "report" / "index.html").read_text()
    for text in (
        *names, *compared_names, "Against training-free methods", "smoke test", "Block recall", RECALLS[SHOWN],
        "git commit",
    ):  # fmt: skip
        assert text in page
    assert json.loads((tmp_path / "report" / "results.json").read_text()) == data
    # Progress and tables went to stderr.
    assert "distilling fresh gates" in result.stderr
    assert "committed gates, default" in result.stderr


@pytest.mark.parametrize("seconds", [1e-3, 1e6])
def test_steps_follow_the_time_there_is(seconds):
    model = make_model(300)
    plan = DemoPlan(train_length=128, max_steps=50, seconds=seconds)
    batches = [{"input_ids": torch.randint(0, 300, (1, 128))}] * 2
    assert _affordable_steps(model, batches, plan) == (2 if seconds < 1 else 50)
    assert not seer.hf.is_attached(model)


def test_plans_fit_their_device():
    assert DemoPlan.choose("cpu").length == 8192
    assert DemoPlan.choose("cuda:1").length == 16384
    for plan in (DemoPlan.choose("cpu"), DemoPlan.choose("cuda"), DemoPlan.choose("cpu", fast=True)):
        assert plan.committed[plan.headline] == plan.fresh[plan.headline] == STORED
        assert set(plan.untrained) <= set(plan.fresh), "what distillation gave shows at one density"
        assert plan.train_length <= plan.length


def test_densities_are_spent_by_budgets_where_gates_have_them():
    budgets = stored_budgets(seer.testbed.gates_path())
    assert _policy(0.1, budgets) == budgets.policy(0.1)
    assert _policy(0.1, None) == seer.TopK(0.1)
    assert _policy(seer.TopP(0.9), budgets) == seer.TopP(0.9)
    assert _policy(STORED, budgets) is None
    for plan in (DemoPlan.choose("cpu"), DemoPlan.choose("cuda"), DemoPlan.choose("cpu", fast=True)):
        for rule in plan.committed:
            _policy(rule, budgets)  # a density that was not fitted raises
