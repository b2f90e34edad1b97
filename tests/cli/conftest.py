"""A tiny model with gates on disk, and the same as a stand-in for the embedded testbed."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

import seerattention as seer
from seerattention import testbed
from seerattention.cli import build

from ..evaluate.tiny import make_model, make_text, make_tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """``model``, ``gates`` and ``text.txt``."""
    folder = tmp_path_factory.mktemp("cli")
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    seer.attach(model, seer.GateConfig(), prefill=seer.TopK(0.5), min_context=0)
    seer.save_gates(model, folder / "gates")
    (folder / "text.txt").write_text(make_text(6000, 5))
    return folder


@pytest.fixture
def tiny_testbed(folder, monkeypatch):
    """``seerattention.testbed`` with the tiny model."""

    def load(device=None, dtype=None, *, name="testbed"):
        tokenizer = make_tokenizer()
        return make_model(len(tokenizer)).to(device), tokenizer

    monkeypatch.setattr(testbed, "load", load, raising=False)
    monkeypatch.setattr(testbed, "gates_path", lambda name="testbed": folder / "gates", raising=False)
    books = {"train": [make_text(4000, 1)], "test": [make_text(4000, 2)]}
    monkeypatch.setattr(testbed, "book_texts", books.__getitem__, raising=False)


@pytest.fixture
def seer_command():
    """``seer_command("eval", "--json", ...)`` runs in this process; the result has exit_code, stdout, stderr."""

    def run(*arguments):
        return CliRunner().invoke(build(arguments[0]), [str(argument) for argument in arguments])

    return run


@pytest.fixture
def seer_process():
    """The same in a process of its own, as a user runs it."""

    def run(*arguments):
        code = "import seerattention.cli as cli; cli.main()"
        command = [sys.executable, "-c", code, *(str(argument) for argument in arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    return run


@pytest.fixture
def arguments(folder, tmp_path):
    """Arguments of each command with which nothing is wrong; a later one of the same name replaces them."""
    model = ["--model", folder / "model", "--device", "cpu"]
    return {
        "demo": ["--output", tmp_path / "out"],
        "distill": [*model, "--data", folder / "text.txt", "--output", tmp_path / "out", "--length", "512"],
        "eval": [*model, "--gates", folder / "gates", "--data", folder / "text.txt", "--output", tmp_path / "out"],
        "compare": [*model, "--gates", folder / "gates", "--data", folder / "text.txt", "--output", tmp_path / "out"],
        "report": [tmp_path],
        "calibrate": [*model, "--gates", folder / "gates", "--data", folder / "text.txt", "--output", tmp_path / "out"],
        "inspect": [*model, "--gates", folder / "gates", "--data", folder / "text.txt", "--output", tmp_path / "out"],
        "bench": ["--device", "cpu", "--lengths", "256"],
        "convert": [folder / "gates"],
        "join": [folder / "gates", folder / "gates"],
        "env": [],
    }
