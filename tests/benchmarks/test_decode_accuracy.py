"""``benchmarks.decode_accuracy``: its numbers by their definitions, and a whole run on the embedded model."""

from __future__ import annotations

import json

import numpy as np
import pytest
from benchmarks.decode_accuracy import Answered, main, make_lists, metrics_of, paired_loss, parse_policies
from transformers import AutoTokenizer

import seerattention as seer
from seerattention import testbed
from seerattention.measure import CacheMemory
from seerattention.tasks import TaskGenerator

SMALL = ["--device", "cpu", "--length", "512", "--count", "4", "--new", "6", "--cue", "12", "--batch-size", "3"]


def test_losses_are_of_pairs():
    dense, sparse = np.array([1, 1, 1, 0, 1], bool), np.array([1, 0, 0, 1, 1], bool)
    loss, error = paired_loss(dense, sparse)
    differences = [0, 100, 100, -100, 0]
    assert loss == pytest.approx(20)
    assert error == pytest.approx(np.sqrt(sum((d - 20) ** 2 for d in differences) / 4 / 5))
    assert paired_loss(dense[:1], sparse[:1]) == (0.0, None)


def test_numbers_of_a_case():
    right = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1], [0, 0, 0]], bool)
    dense = Answered(np.ones((4, 3), bool), CacheMemory(1000, 0), 1.0)
    found = metrics_of(Answered(right, CacheMemory(1000, 50), 2.0), dense, 0.1)
    assert found["exact"] == 0.5
    assert found["token_accuracy"] == pytest.approx(8 / 12)
    assert found["loss_points"] == 50
    assert (found["gate_bytes"], found["cache_bytes"], found["gate_memory_share"]) == (50, 1000, 0.05)


def test_policies_by_their_names():
    found = parse_policies(" TokenBudget(1600); RelativeThreshold(1.5, min_blocks=8) ;top_k(0.1);Dense ")
    assert found == {
        "TokenBudget(1600)": seer.TokenBudget(1600),
        "RelativeThreshold(1.5, min_blocks=8)": seer.RelativeThreshold(1.5, min_blocks=8),
        "top_k(0.1)": seer.TopK(0.1),
        "Dense": seer.Dense(),
    }


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("--policies=Guess(3)", "kind must be one of"),
        ("--policies=TopK(2)", "must lie in (0, 1]"),
        ("--policies=;", "at least one policy"),
        ("--count=0", "--count must be at least 1"),
        ("--length=30", "no room for a list of 18 tokens"),
    ],
)
def test_wrong_options(argument, sentence, capsys):
    with pytest.raises(SystemExit):
        main([*SMALL, argument])
    assert sentence in capsys.readouterr().err


def test_prompts_ask_for_a_list_that_they_hold():
    tokenizer = AutoTokenizer.from_pretrained(testbed.model_path())
    book = np.array(tokenizer(testbed.book_texts("test")[0][:30_000], add_special_tokens=False)["input_ids"])
    lists = make_lists(TaskGenerator(tokenizer, [book], seed=1), 5, 300, 12, 6)
    assert lists.prompts.shape == (5, 300)
    assert lists.answers.shape == (5, 6)
    for prompt, answer in zip(lists.prompts.tolist(), lists.answers.tolist(), strict=True):
        asked = prompt[-12:]
        (place,) = [i for i in range(300 - 12) if prompt[i : i + 12] == asked]
        assert prompt[place + 12 : place + 18] == answer
    assert len({tuple(answer) for answer in lists.answers.tolist()}) == 5


def test_a_whole_run(tmp_path, capsys):
    """Everything kept loses nothing, and a list that is not among the blocks read cannot be said."""
    policies = "TokenBudget(4096);TokenBudget(64)"
    assert main([*SMALL, "--policies", policies, "--output", str(tmp_path)]) == 0
    (run,) = json.loads((tmp_path / "decode_accuracy.json").read_text())["runs"]
    dense, everything, own_block = run["results"]
    assert [result["case"]["policy"] for result in run["results"]] == ["dense", *policies.split(";")]
    assert dense["metrics"]["exact"] >= 0.75, "the embedded model copies lists"
    assert dense["metrics"]["gate_bytes"] == 0
    assert everything["exact"] == dense["exact"]
    assert everything["metrics"]["loss_points"] == 0
    assert everything["metrics"]["density"] == pytest.approx(1)
    assert own_block["metrics"]["density"] < 0.2
    assert own_block["metrics"]["loss_points"] >= 50
    for result in (everything, own_block):
        # Of 518 tokens the last 71, which are kept as they came, are a seventh.
        assert 0.1 < result["metrics"]["gate_memory_share"] < 0.5
        assert result["metrics"]["cache_bytes"] == dense["metrics"]["cache_bytes"] > 0
        assert len(result["exact"]) == 4
    assert own_block["policy"] == seer.TokenBudget(64).to_dict()
    assert "lost, points" in capsys.readouterr().out


def test_gates_that_do_not_decode_are_refused(tmp_path):
    model, _ = testbed.load("cpu")
    seer.attach(model, seer.GateConfig())
    seer.save_gates(model, tmp_path / "gates")
    with pytest.raises(ValueError, match="decod"):
        main([*SMALL, "--gates", str(tmp_path / "gates"), "--output", str(tmp_path)])
    assert not (tmp_path / "decode_accuracy.json").exists()
