"""The embedded tokenizer, for all tests of the tasks."""

import pytest
from transformers import AutoTokenizer

import seerattention as seer


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(seer.testbed.model_path())
