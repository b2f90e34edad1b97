"""In which layers and heads look-up is seen, and what is said about it."""

from __future__ import annotations

import numpy as np
import pytest
from testbed.card import _look_up
from testbed.look_up import _needle, best_heads, look_up, verdict

import seerattention as seer
from seerattention.tasks import TaskGenerator


@pytest.fixture(scope="module")
def embedded():
    return seer.testbed.load("cpu")


@pytest.fixture
def generator(embedded):
    book = np.array(embedded[1].encode(seer.testbed.book_texts("test")[0][:60_000], add_special_tokens=False))
    return TaskGenerator(embedded[1], [book], seed=1)


def test_the_embedded_model_looks_up_in_layers_2_and_3(embedded, generator):
    found = look_up(embedded[0], generator, length=1024, samples=3)
    assert (found["length"], found["samples"]) == (1024, 3)
    assert [len(heads) for heads in found["mass"]] == [8] * 8
    shares = [share for _, share in best_heads(found["mass"])]
    assert [layer for layer, share in enumerate(shares) if share > 0.5] == [2, 3]
    assert min(found["mass"][2]) > 0.9, "every head of layer 2"
    assert max(max(heads) for heads in found["mass"]) <= 1 + 1e-5
    assert verdict(found["mass"]) == "It looks things up in layers 2 and 3."
    assert verdict(found["mass"], found["wide"]) == "It looks things up in layers 2 and 3."
    # The last token is one of the question's, and the needle is part of what is around it.
    for narrow, wide in zip(found["mass"], found["wide"], strict=True):
        assert all(a <= b + 1e-5 for a, b in zip(narrow, wide, strict=True))
        assert max(wide) <= 1 + 1e-5
    with pytest.raises(ValueError, match="attach"):
        seer.detach(embedded[0])  # it was left as it came


def test_the_needle_is_name_and_number(embedded, generator):
    for _ in range(20):
        sample = generator.sample("single", 700)
        start, stop = sample.questions[0].answers[0]
        said = embedded[1].decode(sample.input_ids[_needle(sample)])
        question = embedded[1].decode(sample.input_ids[:stop])[-70:]
        assert said.endswith(embedded[1].decode(sample.input_ids[start:stop]))
        assert " ".join(said.split()[:2]) in question


def test_what_is_looked_up_from_elsewhere_is_said():
    """Seen once: a model that answers everything, and whose last tokens do not look at the needle."""
    nothing, layer_3 = [[0.05], [0.0], [0.04], [0.02]], [[0.1], [0.2], [0.3], [0.8]]
    said = ", from another token of the question or next to the needle"
    assert verdict(nothing, layer_3) == f"It looks things up in layer 3{said}."
    assert verdict(nothing, layer_3[::-1]).startswith(f"Warning: look-up begins in layer 0{said}")
    assert verdict(nothing, nothing) == verdict(nothing)
    assert f"in layer 3{said}" in _look_up(
        {"look_up": {"length": 4096, "samples": 16, "mass": nothing, "wide": layer_3}}
    )


@pytest.mark.parametrize(
    ("best", "said"),
    [
        ([0.0, 0.0, 0.9, 0.4], "It looks things up in layer 2."),
        ([0.1, 0.99, 0.9, 0.4], "Warning: look-up begins in layer 1, where gates of one vector a block cannot follow"),
        ([0.1, 0.2, 0.3, 0.4], "Warning: no head has 50% of its attention on the needle"),
    ],
)
def test_the_card_says_where_and_warns(best, said):
    mass = [[0.0, share] for share in best]
    card = _look_up({"look_up": {"length": 4096, "samples": 16, "mass": mass}})
    assert f"| 2 | 1 | {best[2]:.3f} |" in card
    assert said in card
    assert ("**Warning" in card) == said.startswith("Warning")
    assert _look_up({}) == ""
