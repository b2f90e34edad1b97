"""Tokenizers, token files and batches."""

from __future__ import annotations

import numpy as np
import pytest
from testbed.data import Batches, load_books, tokenise, train_tokenizer
from testbed.schedule import Phase
from transformers import AutoTokenizer

OPTIONS = {"shortest_book": 1000, "templates": None}
PHASES = [Phase(128, 0.5, 1024, 1e-3, drills=1.0), Phase(256, 0.5, 1024, 1e-3, tasks=0.5)]


def test_numbers_are_groups_of_three_digits(prepared):
    tokenizer = AutoTokenizer.from_pretrained(prepared)
    assert len(tokenizer.encode("123456", add_special_tokens=False)) == 2
    text = 'He said "no" on the 5th of May 1871, quietly.\n  Then: 007 042'
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.encode("x")[0] == tokenizer.bos_token_id


def test_a_vocabulary_too_small_for_the_numbers_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="larger vocabulary than 600"):
        train_tokenizer(iter(["some text " * 2000]), 600, tmp_path, characters=2e4)


def test_token_files_hold_every_text_once(prepared, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(prepared)
    texts = ["A line of text.\n" * 3000, "short"]
    total = tokenise(iter(texts), tokenizer, tmp_path / "a.u16")
    ids = np.fromfile(tmp_path / "a.u16", np.uint16)
    assert len(ids) == total
    first, second = np.split(ids, np.flatnonzero(ids == 0)[1:])
    assert tokenizer.decode(first[1:]) == texts[0]
    assert tokenizer.decode(second[1:]) == texts[1]
    books = load_books([tmp_path / "a.u16"], shortest=100)
    assert [len(book) for book in books] == [len(first) - 1]
    with pytest.raises(ValueError, match="no book of at least 1000000 tokens"):
        load_books([tmp_path / "a.u16"], shortest=1_000_000)


def test_batches_without_workers_repeat_with_the_seed(prepared):
    ids, weights, kinds = Batches(PHASES, prepared, 0, 3, OPTIONS).get(0)
    assert ids.shape == weights.shape == (8, 129)
    assert len(kinds) == 8
    assert all(kind.startswith("drill_") for kind in kinds)
    again = Batches(PHASES, prepared, 0, 3, OPTIONS).get(0)[0]
    assert (ids == again).all()
    other = Batches(PHASES, prepared, 0, 4, OPTIONS).get(0)[0]
    assert (ids != other).any()


@pytest.mark.slow
def test_workers_follow_the_phase(prepared):
    batches = Batches(PHASES, prepared, 1, 3, OPTIONS)
    try:
        assert batches.get(0)[0].shape == (8, 129)
        assert batches.get(1)[0].shape == (4, 257)
    finally:
        batches.close()
