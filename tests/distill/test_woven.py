"""Retrieval tasks that are woven into packed text: what they are, from which draws, and in runs that are resumed."""

from __future__ import annotations

import json
import re
import time
from itertools import islice

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import seerattention as seer
from seerattention.distillation import Repeats, Woven, distill
from seerattention.distillation.config import DistillConfig
from seerattention.distillation.data import PackedText, Position
from seerattention.tasks.pieces import MULTIVALUE_QUESTION, NEEDLE_TEMPLATES
from seerattention.tasks.words import ADJECTIVES, NOUNS, TEST_SHARE, is_test_key

from ..evaluate.tiny import make_tokenizer
from .stopping import assert_same_gates, resumed, stopped, texts
from .tiny import attached_llama, tiny_tokenizer

LENGTH = 2048


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(seer.testbed.model_path())


@pytest.fixture(scope="module")
def book(tokenizer):
    ids = tokenizer.encode(seer.testbed.book_texts("train")[0][:120_000], add_special_tokens=False)
    return torch.tensor([tokenizer.bos_token_id, *ids])


@pytest.fixture(scope="module")
def woven(tokenizer):
    return Woven(tokenizer, 1.0, seed=3)


@pytest.fixture(scope="module")
def made(woven, book):
    """Sixty sequences of the same text."""
    return [woven.apply(book[:LENGTH], place) for place in range(60)]


def test_sequences_keep_length_kind_and_first_token(woven, book):
    before = book[:LENGTH].clone()
    for length, dtype in ((512, torch.int64), (LENGTH, torch.int32)):
        for place in range(20):
            ids = book[7 : length + 7].to(dtype)  # its first token is one like any other
            found = woven.apply(ids, place, 1, 2)
            assert found.shape == ids.shape
            assert found.dtype == ids.dtype
            assert found[0] == ids[0]
    assert torch.equal(book[:LENGTH], before)


def test_draws_follow_from_seed_and_place(tokenizer, woven, book):
    """Whatever was drawn before, and by another object as by this one."""
    ids, fresh = book[:LENGTH], Woven(tokenizer, 1.0, seed=3)
    for place in (9, 4, 9):
        assert torch.equal(woven.apply(ids, 1, place), fresh.apply(ids, 1, place))
        woven.apply(book[LENGTH : 2 * LENGTH], 5, place)
    expected = woven.apply(ids, 1, 4)
    assert not torch.equal(expected, woven.apply(ids, 1, 5))
    assert not torch.equal(expected, Woven(tokenizer, 1.0, seed=4).apply(ids, 1, 4))


def test_the_share_of_the_sequences(tokenizer, book):
    ids, quarter = book[:512], Woven(tokenizer, 0.25)
    chosen = [quarter.apply(ids, place) is not ids for place in range(1000)]
    assert 0.25 - 0.055 < sum(chosen) / 1000 < 0.25 + 0.055  # four standard errors
    assert all(Woven(tokenizer, 0.0).apply(ids, place) is ids for place in range(50))
    # Passages are said again in as many of those that were not chosen as of all.
    again = [not torch.equal(Repeats(0.25).apply(ids, place), ids) for place in range(1000)]
    both = sum(a and b for a, b in zip(chosen, again, strict=True))
    assert 20 < both < 110


def test_the_background_is_the_sequence(made, book):
    """Tokens that no statement took are the sequence's own, in their order: passages of them stand in it."""
    text = book[1:LENGTH].tolist()
    places = {tuple(text[i : i + 6]): i for i in range(len(text) - 6)}
    for ids in made:
        found = [places[key] for i in range(LENGTH - 6) if (key := tuple(ids[i : i + 6].tolist())) in places]
        assert len(found) > 0.05 * LENGTH


def asked(text):
    """(place of the question, what must stand before it, its key) of every question that such a text has."""
    for match in re.finditer('Value of "([0-9]{6})" is "([0-9]{6})"', text):
        yield match.start(), f'"{match[1]}": "{match[2]}"', match[1]
    for statement, question in NEEDLE_TEMPLATES:
        pattern = re.escape(question).replace(r"\{key\}", "( [a-z]+ [a-z]+)").replace(r"\{value\}", "([0-9]{6})")
        for match in re.finditer(pattern, text):
            said = statement.strip().replace("{key}", match[1]).replace("{value}", match[2])
            yield match.start(), said, tuple(match[1].split())


def test_what_is_asked_was_said_before(tokenizer, made):
    """And is never asked for in evaluation."""
    pairs, numbers, late = [], [], []
    for ids in made:
        text = tokenizer.decode(ids)
        for place, said, key in asked(text):
            assert said in text[:place], said
            (numbers if isinstance(key, str) else pairs).append(key)
            late.append(place / len(text))
    assert len(numbers) > 30
    assert len(pairs) > 30
    assert not any(int(number) % TEST_SHARE == 0 for number in numbers)
    listed = [pair for pair in pairs if pair[0] in ADJECTIVES and pair[1] in NOUNS]
    assert len(listed) > 20
    assert not any(is_test_key(pair) for pair in listed)
    assert np.mean(np.array(late) > 0.75) > 0.6


def test_every_kind_of_task_is_woven(tokenizer, made):
    texts = [tokenizer.decode(ids) for ids in made]
    several = MULTIVALUE_QUESTION[0].split("{")[0]
    signs = ["Value of", several, "What is the number of the", "the same number as the"]
    for sign in signs:
        assert 0 < sum(sign in text for text in texts) < len(texts), sign


def test_a_sequence_takes_little_time(woven, book):
    """Far less than a step on it."""
    ids = book[:16_384]
    assert len(ids) == 16_384
    woven.apply(ids, 0)
    start = time.perf_counter()
    for place in range(20):
        woven.apply(ids, place)
    assert (time.perf_counter() - start) / 20 < 0.1


