"""Scores of answers, on cases made by hand."""

import pytest

from seerattention.tasks.scoring import (
    SCORES,
    copied_share,
    exact_match,
    listed_share,
    normalised,
    normalised_match,
    score_answer,
)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (" 123456", 1),
        (' "123456".\nAnd', 1),
        ("123456, 654321", 1),
        ("1234567", 0),
        ("123456-7", 0),
        ("the 123456", 0),
        ("12345", 0),
        ("", 0),
    ],
)
def test_exact_match(text, right):
    assert exact_match(text, "123456") == score_answer("exact", text, ["123456"]) == right


def test_exact_match_knows_case_and_takes_words_literally():
    assert exact_match(" Abc", "abc") == 0
    assert exact_match(" a.c", "a.c") == 1
    assert exact_match(" abc", "a.c") == 0


@pytest.mark.parametrize(
    ("text", "share"),
    [
        (" 11, 22, 33, 44.", 1),
        ("44 and 22", 0.5),
        ("11 11 11 11", 0.25),
        ("112233", 0),
        ("golden-castle 11-22", 0.5),
        ("", 0),
    ],
)
def test_listed_share(text, share):
    assert (
        listed_share(text, ["11", "22", "33", "44"]) == score_answer("listed", text, ["11", "22", "33", "44"]) == share
    )


def test_normalised_as_for_squad():
    assert normalised("The  U.S. Army, an institution!") == "us army institution"
    assert normalised("The The") == "the the"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (" The Normans.", 1),
        ("It was the normans, of course", 1),
        ("Normandy", 0),
        ("Vikings\nThe Normans", 0),
        ("\n\nNormans", 1),
        ("north men", 1),
        ("", 0),
    ],
)
def test_normalised_match(text, right):
    answers = ["Normans", "the North-Men", "north men"]
    assert normalised_match(text, answers) == score_answer("normalised", text, answers) == right


def test_copied_share():
    assert copied_share([1, 2, 3, 4], [1, 2, 3, 4]) == 1
    assert copied_share([1, 2, 9, 4], [1, 2, 3, 4]) == 0.5
    assert copied_share([9], [1, 2]) == 0
    assert copied_share([1], [1, 2]) == 0.5
    with pytest.raises(ValueError, match="at least one token"):
        copied_share([1], [])


def test_refused():
    with pytest.raises(ValueError, match="score must be exact"):
        score_answer("copied", "a", ["a"])
    with pytest.raises(ValueError, match="at least one right answer"):
        score_answer("exact", "a", [])
    assert set(SCORES) == {"exact", "listed", "normalised", "copied"}
