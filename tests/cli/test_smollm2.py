"""``--model smollm2``: every command takes it, and says what to do where its gates, or the model, are not there."""

from __future__ import annotations

import json

import pytest

from seerattention import testbed
from seerattention.cli.common import default_gates
from seerattention.cli.demo_plan import STORED, DemoPlan
from seerattention.testbed import smollm2


@pytest.fixture
def no_gates(tiny_testbed, monkeypatch, folder):
    """The tiny testbed's models, where smollm2 has no gates; lists what was loaded."""

    def gates_path(name="testbed"):
        if name != "testbed":
            raise FileNotFoundError(f"no gates for {name}")
        return folder / "gates"

    names = []
    load = testbed.load
    monkeypatch.setattr(testbed, "gates_path", gates_path)
    monkeypatch.setattr(testbed, "load", lambda **options: names.append(options["name"]) or load(**options))
    monkeypatch.setattr(testbed, "model_path", lambda name="testbed": folder / "model")
    return names


EVAL = ("--lengths", 512, "--samples", 1, "--questions", 1, "--documents", 1, "--densities", 0.5, "--tasks", "single")


def test_eval_measures_it_on_the_testbeds_books(no_gates, seer_command):
    result = seer_command(
        "eval", "--model", "smollm2", "--device", "cpu", "--gates", "none", "--oracle", *EVAL, "--json"
    )
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["model"] == "smollm2"
    assert [item["setting"] for item in data["perplexity"]] == ["dense", "oracle 0.5"]
    assert no_gates == ["smollm2"]


@pytest.mark.parametrize("command", ["eval", "inspect"])
def test_without_gates_a_sentence_comes_before_any_work(command, no_gates, seer_command):
    result = seer_command(command, "--model", "smollm2", "--device", "cpu")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "error: no gates for smollm2"
    assert no_gates == []


def test_gates_of_ones_own_are_taken(no_gates, seer_command, folder, tmp_path):
    arguments = ("--gates", folder / "gates", "--length", 256, "--output", tmp_path / "out", "--json")
    result = seer_command("inspect", "--model", "smollm2", "--device", "cpu", *arguments)
    assert result.exit_code == 0, result.stderr
    assert no_gates == ["smollm2"]


def test_bench_takes_its_shape(no_gates, seer_command, monkeypatch):
    asked = []

    def model_path(name):
        asked.append(name)
        raise OSError("stop")

    monkeypatch.setattr(testbed, "model_path", model_path)
    result = seer_command("bench", "--model", "smollm2", "--device", "cpu", "--lengths", "256")
    assert (asked, result.stderr.splitlines()[-1]) == (["smollm2"], "error: stop")


def test_distill_trains_gates_for_it(no_gates, seer_command, folder, tmp_path):
    arguments = ("--data", folder / "text.txt", "--output", tmp_path / "gates", "--length", 256, "--steps", 2)
    result = seer_command("distill", "--model", "smollm2", "--device", "cpu", "--eval-sequences", 0, *arguments)
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "gates" / "gates.safetensors").is_file()
    assert no_gates == ["smollm2"]


def test_the_demo_has_fresh_gates_only_and_says_so(no_gates, seer_command, tmp_path):
    result = seer_command("demo", "--model", "smollm2", "--fast", "--device", "cpu", "--output", tmp_path, "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    names = ["dense", "fresh gates, default", "fresh gates, 0.2", "untrained gates, 0.2"]
    for part in ("timing", "retrieval", "perplexity"):
        assert [item["setting"] for item in data[part]] == names
    assert data["model"] == "smollm2"
    assert data["distillation"]["recall_committed"] == []
    said = "This version comes without gates for smollm2"
    assert said in result.stderr
    page = (tmp_path / "index.html").read_text()
    assert said in page
    assert "come with the package" not in page
    assert "committed gates" not in page
    assert no_gates == ["smollm2"]


def test_the_demo_shows_gates_that_come_with_it(tiny_testbed, seer_command, tmp_path):
    result = seer_command("demo", "--model", "smollm2", "--fast", "--device", "cpu", "--output", tmp_path, "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    names = [item["setting"] for item in data["timing"]]
    assert names[:3] == ["dense", "committed gates, default", "fresh gates, default"]
    assert data["distillation"]["recall_committed"]
    assert "comes without gates" not in result.stderr


def test_the_demo_takes_the_testbeds_models_only(seer_command, tmp_path):
    result = seer_command("demo", "--model", "Qwen/Qwen2.5-7B", "--output", tmp_path)
    assert result.exit_code == 1
    assert "--model must be testbed or smollm2, got 'Qwen/Qwen2.5-7B'" in result.stderr
    assert "seer distill and seer eval" in result.stderr


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("fast", [False, True])
def test_its_plans_fit_the_model(device, fast):
    plan = DemoPlan.choose(device, fast, model="smollm2")
    assert plan.model == "smollm2"
    assert plan.train_length <= plan.length <= 8192
    assert plan.task_length <= plan.length
    # Not a share of each row's own blocks: the model does not bear it.
    assert plan.committed[plan.headline] == plan.fresh[plan.headline] == STORED
    assert set(plan.untrained) <= set(plan.fresh)
    # The model answers half of them, so few would say nothing.
    assert fast or plan.samples * plan.questions * plan.max_rounds >= 96


def test_a_model_that_cannot_be_had_is_a_sentence(seer_command, monkeypatch):
    def folder_path():
        raise ModuleNotFoundError("install it")

    monkeypatch.setattr(smollm2, "folder_path", folder_path)
    result = seer_command("eval", "--model", "smollm2", "--device", "cpu", "--gates", "none")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "error: install it"


def test_only_the_testbeds_models_have_gates_by_default():
    assert default_gates("some/model") is None
    assert default_gates("testbed") == testbed.gates_path()