@pytest.mark.parametrize("length", [512, 1024, 4096])
def test_tokenizers_that_know_no_numbers(length):
    """Digits and quotes are tokens each, so that entries of dictionaries are twice as long as they commonly are."""
    ids, woven = torch.arange(length), Woven(make_tokenizer(), 1.0)
    for place in range(200):
        assert len(woven.apply(ids, place)) == length


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"share": -0.1}, "tasks must be a share of the sequences, from 0 to 1, got -0.1"),
        ({"share": 1.01}, "tasks must be a share"),
        ({"share": float("nan")}, "tasks must be a share"),
        ({"share": True}, "tasks must be a share"),
        ({"share": 0.5, "seed": -1}, "seed must be"),
        ({"share": 0.5, "seed": 0.5}, "seed must be"),
    ],
)
def test_values_out_of_range(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Woven(None, **options)


def test_the_shortest_sequences(woven, book):
    woven.check_length(512)
    for call in (lambda: woven.check_length(511), lambda: woven.apply(book[:511], 0)):
        with pytest.raises(ValueError, match="tasks need sequences of at least 512 tokens, got 511"):
            call()


# ---- packed text -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half(tokenizer):
    return Woven(tokenizer, 0.5, seed=7)


@pytest.fixture
def packed(half, book):
    def make(tasks=half, **options):
        documents = [" ".join(map(str, book[1000 * i : 1000 * i + 900 + 60 * i].tolist())) for i in range(9)]
        options = {"length": 512, "batch_size": 2, "start": Position(0, 1, 3), **options}
        return PackedText(
            lambda skip: iter(documents[skip:]), lambda text: [int(word) for word in text.split()], tasks=tasks,
            **options,
        )  # fmt: skip

    return make


def rows(batches):
    return [row for batch in batches for row in batch["input_ids"].tolist()]


def test_packed_text_has_tasks(tokenizer, packed):
    plain, made = rows(packed(None)), rows(packed())
    assert len(made) == len(plain) > 8
    assert [row[0] for row in made] == [row[0] for row in plain]
    changed = [a != b for a, b in zip(made, plain, strict=True)]
    assert 0 < sum(changed) < len(plain)
    assert rows(packed(Woven(tokenizer, 0.0))) == plain


def test_the_others_say_passages_again(packed):
    plain, tasks, both = rows(packed(None)), rows(packed()), rows(packed(repeats=Repeats(1.0)))
    for text, with_tasks, row in zip(plain, tasks, both, strict=True):
        if with_tasks != text:
            assert row == with_tasks
        elif row != text:  # a sequence that was chosen may be text alone
            assert row[:384] == text[:384]
    assert sum(row != text for text, row in zip(tasks, both, strict=True)) > 2


def test_each_pass_has_others(packed):
    count = len(rows(packed()))
    twice = rows(islice(packed(repeat=True), count))
    assert twice[:count] == rows(packed())
    assert twice[:count] != twice[count:]


@pytest.mark.parametrize("stop", [0, 1, 3, 7])
def test_position_resumes_exactly(packed, stop):
    whole = rows(islice(packed(repeat=True, repeats=Repeats(0.5)), 9))
    first = packed(repeat=True, repeats=Repeats(0.5))
    part = rows(islice(first, stop))
    second = packed(repeat=True, repeats=Repeats(0.5))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert part + rows(islice(second, 9 - stop)) == whole


def test_processes_share_the_same_sequences(packed):
    single = rows(packed(batch_size=4))
    shares = [rows(packed(batch_size=2, rank=rank, world_size=2)) for rank in range(2)]
    merged = []
    for i in range(0, len(shares[0]), 2):
        merged += [row for share in shares for row in share[i : i + 2]]
    assert merged == single


def test_other_tasks_are_refused(tokenizer, packed):
    first = packed()
    list(islice(first, 2))
    state = json.loads(json.dumps(first.state_dict()))
    for other in (None, Woven(tokenizer, 0.25, seed=7), Woven(tokenizer, 0.5, seed=8)):
        with pytest.raises(ValueError, match=r"packed in another way: tasks was \{'share': 0.5"):
            packed(other).load_state_dict(state)
    plain = packed(None)
    list(islice(plain, 2))
    earlier = plain.state_dict()
    del earlier["settings"]["tasks"]  # as earlier versions wrote it
    packed(None).load_state_dict(earlier)
    with pytest.raises(ValueError, match="tasks was None, now"):
        packed().load_state_dict(earlier)


def test_sequences_too_short_for_tasks(tokenizer, packed):
    with pytest.raises(ValueError, match="tasks need sequences of at least 512 tokens"):
        packed(length=511)
    assert packed(Woven(tokenizer, 0.0), length=511).tasks is None


def test_a_run_goes_on_with_its_tasks(tmp_path):
    tokenizer = tiny_tokenizer()

    def batches(share):
        return PackedText(
            lambda skip: iter(texts(30)[skip:]), lambda text: [int(word) for word in text.split()], length=512,
            batch_size=1, repeat=True, tasks=Woven(tokenizer, share),
        )  # fmt: skip

    config, path = DistillConfig(steps=5, warmup=2), tmp_path / "state"
    whole = attached_llama()
    expected = distill(whole, batches(0.5), config)
    stopped(path, batches(0.5), at=3, config=config)
    with pytest.raises(ValueError, match="tasks was"):
        resumed(path, batches(0.4), config=config)
    model, history = resumed(path, batches(0.5), config=config)
    assert history.loss == expected.loss
    assert_same_gates(model, whole)
    assert expected.loss != distill(attached_llama(), batches(0.0), config).loss
