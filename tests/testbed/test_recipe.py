"""The whole recipe at tiny size: training with resume, evaluation, gates, and what is packaged at the end."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from testbed.__main__ import app
from testbed.card import _phases, stages
from testbed.evaluate import weak_tasks
from testbed.model import FastLlama, ModelConfig, read
from testbed.schedule import PHASES as DEFAULT_PHASES
from testbed.schedule import NotFormed, Phase, TrainConfig
from testbed.training import _Run, train
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import seerattention as seer
from seerattention.gates.checkpoint import read_checkpoint

from .tiny import write_books

SHAPE = ModelConfig(2048, width=64, layers=2, heads=2, kv_heads=1, head_dim=32, mlp_width=96, max_context=256)
PHASES = (Phase(128, 0.5, 512, 3e-3, drills=1.0), Phase(256, 0.5, 512, 3e-3, reach=1024))


def settings(seconds, **options):
    return TrainConfig(seconds=seconds, **{"phases": PHASES, "workers": 0, "report_every": 2, "retries": 0, **options})


def test_training_learns_and_goes_on_where_it_stopped(run_folder):
    class Stop(Exception):
        pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("testbed.training.export", lambda *arguments: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            train(run_folder, SHAPE, settings(4, checkpoint_every=0.5), "cpu")
    stopped = torch.load(run_folder / "checkpoint.pt", weights_only=True)["state"]
    assert stopped["step"] > 0
    for resumed, seconds in enumerate((6, 12, 24, 48), 1):  # how many steps a second holds depends on the machine
        summary = train(run_folder, SHAPE, settings(seconds, checkpoint_every=0.5), "cpu")
        assert summary["step"] > stopped["step"]
        assert summary["resumed"] == resumed
        lines = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
        text = [line["text"] for line in lines if "text" in line]
        if text[-1] < text[0] - 0.5:
            break
    else:
        pytest.fail(f"the loss of text went from {text[0]} to {text[-1]} only")
    assert summary == json.loads((run_folder / "summary.json").read_text()) | {"settings": summary["settings"]}
    assert {line["context"] for line in lines} == {128, 256}
    model = AutoModelForCausalLM.from_pretrained(run_folder / "model")
    assert model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(run_folder / "model").bos_token_id == 0
    with pytest.raises(ValueError, match="is of another model"):
        train(run_folder, ModelConfig(2048, width=32, layers=1, heads=2, kv_heads=1), settings(60), "cpu")


def test_a_model_is_trained_on(run_folder):
    torch.manual_seed(0)
    model = FastLlama(SHAPE, torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(run_folder, model, settings(0.5, phases=PHASES[:1], warmup_steps=10_000), "cpu")
    after = read(run_folder / "model", torch.float32).state_dict()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0.02, atol=2e-3, msg=lambda text, n=name: f"{n}: {text}")
    assert any(not torch.equal(after[name], tensor.bfloat16().float()) for name, tensor in before.items())


def test_a_run_without_look_up_tries_another_seed_and_gives_up(run_folder):
    phases = (Phase(128, 0.2, 256, 1e-9, drills=1.0, most=0.4, stop_above=1.0), PHASES[1])
    with pytest.raises(NotFormed, match="look-up did not form in the drills of 128 tokens"):
        train(run_folder, SHAPE, settings(5, phases=phases, retries=1, report_every=1), "cpu")
    saved = torch.load(run_folder / "checkpoint.pt", weights_only=True)["state"]
    assert saved["seed"] == 12
    assert [attempt["seed"] for attempt in saved["given_up"]] == [11]


def test_the_default_stages_with_a_stop_in_the_second(run_folder, monkeypatch):
    """The phases of the default recipe at tiny size, by a clock that goes on by one second a step."""
    phases = tuple(
        replace(p, context=min(512, max(128, p.context // 32)), tokens=1024, stop_above=1e9) for p in DEFAULT_PHASES
    )
    second_stage = next(i for i, phase in enumerate(phases) if not phase.steered)
    config = settings(100, phases=phases, report_every=1, checkpoint_every=1.0, look_up=(1,))

    class Stop(Exception):
        pass

    def stop(run, phase, step=_Run._step):
        if run.schedule.phase == second_stage and run.state["elapsed"] > run.schedule.started + 4:
            raise Stop
        return step(run, phase)

    seconds = itertools.count()
    monkeypatch.setattr("testbed.training.time", SimpleNamespace(perf_counter=lambda: float(next(seconds))))
    with monkeypatch.context() as patch:
        patch.setattr(_Run, "_step", stop)
        with pytest.raises(Stop):
            train(run_folder, SHAPE, config, "cpu")
    stopped = torch.load(run_folder / "checkpoint.pt", weights_only=True)
    assert stopped["schedule"]["phase"] == second_stage
    summary = train(run_folder, SHAPE, config, "cpu")
    assert (summary["resumed"], summary["step"]) == (1, 99)

    lines = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    switch = stopped["schedule"]["started"]
    before, after = ([line for line in lines if (line["elapsed"] >= switch) == late] for late in (False, True))
    resumed = [line for line in after if line["resumed"]]
    assert resumed[0]["elapsed"] < switch + 6, "it goes on in the phase where it stopped"
    contexts = (
        [context for context, _ in itertools.groupby(line["context"] for line in part)] for part in (before, after)
    )
    assert [*contexts] == [[128], [128, 512]]
    assert {"answers drill_keyvalue", "answers drill_needles", "answers drill_alike"} <= {
        name for line in before for name in line
    }
    card = _phases(stages(summary)[0])
    assert [row.split(" | ")[-1] for row in card.splitlines()[2:8]] == ["1 |", "2 |", "2 |", "3 |", "3 |", "3 |"]
    assert "Mix 1: tasks multikey 3, " in card
    assert "Which layers see far in the phases of 128, 128, 128 tokens: 1." in card


def test_layers_that_the_model_does_not_have(run_folder):
    phases = json.dumps([{"context": 128, "share": 1, "tokens": 512, "rate": 3e-3, "steered": True}])
    given = ["train", "--out", str(run_folder), "--layers", "2", "--phases", phases, "--device", "cpu"]
    for layers, said in (("1,2", "has 2 layers"), ("one", "numbers of layers"), ("", "numbers of layers")):
        result = CliRunner().invoke(app, [*given, "--look-up", layers], env={"COLUMNS": "200"})
        assert result.exit_code == 2
        assert said in result.output


def test_where_look_up_does_not_form_the_command_ends_with_a_sentence(run_folder, monkeypatch):
    def fails(*_):
        raise NotFormed("look-up did not form in the drills of 128 tokens by 78 s")

    monkeypatch.setattr("testbed.training.train", fails)
    result = CliRunner().invoke(app, ["train", "--out", str(run_folder), "--device", "cpu"])
    assert result.exit_code == 1
    assert result.output.startswith("error: look-up did not form in the drills of 128 tokens by 78 s\nKnown to form")


def test_what_a_model_does_not_do_is_said():
    cells = {"single": 1.0, "multikey": 0.004, "keyvalue": 0.85, "variable": 0.0}
    results = {"retrieval": {task: {"16384": {"exact": x}, "32768": {"exact": 0.0}} for task, x in cells.items()}}
    said = "the dense model answers multikey 0.4%, keyvalue 85.0% at 16,384 tokens, below 90%"
    assert weak_tasks(results, 0.9) == said
    assert weak_tasks(results, 0.0) == ""


@pytest.mark.slow
def test_everything_in_one_command(tmp_path):
    books, held_out = write_books(tmp_path)
    phases = [
        {"context": 128, "share": 0.5, "tokens": 512, "rate": 3e-3, "drills": 1.0},
        {"context": 512, "share": 0.5, "tokens": 512, "rate": 3e-3},
    ]
    options = {
        "--data": books,
        "--held-out": held_out,
        "--out": tmp_path / "run",
        "--minutes": 0.1,
        "--report-every": 2,
        "--vocab-size": 2048,
        "--width": 64,
        "--layers": 2,
        "--look-up": "all",
        "--heads": 2,
        "--kv-heads": 1,
        "--head-dim": 32,
        "--phases": json.dumps(phases),
        "--lengths": 1024,
        "--samples": 4,
        "--gate-steps": 2,
        "--gate-length": 1024,
        "--workers": 0,
        "--device": "cpu",
        "--least": 0,
    }
    arguments = ["all", *(str(part) for pair in options.items() for part in pair)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    package = tmp_path / "run" / "package"
    card = (package / "model" / "README.md").read_text()
    assert "| multikey |" in card
    assert "not measured for this model" not in card
    assert "## Where it looks up" in card
    assert (package / "model" / "curves.png").stat().st_size > 1000
    model = AutoModelForCausalLM.from_pretrained(package / "model", dtype=torch.float32)
    model.config._name_or_path = seer.testbed.NAME
    seer.attach(model, package / "gates", min_context=0)
    tokenizer = AutoTokenizer.from_pretrained(package / "model")
    with seer.record(model) as stats, torch.no_grad():
        model(**tokenizer("word " * 600, return_tensors="pt"))
    assert stats.density < 0.5
    again = CliRunner().invoke(app, arguments, catch_exceptions=False)  # what is finished is kept
    assert again.exit_code == 0, again.output
    weak = CliRunner().invoke(app, [*arguments, "--least", "0.9"], catch_exceptions=False)
    assert weak.exit_code == 1
    assert "error: the dense model answers single " in weak.output
    assert "--least 0 goes on" in weak.output
    assert "Known to form its look-ups" in weak.output
    options |= {"--start": package / "model", "--out": tmp_path / "run on", "--minutes": 0.05, "--samples": 1}
    options["--phases"] = json.dumps([{"context": 1024, "share": 1, "tokens": 1024, "rate": 3e-3}])
    arguments = ["all", *(str(part) for pair in options.items() for part in pair)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    trained_on = AutoTokenizer.from_pretrained(tmp_path / "run on" / "package" / "model")
    assert trained_on.get_vocab() == tokenizer.get_vocab()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run on" / "model").config.max_position_embeddings == 1024
    packed, plain = (read_checkpoint(folder / "gates").weights for folder in (package, tmp_path / "run"))
    assert (package / "gates" / "gates.safetensors.xz").is_file()
    assert packed.keys() == plain.keys()
    assert all(torch.equal(packed[name], plain[name]) for name in plain)


def test_packaging_an_unfinished_run_says_what_is_missing(run_folder, tmp_path):
    result = CliRunner().invoke(app, ["package", "--out", str(run_folder), "--target", str(tmp_path / "package")])
    assert isinstance(result.exception, FileNotFoundError)
    assert "gates/gates.safetensors" in str(result.exception)
    assert not (tmp_path / "package").exists()
