"""``seer eval`` and ``seer inspect`` on a tiny model from disk."""

import importlib.util
import json
import shutil
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import seerattention as seer
from seerattention.distillation.lock import locked
from seerattention.evaluate import MEASURES, register

from ..evaluate.harness_tasks import write_tasks
from ..evaluate.toy import Toy


@pytest.fixture
def common(folder):
    return ["--model", folder / "model", "--gates", folder / "gates", "--data", folder / "text.txt", "--device", "cpu"]


def test_eval_measures_every_setting(seer_command, folder, common, tmp_path):
    result = seer_command(
        "eval", *common, "--tasks", "single,multivalue", "--lengths", "768,1K", "--densities", "0.5,0.2", "--oracle",
        "--thresholds", "0.1", "--samples", 2, "--questions", 2, "--documents", 2, "--repeats", 1, "--batch-size", 2,
        "--measure", "retrieval,perplexity,timing", "--output", tmp_path / "out", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    names = ["dense", "oracle 0.5", "oracle 0.2", "gates 0.5", "gates 0.2", "gates > 0.1"]
    assert [item["setting"] for item in data["retrieval"]] == names * 2
    assert [item["length"] for item in data["retrieval"]] == [768] * 6 + [1024] * 6
    assert [item["setting"] for item in data["perplexity"]] == names
    assert [item["setting"] for item in data["timing"]] == [name for name in names if "oracle" not in name] * 2
    for item in data["retrieval"] + data["perplexity"] + data["timing"]:
        assert 0 < item["density"] <= 1
        assert (item["density"] == 1) == (item["setting"] == "dense")
    by_name = {item["setting"]: item["density"] for item in data["perplexity"]}
    assert by_name["oracle 0.2"] == by_name["gates 0.2"] < by_name["gates 0.5"]
    assert data["retrieval"][0]["tasks"]["multivalue"]["questions"] == 4
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == data
    page = (tmp_path / "out" / "index.html").read_text()
    for text in (*names[:5], "gates &gt; 0.1", "Retrieval at 768", "Prefill time at 1K", "added loss"):
        assert text in page


def test_eval_selectors_by_name(seer_command, common):
    names = ["gate:policy=top_k(0.5)", "oracle:policy=top_k(0.2, uniform=true)"]
    result = seer_command(
        "eval", *common, "--lengths", "768", "--densities", "0.5", "--measure", "perplexity", "--documents", 1,
        "--selectors", ",".join(names), "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    by_name = {item["setting"]: item for item in json.loads(result.stdout)["perplexity"]}
    assert list(by_name) == ["dense", "gates 0.5", *names]
    gate, oracle = (by_name[name] for name in names)
    assert {**gate, "setting": "gates 0.5"} == by_name["gates 0.5"]
    assert oracle["density"] < gate["density"]
    assert len(gate["by_length"]) > 1 == len(oracle["by_length"])  # the oracle's policy looks at the whole prompt
    assert oracle["by_length"][0]["length"] == 768


@pytest.mark.parametrize(
    ("selectors", "says"),
    [
        ("nothing", "selector kind must be one of"),
        ("gate:policy=top_k(0.5)", "needs --gates"),
        ("oracle:policy=top_k", "missing"),
    ],
)
def test_eval_refuses_selectors(seer_command, common, selectors, says):
    result = seer_command("eval", *common[:2], "--gates", "none", *common[4:], "--selectors", selectors)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert says in result.stderr


def test_eval_compares_gates_of_several_forms(seer_command, folder, common, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    seer.attach(model, seer.GateConfig(prefill=seer.SubBlockGateConfig()))
    seer.save_gates(model, tmp_path / "fine")
    result = seer_command(
        "eval", *common, "--compare-gates", f"fine={tmp_path / 'fine'}", "--lengths", "768", "--densities", "0.5",
        "--measure", "perplexity", "--documents", 1, "--selectors", "gate:policy=top_p(0.5),oracle", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    found = {item["setting"]: item["last_quarter"]["perplexity"] for item in data["perplexity"]}
    rule = "gate:policy=top_p(0.5)"
    assert list(found) == ["dense", "gates 0.5", "fine 0.5", rule, f"fine {rule}", "oracle"]
    assert found["fine 0.5"] != found["gates 0.5"]
    assert found[f"fine {rule}"] != found[rule]
    assert data["compared gates"] == {"fine": str(tmp_path / "fine")}


def test_eval_stops_after_its_seconds_and_goes_on(seer_command, common, tmp_path, monkeypatch):
    from seerattention.cli import eval as command

    arguments = ["eval", *common, "--lengths", "768", "--densities", "none", "--measure", "perplexity"]
    arguments += ["--documents", 1, "--output", tmp_path / "out", "--json"]
    arguments += ["--selectors", "gate:policy=top_k(0.5),oracle"]
    monkeypatch.setattr(command._Clock, "__call__", late_after(command._Clock, 2))
    result = seer_command(*arguments, "--seconds", 1000)
    assert result.exit_code == 0, result.stderr
    assert "stopped after --seconds 1000, before all was measured; the same command goes on" in result.stderr
    first = json.loads(result.stdout)["perplexity"]
    assert [item["setting"] for item in first] == ["dense", "gate:policy=top_k(0.5)"]
    monkeypatch.undo()
    result = seer_command(*arguments, "--seconds", 1000)
    assert "stopped" not in result.stderr
    assert "2 of 3 results were measured before" in result.stderr
    last = json.loads(result.stdout)["perplexity"]
    assert last[:2] == first
    assert last[2]["setting"] == "oracle"


def late_after(clock, times):
    """A clock's answer that is "too late" after so many that are not, by turning its own end back."""
    asked, answer = [], clock.__call__

    def ask(self):
        asked.append(0)
        if len(asked) > times:
            self.end = 0.0
        return answer(self)

    return ask


def test_eval_perplexity_is_that_of_the_model(seer_command, folder):
    arguments = ["--model", folder / "model", "--gates", "none", "--data", folder / "text.txt", "--device", "cpu"]
    result = seer_command(
        "eval",
        *arguments,
        "--measure",
        "perplexity",
        "--lengths",
        "512",
        "--documents",
        "1",
        "--densities",
        "1",
        "--json",
    )
    data = json.loads(result.stdout)
    assert [item["setting"] for item in data["perplexity"]] == ["dense"]
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ids = tokenizer((folder / "text.txt").read_text(), add_special_tokens=False, return_tensors="pt").input_ids[:, :511]
    ids = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), ids], 1)  # as retrieval samples begin
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    assert data["perplexity"][0]["by_length"][-1]["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4)


def test_eval_prints_tables_in_plain_text(seer_process, common):
    result = seer_process(
        "eval",
        *common,
        "--tasks",
        "keyvalue",
        "--lengths",
        "1K",
        "--densities",
        "0.2",
        "--samples",
        "1",
        "--documents",
        "1",
    )
    assert result.returncode == 0, result.stderr
    assert "\x1b[" not in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert [line.split("|")[1].strip() for line in result.stdout.splitlines() if "gates 0.2" in line] == [
        "gates 0.2"
    ] * 2
    assert "last quarter" in result.stdout
    assert "retrieval at 1K" in result.stderr


def test_a_measure_of_ones_own_stops_and_goes_on(seer_command, common, tmp_path, monkeypatch):
    """One that the command does not know: its table, picture and JSON, its results as they come, and Ctrl-C."""
    monkeypatch.setattr(Toy, "runs", [])
    monkeypatch.setattr(Toy, "stop_at", ["gates 0.2"])
    monkeypatch.setitem(MEASURES, "toy", Toy)
    assert register(Toy) is Toy
    options = ["--measure", "toy", "--lengths", "256", "--densities", "0.5,0.2", "--samples", 3]
    arguments = ["eval", *common, *options, "--output", tmp_path / "out", "--json"]
    assert seer_command(*arguments).exit_code == 130
    assert not (tmp_path / "out" / "results.json").exists()
    kept = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [line["case"]["settings"] for line in kept] == [["dense"], ["gates 0.5"]]
    Toy.stop_at.clear()
    result = seer_command(*arguments)
    assert result.exit_code == 0, result.stderr
    assert "2 of 3 results were measured before" in result.stderr
    assert [name for name, _ in Toy.runs] == ["dense", "gates 0.5", "gates 0.2"]
    data = json.loads(result.stdout)
    assert [item["setting"] for item in data["toy"]] == ["dense", "gates 0.5", "gates 0.2"]
    assert data["toy"][:2] == [line["results"][0] for line in kept]
    assert "mean token" in result.stderr
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Toy at 256" in page
    assert page.count("data:image/png;base64,") == 1
    with locked(tmp_path / "out" / "results.jsonl"):
        refused = seer_command(*arguments)
    assert refused.exit_code == 1
    assert "another run is writing to" in refused.stderr
    again = seer_command(*arguments, "--dtype", "bfloat16")
    assert again.exit_code == 0
    assert "measured before" not in again.stderr


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="the extra lm-eval is not installed")
def test_eval_runs_tasks_of_lm_eval(seer_command, folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.eos_token = tokenizer.bos_token
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = [
        "eval", "--model", tmp_path / "model", "--gates", folder / "gates", "--device", "cpu", "--densities", "0.2",
        "--lm-eval-tasks", ",".join(write_tasks(tmp_path)), "--limit", 3, "--num-fewshot", 1, "--batch-size", 2,
        "--output", tmp_path / "out", "--json",
    ]  # fmt: skip
    result = seer_command(*arguments, "--text-field", "body")
    assert result.exit_code == 0, result.stderr
    assert "--text-field has no effect" in result.stderr
    data = json.loads(result.stdout)
    assert data["retrieval"] == data["perplexity"] == []  # without --measure these tasks alone
    dense, gates = data["lm-eval"]
    assert (dense["setting"], dense["density"], gates["setting"]) == ("dense", 1.0, "gates 0.2")
    assert 0.2 < gates["density"] < 1
    for task, metrics in zip(gates["tasks"], (["acc", "acc_norm"], ["exact_match"]), strict=True):
        assert [score["metric"] for score in task["scores"]] == metrics
        assert all(score["samples"] == 3 for score in task["scores"])
        assert 0.2 < task["density"] < 1
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<h2>lm-evaluation-harness</h2>" in page
    assert "toy_choice acc_norm" in page
    again = seer_command(*arguments)
    assert "2 of 2 results were measured before" in again.stderr
    assert json.loads(again.stdout)["lm-eval"] == data["lm-eval"]


def test_eval_says_what_lm_eval_tasks_need(seer_command, common, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    refused = seer_command("eval", *common, "--lm-eval-tasks", "hellaswag")
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert 'pip install "seerattention[lm-eval]"' in refused.stderr
    refused = seer_command("eval", *common, "--measure", "lm-eval")
    assert (refused.exit_code, refused.stderr) == (
        1, "error: --measure lm-eval needs --lm-eval-tasks, the tasks to run\n"
    )  # fmt: skip
    unused = seer_command(
        "eval", *common, "--limit", 2, "--measure", "perplexity", "--lengths", "256", "--documents", 1,
        "--densities", "0.5",
    )  # fmt: skip
    assert unused.exit_code == 0, unused.stderr
    assert "--limit has no effect: only --lm-eval-tasks reads it" in unused.stderr


def test_inspect_draws_maps_and_tells_recall(seer_command, folder, common, tmp_path):
    result = seer_command(
        "inspect", *common, "--length", "512", "--layers", "1", "--heads", "0,2", "--output", tmp_path, "--json"
    )
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["tokens"] == 512
    assert len(data["recall"]) == 2
    assert all(len(layer) == 4 and all(0 < recall < 1 for recall in layer) for layer in data["recall"])
    assert data["density"][0] == [pytest.approx(20 / 36)] * 4  # the stored policy, TopK(0.5)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["index.html", "layer-01.png"]
    assert (tmp_path / "layer-01.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    sparse = seer_command(
        "inspect", *common, "--length", "512", "--layers", "1", "--density", "0.2", "--output", tmp_path, "--json"
    )
    assert json.loads(sparse.stdout)["density"][0][0] < 0.4


def test_inspect_reads_a_text_file(seer_command, folder, common, tmp_path):
    text = tmp_path / "prompt.txt"
    text.write_text("the quiet house of a captain stood near the silver river " * 8)
    result = seer_command("inspect", *common, "--text", text, "--layers", "0", "--output", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert json.loads(result.stdout)["tokens"] == len(tokenizer(text.read_text()).input_ids)
    refused = seer_command("inspect", *common, "--layers", "7", "--output", tmp_path / "out")
    assert refused.exit_code == 1
    assert "layers 0 to 1" in refused.stderr


def test_eval_runs_text_tasks(seer_command, common):
    options = ["--measure", "tasks", "--lengths", "2K", "--densities", "0.5", "--samples", 2, "--json"]
    result = seer_command("eval", *common, *options, "--tasks", "copy,qa_squad")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)["tasks"]
    assert [item["setting"] for item in found] == ["dense", "gates 0.5"]
    assert all(list(item["tasks"]) == ["copy", "qa_squad"] for item in found)
    assert 0 < found[1]["density"] < 1
    refused = seer_command("eval", *common, "--measure", "retrieval", "--tasks", "copy")
    assert refused.exit_code == 1
    assert "names no retrieval task" in refused.stderr
