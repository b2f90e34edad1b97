"""What a model card says of the hard line: met, missed and where, or not known."""

from __future__ import annotations

import pytest
from testbed.card import HARD_LENGTH, HARD_LINE, _dense, _sparse


def scores(**changes):
    exact = {**HARD_LINE, **changes}
    return {"retrieval": {task: {HARD_LENGTH: {"exact": exact[task], "error": 0.0}} for task in HARD_LINE}}


def test_hard_line():
    assert "The hard line is met." in _dense(scores())
    card = _dense(scores(multikey=0.9))
    assert "misses its hard line: multikey 90.0 % < 97 %" in card
    assert "is met." not in card


@pytest.mark.parametrize("left_out", [("keyvalue",), tuple(HARD_LINE)])
def test_what_was_not_measured_is_not_met(left_out):
    dense = scores()
    for task in left_out:
        dense["retrieval"][task] = {"512": {"exact": 1.0, "error": 0.0}}
    card = _dense(dense)
    assert f"not known: not measured there: {', '.join(left_out)}" in card
    assert "is met." not in card


def test_sparse_scores_say_how_they_were_got():
    def results(**method):
        score = {"accuracy": 0.5, "standard_error": None, "samples": 1, "questions": 2}
        entry = {"setting": "gates 0.1", "length": 4096, "density": 0.112, "tasks": {"single": score}}
        return {"retrieval": [entry | method]}

    card = _sparse([results(method="generate")])
    assert "generated greedily" in card
    assert "teacher forcing" not in card
    assert "| gates 0.1 at 4,096 | 0.112 | 50.0 |" in card  # a single sample has no error
    assert "teacher forcing" in _sparse([results()])
