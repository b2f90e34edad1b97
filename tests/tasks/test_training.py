"""Training sequences: whatever is asked in one was stated before in it, and the losses weigh what they should."""

from __future__ import annotations

import numpy as np
import pytest

import seerattention as seer
from seerattention.tasks import TaskGenerator, TrainingMix
from seerattention.tasks.training import DRILL_MIX, LONG_DRILL, PAIR_KEYS, SHORT_DRILLS, TASK_MIX


@pytest.fixture(scope="module")
def book(tokenizer):
    return np.array(tokenizer.encode(seer.testbed.book_texts("train")[0][:60_000], add_special_tokens=False))


@pytest.fixture
def generator(tokenizer, book):
    return TaskGenerator(tokenizer, [book], split="train", seed=5)


def mix_of(generator, kind, drill):
    return TrainingMix(generator, **({"drill_mix" if drill else "task_mix": {kind: 1.0}}))


@pytest.mark.parametrize("length", [128, 512, 2048])
@pytest.mark.parametrize("kind", sorted(DRILL_MIX))
def test_drills(generator, tokenizer, kind, length):
    if length < LONG_DRILL and kind not in SHORT_DRILLS:
        pytest.skip("drills of this kind begin longer")
    sample = mix_of(generator, kind, drill=True).sequence(length, drills=1.0)
    assert sample.task == f"drill_{kind}"
    check(sample, length, tokenizer)


@pytest.mark.parametrize("length", [256, 1024, 4096])
@pytest.mark.parametrize("kind", sorted(TASK_MIX))
def test_tasks_in_book_text(generator, tokenizer, kind, length):
    sample = mix_of(generator, kind, drill=False).sequence(length, tasks=1.0)
    assert sample.task == kind
    check(sample, length, tokenizer)


def check(sample, length, tokenizer):
    ids, weights = sample.input_ids, sample.weights
    assert ids.shape == weights.shape == (length,)
    assert ids[0] == tokenizer.bos_token_id
    scored = weights >= 3 if sample.task.endswith("copy") else weights == 8
    assert scored.any(), "nothing to learn"
    for place in np.flatnonzero(scored):
        assert ids[place] in ids[:place], f"token {place} is asked, but was never stated"


def test_plain_book_text(generator, tokenizer):
    sample = TrainingMix(generator).sequence(700, tasks=0.0)
    assert sample.task == "text"
    assert (sample.weights == 1).all()


def test_every_kind_is_drawn(generator):
    mix = TrainingMix(generator)
    kinds = {mix.sequence(512, tasks=1.0, drills=0.5).task for _ in range(300)}
    assert kinds == {*TASK_MIX, *(f"drill_{kind}" for kind in DRILL_MIX)}


def test_few_and_many_names(generator):
    mix = mix_of(generator, "multikey", drill=False)
    asked = [int((mix.sequence(4096, tasks=1.0).weights == 8).sum()) // 2 for _ in range(60)]
    assert min(asked) < 8
    assert max(asked) > 60


@pytest.mark.parametrize("kind", [*PAIR_KEYS, "single", "number"])
@pytest.mark.parametrize("form", ["needles", "multivalue", "variable"])
def test_keys_are_of_the_kinds_asked_for(generator, kind, form, monkeypatch):
    """In drills and in book text alike: no other kind of key is drawn."""
    mix = TrainingMix(generator, {"multikey": 1.0}, {form: 1.0}, {kind: 1.0})
    drawn = []
    for name, other in (("keys", "listed"), ("alike_keys", "alike"), ("loose_keys", "loose")):
        plain = getattr(mix.pieces, name)

        def spy(count, *, close=False, plain=plain, other=other):
            drawn.append("close" if close else other)
            return plain(count, close=True) if close else plain(count)

        monkeypatch.setattr(mix.pieces, name, spy)
    for drills in (0.0, 1.0):
        check(mix.sequence(512, tasks=1.0, drills=drills), 512, generator.pieces.tokenizer)
    assert set(drawn) == ({kind} if kind in PAIR_KEYS else set())


def test_copies_of_numbers_and_of_words(generator, tokenizer):
    numbers = mix_of(generator, "copy", drill=True).sequence(256, drills=1.0).input_ids[1:]
    words = mix_of(generator, "wordcopy", drill=True).sequence(256, drills=1.0).input_ids[1:]
    assert tokenizer.decode(numbers).isdigit()
    assert tokenizer.decode(words).replace(" ", "").isalpha()


@pytest.mark.parametrize(
    ("mixes", "said"),
    [
        ({"task_mix": {"multikeys": 1.0}}, "task_mix may hold copy, few, .*, got multikeys"),
        ({"drill_mix": {"alike": 1.0, "like": 1.0}}, "drill_mix may hold alike, .*, got like"),
        ({"key_mix": {"near": 1.0}}, "key_mix may hold alike, close, .*, got near"),
        ({"key_mix": {"listed": 0.0}}, "at least one of them above 0"),
        ({"drill_mix": {"copy": 2.0, "alike": -1.0}}, "shares of 0 or more"),
        ({"drill_mix": {}}, "at least one of them above 0"),
    ],
)
def test_mixes_that_cannot_be_drawn_from(generator, mixes, said):
    with pytest.raises(ValueError, match=said):
        TrainingMix(generator, **mixes)
