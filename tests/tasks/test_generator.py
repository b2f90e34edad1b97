"""Retrieval samples: exact lengths, answers where they are said to be, seeds, and keys that never meet."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import seerattention as seer
from seerattention.tasks import TASKS, TaskGenerator, TrainingMix, like_evaluation
from seerattention.tasks.generator import VALUES_PER_NAME
from seerattention.tasks.words import ADJECTIVES, NOUNS, is_test_key

LENGTH = 2048


@pytest.fixture(scope="module")
def books(tokenizer):
    texts = [text[:60_000] for text in seer.testbed.book_texts("test")[:2]]
    return [np.array(tokenizer.encode(text, add_special_tokens=False)) for text in texts]


def generator(tokenizer, books, seed=0, **options):
    return TaskGenerator(tokenizer, books, seed=seed, **options)


def questions_for(task):
    return 1 if task == "single" else 3


@pytest.mark.parametrize("task", TASKS)
def test_samples_have_the_length_and_answers_that_were_stated(tokenizer, books, task):
    sample = generator(tokenizer, books).sample(task, LENGTH, questions_for(task))
    ids = sample.input_ids
    assert ids.shape == sample.weights.shape == (LENGTH,)
    assert ids[0] == tokenizer.bos_token_id
    assert len(sample.questions) == questions_for(task)
    for question in sample.questions:
        assert len(question.answers) == {"multivalue": VALUES_PER_NAME, "variable": 2}.get(task, 1)
        for start, stop in question.answers:
            answer, before = tokenizer.decode(ids[start:stop]), tokenizer.decode(ids[:start])
            assert answer.strip() in before, f"{answer!r} is asked but was never stated"
            assert (sample.weights[start:stop] == 8).all()


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_gives_the_same_sample_and_another_seed_another_one(tokenizer, books, task):
    first, again, other = (
        generator(tokenizer, books, seed).sample(task, LENGTH, questions_for(task)).input_ids for seed in (3, 3, 4)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_generator_begins_anew(tokenizer, books):
    """With other books and draws, as a fresh one: nothing of what was drawn before is left, loose words among it."""
    maker = generator(tokenizer, books, split="train")
    mix = TrainingMix(maker)
    for seed in (3, 8):
        mix.sequence(LENGTH, tasks=1.0)
        maker.begin(books[1:], np.random.default_rng(seed))
        fresh = TrainingMix(generator(tokenizer, books[1:], seed, split="train"))
        for _ in range(4):
            assert np.array_equal(mix.distilling(LENGTH).input_ids, fresh.distilling(LENGTH).input_ids)
    with pytest.raises(ValueError, match="at least one non-empty book"):
        maker.begin([np.zeros(0, np.int64)], np.random.default_rng(0))


@pytest.mark.parametrize("length", [300, 512, LENGTH])
def test_samples_like_those_of_evaluation(tokenizer, books, length):
    maker, found = generator(tokenizer, books), set()
    for _ in range(60):
        sample = like_evaluation(maker, length)
        assert len(sample.input_ids) == length
        assert 1 <= len(sample.questions) <= max(1, length // 512)
        assert sample.questions[0].answers[0][0] > 0.2 * length
        found.add((sample.task, len(sample.questions)))
    assert {task for task, _ in found} == set(TASKS)
    assert length < LENGTH or max(count for _, count in found) == 4


def test_statements_lie_anywhere_in_the_text(tokenizer, books):
    maker, places = generator(tokenizer, books), []
    for _ in range(60):
        sample = maker.sample("single", LENGTH, 1)
        start, stop = sample.questions[0].answers[0]
        value = sample.input_ids[start:stop]
        found = [i for i in range(start - 2) if np.array_equal(sample.input_ids[i : i + len(value)], value)]
        places.append(found[0] / LENGTH)
    assert min(places) < 0.15
    assert max(places) > 0.8
    assert 0.35 < np.mean(places) < 0.65


def test_questions_stand_in_different_blocks(tokenizer, books):
    maker = generator(tokenizer, books)
    for _ in range(10):
        starts = [q.answers[0][0] for q in maker.sample("multikey", LENGTH, 4).questions]
        assert len({start // 64 for start in starts}) == 4


def test_keys_of_the_two_splits_are_disjoint(tokenizer, books):
    pairs = {(a, n) for a in ADJECTIVES for n in NOUNS}
    share = sum(is_test_key(pair) for pair in pairs) / len(pairs)
    assert 0.1 < share < 0.15
    seen = {}
    for split in ("train", "test"):
        pieces = generator(tokenizer, books, split=split).pieces
        keys = [tuple(tokenizer.decode(key).split()) for key in pieces.keys(500)]
        assert len(set(keys)) == 500
        assert all(is_test_key(key) == (split == "test") for key in keys)
        numbers = [int(tokenizer.decode(key)) for key in pieces.dictionary_keys(2000)]
        assert len(set(numbers)) == 2000
        seen[split] = set(keys) | set(numbers)
    assert not seen["train"] & seen["test"]


def test_random_words_of_training_never_spell_a_key_of_evaluation(tokenizer, books):
    pieces = generator(tokenizer, books, split="train").pieces
    listed = set(ADJECTIVES), set(NOUNS)
    for _ in range(30):
        words = tokenizer.decode(pieces.random_words(400)).split()
        for pair in itertools.pairwise(words):
            assert not (pair[0] in listed[0] and pair[1] in listed[1] and is_test_key(pair)), pair


def test_close_keys_share_their_words(tokenizer, books):
    pieces = generator(tokenizer, books, split="train").pieces
    keys = [tuple(tokenizer.decode(key).split()) for key in pieces.keys(60, close=True)]
    assert len(set(keys)) == 60
    assert len({adjective for adjective, _ in keys}) < 20
    assert len({noun for _, noun in keys}) < 20


def test_alike_keys_differ_in_one_word(tokenizer, books):
    pieces, shared = generator(tokenizer, books, split="train").pieces, set()
    for _ in range(20):
        keys = [tuple(tokenizer.decode(key).split()) for key in pieces.alike_keys(40)]
        assert len(set(keys)) == 40
        assert not any(is_test_key(key) for key in keys)
        adjectives, nouns = map(set, zip(*keys, strict=True))
        assert 1 in (len(adjectives), len(nouns))
        shared.add(len(nouns) == 1)
    assert shared == {True, False}
    with pytest.raises(ValueError, match="no word begins or ends 200 keys"):
        pieces.alike_keys(200)


def test_own_sentences(tokenizer, books):
    own = [("\nCode of{key}: {value}\n", "\nCode of{key} again: {value}\n")]
    sample = generator(tokenizer, books, templates=own).sample("single", LENGTH)
    text = tokenizer.decode(sample.input_ids)
    assert text.count("\nCode of ") == 2
    for wrong in ([("no key {value}", "{key}{value}")], [("{value}{key}", "{key}{value}")], []):
        with pytest.raises(ValueError, match="template"):
            generator(tokenizer, books, templates=wrong)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda g: g.sample("no such task", LENGTH), "must be one of"),
        (lambda g: g.sample("multikey", LENGTH, 0), "at least 1"),
        (lambda g: g.sample("single", LENGTH, 2), "use 'multikey'"),
        (lambda g: g.sample("multikey", 128, 4), "got length 128; use longer samples or fewer questions"),
        (lambda g: g.pieces.loose_keys(3), "for training only"),
    ],
)
def test_bad_requests_say_what_to_do(tokenizer, books, call, said):
    with pytest.raises(ValueError, match=said):
        call(generator(tokenizer, books))


def test_a_haystack_is_needed(tokenizer):
    with pytest.raises(ValueError, match="at least one non-empty book"):
        TaskGenerator(tokenizer, [])
    with pytest.raises(ValueError, match="'train' or 'test'"):
        TaskGenerator(tokenizer, [np.arange(10)], split="validation")


def test_short_books_run_on_into_the_next(tokenizer):
    maker = TaskGenerator(tokenizer, [np.arange(100, 130), np.arange(200, 230)], seed=0)
    text = maker.book_text(75)
    assert len(text) == 75
    assert {100, 200} <= set(text.tolist())


@pytest.mark.parametrize(("cue", "count"), [(8, 40), (1, 1), (24, 999)])
def test_lists_are_said_again_at_the_end(tokenizer, books, cue, count):
    maker, size, places = generator(tokenizer, books, seed=2), cue + count, []
    for _ in range(20):
        sample = maker.list_copy(LENGTH, cue, count)
        ids = sample.input_ids
        assert ids.shape == sample.weights.shape == (LENGTH,)
        assert ids[0] == tokenizer.bos_token_id
        assert [question.answers for question in sample.questions] == [((LENGTH - count, LENGTH),)]
        assert (sample.weights[-count:] == 8).all()
        text = ids[: LENGTH - size]
        found = np.flatnonzero((np.lib.stride_tricks.sliding_window_view(text, size) == ids[-size:]).all(-1))
        assert len(found) == 1 or size == 2
        assert all(place + size <= 3 * LENGTH // 4 for place in found[:1])
        places.append(int(found[0]))
    assert len(set(places)) > 1 or count == 999
    numbers = tokenizer.decode(ids[-size:])
    assert numbers.isdecimal()
    assert len(numbers) == 3 * size  # a token is a group of three digits


def test_lists_that_have_no_room(tokenizer, books):
    maker = generator(tokenizer, books)
    assert len(maker.list_copy(101, 10, 40).input_ids) == 101
    with pytest.raises(ValueError, match="a list of 50 tokens and its copy need 101 tokens, got length 100"):
        maker.list_copy(100, 10, 40)
    for wrong in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            maker.list_copy(100, *wrong)
