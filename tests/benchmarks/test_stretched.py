"""``benchmarks.stretched``: its cases, and a whole run on the embedded model."""

from __future__ import annotations

import json

import numpy as np
import pytest
from benchmarks.stretched import RECALLS, TASKS, _joined, main, parse_case


def test_cases():
    assert parse_case("none@32768") == ("none", 32768)
    assert parse_case("yarn:2@65536") == ("yarn:2", 65536)
    for wrong in ("yarn:2", "yarn@1024", "none@1", "yarn:0.5@1024", "@"):
        with pytest.raises(ValueError):
            parse_case(wrong)


def test_books_are_joined_until_they_are_long_enough():
    books = [np.full(size, place) for place, size in enumerate((3, 4, 8, 5, 1))]
    found = _joined(books, 6)
    assert [text.tolist() for text in found] == [[0] * 3 + [1] * 4, [2] * 8, [3] * 5 + [4]]


def test_a_whole_run(tmp_path, capsys):
    options = ["--cases", "none@512", "yarn:2@512", "--count", "2", "--questions", "2", "--documents", "1"]
    assert main(["--device", "cpu", *options, "--output", str(tmp_path)]) == 0
    (run,) = json.loads((tmp_path / "stretched.json").read_text())["runs"]
    found = {(r["case"]["scaling"], r["case"]["attention"]): r["metrics"] for r in run["results"]}
    assert list(found) == [(s, a) for s in ("none", "yarn:2") for a in ("dense", "sparse")]
    plain, stretched = found["none", "dense"], found["yarn:2", "dense"]
    assert plain["perplexity"] != stretched["perplexity"]  # the model is another one
    for (_, attention), metrics in found.items():
        assert all(0 <= metrics[f"{task}_accuracy"] <= 1 for task in TASKS)
        assert (metrics["density"] < 1) == (attention == "sparse")
        assert (attention == "sparse") == all(f"recall_{name}" in metrics for name in RECALLS)
    assert 0 < found["yarn:2", "sparse"]["recall_block"] < 1
    assert "block recall" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "sentence"), [("--count=0", "--count must be at least 1"), ("--cases=yarn@1", "yarn:2@65536")]
)
def test_wrong_options(argument, sentence, capsys):
    with pytest.raises(SystemExit):
        main([argument])
    assert sentence in capsys.readouterr().err
