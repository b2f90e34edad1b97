"""The examples must run as they stand, and stay short. (Lengths are cut for the test.)"""

import ast
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))


def test_there_are_examples():
    assert {"quickstart", "distill_gates", "own_selector", "retrieval"} <= set(NAMES)


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
