"""``seer compare`` and ``seer report`` on a tiny model from disk."""

import json

import pytest

from seerattention.cli.compare import PRESETS
from seerattention.evaluate.contenders import make_contenders


@pytest.fixture
def common(folder):
    return [
        "--model", folder / "model", "--gates", folder / "gates", "--data", folder / "text.txt", "--device", "cpu",
        "--lengths", "1K", "--tasks", "niah_single_2,copy", "--selectors", "streaming,oracle:policy=top_k(0.1)",
        "--samples", 2, "--documents", 1, "--repeats", 1, "--densities", "0.3",
    ]  # fmt: skip


def test_compare_then_report(seer_command, common, tmp_path):
    result = seer_command("compare", *common, "--output", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    names = [item["setting"] for item in data["settings"]]
    assert names == [
        "dense", "gates, own rule 0.3", "gates, project rule 0.3", "oracle, own rule 0.3", "oracle, project rule 0.3",
        "streaming, own rule 0.3",
    ]  # fmt: skip
    for item in data["settings"][1:]:
        assert item["tasks"]["density"] < 0.4
        assert item["perplexity"]["density"] < 0.4
        assert item["prefill_seconds"] > 0
    assert data["parameters"] > 0
    assert data["environment"]["versions"]["torch"]
    assert "score - dense" in result.stderr
    again = seer_command("compare", *common, "--output", tmp_path / "out", "--json")
    assert json.loads(again.stdout)["settings"] == data["settings"]  # times too: nothing was measured again


def test_presets_can_be_run():
    for name, preset in PRESETS.items():
        rules, protocols = preset["rules"].split(","), preset["protocols"].split(",")
        contenders = make_contenders({"gates": "folder"}, preset["selectors"], rules, protocols)
        assert len({contender.family for contender in contenders}) == len(contenders), name
    assert len({c.label for c in make_contenders({"g": "f"}, PRESETS["quick"]["selectors"])}) == 6


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
        (["--lengths", "64"], "does not fit into 64 tokens"),
        (["--apply-chat-template"], "no chat template"),
    ],
)
def test_compare_refuses(seer_command, common, tmp_path, options, says):
    result = seer_command("compare", *common, "--output", tmp_path / "out", *options)
    assert result.exit_code == 1
    assert says in result.stderr
    assert "Traceback" not in result.stderr
