"""Fixtures of the evaluation tests."""

import numpy as np
import pytest

from seerattention.tasks import TaskGenerator

from .tiny import make_model, make_text, make_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model(tokenizer):
    return make_model(len(tokenizer))


@pytest.fixture(scope="session")
def books(tokenizer):
    return [np.array(tokenizer.encode(make_text(3000, seed), add_special_tokens=False)) for seed in (1, 2)]


@pytest.fixture
def generator(tokenizer, books):
    return TaskGenerator(tokenizer, books, split="test", seed=0)
