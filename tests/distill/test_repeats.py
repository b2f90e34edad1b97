"""Passages that are said again: what they are, from which draws, and in packed text that is resumed and shared."""

from __future__ import annotations

import json
from itertools import islice, pairwise

import pytest
import torch

from seerattention.distillation import Repeats, distill
from seerattention.distillation.config import DistillConfig
from seerattention.distillation.data import PackedText, Position
from seerattention.distillation.repeats import say_again

from .stopping import assert_same_gates, resumed, stopped, texts
from .tiny import attached_llama


def test_say_again():
    ids = torch.arange(20).view(2, 10)
    made = say_again(ids, 6, [(1, 2), (0, 5)])
    assert made.tolist() == [[0, 1, 2, 3, 4, 5, 1, 2, 0, 1], [10, 11, 12, 13, 14, 15, 11, 12, 10, 11]]
    assert say_again(ids[0], 6, [(1, 2)]).tolist() == [0, 1, 2, 3, 4, 5, 1, 2, 8, 9]
    assert ids.tolist() == [list(range(10)), list(range(10, 20))]


def passages(made, first):
    """(start, size) of what follows ``first`` in a sequence whose tokens were their places."""
    tail = made[first:].tolist()
    cuts = [0, *(i for i in range(1, len(tail)) if tail[i] != tail[i - 1] + 1), len(tail)]
    return [(tail[a], b - a) for a, b in pairwise(cuts)]


