"""Chunked losses must equal plain cross entropy, and the summaries plain averages."""

import math

import numpy as np
import pytest
import torch

from seerattention import TopK, baselines
from seerattention.evaluate import forward
from seerattention.evaluate.perplexity import PerplexityResult, cut_documents, document_losses, evaluate_perplexity
from seerattention.evaluate.settings import Setting


@pytest.fixture
def documents(books):
    return cut_documents(books, 300, 4)


def test_losses_equal_cross_entropy(model, documents, monkeypatch):
    monkeypatch.setattr(
        forward, "_CHUNK_ELEMENTS", 2 * 7 * model.config.vocab_size
    )  # chunks of 7 positions, the last one partial
    losses = document_losses(model, documents, batch_size=2)
    with torch.no_grad():
        logits = model(documents).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), documents[:, 1:], reduction="none")
    assert losses.shape == (4, 299)
    np.testing.assert_allclose(losses, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_a_prefix_costs_what_the_shorter_prompt_costs(model, documents):
    setting = Setting("oracle", selector=baselines.Oracle(TopK(0.4)))
    (long,) = evaluate_perplexity(model, documents, [setting])
    (short,) = evaluate_perplexity(model, documents[:, :192], [setting])
    assert long.density < 0.8
    np.testing.assert_allclose(long.losses[:, :191], short.losses, rtol=1e-3, atol=1e-4)
    assert long.perplexity(0, 192)[0] == pytest.approx(short.perplexity()[0], rel=1e-4)


def test_summaries():
    losses = np.arange(2 * 7, dtype=np.float32).reshape(2, 7)  # tokens 1..7 of documents of 8
    result = PerplexityResult("x", 1.0, losses)
    assert result.loss(0, 4) == (pytest.approx((1 + 8) / 2), pytest.approx(3.5))  # tokens 1, 2, 3
    assert result.loss(4, 6)[0] == pytest.approx((3.5 + 10.5) / 2)
    mean, error = result.perplexity(6)
    assert (mean, error) == (pytest.approx(math.exp(9)), pytest.approx(math.exp(9) * 3.5))
    assert result.last_quarter() == result.perplexity(6)
    other = PerplexityResult("y", 0.5, losses + np.array([[1.0], [3.0]], dtype=np.float32))
    assert other.loss_increase(result) == (pytest.approx(2.0), pytest.approx(1.0))
    with pytest.raises(ValueError, match="no predicted token"):
        result.loss(8)


def test_buckets_cover_every_position_once():
    result = PerplexityResult("x", 1.0, np.zeros((1, 1499), dtype=np.float32))
    assert result.buckets() == [(0, 256), (256, 512), (512, 1024), (1024, 1500)]
    assert [entry["length"] for entry in result.to_dict()["by_length"]] == [256, 512, 1024, 1500]


def test_documents_are_disjoint_pieces():
    documents = cut_documents([np.arange(10), np.arange(100, 125)], 5, 6)
    assert documents[:, 0].tolist() == [0, 100, 5, 105, 110, 115]
    with pytest.raises(ValueError, match="only 7 documents"):
        cut_documents([np.arange(10), np.arange(100, 125)], 5, 8)


def test_a_head_that_would_be_wrong_is_refused(model, documents):
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(NotImplementedError, match="final_logit_softcapping"):
        document_losses(model, documents)
