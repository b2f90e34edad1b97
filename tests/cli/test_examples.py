"""The examples must run as they stand, and stay short. (Lengths are cut for the test.)"""

import ast
import re
import runpy
from pathlib import Path

import pytest

import seerattention as seer

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))


def test_there_are_examples():
    told = {"quickstart", "distill_gates", "own_selector", "retrieval", "chat_with_a_book", "streaming", "pipeline"}
    assert told == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_short_and_documented(name):
    source = (EXAMPLES / f"{name}.py").read_text()
    assert len(source.splitlines()) <= 80
    assert f"python examples/{name}.py" in ast.get_docstring(ast.parse(source))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("quickstart", "of the attention blocks of 1536 tokens"),
        ("distill_gates", "at density 0.1"),
        ("own_selector", "sinks and window   density"),
        ("retrieval", "oracle 0.1   density"),
        ("chat_with_a_book", "sparse, turn 3: density 0.1"),
        ("streaming", "of the attention blocks of 1536 tokens"),
        ("pipeline", "1536 tokens at density"),
    ],
)
def test_example_runs(name, said, tiny_testbed, tmp_path, monkeypatch, capsys):
    module = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    main = module["main"]
    for constant, value in {"LENGTH": 1536, "STEPS": 2, "QUESTIONS": 2}.items():
        if constant in main.__globals__:
            monkeypatch.setitem(main.__globals__, constant, value)
    monkeypatch.chdir(tmp_path)
    main()
    assert said in capsys.readouterr().out


def test_chat_is_sparse_on_the_cache_and_takes_a_model_of_ones_own(folder, tiny_testbed, monkeypatch, capsys):
    main = runpy.run_path(str(EXAMPLES / "chat_with_a_book.py"))["main"]
    monkeypatch.setitem(main.__globals__, "LENGTH", 768)
    attach = seer.attach
    monkeypatch.setattr(seer, "attach", lambda *given, **options: attach(*given, **options, min_context=0))
    main(str(folder / "model"), str(folder / "gates"))
    found = re.findall(r"(\w+), turn (\d): density ([0-9.]+), (\d+) new tokens", capsys.readouterr().out)
    assert [(way, turn) for way, turn, _, _ in found] == [(way, turn) for way in ("dense", "sparse") for turn in "123"]
    densities = {(way, turn): float(density) for way, turn, density, _ in found}
    assert {densities["dense", turn] for turn in "123"} == {1.0}
    assert all(densities["sparse", turn] < 0.5 for turn in "123")  # turn 2 is a chunk shorter than a block
    tokens = {(way, turn): int(count) for way, turn, _, count in found}
    assert tokens["dense", "1"] == tokens["sparse", "1"] > 768
    assert tokens["sparse", "2"] < 64 < 256 < tokens["sparse", "3"] < 400
