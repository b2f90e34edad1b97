"""Training sequences: whatever is asked in one was stated before in it, and the losses weigh what they should."""

from __future__ import annotations

import numpy as np
import pytest

import seerattention as seer
from seerattention.tasks import TaskGenerator, TrainingMix
from seerattention.tasks.training import DRILL_MIX, LONG_DRILL, SHORT_DRILLS, TASK_MIX


@pytest.fixture
def generator(tokenizer):
    book = np.array(tokenizer.encode(seer.testbed.book_texts("train")[0][:60_000], add_special_tokens=False))
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
