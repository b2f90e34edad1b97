"""The recipe's scores of the dense model are those of the package, and agree with plain cross entropy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from testbed.evaluate import _loss_by_position, _retrieval
from transformers import LlamaConfig, LlamaForCausalLM

from seerattention.tasks import TaskGenerator

from ..evaluate.tiny import make_text, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def books(tokenizer):
    return [np.array(tokenizer.encode(make_text(1500, seed), add_special_tokens=False)) for seed in (1, 2)]


def tiny_model(tokenizer):
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def test_losses_are_cross_entropy(tokenizer, books):
    model = tiny_model(tokenizer)
    found = _loss_by_position(model, tokenizer.bos_token_id, books, 256, batch_tokens=512, windows=3)
    rng, windows = np.random.default_rng(0), []
    for _ in range(3):
        text = books[int(rng.integers(2))]
        start = int(rng.integers(0, len(text) - 254))
        windows.append([tokenizer.bos_token_id, *text[start : start + 255]])
    ids = torch.tensor(np.array(windows))
    with torch.no_grad():
        logits = model(ids).logits
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")
    assert found["windows"] == 3
    assert found["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-4)
    assert found["mean_loss_early"] == pytest.approx(float(losses[:, 16:32].mean()), rel=1e-4)
    assert found["perplexity_last_quarter"] == pytest.approx(math.exp(losses[:, -64:].mean()), rel=1e-4)


@pytest.mark.parametrize(("task", "shape"), [("single", (5, 1)), ("multikey", (2, 4))])
def test_at_least_as_many_questions_as_were_asked_for(tokenizer, books, task, shape, monkeypatch):
    model, made, sample = tiny_model(tokenizer), [], TaskGenerator.sample

    def answered(self, *arguments, **options):
        """A sample whose first question has for an answer what the model says."""
        made.append(sample(self, *arguments, **options))
        ids = made[-1].input_ids
        for start, stop in made[-1].questions[0].answers:
            for position in range(start, stop):
                with torch.no_grad():
                    ids[position] = int(model(torch.tensor(ids[:position])[None]).logits[0, -1].argmax())
        return made[-1]

    monkeypatch.setattr(TaskGenerator, "sample", answered)
    right = _retrieval(model, TaskGenerator(tokenizer, books, seed=1), task, 768, samples=5, batch_size=2)
    assert right.shape == shape
    assert len(made) == shape[0]
    with torch.no_grad():
        guesses = [model(torch.tensor(one.input_ids)[None]).logits[0].argmax(-1).numpy() for one in made]
    expected = [
        [all((g[a - 1 : b - 1] == s.input_ids[a:b]).all() for a, b in q.answers) for q in s.questions]
        for s, g in zip(made, guesses, strict=True)
    ]
    assert right.tolist() == expected
    assert right[:, 0].all()
