"""Mistakes of the user and failures of the machine are one sentence; bugs keep their traceback."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
import typer

from seerattention.cli.common import errors


class _Fails:
    @staticmethod
    def sentence():
        raise ValueError("--speed must be a number")

    @staticmethod
    def long_sentence():
        raise TypeError("a sentence that begins on another line\nthan the statement")

    @staticmethod
    def not_yet():
        raise NotImplementedError("that is not supported yet")

    @staticmethod
    def missing():
        os.stat("/nowhere/at/all")

    @staticmethod
    def full():
        raise OSError(28, "No space left on device")

    @staticmethod
    def module():
        import no_such_module_at_all  # noqa: F401

    @staticmethod
    def memory():
        torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sentence", "error: --speed must be a number"),
        ("long_sentence", "error: a sentence that begins on another line than the statement"),
        ("not_yet", "error: that is not supported yet"),
        ("missing", "error: /nowhere/at/all: No such file or directory"),
        ("full", "error: No space left on device"),
        ("module", "error: No module named 'no_such_module_at_all'"),
        ("memory", "error: out of memory"),
    ],
)
def test_mistakes_are_one_sentence(name, said, capsys):
    with pytest.raises(typer.Exit) as caught, errors():
        getattr(_Fails, name)()
    assert caught.value.exit_code == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith(said)
    assert len(stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("bug", "kind"),
    [
        (lambda: [1, 2][5], IndexError),
        (lambda: {}["key"], KeyError),
        (lambda: None.shape, AttributeError),
        (lambda: 1 + "1", TypeError),
        (lambda: int("1.5"), ValueError),
        (lambda: list(zip([1], [1, 2], strict=True)), ValueError),
        (lambda: torch.zeros(2) @ torch.zeros(3), RuntimeError),
        (lambda: (_ for _ in ()).throw(AssertionError("no")), AssertionError),
    ],
)
def test_bugs_keep_their_traceback(bug, kind, capsys):
    with pytest.raises(kind), errors():
        bug()
    assert capsys.readouterr().err == ""


def test_a_damaged_model_is_named(seer_command, arguments, folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for spoil in (None, ("tokenizer.json", "[]"), ("config.json", "[]"), ("config.json", "{")):
        if spoil:
            (tmp_path / "model" / spoil[0]).write_text(spoil[1])
        result = seer_command("inspect", *arguments["inspect"], "--model", tmp_path / "model")
        assert result.exit_code == 1, result.exception
        last = result.stderr.splitlines()[-1]
        assert last.startswith("error: ")
        assert str(tmp_path / "model") in last
    result = seer_command("bench", *arguments["bench"], "--model", tmp_path / "model")
    assert result.exit_code == 1
    assert str(tmp_path / "model") in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("command", ["distill", "eval", "inspect"])
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("surrogate.jsonl", json.dumps({"text": "words " * 90 + "\ud83d"}).encode(), "surrogate.jsonl:1 "),
        ("latin1.txt", "words caf\xe9".encode("latin-1"), "latin1.txt:1 is not UTF-8"),
        ("field.jsonl", b'{"body": "words"}\n', "field.jsonl:1 has no text under 'text'"),
    ],
)
def test_wrong_texts_are_one_sentence(command, name, content, said, seer_command, arguments, tmp_path):
    (tmp_path / name).write_bytes(content)
    result = seer_command(command, *arguments[command], "--data", tmp_path / name)
    assert result.exit_code == 1, result.exception
    assert said in result.stderr.splitlines()[-1]


def test_a_wrong_prompt_is_one_sentence(seer_command, arguments, tmp_path):
    (tmp_path / "prompt").write_bytes(b"one\ntwo \xe9")
    result = seer_command("inspect", *arguments["inspect"], "--text", tmp_path / "prompt")
    assert result.exit_code == 1
    assert f"{tmp_path / 'prompt'}:2 is not UTF-8" in result.stderr