@pytest.mark.parametrize("length", [32, 128, 333, 1000, 2048])
def test_the_last_quarter_is_made_of_passages_of_what_lies_before_it(length):
    repeats, ids = Repeats(1.0, seed=3), torch.arange(length)
    first = length - length // 4
    starts, sizes = set(), set()
    for place in range(60):
        made = repeats.apply(ids, place)
        assert made.shape == ids.shape
        assert made.dtype == ids.dtype
        assert torch.equal(made[:first], ids[:first])
        found = passages(made, first)
        assert all(start >= 1 and start + size <= first for start, size in found)
        # Two passages that happen to join read as one, so the least is exact and the most is not.
        assert all(size >= 8 for _, size in found[:-1])
        starts |= {start for start, _ in found}
        sizes |= {size for _, size in found[:-1]}
    assert torch.equal(ids, torch.arange(length))
    assert len(starts) > min(50, first // 4)
    assert max(starts) - min(starts) > 0.5 * (first - 8)
    if length == 2048:
        assert min(sizes) < 12
        assert 120 < sorted(sizes)[-4] <= 256


def test_draws_follow_from_seed_and_place():
    ids = torch.arange(512)
    made = Repeats(1.0, seed=1).apply(ids, 4, 5, 6)
    assert torch.equal(made, Repeats(1.0, seed=1).apply(ids, 4, 5, 6))
    for other in (Repeats(1.0, seed=2).apply(ids, 4, 5, 6), Repeats(1.0, seed=1).apply(ids, 4, 5, 7)):
        assert not torch.equal(made, other)


def test_the_share_of_the_sequences():
    ids = torch.arange(128)
    changed = [not torch.equal(Repeats(0.25).apply(ids, place), ids) for place in range(2000)]
    assert 0.25 - 0.04 < sum(changed) / 2000 < 0.25 + 0.04  # four standard errors
    assert all(torch.equal(Repeats(0.0).apply(ids, place), ids) for place in range(50))


def test_other_parts_and_sizes():
    made = Repeats(1.0, part=0.5, shortest=5, longest=5).apply(torch.arange(100), 0)
    assert torch.equal(made[:50], torch.arange(50))
    for passage in made[50:].view(10, 5):
        assert torch.equal(passage.diff(), torch.ones(4, dtype=torch.int64))
        assert 1 <= passage[0] <= 45


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"share": -0.1}, "share of the sequences, from 0 to 1, got -0.1"),
        ({"share": 1.01}, "share of the sequences"),
        ({"share": float("nan")}, "share of the sequences"),
        ({"share": True}, "share of the sequences"),
        ({"share": 0.5, "part": 1.0}, "part must be"),
        ({"share": 0.5, "part": 0.0}, "part must be"),
        ({"share": 0.5, "shortest": 0}, "shortest and longest"),
        ({"share": 0.5, "shortest": 300}, "got 300 and 128"),
        ({"share": 0.5, "longest": 64.0}, "shortest and longest"),
        ({"share": 0.5, "seed": -1}, "seed must be"),
    ],
)
def test_values_out_of_range(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Repeats(**options)


@pytest.mark.parametrize(
    ("repeats", "least"),
    [
        (Repeats(1.0), 32),
        (Repeats(1.0, part=0.5), 17),
        (Repeats(1.0, part=0.9), 81),
        (Repeats(1.0, shortest=1, longest=9), 4),
    ],
)
def test_the_shortest_sequences(repeats, least):
    repeats.check_length(least)
    repeats.apply(torch.arange(least), 0)
    for call in (lambda: repeats.check_length(least - 1), lambda: repeats.apply(torch.arange(least - 1), 0)):
        with pytest.raises(ValueError, match=f"at least {least} tokens.*got {least - 1}"):
            call()


# ---- packed text -----------------------------------------------------------------------------------------------------

REPEATS = Repeats(0.5, shortest=2, longest=6, seed=7)


def packed(repeats=REPEATS, **options):
    documents = [" ".join(str(100 * i + j) for j in range(17 + 5 * i)) for i in range(9)]
    options = {"length": 16, "batch_size": 2, "start": Position(0, 1, 3), **options}
    return PackedText(
        lambda skip: iter(documents[skip:]), lambda text: [int(word) for word in text.split()], repeats=repeats,
        **options,
    )  # fmt: skip


def rows(batches):
    return [row for batch in batches for row in batch["input_ids"].tolist()]


def test_packed_text_says_passages_again():
    plain, made = rows(packed(None)), rows(packed())
    assert len(made) == len(plain) > 8
    assert [row[:12] for row in made] == [row[:12] for row in plain]
    changed = [i for i, (a, b) in enumerate(zip(made, plain, strict=True)) if a != b]
    assert 0 < len(changed) < len(plain)
    for i in changed:
        assert set(made[i][12:]) <= set(plain[i][1:12])
    assert rows(packed(Repeats(0.0, shortest=2, longest=6))) == plain


def test_each_pass_says_others_again():
    count = len(rows(packed()))
    twice = rows(islice(packed(repeat=True), count))
    assert [row[:12] for row in twice[:count]] == [row[:12] for row in twice[count:]]
    assert twice[:count] == rows(packed())
    assert twice[:count] != twice[count:]


@pytest.mark.parametrize("stop", [0, 1, 4, 9, 13])
def test_position_resumes_exactly(stop):
    whole = rows(islice(packed(repeat=True), 16))
    first = packed(repeat=True)
    part = rows(islice(first, stop))
    second = packed(repeat=True)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert part + rows(islice(second, 16 - stop)) == whole


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_same_sequences(processes):
    single = rows(packed(batch_size=4))
    size = 4 // processes
    shares = [rows(packed(batch_size=size, rank=rank, world_size=processes)) for rank in range(processes)]
    merged = []
    for i in range(0, len(shares[0]), size):
        merged += [row for share in shares for row in share[i : i + size]]
    assert merged == single
    assert single != rows(packed(None, batch_size=4))


def test_other_repeats_are_refused():
    first = packed()
    list(islice(first, 2))
    state = json.loads(json.dumps(first.state_dict()))
    others = [None, Repeats(0.25, shortest=2, longest=6, seed=7), Repeats(0.5, shortest=2, longest=6, seed=8)]
    for other in others:
        with pytest.raises(ValueError, match=r"packed in another way: repeats was \{'share': 0.5"):
            packed(other).load_state_dict(state)
    plain = packed(None)
    list(islice(plain, 2))
    earlier = plain.state_dict()
    del earlier["settings"]["repeats"]  # as earlier versions wrote it
    packed(None).load_state_dict(earlier)
    with pytest.raises(ValueError, match="repeats was None, now"):
        packed().load_state_dict(earlier)


def test_sequences_too_short_for_passages():
    with pytest.raises(ValueError, match="repeats need sequences of at least 32 tokens"):
        packed(Repeats(0.1))
    assert packed(Repeats(0.0)).repeats is None


def test_a_run_goes_on_with_its_repeats(tmp_path):
    def batches(repeats):
        return PackedText(
            lambda skip: iter(texts()[skip:]), lambda text: [int(word) for word in text.split()], length=130,
            batch_size=1, repeat=True, repeats=repeats,
        )  # fmt: skip

    config, path = DistillConfig(steps=6, warmup=2), tmp_path / "state"
    whole = attached_llama()
    expected = distill(whole, batches(Repeats(0.5)), config)
    stopped(path, batches(Repeats(0.5)), at=3, config=config)
    with pytest.raises(ValueError, match="repeats was"):
        resumed(path, batches(Repeats(0.4)), config=config)
    model, history = resumed(path, batches(Repeats(0.5)), config=config)
    assert history.loss == expected.loss
    assert_same_gates(model, whole)
    assert expected.loss != distill(attached_llama(), batches(None), config).loss
