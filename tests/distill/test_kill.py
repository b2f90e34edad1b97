"""``seer distill`` killed from outside, again and again: nothing breaks, and the gates come out bit for bit the same.

SEER_KILLS says how often at least (default 4), one of them while a file is being written: half of the kills come at
random moments, the other half as soon as a temporary file shows up beside the outputs. Each run is a process of its
own, but a fork of one that has imported everything: imports would be nine tenths of the test.
"""

from __future__ import annotations

import json
import multiprocessing.process
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

from seerattention import cli
from seerattention.cli.distill import command as seer_distill
from seerattention.distillation.lock import locked
from seerattention.distillation.saved import STATE_FILE, load_state
from seerattention.files import temporary_files

from .tiny import tiny_llama, tiny_tokenizer, write_text

KILLS = int(os.environ.get("SEER_KILLS", "4"))
STEPS = 20 + 8 * KILLS  # so that the last kill still finds it training


def command(model: Path, data: Path, output: Path, **options) -> list[str]:
    settings = {
        "model": model,
        "data": data,
        "output": output,
        "length": 320,
        "batch-size": 2,
        "block-size": 32,
        "steps": STEPS,
        "rows": 0.5,
        "eval-sequences": 2,
        "eval-every": 7,
        "save-every": 1,
        "device": "cpu",
        "seed": 3,
        **options,
    }
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def start():
    """``start(*arguments)`` starts ``seer distill`` in a process of its own and returns that."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["seerattention.cli.distill", "seerattention.hf", "transformers.models.llama.modeling_llama"]
    )

    def started(*arguments) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=cli.main, args=(["distill", *command(*arguments)],))
        process.start()
        return process

    with pytest.MonkeyPatch.context() as patch:  # for what all are forked from: the first start makes it
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        yield started


def finish(process) -> None:
    process.join(300)
    assert process.exitcode == 0, "its last words are in this test's output"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_llama().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    write_text(folder / "text.jsonl", documents=40)
    return folder / "model", folder / "text.jsonl"


def check_every_file_loads(output: Path) -> int:
    """Whatever carries its final name is whole; returns the step of the saved state, -1 if there is none yet."""
    step = -1
    for file in output.glob("*") if output.exists() else ():
        if file.name.startswith("."):
            continue  # temporary: may be anything
        if file.name == STATE_FILE:
            tensors, meta = load_state(file)
            assert all(torch.isfinite(tensor.float()).all() for tensor in tensors.values())
            assert len(meta["history"]["loss"]) == meta["step"]
            step = meta["step"]
        elif file.suffix == ".safetensors":
            assert load_file(file)
        elif file.suffix == ".json":
            json.loads(file.read_text())
        elif file.suffix == ".png":
            assert file.read_bytes()[-8:-4] == b"IEND"
    return step


def kill_at(process, output: Path, delay: float, inside_write: bool) -> None:
    """SIGKILL after ``delay`` seconds of training, or in the next write after that."""
    state = output / STATE_FILE
    before = state.stat().st_mtime_ns if state.exists() else None
    while process.is_alive():  # until this process has begun to train
        if state.exists() and state.stat().st_mtime_ns != before:
            break
        time.sleep(0.002)
    time.sleep(delay)
    if inside_write:
        while process.is_alive() and not temporary_files(state):
            pass
    process.kill()
    process.join()


@pytest.mark.timeout(180 + 60 * KILLS)
def test_killed_runs_end_like_an_unbroken_one(start, inputs, tmp_path):
    finish(start(*inputs, tmp_path / "unbroken"))

    rng = random.Random(20)
    output = tmp_path / "killed"
    kills = inside = attempts = 0
    while kills < KILLS or not inside:  # on a busy machine a write may end between being seen and the kill
        attempts += 1
        assert attempts <= 3 * KILLS, "the run ends too early to be killed so often"
        process = start(*inputs, output)
        # Early in the run, so that all kills find it still training; a few even before the first step.
        if rng.random() < 0.15:
            time.sleep(rng.uniform(0.0, 0.3))
            process.kill()
            process.join()
        else:
            aimed = kills % 2 == 0 or not inside
            kill_at(process, output, delay=rng.uniform(0.0, 0.15), inside_write=aimed)
        if process.exitcode == -signal.SIGKILL:
            kills += 1
            inside += bool(temporary_files(output / STATE_FILE))
        assert check_every_file_loads(output) < STEPS, "the run ended before all kills were done"
    # Once more at the very end, while the results are written.
    process = start(*inputs, output)
    while process.is_alive() and not list(output.glob("*gate*")):
        time.sleep(0.001)
    process.kill()
    process.join()
    assert check_every_file_loads(output) == STEPS

    finish(start(*inputs, output))
    assert check_every_file_loads(output) == STEPS
    expected, gates = load_file(tmp_path / "unbroken" / "gates.safetensors"), load_file(output / "gates.safetensors")
    assert expected.keys() == gates.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, gates[name]), name
    histories = [
        json.loads((tmp_path / name / "history.json").read_text())["history"] for name in ("unbroken", "killed")
    ]
    for key in ("loss", "loss_per_layer", "recall", "recall_steps", "tokens"):
        assert histories[0][key] == histories[1][key], key
    assert {"gate_config.json", "gates.safetensors", "history.json", "curves.png", STATE_FILE} <= set(
        os.listdir(output)
    )
    print(f"{kills} kills, {inside} inside a write")

    assert f"steps: was {STEPS}, now {STEPS + 1}" in mistake(*inputs, output, steps=STEPS + 1)


def mistake(*arguments, **options) -> str:
    """What the command, run in this process, says about a mistake."""
    app = typer.Typer()
    app.command()(seer_distill)
    result = CliRunner().invoke(app, command(*arguments, **options))
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: ")
    return result.stderr


def test_mistakes_are_one_sentence(inputs, tmp_path):
    model, data = inputs
    assert "no such file or folder" in mistake(model, tmp_path / "nothing.jsonl", tmp_path)
    assert "rows must be a share" in mistake(model, data, tmp_path, rows=0)
    assert "block_size must be one of" in mistake(model, data, tmp_path, **{"block-size": 48})
    assert "give more text" in mistake(model, data, tmp_path, length="64K")
    assert "--text-field" in mistake(model, data, tmp_path, **{"text-field": "body"})
    with locked(tmp_path / STATE_FILE):
        assert "another run is writing to" in mistake(model, data, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
