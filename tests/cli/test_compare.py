"""``seer compare`` and ``seer report`` on a tiny model from disk."""

import json

import pytest

from seerattention import testbed
from seerattention.cli.compare import PRESETS, PRESETS_OF_MODEL, _chosen, _command
from seerattention.evaluate.contenders import make_contenders
from seerattention.gates.sources import store_budgets, stored_budgets
from seerattention.policies import Budget, Budgets
from seerattention.tasks import TEXT_TASKS


@pytest.fixture
def common(folder):
    return [
        "--model", folder / "model", "--gates", folder / "gates", "--data", folder / "text.txt", "--device", "cpu",
        "--lengths", "1K", "--tasks", "niah_single_2,copy", "--selectors", "streaming,oracle:policy=top_k(0.1)",
        "--samples", 2, "--documents", 1, "--repeats", 1, "--densities", "0.3",
    ]  # fmt: skip


def test_compare_then_report(seer_command, common, tmp_path):
    gates, curve = tmp_path / "gates", ((1.0, 64.0), (0.5, 0.5))
    store_budgets(common[3], gates, Budgets((Budget(0.2, *curve), Budget(0.4, *curve)), 0.2, 4096, 64))
    common = [*common, "--gates", gates]
    result = seer_command("compare", *common, "--output", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    names = [item["setting"] for item in data["settings"]]
    assert names == [
        "dense", "gates, budget rule 0.3", "gates, own rule 0.3", "gates, project rule 0.3", "oracle, own rule 0.3",
        "oracle, project rule 0.3", "streaming, own rule 0.3",
    ]  # fmt: skip
    assert data["settings"][1]["contender"]["selector"]["policy"]["kind"] == "budget"
    assert 0 < data["settings"][1]["tasks"]["density"] < 1
    for item in data["settings"][2:]:
        assert item["tasks"]["density"] < 0.4
        assert item["perplexity"]["density"] < 0.4
        assert item["prefill_seconds"] > 0
    assert data["parameters"] > 0
    assert data["environment"]["versions"]["torch"]
    assert "score - dense" in result.stderr
    again = seer_command("compare", *common, "--output", tmp_path / "out", "--json")
    assert json.loads(again.stdout)["settings"] == data["settings"]  # times too: nothing was measured again
    made = seer_command("report", tmp_path / "out")
    assert made.exit_code == 0, made.stderr
    page = (tmp_path / "out" / "index.html").read_text()
    assert all(name in page for name in names)
    assert any((tmp_path / "out" / "figures").glob("perplexity-density-*.png"))


def test_texts_alone(seer_command, common, tmp_path):
    """Without tasks, densities are reached on documents behind those that are measured."""
    options = ["--tasks", "none", "--documents", 2, "--densities", "0.3,0.45", "--rules", "project", "--gates", "none"]
    options += ["--selectors", "xattention", "--repeats", 0, "--output", tmp_path / "out", "--json"]
    result = seer_command("compare", *common, *options)
    assert result.exit_code == 0, result.stderr
    dense, *others = json.loads(result.stdout)["settings"]
    assert [item["setting"] for item in others] == ["xattention, project rule 0.3", "xattention, project rule 0.45"]
    for item, density in zip(others, (0.3, 0.45), strict=True):
        assert item["tasks"] is None
        assert item["contender"]["calibrated_density"] == pytest.approx(density, rel=0.1)
        assert len(item["perplexity"]["document_losses"]) == len(dense["perplexity"]["document_losses"]) == 2
    assert "/ gates, project rule" in result.stderr  # the table at equal density
    refused = seer_command("compare", *common, *options, "--documents", 0)
    assert "--tasks none leaves only documents" in refused.stderr


@pytest.mark.parametrize("argv", [["seer", "compare", "--preset", "full"], ["/x/compare.py", "--preset", "full"]])
def test_a_command_is_recorded_whole_however_it_was_started(argv):
    assert _command(argv) == ["seer", "compare", "--preset", "full"]


def test_presets_can_be_run():
    for name, preset in PRESETS.items():
        rules, protocols = preset["rules"].split(","), preset["protocols"].split(",")
        budgets = {"gates": stored_budgets(testbed.gates_path())}
        contenders = make_contenders({"gates": "folder"}, preset["selectors"], rules, protocols, budgets)
        assert "gates, budget rule" in {contender.family for contender in contenders}
        assert len({contender.family for contender in contenders}) == len(contenders), name
    assert len({c.label for c in make_contenders({"g": "f"}, PRESETS["quick"]["selectors"])}) == 6


def test_the_quick_preset_asks_a_model_what_it_can_answer():
    assert _chosen("quick", "testbed") == PRESETS["quick"]
    assert _chosen("full", "smollm2") == PRESETS["full"]
    assert _chosen("quick", "smollm2", tasks=None) == {**PRESETS["quick"], **PRESETS_OF_MODEL["quick", "smollm2"]}
    assert _chosen("quick", "smollm2", tasks="none", documents=8)["tasks"] == "none"
    for options in PRESETS_OF_MODEL.values():
        assert set(options["tasks"].split(",")) <= set(TEXT_TASKS)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--preset", "slow"], "--preset must be one of quick, full"),
        (["--tasks", "nothing"], "--tasks: unknown tasks"),
        (["--rules", "mine"], "choose from own, project"),
        (["--protocols", "mine"], "choose from every_row_sparse"),
        (["--selectors", "nothing"], "selector kind must be one of"),
        (["--densities", "1.5"], "a density must lie in"),
        (["--lengths", "1"], "--lengths"),
        (["--gates", "./nowhere"], "no folder of gates"),
        (["--gates", "none", "--selectors", "none"], "nothing to compare"),
        (["--rules", "budget"], "no budgets are stored with gates"),
        (["--lengths", "64"], "does not fit into 64 tokens"),
        (["--apply-chat-template"], "no chat template"),
    ],
)
def test_compare_refuses(seer_command, common, tmp_path, options, says):
    result = seer_command("compare", *common, "--output", tmp_path / "out", *options)
    assert result.exit_code == 1
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_report_refuses(seer_command, folder, tmp_path):
    refused = seer_command("report", tmp_path)
    assert refused.exit_code == 1
    assert "holds no results" in refused.stderr


def test_report_shows_what_it_is_given(seer_command, folder, tmp_path):
    from ..evaluate.comparison_folder import write_folder

    write_folder(tmp_path / "results")
    gates = tmp_path / "gates"
    gates.mkdir()
    arguments = ["report", tmp_path / "results", "--output", tmp_path / "page", "--gates", gates]
    refused = seer_command(*arguments)
    assert "no history.json" in refused.stderr
    history = {"loss": [1.0], "loss_per_layer": {"layers.0": [1.0]}, "recall": {}, "recall_steps": []}
    (gates / "history.json").write_text(json.dumps({"history": history}))
    costs = {"selector": "x", "length": 64, "median_s": 1, "density": 0.1, "implementation": "torch", "decides": "rows"}
    (tmp_path / "results" / "selection.json").write_text(
        json.dumps({"runs": [{"results": [{"case": {"length": 64}, "costs": costs}]}]})
    )
    made = seer_command(*arguments)
    assert made.exit_code == 0, made.stderr
    page = (tmp_path / "page" / "index.html").read_text()
    assert "Learning curves" in page
    assert "Costs of selection" in page
    assert not (tmp_path / "results" / "index.html").exists()
