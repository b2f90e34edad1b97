"""The budgets that come with the testbed's gates hold on books that they were not fitted on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import seerattention as seer
from seerattention import testbed
from seerattention.evaluate.perplexity import cut_documents
from seerattention.hf.prompts import run_prompt
from seerattention.hf.state import state_of


@pytest.fixture(scope="module")
def model_and_book():
    model, tokenizer = testbed.load("cpu", torch.float32)
    text = testbed.book_texts("test")[0][: 8 * 8192]
    ids = np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return seer.attach(model, testbed.gates_path(), min_context=0), cut_documents(
        [ids], 8192, 1, bos=tokenizer.bos_token_id
    )


@pytest.mark.parametrize(("length", "density"), [(4096, 0.1), (4096, 0.2), (8192, 0.1), (8192, 0.12)])
def test_total_density_on_a_held_out_book(model_and_book, length, density):
    model, book = model_and_book
    seer.set_policy(model, density=density)
    with seer.record(model) as stats, torch.no_grad():
        run_prompt(model, {"input_ids": book[:, :length]})
    assert 0.85 * density < float(stats.total_density) < 1.05 * density


def test_what_is_stored_beside_the_budgets(model_and_book):
    """Prompts by the rule that measured best; decoding is dense unless it is asked for, as it loses answers."""
    budgets = state_of(model_and_book[0]).budgets
    assert budgets.tokens >= 32768
    assert len(budgets.layers) == 8
    assert max(budgets.layers) > 1.5 * min(budgets.layers)
    fresh, _ = testbed.load("cpu", torch.float32)
    phases = state_of(seer.attach(fresh, testbed.gates_path())).phases
    assert phases["prefill"].policy == seer.RelativeThreshold(1.0)
    assert phases["decode"].policy == seer.Dense()
