"""Budgets on the command line: fitted by ``seer calibrate`` and ``seer distill``, used by ``seer eval``."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import seerattention as seer
from seerattention.gates.checkpoint import read_checkpoint, write_checkpoint
from seerattention.gates.sources import stored_budgets

from ..evaluate.tiny import make_text


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two documents of more than 4,096 tokens."""
    path = tmp_path_factory.mktemp("texts") / "long.jsonl"
    path.write_text("".join(json.dumps({"text": make_text(9000, seed)}) + "\n" for seed in (1, 2)))
    return path


def test_calibrate_and_eval(seer_command, folder, texts, tmp_path):
    options = ["--model", folder / "model", "--device", "cpu", "--data", texts]
    result = seer_command(
        "calibrate", *options, "--gates", folder / "gates", "--length", "4K", "--sequences", 1,
        "--densities", "0.2,0.4", "--output", tmp_path / "gates", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    told, budgets = json.loads(result.stdout), stored_budgets(tmp_path / "gates")
    assert budgets.densities == (0.2, 0.4)
    assert told["curves"][0]["density"] == 0.2
    assert told["layers"] == list(budgets.layers)
    assert len(set(budgets.layers)) == 2
    assert f"of 4096 tokens, {2 + 2 * 2 + 3} times" in " ".join(result.stderr.split())
    before, after = (load_file(place / "gates" / "gates.safetensors") for place in (folder, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)

    result = seer_command(
        "eval", *options, "--gates", tmp_path / "gates", "--measure", "perplexity", "--lengths", "4K", "--documents", 1,
        "--densities", "0.3,0.1", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "budgets are stored for densities from 0.2 to 0.4; top-k selection for 0.1" in " ".join(
        result.stderr.split()
    )
    found = {row["setting"]: row["density"] for row in json.loads(result.stdout)["perplexity"]}
    assert 0.85 * 0.3 < found["gates 0.3"] < 1.05 * 0.3
    assert found["gates 0.1"] == pytest.approx(0.114, abs=0.002)  # top-k rounds up


def test_one_factor_for_all_layers(seer_command, folder, texts, tmp_path):
    result = seer_command(
        "calibrate", "--model", folder / "model", "--device", "cpu", "--data", texts, "--gates", folder / "gates",
        "--length", "4K", "--sequences", 1, "--densities", "0.3", "--output", tmp_path / "gates", "--no-by-layer",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "of 4096 tokens, 2 times" in " ".join(result.stderr.split())
    assert stored_budgets(tmp_path / "gates").layers == ()


@pytest.mark.parametrize("by_layer", [True, False])
def test_one_rule_for_one_length(seer_command, folder, texts, tmp_path, by_layer):
    options = ["--model", folder / "model", "--device", "cpu", "--data", texts, "--length", "4K"]
    some = ["calibrate", *options, "--sequences", 1, "--output", tmp_path / "gates"]
    assert seer_command(*some, "--gates", folder / "gates", "--densities", "0.3").exit_code == 0
    result = seer_command(
        *some, "--gates", tmp_path / "gates", "--relative-threshold", "0.2", "--json",
        "--by-layer" if by_layer else "--no-by-layer",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    told, found = json.loads(result.stdout), read_checkpoint(tmp_path / "gates")
    assert isinstance(found.policy, seer.RelativeThreshold)
    assert told["factor"] == found.policy.factor
    assert len(set(found.policy.layers)) == (2 if by_layer else 0)
    assert found.budgets.densities == (0.3,)  # stay
    said = f"RelativeThreshold({found.policy.factor:.3g}){' with factors by layer' if by_layer else ''} is the default"
    assert said in " ".join(result.stderr.split())
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    seer.attach(model, tmp_path / "gates", min_context=0)
    ids = torch.randint(5, 100, (1, 4096), generator=torch.Generator().manual_seed(0))
    with seer.record(model) as stats, torch.no_grad():
        model(ids)
    assert 0.15 < float(stats.total_density) < 0.25


def test_gates_without_budgets_are_said_to_have_none(seer_command, folder, texts):
    options = ["--model", folder / "model", "--device", "cpu", "--data", texts, "--gates", folder / "gates"]
    options += ["--measure", "perplexity", "--lengths", "512", "--documents", 1, "--json"]
    result = seer_command("eval", *options, "--densities", "0.5")
    assert result.exit_code == 0, result.stderr
    said = f"no budgets are stored with {folder / 'gates'}: top-k selection, which loses more at the same density"
    assert said in " ".join(result.stderr.split())
    assert "no budgets" not in seer_command("eval", *options, "--densities", "1").stderr


def test_calibrate_keeps_packed_weights_and_what_people_wrote_into_the_card(seer_command, folder, texts, tmp_path):
    saved, gates = read_checkpoint(folder / "gates"), tmp_path / "gates"
    write_checkpoint(gates, saved, packed=True, notes="## Scores\n\nGood ones.\n\n### By length\n\nAlso good.\n")
    result = seer_command(
        "calibrate", "--model", folder / "model", "--device", "cpu", "--data", texts, "--gates", gates,
        "--length", "4K", "--sequences", 1, "--densities", "0.2", "--output", gates,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert sorted(path.name for path in gates.iterdir()) == ["README.md", "gate_config.json", "gates.safetensors.xz"]
    found = read_checkpoint(gates)
    assert found.budgets.densities == (0.2,)
    assert found.policy == found.budgets.policy(0.2)
    assert found.weights.keys() == saved.weights.keys()
    assert all(torch.equal(saved.weights[name], x) for name, x in found.weights.items())
    card = (gates / "README.md").read_text()
    assert card.endswith("\n\n## Scores\n\nGood ones.\n\n### By length\n\nAlso good.\n")
    assert '"kind": "budget", "density": 0.2' in card


def test_calibrate_says_that_prompts_are_too_short(seer_command, folder, texts, tmp_path):
    result = seer_command(
        "calibrate", "--model", folder / "model", "--device", "cpu", "--data", texts, "--gates", folder / "gates",
        "--length", "1K", "--sequences", 1, "--output", tmp_path / "gates",
    )  # fmt: skip
    assert result.exit_code == 1
    assert "prompts of up to 1024 tokens are too short to fit budgets" in " ".join(result.stderr.split())
    assert not (tmp_path / "gates").exists()


@pytest.mark.parametrize("options", [[], ["--no-by-layer"], ["--no-budgets"], ["--length", "512"]])
def test_distill_fits_them_at_its_end(seer_command, folder, texts, tmp_path, options):
    result = seer_command(
        "distill", "--model", folder / "model", "--data", texts, "--output", tmp_path, "--device", "cpu",
        "--length", "4K", "--steps", 1, "--rows", 2, "--eval-sequences", 1, "--save-seconds", 3600, *options,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    said, budgets = " ".join(result.stderr.split()), stored_budgets(tmp_path)
    if options in ([], ["--no-by-layer"]):
        assert budgets.tokens == 4096
        assert len(set(budgets.layers)) == (0 if options else 2)
        assert "fitted budgets on the held-out sequences, for densities" in said
    else:
        assert budgets is None
        assert ("no budgets are stored with these gates: prompts of up to 512 tokens" in said) == ("512" in options)
